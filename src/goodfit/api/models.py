"""`models`: the catalogue as a table: cost, licence, where the weights are, and the latencies that were measured here."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from goodfit.api.timings import kept_here
from goodfit.config.catalogue import CATALOGUE, CatalogueModel
from goodfit.config.latency import Candidate, LatencyCost
from goodfit.core.errors import RequestError

NUM_PICTURES = 4
PICTURE = (512, 384)  # pixels; JPEG, as the photos of trashnet


def list_models(task: str = "classify", *, measure: bool = False) -> list[dict[str, Any]]:
    """The networks that goodfit chooses among, cheapest first; any other timm name can be asked for as well.

    No network connection is made. In Python the name is not `goodfit.models`, which is the folder of the networks.

    Args:
        task: As `goodfit train` takes it.
        measure: Time each on this machine now, as one photo is served on one thread, some seconds each.

    Returns:
        A row for each: `name`, `num_parameters`, `multiply_adds` (of one image at `imgsz` pixels), `top1` (ImageNet, percent, at
        `top1_imgsz` pixels; None without weights), `licence` (of its weights), `weights` ("cached", "hub" or "none"),
        `rung_for` (the kinds of pictures for which model=auto may choose it: tiny, small, photos), and `latency`, all that
        was measured on this machine: `imgsz`, `threads`, and p50 and p95 in milliseconds.

    Raises:
        RequestError: there is no catalogue for the task yet.
    """
    if task not in CATALOGUE:
        raise RequestError(f"There is no catalogue for task={task} yet.", next=f"task={', '.join(CATALOGUE)}")
    if measure:
        _measure(CATALOGUE[task])
    costs = kept_here()
    return [_row(model, [cost for cost in costs if cost.model == model.name]) for model in CATALOGUE[task]]


def _row(model: CatalogueModel, costs: list[LatencyCost]) -> dict[str, Any]:
    latency = {(c.imgsz, c.threads): {"imgsz": c.imgsz, "threads": c.threads, "p50_ms": c.p50, "p95_ms": c.p95}
               for c in reversed(costs)}  # fmt: skip
    return {
        "name": model.name,
        "num_parameters": model.num_parameters,
        "multiply_adds": model.multiply_adds,
        "imgsz": model.imgsz,
        "top1": model.top1 or None,
        "top1_imgsz": model.top1_imgsz or None,
        "licence": model.licence,
        "weights": _weights(model),
        "rung_for": list(model.rung_for),
        "latency": [latency[key] for key in sorted(latency)],
    }


def _weights(model: CatalogueModel) -> str:
    """Where the weights are: in the local cache of the model hub, there only, or nowhere."""
    if not model.licence:
        return "none"
    from huggingface_hub import try_to_load_from_cache

    return "cached" if isinstance(try_to_load_from_cache(model.repository, "model.safetensors"), str) else "hub"


def _measure(models: tuple[CatalogueModel, ...]) -> None:
    """Time each at its usual size; the figures go into the user cache, which the table is read from."""
    from goodfit.api.latency import timing
    from goodfit.models.catalog import IMAGENET_MEAN, IMAGENET_STD

    preprocessing = {"size": 224, "resize": 256, "interpolation": "bicubic", "mean": list(IMAGENET_MEAN),
                     "std": list(IMAGENET_STD)}  # fmt: skip
    with timing(preprocessing, ["a", "b"], _pictures(), threads=1, fresh=True) as measure:
        for model in models:
            measure(Candidate(model=model.name, imgsz=model.imgsz, score=0.0, cost=1.0))


def _pictures() -> list[bytes]:
    """JPEG files of smooth drawn pictures, always the same."""
    from PIL import Image

    made = []
    for number in range(NUM_PICTURES):
        coarse = np.random.default_rng(number).integers(0, 256, (12, 16, 3), dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(coarse).resize(PICTURE, Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
        made.append(stream.getvalue())
    return made


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The rows as aligned lines for the terminal."""
    width = max(len(row["name"]) for row in rows)
    lines = [f"{'':2}{'model':<{width}}  {'parameters':>10}  {'multiply-adds':>20}  {'ImageNet top-1':>16}  {'licence':<12}  {'weights':<7}  latency here"]  # fmt: skip
    for row in rows:
        top1 = f"{row['top1']:.1f} % at {row['top1_imgsz']}" if row["top1"] else "–"
        measured = ", ".join(f"{c['p50_ms']:.1f} ms at {c['imgsz']} ({c['threads']} thread{'s'[: c['threads'] > 1]})"
                             for c in row["latency"])  # fmt: skip
        lines.append(
            f"{'* ' if row['rung_for'] else '  '}{row['name']:<{width}}  {row['num_parameters'] / 1e6:>8.1f} M  "
            f"{row['multiply_adds'] / 1e9:>8.3f} G at {row['imgsz']:>3} px  {top1:>16}  {row['licence'] or '–':<12}  "
            f"{row['weights']:<7}  {measured or '–'}"
        )
    return [
        *lines,
        "* what model=auto chooses from; -stem1 and -stem2: for small pictures, from scratch; any other timm name works too",
    ]
