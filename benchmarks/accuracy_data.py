"""The data of benchmarks/accuracy.py and cifar_time.py: one folder per dataset, of train/, val/ and test/ with a folder per class.

The split is goodfit's own, made once by `goodfit audit` (unusable files, contradicting labels and training copies of test
images are left out by then), and copied out of its split.csv, so that every system is given the same files.
"""

from __future__ import annotations

import csv
import json
import random
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MAKE = "task.json"  # written last: a folder without it was not finished


@dataclass(frozen=True)
class Task:
    """What every system is given."""

    name: str
    tree: str
    model: str
    imgsz: int
    weights: str  # a safetensors file, or "": from scratch
    classes: list[str]

    def test_files(self) -> list[Path]:
        """The sealed test images, in one order for all."""
        return sorted(p for p in Path(self.tree, "test").rglob("*") if p.is_file())


def make_task(name: str, data: Path, work: Path, *, split_seed: int = 0, most: int = 0, model: str = "") -> Task:
    """The task of a dataset, from `work` where it is there already.

    Args:
        data: The folder that holds classify/ and weights/.
        most: Images per class and split, for trials; 0 takes all.
        model: Another network than goodfit would choose.
    """
    folder = work / "-".join(
        [name, f"split{split_seed}", *([f"most{most}"] if most else []), *([model] if model else [])]
    )
    if (folder / MAKE).is_file():
        return Task(**json.loads((folder / MAKE).read_text("utf-8")))
    shutil.rmtree(folder, ignore_errors=True)
    tree = folder / "data"
    weights = data / "weights" / "mobilenetv2_100.safetensors" if name == "trashnet" else None
    with tempfile.TemporaryDirectory() as made:
        root, words = SOURCES[name](data / "classify", Path(made))
        told = goodfit(
            "audit", *words, "suspects=false", f"split_seed={split_seed}", f"project={made}/runs", "json=true"
        )
        with open(Path(told["page"]).parent / "split.csv", encoding="utf-8", newline="") as handle:
            rows = [row for row in csv.DictReader(handle) if row["split"]]
        taken: dict[tuple[str, str], int] = {}
        for row in rows:
            place = row["split"], row["label"]
            taken[place] = taken.get(place, 0) + 1
            if not most or taken[place] <= most:
                target = tree / row["split"] / row["label"] / "_".join(Path(row["path"]).parts)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(root / row["path"], target)
    asked = ["model=mobilenetv2_100", f"pretrained={weights.resolve()}"] if weights else ["pretrained=false"]
    asked = [f"model={model}", *asked[1:]] if model else asked
    plan = goodfit("plan", str(tree), *asked, "measure=false", "json=true")["decisions"]
    task = Task(name, str(tree.resolve()), plan["model"]["value"], plan["imgsz"]["value"],
                str(weights.resolve()) if weights else "", sorted(p.name for p in (tree / "train").iterdir()))  # fmt: skip
    (folder / MAKE).write_text(json.dumps(asdict(task)), "utf-8")
    return task


def goodfit(*words: str) -> dict[str, Any]:
    """A command's JSON."""
    done = subprocess.run([sys.executable, "-m", "goodfit", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"goodfit {' '.join(words)}\n{done.stdout}{done.stderr[-3000:]}")
    told: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return told


def _trashnet(classify: Path, _made: Path) -> tuple[Path, list[str]]:
    root = classify / "trashnet" / "dataset-resized"
    return root, [str(root)]


def _facemask(classify: Path, _made: Path) -> tuple[Path, list[str]]:
    """Crops of one photo stay in one split, which the folders that come with the data do not see to in a test split."""
    root = classify / "facemask_crops"
    return root, [str(root / "labels.csv"), "group=photo", "resplit=true"]


def _cifar(per_class: int) -> Any:
    """CIFAR-10's own test split, and so many of each class of its training split, of which goodfit cuts val."""

    def unpack(classify: Path, made: Path) -> tuple[Path, list[str]]:
        root = made / "cifar"
        with zipfile.ZipFile(classify / "cifar10" / "cifar10.zip") as archive:
            kinds: dict[Path, list[str]] = {}
            for name in archive.namelist():
                if name.endswith(".jpg"):
                    kinds.setdefault(Path(name).parent, []).append(name)
            for kind, names in sorted(kinds.items()):
                train = kind.parts[0] == "train"
                chosen = random.Random(str(kind)).sample(sorted(names), per_class) if train else names
                archive.extractall(root, chosen)
        return root, [str(root)]

    return unpack


SOURCES = {"trashnet": _trashnet, "cifar10": _cifar(1000), "facemask": _facemask, "cifar60": _cifar(5000)}
