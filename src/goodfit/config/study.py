"""`batch=study`: how long the candidates are trained, and which of them validate worse: pure rules, no torch.

The comparison is a randomised block design: every batch size is trained from the same seeds on the same samples, so that
a seed that is lucky for all tells nothing. A size is dropped if its mean is below the best mean by more than d standard
errors, the subset selection of Gupta (1965, Technometrics 7:225): with d the upper 5 % point of Student's t, shared out
over the comparisons after Bonferroni, the size that is really the best stays in at least 95 of 100 studies.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

NUM_SEEDS = 3
LEAST_SEEDS = 2  # below which there is no seed noise to compare with
LEAST_EPOCHS = 3
LEAST_UPDATES = 40  # of the largest size, below which a short training says nothing about a long one
LEAST_OF_CLASS = 10  # training images of each class, where there are as many
LEAST_VAL = 500  # validation images, where there are as many
MAX_SECONDS = 300.0
RUN_SHARE = 0.1  # of the projected run that a study may take, if that is less than five minutes
START_SECONDS = 6.0  # of a new process: imports and the pictures
TRAINING_SECONDS = 0.5  # beside the steps, of each training, mostly to build the network
BESIDE = 1.3  # times the measured steps: pictures are cut beside them, and short epochs start anew
FORWARD_SHARE = 1 / 3  # of a training step's cost, to validate a sample
RULE_PASSES = 6_000  # samples of each training where no rate is known
RULE_SIZES = 4  # candidates then, from the smallest
ERROR = 0.05  # of the best size being dropped
EQUAL = 0.002  # of the figure: differences below this are none, also where seeds happen to agree exactly


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyCost:
    """A batch size as it was trained.

    Attributes:
        monitor: The validation figure that `values` are, the plan's.
        values, losses: The best validation of each training, one for each seed, and its loss.
        samples: Samples that each training saw, passes counted.
        rate: Samples per second, validation included.
        problem: Why it cannot be used; empty if it can.
    """

    batch: int
    monitor: str = ""
    values: tuple[float, ...] = ()
    losses: tuple[float, ...] = ()
    samples: int = 0
    rate: float = 0.0
    problem: str = ""

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> StudyCost:
        """The inverse of dataclasses.asdict after a way through JSON; raises TypeError or KeyError if it does not fit."""
        return cls(**{**value, "values": tuple(value["values"]), "losses": tuple(value["losses"])})

    @property
    def mean(self) -> float:
        """Of the figure over the seeds."""
        return sum(self.values) / len(self.values)

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds; 0 for one seed."""
        more = sum((v - self.mean) ** 2 for v in self.values)
        return math.sqrt(more / max(1, len(self.values) - 1))

    def describe(self) -> str:
        """The figure, as "accuracy 61.2 ± 0.8 %"."""
        if self.monitor == "loss":
            return f"loss {self.mean:.3f} ± {self.spread:.3f}"
        return f"{self.monitor.replace('_', ' ')} {100 * self.mean:.1f} ± {100 * self.spread:.1f} %"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a size stays: by how much it is worse than the best, and how much the seeds allow."""

    kept: bool
    behind: float
    noise: float
    problem: str = ""

    def describe(self, cost: StudyCost) -> str:
        """In words, as "dropped: 6.1 points behind, noise 1.9"."""
        if self.problem:
            return f"dropped: {self.problem}"
        unit, scale = ("", 1.0) if cost.monitor == "loss" else (" points", 100.0)
        places = 3 if cost.monitor == "loss" else 1
        far = f"{scale * self.behind:.{places}f}{unit} behind the best, seed noise {scale * self.noise:.{places}f}"
        return f"{'kept' if self.kept else 'dropped'}: {far}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyDesign:
    """What a study will train. `seconds` is None where no rate is known."""

    sizes: tuple[int, ...]
    num_seeds: int
    num_train: int
    num_val: int
    epochs: int
    seconds: float | None
    budget: float

    @property
    def samples(self) -> int:
        """Samples that each training sees, passes counted; the same for every size."""
        return self.epochs * self.num_train

    @property
    def cost(self) -> float:
        """Seconds, infinite where they are not known."""
        return math.inf if self.seconds is None else self.seconds

    def describe(self) -> str:
        """What it will do and cost, before it starts."""
        text = (f"batches {', '.join(map(str, self.sizes))}: {self.num_seeds} trainings each on {self.num_train:,} samples "
                f"× {self.epochs} epochs, validated on {self.num_val:,}; ")  # fmt: skip
        if self.seconds is None:
            return f"{text}no rate was measured; it is ended after {MAX_SECONDS / 60:.0f} min"
        if self.seconds > self.budget:
            return (f"{text}about {self.seconds:.0f} s, more than a tenth of the run ({self.budget:.0f} s): fewer "
                    f"samples would tell nothing")  # fmt: skip
        return f"{text}about {self.seconds:.0f} s of at most {self.budget:.0f} s"


def design_study(
    sizes: Sequence[tuple[int, float]], *, num_train: int, num_val: int, num_classes: int, epochs: int
) -> StudyDesign | str:  # fmt: skip
    """How much to train, so that it stays within five minutes and a tenth of the projected run; or why not to.

    Where a tenth of the run is too little to tell anything, a study that was asked for takes more, up to five minutes;
    where that is too little too, the largest sizes are left out.

    Args:
        sizes: Batch sizes that fit, and the samples per second measured at each; 0 where nothing was measured.
        num_train, num_val: Samples of the run's splits.
        epochs: Of the run.
    """
    rates = {size: rate for size, rate in sizes if LEAST_UPDATES * size <= epochs * num_train and size < num_train}
    if len(rates) < 2:
        return "fewer than two batch sizes fit the memory and the number of images"
    chosen = sorted(rates)
    for larger, size in itertools.pairwise(reversed(chosen)):  # a smaller step takes no longer: neighbours disturbed it
        rates[size] = max(rates[size], rates[larger] * size / larger)
    timed = all(rate > 0 for rate in rates.values())
    projected = epochs * (num_train + FORWARD_SHARE * num_val) / max(rates.values()) if timed else math.inf
    budget = min(MAX_SECONDS, RUN_SHARE * projected)

    def design(passes: float) -> StudyDesign:
        return _design(chosen, math.ceil(passes), num_train, num_val, epochs, rates if timed else {}, budget)

    if not timed:
        chosen = chosen[:RULE_SIZES]
        return design(max(RULE_PASSES, LEAST_UPDATES * chosen[-1], LEAST_EPOCHS * LEAST_OF_CLASS * num_classes))
    while len(chosen) > 1:
        passes = float(max(LEAST_UPDATES * chosen[-1], LEAST_EPOCHS * LEAST_OF_CLASS * num_classes))
        made = design(passes)
        if made.cost <= MAX_SECONDS:
            while passes < epochs * num_train and (more := design(passes := 1.1 * passes)).cost <= budget:
                made = more
            return made
        chosen = chosen[:-1]
    return (
        f"{NUM_SEEDS} trainings of two sizes for {LEAST_UPDATES} updates each take more than {MAX_SECONDS / 60:.0f} min"
    )


def _design(
    chosen: Sequence[int], passes: int, num_train: int, num_val: int, run_epochs: int, rates: dict[int, float],
    budget: float,
) -> StudyDesign:  # fmt: skip
    """Round passes to whole epochs of whole batches of every size: the sizes are powers of two, so all see the same."""
    epochs = min(run_epochs, max(LEAST_EPOCHS, math.ceil(passes / num_train)))
    largest = chosen[-1]
    samples = max(largest, min(num_train, math.ceil(passes / epochs / largest) * largest) // largest * largest)
    val = min(num_val, max(LEAST_VAL, samples))
    seconds = None
    if rates:
        work = BESIDE * epochs * (samples + FORWARD_SHARE * val) * sum(1 / rates[size] for size in chosen)
        seconds = START_SECONDS + NUM_SEEDS * (work + len(chosen) * TRAINING_SECONDS)
    return StudyDesign(sizes=tuple(chosen), num_seeds=NUM_SEEDS, num_train=samples, num_val=val, epochs=epochs,
                       seconds=seconds, budget=budget)  # fmt: skip


def choose_studied(
    study: Sequence[StudyCost], rates: dict[int, float], *, within: float, timed: bool
) -> tuple[int, str] | None:
    """The batch size to take, with the figures: the smallest of those kept whose rate is nearly the best of theirs.

    Args:
        rates: Samples per second as measured, of the sizes that fit; empty takes those of the study.
        within: Share of the best rate that counts as nothing.
        timed: Whether a rate may decide; else the smallest that was kept is taken.

    Returns:
        None if the study says nothing.
    """
    verdicts = judge(study)
    kept = [c for c in study if c.batch in verdicts and verdicts[c.batch].kept]
    if not kept:
        return None
    speed = {c.batch: rates.get(c.batch, 0.0) if rates else c.rate for c in kept}
    fast = [c for c in kept if not timed or speed[c.batch] >= (1 - within) * max(speed.values())]
    taken = min(fast, key=lambda c: c.batch)
    text = f"{taken.describe()} over {len(taken.values)} seeds × {taken.samples:,} samples"
    if timed:
        share = speed[taken.batch] / max(speed.values()) if max(speed.values()) else 1.0
        text += f", {100 * share:.0f} % of the best rate of those kept"
    else:
        text += ", the smallest of those kept: with deterministic=true no timing decides"
    dropped = [f"{c.batch} {verdicts[c.batch].describe(c)}" for c in study if not verdicts[c.batch].kept]
    return taken.batch, "; ".join([text, *dropped])


def judge(costs: Sequence[StudyCost]) -> dict[int, Verdict]:
    """Which sizes stay, by size; empty where fewer than two seeds of two sizes were trained, so that nothing can be said.

    Higher is better, but for the loss. Ties of the best mean are broken by the validation loss.
    """
    sound = [c for c in costs if not c.problem]
    num = min((len(c.values) for c in sound), default=0)
    if num < LEAST_SEEDS or len(sound) < 2:
        return {}
    sound = [replace(c, values=c.values[:num], losses=c.losses[:num]) for c in sound]  # the same seeds of all
    sign = -1.0 if sound[0].monitor == "loss" else 1.0
    best = max(sound, key=lambda c: (sign * c.mean, -sum(c.losses)))
    noise = max(_margin([c.values for c in sound]), EQUAL * abs(best.mean))
    found = {c.batch: Verdict(False, math.inf, noise, c.problem) for c in costs if c.problem}
    for cost in sound:
        behind = sign * (best.mean - cost.mean)
        found[cost.batch] = Verdict(behind <= noise, behind, noise)
    return {c.batch: found[c.batch] for c in costs}


def _margin(table: Sequence[Sequence[float]]) -> float:
    """By how much a mean may fall behind the best before it is dropped: the seeds' own effects are taken out first."""
    k, m = len(table), len(table[0])
    rows = [sum(values) / m for values in table]
    columns = [sum(values[s] for values in table) / k for s in range(m)]
    whole = sum(rows) / k
    rest = sum((table[c][s] - rows[c] - columns[s] + whole) ** 2 for c in range(k) for s in range(m))
    freedom = (k - 1) * (m - 1)
    return t_quantile(1 - ERROR / (k - 1), freedom) * math.sqrt(2 * rest / freedom / m)


def t_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t for a probability above a half, by bisection of its distribution function."""
    low, high = 0.0, 1.0
    while _t_below(high, freedom) < probability:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_below(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


def _t_below(t: float, freedom: int) -> float:
    """P(T < t) for t >= 0 and whole degrees of freedom: finite sums, Abramowitz and Stegun (1964), 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    square = math.cos(angle) ** 2
    odd = freedom % 2
    term = total = math.cos(angle) if odd else 1.0
    for j in range(3 if odd else 2, freedom - 1, 2):
        term *= square * (j - 1) / j
        total += term
    inner = math.sin(angle) * total if freedom > 1 else 0.0
    return 0.5 + (2 / math.pi * (angle + inner) if odd else inner) / 2
