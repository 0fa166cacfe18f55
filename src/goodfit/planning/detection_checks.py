"""A check of detectors that is a matter of arithmetic: what the loss pulls up is what evaluation finds."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from goodfit.engine.step import StepContext
from goodfit.models.detection.choose import choose_objects
from goodfit.models.detection.family import OneStage, shape_of
from goodfit.planning.checks import Check
from goodfit.planning.tensors import pick
from goodfit.tasks.detect import DetectTask

NAME = "loss and evaluation agree"
MEANING = (
    "the loss and the evaluation read boxes or classes differently: counted from 1 or with a background, x and y changed, or the "
    "place of a picture in the input mistaken"
)
MOST = 4  # images ...
LEAST_SIDE = (
    8  # pixels of the input: smaller objects may lie between the places of the finest level, which nothing answers for
)
CROWDED = 50  # ... with as many objects at most: of more, some lie upon each other, and a hundred are reported
STEPS = 80
RATE = 0.15  # of Adam: scores of a new network need a way of 8, the side of the largest object of a level too ...
THIN = 24  # ... and of one so many times as long as wide, which finer levels answer for, one of 16; longer ones are not asked
START = 0.1  # added to the outputs: a box without extent, as new networks have many, has no gradient
FOUND = 0.5  # AP50 that the followed loss must reach: places that no level answers for, and objects upon each other, are lost


def check_found(model: nn.Module, context: StepContext, few: Any, num: int) -> Check:
    """Outputs that follow the training loss alone, without a network, are found by evaluation.

    Adam moves the network's outputs for some images down the loss; what comes of them is judged as in validation, in the pictures'
    own pixels. Classes counted otherwise, boxes in other coordinates or of other corners, or a picture's place in the input mistaken,
    and next to nothing is found.

    Args:
        model: A copy.
        few: Samples with objects, on the device, as evaluation has them.
        num: How many they are.
    """
    task = context.task
    assert isinstance(task, DetectTask) and isinstance(task.family, OneStage)
    family, shape = task.family, shape_of(few["image"])
    there = few["classes"] >= 0
    counts = there.sum(dim=1).tolist()
    sides = few["boxes"][..., 2:] - few["boxes"][..., :2]
    short, long = sides.amin(dim=2), sides.amax(dim=2)
    odd = (there & ((short < LEAST_SIDE) | (long > THIN * short))).any(dim=1).tolist()
    rows = [k for k in sorted(range(num), key=counts.__getitem__) if 0 < counts[k] <= CROWDED and not odd[k]][:MOST]
    if not rows:
        return Check(
            NAME,
            True,
            f"no sample has 1 to {CROWDED} objects of {LEAST_SIDE} pixels and more, up to {THIN} to 1: not asked",
            MEANING,
        )
    few = pick(few, rows, num)
    with torch.no_grad():
        made = model.eval()(few["image"])
    outputs = {name: (values.float() + START).requires_grad_() for name, values in made.items()}
    optimizer = torch.optim.Adam(outputs.values(), lr=RATE)
    losses = []
    with torch.enable_grad():
        for _ in range(STEPS):
            terms = family.terms(model, outputs, few["boxes"], few["classes"], shape)
            loss = torch.stack([total / torch.as_tensor(count).clamp(min=1) for total, count in terms.values()]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    with torch.no_grad():
        boxes, scores = family.decode(model, outputs, shape)
        found = [choose_objects(b, s, task.selection) for b, s in zip(boxes, scores, strict=True)]
        meter = task.meter()
        meter.update(task.told(found, {}), few)
    figure = float(meter.compute()["ap50"])
    return Check(
        NAME,
        figure >= FOUND,
        f"outputs that follow the loss ({float(losses[0]):.2f} → {float(losses[-1]):.2f}) find the objects with AP50 {figure:.2f}",
        MEANING,
    )
