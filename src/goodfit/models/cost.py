"""What a network costs, counted on its own operations without computing anything."""

from __future__ import annotations

from goodfit.models.builder import create_at_size

IMAGENET_CLASSES = 1000


def count_cost(name: str, imgsz: int, *, num_classes: int = IMAGENET_CLASSES) -> tuple[int, int]:
    """Parameters, and multiply-adds of one image's forward pass.

    Convolutions, matrix products and attention are counted (torch's flop counter, two operations to a multiply-add), on the
    meta device: no memory is taken and nothing is computed. Norms, activations and pools are left out, as is usual.

    Args:
        name: A model, also with a -stem.
        imgsz: Side of the square input, pixels.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        network = create_at_size(name, imgsz, num_classes=num_classes).eval()
        image = torch.empty(1, 3, imgsz, imgsz)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(image)
    return sum(p.numel() for p in network.parameters()), counter.get_total_flops() // 2
