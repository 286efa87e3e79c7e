"""A recipe: the sources of a corpus, each with its fields, its condition, its cap and its repetition.

HRM-Text's data are made so (arXiv 2605.20613, and its `data_io` pipeline): tags in front of a prompt say what kind of
response follows, large sources are capped, small good ones are repeated.
"""

from typing import Annotated

from pydantic import Field, ValidationError

from hrm_lm.config import Positive, Section, explain, read_yaml
from hrm_lm.data.chat import Chat
from hrm_lm.data.records import Fields, Missing, parse_mapping
from hrm_lm.errors import UserError
from hrm_lm.filesystem import without_secrets
from hrm_lm.prepare.reading import Tags
from hrm_lm.prepare.tasks import Settings, Source

CONDITIONS = {tag: f"<|{tag}|>" for tag in ("direct", "cot", "noisy", "synth")}
"""The published tags, each with the text that stands for it unless a recipe has another."""
PROMPT = "{condition}{prompt}"


class SourceSection(Section):
    """A source of a recipe."""

    input: str | Annotated[list[str], Field(min_length=1)]
    """Files, folders, URIs and `hf:` datasets, as `--input` takes them."""
    prompt_field: str | None = None
    """As `--prompt_field`, which holds where it is left out."""
    response_field: str | None = None
    """As `--response_field`, which holds where it is left out."""
    condition: str = ""
    """Tags of the source's prompts: `direct`, or several as in `synth,cot`. With braces, as in `{condition}`, a template of
    each record's own tags."""
    cap: Positive | None = None
    """At most so many pairs of the source, duplicates not counted. Their hashes decide which."""
    repeat: Positive = 1
    """How often each training pair of the source is written."""


class Recipe(Section):
    """The sources of a corpus."""

    sources: Annotated[dict[Annotated[str, Field(pattern=r"^[\w-]+$")], SourceSection], Field(min_length=1)]
    """The sources by name."""
    conditions: dict[str, Annotated[str, Field(min_length=1)]] = {}
    """The text that stands in the prompt for each tag, beside or instead of `<|direct|>`, `<|cot|>`, `<|noisy|>` and
    `<|synth|>`."""
    prompt_template: str = PROMPT
    """How a prompt is put together of the texts of its tags and of the prompt itself."""


def read_recipe(location: str) -> Recipe:
    """A file or URI. Raises UserError, a line a mistake, where it is no recipe."""
    try:
        return Recipe.model_validate(read_yaml(location))
    except ValidationError as error:
        lines = explain(error, Recipe)
    raise UserError("\n".join(f"{without_secrets(location)}: {line}" for line in lines))


def sources_of(recipe: Recipe, settings: Settings, chat: Chat) -> list[Source]:
    """The sources as tasks take them. Raises UserError, naming the field, for one that cannot be."""
    texts = CONDITIONS | recipe.conditions
    prompt = parse_mapping("prompt_template", recipe.prompt_template)
    names = {path[0] for _, path in prompt if path}
    if not {"prompt"} <= names <= {"prompt", "condition"}:
        raise UserError(
            f"prompt_template {recipe.prompt_template!r}: has {{prompt}}, and may have {{condition}}, alone"
        )
    sources = []
    for name, section in recipe.sources.items():
        flag, condition = f"sources.{name}.", section.condition
        fields = section.prompt_field or settings.prompt_field, section.response_field or settings.response_field
        Fields.of(*fields, chat, flag)
        if condition and "condition" not in names:
            raise UserError(f"{flag}condition: prompt_template {recipe.prompt_template!r} has no place for it")
        own = "{" in condition  # the records'
        tags = Tags(parse_mapping(f"{flag}condition", condition) if own else ((condition, None),), texts, prompt)
        if not own:
            try:
                tags.applied({}, "")
            except Missing as missing:
                raise UserError(f"{flag}condition: {missing}") from None
        mapping = settings.mapping(chat)._replace(prompt=fields[0], response=fields[1], tags=tags)
        inputs = [section.input] if isinstance(section.input, str) else section.input
        sources.append(Source(name, inputs, mapping, section.cap, section.repeat))
    return sources


def special_texts(sources: list[Source]) -> list[str]:
    """The texts of the tags that stand in prompts: a tokenizer that is made of the corpus has a token for each."""
    found = []
    for source in sources:
        if tags := source.mapping.tags:
            own = any(path for _, path in tags.condition)
            found += list(tags.texts.values()) if own else [tags.texts[tag] for tag in tags.named({})]
    return list(dict.fromkeys(found))
