"""`audit.html`: what the audit found, in one file that opens without a network, with pictures to judge and to mark."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from goodfit.core.safeio import write_text
from goodfit.data.checks.fixes import shown_path

MAX_SHOWN = 24  # examples with pictures for each finding; the others are listed
MAX_OPEN = 60  # suspects that are open at once; the others wait behind a click
MAX_TEXT = 400  # characters shown of a text sample

SEVERITIES = ("error", "warning", "info")
MARKABLE = ("label_conflict", "duplicate_near", "leak")  # findings whose samples can be left out on the page
RELABEL_TASKS = ("classify", "text")  # tasks whose samples have one label each
_LISTED = 1000  # items that audit.json lists of one finding
_PAIRS = ("duplicate_exact", "duplicate_near", "leak", "label_conflict")

# Kind of finding: its title, and one sentence on why it matters.
KINDS: dict[str, tuple[str, str]] = {
    "unreadable": ("Files that cannot be opened", "Nothing can be learned from them, and they would stop a run."),
    "truncated": ("Files that are cut off", "They begin well and then end too early, often after a broken copy."),
    "wrong_type": ("Files that are not what their names say", "The content decides, not the ending of the name."),
    "huge": ("Pictures too large to open safely", "Their headers announce more pixels than memory should be given."),
    "missing_image": ("Labels without a picture", "The data names a picture that is not there."),
    "missing_label": ("Samples without a label", "There is nothing to compare a prediction with."),
    "crowd": ("Objects that are marked as crowds", "Nothing is learned of them, and what is found there counts neither for nor against the model."),
    "turned": ("Photographs that EXIF turns", "Their objects were annotated before the turn, and were turned with them."),
    "label_conflict": ("One picture, two labels", "Equal copies carry different labels, or objects: at most one of them is right."),
    "leak": ("The same picture in two splits",
             "What is tested must not have been seen in training, or the test result is too good."),
    "label_suspect": ("Labels that look wrong",
                      "A model that did not see these samples is sure of another class. It may be mistaken: you decide."),
    "duplicate_exact": ("Exact copies", "The same picture several times counts as one, and must stay in one split."),
    "duplicate_near": ("Near copies",
                       "The same picture, stored again, resized, cropped or lit differently; it must stay in one split."),
    "bad_box": ("Boxes that cannot be right", "Outside the picture, reversed, without area, or of an unknown class."),
    "bad_mask": ("Masks that cannot be right", "Empty, broken, or not of the size of their picture."),
    "other_size": ("Pictures of another size than annotated", "Their boxes may lie elsewhere: the picture was turned, or is a copy."),
    "imbalance": ("Some classes are much rarer than others", "A model tends to neglect rare classes."),
    "too_few": ("Classes with too few samples", "Each class has to be in training, validation and test."),
    "shortcut": ("The class can be guessed without looking",
                 "Something besides the content gives it away, and a model would learn that instead."),
    "shift": ("The parts of the data differ", "A result on one part may not hold for the other."),
    "size_outlier": ("Pictures of unusual size or shape", "They are shrunk, stretched or cut far more than the others."),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Tile:
    """One sample on the page: its place in the table of items (-1: cannot be marked), what is shown of it."""

    path: str
    item: int = -1
    picture: str = ""
    text: str = ""
    label: str = ""


@dataclass(slots=True)
class _Section:
    """One finding as the template shows it."""

    kind: str
    severity: str
    count: int
    title: str
    meaning: str
    action: str
    override: str
    control: str = ""  # "select", "leave_out", or "" where nothing can be marked
    groups: list[tuple[list[_Tile], str]] = field(default_factory=list)  # samples side by side, and a message
    lines: list[str] = field(default_factory=list)
    suspects: list[tuple[_Tile, str, str]] = field(default_factory=list)  # sample, proposed class, confidence
    cut: bool = False

    @property
    def pairs(self) -> bool:
        """Whether samples stand side by side."""
        return any(len(tiles) > 1 for tiles, _ in self.groups)


def write_audit_page(
    target: Path,
    *,
    name: str,
    data: Mapping[str, Any],
    findings: Sequence[Mapping[str, Any]],
    pictures: Mapping[str, bytes],
    suspects: Sequence[Mapping[str, Any]],
    labels: Mapping[str, str] | None = None,
    texts: Mapping[str, str] | None = None,
    fixes: Sequence[Mapping[str, str]] = (),
) -> None:
    """Write the page of an audit.

    Samples can be marked on it, and the marks saved as the fixes.csv that `labels=` takes. Everything that comes from
    the data is escaped, and a content security policy lets only the page's own script run.

    Args:
        target: The HTML file.
        name: The title, usually the name of the dataset.
        data: The "data" of audit.json: task, note, num_items, classes, splits, and where known `class_counts`, a
            mapping from split to the count of each class in the order of `classes`.
        findings: As Finding.to_dict gives them.
        pictures: JPEG or PNG thumbnails, by the path that items and suspects call them.
        suspects: `path`, `label`, `proposed` and `confidence` (share of 1), most suspicious first.
        labels: Labels of samples in findings, by path, shown under their pictures.
        texts: Starts of text samples by path, shown where there is no picture.
        fixes: Corrections already applied (`path`, `label`, `action`), which the next fixes.csv repeats.

    Raises:
        StorageError: the file cannot be written.
    """
    import jinja2

    page = _Page(data, pictures, labels or {}, texts or {}, suspects)
    sections = [page.section(f) for f in findings if f["kind"] != "label_suspect" or not suspects]
    if suspects:
        found = next((f for f in findings if f["kind"] == "label_suspect"), {})
        sections.append(page.suspect_section(found, suspects))
    order = {kind: number for number, kind in enumerate(KINDS)}
    sections.sort(key=lambda s: (SEVERITIES.index(s.severity), order.get(s.kind, len(order)), s.kind))
    marks = {
        "name": name, "classes": page.classes, "items": page.items,
        "earlier": [{k: shown_path(str(f[k])) for k in ("path", "label", "action")} for f in fixes],
    }  # fmt: skip
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("goodfit.outcome", "templates"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["csp_hash"] = _csp_hash
    environment.filters["thousands"] = lambda value: f"{value:,}"
    splits = {str(split): int(count) for split, count in data["splits"].items()}
    text = environment.get_template("audit.html").render(
        name=name, note=str(data.get("note", "")), sections=sections, splits=splits,
        num_items=int(data["num_items"]), num_classes=len(data["classes"]), accepted=sum(splits.values()),
        noun=_noun(str(data.get("task", ""))), class_rows=_class_rows(data), marks=_script_json(marks),
        max_shown=MAX_SHOWN, max_open=MAX_OPEN,
    )  # fmt: skip
    write_text(target, shown_path(text))


class _Page:
    """Collects the samples that can be marked while the sections are made."""

    def __init__(
        self,
        data: Mapping[str, Any],
        pictures: Mapping[str, bytes],
        labels: Mapping[str, str],
        texts: Mapping[str, str],
        suspects: Sequence[Mapping[str, Any]],
    ) -> None:
        self.items: list[dict[str, str]] = []
        self.classes = [shown_path(str(c)) for c in data["classes"]] if data.get("task") in RELABEL_TASKS else []
        self._noun = _noun(str(data.get("task", "")))
        self._numbers: dict[str, int] = {}
        self._pictures, self._labels, self._texts = pictures, labels, texts
        self._suspects = {str(s["path"]): s for s in suspects}
        self._known = set(pictures) | set(labels) | set(texts) | set(self._suspects)

    def section(self, finding: Mapping[str, Any]) -> _Section:
        """What is shown of one finding."""
        section = _start(finding, self._noun)
        control = "" if section.kind not in MARKABLE else "leave_out"
        section.control = "select" if section.kind == "label_conflict" and self.classes else control
        items = [str(item) for item in finding["items"]]
        section.cut = _LISTED <= len(items) < section.count
        for item in items[:MAX_SHOWN]:
            paths, message = split_item(item, self._known, pairs=section.kind in _PAIRS)
            if not any(path in self._pictures or path in self._texts for path in paths):
                section.lines.append(item)
            else:
                section.groups.append(([self._tile(path, section.control) for path in paths], message))
        section.lines += items[MAX_SHOWN:]
        return section

    def suspect_section(self, finding: Mapping[str, Any], suspects: Sequence[Mapping[str, Any]]) -> _Section:
        """The ranked cards of samples whose labels look wrong."""
        section = _start({"kind": "label_suspect", "severity": "warning", "count": len(suspects), "items": [],
                          "action": "reported only: nothing was changed", **finding}, self._noun)  # fmt: skip
        section.control = "select"
        for suspect in suspects:
            tile = self._tile(str(suspect["path"]), "select")
            section.suspects.append((tile, str(suspect["proposed"]), _percent(suspect.get("confidence"))))
        section.cut = len(suspects) < section.count
        return section

    def _tile(self, path: str, control: str) -> _Tile:
        suspect = self._suspects.get(path, {})
        label = str(suspect.get("label", self._labels.get(path, "")))
        if control and path in self._known and path not in self._numbers:
            self._numbers[path] = len(self.items)
            item = {"path": path, "label": label, "proposed": str(suspect.get("proposed", ""))}
            self.items.append({key: shown_path(value) for key, value in item.items()})
        text = self._texts.get(path, "")
        return _Tile(
            path=path,
            item=self._numbers.get(path, -1) if control else -1,
            picture=_data_uri(self._pictures[path]) if path in self._pictures else "",
            text=text[:MAX_TEXT] + ("…" if len(text) > MAX_TEXT else ""),
            label=label,
        )


def _start(finding: Mapping[str, Any], noun: str) -> _Section:
    kind = str(finding["kind"])
    title, meaning = KINDS.get(kind, (kind.replace("_", " ").capitalize(), ""))
    if noun == "texts":
        title, meaning = (t.replace("picture", "text").replace("Picture", "Text") for t in (title, meaning))
    severity = finding["severity"] if finding["severity"] in SEVERITIES else "warning"
    return _Section(kind, severity, int(finding["count"]), title, meaning, str(finding["action"]),
                    str(finding.get("override", "")))  # fmt: skip


_BOUNDARY = re.compile(r"[:\s]")
_LONGEST_PATH = 4096  # characters, PATH_MAX of Linux


def split_item(item: str, known: Collection[str], *, pairs: bool) -> tuple[list[str], str]:
    """The paths that an item of a finding starts with, and what it says about them.

    Items read "path", "path: message", "file:line message" or, for pairs, "a = b". Since paths may hold any of these
    signs, the longest start that is a known path counts.

    Args:
        item: An entry of a finding's items.
        known: Paths that there is something to show of.
        pairs: Whether the item may name several paths.
    """
    paths: list[str] = []
    rest = item
    while True:
        start = _known_start(rest, known)
        if not start:  # nothing to show: taken as it is written
            start = rest.split(" = ")[0] if pairs else rest
        paths.append(start)
        rest = rest[len(start) :]
        if not pairs or not rest.startswith(" = "):
            return paths, rest.strip(" :")
        rest = rest[3:]


def _known_start(text: str, known: Collection[str]) -> str:
    ends = [len(text)] + [m.start() for m in reversed(list(_BOUNDARY.finditer(text[:_LONGEST_PATH])))]
    return next((text[:end] for end in ends if text[:end] in known), "")


def _class_rows(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Classes with their counts per split, most frequent first; empty where the counts are not known."""
    counts = data.get("class_counts")
    if not counts:
        return []
    names = [str(name) for name in data["classes"]]
    columns = {str(s): [int(count) for count in counts[s]] for s in data["splits"] if s in counts}
    totals = [sum(column[number] for column in columns.values()) for number in range(len(names))]
    largest = max([1, *totals])
    order = sorted(range(len(names)), key=lambda number: -totals[number])
    return [
        {
            "name": names[number],
            "total": totals[number],
            "counts": {split: column[number] for split, column in columns.items()},
            "bars": [(split, round(100 * column[number] / largest, 3)) for split, column in columns.items()],
        }
        for number in order
    ]


def _noun(task: str) -> str:
    return {"text": "texts", "language": "texts"}.get(task, "pictures")


def _percent(value: Any) -> str:
    try:
        share = float(value)
    except (TypeError, ValueError):
        return ""
    return f"{100 * share:.0f}\u00a0%" if math.isfinite(share) else ""


def _data_uri(picture: bytes) -> str:
    kind = "png" if picture.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64," + base64.b64encode(picture).decode()


def _script_json(value: Any) -> Any:
    """JSON that may stand in a script element: no "<" can close it, and no sign needs an encoding."""
    import markupsafe

    text = json.dumps(value, ensure_ascii=True, allow_nan=False)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return markupsafe.Markup(text)  # noqa: S704 - made safe above


def _csp_hash(script: Iterable[str]) -> str:
    """The hash by which the content security policy admits the page's own script (W3C CSP 3, section 2.3.1)."""
    return "sha256-" + base64.b64encode(hashlib.sha256(str(script).encode()).digest()).decode()
