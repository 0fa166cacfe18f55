"""The rehearsal against seven planted bugs, one at a time, and against sound configurations: what it names, what it alarms.

    python benchmarks/planted_bugs.py [DATA]

The bugs are planted into a small residual network from scratch on drawn pictures and, where DATA (the folder of real
datasets) is given, into mobilenetv2_100 with ImageNet weights on 1,600 crops of faces. A bug counts as named if the check
that is meant for it fails. The sound configurations are those of the tests (imbalance in three ways, mixup, SGD, fp32 and
bf16, dark and white pictures, a fine-tuning rate), handwritten digits, and the real data. Under two minutes on two cores.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import plants
from goodfit.api.demo import write_digits

REAL = "classify/facemask_crops"
WEIGHTS = "weights/mobilenetv2_100.safetensors"
SHARE = 0.2  # of the real training split, so that classes are a few hundred pictures
WIDTH = 26


def runs(data: Path | None, folder: Path) -> Iterator[tuple[str, Any]]:
    """The runs that bugs are planted into."""
    yield "resnet10t, drawn bars", plants.parts_of(plants.folders(folder / "bars", "bars", 3, (40,)))
    if data is not None:
        yield "mobilenetv2_100, faces", real(data)


def real(data: Path) -> Any:
    """Fine-tuning on real pictures, as goodfit decides it."""
    return plants.parts_of(data / REAL, model="mobilenetv2_100", pretrained=str(data / WEIGHTS), imgsz=96, fraction=SHARE,
                           batch=32)  # fmt: skip


def sound_runs(data: Path | None, folder: Path) -> Iterator[tuple[str, Any]]:
    """Configurations in which nothing is wrong."""
    for name, (kind, classes, counts, asked) in plants.SOUND.items():
        yield name, plants.parts_of(plants.folders(folder / name, kind, classes, counts), **asked)
    write_digits(folder / "digits")
    yield "handwritten digits", plants.parts_of(folder / "digits")
    if data is not None:
        yield "faces, pretrained", real(data)


def table_of_bugs(data: Path | None, folder: Path) -> tuple[int, int]:
    """Print what was named. Returns how many of how many."""
    named = total = 0
    for run, parts in runs(data, folder):
        print(f"\n{'planted into ' + run:<{WIDTH + 10}} named by, with its evidence")
        found, _ = plants.alarms(parts)
        print(f"{'(nothing)':<{WIDTH}} {'ALARM' if found else 'none':<8}  {', '.join(sorted(found))}")
        for name, (plant, meant) in plants.BUGS.items():
            planted, changes = plant(parts)
            found, error = plants.alarms(planted, **changes)
            evidence = {c.name: c.evidence for c in error.checks} if error is not None else {}
            right = meant in found
            named, total = named + right, total + 1
            others = f"   (also: {', '.join(sorted(found - {meant}))})" if found - {meant} else ""
            said = f"{meant}: {evidence[meant]}{others}" if right else f"by others only: {sorted(found)}"
            print(f"{name:<{WIDTH}} {'named' if right else 'MISSED':<8}  {said}", flush=True)
    return named, total


def table_of_sound(data: Path | None, folder: Path) -> tuple[int, int]:
    """Print the alarms. Returns how many configurations were alarmed, of how many."""
    alarmed = total = 0
    print(f"\n{'sound configuration':<{WIDTH}} alarms")
    for name, parts in sound_runs(data, folder):
        found, error = plants.alarms(parts)
        alarmed, total = alarmed + bool(found), total + 1
        print(
            f"{name:<{WIDTH}} {len(found)} of {len(plants.NAMES)} checks  {error.message if error else ''}", flush=True
        )
    return alarmed, total


def main() -> None:
    """Print both tables; exits 1 if a bug was missed or a sound configuration alarmed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, nargs="?")
    data = parser.parse_args().data
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as made:
        named, bugs = table_of_bugs(data, Path(made))
        alarmed, sound = table_of_sound(data, Path(made))
    print(f"\n{named} of {bugs} planted bugs named, {alarmed} of {sound} sound configurations alarmed, "
          f"{time.monotonic() - start:.0f} s")  # fmt: skip
    sys.exit(1 if named < bugs or alarmed else 0)


if __name__ == "__main__":
    main()
