"""The bundle: weights, ONNX, preprocessing, labels, plan, metrics, versions and licence in one folder, or none at all."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from goodfit.config.latency import verdict
from goodfit.core.errors import ExportError
from goodfit.core.safeio import MANIFEST, commit_directory, read_json, sha256_file, write_json, write_text
from goodfit.outcome.export import check_parity, export_onnx, odd_files
from goodfit.runtime.images import Preprocessing
from goodfit.runtime.latency import ROUNDS, serving_latency
from goodfit.runtime.letterbox import Letterbox
from goodfit.runtime.predictor import BUNDLE_SCHEMA, Predictor

NUM_PARITY_IMAGES = 64
HOPELESS = 3.0  # times the limit, at which no quieter moment of the machine is waited for
PAUSES = (2.0, 4.0)  # seconds before a bundle that was too slow is timed again

DETECT_SCRIPT = '''\
"""Find objects with this bundle: python predict.py photo.jpg ...  (needs goodfit, numpy, pillow, onnxruntime)"""
import pathlib
import sys

from goodfit.runtime import Predictor

predictor = Predictor(pathlib.Path(__file__).parent)
for row in predictor.stream(sys.argv[1:]):
    for found in row.get("objects") or [{"label": row.get("error", "nothing"), "score": "", "box": ""}]:
        print(row["image"], found["label"], found["score"], found["box"], sep="\\t")
'''

TORCH_SCRIPT = '''\
"""Find objects with this bundle: python predict.py photo.jpg ...  (needs goodfit with torch: this network does not become ONNX)"""
import pathlib
import sys

import goodfit

for row in goodfit.predict(pathlib.Path(__file__).parent, sys.argv[1:]):
    for found in row.get("objects") or [{"label": row.get("error", "nothing"), "score": "", "box": ""}]:
        print(row["image"], found["label"], found["score"], found["box"], sep="\\t")
'''

PREDICT_SCRIPT = '''\
"""Classify images with this bundle: python predict.py photo.jpg ...  (needs goodfit, numpy, pillow, onnxruntime)"""
import pathlib
import sys

from goodfit.runtime import Predictor

predictor = Predictor(pathlib.Path(__file__).parent)
for row in predictor.stream(sys.argv[1:]):
    print(row["image"], row.get("label") or row["error"], row.get("probability", ""), sep="\\t")
'''


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """How a bundle will be served: typical files, processor threads, the limit and what the plan measured (ms, 0: none)."""

    files: Sequence[Path]
    threads: int
    limit: float = 0.0
    planned: float = 0.0


@dataclass(frozen=True, slots=True)
class Exporter:
    """How a kind of network becomes a file, and how that is proven.

    Attributes:
        export: Writes model.onnx from network, preprocessing and path; returns what the file must reproduce.
        check: Compares a predictor with that on image files; raises ExportError where they differ.
        script: predict.py of the bundle.
        open: The predictor of a bundle's folder, with so many threads; None is `Predictor`.
    """

    export: Callable[[nn.Module, Any, Path], Any]
    check: Callable[[Predictor, Any, Sequence[bytes], Sequence[str]], dict[str, Any]]
    script: str
    open: Callable[..., Predictor] | None = None


def write_bundle(
    target: Path, network: nn.Module, *, preprocessing: Preprocessing | Letterbox, card: dict[str, Any], plan: dict[str, Any],
    images: Sequence[Path], served: Served, exporter: Exporter | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write the bundle of a trained network, refused unless ONNX Runtime reproduces it from real image files.

    Args:
        target: The bundle's folder; an older one is replaced only by a whole new one.
        network: With its best weights; moved to the CPU.
        card: Labels, metrics, licence, data hash and whatever else describes the model.
        plan: The plan as plain values.
        images: Real images of the validation split; one of them is also tried EXIF-rotated, grey, CMYK, RGBA and very
            large.
        served: How it will be served; the finished bundle is timed so.
        exporter: That of a classifier, if None.

    Returns:
        The content of bundle.json.

    Raises:
        ExportError: the network cannot be exported, its outputs differ, or it is slower than the limit.
        StorageError: the folder cannot be written.
    """
    exporter = exporter or CLASSIFIER
    files = [path.read_bytes() for path in images[:NUM_PARITY_IMAGES]]
    names = [path.name for path in images[:NUM_PARITY_IMAGES]]
    odd = odd_files(files[0])
    made: dict[str, Any] = {}

    def fill(folder: Path) -> None:
        write_json(folder / "plan.json", plan)
        tensors = {
            name: t.detach().to("cpu", copy=True).contiguous() for name, t in network.state_dict().items()
        }  # some are shared
        save_file(tensors, str(folder / "model.safetensors"))
        reference = draft_bundle(folder, network, preprocessing, card, exporter.export)
        made.update(read_json(folder / "bundle.json"))
        made["parity"] = exporter.check(
            (exporter.open or Predictor)(folder), reference, [*files, *odd.values()], [*names, *odd]
        )
        made["latency"] = check_latency(folder, served, exporter.open)
        (folder / MANIFEST).unlink()
        write_json(folder / "bundle.json", made)
        write_json(folder / "metrics.json", card["metrics"])
        write_text(folder / "predict.py", exporter.script)

    commit_directory(target, fill, {"schema": BUNDLE_SCHEMA})
    return made


CLASSIFIER = Exporter(export_onnx, check_parity, PREDICT_SCRIPT)


def draft_bundle(
    folder: Path, network: nn.Module, preprocessing: Preprocessing | Letterbox, card: dict[str, Any],
    export: Callable[[nn.Module, Any, Path], Any] = export_onnx,
) -> Any:  # fmt: skip
    """What a `Predictor` needs, in a folder that exists: model.onnx, a card and a manifest.

    Returns:
        The network with its normalisation, which the file must reproduce.

    Raises:
        ExportError: the exporter does not support the network.
    """
    reference = export(network, preprocessing, folder / "model.onnx")
    more = {"schema": BUNDLE_SCHEMA, "preprocessing": preprocessing.to_dict(), "versions": library_versions()}
    write_json(folder / "bundle.json", card | more)
    _preview_manifest(folder)
    return reference


def check_latency(folder: Path, served: Served, open_: Callable[..., Predictor] | None = None) -> dict[str, Any]:
    """Time one image after another from the bytes of its file, and compare with the limit, if there is one.

    Over the limit, it is measured up to three times, with pauses, before it counts: the machine may have been busy.

    Returns:
        The figures for the bundle's card.

    Raises:
        ExportError: the 95th percentile is over the limit, by more than two measurements differ.
    """
    predictor = (open_ or Predictor)(folder, threads=served.threads)
    files = [path.read_bytes() for path in served.files]
    found = serving_latency(predictor, files, rounds=ROUNDS if served.limit else 2)
    for pause in PAUSES if served.limit else ():
        if verdict(found.p95, served.limit) or found.p95 > HOPELESS * served.limit:
            break
        time.sleep(pause)
        found = min(found, serving_latency(predictor, files), key=lambda f: f.p95)
    made = {"p50_ms": found.p50, "p95_ms": found.p95, "preparing_ms": found.preparing, "threads": served.threads,
            "limit_ms": served.limit or None, "planned_p95_ms": served.planned or None, "verdict": ""}  # fmt: skip
    if not served.limit:
        return made
    made["verdict"] = verdict(found.p95, served.limit)
    if not made["verdict"]:
        planned = f"; the plan measured {served.planned:.1f} ms" if served.planned else ""
        raise ExportError(
            f"The bundle takes {found.p95:.1f} ms for one image (p95, {served.threads} threads, {found.preparing:.1f} ms of it "
            f"decoding and scaling), over the limit of {served.limit:g} ms{planned}.",
            kept="the trained weights, in checkpoints/best, and the test's result; nothing is trained again",
            next=f"when the machine is quiet: goodfit resume RUN; to accept it: goodfit resume RUN latency={1.1 * found.p95:.2g}ms",
        )
    return made


def _preview_manifest(folder: Path) -> None:
    """A manifest for a bundle in the making, so that it can be opened as a user will open it."""
    files = {p.name: {"size": p.stat().st_size, "sha256": sha256_file(p)} for p in folder.iterdir()}
    write_json(folder / MANIFEST, {"files": files})


def library_versions() -> dict[str, str]:
    """Versions of what made the bundle."""
    found = {"python": platform.python_version(), "platform": sys.platform}
    for name in (
        "goodfit",
        "torch",
        "torchvision",
        "timm",
        "transformers",
        "hotcoco",
        "numpy",
        "pillow",
        "onnx",
        "onnxruntime",
    ):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
