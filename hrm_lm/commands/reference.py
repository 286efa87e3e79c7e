"""The reference of all fields of a config and of a sweep's `tune` section, in Markdown, made from their docstrings:
`hrm-lm reference > docs/configuration.md`.
"""

import argparse
import json
import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from hrm_lm.config import Config, is_section
from hrm_lm.tuning.space import TuneSection

HEAD = """# Configuration reference

<!-- Made by `python -m hrm_lm.commands reference > docs/configuration.md` from the docstrings in hrm_lm/config.py and
hrm_lm/tuning/space.py: change those, and make this file anew. -->

A config is a YAML file with the sections `model`, `optim`, `train`, `data` and `ray`. A field that a file leaves out has
its default. `--set PATH=VALUE` sets any field on the command line (`--set model.hrm.h_cycles=4`), and a sweep's
`search_space` names fields by the same paths.

A file may name a `base`: another config, by a path relative to the file or by a URI. The base's fields hold where the file
does not set them; sections, and the members of a mixture, are merged field by field. A base may have a base.

A dataset may be code (`module:function`). Code runs only when the command line names it, or a config of your own: a config in
the folder of a checkpoint, a config from a URI, and the bases of these run no code.
"""
SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def main(argv: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(prog="hrm-lm reference", description=__doc__).parse_args(argv)
    print(reference(), end="")
    return 0


def reference() -> str:
    """The whole file."""
    lines = [HEAD]
    for name, field in Config.model_fields.items():
        lines += table(name, field.annotation)
    lines += table("tune", TuneSection, "of a sweep file")
    return "\n".join(lines)


def table(name: str, section: Any, note: str = "") -> list[str]:
    lines = [f"## `{name}` {note}".rstrip(), "", cell(section.__doc__), ""]
    lines += ["| Field | Type | Default | |", "| --- | --- | --- | --- |"]
    for dotted, field in fields_of(section, name):
        default = "(required)" if field.is_required() else f"`{plain(field.default)}`"
        lines.append(
            f"| `{dotted}` | {cell(type_name(field.annotation, field.metadata))} | {default} | {cell(field.description)} |"
        )
    return [*lines, ""]


def fields_of(section: type[BaseModel], path: str) -> Iterator[tuple[str, FieldInfo]]:
    """All fields below a section with their dotted paths; `<name>` stands for a key of the user's own."""
    for name, field in section.model_fields.items():
        kind: Any = field.annotation
        if is_section(kind):
            yield from fields_of(kind, f"{path}.{name}")
            continue
        yield f"{path}.{name}", field
        if get_origin(kind) is dict and is_section(get_args(kind)[1]):
            yield from fields_of(get_args(kind)[1], f"{path}.{name}.<name>")


def type_name(kind: Any, limits: Sequence[Any] = ()) -> str:
    """A type as a reader of YAML sees it: its choices, or its kind with its limits."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return type_name(inner[0], inner[1].metadata)
    if origin is Literal:
        return " or ".join(f"`{choice}`" for choice in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(member) for member in inner)
    if origin is list:
        return f"list of {type_name(inner[0])}"
    if origin is tuple:
        return f"[{', '.join(type_name(member) for member in inner)}]"
    if origin is dict:
        return "section of sections by name"
    signs = [f"{SIGNS[sign]} {getattr(limit, sign)}" for limit in limits for sign in SIGNS if hasattr(limit, sign)]
    names = {int: "integer", float: "number", str: "text", bool: "`true` or `false`", type(None): "`null`"}
    return f"{names[kind]} {', '.join(signs)}".rstrip()


def plain(value: Any) -> str:
    """A default as it stands in YAML."""
    return value if isinstance(value, str) else json.dumps(value)


def cell(text: str | None) -> str:
    """A text on a single line, as a Markdown table wants it."""
    return " ".join((text or "").split()).replace("|", "\\|")
