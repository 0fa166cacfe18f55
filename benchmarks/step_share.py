"""What share of the model's own speed training reaches: bare and full steps in turn.

    python benchmarks/step_share.py FOLDER [--pairs 120] [--model resnet18] [--imgsz 128] [--batch 32]

The bare step is the least that trains: on one batch that lies normalised in memory, forward pass in bf16 with
channels-last, cross-entropy, backward pass, fused AdamW. The full step is what goodfit runs, with the plan's own
defaults: waiting for the next batch (cut from the cache, mirrored), colour, normalisation, the step with clipping, guard
and weight average. Steps alternate, so that both see the same neighbours; the share is bare over full time.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from goodfit.api.assemble import assemble, execution
from goodfit.api.decide import decide
from goodfit.api.prepare import read_and_audit
from goodfit.api.train import cache_stage
from goodfit.config.parse import read_request
from goodfit.core.journal import Journal
from goodfit.engine.optimizer import build_optimizer
from goodfit.engine.state import copy_buffers
from goodfit.engine.step import train_step
from goodfit.models.builder import build_network
from goodfit.models.groups import parameter_groups


def main() -> None:
    """Print the share with its 95 % interval."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pairs", type=int, default=120)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--imgsz", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32)
    asked = parser.parse_args()
    request = read_request({"data": asked.folder, "model": asked.model, "pretrained": "false", "imgsz": asked.imgsz,
                            "batch": asked.batch, "max_bad": 0.05})  # fmt: skip
    journal = Journal(None, ())
    audited = read_and_audit(request, journal)
    plan = decide(request, audited, journal)
    with execution(plan):
        parts = assemble(plan, audited.index)
        cache_stage(parts, journal)
        model = parts.context.device.place(build_network(plan, audited.index.class_names)[0])
        optimizer = build_optimizer(model, parameter_groups(model, plan), kind="adamw", momentum=0.9)
        micro = parts.train.group(0, 0, 1)[0]
        batch = parts.context.transform.evaluate(parts.context.device.move(micro.data))
        model.train()

        def bare() -> None:
            optimizer.zero_grad(set_to_none=True)
            with parts.context.device.autocast():
                loss = torch.nn.functional.cross_entropy(model(batch["image"]).float(), batch["target"])
            loss.backward()
            optimizer.step()
            float(loss.detach())

        groups = parts.train.groups(0, 0, 1)
        epoch = wait = 0.0

        def full() -> None:
            nonlocal groups, epoch, wait
            start = time.perf_counter()
            group = next(groups, None)
            if group is None:
                epoch += 1
                groups = parts.train.groups(int(epoch), 0, 1)
                group = next(groups)
            wait += time.perf_counter() - start
            float(train_step(parts.state, parts.context, group, 0.1, copy_buffers(parts.state.model)).loss)

        for _ in range(5):
            bare()
            full()
        times: dict[str, list[float]] = {"bare": [], "full": []}
        wait = 0.0
        for number in range(asked.pairs):
            for name in ("bare", "full") if number % 2 else ("full", "bare"):
                start = time.perf_counter()
                (bare if name == "bare" else full)()
                times[name].append(time.perf_counter() - start)
    ratios = np.array(times["bare"]) / np.array(times["full"])
    middle, error = float(np.median(ratios)), 1.96 * float(ratios.std(ddof=1)) / math.sqrt(len(ratios))
    total = sum(times["bare"]) / sum(times["full"])
    print(f"{asked.model}, {asked.imgsz} px, batch {asked.batch}, augment={plan.augment.value}, {asked.pairs} pairs")
    for name, values in times.items():
        print(f"  {name}: {asked.batch / statistics.median(values):.1f} img/s (median step {1e3 * statistics.median(values):.1f} ms, "
              f"least {1e3 * min(values):.1f})")  # fmt: skip
    print(f"  share of the bare step: mean {100 * ratios.mean():.1f} ± {100 * error:.1f} %, median {100 * middle:.1f} %, "
          f"of total time {100 * total:.1f} %; waiting for data {1e3 * wait / asked.pairs:.1f} ms a step")  # fmt: skip


if __name__ == "__main__":
    main()
