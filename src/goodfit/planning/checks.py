"""The definite checks of the rehearsal: each is a matter of arithmetic on eight to sixteen samples, none of luck.

They ask whether labels, pictures, loss, gradients, evaluation and learning rate are put together rightly. The planted
bugs that they are tested with are the common ones of Karpathy, "A Recipe for Training Neural Networks" (2019).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from goodfit.engine.contracts import Micro
from goodfit.engine.optimizer import set_learning_rate
from goodfit.engine.schedule import Schedule
from goodfit.engine.state import TrainState, copy_buffers
from goodfit.engine.step import StepContext, train_step
from goodfit.planning.tensors import changed, difference, is_input, outputs_of, pick, some

CHANCE_BAND = (0.5, 1.5)  # times the chance level, for the loss at the start
SAME = 1e-3  # of the largest output: float32 and TF32 differ by less, dropout and batch statistics by far more
LEAK = 1e-4  # of the gradient on the own input; without a leak that on the others is exactly zero
LOUD = 200.0  # added to outputs: a loss of logits grows with it, a loss of probabilities ends at ln(classes) + 1
LEFT_OVER = 0.01  # of all trainable numbers that may be vectors without a gradient (unused tokens and scales)
MOVING_STEPS = 8  # an fp16 loss scale may have to be halved a few times before the first update

Build = Callable[[nn.Module], torch.optim.Optimizer]


@dataclass(frozen=True, slots=True)
class Check:
    """One check of the rehearsal: what was seen, and what it usually means when it fails."""

    name: str
    passed: bool
    evidence: str
    meaning: str
    first: float | None = None  # loss at its start ...
    last: float | None = None  # ... and at its end, where there is one

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the journal and the report."""
        return {"name": self.name, "passed": self.passed, "evidence": self.evidence, "meaning": self.meaning}


class _Changed(nn.Module):
    """A model whose outputs are changed on the way out."""

    def __init__(self, model: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.model = model
        self._change = change

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """The model's outputs, those of floats with a row per sample changed."""
        made = self.model(*inputs, **named)
        return changed(made, lambda t: self._change(t) if t.is_floating_point() and t.ndim >= 2 else t)


def evaluating(model: nn.Module) -> nn.Module:
    """A copy of a model as evaluation has it: trained in training mode, then switched."""
    return copy.deepcopy(model).train().eval()


def check_start(
    model: nn.Module, context: StepContext, batch: Sequence[Micro], chance: float, *, known_head: bool
) -> Check:
    """The training loss of a batch before any update is that of a model that knows nothing; or, where its head came with
    the weights, any that is finite.

    In training mode, as the first step will be: the running statistics of a batch norm that has seen nothing blow up the
    outputs in evaluation (mobilenetv2_100 from scratch: 1.53, where chance is 1.10 and an alarm at 1.65).
    """
    total, count = 0.0, 0.0
    model = copy.deepcopy(model).train()
    with torch.no_grad():
        for micro in batch:
            data = context.transform.evaluate(context.device.move(micro.data))
            with context.device.autocast():
                terms = context.task.loss(model, data)
            total += sum(float(s) for s, _ in terms.values())
            count += max(float(c) for _, c in terms.values())
    loss = total / (count or 1.0)
    low, high = CHANCE_BAND
    return Check(
        "loss at start",
        math.isfinite(loss) and (known_head or low * chance <= loss <= high * chance),
        f"loss at start {loss:.2f} (chance {chance:.2f}{', but the head is not new' if known_head else ''})",
        "a loss far from chance means a head that is not new, images of the wrong scale, labels that do not fit, or a "
        "loss averaged over the wrong number",
    )


def check_outputs(model: nn.Module, context: StepContext, few: Any) -> Check:
    """Where a task says that its outputs are logits, they are not probabilities, and the loss takes them as they are."""
    meaning = "a softmax or sigmoid at the end of the model, before a loss that applies its own: gradients vanish"
    if context.task.describe().get("output") != "logits":
        return Check("outputs", True, "the outputs are not logits", meaning)
    losses = []
    with torch.inference_mode():
        outputs = outputs_of(context.task.predict(model, few))
        for sign in (1.0, -1.0):
            terms = context.task.loss(_Changed(model, lambda t, sign=sign: t + sign * _chequers(t)), few)  # type: ignore[misc]
            losses += [float(total) / (float(count) or 1.0) for total, count in terms.values()]
    for made in outputs:
        sums = made.sum(dim=1)
        if made.shape[1] > 1 and bool((made >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-3):
            evidence = "the model's outputs are already probabilities: not negative, and 1 in sum for every sample"
            return Check("outputs", False, evidence, meaning)
    if max(losses) < 0.1 * LOUD:  # outputs that are wrong by 200 cost about as much, unless they are squashed
        evidence = f"outputs wrong by {LOUD:.0f} cost {max(losses):.1f}: the loss turns them into probabilities twice"
        return Check("outputs", False, evidence, meaning)
    return Check("outputs", True, "outputs are logits, and the loss takes them so", meaning)


def _chequers(outputs: torch.Tensor) -> torch.Tensor:
    """+200 and -200 in turns over samples and outputs; float, the shape of `outputs`."""
    rows, columns = (torch.arange(n, device=outputs.device) for n in outputs.shape[:2])
    signs = 1.0 - 2.0 * ((rows[:, None] + columns) % 2)
    return LOUD * signs.view(*signs.shape, *(1,) * (outputs.ndim - 2)).expand(outputs.shape)


def check_target(model: nn.Module, context: StepContext, few: Any, *, known_head: bool) -> Check:
    """What the training loss pulls up is what evaluation counts as right.

    The outputs are replaced by the direction in which the loss falls, sample by sample; the meter's loss must fall too.
    A model whose head came with the weights is asked at outputs of zero: where it is surer than the smoothed labels, the
    loss pulls down what is right.
    """
    blank = _Changed(model, torch.zeros_like)
    seen: list[torch.Tensor] = []

    def hold(outputs: torch.Tensor) -> torch.Tensor:
        seen.append(outputs.detach().float().requires_grad_())
        return seen[-1]

    terms = context.task.loss(_Changed(blank if known_head else model, hold), few)
    slopes = torch.autograd.grad(torch.stack([total for total, _ in terms.values()]).sum(), seen, allow_unused=True)
    steps = iter([torch.zeros_like(s) if g is None else _loud(-g) for s, g in zip(seen, slopes, strict=True)])
    losses = []
    for network in (blank if known_head else model, _Changed(model, lambda t: next(steps).to(t.dtype))):
        meter = context.task.meter()
        with torch.inference_mode():
            meter.update(context.task.predict(network, few), few)
        losses.append(float(meter.compute().get("loss", math.nan)))
    before, after = losses
    return Check(
        "loss and evaluation agree",
        math.isnan(after) or after < before,
        f"following the training loss takes the evaluation's from {before:.2f} to {after:.2f}",
        "the training loss reads other labels than the evaluation: targets shifted, encoded twice, or of the wrong sign",
    )


def _loud(direction: torch.Tensor) -> torch.Tensor:
    """A direction scaled to 200 in every sample."""
    size = direction.abs().amax(dim=tuple(range(1, direction.ndim)), keepdim=True)
    return torch.nan_to_num(LOUD * direction / size)


def check_evaluation(model: nn.Module, context: StepContext, few: Any, num: int) -> Check:
    """In evaluation mode, predicting twice gives the same, changes nothing, and asks no neighbour."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    training = [name or type(model).__name__ for name, module in model.named_modules() if module.training]
    with torch.inference_mode():
        first, again = (context.task.predict(model, few) for _ in range(2))
    apart = difference(first, again)
    written = [name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])]
    leaning = _depends_on_neighbours(model, context, few, num) if training else 0.0
    problems = []
    if apart > SAME:
        problems.append(f"two predictions of the same samples differ by {apart:.0%} of the largest output")
    if written:
        problems.append(f"predicting changes {some(written)}")
    if leaning > SAME:
        problems.append(f"predictions change by {leaning:.0%} with the other samples of the batch")
    if problems and training:
        problems.append(f"{len(training)} modules stay in training mode ({some(training)})")
    return Check(
        "evaluation mode",
        not problems,
        "; ".join(problems) or "evaluation predicts the same twice, and changes nothing",
        "the model is evaluated in training mode: dropout is active, or batch norm uses and updates batch statistics",
    )


def _depends_on_neighbours(model: nn.Module, context: StepContext, few: Any, num: int) -> float:
    """How far predictions of the first half move when copies of the first sample stand in for the second."""
    half = max(1, num // 2)
    rows = [*range(half), *([0] * (num - half))]
    with torch.inference_mode():
        usual, other = (context.task.predict(model, batch) for batch in (few, pick(few, rows, num)))
    return difference(pick(usual, range(half), num), pick(other, range(half), num))


def check_leak(model: nn.Module, context: StepContext, few: Any, num: int) -> Check:
    """In evaluation mode, no sample's output depends on another sample's input."""
    moved = _depends_on_neighbours(model, context, few, num)
    inputs: list[torch.Tensor] = []

    def watch(tensor: torch.Tensor) -> torch.Tensor:
        if not is_input(tensor):
            return tensor
        inputs.append(tensor.detach().requires_grad_())
        return inputs[-1]

    made = outputs_of(context.task.predict(model, changed(few, watch)))
    weighed = [(t[0] * torch.arange(1, t[0].numel() + 1, device=t.device).view_as(t[0])).sum() for t in made]
    total = torch.stack(weighed).sum() if weighed else torch.zeros(())
    own = other = 0.0
    if inputs and total.requires_grad:
        slopes = [g for g in torch.autograd.grad(total, inputs, allow_unused=True) if g is not None and len(g) == num]
        own = max((float(g[0].abs().max()) for g in slopes), default=0.0)
        other = max((float(g[1:].abs().max()) for g in slopes if num > 1), default=0.0)
    leaks = other > LEAK * own
    evidence = "no sample's prediction depends on another's input"
    if leaks:
        evidence = (
            f"a sample's output has a gradient on other samples' inputs, {other / max(own, 1e-30):.0%} of its own"
        )
    elif moved > SAME:
        evidence = f"predictions change by {moved:.0%} with the other samples of the batch"
    return Check(
        "samples apart",
        not leaks and moved <= SAME,
        evidence,
        "a dimension was mixed up (a view where a transpose was meant, a mean over the batch), or batch norm uses batch "
        "statistics in evaluation",
    )


def check_loss(model: nn.Module, context: StepContext, batches: Sequence[Any], num: int) -> Check:
    """Sum and count of every term over a batch are those of its parts added up, as the exact step relies on."""
    meaning = "a term that is a mean already, or a count of something else than these samples: averages come out wrong"
    cut = max(1, 3 * num // 8)  # uneven parts, so that a mean of means does not pass
    for batch in batches:
        with torch.inference_mode():
            whole, *parts = (
                {name: (float(total), float(count)) for name, (total, count) in context.task.loss(model, data).items()}
                for data in (batch, pick(batch, range(cut), num), pick(batch, range(cut, num), num))
            )
        for name, values in whole.items():
            for k, what in enumerate(("sum", "count")):
                added = sum(part.get(name, (0.0, 0.0))[k] for part in parts)
                if not abs(values[k] - added) <= SAME * max(abs(values[k]), abs(added)):
                    evidence = (f"the {what} of the term `{name}` over {num} samples is {values[k]:.3g}, "
                                f"and {added:.3g} over its two parts")  # fmt: skip
                    return Check("loss sums", False, evidence, meaning)
    return Check("loss sums", True, "sums and counts of the loss add up", meaning)


def check_gradients(model: nn.Module, context: StepContext, build: Build, few: Any) -> Check:
    """One backward pass reaches the parameters that train at first, and the optimizer holds them all.

    A tensor that was frozen on purpose is no failure while others train. A gradient of exactly zero is none either: it
    is what layers below a weight that starts at zero get at first (timm's residual branches, say).
    """
    meaning = "layers that are frozen, detached or computed without gradients, or that the optimizer was never given"
    copied = copy.deepcopy(model)
    context.freezing.apply(copied, context.freezing.stage(0))
    named = dict(copied.named_parameters())
    trainable = {name: p for name, p in named.items() if p.requires_grad and p.numel() > 0}
    if not trainable:
        return Check("gradients", False, f"all {len(named)} parameter tensors are frozen", meaning)
    terms = context.task.loss(copied, few)
    loss = torch.stack([total / (float(count) or 1.0) for total, count in terms.values()]).sum()
    if not loss.requires_grad:
        return Check("gradients", False, "the loss carries no gradient to any parameter", meaning)
    loss.backward()
    held = {id(p) for group in build(copied).param_groups for p in group["params"]}
    absent = [name for name, p in trainable.items() if p.grad is None]
    apart = [name for name, p in trainable.items() if id(p) not in held]
    infinite = [name for name, p in trainable.items() if p.grad is not None and not bool(torch.isfinite(p.grad).all())]
    share = sum(named[name].numel() for name in absent) / sum(p.numel() for p in trainable.values())
    matrices = [name for name in absent if sum(side > 1 for side in named[name].shape) > 1]
    frozen = sum(not p.requires_grad for p in named.values())
    notes = [f"{len(trainable) - len(absent)} of {len(trainable)} trainable tensors get a gradient"]
    for what, names in (("none for", absent), ("not in the optimizer:", apart), ("not finite:", infinite)):
        if names:
            notes.append(f"{what} {some(names)}")
    if frozen:
        notes.append(f"{frozen} frozen")
    passed = not (matrices or apart or infinite or share > LEFT_OVER)
    return Check("gradients", passed, "; ".join(notes), meaning)


def check_learning_rate(state: TrainState, context: StepContext, schedule: Schedule, few: Micro) -> Check:
    """The planned learning rate is above zero somewhere, and a step with it moves the weights.

    Args:
        state: A copy of the run's, which is used up.
    """
    meaning = (
        "a learning rate of zero or far too small, an optimizer whose step does nothing, or losses that are not finite"
    )
    steps = {0, schedule.warmup_steps, schedule.stable_until - 1, schedule.total_steps // 2}
    factor = max(schedule.factor(max(0, step)) for step in steps)
    set_learning_rate(state.optimizer, factor)
    rates = [float(group["lr"]) for group in state.optimizer.param_groups]
    if not all(math.isfinite(rate) and rate >= 0 for rate in rates) or max(rates, default=0.0) == 0:
        evidence = f"the planned learning rate is {max(rates, default=0.0):g} at its peak"
        return Check("learning rate", False, evidence, meaning)
    before = {name: p.detach().clone() for name, p in state.model.named_parameters() if p.requires_grad}
    moved: list[str] = []
    done = 0
    while done < MOVING_STEPS and not moved:
        train_step(state, context, [few], factor, copy_buffers(state.model))
        moved = [n for n, p in state.model.named_parameters() if n in before and not torch.equal(p, before[n])]
        done += 1
    evidence = f"at a learning rate of {max(rates):.1e}, {len(moved)} of {len(before)} tensors moved by step {done}"
    return Check("learning rate", bool(moved), evidence, meaning)
