"""Any module, with a loss that was handed over."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from goodfit.core.errors import RequestError
from goodfit.data.nested import collate_samples
from goodfit.data.samples import Collate, as_batch
from goodfit.metrics.means import NAMED, MeanMeter, Pair, accuracy, mean_of
from goodfit.tasks.pair_loss import PairLoss

Terms = dict[str, tuple[torch.Tensor, torch.Tensor | int]]


class ModuleTask:
    """What a module of a user's learns, by one of two conventions.

    With `loss`, a sample is a pair (inputs, target): inputs that are a dict go in as keyword arguments, a tuple or list as
    positional ones, anything else as the only one; then `loss(output, target)`, and each metric on the same two.

    With `step_loss`, a sample is anything: `step_loss(module, batch)` calls the module itself, and returns a mean over the
    samples, or {name: (sum, count)} for exact terms, each counted by its own; metrics take (module, batch) too.

    Args:
        loss: A loss of torch.nn or torch.nn.functional, or a function (output, target) that returns a mean over samples.
        step_loss: In place of `loss`.
        metrics: By name: a function that returns a value per sample (or element), or a mean over samples; with `loss` also
            names alone, of "accuracy", "mae" and "mse".
        collate: Makes a batch of a list of samples; None stacks them.

    Raises:
        RequestError: these do not fit together.
    """

    def __init__(
        self, *, loss: Callable[..., Any] | None = None, step_loss: Callable[..., Any] | None = None,
        metrics: Mapping[str, Any] | Sequence[str] = (), collate: Collate | None = None,
    ) -> None:  # fmt: skip
        if (loss is None) == (step_loss is None):
            raise RequestError("One loss is needed: loss= or step_loss=." if loss is None else "loss= and step_loss= are two ways: pass one.",
                               next="loss=nn.CrossEntropyLoss(), say, or step_loss=function(module, batch)")  # fmt: skip
        if step_loss is not None and not callable(step_loss):
            raise RequestError(f"step_loss= is of type {type(step_loss).__name__}, not a function of (module, batch).")
        self.pair = PairLoss(loss) if loss is not None else None
        self._step_loss = step_loss
        self.metrics = self._metrics(metrics)
        self._collate = collate or collate_samples

    def _metrics(self, asked: Mapping[str, Any] | Sequence[str]) -> dict[str, Callable[..., Any]]:
        named = (
            asked
            if isinstance(asked, Mapping)
            else {str(name): name for name in ([asked] if isinstance(asked, str) else asked)}
        )
        found: dict[str, Callable[..., Any]] = {}
        for name, metric in named.items():
            if isinstance(metric, str) and metric in NAMED and self.pair is not None:
                found[name] = self._accuracy if metric == "accuracy" else NAMED[metric]
            elif callable(metric) and isinstance(asked, Mapping) and name != "loss" and "/" not in name:
                found[name] = metric
            else:
                hint = (
                    "metrics={'name': function(module, batch)}"
                    if self.pair is None
                    else f"use {', '.join(NAMED)}, or {{'name': function(output, target)}}"
                )
                raise RequestError(f"metrics: {metric if isinstance(metric, str) else name} cannot be used.", next=hint)
        return found

    def _accuracy(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        assert self.pair is not None
        return accuracy(output, target, self.pair.ignored)

    @property
    def loss_name(self) -> str:
        """What the loss is called, to be compared when a run is resumed."""
        if self.pair is not None:
            return self.pair.name
        return getattr(self._step_loss, "__qualname__", type(self._step_loss).__name__)

    def collate(self, samples: list[Any], rows: npt.NDArray[np.int64]) -> dict[str, Any]:
        """One batch of some samples and their numbers: nested `data`, and `rows`, int64 of shape (N,)."""
        return as_batch(self._collate(samples), rows)

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> Terms:
        """Every term of the loss as a sum and its count; one call of the model where that is ours to say."""
        num = len(batch["rows"])
        if self.pair is None:
            return self._terms(model, batch)
        inputs, target = as_pair(batch["data"])
        return {"loss": self.pair(call(model, inputs), target, num)}

    def _terms(self, model: nn.Module, batch: dict[str, Any]) -> Terms:
        assert self._step_loss is not None
        made = self._step_loss(model, batch["data"])
        if isinstance(made, torch.Tensor) and made.ndim == 0:
            num = len(batch["rows"])
            return {"loss": (made * num, num)}
        if isinstance(made, Mapping) and made and all(_is_term(term) for term in made.values()):
            return {str(name): (total, count) for name, (total, count) in made.items()}
        what = (
            f"a tensor of shape {tuple(made.shape)}" if isinstance(made, torch.Tensor) else f"a {type(made).__name__}"
        )
        raise RequestError(f"step_loss returned {what}.", next="return a scalar tensor, the mean over the samples, or {name: (sum, count)}")  # fmt: skip

    def predict(self, model: nn.Module, batch: dict[str, Any]) -> Any:
        """The model's outputs, half precision as float32; with `step_loss` its terms and metrics, as pairs."""
        if self.pair is not None:
            return call(model, as_pair(batch["data"])[0])
        num = len(batch["rows"])
        metrics = {name: mean_of(name, metric(model, batch["data"]), num) for name, metric in self.metrics.items()}
        return {f"term/{name}": pair for name, pair in self._terms(model, batch).items()} | metrics

    def meter(self) -> MeanMeter:
        """An empty meter of the loss, its terms and the metrics."""
        return MeanMeter(self._measure)

    def _measure(self, outputs: Any, batch: dict[str, Any]) -> dict[str, Pair]:
        if self.pair is None:
            return dict(outputs)
        num = len(batch["rows"])
        _, target = as_pair(batch["data"])
        found = {"term/loss": self.pair(outputs, target, num)}
        return found | {name: mean_of(name, metric(outputs, target), num) for name, metric in self.metrics.items()}

    def describe(self) -> dict[str, Any]:
        """What is learned, and whether the loss adds up exactly over micro-batches as far as that is known."""
        return {
            "task": "module",
            "loss": self.loss_name,
            "exact": self.pair is not None and self.pair.exact,
            "output": "logits" if self.pair is not None and self.pair.takes_logits else "any",
        }


def _is_term(term: Any) -> bool:
    return (isinstance(term, tuple) and len(term) == 2 and isinstance(term[0], torch.Tensor) and term[0].ndim == 0
            and (isinstance(term[1], int) or (isinstance(term[1], torch.Tensor) and term[1].ndim == 0)))  # fmt: skip


def as_pair(data: Any) -> tuple[Any, Any]:
    """Inputs and target of a batch; raises RequestError if it is not a pair."""
    if isinstance(data, tuple | list) and len(data) == 2:
        return data[0], data[1]
    what = f"has {len(data)} parts" if isinstance(data, tuple | list) else f"is a {type(data).__name__}"
    raise RequestError(f"With loss=, a sample is a pair (inputs, target); this one {what}.",
                       next="nest several inputs, as ((image, tokens), target) or ({'image': ...}, target), or pass "
                            "step_loss=function(module, batch)")  # fmt: skip


def call(model: nn.Module, inputs: Any) -> Any:
    """A model on nested inputs: a dict as keyword arguments, a tuple or list as positional ones; outputs of half precision
    as float32."""
    if isinstance(inputs, dict):
        made = model(**inputs)
    elif isinstance(inputs, tuple | list):
        made = model(*inputs)
    else:
        made = model(inputs)
    return _precise(made)


def _precise(outputs: Any) -> Any:
    if isinstance(outputs, torch.Tensor):
        return outputs.float() if outputs.dtype in (torch.float16, torch.bfloat16) else outputs
    if type(outputs) is dict:
        return {key: _precise(value) for key, value in outputs.items()}
    if type(outputs) in (list, tuple):
        return type(outputs)(_precise(value) for value in outputs)
    return outputs
