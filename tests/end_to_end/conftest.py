"""One small finished run, shared by the tests that only look at it."""

from __future__ import annotations

from pathlib import Path

import pytest

import goodfit
from pictures import draw


@pytest.fixture(scope="session")
def bars(tmp_path_factory) -> Path:
    """180 pictures of bars in three classes, with a zero-byte file and a text file among them."""
    root = tmp_path_factory.mktemp("data") / "bars"
    for kind in range(3):
        folder = root / f"class{kind}"
        folder.mkdir(parents=True)
        for number in range(60):
            draw(1000 * kind + number, kind).save(folder / f"{number:03d}.png")
    (root / "class0" / "zero.png").write_bytes(b"")
    (root / "class1" / "notes.txt").write_text("not an image")
    return root


@pytest.fixture(scope="session")
def finished(bars, tmp_path_factory) -> goodfit.Run:
    """A run of five epochs from Python."""
    return goodfit.train(bars, epochs=5, project=str(tmp_path_factory.mktemp("runs")), batch=16)
