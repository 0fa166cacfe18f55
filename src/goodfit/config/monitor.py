"""The validation figure that a run watches, and whether more of it is better."""

from __future__ import annotations

from collections.abc import Iterable

from goodfit.core.errors import RequestError

FALLING = ("loss", "error", "mae", "mse", "rmse")  # figures whose names end so are better when they are smaller


def read_monitor(text: str) -> tuple[str, bool]:
    """The figure's name, and whether more is better: `+name` says so, `-name` the contrary, else its name tells."""
    if text.startswith(("+", "-")):
        return text[1:], text[0] == "+"
    return text, not text.lower().endswith(FALLING)


def check_monitor(text: str, figures: Iterable[str]) -> None:
    """Raises RequestError if the figure is not among those that validation gives."""
    known = list(figures)
    if read_monitor(text)[0] not in known:
        raise RequestError(f"monitor={text}: validation gives no such figure.",
                           next=f"use one of {', '.join(known)}")  # fmt: skip
