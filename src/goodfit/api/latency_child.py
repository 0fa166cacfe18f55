"""The process of its own that times candidates: `python -m goodfit.api.latency_child FOLDER` reads `ask.json` there.

It measures what is deployed: the network, with random weights, exported as the bundle will be, opened by
goodfit.runtime. A candidate a line: it is read from standard input, and its figures are printed.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from goodfit.config.latency import LatencyCost
from goodfit.core.errors import GoodfitError
from goodfit.core.safeio import read_json
from goodfit.models.builder import create_at_size
from goodfit.outcome.bundle import draft_bundle
from goodfit.runtime.images import Preprocessing
from goodfit.runtime.latency import serving_latency
from goodfit.runtime.predictor import Predictor


def time_candidate(ask: dict[str, Any], model: str, imgsz: int, files: list[bytes]) -> LatencyCost:
    """Export one candidate and time it on image files. A network that cannot be exported is a problem, not an error."""
    cost = LatencyCost(model=model, imgsz=imgsz, threads=int(ask["threads"]))
    preprocessing = replace(
        Preprocessing.from_dict(ask["preprocessing"]), size=imgsz, resize=round(imgsz * ask["zoom"])
    )
    with tempfile.TemporaryDirectory() as made:
        try:
            network = create_at_size(model, imgsz, num_classes=len(ask["labels"]))
            draft_bundle(Path(made), network, preprocessing, {"labels": ask["labels"]})
            found = serving_latency(Predictor(made, threads=cost.threads), files)
        except (GoodfitError, RuntimeError, ValueError) as error:
            return replace(cost, problem=str(error).splitlines()[0][:200] or type(error).__name__)
    return replace(cost, p50=found.p50, p95=found.p95, preparing=found.preparing)


def main() -> None:
    """Answer every line of standard input until it ends."""
    folder = Path(sys.argv[1])
    ask = read_json(folder / "ask.json")
    files = [path.read_bytes() for path in sorted(folder.glob("picture-*"))]
    for line in sys.stdin:
        wanted = json.loads(line)
        print(json.dumps(asdict(time_candidate(ask, wanted["model"], wanted["imgsz"], files))), flush=True)


if __name__ == "__main__":
    main()
