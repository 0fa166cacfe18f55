"""goodfit carries a labelled dataset to a tested, deployable model, doing what an expert would do, by measurement.

Example:
    >>> import goodfit
    >>> run = goodfit.train("bottles/", epochs=30)  # doctest: +SKIP
    >>> run.metrics["test"]["accuracy"]  # doctest: +SKIP
    0.924

Importing goodfit imports neither torch nor numpy: names are looked up when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from goodfit.api.demo import demo
    from goodfit.api.extend import extend
    from goodfit.api.fit import fit
    from goodfit.api.folder import Run
    from goodfit.api.models import list_models
    from goodfit.api.predict import predict
    from goodfit.api.train import audit, plan, resume, test, train
    from goodfit.core.errors import (
        DataError,
        ExportError,
        GoodfitError,
        OutOfMemory,
        RequestError,
        Stopped,
        StorageError,
        TrainingError,
        WeightsError,
    )

_HOMES = {
    "DataError": "core.errors",
    "ExportError": "core.errors",
    "GoodfitError": "core.errors",
    "OutOfMemory": "core.errors",
    "RequestError": "core.errors",
    "Run": "api.folder",
    "Stopped": "core.errors",
    "StorageError": "core.errors",
    "TrainingError": "core.errors",
    "WeightsError": "core.errors",
    "audit": "api.train",
    "demo": "api.demo",
    "extend": "api.extend",
    "fit": "api.fit",
    "list_models": "api.models",
    "plan": "api.train",
    "predict": "api.predict",
    "resume": "api.train",
    "test": "api.train",
    "train": "api.train",
}

__all__ = [
    "DataError",
    "ExportError",
    "GoodfitError",
    "OutOfMemory",
    "RequestError",
    "Run",
    "Stopped",
    "StorageError",
    "TrainingError",
    "WeightsError",
    "audit",
    "demo",
    "extend",
    "fit",
    "list_models",
    "plan",
    "predict",
    "resume",
    "test",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'goodfit' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"goodfit.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
