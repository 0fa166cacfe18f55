"""`predict`: a bundle on image files. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from goodfit.core.errors import DataError, RequestError
from goodfit.core.safeio import read_json, storage_errors, write_text
from goodfit.runtime import Predictor, decode_image


def predict(
    bundle: str | Path, images: Sequence[str | Path], *, threshold: float | None = None, out: str | Path | None = None
) -> list[dict[str, Any]]:
    """Classify images, or find objects in them, with a bundle.

    Args:
        bundle: The folder `bundle` of a run, or the run's own folder.
        images: Image files, or folders whose files are all taken.
        threshold: Of a detector: the confidence from which an object is reported, in place of the one chosen on validation.
        out: A folder for predictions.json; of a detector also drawn pictures (`pictures/`), `coco.json` (a list of results, with masks
            as run lengths), `coco_ids.json` (what its `image_id` and `category_id` are, in the form of an annotation file) and
            YOLO's text files (`labels/`): boxes, or one polygon around an object's mask.

    Returns:
        As goodfit.runtime.Predictor.predict.

    Raises:
        DataError: the folder is not a bundle, or there is nothing to predict.
        RequestError: `threshold` was given for a classifier, or is no share.
        StorageError: `out` cannot be written.
    """
    path = Path(bundle)
    if not (path / "bundle.json").is_file() and (path / "bundle" / "bundle.json").is_file():
        path = path / "bundle"
    files: list[str | Path | bytes] = []
    for image in images:
        folder = Path(image)
        files += (
            sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
            if folder.is_dir()
            else [folder]
        )
    if not files:
        raise DataError("There are no images to predict.", next="goodfit predict BUNDLE IMAGE... or a folder of images")
    predictor = open_predictor(path)
    if threshold is not None and (predictor.task == "classify" or not 0 <= threshold <= 1):
        raise RequestError(
            f"threshold={threshold:g} is the confidence of a detector, 0 to 1.", next="leave threshold out"
        )
    rows = predictor.predict(files, threshold=threshold)
    if out is not None:
        write_predictions(rows, predictor.labels, Path(out), detects=predictor.task != "classify")
    return rows


def open_predictor(path: Path) -> Predictor:
    """A bundle's predictor; torch is imported only for one that cannot do without."""
    card = path / "bundle.json"
    if card.is_file() and read_json(card).get("needs") == "torch":
        from goodfit.outcome.torch_predictor import TorchPredictor

        return TorchPredictor(path)
    return Predictor(path)


def write_predictions(rows: Sequence[dict[str, Any]], labels: Sequence[str], folder: Path, *, detects: bool) -> None:
    """Write what `predict(out=)` describes; raises StorageError if the folder cannot be written."""
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "predictions.json", json.dumps(list(rows), ensure_ascii=False, indent=1))
    if not detects:
        return
    from goodfit.data.checks.draw import draw_objects
    from goodfit.data.masks import outline_mask, pack_rle, unpack_rle

    numbers = {name: number for number, name in enumerate(labels)}
    results: list[dict[str, Any]] = []
    images: list[dict[str, Any]] = []
    names = _plain_names([str(row["image"]) for row in rows])
    for number, (row, name) in enumerate(zip(rows, names, strict=True)):
        if "error" in row:
            continue
        found = row["objects"]
        boxes = np.array([f["box"] for f in found], np.float64).reshape(-1, 4)
        classes = [numbers[f["label"]] for f in found]
        images.append({"id": number, "file_name": row["image"], "width": row["width"], "height": row["height"]})
        results += [{"image_id": number, "category_id": c, "bbox": [round(float(v), 2) for v in (*b[:2], *(b[2:] - b[:2]))],
                     "score": f["score"], **({"segmentation": f["mask"]} if "mask" in f else {})}
                    for b, c, f in zip(boxes, classes, found, strict=True)]  # fmt: skip
        size = np.array([row["width"], row["height"]], np.float64)
        shares = np.concatenate(
            [(boxes[:, :2] + boxes[:, 2:]) / 2 / size, (boxes[:, 2:] - boxes[:, :2]) / size], axis=1
        )
        masks = [unpack_rle(pack_rle(f["mask"]["counts"], *f["mask"]["size"])) for f in found if "mask" in f]
        shapes = [(outline_mask(mask) / size).ravel() for mask in masks] or list(shares)
        lines = [
            f"{c} {' '.join(f'{v:.6f}' for v in s)} {f['score']:.6f}\n"
            for c, s, f in zip(classes, shapes, found, strict=True)
            if len(s)
        ]
        with storage_errors(folder):
            for kind in ("labels", "pictures"):
                (folder / kind).mkdir(exist_ok=True)
            write_text(folder / "labels" / f"{name}.txt", "".join(lines))
            drawn = draw_objects(decode_image(Path(row["image"])), boxes, classes, labels, masks or None)
            drawn.save(folder / "pictures" / f"{name}.jpg", quality=90)
    write_text(folder / "coco.json", json.dumps(results))
    categories = [{"id": number, "name": name} for name, number in numbers.items()]
    write_text(
        folder / "coco_ids.json",
        json.dumps({"images": images, "annotations": [], "categories": categories}, ensure_ascii=False),
    )


def _plain_names(paths: Sequence[str]) -> list[str]:
    """A file name for each picture, without its suffix; those that come again are numbered."""
    made: dict[str, None] = {}
    for path in paths:
        name, number = Path(path).stem, 2
        while name in made:
            name, number = f"{Path(path).stem}-{number}", number + 1
        made[name] = None
    return list(made)
