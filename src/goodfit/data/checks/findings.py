"""What the audit found, in the form that people, pages and scripts read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from goodfit.data.reading import Problem

MAX_ITEMS = 1000  # items listed per finding; the count is always whole

SEVERITIES = ("error", "warning", "info")
# kind: severity, what was done, how to do otherwise, for what a reader or the check of objects noticed
_PROBLEMS = {
    "unreadable": ("warning", "cannot be read: left out", "replace or delete them"),
    "truncated": ("warning", "cut off or damaged: left out", "replace or delete them"),
    "huge": ("warning", "too many pixels to decode safely: left out", "reduce or delete them"),
    "wrong_type": ("info", "not of the dataset's kind: ignored", "move them away"),
    "missing_label": ("warning", "no label: left out", "label them, or move them away"),
    "missing_image": ("warning", "the file does not exist: left out", "mend the list or annotation"),
    "label_conflict": ("warning", "two labels for one sample: all copies left out", "keep the right one"),
    "bad_box": ("warning", "the box was dropped or clipped, its image kept", "mend the annotation"),
    "bad_mask": ("warning", "the object, or a part of it that cannot be, was dropped, its image kept", "mend the annotation"),
    "turned": ("info", "annotated before the turn that EXIF asks for: boxes and masks were turned with the picture", ""),
    "other_size": ("warning", "annotated at another size than the picture has: kept, look at them", "mend the annotation, or put the annotated picture there"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing the audit found: how bad, how often, where, what was done about it, and how to do otherwise.

    `count` is of files; of pairs for duplicates and leaks; of boxes for bad_box and bad_mask.
    """

    kind: str
    severity: str  # error, warning or info
    count: int
    items: tuple[str, ...]
    action: str
    override: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "kind": self.kind,
            "severity": self.severity,
            "count": self.count,
            "items": list(self.items[:MAX_ITEMS]),
            "action": self.action,
            "override": self.override,
        }


def from_problems(problems: Iterable[Problem], *, background: bool) -> list[Finding]:
    """One finding per kind of problem, and per whether a sample was lost by it.

    Args:
        background: Samples without a label are kept, as images that show no object.
    """
    table: dict[tuple[str, bool], list[Problem]] = {}
    for problem in problems:
        table.setdefault((problem.kind, problem.lost), []).append(problem)
    found = []
    for (kind, lost), members in table.items():
        severity, action, override = _PROBLEMS.get(kind, ("warning", "see the list", ""))
        if kind == "missing_label" and not lost:
            severity = "info"
            action = "no label: background, or not part of the dataset" if background else "no label: ignored"
        elif kind == "missing_image" and not lost:
            severity, action = "info", "labels without an image: ignored"
        items = tuple(f"{p.item}: {p.message}" if p.message else p.item for p in members)
        found.append(Finding(kind, severity, len(members), items, action, override))
    return found


def merged(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """One finding per kind, the most severe first; what was done about each part is said in order."""
    table: dict[str, list[Finding]] = {}
    for finding in findings:
        table.setdefault(finding.kind, []).append(finding)
    made = []
    for kind, parts in table.items():
        parts = sorted(parts, key=lambda f: SEVERITIES.index(f.severity))
        actions = list(dict.fromkeys(f"{p.count:,} {p.action}" if len(parts) > 1 else p.action for p in parts))
        overrides = list(dict.fromkeys(p.override for p in parts if p.override))
        made.append(Finding(kind, parts[0].severity, sum(p.count for p in parts),
                            tuple(item for p in parts for item in p.items), "; ".join(actions), "; ".join(overrides)))  # fmt: skip
    return tuple(sorted(made, key=lambda f: SEVERITIES.index(f.severity)))
