"""500 damaged annotation files: each gives a reading or a DataError that names the file, and damage is not silent."""

from __future__ import annotations

import json
import re
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from goodfit.core.errors import DataError
from goodfit.data.checks.audit_objects import audit_objects
from goodfit.data.columns import Objects
from goodfit.data.formats import read_coco, read_masks, read_voc, read_yolo
from goodfit.data.masks import draw_mask, pack_rle
from goodfit.data.reading import How, Reading
from pictures import draw

NAMES = ("a", "b", "c", "d", "e", "f")
SIZE = (32, 24)
GARBAGE = (b"\x00", b"\xff\xfe", b"\x80\x81\xfe", b"{[\"<&;'>]}", b"NaN", b"Infinity", b"1e999", b"-", b"9" * 5000, b"\xef\xbb\xbf",
           b"[" * 3000, b"<a>" * 3000, b"../../", b"\\ud800", b"null", b"\r", b"\n\n", b"\xed\xa0\x80", b"!!python/object:os.system ",
           b"&a [*a]", b"<!ENTITY x 'y'>", "\u0664".encode(), b'"', b"0", b" ", b"\t")  # fmt: skip
NUMBERS = (
    b"-1",
    b"0",
    b"nan",
    b"NaN",
    b"1e308",
    b"1e999",
    b"99999999999999999999",
    b"0.0001",
    b"7",
    b"true",
    b'"x"',
    b"[]",
    b"",
)

Result = tuple[list[str], tuple[str, ...], list[int], Objects]


def damage(data: bytes, random: np.random.Generator) -> bytes:
    """One of seven kinds of damage, seeded."""
    at, end = sorted(int(v) for v in random.integers(0, len(data) + 1, 2))
    kind = int(random.integers(7))
    if kind == 0:  # bytes flipped
        made = bytearray(data)
        for _ in range(int(random.integers(1, 5))):
            made[int(random.integers(len(made)))] ^= 1 << int(random.integers(8))
        return bytes(made)
    if kind == 1:
        return data[:at]
    if kind == 2:
        return data[:at] + data[min(end, at + 40) :]
    if kind == 3:
        return data[:at] + GARBAGE[int(random.integers(len(GARBAGE)))] + data[at:]
    if kind == 4:  # a part twice, in another place
        return data[:end] + data[at : min(end, at + 60)] + data[end:]
    if kind == 5:
        return random.integers(0, 256, int(random.integers(0, 300)), dtype=np.uint8).tobytes()
    digits = [i for i, b in enumerate(data) if chr(b).isdigit()] or [0]  # a number swapped for another
    start = stop = digits[int(random.integers(len(digits)))]
    while stop < len(data) and chr(data[stop]) in "0123456789.":
        stop += 1
    return data[:start] + NUMBERS[int(random.integers(len(NUMBERS)))] + data[stop:]


def damage_json(data: bytes, random: np.random.Generator) -> bytes:
    """Whole JSON in which one value, key or entry is wrong."""
    content = json.loads(data)
    places: list[tuple[Any, Any]] = []
    waiting: list[Any] = [content]
    while waiting:
        holder = waiting.pop()
        for key in list(holder) if isinstance(holder, dict) else range(len(holder)):
            places.append((holder, key))
            if isinstance(holder[key], list | dict):
                waiting.append(holder[key])
    holder, key = places[int(random.integers(len(places)))]
    odd = (
        None,
        -1,
        10**30,
        float("nan"),
        float("inf"),
        "x",
        "\ud800",
        [],
        {},
        [[]],
        [1],
        True,
        1e308,
        {"size": [24, 32]},
        [[1, 2]],
    )
    choice = int(random.integers(len(odd) + 3))
    if choice < len(odd):
        holder[key] = odd[choice]
    elif choice == len(odd):
        del holder[key]
    elif isinstance(holder, dict):
        holder[f"{key}_"] = holder.pop(key)
    else:
        holder.append(holder[key])
    return json.dumps(content).encode()


def pictures(folder: Path) -> None:
    folder.mkdir(parents=True)
    for number, name in enumerate(NAMES):
        draw(number, 0, 32).crop((0, 0, *SIZE)).save(folder / f"{name}.png")


def boxes() -> list[tuple[int, int, int, int]]:
    random = np.random.default_rng(5)
    corners = random.integers(1, 12, (12, 2))
    return [
        (int(x), int(y), int(x + w), int(y + h))
        for (x, y), (w, h) in zip(corners, random.integers(4, 11, (12, 2)), strict=True)
    ]


def make_coco(root: Path) -> list[Path]:
    pictures(root / "images")
    entries = []
    for number, (left, top, right, bottom) in enumerate(boxes()):
        ring = [left, top, right, top, right, bottom, left, bottom]
        runs = [left * 24 + top, bottom - top]
        rle = {"size": [24, 32], "counts": [*runs, 768 - sum(runs)]}
        if number % 3 == 2:
            rle["counts"] = pack_rle(rle["counts"], 24, 32)[8:].decode()
        entries.append({"id": number + 1, "image_id": number % 5, "category_id": 1 + number % 2, "iscrowd": 0,
                        "bbox": [left, top, right - left, bottom - top], "segmentation": rle if number % 3 else [ring]})  # fmt: skip
    content = {"images": [{"id": i, "file_name": f"{n}.png", "width": 32, "height": 24} for i, n in enumerate(NAMES)],
               "annotations": entries, "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]}  # fmt: skip
    (root / "instances.json").write_text(json.dumps(content))
    return [root / "instances.json"]


def make_yolo(root: Path) -> list[Path]:
    pictures(root / "images" / "train")
    (root / "labels" / "train").mkdir(parents=True)
    lines: dict[str, list[str]] = {name: [] for name in NAMES[:5]}
    for number, (left, top, right, bottom) in enumerate(boxes()):
        x, y, x2, y2 = left / 32, top / 24, right / 32, bottom / 24
        ring = f"{number % 2} {x:.5f} {y:.5f} {x2:.5f} {y:.5f} {x2:.5f} {y2:.5f}"
        box = f"{number % 2} {(x + x2) / 2:.5f} {(y + y2) / 2:.5f} {x2 - x:.5f} {y2 - y:.5f}"
        lines[NAMES[number % 5]].append(ring if number % 3 == 0 else box)
    for name, text in lines.items():
        (root / "labels" / "train" / f"{name}.txt").write_text("\n".join(text) + "\n")
    (root / "train.txt").write_text("".join(f"./images/train/{name}.png\n" for name in NAMES))
    (root / "data.yaml").write_text("# made\npath: .\ntrain: train.txt\nnc: 2\nnames:\n  0: cat\n  1: dog\n")
    labels = sorted((root / "labels" / "train").iterdir())
    return [root / "data.yaml", root / "train.txt", *labels, *labels]


def make_voc(root: Path) -> list[Path]:
    pictures(root / "JPEGImages")
    (root / "Annotations").mkdir()
    (root / "ImageSets" / "Main").mkdir(parents=True)
    body = dict.fromkeys(NAMES, "")
    for number, box in enumerate(boxes()):
        corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
        body[NAMES[number % 5]] += (
            f"\n<object><name>{('cat', 'dog')[number % 2]}</name><bndbox>{corners}</bndbox></object>"
        )
    for name, text in body.items():
        (root / "Annotations" / f"{name}.xml").write_text(f'<?xml version="1.0"?>\n<annotation>{text}\n</annotation>\n')
    (root / "ImageSets" / "Main" / "train.txt").write_text("a\nb\nc\nd\n")
    (root / "ImageSets" / "Main" / "val.txt").write_text("e\nf\n")
    return [*sorted((root / "ImageSets" / "Main").iterdir()), *sorted((root / "Annotations").iterdir())]


FORMATS: dict[str, tuple[ModuleType, Callable[[Path], list[Path]]]] = {
    "coco": (read_coco, make_coco), "yolo": (read_yolo, make_yolo), "voc": (read_voc, make_voc)}  # fmt: skip


def judged(reading: Reading) -> tuple[Result, list[str]]:
    """The reading as it would be used, with what was said about it."""
    index = replace(reading.index, sizes=np.tile(np.array([SIZE], np.int32), (len(reading.index), 1)))
    objects, problems = audit_objects(index)
    said = [f"{p.item}: {p.message}" for p in (*reading.problems, *problems)]
    assert "".join(said).encode() is not None  # can be printed
    return (list(index.paths), index.class_names, index.splits.tolist(), objects), said


def same(a: Result, b: Result) -> bool:
    columns = ("starts", "boxes", "classes", "crowd", "kept", "mask_kinds")
    return a[:3] == b[:3] and a[3].masks == b[3].masks and all(
        np.array_equal(getattr(a[3], c), getattr(b[3], c)) for c in columns)  # fmt: skip


def check_valid(result: Result) -> None:
    """What is kept can be trained on, whatever it was changed to."""
    paths, names, splits, objects = result
    assert paths and names and len(paths) == len(splits) == len(objects.starts) - 1
    good = objects.boxes[objects.kept]
    assert np.isfinite(good).all() and (good >= 0).all() and (good[:, 2:] <= SIZE).all()
    assert (good[:, 2:] - good[:, :2] > 0.98).all()
    assert ((objects.classes >= 0) & (objects.classes < len(names))).all()
    for number in np.flatnonzero(objects.kept & (objects.mask_kinds > 0)):
        draw_mask(int(objects.mask_kinds[number]), objects.masks[number], size=SIZE)


def first_change(whole: bytes, damaged: bytes) -> tuple[bytes, bytes]:
    at = next((i for i, (a, b) in enumerate(zip(whole, damaged, strict=False)) if a != b), 0)
    return whole[max(0, at - 60) : at + 60], damaged[max(0, at - 60) : at + 60]


def well_formed(path: Path, data: bytes) -> bool:
    """Whether what nothing was said of is sound by the format's own rules: values changed, or whole lines are gone."""
    if path.suffix == ".json":
        entries = json.loads(data)["annotations"]
        boxes_given = [e.get("bbox") or [0] * 4 for e in entries]  # none at all: the box is that of the mask
        return np.shape(boxes_given) == (len(entries), 4) and bool(np.isfinite(boxes_given).all())
    if path.suffix == ".xml":
        root = ElementTree.fromstring(data)
        return root.tag == "annotation" and all(
            re.fullmatch(r"-?[0-9.]+", e.text or "") for e in root.findall("*/bndbox/*")
        )
    lines = [line for line in data.decode().split("\n") if line.strip()]
    if path.suffix == ".yaml":
        return all(line.isprintable() for line in lines)
    if path.parent.name == "train":
        return all(re.fullmatch(r"[01]((\s+-?[0-9.]+){2}){2,}\s*", line, re.ASCII) for line in lines)
    return all(Path(line.strip()).stem in NAMES for line in lines)


@pytest.mark.parametrize(("format", "count"), [("coco", 180), ("yolo", 170), ("voc", 150)])
def test_damaged_annotations(tmp_path, format, count, capsys):
    reader, make = FORMATS[format]
    root = tmp_path / "set"
    root.mkdir()
    files = make(root)
    random = np.random.default_rng(2024)
    for task in ("detect", "segment") if format != "voc" else ("detect",):
        original, said = judged(reader.read(root, How(task=task)))
        assert not [s for s in said if "f.png" not in s] or task == "segment"
    tally: Counter[str] = Counter()
    for number in range(count):
        task = "segment" if format != "voc" and number % 2 else "detect"
        original, before = judged(reader.read(root, How(task=task)))
        path = files[number % len(files)]
        whole = path.read_bytes()
        damaged = (damage_json if path.suffix == ".json" and random.random() < 0.6 else damage)(whole, random)
        path.write_bytes(damaged)
        start = time.process_time()
        try:
            reader.recognise(root)
            result, said = judged(reader.read(root, How(task=task)))
            check_valid(result)
            new = set(said) - set(before)
            outcome = "unchanged" if same(result, original) else "said" if new else "silent but valid"
            if outcome == "silent but valid":
                assert well_formed(path, damaged), (number, path.name, first_change(whole, damaged))
        except DataError as error:
            named = [
                path.name in str(error),
                str(tmp_path) in error.where,
                bool(error.next),
                str(error).encode() != b"",
            ]
            outcome = "refused" if all(named) else f"badly refused: {error}"
        finally:
            path.write_bytes(whole)
        assert time.process_time() - start < 2, (number, path.name)
        tally[outcome] += 1
    with capsys.disabled():
        print(f"\n{format}: {dict(tally)}")
    assert set(tally) <= {"said", "refused", "unchanged", "silent but valid"}
    assert tally["said"] + tally["refused"] > 0.4 * count
    assert tally["silent but valid"] < 0.35 * count
    assert same(judged(reader.read(root, How(task=task)))[0], original)


def test_damaged_mask_files(tmp_path, capsys):
    """One PNG per object: of a damaged one the object is left out and named, or the file can be read as a picture still."""
    root, files = tmp_path / "set", []
    for number, name in enumerate(NAMES):
        for kind in ("images", "masks"):
            (root / name / kind).mkdir(parents=True)
        draw(number, 0, 32).crop((0, 0, *SIZE)).save(root / name / "images" / f"{name}.png")
        for k, (left, top, right, bottom) in enumerate(boxes()[2 * number : 2 * number + 2]):
            mask = np.zeros(SIZE[::-1], np.uint8)
            mask[top:bottom, left:right] = 255
            files.append(root / name / "masks" / f"{k}.png")
            Image.fromarray(mask).save(files[-1])
    original, before = judged(read_masks.read(root, How()))
    check_valid(original)
    random, tally = np.random.default_rng(7), Counter[str]()
    for number in range(150):
        path = files[number % len(files)]
        whole = path.read_bytes()
        path.write_bytes(damage(whole, random))
        result, said = judged(read_masks.read(root, How()))
        check_valid(result)
        new = set(said) - set(before)
        outcome = "unchanged" if same(result, original) else "said" if new else "another mask"
        assert outcome != "said" or any(path.name in line for line in new), (number, new)
        if outcome == "another mask":
            Image.open(path).load()
        path.write_bytes(whole)
        tally[outcome] += 1
    with capsys.disabled():
        print(f"\nmask files: {dict(tally)}")
    assert tally["said"] > 60 and tally["another mask"] < 30
