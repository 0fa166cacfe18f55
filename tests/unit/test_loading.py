"""What follows from measured loading: how many processes, how it is said, and which lever is named."""

from __future__ import annotations

import dataclasses

import pytest

from goodfit.config.chooser import Chooser
from goodfit.config.execution import _loading
from goodfit.config.loading import (
    LoadCost,
    best_loading,
    explain_loading,
    load_candidates,
    loading_lever,
    loading_table,
    more_may_help,
    unwise_loading,
)
from goodfit.config.measured import Measured
from goodfit.config.plan import Decision
from goodfit.config.request import TrainRequest
from goodfit.outcome.utilisation import _crowding, _data
from plans import plan_of


def cost(workers, wait, step=90.0, *, cache="off", prefetch=2, start=0.0, bare=90.0, problem=""):
    """A way to load, in milliseconds, at a batch of 32."""
    return LoadCost(cache=cache, workers=workers, prefetch=prefetch, batch=32, wait=wait / 1e3, step=step / 1e3,
                    start=start / 1e3, bare=bare / 1e3, problem=problem)  # fmt: skip


SLOW = [cost(0, 60), cost(1, 30, 100), cost(2, 4, 115)]  # 150, 130 and 119 ms a step
CACHED = cost(0, 3, cache="ram")


def test_the_candidates_go_up_to_the_cores_and_hold_what_was_asked():
    def numbers(*args, **asked):
        return [c.workers for c in load_candidates(*args, **asked)]

    assert numbers("off", 2) == [0, 1, 2] and numbers("ram", 1) == [0, 1]
    assert numbers("off", 24) == [0, 1, 2, 3, 4, 8, 16, 24] and numbers("off", 64)[-2:] == [32, 64]
    assert numbers("off", 2, workers=6) == [0, 1, 2, 6]
    asked = load_candidates("off", 2, cache_asked=True, prefetch=3)
    assert [(c.cache, c.workers) for c in asked] == [("ram", 0), ("off", 0), ("off", 1), ("off", 2)]
    assert {c.prefetch for c in asked} == {3} and len(load_candidates("ram", 2, cache_asked=True)) == 3


def test_measuring_goes_on_while_the_step_waits():
    assert more_may_help([]) and more_may_help(SLOW[:1]) and more_may_help(SLOW[:2])
    assert not more_may_help([cost(0, 60), cost(1, 1, 100)])  # nothing left to wait for
    assert not more_may_help([cost(0, 60), cost(1, 30, problem="a process died")])
    assert not more_may_help([cost(0, 20), cost(1, 20, 150), cost(2, 20, 150)])  # twice slower by a tenth
    assert not more_may_help([cost(0, 4, cache="ram")]) and more_may_help([cost(0, 6, cache="ram")])  # of 90 ms: 5 %
    assert more_may_help([cost(0, 4)])


def test_the_smallest_setting_near_the_best_rate():
    assert best_loading(SLOW, cache="off").workers == 2
    assert best_loading([*SLOW, cost(3, 0, 114)], cache="off").workers == 2  # 4 % faster is not worth a process
    assert best_loading([*SLOW, cost(3, 0, 110)], cache="off").workers == 3
    assert best_loading([SLOW[0], cost(1, 2, 100, start=45)], cache="off").workers == 0  # short epochs: the start costs
    assert best_loading([*SLOW[:2], cost(2, 0, problem="died")], cache="off").workers == 1
    assert best_loading(SLOW, cache="off", workers=1).workers == 1
    assert best_loading(SLOW, cache="off", workers=5) is None and best_loading(SLOW, cache="ram") is None
    deeper = cost(2, 0, 100, prefetch=4)
    assert best_loading([*SLOW, deeper], cache="off") is deeper
    assert best_loading([*SLOW, deeper], cache="off", prefetch=2) is SLOW[2]


def test_the_reason_has_the_figures_and_the_lever():
    assert explain_loading([CACHED], CACHED, num_cores=2) == "loading waits 3.0 of 93 ms a step"
    text = explain_loading(SLOW, SLOW[2], num_cores=2)
    assert text.startswith(
        "loading waits 4.0 of 119 ms a step; 1 loses 8 %; 24 % of the step's own speed is lost: more cores"
    )
    assert "a cache" in loading_lever(SLOW[:2], SLOW[1], num_cores=8)
    assert "cache=ram would end it, 344 in place of 269 img/s" in loading_lever([CACHED, *SLOW], SLOW[2], num_cores=2)
    left = cost(0, 20, cache="ram")
    assert "cache=ram would leave 18 %" in loading_lever([left, *SLOW[:1]], SLOW[0], num_cores=2)
    assert "augment=light" in loading_lever([left], left, num_cores=2)
    assert "2: a process died" in explain_loading([CACHED, cost(2, 0, cache="ram", problem="a process died")], CACHED,
                                                  num_cores=2)  # fmt: skip


def test_what_was_asked_is_called_a_loss_from_a_fifth_on():
    asked = unwise_loading(SLOW, SLOW[0], of="workers")
    assert asked == "cache=off, workers=0 trains 213 img/s; workers=2 would be 1.3 times as fast here"
    assert unwise_loading(SLOW, SLOW[1], of="workers") == ""
    assert unwise_loading([CACHED, *SLOW], SLOW[2], of="cache").endswith("cache=ram would be 1.3 times as fast here")
    assert unwise_loading(SLOW, SLOW[2], of="cache") == "" == unwise_loading([CACHED], CACHED, of="cache")


def decisions(costs, cache="off", **asked):
    facts = dataclasses.make_dataclass("F", ["data", "machine", "measured"])(
        dataclasses.make_dataclass("D", ["task"])("classify"),
        dataclasses.make_dataclass("M", ["num_cores"])(2),
        Measured(batch=32, loading=tuple(costs)),
    )
    chooser = Chooser(TrainRequest(cache=cache, **asked), None)
    made = _loading(chooser, facts, Decision(cache, "asked for", "asked"))
    return made["cache"], made["workers"], made["prefetch"]


def test_the_plan_takes_what_was_measured_and_keeps_what_was_asked():
    cache, workers, prefetch = decisions([CACHED, *SLOW, cost(2, 0, 100, prefetch=4)])
    assert (workers.value, workers.source, prefetch.value, prefetch.source) == (2, "measured", 4, "measured")
    assert cache.value == "off" and "cache=ram" not in cache.reason  # 8 % slower: no complaint
    cache, workers, prefetch = decisions([CACHED, *SLOW], workers=0)
    assert (workers.value, workers.source) == (0, "asked") and "workers=2 would be 1.3" in workers.reason
    assert (prefetch.value, prefetch.source) == (2, "rule") and "cache=ram would be 1.6" in cache.reason
    cache, workers, _ = decisions([])
    assert (workers.value, workers.source, cache.reason) == (1, "rule", "asked for")


def test_measured_loading_survives_its_file_form():
    found = Measured(batch=32, loading=(CACHED, *SLOW, cost(4, 0, problem="died")))
    assert Measured.from_dict(found.to_dict()) == found
    old = {k: v for k, v in found.to_dict().items() if k != "loading"}
    assert Measured.from_dict(old).loading == ()
    lines = loading_table(found.loading)
    assert lines[0].split()[:3] == ["cache=ram,", "workers=0", "344"] and "died" in lines[-1]


@pytest.mark.parametrize(("asked", "costs", "words", "never"), [
    ({"cache": "off", "workers": 0}, SLOW, "workers=2", "workers=8"),
    ({"cache": "off", "workers": 2}, SLOW, "cache=ram", "workers="),
    ({"cache": "off", "workers": 2}, [cost(0, 40, cache="ram"), *SLOW], "augment=light", "cache=ram"),
    ({"cache": "ram", "workers": 0}, [CACHED, cost(2, 1, 120, cache="ram")], "augment=light", "workers="),
    ({"cache": "ram", "workers": 2}, [CACHED, cost(2, 1, 120, cache="ram")], "workers=0", "workers=2"),
])  # fmt: skip
def test_the_verdict_does_not_contradict_what_was_measured(asked, costs, words, never):
    plan = dataclasses.replace(plan_of(**asked), measured=Measured(batch=32, loading=tuple(costs)))
    lever = _data(0.3, plan, 8)
    assert words in lever and never not in lever, lever


def test_fewer_processes_are_not_proposed_where_these_are_the_best():
    plan = plan_of(cache="off", workers=2)
    assert "workers=1" in _crowding(0.7, plan)
    measured = dataclasses.replace(plan, measured=Measured(batch=32, loading=tuple(SLOW)))
    assert "workers=" not in _crowding(0.7, measured) and "slower" in _crowding(0.7, measured)
