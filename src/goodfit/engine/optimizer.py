"""Build an optimizer, set its learning rate, and turn its state into named tensors and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from goodfit.models.groups import ParameterGroup


def build_optimizer(
    network: nn.Module, groups: list[ParameterGroup], *, kind: str, momentum: float
) -> torch.optim.Optimizer:
    """AdamW, Adam or SGD with Nesterov momentum from torch, fused: the fused kernels can mask an update on the device.

    Args:
        groups: Each with its own peak learning rate and weight decay.
        kind: "adamw" (Loshchilov and Hutter 2019), "adam" (Kingma and Ba 2015) or "sgd".
        momentum: SGD's momentum or Adam's beta 1.
    """
    table = dict(network.named_parameters())
    rows: list[dict[str, Any]] = [
        {
            "params": [table[name] for name in group.names],
            "lr": group.lr,
            "weight_decay": group.weight_decay,
            "peak_lr": group.lr,
            "parameter_names": list(group.names),
        }
        for group in groups
    ]
    first = next(network.parameters())
    fused = first.device.type in ("cpu", "cuda") and first.dtype == torch.float32  # its divisor is float32 too
    if kind == "sgd":
        sgd = torch.optim.SGD(rows, lr=0.0, momentum=momentum, nesterov=momentum > 0, fused=fused)
        for parameter in network.parameters() if momentum > 0 else ():
            # The fused kernel starts from uninitialised memory; a first step that is masked would leave it there.
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    made = torch.optim.AdamW if kind == "adamw" else torch.optim.Adam
    return made(rows, lr=0.0, betas=(momentum, 0.999), fused=fused)


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Set every group to its peak times the factor; returns the first group's learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return float(optimizer.param_groups[0]["lr"])


def mask_update(optimizer: torch.optim.Optimizer, divisor: torch.Tensor, bad: torch.Tensor) -> None:
    """Make the next `optimizer.step()` divide the gradients by `divisor`, or change nothing at all where `bad` is true.

    torch's fused kernels take both as tensors on the device, so no value is read on the host and gradients are not
    passed over once more. Elsewhere `bad` is read here, and a step without gradients changes nothing.

    Args:
        divisor: float32 scalar: loss scale, count and clipping in one number.
        bad: bool scalar.
    """
    if optimizer.defaults.get("fused"):
        optimizer.grad_scale = divisor.to(torch.float32)
        optimizer.found_inf = bad.to(torch.float32)
    elif bool(bad):
        optimizer.zero_grad(set_to_none=True)
    else:
        torch._foreach_div_(
            [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None], divisor
        )


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The state by "parameter name/entry", for a safetensors file."""
    tensors = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["parameter_names"], group["params"], strict=True):
            for entry, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor):
                    tensors[f"{name}/{entry}"] = value
    return tensors


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """The inverse of optimizer_tensors; learning rates stay those of the optimizer, which the schedule sets anyway."""
    by_name: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        name, _, entry = key.rpartition("/")
        by_name.setdefault(name, {})[entry] = value
    state = optimizer.state_dict()
    names = [name for group in optimizer.param_groups for name in group["parameter_names"]]
    state["state"] = {i: by_name[name] for i, name in enumerate(names) if name in by_name}
    optimizer.load_state_dict(state)
    for parameter, entries in optimizer.state.items():
        for entry, value in entries.items():
            # The fused CPU kernels walk weights and moments side by side in memory, whatever their strides say: a
            # channels-last weight with a contiguous moment would be updated with other weights' moments.
            if isinstance(
                value, torch.Tensor
            ):  # copied: torch keeps some, and counts on in the snapshot's own step numbers
                like = parameter if value.shape == parameter.shape else value
                entries[entry] = torch.empty_like(like).copy_(value)
