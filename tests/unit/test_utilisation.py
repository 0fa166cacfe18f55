"""The verdict on a run's time, from made-up epochs, for each bottleneck; the clock that measures it."""

from __future__ import annotations

import dataclasses
import time
import types

import pytest
import torch

from goodfit.config.plan import Decision
from goodfit.config.request import options
from goodfit.core.journal import Journal
from goodfit.engine.clock import PARTS, Clock
from goodfit.engine.epoch import Epoch
from goodfit.outcome.utilisation import utilisation
from plans import plan_of

SAMPLES = 1000


def epochs_of(num=3, **seconds):
    """Epochs of 1,000 samples, each with these seconds in its parts, by default ten of steps."""
    parts = {"step": 10.0, **seconds}
    train = sum(parts.get(part, 0.0) for part in ("step", "data", "host"))
    row = {f"{part}_seconds": parts.get(part, 0.0) for part in PARTS}
    row |= {"seconds": sum(parts.values()), "train_seconds": train, "samples_per_second": SAMPLES / train}
    return [dict(row) for _ in range(num)]


def judge(bare=100.0, cores=2, plan=None, last_save=0.0, epochs=None, **seconds):
    return utilisation(epochs or epochs_of(**seconds), bare, plan or plan_of(), num_cores=cores, last_save=last_save)


def test_shares_add_up_and_the_first_epoch_is_left_out_of_the_rate():
    slow, *later = epochs_of(data=2.0, validation=1.0, saving=1.0)
    slow["samples_per_second"] = 1.0
    found = judge(epochs=[slow, *later], last_save=3.0)
    assert sum(found.shares.values()) == pytest.approx(1, abs=1e-3)
    assert found.seconds["saving"] == 6.0 and found.seconds["data"] == 6.0 and found.seconds["other"] == 0.0
    assert found.share_of_bare == pytest.approx(1000 / 12 / 100, abs=1e-4)
    assert judge(bare=0.0).share_of_bare is None


def test_time_that_no_part_accounts_for_is_other():
    epochs = [{**e, "seconds": 12.0} for e in epochs_of()]
    assert judge(epochs=epochs).shares["other"] == pytest.approx(1 / 6, abs=1e-3)


@pytest.mark.parametrize(("asked", "words", "never"), [
    ({"cache": "off", "workers": 0}, ("29 % of the time waits for data", "cache=ram or workers=2"), ()),
    ({"cache": "ram", "workers": 0}, ("workers=2",), ("cache=",)),
    ({"cache": "disk", "workers": 2}, ("cache=ram",), ("workers=",)),
    ({"cache": "ram", "workers": 2, "policy": "rand"}, ("policy=off",), ("cache=", "workers=")),
    ({"cache": "ram", "workers": 2}, ("augment=light",), ("cache=", "workers=", "policy=")),
    ({"cache": "ram", "workers": 2, "augment": "off"}, ("imgsz=96",), ("cache=", "workers=", "augment=")),
    ({"cache": "ram", "workers": 2, "augment": "off", "imgsz": 64}, ("faster disk",), ("=",)),
    ({"cache": "off", "workers": 0, "epochs": 1}, ("workers=2",), ("cache=",)),
])  # fmt: skip
def test_waiting_for_data_proposes_what_is_not_set_yet(asked, words, never):
    found = judge(plan=plan_of(**asked), data=4.0)
    assert found.bottleneck == "data"
    assert all(word in found.lever for word in words), found.lever
    assert not any(word in found.lever for word in never), found.lever


def test_a_cache_that_fits_nowhere_is_not_proposed():
    plan = plan_of(workers=0)
    off = dataclasses.replace(plan, cache=Decision("off", "fits nowhere", "measured"))
    assert "cache=" not in judge(plan=off, data=4.0).lever


@pytest.mark.parametrize(("part", "asked", "word"), [
    ("validation", {}, "25 % of the time is validation: fewer samples for it, split=78/7/15"),
    ("validation", {"split": "80/10/10"}, "split=85/5/10"),
    ("saving", {}, "project= on a faster disk or ema=false"),
    ("saving", {"ema": False}, "project= on a faster disk"),
    ("host", {"batch": 16}, "batch=32"),
    ("host", {"batch": 16, "accumulate": 4}, "accumulate=2"),
    ("other", {}, "accumulate=2 from the start"),
])  # fmt: skip
def test_each_part_has_its_lever(part, asked, word):
    found = judge(plan=plan_of(**asked), **{part: 10 / 3})
    assert found.bottleneck == part and word in found.lever
    assert "ema=" not in found.lever or "ema" not in asked


def test_the_models_own_arithmetic():
    found = judge(data=0.2, validation=0.5)
    assert found.bottleneck == "step" and found.share_of_bare == pytest.approx(0.98, abs=0.01)
    assert found.lever.endswith("nothing to gain but by a smaller model=, imgsz=96 or a GPU")
    asked = judge(plan=plan_of(precision="fp32", channels_last=False)).lever
    assert "precision=bf16" in asked and "channels_last=true" in asked
    gpu = judge(plan=plan_of(cuda=True, deterministic=True)).lever
    assert "a GPU" not in gpu and "deterministic=false" in gpu


def test_steps_slower_than_rehearsed_are_told():
    found = judge(bare=150.0, data=0.5, plan=plan_of(cache="off", workers=2))
    assert found.bottleneck == "crowding" and "67 %" in found.lever and "workers=1" in found.lever
    assert "something else used the processor" in judge(bare=150.0, plan=plan_of(cache="ram")).lever
    assert judge(bare=150.0, data=9.0).bottleneck == "data"  # what costs more is named


def test_a_device_that_works_beside_the_host_hides_the_wait_for_data():
    """Half of the host's time is data wait, but the device computed all the while: its own speed is reached."""
    hidden = epochs_of(step=5.0, data=5.0)
    assert judge(epochs=hidden, bare=102.0, plan=plan_of(cuda=True)).bottleneck == "step"
    assert judge(epochs=hidden, bare=200.0, plan=plan_of(cuda=True)).bottleneck == "data"
    assert judge(epochs=hidden, bare=102.0, plan=plan_of()).bottleneck == "data"


def test_levers_are_options():
    for seconds in ({"data": 5.0}, {"validation": 5.0}, {"saving": 5.0}, {"host": 5.0}, {"other": 5.0}, {}):
        for plan in (plan_of(), plan_of(cache="off", workers=0, policy="rand", precision="fp32")):
            words = judge(plan=plan, **seconds).lever.replace("(with ", "").split()
            assert all(word.split("=")[0] in options() for word in words if "=" in word), words


def test_one_line():
    line = judge(data=4.0, validation=0.7).describe()
    assert line.startswith(
        "step 68 % · data 27 % · validation 5 % · 71 % of the model's own speed · 27 % of the time waits"
    )


def test_the_clock_gives_every_moment_to_one_part():
    clock = Clock()
    began = time.monotonic()
    for part, seconds in (("data", 0.03), ("step", 0.05), ("data", 0.02)):
        time.sleep(seconds)
        clock.spend(part)
    whole = time.monotonic() - began
    found = clock.lap()
    assert found["seconds"] == pytest.approx(whole, abs=0.005)
    assert sum(found[f"{part}_seconds"] for part in PARTS) == pytest.approx(found["seconds"], abs=1e-9)
    assert found["data_seconds"] == pytest.approx(0.05, abs=0.02) and found["step_seconds"] >= 0.05
    assert clock.lap()["seconds"] == 0.0


def test_the_wait_for_a_device_belongs_to_the_step():
    """A record whose flag takes time to arrive, as on a GPU that is still computing."""

    class Late:
        device = torch.device("cpu")

        def __float__(self):
            time.sleep(0.05)
            return 0.0

    progress = types.SimpleNamespace(segment=0, loss_sum=0.0, loss_count=0, bad_in_a_row=0, epoch=0,
                                     schedule=types.SimpleNamespace(total_steps=2))  # fmt: skip
    clock = Clock()
    epoch = Epoch(types.SimpleNamespace(progress=progress), Journal(None), clock)
    record = types.SimpleNamespace(step=1, bad=0.0, loss=Late(), grad_norm=1.0, lr=0.1, num_samples=4)
    epoch.start()
    epoch.add(record)
    epoch.add(record)  # reads the first
    assert 0.05 <= clock.spent("step") < 0.1 and clock.spent("host") < 0.02 and clock.spent("data") == 0.0
