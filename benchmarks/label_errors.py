"""How many planted label errors the audit's ranking finds: 5 % of the labels changed to another class at random.

    python benchmarks/label_errors.py [trashnet facemask_crops cifar10 sst2 trec sms]

Prints, for each dataset and kind of features, over ten draws of the changed labels: the share of them among the 10 %
most suspicious of all samples (mean and 95 % interval of the mean, Student's t; the worst draw), the share of flagged
samples that were planted, and the out-of-fold accuracy against the changed labels. Constants were chosen on
cifar10, facemask_crops and sst2; trashnet, trec and sms were not looked at for them. Natural errors count as misses.
The real data are looked for beside the checkout. Features of the pretrained network are kept in the system's folder
for temporary files.
"""

from __future__ import annotations

import csv
import hashlib
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from goodfit.data.checks.suspects import THUMBNAIL, find_suspects, plain_features, text_features
from goodfit.runtime.images import Preprocessing, decode_image

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
WEIGHTS = DATA / "weights" / "mobilenetv2_100.safetensors"
SIZE = 160  # pixels that the network sees
SEEDS = range(10)
SHARE, TOP = 0.05, 0.1
T_95 = 2.262  # two-sided 95 % of Student's t with nine degrees of freedom
CIFAR = {"train": 300, "test": 100}  # pictures of each class
PICTURES = ("trashnet", "facemask_crops", "cifar10")
TEXTS = {
    "sst2": ("sst2/stsa.binary.train", " ", 0),
    "trec": ("trec/TREC.train.all", " ", 0),
    "sms": ("sms_spam/SMSSpamCollection", "\t", 1),
}


def pictures(name: str) -> Iterator[tuple[str, str, bytes]]:
    """Class, group and file content of each picture; facemask crops are grouped by photo."""
    root = DATA / "classify" / name
    if name == "trashnet":
        for path in sorted((root / "dataset-resized").glob("*/*.jpg")):
            yield path.parent.name, "", path.read_bytes()
    elif name == "facemask_crops":
        with open(root / "labels.csv", encoding="utf-8", newline="") as handle:
            for row in csv.DictReader(handle):
                yield row["label"], row["photo"], (root / row["path"]).read_bytes()
    else:
        seen: Counter[tuple[str, str]] = Counter()
        with zipfile.ZipFile(root / "cifar10.zip") as archive:
            for member in sorted(n for n in archive.namelist() if n.endswith(".jpg")):
                split, label, _ = member.split("/")
                seen[split, label] += 1
                if seen[split, label] <= CIFAR[split]:
                    yield label, "", archive.read(member)


def texts(name: str) -> Iterator[tuple[str, str]]:
    """Class and text of each line."""
    path, separator, skip = TEXTS[name]
    for line in (DATA / "text" / path).read_text("latin-1").split("\n")[skip:]:
        label, found, text = line.partition(separator)
        if found:
            yield label, text.strip()


def network_features(name: str, contents: list[bytes]) -> npt.NDArray[np.float32]:
    """Pooled features of the pretrained network, float32 (N, 1280), kept between calls."""
    digest = hashlib.blake2b(b"".join(contents), digest_size=8).hexdigest()
    kept = Path(tempfile.gettempdir()) / f"goodfit-{name}-{SIZE}-{digest}.npy"
    if kept.is_file():
        return np.load(kept, allow_pickle=False)
    import torch

    from goodfit.models.builder import create
    from goodfit.models.weights import load_weights
    from goodfit.outcome.baselines import backbone_features

    network = create("mobilenetv2_100", num_classes=2)
    load_weights(network, WEIGHTS)
    config = network.pretrained_cfg
    eyes = Preprocessing(size=SIZE, resize=SIZE, interpolation="bicubic", mean=config["mean"], std=config["std"])
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (eyes.mean, eyes.std))

    def batches() -> Iterator[torch.Tensor]:
        for start in range(0, len(contents), 32):
            images = torch.from_numpy(np.stack([eyes.pixels(c) for c in contents[start : start + 32]]))
            yield (images.float() / 255 - mean) / std

    made = backbone_features(network, batches()).float().numpy()
    np.save(kept, made)
    return made


def small(content: bytes) -> npt.NDArray[np.uint8]:
    """A picture cut down to THUMBNAIL pixels."""
    image = decode_image(content, min_side=THUMBNAIL)
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return np.asarray(image)


def change(targets: npt.NDArray[np.int64], num_classes: int, seed: int) -> npt.NDArray[np.int64]:
    """The labels with SHARE of them moved to another class, all others equally likely."""
    random = np.random.default_rng(seed)
    rows = random.choice(len(targets), round(SHARE * len(targets)), replace=False)
    made = targets.copy()
    made[rows] = (targets[rows] + random.integers(1, num_classes, len(rows))) % num_classes
    return made


def measure(name: str, kind: str, features: object, labels: list[str], groups: list[str]) -> None:
    """One line of the table."""
    names, targets = np.unique(labels, return_inverse=True)
    _, kin = np.unique(groups, return_inverse=True)
    kin = np.where(np.array(groups) == "", -1, kin)
    found, true, accuracy, flags, seconds = [], [], [], [], []
    for seed in SEEDS:
        changed = change(targets, len(names), seed)
        start = time.perf_counter()
        made = find_suspects(features, changed, len(names), groups=kin, seed=seed)  # type: ignore[arg-type]
        seconds.append(time.perf_counter() - start)
        planted = changed != targets
        found.append(100 * planted[made.order[: int(TOP * len(targets))]].sum() / planted.sum())
        true.append(100 * planted[made.flagged].mean() if len(made.flagged) else np.nan)
        flags.append(100 * len(made.flagged) / len(targets))
        accuracy.append(100 * made.accuracy)
    half = T_95 * np.std(found, ddof=1) / len(found) ** 0.5
    print(f"| {name} | {kind} | {len(targets)} | {np.mean(found):.1f} ± {half:.1f} | {min(found):.1f} | "
          f"{np.mean(flags):.1f} | {np.mean(true):.0f} | {np.mean(accuracy):.1f} | "
          f"{100 * made.majority:.1f} | {np.mean(seconds):.1f} |", flush=True)  # fmt: skip


def main(wanted: list[str]) -> None:
    """Print a table in Markdown."""
    print("| data | features | samples | planted found in top 10 % | worst | flagged % | of them planted % | "
          "accuracy % | majority % | seconds |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name in wanted:
        if name in PICTURES:
            labels, groups, contents = (list(c) for c in zip(*pictures(name), strict=True))
            network, plain = network_features(name, contents), np.stack([plain_features(small(c)) for c in contents])
            for kind, features in (("network", network), ("plain", plain), ("both", (network, plain))):
                measure(name, kind, features, labels, groups)
        else:
            labels, lines = (list(c) for c in zip(*texts(name), strict=True))
            measure(name, "text", text_features(lines), labels, lines)


if __name__ == "__main__":
    main(sys.argv[1:] or [*PICTURES, *TEXTS])
