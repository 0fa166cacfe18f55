"""`Predictor`: a bundle's ONNX model with the preprocessing and labels that belong to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from goodfit.core.errors import DataError, GoodfitError, RequestError
from goodfit.core.safeio import read_json, verify_directory
from goodfit.runtime.detections import Selection, select_objects
from goodfit.runtime.images import ImageError, Preprocessing
from goodfit.runtime.letterbox import Letterbox
from goodfit.runtime.masks import as_rle, paste_mask

BUNDLE_SCHEMA = 1
BATCH = 32  # images per call of the model, at most; and ...
BATCH_PIXELS = (
    1 << 22
)  # ... of their inputs: the first maps of a detector take some 300 bytes a pixel, a gigabyte in all
EPSILON = 1e-6  # scores above the limit are taken, those at the threshold too
Outputs = list[npt.NDArray[np.float32]]


class Predictor:
    """Predicts from image files with a bundle, through onnxruntime.

    The model takes `image`, uint8 of shape (N, 3, height, width), or one at a time; normalisation is inside it. A classifier returns `logits`,
    float32 of shape (N, classes); a detector `boxes` (N, A, 4), in pixels of the input, and `scores` (N, A, classes).

    Raises:
        DataError: the folder is not a bundle, was changed since it was written, or is of an unknown schema.
    """

    def __init__(self, bundle: str | Path, *, threads: int | None = None) -> None:
        self.path = Path(bundle)
        if not (self.path / "bundle.json").is_file():
            raise DataError("This folder is not a bundle: it has no bundle.json.", where=str(bundle),
                            next="give the folder `bundle` of a run")  # fmt: skip
        try:
            verify_directory(self.path)
            card = read_json(self.path / "bundle.json")
        except GoodfitError as error:
            raise DataError(f"The bundle is damaged. {error.message}", where=error.where,
                            next="export it again from its run") from error  # fmt: skip
        if card.get("schema") != BUNDLE_SCHEMA:
            raise DataError(f"This bundle has schema {card.get('schema')}, not {BUNDLE_SCHEMA}.", where=str(bundle),
                            next="use the goodfit version named in bundle.json")  # fmt: skip
        self.card: dict[str, Any] = card
        self.task = str(card.get("task", "classify"))
        self.labels: list[str] = list(card["labels"])
        detects = self.task in ("detect", "segment")
        self.preprocessing: Preprocessing | Letterbox = (Letterbox if detects else Preprocessing).from_dict(
            card["preprocessing"]
        )
        self.selection = Selection(**card["selection"]) if detects else Selection()
        self.threshold = float(card.get("threshold", 0.0))
        self._outputs = ["boxes", "scores"] if detects else ["logits"]
        self._one_by_one = bool(card.get("fixed_batch", False))  # the model takes one image at a time
        self._session = self._open(threads)

    def _open(self, threads: int | None) -> Any:
        """The ONNX session.

        Raises:
            DataError: the bundle has none.
        """
        if self.card.get("needs") == "torch":
            raise DataError(f"The network of this bundle, {self.card.get('model')}, does not become ONNX: it needs torch.", where=str(self.path),
                            next="goodfit predict BUNDLE IMAGE..., or goodfit.predict, on a machine with goodfit and torch")  # fmt: skip
        return _open_session(self.path / "model.onnx", threads)

    @property
    def batch(self) -> int:
        """Images that are given to the model at once, at most."""
        if not isinstance(self.preprocessing, Letterbox):
            return BATCH
        return max(1, min(BATCH, BATCH_PIXELS // (self.preprocessing.width * self.preprocessing.height)))

    def pixels(self, source: Path | bytes, *, where: str = "") -> npt.NDArray[np.uint8]:
        """One image as the model takes it, uint8 of shape (3, height, width).

        Raises:
            ImageError: the image cannot be read.
        """
        if isinstance(self.preprocessing, Letterbox):
            return self.preprocessing.read(source, where=where)[0]
        return self.preprocessing.pixels(source, where=where)

    def run(self, pixels: npt.NDArray[np.uint8]) -> Outputs:
        """Run the model on uint8 images of shape (N, 3, height, width); its outputs, as the class describes them."""
        parts = np.split(pixels, len(pixels)) if self._one_by_one else [pixels]
        made = [self._session.run(self._outputs, {"image": part}) for part in parts]
        return [np.concatenate(outputs).astype(np.float32, copy=False) for outputs in zip(*made, strict=True)]

    def logits(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Of a classifier: `run`, as one array of shape (N, classes)."""
        return self.run(pixels)[0]

    def objects(
        self, boxes: npt.NDArray[np.float32], scores: npt.NDArray[np.float32], threshold: float = 0.0
    ) -> tuple[npt.NDArray[np.floating], npt.NDArray[np.floating], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The objects among one image's candidates, as goodfit.runtime.detections.select_objects has them, from a confidence
        on. What is less sure removes nothing that is surer, so that the fewer are looked at, the same are found."""
        limit = max(self.selection.threshold, threshold - EPSILON)
        return select_objects(boxes, scores, replace(self.selection, threshold=limit))

    def predict(self, images: Sequence[str | Path | bytes], *, threshold: float | None = None) -> list[dict[str, Any]]:
        """Predict images, given as paths or as the bytes of files.

        Args:
            threshold: Of a detector: the confidence from which an object is reported; the one chosen on validation, if None.

        Returns:
            One dict per image, in order. Of a classifier: `image`, `label`, `probability` and `probabilities` (by label). Of a
            detector: `image`, `width`, `height` and `objects`, best first, each with `label`, `score`, `box` (left, top,
            right, bottom in pixels of the upright picture) and, where the model gives masks, `mask` (COCO's run lengths). `image` and `error` for a file that cannot be read.
        """
        return list(self.stream(images, threshold=threshold))

    def stream(
        self, images: Sequence[str | Path | bytes], *, threshold: float | None = None
    ) -> Iterator[dict[str, Any]]:
        """As predict, but yields each result as soon as its batch is done."""
        batch = self.batch
        for start in range(0, len(images), batch):
            rows: list[dict[str, Any]] = []
            arrays = []
            for source in images[start : start + batch]:
                if not isinstance(source, str | Path | bytes):
                    raise RequestError(f"An image is given as the path or the bytes of its file, not as {type(source).__name__}.",
                                       next="of an array: encode it as PNG into a buffer, and give that buffer's bytes")  # fmt: skip
                name = "" if isinstance(source, bytes) else str(source)
                try:
                    pixels, told = self._read(Path(source) if isinstance(source, str) else source)
                    arrays.append(pixels)
                    rows.append({"image": name, **told})
                except ImageError as error:
                    rows.append({"image": name, "error": error.message})
            read = [row for row in rows if "error" not in row]
            limit = self.threshold if threshold is None else threshold
            for row, answer in zip(read, self._answers(np.stack(arrays), read, limit) if arrays else (), strict=True):
                row.update(answer)
            yield from rows

    def _answers(
        self, pixels: npt.NDArray[np.uint8], rows: Sequence[dict[str, Any]], threshold: float
    ) -> Iterator[dict[str, Any]]:
        """What is said of each of some images."""
        for outputs, row in zip(zip(*self.run(pixels), strict=True), rows, strict=True):
            yield self._describe(outputs, row, threshold)

    def _read(self, source: Path | bytes) -> tuple[npt.NDArray[np.uint8], dict[str, Any]]:
        if not isinstance(self.preprocessing, Letterbox):
            return self.preprocessing.pixels(source), {}
        pixels, (width, height) = self.preprocessing.read(source)
        return pixels, {"width": width, "height": height}

    def _describe(
        self, outputs: tuple[npt.NDArray[np.float32], ...], row: dict[str, Any], threshold: float
    ) -> dict[str, Any]:
        if isinstance(self.preprocessing, Letterbox):
            boxes, scores, classes, _ = self.objects(outputs[0], outputs[1], threshold)
            return {"objects": self.told(boxes, scores, classes, row, threshold)}
        probabilities = softmax(outputs[0])
        best = int(probabilities.argmax())
        return {
            "label": self.labels[best],
            "probability": round(float(probabilities[best]), 6),
            "probabilities": {name: round(float(p), 6) for name, p in zip(self.labels, probabilities, strict=True)},
        }

    def told(
        self, boxes: npt.NDArray[np.floating], scores: npt.NDArray[np.floating], classes: npt.NDArray[np.integer],
        row: dict[str, Any], threshold: float, masks: npt.NDArray[np.floating] | None = None,
    ) -> list[dict[str, Any]]:  # fmt: skip
        """Objects of the input in pixels of their picture, those that are sure enough.

        Args:
            row: With the picture's `width` and `height`.
            masks: Probabilities within the boxes, shape (K, M, M); they become run lengths as COCO has them.
        """
        assert isinstance(self.preprocessing, Letterbox)
        size = (int(row["width"]), int(row["height"]))
        whole = self.preprocessing.place(size).boxes_out(boxes)  # which masks belong to, ...
        moved = np.clip(whole, 0.0, np.array([*size, *size], np.float64))  # ... and what is told
        made = []
        for number in np.flatnonzero(scores >= threshold):
            found: dict[str, Any] = {"label": self.labels[int(classes[number])], "score": round(float(scores[number]), 6),
                                     "box": [round(float(v), 2) for v in moved[number]]}  # fmt: skip
            if masks is not None:
                found["mask"] = as_rle(paste_mask(masks[number], whole[number], size), size)
            made.append(found)
        return made


def _open_session(model: Path, threads: int | None) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise DataError("onnxruntime is not installed, and the bundle's model needs it.",
                        next="pip install onnxruntime") from error  # fmt: skip
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    if threads is not None:
        settings.intra_op_num_threads = threads
    try:  # from bytes: external data, which could point outside the bundle, is then refused
        return onnxruntime.InferenceSession(model.read_bytes(), settings, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise DataError(f"onnxruntime cannot load the model: {error}", where=str(model)) from error


def softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Probabilities along the last axis, computed in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    exponentials = np.exp(shifted)
    return np.asarray(exponentials / exponentials.sum(axis=-1, keepdims=True))
