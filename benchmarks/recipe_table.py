"""Every optimizer with every schedule in every precision on the handwritten digits: the loss falls, and is never NaN.

    python benchmarks/recipe_table.py [--epochs 8] [--seed 0]

A network of two small convolutions (larger ones would take hours in fp16, which is emulated on most processors) on
scikit-learn's 8-pixel digits, 1,437 to train and 360 to validate, batch 64; all else is what goodfit decides by itself for
the optimizer and the schedule, through its own training step on the CPU. A cell is the mean training loss of the last
epoch; "first" is the loss of the first step, before any update, so the same for a row.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from goodfit.config.facts import DataFacts, Facts, MachineFacts, ModelFacts
from goodfit.config.plan import Plan
from goodfit.config.request import OPTIMIZERS, SCHEDULES, TrainRequest
from goodfit.config.resolve import resolve
from goodfit.core.random import permutation, stream
from goodfit.engine.device import DevicePolicy
from goodfit.engine.optimizer import build_optimizer
from goodfit.engine.ranks import Ranks
from goodfit.engine.schedule import plan_schedule
from goodfit.engine.state import LossScale, Progress, TrainState, copy_buffers
from goodfit.engine.step import StepContext, train_step
from goodfit.models.groups import parameter_groups

PRECISIONS = ("fp32", "bf16", "fp16")
BATCH = 64
NUM_TRAIN = 1437
ORDER = stream("recipe table")


@dataclass
class Micro:
    """One batch."""

    samples: Any
    data: dict[str, torch.Tensor]


class Plain:
    """No augmentation, and the cross-entropy of a batch."""

    def train(self, batch: Any, **_: Any) -> Any:
        return batch

    def loss(self, model: nn.Module, batch: Any) -> Any:
        logits = model(batch["image"]).float()
        return {"loss": (nn.functional.cross_entropy(logits, batch["target"], reduction="sum"), len(logits))}


class Network(nn.Module):
    """Two convolutions, each with batch norm, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((1, 8), (8, 16)):
            layers += [nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.body, self.fc = nn.Sequential(*layers), nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of shape (N, 10) for images of shape (N, 1, 8, 8)."""
        return self.fc(self.body(x).flatten(1))


def decide(**asked: Any) -> Plan:
    """goodfit's plan for the digits."""
    data = DataFacts(format="folders", format_reason="", num_train=NUM_TRAIN, num_val=360, num_test=0, num_classes=10,
                     smallest_class=140, largest_class=147, median_side=8, grey_share=1.0, given_splits=(),
                     decode_seconds=0.0, pixel_bytes_at=1.0)  # fmt: skip
    machine = MachineFacts(device="cpu", device_reason="", device_name="", native_bf16=True, num_cores=1,
                           free_memory=8 * 10**9)  # fmt: skip
    model = ModelFacts(name="two convolutions", num_parameters=2_000, native_imgsz=32, stride=1, mean=(0, 0, 0),
                       std=(1, 1, 1), interpolation="bicubic", crop_share=1.0, weights="", weights_kind="none",
                       weights_problem="", licence="", has_drop_path=False)  # fmt: skip
    return resolve(TrainRequest(batch=BATCH, **asked), Facts(data=data, machine=machine, model=model))


def train(plan: Plan, train_set: dict[str, torch.Tensor], val_set: dict[str, torch.Tensor]) -> tuple[list[float], int]:
    """Train by a plan. Returns the loss of each step, and how many updates were left out."""
    steps_per_epoch = NUM_TRAIN // BATCH
    schedule = plan_schedule(plan.schedule.value, epochs=plan.epochs.value, steps_per_epoch=steps_per_epoch,
                             warmup=plan.warmup.value, lrf=plan.lrf.value, decay=plan.decay.value,
                             milestones=plan.milestones.value, period=plan.period.value, gamma=plan.gamma.value)  # fmt: skip
    torch.manual_seed(plan.seed.value)
    network = Network()
    optimizer = build_optimizer(network, parameter_groups(network, plan), kind=plan.optimizer.value,
                                momentum=plan.momentum.value)  # fmt: skip
    device = DevicePolicy(kind="cpu", precision=plan.precision.value, channels_last=False)
    state = TrainState(
        network, optimizer, None, LossScale(device.torch_device, active=device.scales_loss), Progress(schedule)
    )
    task = Plain()
    context = StepContext(task, task, device, Ranks(), plan.seed.value, plan.clip.value)
    losses, left_out, best, bad_epochs = [], 0, math.inf, 0
    for epoch in range(plan.epochs.value):
        order = permutation(NUM_TRAIN, ORDER, plan.seed.value, epoch)
        for number in range(steps_per_epoch):
            rows = order[number * BATCH : (number + 1) * BATCH]
            batch = {name: values[torch.from_numpy(np.ascontiguousarray(rows))] for name, values in train_set.items()}
            progress = state.progress
            record = train_step(state, context, [Micro(rows, batch)], progress.schedule.factor(progress.step),
                                copy_buffers(network))  # fmt: skip
            losses.append(float(record.loss))
            left_out += int(record.bad)
        network.eval()
        with torch.no_grad():
            val = float(nn.functional.cross_entropy(network(val_set["image"]), val_set["target"]))
        bad_epochs = 0 if val < best else bad_epochs + 1
        best = min(best, val)
        state.progress.schedule = state.progress.schedule.after_validation(bad_epochs)
    return losses, left_out


def main() -> None:
    """Print the table, and what is remarkable in it."""
    from sklearn.datasets import load_digits

    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    digits = load_digits()
    order = permutation(len(digits.target), ORDER, 0)
    images = torch.tensor(digits.images[order] / 8 - 1, dtype=torch.float32)[:, None]
    targets = torch.tensor(digits.target[order])
    sets = [{"image": images[part], "target": targets[part]} for part in (slice(NUM_TRAIN), slice(NUM_TRAIN, None))]
    start, remarks, ratios = time.monotonic(), [], []
    print(f"| optimizer | precision | first | {' | '.join(SCHEDULES)} |\n|{'---|' * (3 + len(SCHEDULES))}", flush=True)
    for optimizer in OPTIMIZERS:
        for precision in PRECISIONS:
            cells, first = [], 0.0
            for schedule in SCHEDULES:
                plan = decide(optimizer=optimizer, schedule=schedule, precision=precision, epochs=asked.epochs,
                              seed=asked.seed)  # fmt: skip
                losses, left_out = train(plan, *sets)
                first, last = losses[0], statistics.fmean(losses[-(NUM_TRAIN // BATCH) :])
                ratios.append(last / first)
                cells.append(f"{last:.3f}")
                if not all(map(math.isfinite, losses)) or not last < first or left_out:
                    finite = "finite" if all(map(math.isfinite, losses)) else "NOT FINITE"
                    remarks.append(f"- {optimizer}, {schedule}, {precision}: {first:.3f} → {last:.3f}, losses {finite}, "
                                   f"{left_out} updates left out")  # fmt: skip
            print(f"| {optimizer} | {precision} | {first:.3f} | {' | '.join(cells)} |", flush=True)
    print(f"\n{len(ratios)} runs of {asked.epochs} epochs in {time.monotonic() - start:.0f} s; last over first loss at most "
          f"{max(ratios):.3f}. Losses that are not finite or do not fall, updates left out:")  # fmt: skip
    print("\n".join(remarks) or "- none")


if __name__ == "__main__":
    main()
