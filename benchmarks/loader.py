"""Samples per second of loading alone: torchvision's ImageFolder with a DataLoader beside goodfit's loader.

    python benchmarks/loader.py FOLDER [--size 160] [--rounds 5] [--max 4000]

FOLDER holds one folder per class, or is a zip file of one (its `train` folder, if it has one). All make batches of 32 random crops, mirrored by half, at the size given; the plain
loader has two worker processes, ours none. "uint8" ends with the batch of bytes, "float" with normalised float32 in
channels-last order on the device that trains ("+ colour" with the brightness, contrast and saturation of the standard
preset, which the plain loader does not have). Rounds are taken in turn; ratios are of the same round.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torchvision import datasets, transforms

from goodfit.data.augment import PRESETS
from goodfit.data.batch_transform import ImageBatchTransform
from goodfit.data.checks.audit import audit_dataset
from goodfit.data.formats.readers import read_dataset
from goodfit.data.index import DatasetIndex
from goodfit.data.loader import TrainLoader, TrainSamples
from goodfit.data.split import split_dataset
from goodfit.data.store import PictureStore
from goodfit.runtime.images import Preprocessing
from goodfit.tasks.classify import ClassifyTask

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH = 32


def plain(folder: Path, size: int, *, floating: bool, most: int) -> Callable[[], int]:
    """A pass over an ImageFolder; returns the samples it gave."""
    steps = [transforms.RandomResizedCrop(size, scale=(0.35, 1.0)), transforms.RandomHorizontalFlip()]
    if floating:
        steps += [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    else:
        steps.append(transforms.PILToTensor())
    data = datasets.ImageFolder(str(folder), transforms.Compose(steps))
    chosen = torch.utils.data.Subset(data, list(range(0, len(data), max(1, len(data) // most)))[:most])
    loader = torch.utils.data.DataLoader(chosen, BATCH, shuffle=True, num_workers=2, drop_last=True,
                                         persistent_workers=True)  # fmt: skip

    def run() -> int:
        count = 0
        for images, _ in loader:
            if floating:
                images = images.contiguous(memory_format=torch.channels_last)
            count += len(images)
        return count

    run()  # starts the workers
    return run


def ours(
    index: DatasetIndex, rows: np.ndarray, size: int, *, cache: str, floating: bool, colour: float = 0.0
) -> Callable[[], int]:
    """A pass of our training loader in the main process."""
    preprocessing = Preprocessing(size=size, resize=size, interpolation="bilinear", mean=MEAN, std=STD)
    store = PictureStore(index, rows, imgsz=size, cache=cache)
    store.warm(os.cpu_count() or 1)
    samples = TrainSamples(index=index, store=store, preset=replace(PRESETS["standard"]), preprocessing=preprocessing,
                           flip=0.5, seed=0, collate=ClassifyTask(index.class_names).collate)  # fmt: skip
    loader = TrainLoader(samples, rows, batch=BATCH, workers=0, threads=os.cpu_count() or 1)
    transform = ImageBatchTransform(preprocessing=preprocessing, num_classes=len(index.class_names), colour=colour,
                                    erase=0.0, mixup=0.0, cutmix=0.0, seed=0, channels_last=True)  # fmt: skip
    epoch = 0

    def run() -> int:
        nonlocal epoch
        epoch += 1
        count = 0
        for (micro,) in loader.groups(epoch, 0, 1):
            if floating:
                transform.train(micro.data, epoch=epoch, step=0, rank=0, micro=0, samples=micro.samples)
            count += len(micro.samples)
        return count

    return run


def main() -> None:
    """Print a table of medians and ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max", type=int, default=4000)
    parser.add_argument("--seconds", type=float, default=2.0, help="shortest time of one measurement")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        os.environ["GOODFIT_CACHE_DIR"] = made
        folder = asked.folder
        if folder.suffix == ".zip":
            shutil.unpack_archive(folder, Path(made) / "unpacked")
            folder = Path(made) / "unpacked"
            folder = folder / "train" if (folder / "train").is_dir() else folder
        compare(folder, asked)


def compare(folder: Path, asked: argparse.Namespace) -> None:
    """Measure every loader on a folder, in turn."""
    reading = read_dataset(folder)
    index = split_dataset(audit_dataset(reading, max_bad=0.05).index, shares="98/1/1", split_seed=0, given=())
    rows = index.rows("train")[: asked.max]
    runs = {
        "plain uint8": plain(folder, asked.size, floating=False, most=asked.max),
        "plain float": plain(folder, asked.size, floating=True, most=asked.max),
        "ours off uint8": ours(index, rows, asked.size, cache="off", floating=False),
        "ours ram uint8": ours(index, rows, asked.size, cache="ram", floating=False),
        "ours disk uint8": ours(index, rows, asked.size, cache="disk", floating=False),
        "ours ram float": ours(index, rows, asked.size, cache="ram", floating=True),
        "ours disk float": ours(index, rows, asked.size, cache="disk", floating=True),
        "ours ram float + colour": ours(index, rows, asked.size, cache="ram", floating=True, colour=0.2),
    }
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(asked.rounds):
        for name, run in runs.items():
            start, count = time.perf_counter(), 0
            while time.perf_counter() - start < asked.seconds or not count:
                count += run()
            rates[name].append(count / (time.perf_counter() - start))
    print(
        f"{asked.folder.name}: {len(rows)} pictures, {asked.size} px, {asked.rounds} rounds, medians (lowest to highest)"
    )
    for name, values in rates.items():
        base = rates["plain float" if "float" in name else "plain uint8"]
        ratio = statistics.median(v / b for v, b in zip(values, base, strict=True))
        print(
            f"  {name:<24}{statistics.median(values):>9,.0f} img/s ({min(values):,.0f}–{max(values):,.0f})  {ratio:5.1f} ×"
        )


if __name__ == "__main__":
    main()
