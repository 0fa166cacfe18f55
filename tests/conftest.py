"""Shared fixtures: tiny real images, real datasets where they are present, and the data folder's hash."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

REPOSITORY = Path(__file__).resolve().parent.parent
REAL_DATA = REPOSITORY.parent / "shared" / "data"


def folder_hash(folder: Path) -> str:
    """SHA-256 over names and bytes of all files below a folder."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(str(path.relative_to(folder)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def draw(seed: int, kind: int, size: int = 24) -> Image.Image:
    """A small picture whose class can be learned: a bright bar, upright or lying or slanted, on noise."""
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 90, (size, size, 3))
    at = int(random.integers(4, size - 8))
    if kind == 0:
        pixels[:, at : at + 4] = 230
    elif kind == 1:
        pixels[at : at + 4] = 230
    else:
        for k in range(size):
            pixels[k, max(0, k - 2) : k + 2] = 230
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.fixture
def make_images(tmp_path: Path) -> Callable[..., Path]:
    """Writes class folders of learnable pictures; returns the folder."""

    def make(per_class: int = 20, classes: int = 3, name: str = "images", suffix: str = "png", start: int = 0) -> Path:
        root = tmp_path / name
        for kind in range(classes):
            folder = root / f"class{kind}"
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(start, start + per_class):
                draw(1000 * kind + number, kind % 3).save(folder / f"{number:03d}.{suffix}")
        return root

    return make


@pytest.fixture
def real_data() -> Path:
    """The folder of real datasets; the test is skipped where it is absent."""
    if not REAL_DATA.is_dir():
        pytest.skip("the real datasets are not beside this checkout")
    return REAL_DATA


@pytest.fixture
def run_cli(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `goodfit` as a user does, in a process of its own, in an empty folder."""

    def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "goodfit", *words],
            cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False, env={**os.environ, **environment},
        )  # fmt: skip

    return run
