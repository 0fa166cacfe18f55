"""The latency limit: candidates are timed in a process of their own until the best that fits is known."""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from goodfit.api.timings import keep, kept, machine_key
from goodfit.config.catalogue import Pictures
from goodfit.config.facts import ModelFacts
from goodfit.config.latency import (
    Candidate,
    Fitted,
    LatencyCost,
    allowance,
    best_fitting,
    candidates,
    explain,
    next_candidate,
    no_timing,
    refusal,
)
from goodfit.config.plan import Plan
from goodfit.config.request import TrainRequest
from goodfit.core.safeio import write_json
from goodfit.data.index import DatasetIndex
from goodfit.outcome.bundle import library_versions

NUM_FILES = 8  # pictures that are served in turn
MAX_SECONDS = 50.0  # after which only the cheapest candidate is still measured
CANDIDATE_SECONDS = 120.0  # after which one is given up
Timing = Callable[[Candidate], LatencyCost]


def fit_latency(
    request: TrainRequest,
    plan: Plan,
    base: Plan | None,
    model: ModelFacts,
    index: DatasetIndex,
    *,
    pictures: Pictures,
) -> Fitted | None:
    """Choose model and image size so that one image is served within the limit; None if no limit was asked for.

    Args:
        plan: As the rules made it, limit and threads in it.
        base: An earlier plan: its model and size stay, and are checked.
        model: The network of `plan`.
        pictures: What kind they are.

    Raises:
        RequestError: nothing fits, or a timing would choose where deterministic=true forbids it.
    """
    if request.latency is None:
        return None
    named = (request.pretrained or "true") not in ("true", "false")  # weights that belong to one model
    free_model = request.model is None and base is None and not named
    free_size = request.imgsz is None and base is None
    if plan.deterministic.value and (free_model or free_size):
        raise no_timing(" and ".join([*["model="] * free_model, *["imgsz="] * free_size]))
    limit, threads = plan.latency.value, plan.latency_threads.value
    most = allowance(limit, free=free_model or free_size)
    order = candidates(plan.imgsz.value, model=None if free_model else model.name,
                       fixed_size=not free_size, stride=model.stride, pictures=pictures)  # fmt: skip
    costs: list[LatencyCost] = []
    start = time.monotonic()
    files = [path.read_bytes() for path in typical_files(index, index.rows("train"))]
    with timing(plan.preprocessing.value, index.class_names, files, threads=threads,
                fresh=request.measure is True) as measure:  # fmt: skip
        hurry = False
        while (candidate := next_candidate(order, costs, most, hurry=hurry)) is not None:
            costs.append(measure(candidate))
            hurry = time.monotonic() - start > MAX_SECONDS
    chosen = best_fitting(order, costs, most)
    if chosen is None:
        raise refusal(costs, limit, threads, model=free_model, size=free_size)
    return Fitted(chosen=chosen, costs=tuple(costs), reason=explain(chosen, costs, limit), chose_model=free_model,
                  chose_size=free_size)  # fmt: skip


def typical_files(index: DatasetIndex, rows: npt.NDArray[np.int64], number: int = NUM_FILES) -> list[Path]:
    """The pictures whose number of pixels is nearest to the median: what serving will mostly see."""
    if index.sizes is None:
        return [index.file(int(row)) for row in rows[:number]]
    pixels = index.sizes[rows].astype(np.int64).prod(axis=1)
    nearest = np.argsort(np.abs(pixels - np.median(pixels)), kind="stable")[:number]
    return [index.file(int(row)) for row in rows[nearest]]


@contextmanager
def timing(
    preprocessing: Mapping[str, Any],
    labels: Sequence[str],
    files: Sequence[bytes],
    *,
    threads: int,
    fresh: bool = False,
) -> Iterator[Timing]:
    """What times one candidate: from the user cache, else in a process that is started at the first need.

    Args:
        preprocessing: Of a plan; its sizes are scaled to the candidate's.
        labels: Class names.
        files: Bytes of the pictures that are served.
        threads: Processor threads.
        fresh: Whether to measure again what is in the cache.
    """
    ask = {"threads": threads, "preprocessing": dict(preprocessing), "labels": list(labels),
           "zoom": preprocessing["resize"] / preprocessing["size"]}  # fmt: skip
    child: _Child | None = None
    with tempfile.TemporaryDirectory() as made:

        def measure(candidate: Candidate) -> LatencyCost:
            nonlocal child
            key = _key(candidate, ask, files)
            known = None if fresh else kept(key)
            if known is not None:
                return known
            if child is None or not child.alive:
                child = _Child(Path(made), ask, files)
            found = child.answer(candidate)
            if found is None:
                return LatencyCost(model=candidate.model, imgsz=candidate.imgsz, threads=threads,
                                   problem="the process that measured it died or took too long")  # fmt: skip
            if not found.problem:
                keep(key, found)
            return found

        try:
            yield measure
        finally:
            if child is not None:
                child.end()


def _key(candidate: Candidate, ask: dict[str, Any], files: Sequence[bytes]) -> str:
    """What a latency depends on: network, size, threads, pictures, machine and versions."""
    pictures = hashlib.blake2b(b"".join(hashlib.blake2b(data).digest() for data in files)).hexdigest()
    text = json.dumps([candidate.model, candidate.imgsz, ask["threads"], ask["zoom"], ask["preprocessing"]["interpolation"],
                       len(ask["labels"]), pictures, machine_key(), library_versions(), _version("simplejpeg")])  # fmt: skip
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


class _Child:
    """A process of goodfit.api.latency_child, to which candidates are sent one by one."""

    def __init__(self, folder: Path, ask: dict[str, Any], files: Sequence[bytes]) -> None:
        for number, data in enumerate(files):
            (folder / f"picture-{number}").write_bytes(data)
        write_json(folder / "ask.json", ask)
        self._process = subprocess.Popen([sys.executable, "-m", "goodfit.api.latency_child", str(folder)], text=True,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)  # fmt: skip

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def answer(self, candidate: Candidate) -> LatencyCost | None:
        """Its figures; None if the process died, or took so long that it was ended."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        watch = threading.Timer(CANDIDATE_SECONDS, process.kill)
        watch.start()
        try:
            process.stdin.write(json.dumps({"model": candidate.model, "imgsz": candidate.imgsz}) + "\n")
            process.stdin.flush()
            for line in process.stdout:  # a library may have words of its own
                with contextlib.suppress(ValueError, TypeError):
                    return LatencyCost(**json.loads(line))
        except OSError:
            pass
        finally:
            watch.cancel()
        process.kill()
        process.wait()
        return None

    def end(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
