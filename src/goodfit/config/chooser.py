"""Who decides: the person, an earlier plan, or the rule."""

from __future__ import annotations

from typing import TypeVar

from goodfit.config.plan import Decision, Plan, Source
from goodfit.config.request import TrainRequest

T = TypeVar("T")


class Chooser:
    """Asked wins; then the earlier plan, if one was given; then what was measured, or the rule."""

    def __init__(self, request: TrainRequest, base: Plan | None, asked: Plan | None = None) -> None:
        """Of the plan `asked` only what a person asked for is followed."""
        self.request = request
        self.base = base
        self._asked = asked

    def __call__(self, name: str, rule: T, reason: str, source: Source = "rule") -> Decision[T]:
        """One decision: `rule` with its reason and source, unless it was asked for or decided earlier."""
        asked = getattr(self.request, name, None)  # some decisions cannot be asked for
        if asked is not None:
            return Decision(asked, "asked for", "asked")
        if self.base is not None:
            return getattr(self.base, name)
        if self._asked is not None and getattr(self._asked, name).source == "asked":
            return getattr(self._asked, name)
        return Decision(rule, reason, source)

    def unless_changed(self, name: str, *, keep_asked: bool = False) -> Chooser:
        """One that passes over the earlier plan, if that decided `name` otherwise than is asked for now: what hangs on it
        is decided anew, but for what was asked for then, where that is kept."""
        asked = getattr(self.request, name)
        changed = self.base is not None and asked is not None and asked != getattr(self.base, name).value
        return Chooser(self.request, None, self.base if keep_asked else None) if changed else self
