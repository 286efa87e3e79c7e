"""A record to its pairs: which of its fields are prompt and response, or that it is a conversation.

JSONL, datasets of the Hub's library and `prepare` read records alike. A record is what a line of JSON or a row of a table
holds. A conversation gives a pair for each answer in it.
"""

from contextlib import suppress
from string import Formatter
from typing import Any, NamedTuple

import pyarrow

from hrm_lm.data.chat import Chat, Malformed, checked
from hrm_lm.errors import UserError

DEFAULTS = ("prompt", "response")
"""The fields of prompt and response, unless others are named."""
MESSAGES = "messages"
"""The conversation of a record that lacks one of DEFAULTS."""

Pair = tuple[str, str]
"""A prompt and its response."""


class Missing(Exception):
    """A record has no text and no conversation where it should. `reason` is the same for all records of a kind."""

    def __init__(self, reason: str, detail: str = ""):
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}" if detail else reason)


Template = tuple[tuple[str, tuple[str, ...] | None], ...]
"""Stretches of literal text, each with the field that follows it, or None. A field is its whole name, then the steps
of its path."""


def parse_mapping(flag: str, spec: str) -> Template:
    """The template that a flag's value says. Raises UserError, naming the flag, where the value is not a template."""
    if "{" not in spec:
        return (("", (spec, *spec.split("."))),)
    try:
        parsed = [(literal, name, conversion or form) for literal, name, form, conversion in Formatter().parse(spec)]
    except ValueError as error:
        raise UserError(f"{flag} {spec!r}: not a template: {error}") from None
    if any(extra or name == "" for _, name, extra in parsed) or not any(name for _, name, _ in parsed):
        raise UserError(
            f"{flag} {spec!r}: not a template: name fields in braces, such as {{question}} or {{data.question}}"
        )
    return tuple((literal, (name, *name.split(".")) if name else None) for literal, name, _ in parsed)


def fill_template(template: Template, record: Any) -> str:
    """The record's text for a template. A field that stands alone must be text; beside other text, it may be a number.

    Raises Missing where the record does not have a field.
    """
    literal, path = template[0]
    if len(template) == 1 and not literal and path:
        if type(record) is dict and type(value := record.get(path[0])) is str:  # the usual case, made fast
            return value
        return look_up(record, path, (str,))
    return "".join(
        literal + (str(look_up(record, path, (str, int, float))) if path else "") for literal, path in template
    )


def look_up(record: Any, path: tuple[str, ...], types: tuple[type, ...]) -> Any:
    """The value at a path, which is the field with the whole name or else is looked up step by step.

    Raises Missing where there is no value of one of the `types`.
    """
    name, *steps = path
    value = record
    for step in [name] if isinstance(record, dict) and name in record else steps:
        if isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        elif isinstance(value, dict) and step in value:
            value = value[step]
        else:
            raise Missing(f"no field {name!r}")
    if not isinstance(value, types) or isinstance(value, bool):
        raise Missing(f"field {name!r} is {'null' if value is None else type(value).__name__}, not text")
    return value


class Fields(NamedTuple):
    """Where a record has its prompt and its response."""

    prompt: Template
    response: Template
    chat: Chat
    has_messages: bool
    """Whether MESSAGES is looked at where a record lacks a field. It is where no other fields were named."""

    @classmethod
    def of(cls, prompt: str, response: str, chat: Chat, flags: str) -> "Fields":
        """prompt, response: a field (`question`, `data.question`, `turns.0.text`) or a template
        (`{question} Context: {context}`). Raises UserError, naming the flag, for what is no template.
        """
        templates = parse_mapping(f"{flags}prompt_field", prompt), parse_mapping(f"{flags}response_field", response)
        return cls(*templates, chat, (prompt, response) == DEFAULTS)

    def pairs(self, record: Any) -> list[Pair]:
        """The record's pairs, at least one; those of a conversation in its order. Raises Missing where there is none."""
        try:
            prompt, response = fill_template(self.prompt, record), fill_template(self.response, record)
            if not (prompt.isascii() and response.isascii()):  # asking costs nothing
                (prompt + response).encode()
            return [(prompt, response)]
        except UnicodeEncodeError:  # JSON can say "\ud800"
            raise Missing("not Unicode text, but half a character") from None
        except Missing:
            messages = self._messages(record)
            if messages is None:
                raise
        try:
            return self.chat.samples(messages)
        except Malformed as malformed:
            raise Missing(malformed.reason, malformed.detail) from None

    def prompt_of(self, record: Any) -> str:
        """What is to be answered: the record's prompt, or all of its conversation but an answer that comes last. Raises
        Missing where there is neither.
        """
        try:
            prompt = fill_template(self.prompt, record)
            prompt.encode()
            return prompt
        except UnicodeEncodeError:  # JSON can say "\ud800"
            raise Missing("not Unicode text, but half a character") from None
        except Missing:
            messages = self._messages(record)
            if messages is None:
                raise
        try:
            asked = checked(messages)
            return self.chat.prompts([asked[:-1] if asked[-1]["role"] == "assistant" and asked[1:] else asked])[0]
        except Malformed as malformed:
            raise Missing(malformed.reason, malformed.detail) from None

    def _messages(self, record: Any) -> Any:
        literal, path = self.prompt[0]
        if len(self.prompt) == 1 and not literal and path:
            with suppress(Missing):
                return look_up(record, path, (list,))
        return record.get(MESSAGES) if self.has_messages and isinstance(record, dict) else None

    def columns(self, schema: pyarrow.Schema, others: Template = ()) -> list[str]:
        """The columns of a table that its records' pairs, and `others`, are made of. Raises Missing for a lacking column."""
        found, lacking = set[str](), []
        for _, path in (*self.prompt, *self.response, *others):
            if path:
                names = [name for name in path[:2] if name in schema.names]
                found.update(names[:1])
                lacking += [path[0]] if not names else []
        if self.has_messages and MESSAGES in schema.names:
            return sorted({*found, MESSAGES})
        holds_messages = not any(path and path[0] in lacking for _, path in self.prompt) and any(
            pyarrow.types.is_nested(kind := schema.field(name).type) or isinstance(kind, pyarrow.BaseExtensionType)
            for name in found
        )
        if lacking and not holds_messages:  # else each record tells
            raise Missing(f"no field {lacking[0]!r}", f"there are {', '.join(schema.names)}")
        return sorted(found)
