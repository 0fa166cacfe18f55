"""One training of Ultralytics' yolo11n from scratch for benchmarks/detectors.py; run by it, in the peers' environment.

    python benchmarks/detector_peers.py DATA.yaml MINUTES SEED SIZE OUT

Its defaults, but for the time and the image size. Writes OUT/detections.json: by file name of the test split, rows of class, score,
left, top, right, bottom, from a confidence of 0.001 on, at most 100 an image.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ultralytics import YOLO


def main() -> None:
    """Train, then find."""
    data, minutes, seed, size, out = (
        sys.argv[1],
        float(sys.argv[2]),
        int(sys.argv[3]),
        int(sys.argv[4]),
        Path(sys.argv[5]),
    )
    model = YOLO("yolo11n.yaml")
    ended: list[int] = []
    model.add_callback("on_fit_epoch_end", lambda trainer: ended.append(trainer.epoch))
    model.train(
        data=data, time=minutes / 60, imgsz=size, seed=seed, pretrained=False, project=str(out), name="run", plots=False
    )
    best = YOLO(str(out / "run" / "weights" / "best.pt"))
    test = Path(data).parent / "images" / "test"
    found = {}
    for result in best.predict(str(test), imgsz=size, conf=0.001, max_det=100, stream=True, verbose=False):
        boxes = result.boxes
        rows = zip(boxes.cls.tolist(), boxes.conf.tolist(), boxes.xyxy.tolist(), strict=True)
        found[Path(result.path).name] = [[kind, score, *box] for kind, score, box in rows]
    (out / "detections.json").write_text(json.dumps({"found": found, "epochs": max(ended, default=-1) + 1}))


if __name__ == "__main__":
    main()
