"""Checkpoints: a directory each, complete or absent, found by their manifests and never by a pointer."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from goodfit.core.errors import StorageError
from goodfit.core.safeio import commit_directory, read_json, remove_temporaries, verify_directory, write_json
from goodfit.engine.optimizer import load_optimizer_tensors, optimizer_tensors
from goodfit.engine.state import Progress, TrainState

SCHEMA = 1
KEEP = 2  # newest checkpoints kept, beside the best and the pinned ones
SAVE_SHARE = 0.05  # of the time, for saves that nothing forces
SAVE_SECONDS = 300.0  # between two checkpoints inside a long epoch
MAX_FAILURES = 3  # saves in a row that could wait and failed

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A state at one step, copied out of the running model, so that training can go on while it is written or kept."""

    files: dict[str, Tensors]  # by file name: model, ema (an average, where one is validated), optimizer, scaler
    progress: dict[str, Any]
    pinned: bool = False
    versions: dict[str, str] = field(default_factory=dict)  # of the process that wrote it; empty in memory

    @property
    def evaluated(self) -> Tensors:
        """The tensors of the model that was validated: the average's, where there was one by then."""
        return self.files.get("ema", self.files["model"])

    @property
    def name(self) -> str:
        """The directory's name: the step, and the segment where it is not the first."""
        segment = self.progress["segment"]
        return f"step-{self.progress['step']:08d}" + (f"-segment-{segment}" if segment else "")


def take_snapshot(state: TrainState, *, pinned: bool = False) -> Snapshot:
    """Copy a state to host memory."""
    files = {"model": _copy(state.model.state_dict()), "optimizer": _copy(optimizer_tensors(state.optimizer))}
    if state.evaluated is not state.model:
        files["ema"] = _copy(state.evaluated.state_dict())
    if state.loss_scale.active:
        files["scaler"] = _copy({"value": state.loss_scale.value, "good_steps": state.loss_scale.good_steps})
    return Snapshot(files, state.progress.to_dict(), pinned)


def _copy(tensors: Tensors) -> Tensors:
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def restore(state: TrainState, snapshot: Snapshot) -> None:
    """Put a snapshot back into a state of the same plan."""
    state.model.load_state_dict(snapshot.files["model"])
    load_optimizer_tensors(state.optimizer, snapshot.files["optimizer"])
    if state.loss_scale.active:
        state.loss_scale.value.copy_(snapshot.files["scaler"]["value"])
        state.loss_scale.good_steps.copy_(snapshot.files["scaler"]["good_steps"])
    state.progress = Progress.from_dict(snapshot.progress)
    if state.evaluated is not state.model:
        state.evaluated.load_state_dict(snapshot.files["ema"])


def tensors_sha256(files: dict[str, Tensors]) -> str:
    """SHA-256 over all tensors, sorted by name: name, dtype, shape and bytes."""
    digest = hashlib.sha256()
    rows = sorted((f"{file}.{name}" if file else name, t) for file, ts in files.items() for name, t in ts.items())
    for name, tensor in rows:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().to("cpu").contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Checkpoints:
    """The `checkpoints/` folder of a run.

    Args:
        folder: Created if it is missing.
        facts: Hashes of plan and data, kept in every manifest and compared when loading.
    """

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.folder = folder
        self.facts = facts
        self.damaged: list[str] = []
        self._last_save = time.monotonic()
        self._cost = 0.0
        self._failures = 0
        self._held: dict[str, Snapshot] = {}  # by name: good states that are not on disk yet
        folder.mkdir(parents=True, exist_ok=True)
        self.removed = remove_temporaries(folder)

    def is_due(self) -> bool:
        """Whether saving now keeps its share of the time under 5 %."""
        return time.monotonic() - self._last_save >= self._cost / SAVE_SHARE

    def is_overdue(self) -> bool:
        """Whether an epoch has gone on for five minutes without a checkpoint."""
        return time.monotonic() - self._last_save >= max(SAVE_SECONDS, self._cost / SAVE_SHARE)

    def hold(self, snapshot: Snapshot) -> None:
        """Keep a good state in memory; it is written before the next checkpoint that refers to it."""
        self._held[snapshot.name] = snapshot
        self._release(snapshot.progress)

    def _release(self, progress: dict[str, Any]) -> None:
        """Forget held states that nothing refers to any more."""
        needed = self._needed(progress)
        self._held = {name: held for name, held in self._held.items() if name in needed}

    def _needed(self, progress: dict[str, Any]) -> set[str]:
        """Names of the checkpoints that a run at this progress may come back to."""
        places = [progress["best"], progress.get("reference"), progress["parent"], *progress.get("branches", ())]
        return {self._name_of(place) for place in places if place}

    def save(self, snapshot: Snapshot) -> None:
        """Write a snapshot, before it the held ones that it refers to, and prune old ones.

        Raises:
            StorageError: the disk is full, read-only or denies permission; earlier checkpoints are untouched.
        """
        start = time.monotonic()
        self._release(snapshot.progress)
        for held in self._held.values():
            if held.name != snapshot.name:
                self._write(held)
        self._held.clear()
        path = self._write(snapshot)
        self._point("last", path)
        best = snapshot.progress["best"]
        if best is not None:
            self._point("best", self.folder / self._name_of(best))
        self._prune(snapshot)
        self._cost = time.monotonic() - start
        self._last_save = time.monotonic()

    def try_save(self, snapshot: Snapshot) -> str:
        """Save where that can wait for the next time, as where a disk is full for the moment.

        Returns:
            Why it failed; "" if it did not.

        Raises:
            StorageError: it failed for the third time in a row.
        """
        try:
            self.save(snapshot)
        except StorageError as error:
            self._failures += 1
            self._last_save = time.monotonic()
            if self._failures >= MAX_FAILURES:
                raise
            return error.message
        self._failures = 0
        return ""

    def latest(self) -> Snapshot | None:
        """The newest valid checkpoint; damaged ones are named in `damaged` and passed over.

        Raises:
            StorageError: there are checkpoints, but none can be used: starting again would lose them.
        """
        for path in sorted(self._directories(), key=_order, reverse=True):
            try:
                return self.load(path.name)
            except StorageError as error:
                self.damaged.append(f"{error.where or path}: {error.message}")
        if self.damaged:
            raise StorageError(f"None of the checkpoints can be used: {'; '.join(self.damaged)}",
                               where=str(self.folder), kept="the checkpoints, as they are",
                               next="undo what was changed in the run's folder, or start a new run")  # fmt: skip
        return None

    def load(self, name: str) -> Snapshot:
        """Read one checkpoint.

        Raises:
            StorageError: it is missing, damaged, of another schema, or belongs to another plan or dataset.
        """
        path = self.folder / name
        manifest = verify_directory(path)
        for key, value in {"schema": SCHEMA, **self.facts}.items():
            if manifest.get(key) != value:
                raise StorageError(f"The checkpoint belongs to another run: its {key} differs.", where=str(path))
        written = read_json(path / "state.json")
        files = {p.stem: load_file(str(p)) for p in sorted(path.glob("*.safetensors"))}
        return Snapshot(files, written["progress"], bool(written["pinned"]), dict(written.get("versions", {})))

    def load_state(self, place: dict[str, Any]) -> Snapshot:
        """A state that progress refers to (its best, its reference), from memory or from the disk; raises as load."""
        name = self._name_of(place)
        return self._held[name] if name in self._held else self.load(name)

    def problem_of(self, place: dict[str, Any]) -> str:
        """What is wrong on the disk with a state that progress refers to; "" if nothing is."""
        name = self._name_of(place)
        try:
            if name not in self._held:
                verify_directory(self.folder / name)
        except StorageError as error:
            return error.message
        return ""

    def load_best(self, progress: Progress) -> Snapshot:
        """The best state of a run so far; raises as load."""
        assert progress.best is not None
        return self.load_state(progress.best)

    def newest_pinned(self, segment: int) -> dict[str, int] | None:
        """Segment and step of the newest pinned checkpoint of a segment or of those before it; None if there is none."""
        pinned = [_order(p) for p in self._directories() if _is_pinned(p)]
        found = max((place for place in pinned if place[0] <= segment), default=None)
        return None if found is None else {"segment": found[0], "step": found[1]}

    def _name_of(self, place: dict[str, Any]) -> str:
        return Snapshot({}, place).name

    def _write(self, snapshot: Snapshot) -> Path:
        path = self.folder / snapshot.name

        def fill(folder: Path) -> None:
            for name, tensors in snapshot.files.items():
                save_file(tensors, str(folder / f"{name}.safetensors"))
            write_json(folder / "state.json", {"progress": snapshot.progress, "pinned": snapshot.pinned,
                                               "versions": versions()})  # fmt: skip

        commit_directory(path, fill, {"schema": SCHEMA, **self.facts})
        return path

    def _point(self, name: str, target: Path) -> None:
        """`best` and `last` are links for people; nothing here reads them."""
        temporary = self.folder / f".tmp-{name}"
        with contextlib.suppress(OSError):  # a file system without links
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(target.name)
            os.replace(temporary, self.folder / name)

    def _prune(self, newest: Snapshot) -> None:
        needed = {newest.name} | self._needed(newest.progress)
        loose = [p for p in sorted(self._directories(), key=_order) if p.name not in needed and not _is_pinned(p)]
        for path in loose[: max(0, len(loose) - (KEEP - 1))]:
            shutil.rmtree(path, ignore_errors=True)

    def _directories(self) -> list[Path]:
        return [p for p in self.folder.glob("step-*") if p.is_dir() and not p.is_symlink()]


def _order(path: Path) -> tuple[int, int]:
    """(segment, step) from a directory's name; what is named otherwise sorts first."""
    words = path.name.split("-")
    try:
        return (int(words[3]) if len(words) > 3 else 0, int(words[1]))
    except ValueError:
        return (-1, -1)


def _is_pinned(path: Path) -> bool:
    try:
        return bool(read_json(path / "state.json")["pinned"])
    except (StorageError, KeyError, TypeError):
        return False


def has_finished(folder: Path) -> bool:
    """Whether the newest checkpoint of a `checkpoints/` folder is that of a run which has ended its training."""
    paths = sorted((p for p in folder.glob("step-*") if not p.is_symlink()), key=_order)
    try:
        return bool(paths) and bool(read_json(paths[-1] / "state.json")["progress"]["finished"])
    except (StorageError, KeyError, TypeError):  # damaged: an earlier one will be taken
        return False


def versions() -> dict[str, str]:
    """Versions that an exact resume depends on."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
    }
