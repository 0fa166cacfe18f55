"""`report.html`: a run in one file that opens without a network, drawn from the records of its folder."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from goodfit.core.safeio import write_text


def write_report(
    target: Path, facts: dict[str, Any], pictures: dict[str, Path], *, template: str = "report.html"
) -> None:
    """Write the report.

    Args:
        target: The HTML file.
        facts: `name`, `data`, `findings`, `decisions`, `epochs`, `test`, `gap` (loss, accuracy and
            macro F1 by split), `bundle`, `seconds`, `rate`, `checks` (of the
            rehearsal), `time` (`Verdict.to_dict`), `projection` (a sentence) and `commands`.
        template: "report.html" for images, "module.html" for a module of a user's.
        pictures: PNG files by name, put into the page as data URIs.

    Raises:
        StorageError: the file cannot be written.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("goodfit.outcome", "templates"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["percent"] = lambda value: f"{100 * value:.1f} %"
    images = {
        name: "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
        for name, path in pictures.items()
        if path.is_file()
    }
    write_text(target, environment.get_template(template).render(**facts, images=images))
