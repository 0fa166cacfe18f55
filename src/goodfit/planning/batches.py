"""The rehearsal's checks of what comes out of the loaders and the transform: labels, pictures, normalisation."""

from __future__ import annotations

import math

import torch

from goodfit.engine.contracts import Micro
from goodfit.engine.step import StepContext
from goodfit.planning.checks import Check
from goodfit.planning.tensors import changed, is_input, is_picture, pick, tensors_of

NEIGHBOUR_T = 5.0  # standard errors by which neighbours' pictures must be nearer than the own before that is an alarm
THUMBNAIL = 4  # pixels a side, to compare an augmented picture with the served one
SPANS = (0.5, 30.0)  # from black to white after normalisation; timm's networks take 1 to 4.5
OFF_CENTRE = 0.25  # of the span from black to white that the mean colour, zero, may lie outside of it
BEYOND = 0.1  # of that span that augmented pixels may lie outside of it
FLATTENED = 0.1  # of the pixels' own spread that must be left after augmentation and mixing


def check_labels(micro: Micro, served: Micro, context: StepContext) -> Check:
    """The training loader gives the same samples the same labels as the serving path, and each its own picture.

    Compared are all tensors of whole numbers that are no pictures, before and after the transform; what augmentation
    moves (boxes, masks) is of floats or pictures. Pictures are compared by thumbnails, with the neighbour's served one.

    Args:
        micro: A micro-batch of training.
        served: Its first samples through the serving path, in the same order.
    """
    num = len(served.samples)
    mine, theirs = pick(micro.data, range(num), len(micro.samples)), served.data
    labels = {k: t for k, t in tensors_of(theirs).items() if not is_picture(t) and not t.is_floating_point()}
    evidence = f"{num} samples carry the same labels in training as through the serving path"
    found = _other_labels(tensors_of(mine), labels, num) or _other_pictures(mine, theirs)
    if not found:
        made = tensors_of(context.transform.evaluate(context.device.move(theirs)))
        found = _other_labels({k: made.get(k, t).cpu() for k, t in labels.items()}, labels, num)
        found = found and f"after the transform, {found}"
    if not found and (rows := {k: t for k, t in labels.items() if t.ndim == 1 and len(t) == num}):
        moved = context.device.move(mine)
        made = tensors_of(context.transform.train(moved, epoch=0, step=0, rank=0, micro=0,
                                                  samples=micro.samples[:num], closing=False))  # fmt: skip
        kept = {k: made[k].cpu() for k, t in rows.items() if k in made and made[k].dtype == t.dtype}  # not mixed ones
        found = _other_labels(kept, {k: rows[k] for k in kept}, num)
        found = found and f"after the training transform, {found}"
    return Check(
        "labels",
        not found,
        found or evidence,
        "labels or pictures are shifted, shuffled apart from each other, or encoded anew between loader and loss",
    )


def _other_labels(mine: dict[str, torch.Tensor], labels: dict[str, torch.Tensor], num: int) -> str:
    """How labels differ from those of the serving path; empty if they are the same."""
    for place, right in labels.items():
        left = mine.get(place)
        if left is None or left.shape != right.shape:
            return f"`{place}` is {'missing' if left is None else tuple(left.shape)} in training, {tuple(right.shape)} served"
        if torch.equal(left, right):
            continue
        if right.ndim == 0 or len(right) != num:
            return f"`{place}` differs between training and the serving path"
        wrong = [k for k in range(num) if not torch.equal(left[k], right[k])]
        first = wrong[0]
        text = f"{len(wrong)} of {num} samples carry another `{place}` in training than through the serving path"
        if right.ndim == 1:
            text += f" (sample {first + 1}: {left[first].item()} instead of {right[first].item()})"
        for shift in (1, -1):
            inner = slice(1, None) if shift == 1 else slice(None, -1)
            if num > 2 and torch.equal(left[inner], right.roll(shift, 0)[inner]):
                text += f": shifted by one, each has that of the sample {'before' if shift == 1 else 'after'} it"
        return text
    return ""


def _other_pictures(mine: object, theirs: object) -> str:
    """Whether augmented pictures are more like their neighbours' served ones than like their own."""
    served = tensors_of(theirs)
    for place, tensor in tensors_of(mine).items():
        if not is_picture(tensor) or tensor.ndim != 4 or place not in served or len(tensor) < 4:
            continue
        a, b = (torch.nn.functional.adaptive_avg_pool2d(t.float(), THUMBNAIL) for t in (tensor, served[place]))
        for shift in (1, -1):
            nearer = _distance(a, b) - _distance(a, b.roll(shift, 0))
            t_value = float(nearer.mean() / (nearer.std() / math.sqrt(len(nearer))).clamp(min=1e-6))
            if t_value > NEIGHBOUR_T and float(nearer.mean()) > 1.0:  # grey levels of 255
                side = "before" if shift == 1 else "after"
                return f"the pictures are shifted by one: each `{place}` looks like that of the sample {side} it"
    return ""


def _distance(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of each pair, mirrored or not; shape (N,)."""
    return torch.minimum(*((first - other).abs().flatten(1).mean(1) for other in (second, second.flip(3))))


def check_normalisation(micro: Micro, context: StepContext, most: int) -> Check:
    """Black and white pixels become small numbers on both sides of zero, and training pictures lie between them.

    Probed with pictures that are half black and half white, so that dark, white and grey datasets are judged alike.
    """
    meaning = "pixels not divided by 255 or divided twice, or mean and spread on another scale than the pixels"
    rows = range(min(most, len(micro.samples)))
    raw = context.device.move(pick(micro.data, rows, len(micro.samples)))
    pictures = {place: t for place, t in tensors_of(raw).items() if is_picture(t)}
    probe = tensors_of(context.transform.evaluate(changed(raw, _half_white)))
    made = tensors_of(context.transform.train(raw, epoch=0, step=0, rank=0, micro=0,
                                              samples=micro.samples[: len(rows)], closing=False))  # fmt: skip
    notes: list[str] = []
    problems: list[str] = []
    for place in (place for place, t in probe.items() if place in pictures and is_input(t)):
        seen, (low, high) = made[place].float(), _by_channel(probe[place])
        problems += _problems(seen, low, high, _spread(pictures[place]) / 255)
        notes.append(f"black becomes {float(low.min()):.2f} and white {float(high.max()):.2f}; training pictures have "
                     f"mean {float(seen.mean()):.2f}, spread {float(seen.std()):.2g}")  # fmt: skip
    text = "; ".join(notes) or "no pictures"
    return Check("normalisation", not problems, f"{problems[0]}: {text}" if problems else text, meaning)


def _problems(seen: torch.Tensor, low: torch.Tensor, high: torch.Tensor, spread: torch.Tensor) -> list[str]:
    """What is wrong with normalised pictures, the gravest first.

    Args:
        seen: Training pictures, float32, shape (N, channels, S, S).
        low, high: What black and white become, shape (channels,).
        spread: Standard deviation of the pixels before, of values from 0 to 1, shape (channels,).
    """
    span = (high - low).clamp(min=1e-12)
    darkest, brightest = _by_channel(seen)
    found = {
        "not all pixels are finite": not bool(torch.isfinite(seen).all()),
        "black and white are nearly the same": float(span.min()) < SPANS[0],
        "the scale is too large": float(span.max()) > SPANS[1],
        "zero, the mean colour, lies outside": bool((torch.maximum(low, -high) > OFF_CENTRE * span).any()),
        "training pictures go beyond": bool((torch.maximum(low - darkest, brightest - high) > BEYOND * span).any()),
        "training pictures lose their contrast": bool(_spread(seen).sum() < FLATTENED * (spread * span).sum()),
    }
    return [problem for problem, there in found.items() if there]


def _half_white(tensor: torch.Tensor) -> torch.Tensor:
    """Pictures with a black left and a white right half in place of any."""
    if not is_picture(tensor):
        return tensor
    made = torch.zeros_like(tensor)
    made[..., tensor.shape[-1] // 2 :] = 255
    return made


def _by_channel(pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest value of each channel (of all, where there are none); float32, shape (channels,)."""
    values = _channels(pictures)
    return values.amin(1), values.amax(1)


def _spread(pictures: torch.Tensor) -> torch.Tensor:
    """Standard deviation of each channel; float32, shape (channels,)."""
    return _channels(pictures).std(1)


def _channels(pictures: torch.Tensor) -> torch.Tensor:
    """All values by channel, or in one row where there are no channels; float32, shape (channels, values)."""
    return pictures.float().transpose(0, 1).flatten(1) if pictures.ndim == 4 else pictures.float().reshape(1, -1)
