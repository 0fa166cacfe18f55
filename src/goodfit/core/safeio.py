"""Files that are either whole or absent, also after a kill or a power cut.

Everything a run cannot lose goes through here: written under a temporary name on the same file system, synced to the
disk, then renamed; the folder that holds the name is synced last. A directory is committed the same way, with a
manifest of the size and SHA-256 of each of its files, which is what readers trust.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from goodfit.core.errors import StorageError

MANIFEST = "manifest.json"
TEMPORARY = ".tmp-"
REPLACED = ".tmp-replaced-"

_DISK_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission was denied",
    errno.EPERM: "permission was denied",
    errno.EIO: "the disk reported an input/output error",
}


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's errors about a path into a StorageError that says what to do."""
    try:
        yield
    except OSError as error:
        reason = _DISK_ERRORS.get(error.errno or 0, str(error))
        raise StorageError(
            f"Could not write: {reason}.",
            where=str(path),
            kept="everything written before it",
            next="free space or choose another folder with project=FOLDER, then: goodfit resume RUN",
        ) from error


def sync_directory(path: Path) -> None:
    """Make the names in a folder durable (no operation where folders cannot be opened, as on Windows)."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot
            raise
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Make the bytes of a file durable."""
    with open(path, "rb+") as handle:
        os.fsync(handle.fileno())


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file's content atomically and durably.

    Raises:
        StorageError: the disk is full, read-only, or denies permission.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}")
    with storage_errors(path):
        try:
            with open(temporary, "wb") as handle:
                handle.write(data)
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_directory(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace a text file (UTF-8) atomically and durably; raises as write_bytes."""
    write_bytes(path, text.encode("utf-8", "surrogateescape"))  # file names may be no UTF-8


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file atomically and durably; raises as write_bytes. Numbers that JSON has none for, as a user's own figure may be,
    become the texts nan, inf and -inf."""
    write_text(path, json.dumps(as_json(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def as_json(value: Any) -> Any:
    """Nested plain values with texts in place of what JSON has no number for."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(k): as_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(v) for v in value]
    return value


def read_json(path: Path) -> Any:
    """Read a JSON file of a run.

    Raises:
        StorageError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise StorageError(f"Could not read {path.name}: {error}.", where=str(path)) from error


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal text."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def commit_directory(target: Path, fill: Callable[[Path], None], facts: dict[str, Any]) -> None:
    """Create a directory that is complete or absent.

    `fill` writes files into a temporary sibling; then each is synced, the manifest (with `facts`) is written, and the
    sibling is renamed to `target`. An older `target` is replaced.

    Raises:
        StorageError: the disk is full, read-only, or denies permission; nothing of the attempt is left.
    """
    temporary = target.with_name(f"{TEMPORARY}{target.name}-{os.getpid()}")
    with storage_errors(target):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            fill(temporary)
            files = {}
            for path in sorted(p for p in temporary.rglob("*") if p.is_file()):
                sync_file(path)
                name = path.relative_to(temporary).as_posix()
                files[name] = {"size": path.stat().st_size, "sha256": sha256_file(path)}
            write_json(temporary / MANIFEST, {**facts, "files": files})
            older = target.with_name(f"{REPLACED}{target.name}")
            if target.exists():  # set aside first: a kill between the two renames is mended by remove_temporaries
                os.rename(target, older)
            os.rename(temporary, target)
            shutil.rmtree(older, ignore_errors=True)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync_directory(target.parent)


def verify_directory(path: Path) -> dict[str, Any]:
    """Check a committed directory against its manifest and return the manifest.

    Raises:
        StorageError: the manifest or a file is missing, of the wrong size, or its bytes changed.
    """
    manifest = read_json(path / MANIFEST)
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict):
        raise StorageError("The manifest lists no files.", where=str(path / MANIFEST))
    for name, expected in files.items():
        file = path / name
        if not file.resolve().is_relative_to(path.resolve()):
            raise StorageError("The manifest names a file outside its folder.", where=str(path / MANIFEST))
        if not file.is_file():
            raise StorageError("A file is missing.", where=str(file))
        if file.stat().st_size != expected["size"] or sha256_file(file) != expected["sha256"]:
            raise StorageError("A file was changed or cut off after it was written.", where=str(file))
    return dict(manifest)


def remove_temporaries(folder: Path) -> list[str]:
    """Put back what an interrupted replacement set aside, and delete what interrupted writes left.

    Returns the names removed.
    """
    removed = []
    for path in sorted(folder.glob(f"{REPLACED}*")):
        target = folder / path.name.removeprefix(REPLACED)
        if not target.exists():
            os.rename(path, target)
    for path in sorted(folder.glob(f"{TEMPORARY}*")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        removed.append(path.name)
    return removed
