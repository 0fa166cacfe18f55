"""`predict`: a bundle on image files. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from goodfit.core.errors import DataError
from goodfit.runtime import Predictor


def predict(bundle: str | Path, images: Sequence[str | Path]) -> list[dict[str, Any]]:
    """Classify images with a bundle.

    Args:
        bundle: The folder `bundle` of a run, or the run's own folder.
        images: Image files, or folders whose files are all taken.

    Returns:
        As goodfit.runtime.Predictor.predict.

    Raises:
        DataError: the folder is not a bundle, or there is nothing to predict.
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
    return Predictor(path).predict(files)
