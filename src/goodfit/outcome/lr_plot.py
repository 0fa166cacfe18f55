"""The curve of a learning-rate range test as a picture."""

from __future__ import annotations

import textwrap
from pathlib import Path

from goodfit.config.lr_range import LrRange
from goodfit.outcome.plots import COLOURS


def plot_lr_range(found: LrRange, path: Path) -> None:
    """Loss against learning rate on a log axis, raw and smoothed, with the suggestion and the table's default marked.

    The loss axis ends a little above the start, so that a divergence does not flatten what led to it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.plot(found.rates, found.losses, color=COLOURS["train"], alpha=0.35, linewidth=1.0, label="loss of each step")
    axis.plot(found.rates, found.smoothed, color=COLOURS["train"], linewidth=2.0, label="smoothed")
    axis.axvline(found.table, color=COLOURS["lr"], linestyle=":", linewidth=1.6, label=f"default {found.table:.3g}")
    if found.suggestion:
        axis.axvline(found.suggestion, color=COLOURS["val"], linewidth=1.6, label=f"suggestion {found.suggestion:.3g}")
    axis.set_xscale("log")
    start = found.smoothed[0]
    low, high = min(min(found.losses), start), max(max(found.losses[: len(found.losses) // 3 + 1]), start)
    room = 0.08 * max(high - low, 1e-3)
    axis.set_ylim(low - room, high + 4 * room)
    axis.set_xlabel("learning rate")
    axis.set_ylabel("training loss")
    axis.grid(color=COLOURS["grid"], linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="lower left")
    axis.set_title(textwrap.fill(found.reason, 90), fontsize=9, loc="left")
    figure.savefig(path, dpi=110)
