"""What the tests share that is no fixture: learnable pictures, folder hashes, places."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

REPOSITORY = Path(__file__).resolve().parent.parent
REAL_DATA = REPOSITORY.parent / "shared" / "data"


def folder_times(root: Path) -> dict[str, tuple[int, int, int]]:
    """Size, and time of the last change of content and of anything, of every file below a folder: any write shows."""
    found = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        found[str(path)] = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return found


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
