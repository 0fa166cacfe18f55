"""`Predictor`: a bundle's ONNX model with the preprocessing and labels that belong to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from goodfit.core.errors import DataError, GoodfitError
from goodfit.core.safeio import read_json, verify_directory
from goodfit.runtime.images import ImageError, Preprocessing

BUNDLE_SCHEMA = 1
BATCH = 32  # images per call of the model; a bound on memory


class Predictor:
    """Predicts from image files with a bundle, through onnxruntime.

    The model takes `image`, uint8 of shape (N, 3, size, size), and returns `logits`, float32 of shape (N, classes);
    normalisation is inside the model.

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
        self.labels: list[str] = list(card["labels"])
        self.preprocessing = Preprocessing.from_dict(card["preprocessing"])
        self._session = _open_session(self.path / "model.onnx", threads)

    def logits(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Run the model. `pixels` is uint8 of shape (N, 3, size, size); returns float32 of shape (N, classes)."""
        outputs = self._session.run(["logits"], {"image": pixels})
        return np.asarray(outputs[0], dtype=np.float32)

    def predict(self, images: Sequence[str | Path | bytes]) -> list[dict[str, Any]]:
        """Classify images, given as paths or as the bytes of files.

        Returns:
            One dict per image, in order: `image`, `label`, `probability` and `probabilities` (by label); or `image`
            and `error` for a file that cannot be read.
        """
        return list(self.stream(images))

    def stream(self, images: Sequence[str | Path | bytes]) -> Iterator[dict[str, Any]]:
        """As predict, but yields each result as soon as its batch is done."""
        for start in range(0, len(images), BATCH):
            rows: list[dict[str, Any]] = []
            arrays = []
            for source in images[start : start + BATCH]:
                name = "" if isinstance(source, bytes) else str(source)
                try:
                    arrays.append(self.preprocessing.pixels(Path(source) if isinstance(source, str) else source))
                    rows.append({"image": name})
                except ImageError as error:
                    rows.append({"image": name, "error": error.message})
            probabilities = iter(softmax(self.logits(np.stack(arrays)))) if arrays else iter(())
            for row in rows:
                if "error" not in row:
                    row.update(self._describe(next(probabilities)))
                yield row

    def _describe(self, probabilities: npt.NDArray[np.float64]) -> dict[str, Any]:
        best = int(probabilities.argmax())
        return {
            "label": self.labels[best],
            "probability": round(float(probabilities[best]), 6),
            "probabilities": {name: round(float(p), 6) for name, p in zip(self.labels, probabilities, strict=True)},
        }


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
