"""Which network learns pictures of 32 pixels fastest: equal processor time each, from scratch.

    python benchmarks/small_pictures.py CIFAR10.zip [--seconds 240] [--images 10000] [--seed 0] [--rate] [--bf16] MODEL[@SIZE][/BATCH] ...

The zip holds train/CLASS/*. The first IMAGES / 10 pictures of each class train, the next 200 of each validate; the test folder is
not opened. One thread, fp32 (or --bf16) and channels-last, AdamW (learning rate 1e-3 at batch 64 by the square-root rule, weight decay 0.01),
warm-up over 5 % and linear decay to zero over the last half of the processor time, random shift of 4 pixels and mirror. SIZE other than 32 enlarges the pictures on the
fly. `--rate` times 8 steps and trains no further.
"""

from __future__ import annotations

import argparse
import io
import math
import time
import zipfile
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from goodfit.models.builder import create

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NUM_VAL = 200  # of each class


def read(path: str, per_class: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Normalised pictures (N x 3 x 32 x 32, float32) and class numbers of the two parts."""
    found: dict[str, list[str]] = {}
    made: dict[str, tuple[list[np.ndarray], list[int]]] = {"train": ([], []), "val": ([], [])}
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            parts = name.split("/")
            if "train" in parts and not name.endswith("/"):
                found.setdefault(parts[-2], []).append(name)
        for number, names in enumerate(found.values()):
            for place, name in enumerate(names[: per_class + NUM_VAL]):
                pictures, targets = made["train" if place < per_class else "val"]
                pictures.append(np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB")))
                targets.append(number)
    mean, std = torch.tensor(MEAN).view(1, 3, 1, 1), torch.tensor(STD).view(1, 3, 1, 1)
    return {part: ((torch.from_numpy(np.stack(p)).permute(0, 3, 1, 2).float() / 255 - mean) / std, torch.tensor(t))
            for part, (p, t) in made.items()}  # fmt: skip


def batches(pictures: torch.Tensor, targets: torch.Tensor, batch: int, seed: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """Endless shuffled batches, shifted by up to 4 pixels and mirrored by half."""
    draw = torch.Generator().manual_seed(seed)
    padded = functional.pad(pictures, (4, 4, 4, 4), mode="reflect")
    side = pictures.shape[-1]
    while True:
        order = torch.randperm(len(pictures), generator=draw)
        for rows in order[: len(order) // batch * batch].split(batch):
            places = torch.randint(0, 9, (batch, 2), generator=draw).tolist()
            made = torch.stack(
                [padded[r, :, y : y + side, x : x + side] for r, (y, x) in zip(rows, places, strict=True)]
            )
            mirrored = torch.rand(batch, generator=draw) < 0.5
            made[mirrored] = made[mirrored].flip(3)
            yield made, targets[rows]


def train(spec: str, data: dict[str, tuple[torch.Tensor, torch.Tensor]], asked: argparse.Namespace) -> str:
    """Train one network for its processor time. Returns a line of figures."""
    name, _, batch_text = spec.partition("/")
    name, _, size_text = name.partition("@")
    batch, size = int(batch_text or 64), int(size_text or 32)
    torch.manual_seed(asked.seed)
    arguments = {}
    if "(" in name:  # convnext_atto(patch_size=2)
        name, _, text = name.rstrip(")").partition("(")
        arguments = {key: int(value) for key, value in (pair.split("=") for pair in text.split(","))}
    network = create(name, num_classes=10, **arguments).to(memory_format=torch.channels_last)
    decayed = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    peak = 1e-3 * math.sqrt(batch / 64)
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}],
                                  lr=peak, fused=True)  # fmt: skip
    source = batches(*data["train"], batch, asked.seed)

    def step() -> None:
        pictures, targets = next(source)
        if size != 32:
            pictures = functional.interpolate(pictures, size=(size, size), mode="bilinear")
        with torch.autocast("cpu", torch.bfloat16, enabled=asked.bf16):
            output = network(pictures.contiguous(memory_format=torch.channels_last))
        loss = functional.cross_entropy(output.float(), targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()

    for _ in range(3):
        step()
    start, count = time.process_time(), 0
    while (done := (time.process_time() - start) / asked.seconds) < 1 and not (asked.rate and count >= 8):
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1.0, done / 0.05, (1 - done) / 0.5)
        step()
        count += 1
    rate = count * batch / (time.process_time() - start)
    line = f"{spec:<34}{rate:8.0f} img/s"
    if asked.rate:
        return line
    network.eval()
    pictures, targets = data["val"]
    right = 0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=asked.bf16):
        for part, truth in zip(pictures.split(250), targets.split(250), strict=True):
            scaled = part if size == 32 else functional.interpolate(part, size=(size, size), mode="bilinear")
            right += int((network(scaled.contiguous(memory_format=torch.channels_last)).argmax(1) == truth).sum())
    return f"{line}  {count * batch / len(data['train'][0]):6.1f} epochs  {100 * right / len(targets):5.1f} %"


def main() -> None:
    """Print a line for each network."""
    parser = argparse.ArgumentParser()
    parser.add_argument("zip")
    parser.add_argument("models", nargs="+")
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    data = read(asked.zip, asked.images // 10)
    for spec in asked.models:
        print(train(spec, data, asked), flush=True)


if __name__ == "__main__":
    main()
