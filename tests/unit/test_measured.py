"""What follows from measurements: which way to execute a step, which batch, and how it is said."""

from dataclasses import replace

import pytest

from goodfit.config.execution import batch_candidates, matching
from goodfit.config.measured import (
    BatchCost,
    Measured,
    StepCost,
    best_batch,
    best_execution,
    explain_batch,
    explain_execution,
)
from goodfit.config.plan import Decision

PLAIN = StepCost(precision="fp32", channels_last=False, seconds=0.2)
LAST = StepCost(precision="fp32", channels_last=True, seconds=0.16)
HALF = StepCost(precision="bf16", channels_last=True, seconds=0.1, loss_gap=0.001, gradient_gap=0.004)
GB = 10**9


def test_the_fastest_way_that_agrees_with_fp32_is_taken():
    assert best_execution([PLAIN, LAST, HALF]) is HALF
    assert best_execution([PLAIN, LAST, replace(HALF, gradient_gap=0.6)]) is LAST
    assert best_execution([PLAIN, replace(HALF, loss_gap=0.1)]) is PLAIN
    assert best_execution([PLAIN, replace(HALF, problem="out of memory")]) is PLAIN
    assert best_execution([replace(PLAIN, problem="x")]) is None and best_execution([]) is None


def test_what_was_asked_limits_the_ways():
    asked, free = Decision("fp32", "", "asked"), Decision("bf16", "", "rule")
    assert matching([PLAIN, LAST, HALF], asked, Decision(True, "", "rule")) == [PLAIN, LAST]
    assert matching([PLAIN, LAST, HALF], free, Decision(True, "", "asked")) == [LAST, HALF]
    assert matching([PLAIN, LAST, HALF], asked, Decision(False, "", "asked")) == [PLAIN]


def test_lower_precision_must_be_worth_it():
    assert best_execution([PLAIN, replace(HALF, seconds=0.195)]) is PLAIN
    assert best_execution([PLAIN, replace(HALF, seconds=0.18)]).precision == "bf16"


def test_the_reason_has_the_figures():
    assert (
        explain_execution([PLAIN, LAST, HALF], HALF) == "bf16 + channels-last: 2.0 × plain fp32, gradient within 0.4 %"
    )
    refused = explain_execution([PLAIN, replace(HALF, gradient_gap=0.6)], PLAIN)
    assert refused == "200 ms a step; bf16 + channels-last refused: gradient 60 % off fp32"


SIZES = tuple(
    BatchCost(batch=size, seconds=size / rate, memory=memory * GB)
    for size, rate, memory in ((16, 60, 1), (32, 90, 2), (64, 97, 4), (128, 100, 8))
)


def test_the_smallest_batch_near_the_best_rate_under_the_memory_cap():
    assert best_batch(SIZES, 16 * GB).batch == 64
    assert best_batch(SIZES, 3 * GB).batch == 32
    assert best_batch(SIZES, GB // 2) is None
    assert best_batch([*SIZES[:2], BatchCost(batch=64, problem="out of memory")], 16 * GB).batch == 32
    assert explain_batch(SIZES, SIZES[2], 16 * GB) == "97 % of the best rate at 25 % of the memory; 128 gains 3 %"
    assert explain_batch(SIZES, SIZES[1], 3 * GB).endswith("64 needs 4.0 GB")


@pytest.mark.parametrize(("num_train", "sizes"), [(5, (5,)), (100, (16,)), (700, (16, 32)), (1300, (16, 32, 64))])
def test_small_data_keeps_twenty_updates_an_epoch(num_train, sizes):
    assert batch_candidates(num_train) == sizes


def test_measurements_survive_their_file_form():
    found = Measured(batch=32, steps=(PLAIN, HALF), batches=SIZES, memory=GB, seconds=3.0)
    assert Measured.from_dict(found.to_dict()) == found
    assert [line.split()[0] for line in found.table()] == ["fp32", "bf16", "batch", "batch", "batch", "batch"]


def test_nothing_measured_is_said():
    assert Measured(batch=32).table() == ["nothing could be measured: rules decide"]
