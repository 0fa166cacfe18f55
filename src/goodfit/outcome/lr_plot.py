"""Learning rates as pictures: what is planned for the run, and the curve of a range test."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from goodfit.config.lr_range import LrRange
from goodfit.engine.schedule import Schedule
from goodfit.outcome.plots import COLOURS

MAX_POINTS = 4000  # of a curve; 1,100 pixels show no more
MAX_RATES = 6  # lines in the legend; of more (a rate for each layer) the first and the last are named


def plot_schedule(schedule: Schedule, peaks: dict[str, float], steps_per_epoch: int, path: Path) -> None:
    """The planned learning rate of each parameter group against the step, and the epoch above; with marks where the
    decay begins and strong augmentation ends.

    Args:
        peaks: Peak learning rate by the names of the groups that share it.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    total = schedule.total_steps
    steps = sorted({round(k * total / MAX_POINTS) for k in range(MAX_POINTS)} | {max(0, schedule.warmup_steps - 1)})
    factors = [schedule.factor(step) for step in steps]
    for number, (name, peak) in enumerate(sorted(peaks.items(), key=lambda item: -item[1])):
        named = len(peaks) <= MAX_RATES or number in (0, len(peaks) - 1)
        axis.plot(steps, [peak * factor for factor in factors], linewidth=1.6, color=colormaps["viridis"](0.85 * number / len(peaks)),
                  label=f"{name}: {peak:.3g}" if named else None)  # fmt: skip
    marks = {schedule.stable_until: ("decay begins", "--"), schedule.closing_from: ("strong augmentation ends", ":")}
    for step, (text, style) in sorted(marks.items()):
        if 0 < step < total:
            axis.axvline(step, color=COLOURS["lr"], linestyle=style, linewidth=1.2, label=text)
    axis.set_xlim(0, total)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("step")
    axis.set_ylabel("learning rate")

    def to_epochs(step: Any) -> Any:
        return step / steps_per_epoch

    def to_steps(epoch: Any) -> Any:
        return epoch * steps_per_epoch

    axis.secondary_xaxis("top", functions=(to_epochs, to_steps)).set_xlabel("epoch")
    axis.grid(color=COLOURS["grid"], linewidth=0.6)
    axis.spines["right"].set_visible(False)
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=2)
    later = "; falls when validation no longer improves" if schedule.kind == "plateau" else ""
    length = f"{total:,} steps, {total / steps_per_epoch:g} epochs"
    axis.set_title(f"schedule {schedule.kind}: {length}{later}", fontsize=9, loc="left")
    figure.savefig(path, dpi=110)


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
