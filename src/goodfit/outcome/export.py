"""A trained network as ONNX, with its normalisation inside, and the proof that it predicts the same from file bytes."""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import nn

from goodfit.core.errors import ExportError
from goodfit.runtime.images import Preprocessing, decode_image
from goodfit.runtime.predictor import Predictor

TOLERANCE = 1e-3  # of the largest logit's size, at least of 1: float32 sums in another order
LARGE_SIDE = 6000  # pixels of the very large odd image


class NotExportable(ExportError):
    """The exporter does not support the network."""


class _WithNormalisation(nn.Module):
    """uint8 images in, logits out: the normalisation becomes part of the exported graph."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, network: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(1, 3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(preprocessing.std).view(1, 3, 1, 1) * 255)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network((image.to(torch.float32) - self.mean) / self.std)
        return logits


def export_onnx(network: nn.Module, preprocessing: Preprocessing, path: Path) -> nn.Module:
    """Write `image` (uint8, N x 3 x S x S) → `logits` (float32, N x classes) with a dynamic N, in one file.

    Returns:
        The network with its normalisation, float32 on the CPU in evaluation mode: what the file must reproduce.

    Raises:
        ExportError: the exporter does not support the network.
    """
    wrapped = _WithNormalisation(network.cpu().float(), preprocessing).eval()
    write_onnx(wrapped, (preprocessing.size, preprocessing.size), ["logits"], path)
    return wrapped


def write_onnx(
    wrapped: nn.Module, shape: tuple[int, int], outputs: Sequence[str], path: Path, *, fixed_batch: bool = False
) -> None:
    """Write a network that takes `image`, uint8 of N x 3 x height x width with a dynamic N, as one file.

    Args:
        shape: Height and width, pixels.
        outputs: Names of what it returns.
        fixed_batch: N is 1.

    Raises:
        ExportError: the exporter does not support the network.
    """
    example = torch.zeros(1 if fixed_batch else 2, 3, *shape, dtype=torch.uint8)
    sizes = None if fixed_batch else {"image": {0: torch.export.Dim("batch", min=1)}}
    exporter_log = logging.getLogger("torch.onnx")
    level = exporter_log.level
    try:
        exporter_log.setLevel(logging.ERROR)  # it reports each of its own steps as a warning
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # notes of the exporter to its own authors
            torch.onnx.export(
                wrapped, (example,), str(path), input_names=["image"], output_names=list(outputs), dynamo=True,
                dynamic_shapes=sizes, external_data=False, verbose=False,
            )  # fmt: skip
    except Exception as error:  # the exporter raises many kinds
        raise NotExportable(f"The network cannot be exported to ONNX: {type(error).__name__}: {str(error)[:400]}",
                            kept="the trained weights, in checkpoints/best, and the test's result, in test.json",
                            next="report the model's name and the versions in events.jsonl") from error  # fmt: skip
    finally:
        exporter_log.setLevel(level)


def traced_difference(network: nn.Module, preprocessing: Preprocessing, pixels: torch.Tensor) -> float:
    """Trace a copy of a network as the exporter does, and compare what the trace computes on a batch of another size.

    The trace is where nearly all networks fail that cannot be exported, and takes a tenth of an export's time.

    Args:
        pixels: uint8, shape (N, 3, S, S).

    Returns:
        The largest difference, as a share of the largest logit, at least of 1.

    Raises:
        ExportError: the network cannot be traced.
    """
    wrapped = _WithNormalisation(copy.deepcopy(network).cpu().float(), preprocessing).eval()
    size = preprocessing.size
    example = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    try:
        with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
            warnings.simplefilter("ignore")
            traced = torch.export.export(
                wrapped, (example,), dynamic_shapes={"image": {0: torch.export.Dim("batch", min=1)}}, strict=False
            ).module()
            expected, actual = wrapped(pixels.cpu()), traced(pixels.cpu())
    except Exception as error:  # the tracer raises many kinds
        raise ExportError(f"The network cannot be traced: {type(error).__name__}: {str(error)[:400]}") from error
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1.0))


def odd_files(source: bytes) -> dict[str, bytes]:
    """One real picture in the forms that break preprocessing: EXIF-rotated, grey, CMYK, RGBA and very large.

    Args:
        source: The bytes of a real image of the dataset.
    """
    image = decode_image(source)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    scale = LARGE_SIDE / max(image.size)  # by the longer side: no shape goes over the limit of pixels
    large = image.resize((max(1, round(scale * image.width)), max(1, round(scale * image.height))))
    rgba = image.convert("RGBA")
    rgba.putalpha(Image.linear_gradient("L").resize(image.size))
    return {
        "EXIF-rotated": _encode(image, "JPEG", exif=exif.tobytes()),
        "grey": _encode(image.convert("L"), "PNG"),
        "CMYK": _encode(image.convert("CMYK"), "JPEG"),
        "RGBA": _encode(rgba, "PNG"),
        "very large": _encode(large, "JPEG"),
    }


def _encode(image: Image.Image, format: str, **more: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **more)
    return buffer.getvalue()


def check_parity(
    predictor: Predictor, reference: nn.Module, files: Sequence[bytes], names: Sequence[str]
) -> dict[str, Any]:
    """Compare ONNX Runtime with torch on image files, from their bytes through `goodfit.runtime`.

    Run one by one and all in one batch, as a model that was exported with a fixed batch would fail on one of the two.

    Returns:
        The largest difference of logits, the tolerance, and the number of files.

    Raises:
        ExportError: a difference is over the tolerance, or a predicted class differs.
    """
    pixels = np.stack([predictor.pixels(data, where=name) for data, name in zip(files, names, strict=True)])
    with torch.inference_mode():
        expected = torch.cat([reference(torch.from_numpy(p[None])) for p in pixels]).numpy()
    tolerance = TOLERANCE * max(1.0, float(np.abs(expected).max()))
    single = np.concatenate([predictor.logits(p[None]) for p in pixels])
    largest = 0.0
    for label, actual in (("one by one", single), ("in one batch", predictor.logits(pixels))):
        difference = np.abs(actual - expected).max(axis=1)
        largest = max(largest, float(difference.max()))
        worst = int(difference.argmax())
        same_class = _same_class(actual, expected, tolerance)
        if not np.isfinite(actual).all() or difference[worst] > tolerance or not same_class:
            raise ExportError(
                f"The ONNX model does not reproduce the trained one ({label}): logits differ by {difference[worst]:.2g} "
                f"on {names[worst]}, more than {tolerance:.2g}.",
                kept="the trained weights, in checkpoints/best",
                next="report the model's name and the versions in events.jsonl",
            )
    return {"max_difference": largest, "tolerance": tolerance, "num_files": len(files)}


def _same_class(actual: npt.NDArray[np.float32], expected: npt.NDArray[np.float32], tolerance: float) -> bool:
    """The same class wins, except where the two best are closer than the tolerance."""
    two = np.sort(expected, axis=1)[:, -2:]
    clear = two[:, 1] - two[:, 0] > 2 * tolerance
    return bool((actual.argmax(1) == expected.argmax(1))[clear].all())
