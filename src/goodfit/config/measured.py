"""What was measured on this machine before the plan, and what follows from it: plain values and pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

ADMITTED_LOSS = 0.02  # relative difference of the loss from fp32 on the same batch that is admitted
# ... and of the gradient, as the norm of the difference over the norm. On trashnet bf16 is 0.03 to 0.06 off on resnet18 and 0.37
# to 0.44 on mobilenetv2_100 (cosine 0.91), another batch of the same data 1.1 to 1.5, swapped colour channels 0.9 to 1.2.
ADMITTED_GRADIENT = 0.5
WORTHWHILE = 0.05  # gain in speed for which lower precision is taken, and within which a smaller batch is as good
MEMORY_SHARE = 0.8  # of the free memory that a batch may take, unless asked otherwise


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """One way to execute the training step.

    Attributes:
        seconds: Median of one step, all of training in it (transform, forward, backward, clipping, update, average).
        loss_gap, gradient_gap: Relative difference from fp32 on the same batch.
        problem: Why it cannot be used; empty if it can.
    """

    precision: str
    channels_last: bool
    seconds: float = 0.0
    loss_gap: float = 0.0
    gradient_gap: float = 0.0
    problem: str = ""

    @property
    def name(self) -> str:
        """In words."""
        return self.precision + (" + channels-last" if self.channels_last else "")

    @property
    def admitted(self) -> bool:
        """Whether it computes the same as fp32, within the tolerance."""
        return not self.problem and self.loss_gap <= ADMITTED_LOSS and self.gradient_gap <= ADMITTED_GRADIENT


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
class Measured:
    """All that was measured. `batch` is the size at which `steps` were; `memory` what batches may take (bytes)."""

    batch: int
    steps: tuple[StepCost, ...] = ()
    batches: tuple[BatchCost, ...] = ()
    memory: int = 0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def table(self) -> list[str]:
        """Lines for people: every way to execute the step, and every batch size."""
        lines = [] if self.steps else ["nothing could be measured: rules decide"]
        for step in self.steps:
            speed = f"{self.batch / step.seconds:,.0f} img/s" if step.seconds else step.problem
            gap = f"   gradient {100 * step.gradient_gap:.1f} % off fp32" if step.gradient_gap else ""
            lines.append(f"{step.name:<24}{speed:>14}{gap}")
        for size in self.batches:
            speed = f"{size.rate:,.0f} img/s" if size.seconds else size.problem
            held = f"   {size.memory / 1e9:.1f} of {self.memory / 1e9:.1f} GB" if size.memory else ""
            lines.append(f"{f'batch {size.batch}':<24}{speed:>14}{held}")
        return lines

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Measured:
        """The inverse of to_dict; raises KeyError or TypeError if it does not fit."""
        return cls(
            batch=int(value["batch"]),
            steps=tuple(StepCost(**s) for s in value["steps"]),
            batches=tuple(BatchCost(**b) for b in value["batches"]),
            memory=int(value["memory"]),
            seconds=float(value["seconds"]),
        )


def best_execution(steps: Sequence[StepCost]) -> StepCost | None:
    """The fastest way that is admitted; fp32 rather than one that is less than 5 % faster. None if nothing works."""
    admitted = sorted((s for s in steps if s.admitted), key=lambda s: s.seconds)
    if not admitted:
        return None
    exact = next((s for s in admitted if s.precision == "fp32"), None)
    if exact is not None and exact.seconds <= admitted[0].seconds * (1 + WORTHWHILE):
        return exact
    return admitted[0]


def explain_execution(steps: Sequence[StepCost], chosen: StepCost) -> str:
    """Why this one, with the figures of the others."""
    plain = next((s for s in steps if s.precision == "fp32" and not s.channels_last and not s.problem), None)
    text = f"{1e3 * chosen.seconds:.0f} ms a step"
    if plain is not None and plain is not chosen:
        text = f"{chosen.name}: {plain.seconds / chosen.seconds:.1f} × plain fp32"
        if chosen.precision != "fp32":
            text += f", gradient within {100 * chosen.gradient_gap:.1f} %"
    refused = [s for s in steps if not s.admitted]
    if refused:
        why = refused[0].problem or f"gradient {100 * refused[0].gradient_gap:.0f} % off fp32"
        text += f"; {refused[0].name} refused: {why}"
    return text


def best_batch(batches: Sequence[BatchCost], memory: int) -> BatchCost | None:
    """The smallest size within 5 % of the best rate among those that fit into `memory` bytes. None if none does."""
    fitting = [b for b in batches if not b.problem and b.memory <= memory]
    if not fitting:
        return None
    best = max(b.rate for b in fitting)
    return min((b for b in fitting if b.rate >= best * (1 - WORTHWHILE)), key=lambda b: b.batch)


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
