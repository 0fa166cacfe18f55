"""Where goodfit keeps what is neither a user's data nor a run."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Folder of caches: GOODFIT_CACHE_DIR, or goodfit in XDG_CACHE_HOME or ~/.cache. It may not exist yet."""
    asked = os.environ.get("GOODFIT_CACHE_DIR")
    if asked:
        return Path(asked)
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(home) / "goodfit"


def free_bytes(folder: Path) -> int:
    """Bytes that can be written below a folder, which need not exist yet; 0 where nothing can be written."""
    while not folder.exists():
        if folder.parent == folder:
            return 0
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        return 0
    statistics = os.statvfs(folder) if hasattr(os, "statvfs") else None
    if statistics is None:
        import shutil

        return shutil.disk_usage(folder).free
    return statistics.f_bavail * statistics.f_frsize
