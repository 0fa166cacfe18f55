"""A trained detector as ONNX, from uint8 pictures to boxes and scores, and the proof that it finds the same from file bytes.

What follows the network's dense outputs (threshold, best candidates, suppression of doubles) is numpy in goodfit.runtime, as
torchvision's own is not taken by the exporter.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from goodfit.core.errors import ExportError
from goodfit.models.detection.family import Family
from goodfit.outcome.export import TOLERANCE, write_onnx
from goodfit.runtime.detections import box_iou
from goodfit.runtime.letterbox import Letterbox
from goodfit.runtime.predictor import Predictor

ROUNDING = 1e-6  # of a value, as sums in another order differ
SURE = 0.05  # score above which an object must be found by both
SAME_SCORE = 1e-3
SAME_BOX = 0.98  # IoU
CLOSE_CALL = 0.01  # of IoU, around the limit for doubles
DRAWS = 3  # of roundings that a picture's objects must survive to be compared
CHECKS = "TRANSFORMERS_DISABLE_TORCH_CHECK"
Floats = np.ndarray[Any, Any]


class Unsteady(ExportError):
    """A network whose answers hang on rounding, so that another runtime cannot be held to them."""


class Served(nn.Module):
    """uint8 pictures (N, 3, H, W) in; boxes (N, A, 4) in pixels of the input and scores (N, A, classes) out."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, network: nn.Module, letterbox: Letterbox, family: Family) -> None:
        super().__init__()
        self.network = network
        self._family = family
        self.lowest = _lowest(family)
        self.register_buffer("mean", torch.tensor(letterbox.mean).view(1, 3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(letterbox.std).view(1, 3, 1, 1) * 255)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All candidates."""
        boxes, scores = self._family.candidates(self.network, self._normalised(image))
        return boxes, scores

    def _normalised(self, image: torch.Tensor) -> torch.Tensor:
        return (image.to(torch.float32) - self.mean) / self.std

    def is_steady(self, image: torch.Tensor) -> bool:
        """Whether the candidates of a picture stay the same when its values change by a rounding. A network that has learned little
        rates all places alike, and which of them it looks at then hangs on the last digit."""
        if self.lowest is None:
            return True
        values = self._normalised(image)
        if self._family.is_close_call(self.network, values):
            return False
        noise = torch.rand(values.shape, generator=torch.Generator().manual_seed(0)) - 0.5
        made = [
            [t.numpy() for t in self._family.candidates(self.network, v)]
            for v in (values, values * (1 + ROUNDING * noise))
        ]
        return _difference(made[1], made[0], self.lowest) <= TOLERANCE


def export_detector(network: nn.Module, letterbox: Letterbox, family: Family, path: Path) -> Served:
    """Write `image` → `boxes`, `scores` with a dynamic N, or N of 1 where the family has a fixed batch, in one file.

    Returns:
        What the file must reproduce: float32, on the CPU, in evaluation mode.

    Raises:
        ExportError: the exporter does not support the network.
    """
    wrapped = Served(network.cpu().float(), letterbox, family).eval()
    with _unchecked():
        write_onnx(wrapped, letterbox.shape, ["boxes", "scores"], path, fixed_batch=family.fixed_batch)
    return wrapped


@contextmanager
def _unchecked() -> Iterator[None]:
    """Without transformers' own checks of tensors, which torch's exporter does not take (`aten._is_all_true`)."""
    before = os.environ.get(CHECKS)
    os.environ[CHECKS] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[CHECKS]
        else:
            os.environ[CHECKS] = before


def traced_problem(network: nn.Module, letterbox: Letterbox, family: Family, pixels: torch.Tensor) -> str:
    """Why a detector could not be exported, found by tracing a copy as the exporter does; empty if it can be."""
    wrapped = Served(copy.deepcopy(network).cpu().float(), letterbox, family).eval()
    example = torch.zeros(1 if family.fixed_batch else 2, 3, *letterbox.shape, dtype=torch.uint8)
    pixels = pixels[:1] if family.fixed_batch else pixels
    sizes = None if family.fixed_batch else {"image": {0: torch.export.Dim("batch", min=1)}}
    try:
        with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad(), _unchecked():
            warnings.simplefilter("ignore")
            traced = torch.export.export(wrapped, (example,), dynamic_shapes=sizes, strict=False).module()
            wanted, made = wrapped(pixels.cpu()), traced(pixels.cpu())
    except Exception as error:  # the tracer raises many kinds
        return f"The detector cannot be traced: {type(error).__name__}: {str(error)[:400]}"
    apart = _difference([m.numpy() for m in made], [w.numpy() for w in wanted], _lowest(family))
    return "" if apart <= TOLERANCE else f"the traced detector's outputs differ by {apart:.2g}"


def _apart(found: Floats, wanted: Floats) -> float:
    """The largest difference, as a share of the largest value, at least of 1."""
    return float(np.abs(found - wanted).max() / max(1.0, float(np.abs(wanted).max())))


def _lowest(family: Family) -> float | None:
    """The score at or below which a candidate of a family without an order of candidates never becomes an object."""
    return family.selection.threshold if family.fixed_batch else None


def _difference(found: Sequence[Floats], wanted: Sequence[Floats], lowest: float | None) -> float:
    """The largest difference of boxes and scores, (N, A, 4) and (N, A, classes).

    Args:
        lowest: Where it is a number, candidates have no order: those of an image are matched, by the least difference in all, and
            pairs whose scores are both at or below it are left away, as the last of so many places goes to either of two that tie.
    """
    if lowest is None:
        return max(_apart(f, w) for f, w in zip(found, wanted, strict=True))
    from scipy.optimize import linear_sum_assignment

    largest = 0.0
    for image in range(len(wanted[0])):
        mine, theirs = ([made[image] for made in side] for side in (found, wanted))
        costs = sum(
            np.abs(f[None] - w[:, None]).sum(axis=2) / max(1.0, float(np.abs(w).max()))
            for f, w in zip(mine, theirs, strict=True)
        )
        rows, columns = linear_sum_assignment(costs)
        counts = np.maximum(mine[1][columns].max(axis=1), theirs[1][rows].max(axis=1)) > lowest
        if counts.any():
            largest = max(
                largest, *(_apart(f[columns[counts]], w[rows[counts]]) for f, w in zip(mine, theirs, strict=True))
            )
    return largest


def check_detector_parity(
    predictor: Predictor, reference: Served, files: Sequence[bytes], names: Sequence[str]
) -> dict[str, Any]:
    """Compare ONNX Runtime with torch on image files, from their bytes: all candidates, one by one and in batches; and the
    objects that come of them, matched as sets.

    Returns:
        The largest difference of a candidate (scores, and boxes over the input's side), the tolerance, the number of files, that of
        objects compared, of the files of which the candidates alone could be compared, and of those that were left out.

    Raises:
        Unsteady: for half of the files or more the network's own candidates hang on a rounding; other such files are left out.
        ExportError: a difference is over the tolerance, or an object is found by one and not by the other. Of a picture whose
            objects hang on a rounding of the trained model's own candidates, as where it has learned little and rates all places
            alike, the candidates alone are compared.
    """
    with torch.inference_mode():
        steady = [
            k for k, data in enumerate(files) if reference.is_steady(torch.from_numpy(predictor.pixels(data)[None]))
        ]
    if 2 * len(steady) <= len(files):
        raise Unsteady(f"The answer of this network changes with a rounding on {len(files) - len(steady)} of {len(files)} files.",
                       kept="the trained weights, in checkpoints/best", next="train it longer")  # fmt: skip
    num_left_out = len(files) - len(steady)
    files, names = [files[k] for k in steady], [names[k] for k in steady]
    pixels = np.stack([predictor.pixels(data, where=name) for data, name in zip(files, names, strict=True)])
    with torch.inference_mode():
        made = [reference(torch.from_numpy(p[None])) for p in pixels]
    wanted = [torch.cat(parts).numpy() for parts in zip(*made, strict=True)]
    largest, num_objects = 0.0, 0
    ties: set[int] = set()
    for label, size in (("one by one", 1), ("in batches", max(2, predictor.batch))):
        parts = [predictor.run(pixels[k : k + size]) for k in range(0, len(pixels), size)]
        found = [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]
        for number, name in enumerate(names):
            apart = _difference(
                [f[number : number + 1] for f in found], [w[number : number + 1] for w in wanted], reference.lowest
            )
            largest = max(largest, apart)
            mine = predictor.objects(found[0][number], found[1][number])
            theirs = predictor.objects(wanted[0][number], wanted[1][number])
            num_objects += len(theirs[1])
            same = _alike(mine, theirs, predictor.selection.iou)
            if not same and _is_tie(predictor, wanted[0][number], wanted[1][number]):
                ties.add(number)
                same = True
            if not apart <= TOLERANCE or not same:
                raise ExportError(
                    f"The ONNX model does not reproduce the trained one ({label}): outputs differ by {apart:.2g} on {name}, "
                    f"tolerance {TOLERANCE:.2g}, or other objects are found.",
                    kept="the trained weights, in checkpoints/best", next="report the model's name and the versions in events.jsonl",
                )  # fmt: skip
    return {"max_difference": largest, "tolerance": TOLERANCE, "num_files": len(files), "num_objects": num_objects // 2,
            "num_ties": len(ties), "num_left_out": num_left_out}  # fmt: skip


def _is_tie(predictor: Predictor, boxes: Floats, scores: Floats) -> bool:
    """Whether the objects of a picture become others when its candidates, (A, 4) and (A, classes), change by a rounding."""
    wanted = predictor.objects(boxes, scores)
    for seed in range(DRAWS):
        noise = np.random.default_rng(seed)
        moved = [
            v + ROUNDING * max(1.0, float(np.abs(v).max())) * noise.uniform(-1, 1, v.shape) for v in (boxes, scores)
        ]
        if not _alike(
            predictor.objects(moved[0].astype(np.float32), moved[1].astype(np.float32)), wanted, predictor.selection.iou
        ):
            return True
    return False


def _alike(one: tuple[Any, ...], other: tuple[Any, ...], limit: float) -> bool:
    """Whether the sure objects of either are found by the other too."""
    return _covered(one, other, limit) and _covered(other, one, limit)


def _covered(one: tuple[Any, ...], other: tuple[Any, ...], limit: float) -> bool:
    """Whether every sure object of one is among those of the other, with nearly the same box and score; or was taken there for
    a double of one of its class, which it overlaps by nearly the limit: a difference of 1e-6 decides such a case either way."""
    boxes, scores, classes = one[:3]
    sure = scores > SURE
    if not sure.any():
        return True
    if not len(other[1]):
        return False
    overlaps, alike = box_iou(boxes[sure], other[0]), classes[sure][:, None] == other[2][None]
    same = alike & (overlaps >= SAME_BOX) & (np.abs(scores[sure][:, None] - other[1][None]) <= SAME_SCORE)
    return bool((same | (alike & (overlaps >= limit - CLOSE_CALL))).any(axis=1).all())
