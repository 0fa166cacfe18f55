"""What is decided about averages of the weights, and what is refused."""

from __future__ import annotations

import json

import pytest

from goodfit.config.plan import Plan
from goodfit.core.errors import RequestError
from plans import plan_of


def test_what_swa_means_is_in_its_reason():
    assert plan_of().swa.value == 0 and plan_of().ema.value
    wsd = plan_of(epochs=40, swa=0.25)
    assert wsd.swa.value == 0.25 and wsd.swa.source == "asked"
    assert "without wsd's decay" in wsd.swa.reason and "ends the moving average" in wsd.swa.reason
    cosine = plan_of(epochs=40, swa=0.25, schedule="cosine", lrf=0.1, ema=False)
    assert "at the rate reached by then" in cosine.swa.reason and "moving average" not in cosine.swa.reason
    assert Plan.from_dict(json.loads(json.dumps(wsd.to_dict()))).swa == wsd.swa


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"epochs": 4, "swa": 0.25}, "0.25 of 4 epochs is 1, and an average needs 2"),
        ({"epochs": 10, "swa": 0.8, "warmup": "3"}, "would begin before the warm-up of 3 has ended"),
        ({"epochs": 40, "swa": 0.25, "decay": "20%"}, "takes the place of wsd's decay, so decay= cannot be used"),
        ({"epochs": 40, "swa": 0.25, "lrf": 0.1}, "takes the place of wsd's decay, so lrf= cannot be used"),
    ],
)
def test_what_cannot_be_is_refused(asked, why):
    with pytest.raises(RequestError, match=why):
        plan_of(**asked)
