"""AP50 on the official test split of a detection dataset beside Ultralytics, at equal wall-clock on this machine.

    python benchmarks/detectors.py run FOLDER --weights FILE --peers PYTHON [--minutes 8] [--seeds 0 1 2] [--only goodfit ultralytics]
                                       [--goodfit WORD...] [--work detectors]
    python benchmarks/detectors.py report [--work detectors]

goodfit: `goodfit train FOLDER pretrained=FILE time=MINUTES`, from an ImageNet backbone; everything from the audit to the report is in
the time. Ultralytics: yolo11n from scratch at the same image size, its defaults on all processors, with `time=` for its training
alone; it keeps its best epoch. Both are given the same split and objects (goodfit's audit leaves damaged boxes out; crowds are left
out too, as goodfit learns nothing from them), and both are judged by goodfit's average precision, which tests hold equal to
pycocotools. "process s" is that of `goodfit train`, and of Ultralytics' training with its detections. One process at a time; each run
is a line of results.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from cache_accuracy import STUDENT

import goodfit
from goodfit.api.predict import open_predictor
from goodfit.api.prepare import read_and_audit
from goodfit.config.parse import parse_request
from goodfit.core.journal import Journal
from goodfit.data.index import DatasetIndex
from goodfit.data.objects import objects_of
from goodfit.metrics.coco import ImageObjects, evaluate_coco
from goodfit.models.detection.build import build_detector, family_of
from goodfit.runtime import Predictor

YOLO = Path(__file__).with_name("detector_peers.py")


def read_index(folder: Path) -> DatasetIndex:
    """The dataset as goodfit reads, audits and splits it."""
    return read_and_audit(parse_request({"data": str(folder)}), Journal(None)).index


def write_yolo(index: DatasetIndex, target: Path) -> None:
    """The same pictures, split and objects in Ultralytics' form: images linked, labels as text, data.yaml."""
    assert index.sizes is not None
    for split in ("train", "val", "test"):
        for kind in ("images", "labels"):
            (target / kind / split).mkdir(parents=True, exist_ok=True)
        for row in index.rows(split).tolist():
            file, found, size = index.file(row), objects_of(index, row), index.sizes[row].astype(float)
            name = name_of(index, row)
            shutil.copyfile(file, target / "images" / split / name)  # no link: Ultralytics mends JPEGs in their place
            low, high = found.boxes[~found.crowd, :2], found.boxes[~found.crowd, 2:]
            shares = np.concatenate([(low + high) / 2 / size, (high - low) / size], axis=1)
            lines = [
                f"{c} {' '.join(f'{v:.7f}' for v in s)}\n"
                for c, s in zip(found.classes[~found.crowd], shares, strict=True)
            ]
            (target / "labels" / split / f"{Path(name).stem}.txt").write_text("".join(lines))
    names = "".join(f"  {number}: {json.dumps(name)}\n" for number, name in enumerate(index.class_names))
    (target / "data.yaml").write_text(
        f"path: {target}\ntrain: images/train\nval: images/val\ntest: images/test\nnames:\n{names}"
    )


def name_of(index: DatasetIndex, row: int) -> str:
    """A name for a picture's copy that no other has."""
    return f"{row:06d}{index.file(row).suffix.lower()}"


def judge(index: DatasetIndex, found: dict[str, list[list[float]]]) -> dict[str, float]:
    """AP of detections (class, score, left, top, right, bottom), by `name_of`, on the test split."""
    images = []
    for row in index.rows("test").tolist():
        rows = np.array(found[name_of(index, row)], np.float64).reshape(-1, 6)
        there = objects_of(index, row)
        images.append(ImageObjects(
            boxes=rows[:, 2:], scores=rows[:, 1], classes=rows[:, 0].astype(np.int64), true_boxes=there.boxes, true_classes=there.classes,
            crowd=there.crowd, areas=(there.boxes[:, 2:] - there.boxes[:, :2]).prod(axis=1),
        ))  # fmt: skip
    return evaluate_coco(images, len(index.class_names)).summary()


def train_goodfit(asked: argparse.Namespace, seed: int, made: Path) -> dict[str, Any]:
    """One run from the command line; its own test figures."""
    command = [sys.executable, "-m", "goodfit", "train", str(asked.folder), f"pretrained={asked.weights}", f"time={asked.minutes}m", f"seed={seed}",
               f"project={made}", "name=run", *asked.goodfit]  # fmt: skip
    start = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.monotonic() - start
    run = goodfit.Run(made / "run")
    index = read_index(asked.folder)
    names = {name: number for number, name in enumerate(index.class_names)}
    rows = index.rows("test").tolist()
    told = open_predictor(run.bundle).predict([index.file(row) for row in rows], threshold=0.0)
    found = {name_of(index, row): [[names[o["label"]], o["score"], *o["box"]] for o in one.get("objects", ())]
             for row, one in zip(rows, told, strict=True)}  # fmt: skip
    result = run.result
    return {**judge(index, found), "reported_ap50": result["metrics"]["test"]["ap50"], "epochs": result["epochs"], "seconds": seconds,
            "imgsz": run.plan.imgsz.value, "model": f"{run.plan.model.value}, ImageNet backbone",
            "val_ap50": result["metrics"]["val"]["ap50"], "rate": result["rate"]["samples_per_second"],
            "share_of_bare": result["rate"]["share_of_bare"], "gflop": gflop(run)}  # fmt: skip


def gflop(run: goodfit.Run) -> float:
    """Operations of the forward pass for one picture, two for a multiply-add."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    served = (
        open_predictor(run.bundle)
        if json.loads((run.bundle / "bundle.json").read_text()).get("needs") == "torch"
        else None
    )
    network = (
        served._session
        if served is not None
        else build_detector(run.plan.changed(pretrained="false"), Predictor(run.bundle).labels)[0]
    )
    height, width = (run.plan.preprocessing.value[side] for side in ("height", "width"))
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        family = family_of(run.plan)
        family.predict(network.eval(), {"image": torch.zeros(1, 3, height, width)}, family.selection)
    return counter.get_total_flops() / 1e9


def train_ultralytics(asked: argparse.Namespace, seed: int, made: Path) -> dict[str, Any]:
    """One training of yolo11n; its detections judged as ours."""
    index = read_index(asked.folder)
    write_yolo(index, made / "data")
    words = dict(word.split("=", 1) for word in asked.goodfit)
    size = goodfit.plan(asked.folder, **{"pretrained": asked.weights, "measure": False, **words}).plan.imgsz.value
    start = time.monotonic()
    command = [
        os.path.abspath(asked.peers),  # of an environment: its link must not be followed
        str(YOLO.resolve()),
        str(made / "data" / "data.yaml"),
        str(asked.minutes),
        str(seed),
        str(size),
        str(made),
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=made)
    told = json.loads((made / "detections.json").read_text())
    return {
        **judge(index, told["found"]),
        **{k: told[k] for k in ("epochs", "rate", "gflop")},
        "seconds": time.monotonic() - start,
        "imgsz": size,
        "model": "yolo11n from scratch",
    }


def run(asked: argparse.Namespace) -> None:
    """What is missing in the results."""
    results = asked.work / "results.jsonl"
    systems = {"goodfit": train_goodfit, "ultralytics": train_ultralytics}
    for seed in asked.seeds:
        for system in asked.only:
            name = " ".join([system, *asked.goodfit]) if system == "goodfit" else system
            key = {"dataset": asked.folder.name, "system": name, "minutes": asked.minutes, "seed": seed}
            if any({k: r.get(k) for k in key} == key for r in read(results)):
                continue
            with tempfile.TemporaryDirectory() as made:
                row = {**key, **systems[system](asked, seed, Path(made))}
            with open(results, "a", encoding="utf-8") as handle:
                handle.write(json.dumps(row) + "\n")
            print(
                f"{name} seed {seed}: AP50 {row['ap50']:.3f} AP {row['ap']:.3f}, {row['epochs']} epochs, {row['seconds']:.0f} s",
                flush=True,
            )


def read(results: Path) -> list[dict[str, Any]]:
    """The runs so far."""
    return [json.loads(line) for line in results.read_text("utf-8").splitlines()] if results.is_file() else []


def report(rows: list[dict[str, Any]]) -> str:
    """One line per dataset, system and time."""
    lines = ["| dataset | system | network | GFLOP a picture | img/s in training | minutes | seeds | AP50 | AP | epochs | process s |",
             "|---" * 11 + "|"]  # fmt: skip
    for key in dict.fromkeys((r["dataset"], r["system"], r["minutes"]) for r in rows):
        mine = [r for r in rows if (r["dataset"], r["system"], r["minutes"]) == key]
        figures = [_interval([r[k] for r in mine]) for k in ("ap50", "ap")]
        lines.append(f"| {key[0]} | {key[1]} | {mine[0]['model']}, {mine[0]['imgsz']} px | {mine[0]['gflop']:.2f} | "
                     f"{statistics.median(r['rate'] for r in mine):.1f} | {key[2]:g} | {len(mine)} | {figures[0]} | {figures[1]} | "
                     f"{statistics.mean(r['epochs'] for r in mine):.0f} | {statistics.mean(r['seconds'] for r in mine):.0f} |")  # fmt: skip
    return "\n".join(lines)


def _interval(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.3f}"
    half = STUDENT[len(values) - 2] * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.3f} ± {half:.3f}"


def main() -> None:
    """Run, or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--peers", default="")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=("goodfit", "ultralytics"), default=["goodfit", "ultralytics"])
    parser.add_argument("--goodfit", nargs="+", default=[], metavar="WORD")
    parser.add_argument("--work", type=Path, default=Path("detectors"))
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    os.environ["GOODFIT_CACHE_DIR"] = str(asked.work.resolve() / "cache")
    if asked.what == "run":
        run(asked)
    print(report(read(asked.work / "results.jsonl")))


if __name__ == "__main__":
    main()
