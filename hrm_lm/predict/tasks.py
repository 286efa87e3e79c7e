"""What an actor of `predict` does: it answers the records of a chunk and writes them. No Ray in here."""

import base64
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import torch

from hrm_lm.cluster.output import Output
from hrm_lm.config import Cycles
from hrm_lm.data.chat import Chat
from hrm_lm.data.prepared.format import write_file
from hrm_lm.data.records import DEFAULTS, MESSAGES, Fields, Missing
from hrm_lm.data.tokenizer import Tokenizer
from hrm_lm.errors import UserError
from hrm_lm.filesystem import shown
from hrm_lm.models.contract import EvalOptions, LanguageModel
from hrm_lm.models.decoding import generate_ids
from hrm_lm.predict.chunks import Chunk, record_of
from hrm_lm.prepare.reading import Piece, Problem, records_of
from hrm_lm.prepare.tasks import EXAMPLES

REPORT = "_report.json"
"""Whoever reads a folder of tables leaves out files whose names begin so."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the answers, beside the input and the checkpoint."""

    prompt_field: str
    response_field: str
    format: Literal["jsonl", "parquet"]
    n: int
    """Answers to each record."""
    cycles: Cycles
    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float
    seed: int

    @property
    def sampling(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p", "seed")}


@dataclass(frozen=True, kw_only=True)
class Job(Output):
    """What an actor needs to know."""

    WORK, RESULT, HOLDS = ".predict", REPORT, "answers"

    settings: Settings
    files: list[Piece]
    fs: pyarrow.fs.FileSystem
    output: str
    checkpoint: str
    checkpoint_fs: pyarrow.fs.FileSystem
    batch_size: int
    strict: bool
    """Whether the first record that cannot be answered is an error."""
    first_size: int = 1
    """Records of the first chunk."""
    schema: pa.Schema | None = None
    """Of the records, where the output is Parquet."""

    def fields(self, tokenizer: Tokenizer | None = None) -> Fields:
        """Where a record has its prompt. Raises UserError where `prompt_field` is not a template."""
        return Fields.of(self.settings.prompt_field, DEFAULTS[1], Chat.of(tokenizer), "--")

    def place(self, chunk: Chunk, i: int) -> str:
        file, position = chunk.places[i]
        return f"{shown(self.files[file].fs, self.files[file].path)}:{position}"


class Response(NamedTuple):
    text: str
    score: float
    """Mean log-probability of its tokens."""


def answer_chunk(job: Job, model: LanguageModel, tokenizer: Tokenizer, chunk: Chunk) -> dict[str, Any]:
    """Writes a file of the chunk's records with their answers. Returns counts, and which records have none and why.

    Raises UserError where `job.strict` and a record cannot be answered, and where the file cannot be written.
    """
    began = perf_counter()
    settings = job.settings
    records, problems = read_records(job, chunk)
    encoded = encode(job.fields(tokenizer), tokenizer, model.config.max_prompt_len, records, problems)
    if job.strict and problems:
        i = min(problems)
        text = f" ({problems[i].text})" if problems[i].text else ""
        raise UserError(f"{job.place(chunk, i)}: {problems[i].reason}{text}")

    asked = [(i, k) for i in encoded for k in range(settings.n)]
    scores: list[float] = []
    options = EvalOptions(cycles=settings.cycles, batch_size=job.batch_size)
    numbers = [(chunk.first + i) * settings.n + k for i, k in asked]
    try:
        ids = generate_ids(
            model,
            tokenizer,
            [encoded[i] for i, _ in asked],
            options,
            numbers=numbers,
            scores=scores,
            **settings.sampling,
        )
    except torch.OutOfMemoryError:
        raise UserError(
            f"--batch_size {job.batch_size}: too large for the GPU's memory; the same command with a smaller one goes on"
        ) from None
    answers: list[list[Response]] = [[] for _ in records]
    for (i, _), answer, score in zip(asked, ids, scores):
        answers[i].append(Response(tokenizer.decode(answer), round(score, 6)))
    for some in answers:
        some.sort(key=lambda answer: -answer.score)

    own = own_fields(settings, answers, problems)
    name = f"part-{chunk.number:06d}.{settings.format}"
    if isinstance(chunk.rows, bytes):
        content, replaced = parquet(chunk.rows, own)
    else:
        content, replaced = jsonl(records, own)
    write_file(job.fs, f"{job.output}/{name}", content)
    reasons: dict[str, dict[str, Any]] = {}
    for i, problem in sorted(problems.items()):
        drop = reasons.setdefault(problem.reason, {"count": 0, "examples": []})
        drop["count"] += 1
        drop["examples"] += [{"place": job.place(chunk, i), "text": problem.text}][: EXAMPLES - len(drop["examples"])]
    return {
        "records": len(records),
        "answered": len(encoded),
        "replaced": replaced,
        "prompt_tokens": sum(map(len, encoded.values())),
        "tokens": sum(map(len, ids)),
        "seconds": perf_counter() - began,
        "is_last": chunk.is_last,
        "problems": reasons,
    }


def read_records(job: Job, chunk: Chunk) -> tuple[list[dict[str, Any]], dict[int, Problem]]:
    """The records, as far as prompts are made of them, and why some cannot be read; these are empty."""
    if isinstance(chunk.rows, bytes):
        table = pa.ipc.open_stream(chunk.rows).read_all()
        named = {name for _, path in job.fields().prompt if path for name in path[:2]} & set(table.column_names)
        named |= {MESSAGES} & set(table.column_names)
        found = list(records_of(table.select(sorted(named)))) if named else [{}] * len(table)
        problems = dict(chunk.problems)
    else:
        found, problems = [record_of(row) for row in chunk.rows], {}
    problems |= {i: record for i, record in enumerate(found) if isinstance(record, Problem)}
    return [{} if isinstance(record, Problem) else record for record in found], problems


def encode(
    fields: Fields, tokenizer: Tokenizer, longest: int, records: list[dict[str, Any]], problems: dict[int, Problem]
) -> dict[int, list[int]]:
    """The prompts' tokens by the records' numbers. problems: gets the records that have no prompt for this model."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the other cores have actors of their own
    encoded = {}
    for i, record in enumerate(records):
        if i in problems:
            continue
        try:
            ids = tokenizer.encode(fields.prompt_of(record))
        except Missing as missing:
            problems[i] = Problem(missing.reason, 0, missing.detail)
        except UserError as error:
            problems[i] = Problem("the prompt has an unknown character", 0, str(error))
        else:
            if 0 < len(ids) <= longest:
                encoded[i] = ids
            elif ids:
                text = f"{len(ids)} tokens; this model takes {longest}"
                problems[i] = Problem("the prompt has too many tokens", 0, text)
            else:
                problems[i] = Problem("the prompt is empty", 0)
    return encoded


# --- what is written ---------------------------------------------------------------------------------------------


def own_fields(
    settings: Settings, answers: list[list[Response]], problems: dict[int, Problem]
) -> dict[str, tuple[pa.DataType, list[Any]]]:
    """The fields that each record gets, with their types in Parquet. answers: best first, none where there is a problem."""
    name = settings.response_field
    errors = [
        f"{problem.reason}: {problem.text}".removesuffix(": ") if (problem := problems.get(i)) else None
        for i in range(len(answers))
    ]
    fields: dict[str, tuple[pa.DataType, list[Any]]] = {
        name: (pa.string(), [some[0].text if some else None for some in answers]),
        f"{name}_score": (pa.float64(), [some[0].score if some else None for some in answers]),
        f"{name}_error": (pa.string(), errors),
    }
    if settings.n > 1:
        one = pa.struct([("text", pa.string()), ("score", pa.float64())])
        fields[f"{name}s"] = (pa.list_(one), [[answer._asdict() for answer in some] for some in answers])
    return fields


def jsonl(records: list[dict[str, Any]], own: dict[str, tuple[pa.DataType, list[Any]]]) -> tuple[bytes, int]:
    """The records with their own fields, a line each, and how many had one of these."""
    lines = [
        json_line(record | {name: values[i] for name, (_, values) in own.items()}) for i, record in enumerate(records)
    ]
    return b"".join(lines), sum(any(name in record for name in own) for record in records)


def json_line(record: dict[str, Any]) -> bytes:
    text = json.dumps(record, ensure_ascii=False, default=plain)
    with suppress(UnicodeEncodeError):  # half a character, in a field that is no prompt
        if len(text.splitlines()) == 1:  # many who read lines would cut at U+2028 and the like
            return text.encode() + b"\n"
    return json.dumps(record, default=plain).encode() + b"\n"


def plain(value: Any) -> str:
    """What JSON has no type for, such as Parquet's dates and bytes."""
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


def parquet(rows: bytes, own: dict[str, tuple[pa.DataType, list[Any]]]) -> tuple[bytes, int]:
    table = pa.ipc.open_stream(rows).read_all()
    there = [name for name in own if name in table.column_names]
    table = table.drop_columns(there)
    for name, (kind, values) in own.items():
        table = table.append_column(name, pa.array(values, kind))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes(), len(table) if there else 0
