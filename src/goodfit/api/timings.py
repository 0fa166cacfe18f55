"""Latencies that were measured before, in the user cache: one file each, for one network, size, machine and set of pictures."""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from importlib import metadata
from typing import Any

from goodfit.config.latency import LatencyCost
from goodfit.core.errors import StorageError
from goodfit.core.machine import num_cores, processor_name
from goodfit.core.places import cache_folder
from goodfit.core.safeio import read_json, write_json

FOLDER = "latency-2"


def machine_key() -> dict[str, Any]:
    """What tells one machine's figures from another's where they share a cache."""
    try:
        runtime = metadata.version("onnxruntime")
    except metadata.PackageNotFoundError:
        runtime = ""
    return {"processor": processor_name(), "num_cores": num_cores(), "onnxruntime": runtime}


def keep(key: str, cost: LatencyCost) -> None:
    """Write one down; a cache that cannot be written is no error."""
    with contextlib.suppress(OSError, StorageError):
        folder = cache_folder() / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"{key}.json", {"cost": asdict(cost), "machine": machine_key()})


def kept(key: str) -> LatencyCost | None:
    """What was written down under a key; None if nothing was, or if it is damaged."""
    with contextlib.suppress(KeyError, TypeError, ValueError, OSError, StorageError):
        return LatencyCost(**read_json(cache_folder() / FOLDER / f"{key}.json")["cost"])
    return None


def kept_here() -> list[LatencyCost]:
    """All that were measured on this machine, the latest first."""
    found = []
    files = (cache_folder() / FOLDER).glob("*.json") if (cache_folder() / FOLDER).is_dir() else ()
    for path in sorted(files, key=lambda p: -p.stat().st_mtime):
        with contextlib.suppress(KeyError, TypeError, ValueError, OSError, StorageError):
            value = read_json(path)
            if value["machine"] == machine_key():
                found.append(LatencyCost(**value["cost"]))
    return found
