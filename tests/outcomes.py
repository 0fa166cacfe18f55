"""Runs without what comes after training, for tests of training alone."""

from __future__ import annotations

from typing import Any

import pytest

from goodfit.api.finish import load_best
from goodfit.core.safeio import write_json
from goodfit.engine.checkpoint import tensors_sha256


def hashes(run: Any, parts: Any, checkpoints: Any, *_: Any) -> dict[str, str]:
    """The hashes that result.json has, of the last state and of the best weights."""
    load_best(parts, checkpoints)
    return {"state_sha256": tensors_sha256(checkpoints.latest().files),
            "weights_sha256": tensors_sha256({"": dict(parts.state.model.state_dict())})}  # fmt: skip


def only_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `goodfit.train` and `goodfit.resume` return `hashes` in place of test, bundle and report."""
    monkeypatch.setattr("goodfit.api.train.finish_run", hashes)


def only_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let them count as finished after training."""

    def finish(run: Any, *_: Any) -> Any:
        write_json(run.path / "result.json", {"status": "done"})
        return run

    monkeypatch.setattr("goodfit.api.train.finish_run", finish)
