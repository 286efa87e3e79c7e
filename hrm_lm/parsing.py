"""JSON and YAML that may come from a stranger: whatever is wrong with it is a ValueError of a line.

YAML is read as the values that JSON has too, with texts for keys. So a config holds nothing that cannot be written, printed
or compared, and nothing in it is larger than it looks.
"""

import json
import re
import reprlib
from typing import Any

import yaml
from pydantic import ValidationError

DEEPEST = 50
"""Levels of a YAML document."""
MOST_NODES = 10_000
"""Nodes of a YAML document. What an alias stands for counts every time."""


def parse_json(text: str | bytes) -> Any:
    """Raises ValueError."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def parse_yaml(text: str) -> Any:
    """Raises ValueError."""
    try:
        return yaml.load(text, YamlLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ValueError(f"{one_line(error.problem or error.context or '')}{place}") from None
    except yaml.YAMLError as error:
        raise ValueError(one_line(error)) from None


class YamlLoader(yaml.SafeLoader):
    """YAML 1.1 without dates, sets, bytes and ordered mappings. `1:4` is a text, as it is in YAML 1.2; in YAML 1.1 it is 64,
    a number to base 60.
    """

    yaml_implicit_resolvers = {
        first: ([("tag:yaml.org,2002:str", re.compile(r"\d+(:\d+)+$"))] if first.isdigit() else [])
        + [resolver for resolver in resolvers if resolver[0] != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors = {
        tag: constructor
        for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in ("null", "bool", "int", "float", "str", "seq", "map")
    }

    depth = nodes = 0

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _measure(node, {})
        return node

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        self.depth, self.nodes = self.depth + 1, self.nodes + 1
        if self.depth > DEEPEST or self.nodes > MOST_NODES:  # before it takes long to read on
            raise _too_large(parent, self.nodes)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except (ValueError, LookupError) as error:  # of a tag that does not fit its text, as in `!!int abc`
            raise _error(node, f"not a value of {node.tag}: {error}") from None
        if isinstance(value, int) and abs(value) >= 2**64:
            raise _error(node, "this number has more than 64 bits")
        if isinstance(value, str) and not is_text(value):
            raise _error(node, "this text has half a character (a lone surrogate) or a zero byte")
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        mapping = super().construct_mapping(node, deep)
        if (strange := next((key for key in mapping if not isinstance(key, str)), "")) != "":
            raise _error(node, f"the key {short(strange)} is no text; put it in quotes")
        return mapping


def _measure(node: yaml.Node, known: dict[yaml.Node, tuple[int, int] | None]) -> tuple[int, int]:
    """How many nodes are in a node, itself included, and on how many levels. known: the same of nodes that were measured, and
    None of those that this node is in. Raises yaml.YAMLError where the limits are passed.
    """
    if node in known:
        if (found := known[node]) is None:
            raise _error(node, "an alias stands in what it stands for")
        return found
    known[node] = None
    inner = node.value if isinstance(node, yaml.CollectionNode) else []
    parts = [part for item in inner for part in (item if isinstance(item, tuple) else (item,))]
    measured = [_measure(part, known) for part in parts]
    size, depth = 1 + sum(size for size, _ in measured), 1 + max((depth for _, depth in measured), default=0)
    if size > MOST_NODES or depth > DEEPEST:
        raise _too_large(node, size)
    known[node] = size, depth
    return size, depth


def _too_large(node: yaml.Node, size: int) -> yaml.YAMLError:
    limit = f"{MOST_NODES:,} values" if size > MOST_NODES else f"{DEEPEST} levels"
    return _error(node, f"more than {limit}, counting what aliases stand for")


def _error(node: yaml.Node, what: str) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, what, node.start_mark)


def is_text(text: str) -> bool:
    """Whether it can be written to a file, and be a file's name."""
    return "\0" not in text and not any("\ud800" <= char <= "\udfff" for char in text)


_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = _brief.maxlong = 100
_brief.maxlevel = 3


def short(value: Any) -> str:
    """`repr` for a message, of a value that may be of any size."""
    return _brief.repr(value)


def one_line(error: BaseException | str) -> str:
    """A message for within a message, cut where it is long. Of pydantic's mistakes it is the first."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_context=False)[0]
        error = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    elif isinstance(error, KeyError):
        error = f"{error} is missing"
    try:
        text = " ".join(str(error).split())
    except TypeError:  # a library's error may hold no text
        text = type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def printable(message: str) -> str:
    """The message, for a terminal: what it quotes of a stranger's file neither steers the terminal nor floods it."""
    lines = [line if len(line) <= 1000 else f"{line[:700]}...{line[-297:]}" for line in message.split("\n")]
    return "\n".join(
        "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line) for line in lines
    )
