"""One training of Ultralytics' yolo11n from scratch for benchmarks/detectors.py; run by it, in the peers' environment.

    python benchmarks/detector_peers.py DATA.yaml MINUTES SEED SIZE OUT

Its defaults, but for the time, the image size and the threads: of two processors it would leave one idle. Writes OUT/detections.json: by file name of the test split, rows of class, score,
left, top, right, bottom, from a confidence of 0.001 on, at most 100 an image; the epochs begun, the median rate of training from the
second on, and the forward pass's operations for one picture (two for a multiply-add).
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
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
    begun: list[float] = []
    laps: list[float] = []
    model.add_callback("on_train_start", lambda _: torch.set_num_threads(os.cpu_count() or 1))
    model.add_callback("on_train_epoch_start", lambda _: begun.append(time.monotonic()))
    model.add_callback("on_train_epoch_end", lambda _: laps.append(time.monotonic() - begun[-1]))
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model.model.eval()(torch.zeros(1, 3, size, size))
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
    train = sum(1 for _ in (Path(data).parent / "images" / "train").iterdir())
    told = {
        "found": found,
        "epochs": len(laps),
        "rate": train / statistics.median(laps[1:] or laps),
        "gflop": counter.get_total_flops() / 1e9,
    }
    (out / "detections.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
