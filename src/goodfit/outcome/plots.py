"""The pictures of a run: results.png and confusion_matrix.png from its records, batches from its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from goodfit.core.journal import Event
from goodfit.data.checks.draw import contact_sheet
from goodfit.runtime.images import Preprocessing

COLOURS = {"train": "#4c78a8", "val": "#e45756", "metric": "#54a24b", "lr": "#9d755d", "grid": "#dddddd"}
MAX_PICTURES = 16  # of a batch
MAX_NAMED_CLASSES = 30  # above this, tick labels would overlap


def plot_results(epochs: Sequence[Event], path: Path) -> None:
    """Loss, other figures and learning rate against the step, from `epoch` events; segments are joined where they branch."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3)
    names = [name for name in epochs[0]["val"] if name != "loss"]
    colours = [COLOURS["metric"], COLOURS["train"], *(f"C{k}" for k in range(5, 10))]
    shown = [(f"val {name.replace('macro_f1', 'macro F1')}", colours[k % len(colours)], [float(e["val"][name]) for e in epochs])
             for k, name in enumerate(names)]  # fmt: skip
    panels: list[tuple[str, list[tuple[str, str, list[float]]]]] = [
        ("loss", [("train", COLOURS["train"], [float(e["train_loss"]) for e in epochs]),
                  ("val", COLOURS["val"], [float(e["val"]["loss"]) for e in epochs])]),
        ("accuracy" if "accuracy" in names else "metrics", shown),
        ("learning rate", [("backbone", COLOURS["lr"], [float(e["lr"]) for e in epochs])]),
    ]  # fmt: skip
    steps = [e["step"] for e in epochs]
    for axis, (title, lines) in zip(axes, panels, strict=True):
        for label, colour, values in lines:
            axis.plot(steps, values, color=colour, label=label, linewidth=1.6, marker="." if len(steps) < 60 else None)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(color=COLOURS["grid"], linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        if lines:
            axis.legend(frameon=False, fontsize=8)
    if "accuracy" in names:
        _mark_best(axes[1], epochs)
    figure.savefig(path, dpi=110)


def _mark_best(axis: Any, epochs: Sequence[Event]) -> None:
    best = max(epochs, key=lambda e: (e["val"]["accuracy"], -float(e["val"]["loss"])))
    axis.annotate(f"best {best['val']['accuracy']:.1%}", (best["step"], best["val"]["accuracy"]),
                  textcoords="offset points", xytext=(0, -14), ha="center", fontsize=8)  # fmt: skip


def plot_confusion(confusion: Sequence[Sequence[int]], class_names: Sequence[str], path: Path) -> None:
    """Counts by true class (rows) and predicted class (columns), shaded by the share of the row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    num = len(class_names)
    side = min(12.0, 3.2 + 0.45 * num)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    shares = [[count / max(1, sum(row)) for count in row] for row in confusion]
    picture = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, ax=axis, label="share of the true class", shrink=0.8)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    if num <= MAX_NAMED_CLASSES:
        names = [plain(name) for name in class_names]
        axis.set_xticks(range(num), names, rotation=45, ha="right")
        axis.set_yticks(range(num), names)
        for y, row in enumerate(confusion):
            for x, count in enumerate(row):
                if count:
                    axis.text(x, y, str(count), ha="center", va="center", fontsize=9,
                              color="white" if shares[y][x] > 0.5 else "black")  # fmt: skip
    figure.savefig(path, dpi=110)


def plot_batch(batch: dict[str, Any], class_names: Sequence[str], preprocessing: Preprocessing, path: Path) -> None:
    """The input of a model as pictures, with the labels: what it really sees, after augmentation.

    Args:
        batch: `image`, normalised, float32, shape (N, 3, S, S), and `target`, int64 of shape (N,) or shares of shape
            (N, classes).
        preprocessing: Whose normalisation is undone.
    """
    images = batch["image"][:MAX_PICTURES].float().cpu().numpy()
    mean, std = np.array(preprocessing.mean).reshape(3, 1, 1), np.array(preprocessing.std).reshape(3, 1, 1)
    pixels = np.clip(np.rint(255 * (images * std + mean)), 0, 255).astype(np.uint8)
    captions = [_caption(target, class_names) for target in batch["target"][:MAX_PICTURES]]
    contact_sheet(pixels, captions, columns=4).save(path)


def _caption(target: torch.Tensor, class_names: Sequence[str]) -> str:
    if target.ndim == 0:
        return class_names[int(target)]
    shares = [(float(s), class_names[c]) for c, s in enumerate(target) if float(s) > 0.005]
    return " + ".join(f"{name} {100 * share:.0f} %" for share, name in sorted(shares, reverse=True)[:2])


def plain(name: str) -> str:
    """A class's name as matplotlib writes it as it is: between two dollars it would read mathematics, and refuse what is none; what begins
    with an underscore it leaves out of a legend."""
    text = name.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
