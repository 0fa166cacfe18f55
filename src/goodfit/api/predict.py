"""`predict`: a bundle on image files. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
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
    return list(stream_predictions(bundle, images, threshold=threshold, out=out))


def stream_predictions(
    bundle: str | Path, images: Sequence[str | Path], *, threshold: float | None = None, out: str | Path | None = None
) -> Iterator[dict[str, Any]]:
    """As `predict`, one after another as they are made: of a hundred thousand pictures nobody waits for the last, and none is held."""
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
    rows = predictor.stream(files, threshold=threshold)
    return (
        rows
        if out is None
        else _written(rows, _Writer(predictor.labels, Path(out), detects=predictor.task != "classify"))
    )


def open_predictor(path: Path) -> Predictor:
    """A bundle's predictor; torch is imported only for one that cannot do without."""
    card = path / "bundle.json"
    if card.is_file() and read_json(card).get("needs") == "torch":
        from goodfit.outcome.torch_predictor import TorchPredictor

        return TorchPredictor(path)
    return Predictor(path)


def _written(rows: Iterator[dict[str, Any]], writer: _Writer) -> Iterator[dict[str, Any]]:
    """The same rows, written on the way."""
    for row in rows:
        writer.add(row)
        yield row
    writer.finish()


class _Writer:
    """Writes what `predict(out=)` describes, picture by picture; what is one file for all comes at the end, and is held as text till then.

    Raises:
        StorageError: the folder cannot be written.
    """

    def __init__(self, labels: Sequence[str], folder: Path, *, detects: bool) -> None:
        self._labels, self._folder, self._detects = labels, folder, detects
        self._numbers = {name: number for number, name in enumerate(labels)}
        self._names: set[str] = set()
        self._rows: list[str] = []
        self._results: list[str] = []
        self._images: list[str] = []
        with storage_errors(folder):
            for kind in ("labels", "pictures") if detects else ("",):
                (folder / kind).mkdir(parents=True, exist_ok=True)

    def add(self, row: dict[str, Any]) -> None:
        """One picture's."""
        number, name = len(self._rows), self._plain_name(str(row["image"]))
        self._rows.append(json.dumps(row, ensure_ascii=False))
        if not self._detects or "error" in row:
            return
        from goodfit.data.checks.draw import draw_objects
        from goodfit.data.masks import outline_mask, pack_rle, unpack_rle
        from goodfit.runtime.masks import cut_mask

        found = row["objects"]
        boxes = np.array([f["box"] for f in found], np.float64).reshape(-1, 4)
        classes = [self._numbers[f["label"]] for f in found]
        image = {"id": number, "file_name": row["image"], "width": row["width"], "height": row["height"]}
        self._images.append(json.dumps(image, ensure_ascii=False))
        self._results += [json.dumps({"image_id": number, "category_id": c, "bbox": [round(float(v), 2) for v in (*b[:2], *(b[2:] - b[:2]))],
                                      "score": f["score"], **({"segmentation": f["mask"]} if "mask" in f else {})})
                          for b, c, f in zip(boxes, classes, found, strict=True)]  # fmt: skip
        size = np.array([row["width"], row["height"]], np.float64)
        shares = np.concatenate(
            [(boxes[:, :2] + boxes[:, 2:]) / 2 / size, (boxes[:, 2:] - boxes[:, :2]) / size], axis=1
        )
        # Cut out one by one: a hundred whole masks of a large picture would take gigabytes.
        masks = [cut_mask(unpack_rle(pack_rle(f["mask"]["counts"], *f["mask"]["size"]))) for f in found if "mask" in f]
        shapes = [(outline_mask(mask) / size).ravel() for mask in masks] or list(shares)
        lines = [
            f"{c} {' '.join(f'{v:.6f}' for v in s)} {f['score']:.6f}\n"
            for c, s, f in zip(classes, shapes, found, strict=True)
            if len(s)
        ]
        with storage_errors(self._folder):
            write_text(self._folder / "labels" / f"{name}.txt", "".join(lines))
            drawn = draw_objects(decode_image(Path(row["image"])), boxes, classes, self._labels, masks or None)
            drawn.save(self._folder / "pictures" / f"{name}.jpg", quality=90)

    def finish(self) -> None:
        """Those of all pictures."""
        write_text(self._folder / "predictions.json", _listed(self._rows))
        if not self._detects:
            return
        write_text(self._folder / "coco.json", _listed(self._results))
        categories = json.dumps(
            [{"id": number, "name": name} for name, number in self._numbers.items()], ensure_ascii=False
        )
        write_text(
            self._folder / "coco_ids.json",
            f'{{"images": {_listed(self._images)}, "annotations": [], "categories": {categories}}}',
        )

    def _plain_name(self, path: str) -> str:
        """A file name for a picture, without its suffix; one that comes again is numbered."""
        name, number = Path(path).stem, 2
        while name in self._names:
            name, number = f"{Path(path).stem}-{number}", number + 1
        self._names.add(name)
        return name


def _listed(texts: Sequence[str]) -> str:
    """JSON texts as a list, one a line."""
    return "[" + ",\n".join(texts) + "]"
