"""Read a YAML file as people mean it: YAML 1.2 scalars, plain types only, no duplicate keys.

PyYAML follows YAML 1.1, where `1e-3` is text, `no` is false and `12:30` is 750. A learning rate or a class called "no"
would then break without a word.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from goodfit.core.errors import RequestError

MAX_BYTES = 1_000_000  # a request is a few kilobytes; more is a mistake or an attack


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a flat mapping of options.

    Raises:
        RequestError: the file is missing, too large, not YAML, has a key twice, or is not a mapping.
    """
    import yaml

    try:
        if path.stat().st_size > MAX_BYTES:
            raise RequestError(f"The file is larger than {MAX_BYTES:,} bytes.", where=str(path))
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"Could not read the file: {error}.", where=str(path), next="check cfg=FILE") from error
    try:
        value = yaml.load(text, Loader=_loader())  # noqa: S506 - a SafeLoader with fewer types
    except (
        yaml.YAMLError,
        RecursionError,
        ValueError,
        TypeError,
        AttributeError,
    ) as error:  # odd tags and huge numbers
        raise RequestError(f"Not a YAML file of options: {error}", where=str(path)) from error
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise RequestError("The file must be a list of lines `option: value`.", where=str(path))
    return value


def _loader() -> Any:
    """A SafeLoader whose scalars follow the YAML 1.2 core schema, without aliases (they can expand without bound)."""
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.events.AliasEvent):
                event: Any = self.peek_event()  # type: ignore[no-untyped-call]
                raise yaml.YAMLError(f"aliases are not read (line {event.start_mark.line + 1})")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key_node, _ in node.value:
                key = self.construct_object(key_node, deep=True)
                if not isinstance(key, str | int | float | bool):
                    raise yaml.YAMLError(f"a key is not plain text (line {key_node.start_mark.line + 1})")
                if key in seen:
                    raise yaml.YAMLError(f"`{key}` stands twice (line {key_node.start_mark.line + 1})")
                seen.add(key)
            return super().construct_mapping(node, deep)

    Loader.yaml_implicit_resolvers = {}
    number = r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
    for tag, pattern, first in (
        ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
        ("int", r"[-+]?[0-9]+", "-+0123456789"),
        ("float", rf"{number}|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+0123456789."),
        ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ):
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(rf"^(?:{pattern})$"), list(first))
    Loader.add_constructor("tag:yaml.org,2002:int", lambda _loader, node: int(node.value))
    Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)
    Loader.add_constructor("tag:yaml.org,2002:bool", lambda _loader, node: node.value.lower() == "true")
    return Loader


def _construct_float(_loader: Any, node: Any) -> float:
    text = str(node.value).lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))
