"""What share of the model's own speed training reaches: bare and full steps in turn.

    python benchmarks/step_share.py FOLDER [KEY=VALUE...] [--pairs 120]

KEY=VALUE are options of `goodfit train`; for pictures of one class model=resnet18 pretrained=false imgsz=128 batch=32 unless they
say otherwise. The bare step is the least that trains: on one batch that lies normalised in memory, forward pass in the plan's
precision and layout, the task's loss, backward pass, the plan's optimizer. The full step is what goodfit runs, with the plan's own
defaults: waiting for the next batch (cut from the cache, mirrored), colour, normalisation, the step with clipping, guard
and weight average. Steps alternate, so that both see the same neighbours; the share is bare over full time. Loader processes, if
the plan has some, work beside both.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time

import numpy as np
import torch

from goodfit.api.assemble import execution
from goodfit.api.decide import decide
from goodfit.api.kinds import kind_of
from goodfit.api.prepare import read_and_audit
from goodfit.api.train import cache_stage
from goodfit.config.parse import parse_request
from goodfit.core.journal import Journal
from goodfit.engine.state import copy_buffers
from goodfit.engine.step import train_step

CLASSIFY = {"model": "resnet18", "pretrained": "false", "imgsz": 128, "batch": 32}


def main() -> None:
    """Print the share with its 95 % interval."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--pairs", type=int, default=120)
    asked = parser.parse_args()
    words = dict(word.split("=", 1) for word in asked.words)
    journal = Journal(None, ())
    request = parse_request({"data": asked.folder, "max_bad": 0.05, **words})
    audited = read_and_audit(request, journal)
    if audited.index.task == "classify":
        request = parse_request({"data": asked.folder, "max_bad": 0.05, **CLASSIFY, **words})
    plan = decide(request, audited, journal)
    with execution(plan):
        parts = kind_of(plan).assemble(plan, audited.index)
        cache_stage(parts, journal)
        model = copy.deepcopy(parts.state.model)
        optimizer = parts.optimizer_for(model)
        micro = parts.train.group(0, 0, 1)[0]
        batch = parts.context.transform.evaluate(parts.context.device.move(micro.data))
        model.train()

        stage = -1

        def bare() -> None:
            nonlocal stage
            if parts.state.stage != stage:  # the same parameters are frozen in both
                stage = parts.state.stage
                parts.context.freezing.apply(model, stage)
            optimizer.zero_grad(set_to_none=True)
            with parts.context.device.autocast():
                terms = parts.context.task.loss(model, batch)
            loss = torch.stack([total / count for total, count in terms.values()]).sum()
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
    batch_size = plan.batch.value
    print(
        f"{plan.model.value}, {plan.imgsz.value} px, batch {batch_size}, augment={plan.augment.value}, {asked.pairs} pairs"
    )
    for name, values in times.items():
        print(f"  {name}: {batch_size / statistics.median(values):.1f} img/s (median step {1e3 * statistics.median(values):.1f} ms, "
              f"least {1e3 * min(values):.1f})")  # fmt: skip
    print(f"  share of the bare step: mean {100 * ratios.mean():.1f} ± {100 * error:.1f} %, median {100 * middle:.1f} %, "
          f"of total time {100 * total:.1f} %; waiting for data {1e3 * wait / asked.pairs:.1f} ms a step")  # fmt: skip


if __name__ == "__main__":
    main()
