"""What was measured on this machine before the plan, and what follows from it: plain values and pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from goodfit.config.latency import LatencyCost
from goodfit.config.loading import LoadCost, loading_table
from goodfit.config.lr_range import LrRange
from goodfit.config.study import StudyCost, judge

ADMITTED_LOSS = 0.02  # relative difference of the loss from fp32 on the same batch that is admitted
# ... and of the gradient, as the norm of the difference over the norm. On trashnet bf16 is 0.03 to 0.06 off on resnet18 and 0.37
# to 0.44 on mobilenetv2_100 (cosine 0.91), another batch of the same data 1.1 to 1.5, swapped colour channels 0.9 to 1.2.
ADMITTED_GRADIENT = 0.5
BATCH_MARGIN = (
    0.03  # of the best rate, as measured, within which a smaller batch is as good: so 5 % in truth, with what
)
# the machine wanders while it is measured
WORTHWHILE = 0.05  # gain in speed for which lower precision is taken
ALLOCATOR_LOSS = 0.02  # share by which keeping freed memory may be measured slower before it is left off
MEMORY_SHARE = 0.8  # of the free memory that a batch may take, unless asked otherwise


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """One way to execute the training step.

    Attributes:
        seconds: Median of one step, all of training in it (transform, forward, backward, clipping, update, average).
        loss_gap, gradient_gap: Relative difference from fp32 on the same batch.
        problem: Why it cannot be used; empty if it can.
        compile: "off", or torch.compile's mode.
        compile_seconds: What its first steps took beyond ordinary ones. With nothing in torch's own cache this is the
            whole of compiling, else what is left of it.
    """

    precision: str
    channels_last: bool
    compile: str = "off"
    compile_seconds: float = 0.0
    seconds: float = 0.0
    loss_gap: float = 0.0
    gradient_gap: float = 0.0
    problem: str = ""

    @property
    def name(self) -> str:
        """In words."""
        compiled = {"off": "", "default": " + compile"}.get(self.compile, f" + compile {self.compile}")
        return self.precision + (" + channels-last" if self.channels_last else "") + compiled

    @property
    def admitted(self) -> bool:
        """Whether it computes the same as fp32, within the tolerance."""
        return not self.problem and self.loss_gap <= ADMITTED_LOSS and self.gradient_gap <= ADMITTED_GRADIENT

    def total(self, updates: int) -> float:
        """Seconds of a run of so many updates, compiling included."""
        return self.seconds * updates + self.compile_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchCost:
    """One batch size: seconds of a step, and the most memory that training took at it (bytes)."""

    batch: int
    seconds: float = 0.0
    memory: int = 0
    problem: str = ""

    @property
    def rate(self) -> float:
        """Samples per second."""
        return self.batch / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocatorCost:
    """Seconds of a step where freed memory is kept, and where the C library hands it back; blocks of steps in turn.

    Attributes:
        ratio: Median over pairs of neighbouring blocks of the seconds with the system's way over those with ours.
    """

    keep: float = 0.0
    system: float = 0.0
    ratio: float = 0.0
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """All that was measured; each part is empty where it was not.

    Attributes:
        batch: Size at which `steps` were measured.
        memory: What a batch may take, bytes.
        lr_range: Where the learning rate was to be found.
        latencies: Where a limit was asked for.
        study, study_problem: The sizes that `batch=study` trained, and why it did not.
    """

    batch: int
    steps: tuple[StepCost, ...] = ()
    batches: tuple[BatchCost, ...] = ()
    loading: tuple[LoadCost, ...] = ()
    memory: int = 0
    seconds: float = 0.0
    allocator: AllocatorCost | None = None
    lr_range: LrRange | None = None
    latencies: tuple[LatencyCost, ...] = ()
    study: tuple[StudyCost, ...] = ()
    study_problem: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def table(self) -> list[str]:
        """Lines for people: every way to execute the step, and every batch size."""
        known = self.steps or self.lr_range or self.latencies or self.study
        lines = [] if known else ["nothing could be measured: rules decide"]
        for step in self.steps:
            speed = f"{self.batch / step.seconds:,.0f} img/s" if step.seconds else step.problem
            gap = f"   gradient {100 * step.gradient_gap:.1f} % off fp32" if step.gradient_gap else ""
            start = f"   {step.compile_seconds:.0f} s to compile" if step.compile_seconds else ""
            lines.append(f"{step.name:<31} {speed:>11}{gap}{start}")
        for size in self.batches:
            speed = f"{size.rate:,.0f} img/s" if size.seconds else size.problem
            held = f"   {size.memory / 1e9:.1f} of {self.memory / 1e9:.1f} GB" if size.memory else ""
            lines.append(f"{f'batch {size.batch}':<31} {speed:>11}{held}")
        if self.allocator is not None and self.allocator.keep:
            lines.append(f"{'freed memory kept':<31} {f'{self.allocator.ratio:.2f} ×':>11}   as fast as handed back")
        if self.lr_range is not None:
            lines.append(f"{'learning rate':<31} {self.lr_range.reason}")
        lines += self._studied()
        return [*lines, *loading_table(self.loading), *(cost.line() for cost in self.latencies)]

    def _studied(self) -> list[str]:
        lines, verdicts, rates = [], judge(self.study), self.rates()
        for cost in self.study:
            figure = cost.describe() if cost.values else ""
            rate = rates.get(cost.batch, 0.0) or cost.rate
            said = verdicts[cost.batch].describe(cost) if cost.batch in verdicts else cost.problem
            lines.append(f"{f'batch {cost.batch}, studied':<31} {f'{rate:,.0f} img/s':>11}   {figure}   {said}")
        return lines + ([f"batch=study was not done: {self.study_problem}"] if self.study_problem else [])

    def rates(self) -> dict[int, float]:
        """Samples per second of the batch sizes that were measured and fit."""
        return {b.batch: b.rate for b in self.batches if not b.problem and b.memory <= self.memory}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Measured:
        """The inverse of to_dict; raises KeyError or TypeError if it does not fit."""
        return cls(
            batch=int(value["batch"]),
            steps=tuple(StepCost(**s) for s in value["steps"]),
            batches=tuple(BatchCost(**b) for b in value["batches"]),
            loading=tuple(LoadCost(**c) for c in value.get("loading", ())),  # plans of earlier versions lack it
            memory=int(value["memory"]),
            seconds=float(value["seconds"]),
            allocator=AllocatorCost(**value["allocator"]) if value.get("allocator") else None,
            lr_range=LrRange.from_dict(value["lr_range"]) if value.get("lr_range") else None,
            latencies=tuple(LatencyCost(**c) for c in value.get("latencies", ())),
            study=tuple(StudyCost.from_dict(s) for s in value.get("study", ())),
            study_problem=str(value.get("study_problem", "")),
        )


def best_execution(steps: Sequence[StepCost], updates: int = 1) -> StepCost | None:
    """The admitted way in which a run of so many updates takes the least time, compiling included. None if nothing works.

    What is simpler is taken unless it costs 5 % more: plain fp32 before lower precision, and eager before compiled.
    """
    admitted = sorted((s for s in steps if s.admitted), key=lambda s: s.total(updates))
    if not admitted:
        return None
    limit = admitted[0].total(updates) * (1 + WORTHWHILE)
    near = [s for s in admitted if s.total(updates) <= limit]
    eager = [s for s in near if s.compile == "off"]
    exact = [s for s in eager if s.precision == "fp32"] or [s for s in near if s.precision == "fp32"]
    return (exact or eager or near)[0]


def explain_execution(steps: Sequence[StepCost], chosen: StepCost) -> str:
    """Why this one, with the figures of the others."""
    plain = next((s for s in steps if s.name == "fp32" and not s.problem), None)
    text = f"{1e3 * chosen.seconds:.0f} ms a step"
    if plain is not None and plain is not chosen:
        text = f"{chosen.name}: {plain.seconds / chosen.seconds:.1f} × plain fp32"
        if chosen.precision != "fp32":
            text += f", gradient within {100 * chosen.gradient_gap:.1f} %"
    refused = [s for s in steps if not s.admitted and s.compile == "off"]
    if refused:
        why = refused[0].problem or f"gradient {100 * refused[0].gradient_gap:.0f} % off fp32"
        text += f"; {refused[0].name} refused: {why}"
    return text


def explain_compile(steps: Sequence[StepCost]) -> str:
    """What compiling gave and cost, for every mode that was tried; empty if none was."""
    found = []
    for step in steps:
        if step.compile == "off":
            continue
        eager = next(
            (
                s
                for s in steps
                if (s.precision, s.channels_last, s.compile) == (step.precision, step.channels_last, "off")
            ),
            None,
        )
        if step.problem:
            found.append(f"{step.compile} cannot be used: {step.problem}")
        elif not step.admitted:
            found.append(f"{step.compile} computes something else: gradient {100 * step.gradient_gap:.0f} % off fp32")
        elif eager is not None and eager.seconds:
            found.append(f"{step.compile}: {eager.seconds / step.seconds:.2f} × the eager speed, "
                         f"{step.compile_seconds:.0f} s to compile")  # fmt: skip
    return "; ".join(found)


def best_batch(batches: Sequence[BatchCost], memory: int) -> BatchCost | None:
    """The smallest size within 5 % of the best rate (3 % as measured) among those that fit into `memory` bytes. None if none does."""
    fitting = [b for b in batches if not b.problem and b.memory <= memory]
    if not fitting:
        return None
    best = max(b.rate for b in fitting)
    return min((b for b in fitting if b.rate >= best * (1 - BATCH_MARGIN)), key=lambda b: b.batch)


def latest(costs: Iterable[BatchCost]) -> tuple[BatchCost, ...]:
    """The last figures of each size, in the order of their first."""
    return tuple({cost.batch: cost for cost in costs}.values())


def explain_batch(batches: Sequence[BatchCost], chosen: BatchCost, memory: int) -> str:
    """Why this size: its share of the best rate and of the memory, and what the next larger one would give."""
    fitting = [b for b in batches if not b.problem and b.memory <= memory]
    best = max(b.rate for b in fitting)
    text = f"{100 * chosen.rate / best:.0f} % of the best rate at {100 * chosen.memory / max(1, memory):.0f} % of the memory"
    larger = [b for b in batches if b.batch > chosen.batch]
    if not larger:
        return text
    after = larger[0]
    if after.problem:
        return f"{text}; {after.batch}: {after.problem}"
    if after.memory > memory:
        return f"{text}; {after.batch} needs {after.memory / 1e9:.1f} GB"
    gain = 100 * (after.rate / chosen.rate - 1)
    return f"{text}; {after.batch} {'gains' if gain >= 0 else 'loses'} {abs(gain):.0f} %"
