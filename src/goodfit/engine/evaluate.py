"""Run a model over a split: exact under any number of processes, each sample counted once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from goodfit.engine.contracts import BatchTransform, EvaluationData, Meter, Task
from goodfit.engine.device import DevicePolicy, eagerly
from goodfit.engine.ranks import Ranks


def evaluate(
    model: nn.Module, data: EvaluationData, *, task: Task, transform: BatchTransform, device: DevicePolicy,
    ranks: Ranks, stop: Callable[[], bool] = lambda: False,
) -> Meter | None:  # fmt: skip
    """Accumulate a task's meter over a split, in evaluation mode and the device's precision.

    Returns:
        The meter, merged over all processes; None if a stop was asked for half-way.
    """
    meter = task.meter()
    modes = [
        (module, module.training) for module in model.modules()
    ]  # each has its own: frozen batch norms do not train
    model.eval()
    try:
        with eagerly(model), torch.inference_mode():
            for micro in data:
                if stop():
                    return None
                batch = transform.evaluate(device.move(micro.data))
                with device.autocast():
                    outputs = task.predict(model, batch)
                meter.update(outputs, batch)
    finally:
        for module, was in modes:
            module.training = was
    if ranks.size > 1:
        meter.merge(ranks.gather(meter.state()))
    return meter
