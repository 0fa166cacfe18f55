"""A run's folder: how it is named, what lies in it, and `Run`, its face to Python."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from goodfit.config.parse import parse_request
from goodfit.config.plan import Plan, read_plan
from goodfit.config.request import TrainRequest
from goodfit.core.errors import RequestError, StorageError
from goodfit.core.journal import Event, read_events
from goodfit.core.lock import run_lock
from goodfit.core.safeio import read_json, storage_errors, write_text

DEFAULT_PROJECT = "runs"
REQUEST, PLAN, AUDIT, SPLIT, RUN_FACTS = "request.yaml", "plan.json", "audit.json", "split.csv", "run.json"
OBJECTS = "objects.safetensors"  # boxes and masks, where the samples have some
RUN_PARTS = (REQUEST, PLAN, AUDIT, "events.jsonl", ".lock")  # one of which every run's folder has


class Run:
    """A run on disk, finished or not. Everything is read from its folder.

    Attributes:
        path: The folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / PLAN).is_file():
            raise RequestError("This folder is not a run: it has no plan.json.", where=str(path),
                               next="give the folder of a run, as runs/NAME")  # fmt: skip

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def plan(self) -> Plan:
        """What was decided."""
        return read_plan(self.path / PLAN)

    @property
    def findings(self) -> list[dict[str, Any]]:
        """What the audit found."""
        return list(read_json(self.path / AUDIT)["findings"])

    @property
    def events(self) -> list[Event]:
        """The history that counts, oldest first."""
        return read_events(self.path / "events.jsonl")

    @property
    def result(self) -> dict[str, Any]:
        """What `json=true` prints of the finished run; raises StorageError before it has finished."""
        return dict(read_json(self.path / "result.json"))

    @property
    def metrics(self) -> dict[str, Any]:
        """`val` (at the best state) and `test` figures, as fractions."""
        return dict(self.result["metrics"])

    @property
    def bundle(self) -> Path:
        """The folder of the bundle."""
        return self.path / "bundle"

    def predict(self, images: Sequence[str | Path | bytes], *, threshold: float | None = None) -> list[dict[str, Any]]:
        """Predict images with the run's bundle; as goodfit.runtime.Predictor.predict.

        Args:
            threshold: Of a detector: the confidence from which an object is reported, in place of the one chosen on validation.

        Raises:
            RequestError: it trained a module of a user's, which has no bundle.
        """
        if self.plan.task.value == "module":
            raise RequestError("This run trained a module of your own, which has no bundle.", where=str(self.path),
                               next="call the module: goodfit.fit loaded the best weights into it")  # fmt: skip
        from goodfit.api.predict import open_predictor

        return open_predictor(self.bundle).predict(images, threshold=threshold)


def open_run(path: str | Path) -> Run:
    """A run by its folder or one of its bundle's.

    Raises:
        RequestError: the folder is not a run.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise RequestError("There is no such run.", where=str(path), next="give the folder of a run, as runs/NAME")
    if not (folder / PLAN).is_file() and (folder / REQUEST).is_file():
        raise RequestError("This run was stopped before its plan was made, so there is nothing to resume.",
                           where=str(path), next=f"goodfit train cfg={folder / REQUEST}")  # fmt: skip
    return Run(folder)


def check_name(request: TrainRequest) -> None:
    """Refuse an asked name that is taken, before any work is done.

    Raises:
        RequestError: the name is not a plain name, or a run has it.
    """
    name, project = request.name, Path(request.project or DEFAULT_PROJECT)
    if name is None:
        return
    if name in ("", ".", "..") or "/" in name or "\\" in name:
        raise RequestError(f"name={name}: a plain folder name is needed.", next="use project= for the parent folder")
    if (project / name).exists() and not request.exist_ok:
        raise RequestError(
            "A run of this name exists.",
            where=str(project / name),
            kept="that run",
            next=f"goodfit resume {project / name}, or another name=, or exist_ok=true to set it aside",
        )


def data_name(data: str | None) -> str:
    """What a dataset is called: its folder, or its file without the suffix."""
    path = Path(str(data)).resolve()
    return path.name if path.is_dir() else path.stem


def create_folder(request: TrainRequest, stem: str) -> Path:
    """Make the folder of a new run; two starts at one moment get two folders.

    An asked name that exists is an error, or with `exist_ok` the older run is set aside under another name.

    Raises:
        RequestError: the name is taken, or is not a plain name.
        StorageError: the folder cannot be made.
    """
    project = Path(request.project or DEFAULT_PROJECT)
    with storage_errors(project):
        project.mkdir(parents=True, exist_ok=True)
    if request.name is not None:
        check_name(request)
        return _named_folder(project, request.name)
    clean = re.sub(r"[^\w.-]+", "-", stem).strip("-.") or "run"
    for number in range(1, 100_000):
        path = project / f"{clean}-{number}"
        try:
            with storage_errors(path):
                path.mkdir()
            return path
        except StorageError as error:
            if not isinstance(error.__cause__, FileExistsError):
                raise
    raise RequestError(
        "There are too many runs of this name.", where=str(project), next="use another name= or project="
    )


def _named_folder(project: Path, name: str) -> Path:
    path = project / name
    if path.exists():
        if not path.is_dir() or (any(path.iterdir()) and not any((path / part).exists() for part in RUN_PARTS)):
            raise RequestError(f"name={name}: what is there is not a run.", where=str(path), kept="it as it is",
                               next="use another name= or project=")  # fmt: skip
        number = next(n for n in range(1, 100_000) if not (project / f"{name}.replaced-{n}").exists())
        with storage_errors(path), run_lock(path):  # not while a process writes to it
            path.rename(project / f"{name}.replaced-{number}")
    with storage_errors(path):
        path.mkdir()
    return path


def save_request(folder: Path, request: TrainRequest) -> None:
    """Write request.yaml: what was asked, and nothing else."""
    asked = {f.name: getattr(request, f.name) for f in fields(request) if getattr(request, f.name) is not None}
    write_text(folder / REQUEST, yaml.safe_dump(asked, sort_keys=False, allow_unicode=True))


def load_request(folder: Path) -> TrainRequest:
    """Read request.yaml back; raises RequestError if it was changed into something unusable."""
    from goodfit.config.yaml12 import read_yaml

    return parse_request(read_yaml(folder / REQUEST))
