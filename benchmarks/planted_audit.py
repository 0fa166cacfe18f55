"""`goodfit audit` on real data with planted faults, as a user runs it: duplicates across splits, and wrong labels.

    python benchmarks/planted_audit.py ../shared/data duplicates [--seeds 2]
    python benchmarks/planted_audit.py ../shared/data labels [--seeds 3]

Everything is planted in temporary copies. Duplicates: 50 exact and 50 near copies (see near_duplicates.py), half of
them in another split than their original, in trashnet (split into train, val and test folders first) and in
facemask_coco (COCO JSON). A pair that the audit names is found, natural (it is there without plants too), or a false
alarm. After the repair no planted pair may lie in two splits. Labels: 5 % of trashnet's labels flipped.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from near_duplicates import KINDS, plant
from PIL import Image

NUM = 50


def audit(data: Path, folder: Path, *words: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The result of the command, and the split of every path."""
    project = folder / "runs"
    done = subprocess.run([sys.executable, "-m", "goodfit", "audit", str(data), f"project={project}", "json=true", *words],
                          capture_output=True, text=True, check=False)  # fmt: skip
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    if done.returncode:
        raise SystemExit(str(result))
    with open(Path(result["page"]).parent / "split.csv", encoding="utf-8", newline="") as handle:
        return result, {row["path"]: row["split"] for row in csv.DictReader(handle)}


def pairs_of(result: dict[str, Any], *kinds: str) -> set[frozenset[str]]:
    """Pairs that findings of these kinds name."""
    found = set()
    for finding in result["findings"]:
        if finding["kind"] in kinds:
            for item in finding["items"]:
                names = [name.split(": ")[0] for name in item.split(" = ")]
                found |= {frozenset((a, b)) for k, a in enumerate(names) for b in names[k + 1 :]}
    return found


class Folders:
    """trashnet as train, val and test folders of classes."""

    def __init__(self, data: Path, root: Path, random: np.random.Generator) -> None:
        self.root = root
        self.samples = []
        for path in sorted((data / "classify/trashnet/dataset-resized").rglob("*.jpg")):
            split = ("train", "val", "test")[random.choice(3, p=[0.7, 0.15, 0.15])]
            target = root / split / path.parent.name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
            self.samples.append((split, target))

    def place(self, original: Path, split: str, name: str) -> Path:
        """Where a copy of an original goes."""
        return self.root / split / original.parent.name / name

    def finish(self) -> None:
        """Nothing to write."""


class Coco:
    """facemask_coco with its two annotation files."""

    def __init__(self, data: Path, root: Path, _random: np.random.Generator) -> None:
        shutil.copytree(data / "detect/facemask_coco", root)
        self.root = root
        self.tables = {s: json.loads((root / f"annotations/custom_{s}.json").read_text()) for s in ("train", "val")}
        self.samples = [(s, root / f"{s}2017" / i["file_name"]) for s, t in self.tables.items() for i in t["images"]]
        self.waiting: list[tuple[Path, str, Path]] = []

    def place(self, original: Path, split: str, name: str) -> Path:
        """Where a copy of an original goes; its entry is written by finish."""
        target = self.root / f"{split}2017" / name
        self.waiting.append((original, split, target))
        return target

    def finish(self) -> None:
        """Enter the copies, without boxes, which the search for twins does not look at."""
        for number, (_, split, target) in enumerate(self.waiting):
            (file,) = target.parent.glob(target.stem + ".*")
            with Image.open(file) as image:
                width, height = image.size
            self.tables[split]["images"].append(
                {"id": 10**6 + number, "file_name": file.name, "width": width, "height": height}
            )
        for split, table in self.tables.items():
            (self.root / f"annotations/custom_{split}.json").write_text(json.dumps(table))


def duplicates(data: Path, seed: int) -> None:
    """Plant, audit, count."""
    for name, kind in (("trashnet", Folders), ("facemask_coco", Coco)):
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            clean, _ = audit(
                kind(data, folder / "clean", np.random.default_rng(seed)).root, folder, "max_bad=1", "suspects=false"
            )
            known = ("duplicate_exact", "duplicate_near", "leak", "label_conflict")
            natural = {frozenset(Path(p).stem for p in pair) for pair in pairs_of(clean, *known)}
            random = np.random.default_rng(seed)
            dataset = kind(data, folder / "data", random)
            chosen = random.permutation(len(dataset.samples))[: 2 * NUM]
            planted: dict[str, dict[frozenset[str], bool]] = {"exact": {}, "near": {}}
            for number, index in enumerate(chosen.tolist()):
                split, original = dataset.samples[index]
                across = bool(number % 2)
                others = [s for s in dict.fromkeys(s for s, _ in dataset.samples) if s != split]
                place = str(random.choice(others)) if across else split
                target = dataset.place(original, place, f"planted{number}{original.suffix}")
                if number < NUM:
                    shutil.copy(original, target)
                    written = target
                else:
                    with Image.open(original) as image:
                        written = plant(image.convert("RGB"), KINDS[number % len(KINDS)], random, target)
                pair = frozenset(p.relative_to(dataset.root).as_posix() for p in (original, written))
                planted["exact" if number < NUM else "near"][pair] = across
            dataset.finish()
            result, splits = audit(dataset.root, folder, "max_bad=1", "suspects=false")
            found = pairs_of(result, *known)
            report(name, seed, planted, found, natural, splits)


def report(
    name: str, seed: int, planted: dict[str, dict[frozenset[str], bool]], found: set[frozenset[str]],
    natural: set[frozenset[str]], splits: dict[str, str],
) -> None:  # fmt: skip
    """Print the counts of one dataset."""
    source = {Path(p).stem: Path(q).stem for pairs in planted.values() for pair in pairs
              for p in pair for q in pair if "planted" in p and "planted" not in q}  # fmt: skip
    straddling = []
    for kind, pairs in planted.items():
        straddling += [pair for pair in pairs if len({splits[p] for p in pair if splits[p]}) > 1]
        print(
            f"{name} seed {seed}: {kind} {len(set(pairs) & found)} of {len(pairs)} found ({sum(pairs.values())} across splits)"
        )
        for pair in set(pairs) - found:
            print(f"    missed: {sorted(pair)}")
    wrong = []
    for pair in found:
        stems = frozenset(source.get(Path(p).stem, Path(p).stem) for p in pair)
        if len(stems) == 2 and stems not in natural:
            wrong.append(pair)
    print(f"{name} seed {seed}: {len(wrong)} false alarms or natural pairs not seen without plants, {len(natural)} natural "
          f"pairs, {len(straddling)} planted pairs in two splits after the repair")  # fmt: skip
    for pair in wrong:
        print(f"    look at: {sorted(pair)}")


def labels(data: Path, seed: int) -> None:
    """Flip 5 % of trashnet's labels and see how many of the most suspicious tenth they are."""
    random = np.random.default_rng(seed)
    files = sorted((data / "classify/trashnet/dataset-resized").rglob("*.jpg"))
    classes = sorted({f.parent.name for f in files})
    flipped = set(random.permutation(len(files))[: round(0.05 * len(files))].tolist())
    weights = data / "weights/mobilenetv2_100.safetensors"
    with tempfile.TemporaryDirectory() as made:
        root = Path(made) / "data"
        names = set()
        for number, file in enumerate(files):
            label = file.parent.name
            if number in flipped:
                label = str(random.choice([c for c in classes if c != label]))
                names.add(f"{label}/{file.name}")
            (root / label).mkdir(parents=True, exist_ok=True)
            shutil.copy(file, root / label / file.name)
        result, _ = audit(root, Path(made), f"pretrained={weights}", "imgsz=160", "max_bad=0.05")
    (finding,) = [f for f in result["findings"] if f["kind"] == "label_suspect"]
    first = [item.split(": ")[0] for item in finding["items"][: len(files) // 10]]
    print(f"trashnet seed {seed}: {len(names & set(first))} of {len(names)} flips "
          f"({100 * len(names & set(first)) / len(names):.0f} %) among the first {len(first)} of {finding['count']} suspects")  # fmt: skip


def main() -> None:
    """Run what is asked."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("what", choices=("duplicates", "labels"))
    parser.add_argument("--seeds", type=int, default=2)
    asked = parser.parse_args()
    for seed in range(asked.seeds):
        (duplicates if asked.what == "duplicates" else labels)(asked.data, seed)


if __name__ == "__main__":
    main()
