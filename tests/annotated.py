"""Small datasets of boxes and masks, written as people have them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from goodfit.data.index import DatasetIndex
from goodfit.data.reading import Reading
from pictures import draw


def sized(index: DatasetIndex) -> DatasetIndex:
    sizes = []
    for row in range(len(index)):
        with Image.open(index.file(row)) as image:
            sizes.append(image.size)
    return replace(index, sizes=np.array(sizes, np.int32).reshape(-1, 2))


def split_counts(reading: Reading) -> list[int]:
    return [int((reading.index.splits == s).sum()) for s in range(3)]


def picture(path: Path, size: int = 24) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(len(str(path)), 0, size).save(path)


def coco(root: Path, name: str = "annotations.json", **parts: object) -> Path:
    content = {
        "images": [{"id": 0, "file_name": "a.png"}, {"id": 1, "file_name": "b.png"}],
        "annotations": [{"id": 5, "image_id": 0, "category_id": 3, "bbox": [1, 2, 10, 12], "iscrowd": 0}],
        "categories": [{"id": 7, "name": "no"}, {"id": 3, "name": "cat"}],
    }
    root.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(json.dumps({**content, **parts}))
    for image in ("a.png", "b.png"):
        if not (root / image).exists():
            picture(root / image)
    return root


def yolo(root: Path, labels: dict[str, str], yaml: str | None = None, images: tuple[str, ...] = ("a", "b")) -> Path:
    for name in images:
        picture(root / "images" / f"{name}.png")
    (root / "labels").mkdir(parents=True, exist_ok=True)
    for name, text in labels.items():
        (root / "labels" / f"{name}.txt").write_bytes(text.encode() if isinstance(text, str) else text)
    if yaml is not None:
        (root / "data.yaml").write_text(yaml)
    return root


def voc(root: Path, boxes: dict[str, list[tuple[str, str]]], sets: dict[str, str] | None = None) -> Path:
    for name, objects in boxes.items():
        picture(root / "JPEGImages" / f"{name}.png")
        (root / "Annotations").mkdir(exist_ok=True)
        body = "".join(
            f"<object><name>{kind}</name><difficult>{int(kind == 'hard')}</difficult><bndbox>"
            + "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box.split(), strict=True))
            + "</bndbox></object>"
            for kind, box in objects
        )
        (root / "Annotations" / f"{name}.xml").write_text(f"<annotation><filename>x.jpg</filename>{body}</annotation>")
    for name, text in (sets or {}).items():
        (root / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
        (root / "ImageSets" / "Main" / f"{name}.txt").write_text(text)
    return root
