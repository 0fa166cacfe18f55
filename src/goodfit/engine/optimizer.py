"""Build an optimizer, set its rates, mask an update, and turn the state into named tensors and back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from goodfit.engine.muon import Muon, matrix_names
from goodfit.models.groups import ParameterGroup

FUSED = ("adamw", "adam", "sgd")  # of which torch has kernels that do a whole step at once, and can mask it
BETA2 = 0.999


def build_optimizer(
    network: nn.Module, groups: list[ParameterGroup], *, kind: str, momentum: float
) -> torch.optim.Optimizer:
    """torch's own optimizer of this kind, or Muon; fused where torch has that, by lists of tensors elsewhere.

    Weight decay is decoupled from the gradient (Loshchilov and Hutter 2019) for adamw and muon; also for nadam and radam,
    where torch leaves the choice: added to the gradient it would be divided by the gradient's own size, and decay least
    what moves most, and one value should mean the same for all of this family. For sgd the two are nearly the same;
    adam and rmsprop are as published, with the decay in the gradient.

    The whole state is there from the start, all zero: a first step that is masked leaves it as it is, and torch's fused
    SGD would otherwise start from uninitialised memory.

    Args:
        groups: Each with its own peak learning rate and weight decay.
        kind: "sgd" (with Nesterov momentum), "adam" (Kingma and Ba 2015), "adamw" (Loshchilov and Hutter 2019), "nadam"
            (Dozat 2016), "radam" (Liu et al. 2020), "rmsprop" (Hinton 2012) or "muon" (Jordan 2024; see `Muon`).
        momentum: That of sgd, rmsprop and muon, or beta 1.
    """
    rows = _rows(network, groups, matrices=matrix_names(network) if kind == "muon" else set())
    first = next(network.parameters())
    # The fused kernels' divisor is float32, so they cannot serve other weights.
    fused = kind in FUSED and first.device.type in ("cpu", "cuda") and first.dtype == torch.float32
    way: dict[str, Any] = {"fused": True} if fused else {"foreach": True}
    if not fused and kind != "sgd":
        way["capturable"] = first.is_cuda  # counts of steps on the device, where a masked step can put them back
    betas = (momentum, BETA2)
    optimizer: torch.optim.Optimizer
    if kind == "sgd":
        optimizer = torch.optim.SGD(rows, lr=0.0, momentum=momentum, nesterov=momentum > 0, **way)
    elif kind == "rmsprop":
        optimizer = torch.optim.RMSprop(rows, lr=0.0, momentum=momentum, **way)
    elif kind == "muon":
        optimizer = Muon(rows, momentum=momentum, capturable=way["capturable"])
    elif kind in ("nadam", "radam"):
        made = torch.optim.NAdam if kind == "nadam" else torch.optim.RAdam
        optimizer = made(rows, lr=0.0, betas=betas, decoupled_weight_decay=True, **way)
    else:
        made = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[kind]
        optimizer = made(rows, lr=0.0, betas=betas, **way)
    for group in optimizer.param_groups:
        group["planned"] = {key: group[key] for key in ("momentum", "betas") if key in group}
        for parameter in group["params"]:
            optimizer.state[parameter] = _first_state(kind, group, parameter)
    return optimizer


def _rows(network: nn.Module, groups: list[ParameterGroup], *, matrices: set[str]) -> list[dict[str, Any]]:
    """torch's parameter groups; a group with matrices and other parameters becomes two. The head is none for Muon."""
    table = dict(network.named_parameters())
    rows: list[dict[str, Any]] = []
    for group in groups:
        chosen = set() if group.head else matrices
        for matrix in (True, False):
            names = [name for name in group.names if (name in chosen) == matrix]
            if names:
                rows.append({
                    "params": [table[name] for name in names], "lr": group.lr, "weight_decay": group.weight_decay,
                    "matrix": matrix, "peak_lr": group.lr, "name": group.name, "parameter_names": names,
                })  # fmt: skip
    return rows


def _first_state(kind: str, group: dict[str, Any], parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """What torch makes at the first step, by its names, laid out in memory as the parameter."""
    if kind == "muon":
        kind = "sgd" if group["matrix"] else "adamw"
    names = {"sgd": (), "rmsprop": ("square_avg",)}.get(kind, ("exp_avg", "exp_avg_sq"))
    if kind in ("sgd", "rmsprop") and group["momentum"] > 0:
        names = (*names, "momentum_buffer")
    state = {name: torch.zeros_like(parameter) for name in names}
    place = parameter.device if group.get("fused") or group.get("capturable") else "cpu"
    if kind != "sgd":
        state["step"] = torch.zeros((), dtype=torch.float32, device=place)
    if kind == "nadam":
        state["mu_product"] = torch.ones((), dtype=torch.float32, device=place)
    return state


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float, momentum: float | None = None) -> float:
    """Set every group to its peak times the factor; returns the first group's learning rate.

    Args:
        momentum: For this step, in place of the planned one, of SGD and Muon and as beta 1; None keeps the plan's.
            An optimizer that was built without momentum stays without.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
        group.update(group["planned"])
        if momentum is not None and group.get("momentum", 0.0) > 0:
            group["momentum"] = momentum
        if momentum is not None and "betas" in group:
            group["betas"] = (momentum, group["betas"][1])
    return float(optimizer.param_groups[0]["lr"])


def mask_update(
    optimizer: torch.optim.Optimizer, divisor: torch.Tensor, bad: torch.Tensor, *, reads_are_free: bool
) -> list[torch.Tensor]:
    """Make the next `optimizer.step()` divide the gradients by `divisor`, or change nothing at all where `bad` is true.

    torch's fused kernels take both as tensors on the device, so no value is read on the host and gradients are not
    passed over once more. Elsewhere `bad` is read where that waits for nothing, and a step without gradients changes
    nothing; on a GPU copies are kept, which `undo_update` puts back (memory of weights and moments once more, while the
    step lasts).

    Args:
        divisor: float32 scalar: loss scale, count and clipping in one number.
        bad: bool scalar.
        reads_are_free: Whether `bad` may be read on the host.

    Returns:
        The copies, for `undo_update`; mostly none.
    """
    if optimizer.defaults.get("fused"):
        optimizer.grad_scale = divisor.to(torch.float32)
        optimizer.found_inf = bad.to(torch.float32)
        return []
    if reads_are_free and bool(bad):
        optimizer.zero_grad(set_to_none=True)
        return []
    torch._foreach_div_([p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None], divisor)
    return [] if reads_are_free else [tensor.detach().clone() for tensor in _changing(optimizer)]


def undo_update(optimizer: torch.optim.Optimizer, copies: list[torch.Tensor], bad: torch.Tensor) -> None:
    """Put the copies of `mask_update` back where `bad` is true."""
    if not copies:
        return
    with torch.no_grad():
        for tensor, copied in zip(_changing(optimizer), copies, strict=True):
            tensor.copy_(torch.where(bad.to(tensor.device), copied, tensor))


def _changing(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """Every tensor that a step may change."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield parameter
            yield from optimizer.state[parameter].values()


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The state by "parameter name/entry", for a safetensors file."""
    return {
        f"{name}/{entry}": value
        for group in optimizer.param_groups
        for name, parameter in zip(group["parameter_names"], group["params"], strict=True)
        for entry, value in optimizer.state[parameter].items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """The inverse of optimizer_tensors; rates stay those of the optimizer, which the schedule sets anyway.

    In place: the fused CPU kernels walk weights and moments side by side in memory, whatever their strides say, and a
    channels-last weight with a contiguous moment would be updated with other weights' moments.
    """
    for key, value in optimizer_tensors(optimizer).items():
        value.copy_(tensors[key])
