"""The rules of `batch=study`: what is dropped beyond seed noise, what is taken, and how much is trained."""

from __future__ import annotations

import random
from dataclasses import asdict, replace

import pytest

from goodfit.config.chooser import Chooser
from goodfit.config.execution import choose_batch
from goodfit.config.measured import BatchCost, Measured
from goodfit.config.request import TrainRequest
from goodfit.config.resolve import resolve
from goodfit.config.study import (
    MAX_SECONDS,
    NUM_SEEDS,
    StudyCost,
    choose_studied,
    design_study,
    judge,
    t_quantile,
)
from plans import facts_of


def cost(batch, *values, monitor="accuracy", losses=None, **more):
    return StudyCost(batch=batch, monitor=monitor, values=values, losses=losses or tuple(1.0 for _ in values),
                     samples=6000, rate=100.0, **more)  # fmt: skip


NOISY = (cost(16, 0.60, 0.64, 0.62), cost(64, 0.63, 0.60, 0.62), cost(256, 0.61, 0.60, 0.58))
WORSE = (cost(16, 0.60, 0.64, 0.62), cost(64, 0.61, 0.64, 0.63), cost(256, 0.44, 0.47, 0.46))


def kept(study):
    return [batch for batch, verdict in judge(study).items() if verdict.kept]


@pytest.mark.parametrize(
    ("probability", "freedom", "expected"),
    [(0.975, 1, 12.706), (0.95, 2, 2.920), (0.975, 3, 3.182), (0.95, 4, 2.132), (0.9875, 8, 2.752), (0.975, 30, 2.042)],
)
def test_quantiles_of_students_t(probability, freedom, expected):
    assert t_quantile(probability, freedom) == pytest.approx(expected, abs=6e-4)  # printed tables


def test_what_is_worse_than_the_seeds_allow_is_dropped_and_nothing_else():
    assert kept(NOISY) == [16, 64, 256]  # 3 points behind, but seeds differ by as much
    assert kept(WORSE) == [16, 64]
    verdict = judge(WORSE)[256]
    assert verdict.behind == pytest.approx(0.17, abs=0.005) and 0 < verdict.noise < 0.03
    assert verdict.describe(WORSE[2]).startswith("dropped: 17.0 points behind the best, seed noise ")


def test_a_seed_that_is_bad_for_all_is_no_noise():
    """5 points behind in every seed, while the seeds differ by 30: a comparison without blocks would see nothing."""
    lucky = (cost(16, 0.30, 0.60, 0.45), cost(64, 0.25, 0.55, 0.405))
    assert kept(lucky) == [16]
    crossed = (cost(16, 0.30, 0.60, 0.45), cost(64, 0.55, 0.25, 0.405))  # the same means
    assert kept(crossed) == [16, 64]


def test_for_the_loss_lower_is_better_and_it_breaks_ties():
    losses = [cost(b, *(1 - v for v in c.values), monitor="loss") for b, c in zip((16, 64, 256), WORSE, strict=True)]
    assert kept(losses) == [16, 64] and judge(losses)[64].behind == 0
    assert "0.170 behind the best" in judge(losses)[256].describe(losses[2])
    equal = [cost(16, 0.5, 0.5, losses=(2.0, 2.0)), cost(64, 0.5, 0.5, losses=(1.0, 1.0))]
    assert kept(equal) == [16, 64]
    assert kept([cost(16, 0.9, 0.9), cost(64, 0.9, 0.899)]) == [16, 64]  # within 0.2 %: no difference worth a size
    assert kept([cost(16, 0.9, 0.9), cost(64, 0.8, 0.8)]) == [16]


def test_problems_and_too_few_seeds():
    dead = cost(256, problem="out of memory")
    assert kept([*WORSE[:2], dead]) == [16, 64] and judge([*WORSE[:2], dead])[256].describe(dead).endswith(
        "out of memory"
    )
    assert judge([cost(16, 0.9), cost(64, 0.1)]) == {}  # one seed tells nothing
    assert judge([WORSE[0], dead]) == {} and judge([]) == {}
    assert kept([cost(16, 0.9, 0.9, 0.1), cost(64, 0.9, 0.9)]) == [16, 64]  # the seeds that all have


def test_the_best_of_equal_sizes_is_rarely_dropped():
    """Five sizes that are equal but for the seeds: each stays in 95 of 100 studies, and a worse one goes."""
    generator = random.Random(0)
    dropped = gone = 0
    for _ in range(1000):
        shared = [generator.gauss(0.6, 0.05) for _ in range(3)]
        study = [cost(16 << k, *(s + generator.gauss(0, 0.01) for s in shared)) for k in range(4)]
        study.append(cost(256, *(s - 0.05 + generator.gauss(0, 0.01) for s in shared)))
        verdicts = judge(study)
        dropped += not verdicts[16].kept
        gone += not verdicts[256].kept
    assert dropped <= 50 and gone > 900


def test_the_fastest_of_those_kept_is_taken():
    rates = {16: 500.0, 64: 970.0, 256: 2000.0}
    batch, reason = choose_studied(WORSE, rates, within=0.05, timed=True)
    assert batch == 64 and "100 % of the best rate of those kept; 256 dropped: 17.0 points behind" in reason
    assert "accuracy 62.7 ± 1.5 % over 3 seeds × 6,000 samples" in reason
    assert choose_studied(WORSE, {16: 930.0, 64: 970.0}, within=0.05, timed=True)[0] == 16  # within 5 %: the smallest
    assert choose_studied(NOISY, rates, within=0.05, timed=True)[0] == 256
    batch, reason = choose_studied(NOISY, rates, within=0.05, timed=False)
    assert batch == 16 and "no timing decides" in reason
    assert choose_studied((WORSE[0],), rates, within=0.05, timed=True) is None
    own = [replace(c, rate=r) for c, r in zip(NOISY, (100.0, 200.0, 150.0), strict=True)]
    assert choose_studied(own, {}, within=0.05, timed=True)[0] == 64  # nothing else was measured: its own rates


def test_the_plan_takes_it_scales_the_rate_and_keeps_the_table():
    sizes = tuple(BatchCost(batch=b, seconds=b / r, memory=10**6) for b, r in ((16, 500), (64, 970), (256, 2000)))
    measured = Measured(batch=64, batches=sizes, memory=10**9, study=WORSE)
    facts = replace(facts_of(), measured=measured)
    plan = resolve(TrainRequest(batch_study=True), facts)
    assert (plan.batch.value, plan.batch.source) == (64, "measured") and plan.lr.value == 1e-3
    assert resolve(TrainRequest(), replace(facts, measured=replace(measured, study=()))).batch.value == 256
    asked = resolve(TrainRequest(batch=32), facts)
    assert (asked.batch.value, asked.batch.source) == (32, "asked")
    careful = resolve(TrainRequest(deterministic=True), facts)
    assert careful.batch.value == 16 and careful.lr.value == 5e-4
    lines = [line for line in measured.table() if "studied" in line]
    assert len(lines) == 3 and "970 img/s" in lines[1] and "accuracy 62.7 ± 1.5 %   kept" in lines[1]
    assert "45.7 ± 1.5 %   dropped: 17.0 points" in lines[2]
    assert Measured.from_dict(asdict(measured)) == measured
    failed = replace(measured, study=(), study_problem="it was ended")
    made, _ = choose_batch(Chooser(TrainRequest(), None), replace(facts, measured=failed))
    assert made.value == 256 and made.reason.endswith("batch=study was not done: it was ended")


FIVE = [(16, 900.0), (32, 1500.0), (64, 2200.0), (128, 2600.0), (256, 2700.0)]


def test_the_cost_of_a_study_is_within_its_budget():
    made = design_study(FIVE, num_train=42_000, num_val=9_000, num_classes=10, epochs=300)
    assert made.sizes == (16, 32, 64, 128, 256) and made.num_seeds == NUM_SEEDS >= 2
    assert made.num_train % 256 == 0 and made.samples >= 40 * 256  # equal samples, and whole batches, of every size
    assert 0.7 * MAX_SECONDS < made.seconds <= made.budget == MAX_SECONDS and "at most 300 s" in made.describe()
    disturbed = [(16, 9.0), *FIVE[1:]]  # as was once measured beside other work; a step of 16 costs at most one of 32
    assert design_study(disturbed, num_train=42_000, num_val=9_000, num_classes=10, epochs=300).sizes == made.sizes
    short = design_study(FIVE, num_train=42_000, num_val=9_000, num_classes=10, epochs=150)
    assert short.seconds <= short.budget == pytest.approx(0.1 * 150 * 45_000 / 2700) and short.samples < made.samples


def test_a_study_that_is_asked_for_is_never_too_small_to_tell_anything():
    made = design_study(FIVE[:3], num_train=1257, num_val=270, num_classes=10, epochs=20)
    assert made.samples >= 40 * 64 and made.num_val == 270 and "more than a tenth of the run" in made.describe()
    slow = design_study([(b, r / 7) for b, r in FIVE], num_train=42_000, num_val=9_000, num_classes=10, epochs=300)
    assert slow.sizes == (16, 32, 64) and slow.seconds <= MAX_SECONDS  # the largest sizes need the most samples
    assert "more than 5 min" in design_study(
        [(16, 9.0), (32, 9.0)], num_train=999, num_val=99, num_classes=2, epochs=99
    )
    assert "fewer than two" in design_study([(16, 9.0)], num_train=999, num_val=99, num_classes=2, epochs=99)
    assert "fewer than two" in design_study(FIVE, num_train=100, num_val=20, num_classes=2, epochs=1)


def test_without_rates_the_study_is_that_of_the_rule():
    made = design_study([(b, 0.0) for b, _ in FIVE], num_train=42_000, num_val=9_000, num_classes=10, epochs=300)
    assert made.sizes == (16, 32, 64, 128) and made.seconds is None and 6_000 <= made.samples <= 6_400
    assert "ended after 5 min" in made.describe()
