"""Small batches with boxes."""

from __future__ import annotations

import torch

from goodfit.runtime.masks import cut_mask

SHAPE = (128, 192)


def targets(seed, num=4, most=6, classes=3):
    """Padded boxes and classes; the first image has none."""
    draw = torch.Generator().manual_seed(seed)
    low = torch.rand(num, most, 2, generator=draw) * torch.tensor([SHAPE[1] - 30, SHAPE[0] - 30])
    size = 6 + torch.rand(num, most, 2, generator=draw) ** 2 * 120
    boxes = torch.cat([low, torch.minimum(low + size, torch.tensor([SHAPE[1], SHAPE[0]]).float())], dim=2)
    labels = torch.randint(0, classes, (num, most), generator=draw)
    for n in range(num):
        labels[n, n * 2 :] = -1
    return boxes, labels


def scene_batch(num=2, masks=False):
    """White squares on black: one object of one class in each picture."""
    images, boxes = torch.zeros(num, 3, 96, 96), torch.zeros(num, 1, 4)
    drawn = torch.zeros(num, 1, 96, 96, dtype=torch.uint8)
    for n in range(num):
        left, top, side = 12 + 9 * n, 16 + 5 * n, 30 + 6 * n
        boxes[n, 0] = torch.tensor([left, top, left + side, top + side])
        images[n, :, top : top + side, left : left + side] = 1.0
        drawn[n, 0, top : top + side, left : left + side] = 1
    batch = {"image": images, "boxes": boxes, "classes": torch.zeros(num, 1, dtype=torch.int64),
             "true_boxes": boxes.double(), "true_classes": torch.zeros(num, 1, dtype=torch.int64),
             "crowd": torch.zeros(num, 1, dtype=torch.bool), "place": torch.tensor([[1.0, 1.0, 0.0, 0.0]] * num),
             "size": torch.tensor([[96.0, 96.0]] * num)}  # fmt: skip
    if masks:
        batch |= {"masks": drawn, "true_masks": [[cut_mask(m[0].numpy() > 0)] for m in drawn]}
    return batch
