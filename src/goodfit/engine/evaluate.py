"""Run a model over a split: exact under any number of processes, each sample counted once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from goodfit.core.errors import OutOfMemory
from goodfit.engine.contracts import BatchTransform, EvaluationData, Meter, Task
from goodfit.engine.device import DevicePolicy, eagerly, is_out_of_memory
from goodfit.engine.ranks import Ranks


def evaluate(
    model: nn.Module, data: EvaluationData, *, task: Task, transform: BatchTransform, device: DevicePolicy,
    ranks: Ranks, stop: Callable[[], bool] = lambda: False,
) -> Meter | None:  # fmt: skip
    """Accumulate a task's meter over a split, in evaluation mode and the device's precision.

    Where memory runs out, the split is gone through once more with half as many samples at once.

    Returns:
        The meter, merged over all processes; None if a stop was asked for half-way.

    Raises:
        OutOfMemory: one sample at a time does not fit.
    """
    meter = None
    while meter is None:
        try:
            meter = _pass(model, data, task, transform, device, stop)
            if meter is None:
                return None
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            problem = str(error).partition("\n")[0][:200]
        if meter is None:  # what the failed pass held is free by now
            device.hand_back()
            if not data.halve():
                raise OutOfMemory(f"Memory ran out with one sample at a time: {problem}", kept="the last checkpoint",
                                  next="use a smaller imgsz= or model=, or precision=bf16")  # fmt: skip
    if ranks.size > 1:
        meter.merge(ranks.gather(meter.state()))
    return meter


def _pass(
    model: nn.Module, data: EvaluationData, task: Task, transform: BatchTransform, device: DevicePolicy, stop: Callable[[], bool]
) -> Meter | None:  # fmt: skip
    """The meter over a split in this process; None if a stop was asked for."""
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
    return meter
