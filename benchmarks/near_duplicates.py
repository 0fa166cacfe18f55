"""Near duplicates on real photos: planted copies found, false alarms, natural twins, and time against size.

    python benchmarks/near_duplicates.py ../shared/data calibrate     # the data that CONFIRMED was set on
    python benchmarks/near_duplicates.py ../shared/data shown         # the data that the figures are for
    python benchmarks/near_duplicates.py ../shared/data time

Copies are planted in a temporary folder; the data is only read. Each seed plants 50 copies of 50 originals: encoded
again (JPEG or WebP at quality 50 to 95, or PNG), resized by up to 20 % and squashed by up to 5 %, up to 10 % brighter or
darker, cropped by up to 5 % on each of the four sides, or all of these at once. A pair of pictures whose originals
differ is either a natural twin or a false alarm: `--sheet` draws them side by side, so that a person can say which.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from goodfit.data.checks.duplicates import SIDE, near_duplicates, thumbnail

CALIBRATE = {
    "coco128": "segment/coco128/images/**/*.jpg",
    "bccd_voc": "detect/bccd_voc/**/*.jpg",
    "nuclei": "segment/nuclei_dsb2018/**/images/*.png",
    "cifar10": "classify/cifar10/cifar10.zip",
}
SHOWN = {"trashnet": "classify/trashnet/**/*.jpg", "facemask_coco": "detect/facemask_coco/**/*.jpg"}
KINDS = ("encoded", "resized", "brightness", "cropped", "all at once")
PLANTED = 50


def plant(picture: Image.Image, kind: str, random: np.random.Generator, path: Path) -> Path:
    """Write a copy that differs as `kind` says; returns its path."""
    everything = kind == "all at once"
    if kind == "cropped" or everything:
        left, right, top, bottom = random.uniform(0, 0.05, 4)
        width, height = picture.size
        box = (left * width, top * height, width - right * width, height - bottom * height)
        picture = picture.crop(tuple(round(edge) for edge in box))
    if kind == "resized" or everything:
        factor, squash = random.uniform(0.8, 1.2), random.uniform(0.95, 1.05)
        size = (round(picture.width * factor * squash), round(picture.height * factor / squash))
        filters = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)
        picture = picture.resize(size, filters[random.integers(3)])
    if kind == "brightness" or everything:
        pixels = np.asarray(picture).astype(np.float32) * random.uniform(0.9, 1.1)
        picture = Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8))
    if kind == "encoded" or everything:
        suffix, quality = (".jpg", ".webp", ".png")[random.integers(3)], int(random.integers(50, 96))
    else:
        suffix, quality = ".jpg", 90
    path = path.with_suffix(suffix)
    picture.save(path, quality=quality)
    return path


def read(path: Path) -> Image.Image:
    """A picture as RGB."""
    with Image.open(path) as picture:
        return picture.convert("RGB")


def thumbnails(paths: list[Path]) -> npt.NDArray[np.uint8]:
    """Shape: (paths, SIDE, SIDE)."""
    out = np.empty((len(paths), SIDE, SIDE), np.uint8)
    for row, path in enumerate(paths):
        out[row] = thumbnail(np.asarray(read(path)))
    return out


def exact(paths: list[Path]) -> npt.NDArray[np.int64]:
    """Group of each file that has the same bytes as another, -1 for the others."""
    digests = [hashlib.blake2b(path.read_bytes()).digest() for path in paths]
    groups = {digest: number for number, (digest, count) in enumerate(Counter(digests).items()) if count > 1}
    return np.array([groups.get(digest, -1) for digest in digests], np.int64)


def pictures(data: Path, name: str, pattern: str, folder: Path) -> list[Path]:
    """The files of a dataset; CIFAR-10 is unpacked, in an order that mixes its classes."""
    if name != "cifar10":
        return sorted(data.glob(pattern))
    with zipfile.ZipFile(data / pattern) as archive:
        archive.extractall(folder / name)
    files = sorted((folder / name).rglob("*.jpg"))
    return [files[row] for row in np.random.default_rng(0).permutation(len(files))]


def measure(name: str, paths: list[Path], seeds: int, folder: Path, sheet: Path | None) -> None:
    """Plant copies with each seed, and print what was found."""
    start = time.perf_counter()
    known, own = exact(paths), thumbnails(paths)
    first = {group: row for row, group in reversed(list(enumerate(known.tolist()))) if group >= 0}
    origin = [first.get(group, row) for row, group in enumerate(known.tolist())]
    print(f"\n{name}: {len(paths)} pictures, thumbnails and hashes in {time.perf_counter() - start:.1f} s")
    found: Counter[str] = Counter()
    planted: Counter[str] = Counter()
    others: dict[tuple[int, int], list[float]] = {}
    missed: list[str] = []
    lowest, taken = 1.0, 0.0
    for seed in range(seeds):
        random = np.random.default_rng(seed)
        rows = random.choice(len(paths), PLANTED, replace=False)
        kinds = [KINDS[number % len(KINDS)] for number in range(PLANTED)]
        copies = [plant(read(paths[row]), kind, random, folder / f"{name}-{seed}-{number}")
                  for number, (row, kind) in enumerate(zip(rows, kinds, strict=True))]  # fmt: skip
        both = np.concatenate([own, thumbnails(copies)])
        start = time.perf_counter()
        pairs = near_duplicates(both, known=np.concatenate([known, np.full(PLANTED, -1)]))
        taken += time.perf_counter() - start
        roots = [*origin, *(origin[row] for row in rows)]
        scores = {(a, b): score for a, b, score in pairs}
        for number, (row, kind) in enumerate(zip(rows, kinds, strict=True)):
            score = scores.get((origin[row], len(paths) + number))
            planted[kind] += 1
            found[kind] += score is not None
            lowest = min(lowest, score or 1.0)
            if score is None:
                missed.append(f"{paths[row].name} {kind} (seed {seed})")
        for (a, b), score in scores.items():
            if roots[a] != roots[b]:
                others.setdefault((min(roots[a], roots[b]), max(roots[a], roots[b])), []).append(score)
    share = sum(found.values()) / sum(planted.values())
    print(f"planted {sum(planted.values())} (seeds 0 to {seeds - 1}), found {sum(found.values())} ({share:.1%}), "
          f"lowest score {lowest:.3f}, search {taken / seeds:.2f} s a seed")  # fmt: skip
    print("  " + ", ".join(f"{kind} {found[kind]}/{planted[kind]}" for kind in KINDS))
    print("  missed: " + ("; ".join(missed) or "none"))
    print(f"  pairs of different originals (natural twins or false alarms): {len(others)}")
    ranked = sorted(others.items(), key=lambda item: -max(item[1]))
    for (a, b), values in ranked[:40]:
        print(f"    {max(values):.3f} in {len(values)} pairs  {paths[a].parent.name}/{paths[a].name}  "
              f"{paths[b].parent.name}/{paths[b].name}")  # fmt: skip
    if sheet is not None and ranked:
        draw(sheet.with_stem(f"{sheet.stem}-{name}"), [(paths[a], paths[b], max(v)) for (a, b), v in ranked[:60]])


def draw(path: Path, pairs: list[tuple[Path, Path, float]], side: int = 220, columns: int = 3) -> None:
    """Pairs side by side, with their scores, as one picture."""
    lines = -(-len(pairs) // columns)
    sheet = Image.new("RGB", (columns * (2 * side + 10), lines * (side + 16)), "white")
    for number, (one, two, score) in enumerate(pairs):
        x, y = number % columns * (2 * side + 10), number // columns * (side + 16)
        ImageDraw.Draw(sheet).text((x, y), f"{score:.3f} {one.name[:16]} {two.name[:16]}", fill="black")
        for place, picture in enumerate((one, two)):
            sheet.paste(read(picture).resize((side, side)), (x + place * side, y + 14))
    sheet.save(path)


def times(paths: list[Path]) -> None:
    """Time and pairs against the number of pictures."""
    start = time.perf_counter()
    every = thumbnails(paths[:40_000])
    print(f"\nthumbnails of CIFAR-10: {(time.perf_counter() - start) / len(every) * 1e3:.3f} ms each, with reading")
    big = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    start = time.perf_counter()
    for _ in range(50):
        thumbnail(big)
    print(f"thumbnail of 640 x 480 pixels: {(time.perf_counter() - start) / 50 * 1e3:.2f} ms")
    for count in (5_000, 10_000, 20_000, 40_000):
        start = time.perf_counter()
        pairs = near_duplicates(every[:count], known=np.full(count, -1))
        taken = time.perf_counter() - start
        print(f"{count:6} pictures: {taken:5.2f} s, {taken / count * 1e6:4.0f} us each, {len(pairs)} pairs")


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the real datasets")
    parser.add_argument("what", choices=("calibrate", "shown", "time"))
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--sheet", type=Path, help="PNG to draw the pairs of different originals on, one per dataset")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if options.what == "time":
            times(pictures(options.data, "cifar10", CALIBRATE["cifar10"], folder))
            return
        for name, pattern in (CALIBRATE if options.what == "calibrate" else SHOWN).items():
            paths = pictures(options.data, name, pattern, folder)[:20_000]
            measure(name, paths, options.seeds, folder, options.sheet)


if __name__ == "__main__":
    main()
