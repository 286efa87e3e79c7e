"""Tasks whose questions are records of files: how a record becomes a prompt, a response and what counts as right.

A file alone is a task (`questions.jsonl,metric=number`), with the fields of `RecordTask` as its options. A suite is a YAML
file of such tasks by name, whose data the command line names.
"""

import csv
import string
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from pydantic import BeforeValidator, Field, ValidationError

from hrm_lm.cluster.start import say
from hrm_lm.config import Count, Positive, Section, explain, read_yaml
from hrm_lm.data.records import Missing, fill_template, parse_mapping
from hrm_lm.errors import UserError
from hrm_lm.evaluation.verdicts import Expected, alternatives
from hrm_lm.filesystem import without_secrets
from hrm_lm.parsing import one_line, parse_json
from hrm_lm.prepare.reading import (
    UNREADABLE,
    End,
    Piece,
    Problem,
    find_files,
    open_file,
    raise_if_storage,
    read_lines,
)

FLAG = "--tasks"

Names = Annotated[list[str], BeforeValidator(lambda value: value.split("+") if isinstance(value, str) else value)]
"""Names of fields; on the command line with a plus sign between them."""
Named = str | Annotated[list[str | int | bool], Field(min_length=2)]
"""The name of a field that holds a list, or the list itself."""


class RecordTask(Section):
    """A task of records."""

    data: str | None = None
    """A file of JSONL, Parquet or CSV, compressed or not, a folder of these, or a URI. The command line names it."""
    prompt: str = "prompt"
    """A field, or a template such as `{passage} Question: {question}`. `{options}` are the options, a line each."""
    response: str = "response"
    """The expected response: a field or a template. `val_loss` is that of this text. Of a task with `options` it is the
    right option's letter."""
    metric: Literal["exact_match", "contains", "number", "boxed", "choice", "f1"] | None = None
    """The verdict on an answer. Without it an answer is right where it is the response, letter by letter."""
    answers: Names = []
    """Fields with all the answers that are right, in place of the response; those that a record lacks do not count."""
    options: Named | None = None
    """What to choose from: a field that holds a list, or a list of templates."""
    labels: Named | None = None
    """What `answer` calls the options, in their order. Left out, it calls them by number, from 0 on, or by letter."""
    answer: str = "answer"
    """The field that says which option is right."""
    facets: Names = []
    """Fields by which scores are also given. `difficulty` is one wherever all records have it."""
    shots: Count = 0
    """How many solved examples stand before each question, where `shots_data` is given."""
    shots_data: str | None = None
    """The file of these examples, from which the first are taken."""
    shots_by: str | None = None
    """A field: the examples are those that have the question's value in it."""
    condition: str = ""
    """Tags of the suite's `conditions` that say what kind of answer is asked for, such as `synth,cot`."""
    max_new_tokens: Positive | None = None
    """The longest answer. Left out, it is the model's `max_response_len`."""
    limit: Positive | None = None
    """At most so many questions, spread evenly over the file."""


class Suite(Section):
    """A file of tasks."""

    tasks: Annotated[dict[Annotated[str, Field(pattern=r"^\w+$")], RecordTask], Field(min_length=1)]
    """The tasks by name."""
    conditions: dict[str, str] = {}
    """The text that a model knows each tag by."""
    prompt_template: str = "{prompt}"
    """What every prompt is put into. `{condition}` are the texts of the task's tags."""


class Question(NamedTuple):
    prompt: str
    response: str
    expected: Expected
    facets: dict[str, Any]
    place: str


def read_suite(location: str, options: Mapping[str, str]) -> dict[str, tuple[RecordTask, "Frame"]]:
    """The tasks of a suite that have data, by name, each with what its prompts are put into.

    options: from the command line, `<task>` and `<task>_shots` for paths, `limit` for all tasks, `prompt_template`.
    Raises UserError where the file is no suite, or an option is none of these.
    """
    shown = without_secrets(location)
    place = f"{FLAG} {shown}"
    suite = validated(Suite, read_yaml(location), shown)
    names = list(suite.tasks)
    known = {"limit", "prompt_template", *names, *(f"{name}_shots" for name in names)}
    if unknown := options.keys() - known:
        raise UserError(f"{place}: has no task {min(unknown)!r}; it has {', '.join(names)}")
    paths = {name: options.get(name, task.data) for name, task in suite.tasks.items()}
    if not any(paths.values()):
        raise UserError(
            f"{place}: give the data of its tasks, such as {shown},{names[0]}=PATH; it has {', '.join(names)}"
        )
    template, chosen = options.get("prompt_template", suite.prompt_template), {}
    for name, task in suite.tasks.items():
        if not paths[name]:
            continue
        given = {"data": paths[name], "shots_data": options.get(f"{name}_shots", task.shots_data)}
        given |= {"limit": options["limit"]} if "limit" in options else {}
        task = validated(RecordTask, task.model_dump() | given, f"{place}: {name}")
        if task.shots and not task.shots_data:
            say(f"{name}: asked without its {task.shots} solved examples; {name}_shots=PATH names them")
        chosen[name] = task, Frame.of(suite, task, template, f"{place}: {name}")
    return chosen


def validated(kind: type[Section], values: Any, place: str) -> Any:
    """An instance of a Section. Raises UserError, a line a mistake."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        lines = explain(error, kind)
    raise UserError("\n".join(f"{place}: {line}" for line in lines))


class Frame(NamedTuple):
    """What a prompt is put into."""

    template: str = "{prompt}"
    condition: str = ""

    @classmethod
    def of(cls, suite: Suite, task: RecordTask, template: str, place: str) -> "Frame":
        tags = [tag.strip() for tag in task.condition.split(",") if tag.strip()]
        if unknown := [tag for tag in tags if tag not in suite.conditions]:
            raise UserError(
                f"{place}.condition: {unknown[0]!r} is not among the conditions {', '.join(suite.conditions)}"
            )
        if "{prompt}" not in template:
            raise UserError(f"{place}: prompt_template has no {{prompt}} in it")
        return cls(template, "".join(suite.conditions[tag] for tag in tags))

    def around(self, prompt: str) -> str:
        return self.template.replace("{condition}", self.condition).replace("{prompt}", prompt)


def questions(task: RecordTask, frame: Frame) -> tuple[list[Question], int]:
    """The questions of a task, and how many records its data hold. Raises UserError, with file and line, for a record that
    is none.
    """
    assert task.data is not None
    records = list(read_records(task.data))
    total = len(records)
    if not records:
        raise UserError(f"{FLAG} {without_secrets(task.data)}: has no records")
    if task.limit is not None and task.limit < total:
        records = [records[i] for i in (np.arange(task.limit) * total // task.limit).tolist()]
    shots = solved(task)
    facets = list(dict.fromkeys(task.facets))
    if "difficulty" not in facets and all("difficulty" in record for _, record in records):
        facets.append("difficulty")
    made = []
    for place, record in records:
        prompt, response, expected = reading(task, record, place)
        if task.shots_by is not None and shots:
            examples = shots.get(str(field(record, task.shots_by, place)), [])
        else:
            examples = shots.get("", [])
        prompt = frame.around("".join(f"{example}\n\n" for example in examples) + prompt)
        made.append(Question(prompt, response, expected, {name: field(record, name, place) for name in facets}, place))
    return made, total


def solved(task: RecordTask) -> dict[str, list[str]]:
    """The solved examples, by the value of `shots_by`, which is "" where they are the same for all questions."""
    found: dict[str, list[str]] = defaultdict(list)
    if not (task.shots and task.shots_data):
        return found
    for place, record in read_records(task.shots_data):
        group = found[str(field(record, task.shots_by, place)) if task.shots_by else ""]
        if len(group) < task.shots:
            prompt, response, _ = reading(task, record, place)
            group.append(f"{prompt} {response}")
    return found


def reading(task: RecordTask, record: dict[str, Any], place: str) -> tuple[str, str, Expected]:
    """A record's prompt without examples, its response, and what is right."""
    if task.options is None:
        prompt = filled(task.prompt, record, place)
        answers = [answer for name in task.answers for answer in alternatives(field(record, name))]
        if task.answers and not answers:
            raise UserError(f"{place}: no answer in {' or '.join(map(repr, task.answers))}")
        response = ", ".join(answers[0]) if answers else filled(task.response, record, place)
        return prompt, response, Expected(tuple(answers) or ((response,),))
    texts = [text.strip() for text in listed(task.options, record, place)]
    letters = string.ascii_uppercase[: len(texts)]
    said = str(field(record, task.answer, place)).strip()
    labels = (
        [[str(label).casefold() for label in listed(task.labels, record, place)]] if task.labels is not None else []
    )
    for names in labels or [[str(i) for i in range(len(texts))], list(letters.lower())]:
        if said.casefold() in names:
            letter = letters[names.index(said.casefold())]
            break
    else:
        raise UserError(f"{place}: the answer {said!r} is none of the {len(texts)} options")
    lines = "\n".join(f"{letter}. {text}" for letter, text in zip(letters, texts, strict=True))
    return filled(task.prompt, record | {"options": lines}, place), letter, Expected(((letter,),), tuple(texts))


def listed(source: str | Sequence[Any], record: dict[str, Any], place: str) -> list[Any]:
    """A list that a field holds, or that is written out; of the latter, texts with braces are templates."""
    if isinstance(source, str):
        values = field(record, source, place)
        if not isinstance(values, list | tuple) or not 2 <= len(values) <= 26:
            raise UserError(f"{place}: {source!r} is no list of 2 to 26 options")
        return [str(value) for value in values]
    return [filled(text, record, place) if isinstance(text, str) and "{" in text else str(text) for text in source]


def filled(template: str, record: dict[str, Any], place: str) -> str:
    try:
        return fill_template(parse_mapping(FLAG, template), record)
    except Missing as missing:
        raise UserError(f"{place}: {missing}; it has {', '.join(map(repr, record))}") from None


def field(record: dict[str, Any], name: str, place: str | None = None) -> Any:
    """What a record holds at a dotted path, of any type. Where that is missing: None, or with a place UserError."""
    value: Any = record
    for step in [name] if name in record else name.split("."):
        value = value.get(step) if isinstance(value, dict) else None
    if value is None and place is not None:
        raise UserError(f"{place}: no field {name!r}; it has {', '.join(map(repr, record))}")
    return value


def read_records(location: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each record of a file, of a folder's files, or of a URI, with its place. Raises UserError where one cannot be read."""
    for piece, _ in find_files([location], FLAG):
        for number, record in read_piece(piece):
            place = f"{piece.path}:{number}"
            if not isinstance(record, dict):
                raise UserError(f"{place}: a record is an object with fields, not {type(record).__name__}")
            yield place, record


def read_piece(piece: Piece) -> Iterator[tuple[int, Any]]:
    """The records of a whole file, numbered by line, or in Parquet by row."""
    if piece.format == "parquet":
        try:
            with open_file(piece) as file:
                rows = pq.read_table(file).to_pylist()
        except UNREADABLE as error:
            raise_if_storage(error, piece)
            raise UserError(f"{piece.path}: cannot be read: {one_line(error)}") from None
        yield from enumerate(rows, start=1)
    elif piece.format == "csv":
        rows = csv.DictReader(
            (f"{line}\n" for _, line in lines(piece)), delimiter="\t" if ".tsv" in piece.path.lower() else ","
        )
        for row in rows:
            yield rows.line_num, row
    elif piece.format == "jsonl":
        for number, line in lines(piece):
            if line and not line.isspace():
                try:
                    yield number, parse_json(line)
                except ValueError as error:
                    raise UserError(f"{piece.path}:{number}: not JSON: {one_line(error)}") from None
    else:
        raise UserError(f"{FLAG} {piece.path}: records come from JSONL, Parquet and CSV, not from {piece.format}")


def lines(piece: Piece) -> Iterator[tuple[int, str]]:
    for item in read_lines(piece):
        if isinstance(item, Problem):
            raise UserError(f"{piece.path}:{item.position}: {item.reason}")
        if not isinstance(item, End):
            yield item
