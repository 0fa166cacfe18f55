"""The bundle: weights, ONNX, preprocessing, labels, plan, metrics, versions and licence in one folder, or none at all."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from goodfit.core.safeio import MANIFEST, commit_directory, sha256_file, write_json, write_text
from goodfit.outcome.export import check_parity, export_onnx, measure_latency, odd_files
from goodfit.runtime.images import Preprocessing
from goodfit.runtime.predictor import BUNDLE_SCHEMA, Predictor

NUM_PARITY_IMAGES = 64

PREDICT_SCRIPT = '''\
"""Classify images with this bundle: python predict.py photo.jpg ...  (needs goodfit, numpy, pillow, onnxruntime)"""
import pathlib
import sys

from goodfit.runtime import Predictor

predictor = Predictor(pathlib.Path(__file__).parent)
for row in predictor.stream(sys.argv[1:]):
    print(row["image"], row.get("label") or row["error"], row.get("probability", ""), sep="\\t")
'''


def write_bundle(
    target: Path, network: nn.Module, *, preprocessing: Preprocessing, card: dict[str, Any], plan: dict[str, Any],
    images: Sequence[Path],
) -> dict[str, Any]:  # fmt: skip
    """Write the bundle of a trained network, refused unless ONNX Runtime reproduces it from real image files.

    Args:
        target: The bundle's folder; an older one is replaced only by a whole new one.
        network: With its best weights; moved to the CPU.
        card: Labels, metrics, licence, data hash and whatever else describes the model.
        plan: The plan as plain values.
        images: Real images of the validation split; one of them is also tried EXIF-rotated, grey, CMYK, RGBA and very
            large.

    Returns:
        The content of bundle.json.

    Raises:
        ExportError: the network cannot be exported, or its outputs differ.
        StorageError: the folder cannot be written.
    """
    files = [path.read_bytes() for path in images[:NUM_PARITY_IMAGES]]
    names = [path.name for path in images[:NUM_PARITY_IMAGES]]
    odd = odd_files(files[0])
    made: dict[str, Any] = {}

    def fill(folder: Path) -> None:
        reference = export_onnx(network, preprocessing, folder / "model.onnx")
        tensors = {name: t.detach().cpu().contiguous() for name, t in network.state_dict().items()}
        save_file(tensors, str(folder / "model.safetensors"))
        made.update(card, schema=BUNDLE_SCHEMA, preprocessing=preprocessing.to_dict(), versions=library_versions())
        write_json(folder / "bundle.json", made)
        _preview_manifest(folder)
        predictor = Predictor(folder)
        made["parity"] = check_parity(predictor, reference, [*files, *odd.values()], [*names, *odd])
        made["latency"] = measure_latency(predictor, predictor.preprocessing.pixels(files[0]))
        (folder / MANIFEST).unlink()
        write_json(folder / "bundle.json", made)
        write_json(folder / "plan.json", plan)
        write_json(folder / "metrics.json", card["metrics"])
        write_text(folder / "predict.py", PREDICT_SCRIPT)

    commit_directory(target, fill, {"schema": BUNDLE_SCHEMA})
    return made


def _preview_manifest(folder: Path) -> None:
    """A manifest for a bundle in the making, so that it can be opened as a user will open it."""
    files = {p.name: {"size": p.stat().st_size, "sha256": sha256_file(p)} for p in folder.iterdir()}
    write_json(folder / MANIFEST, {"files": files})


def library_versions() -> dict[str, str]:
    """Versions of what made the bundle."""
    found = {"python": platform.python_version(), "platform": sys.platform}
    for name in ("goodfit", "torch", "timm", "numpy", "pillow", "onnx", "onnxruntime"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
