"""The input of `predict` in chunks: consecutive records, which are answered together. No Ray in here.

A chunk is what an actor answers at a time, what a file of the output holds, and what a kill may cost. Its records are a
function of the input and of the first chunk's size, so a chunk that is done stays done, whoever goes on.

One process reads all of the input, in order: what is drawn for a record follows from its number, and compressed files
cannot be cut. It hands lines on as they are, which is quick beside answering them.
"""

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from hrm_lm.errors import UserError
from hrm_lm.parsing import one_line
from hrm_lm.prepare.reading import (
    UNREADABLE,
    End,
    Piece,
    Problem,
    open_file,
    opened_table,
    parse_line,
    raise_if_storage,
    read_batches,
    read_csv,
    read_lines,
    read_parquet,
    read_table,
)

STEPS = 16
"""So many chunks have the first one's size, the next so many have twice that, up to STEPS times that. A short input so
makes work for many workers, and in a long one few batches are a chunk's last, which rows leave and none join."""


def chunk_size(number: int, first: int) -> int:
    return first * min(1 + number // STEPS, STEPS)


class BatchRow(NamedTuple):
    """A row of a Parquet file."""

    batch: pa.RecordBatch
    number: int


Row = str | dict[str, Any] | BatchRow | Problem
"""A record as it is read: a line of JSON, a record of a CSV file, a row of a table; or why it cannot be read."""


class Chunk(NamedTuple):
    number: int
    first: int
    """The number of its first record in the input, from 0."""
    places: list[tuple[int, int]]
    """Of each record: which file it is of, and its line or row there, from 1."""
    rows: list[Row] | bytes
    """The records; for an output in Parquet a table of them, in Arrow's stream format."""
    problems: dict[int, Problem]
    """Of a table's records, those that could not be read. Their rows are null."""
    num_bytes: int
    """What was read of the input since the chunk before that was not done."""
    is_last: bool


def read_chunks(files: list[Piece], first_size: int, schema: pa.Schema | None, done: set[int]) -> Iterator[Chunk]:
    """Yields the chunks of the input that are not `done`. schema: of the records in Parquet; None for JSONL."""
    number = first = told = read = 0
    places: list[tuple[int, int]] = []
    rows: list[Row] = []

    def chunk(is_last: bool) -> Chunk:
        content, problems = (rows, {}) if schema is None else as_table(rows, schema)
        return Chunk(number, first, places, content, problems, read - told, is_last)

    for place, row, until in read_rows(files, as_records=schema is None):
        if len(rows) == chunk_size(number, first_size):
            if number not in done:
                yield chunk(is_last=False)
                told = read
            number, first, places, rows = number + 1, first + len(rows), [], []
        places.append(place)
        rows.append(row)
        read = until
    read = sum(file.num_bytes for file in files)
    if number not in done:
        yield chunk(is_last=True)


def read_rows(files: list[Piece], as_records: bool) -> Iterator[tuple[tuple[int, int], Row, int]]:
    """Yields each record's place, the record, and how much of the input was read then.

    as_records: whether rows of Parquet are wanted as records. Within compressed files and tables it is not known how much
    was read.
    """
    before = 0
    for number, file in enumerate(files):
        share = 0
        for position, row in numbered(read_file(file, as_records)) if file.num_bytes else []:
            if isinstance(row, str):
                if not row or row.isspace():
                    continue
                share += 0 if file.compression else len(row) + 1
            yield (number, position), row, before + share
        before += file.num_bytes


def read_file(file: Piece, as_records: bool) -> Iterator[tuple[int, Row] | Problem | End]:
    """Lines of JSONL as they are, blank ones too."""
    if file.format == "jsonl":
        return read_lines(file)
    if file.format == "csv":
        return read_csv(file)
    if file.format == "hub":
        return read_table(file, all_columns)
    return read_parquet(file, all_columns) if as_records else batch_rows(file)


def all_columns(schema: pa.Schema) -> list[str]:
    return schema.names


def batch_rows(file: Piece) -> Iterator[tuple[int, Row] | Problem]:
    for item in read_batches(file, all_columns):
        if isinstance(item, Problem):
            yield item
        else:
            first, batch = item
            yield from ((first + i, BatchRow(batch, i)) for i in range(len(batch)))


def numbered(items: Iterable[tuple[int, Row] | Problem | End]) -> Iterator[tuple[int, Row]]:
    """Places and rows. A problem is a row, or as many as were lost."""
    for item in items:
        if isinstance(item, Problem):
            yield from ((item.position + i, item) for i in range(item.lost))
        elif not isinstance(item, End):
            yield item


def record_of(row: Any) -> dict[str, Any] | Problem:
    """A line, parsed, where `row` is one."""
    if not isinstance(row, str):
        return row
    item = parse_line(0, row)
    if isinstance(item, Problem):
        return item
    return item[1] if isinstance(item[1], dict) else Problem("not an object", 0, row[:80])


# --- Parquet -----------------------------------------------------------------------------------------------------


def as_table(rows: list[Row], schema: pa.Schema) -> tuple[bytes, dict[int, Problem]]:
    """The records as a table in Arrow's stream format, and why some of them are rows of nulls."""
    problems: dict[int, Problem] = {}
    tables = [schema.empty_table()]
    for batch, group in itertools.groupby(enumerate(rows), key=lambda item: getattr(item[1], "batch", None)):
        numbers, some = zip(*group)
        if batch is not None:
            tables.append(pa.Table.from_batches([batch.slice(some[0].number, len(some))]))
            continue
        records = [record_of(row) for row in some]
        problems |= {number: record for number, record in zip(numbers, records) if isinstance(record, Problem)}
        with refusing("a record"):
            tables.append(pa.Table.from_pylist([{} if isinstance(r, Problem) else r for r in records], schema))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_table(pa.concat_tables(tables, promote_options="permissive"))
    return sink.getvalue().to_pybytes(), problems


@contextmanager
def refusing(what: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
        fault = one_line(error)
        raise UserError(f"--format parquet: {what}: {fault}\n--format jsonl takes all records") from None


def parquet_schema(files: list[Piece]) -> pa.Schema:
    """The columns of a table that holds all records. JSONL and CSV are read for that; tables say it.

    Raises UserError where a field has values that no column holds together.
    """
    schema = pa.schema([])
    for file in files:
        with refusing(file.path):
            for columns in file_columns(file):
                schema = pa.unify_schemas([schema, columns], promote_options="permissive")
            pq.write_table(schema.empty_table(), pa.BufferOutputStream())  # an object without fields cannot be written
    return schema


def file_columns(file: Piece) -> Iterator[pa.Schema]:
    if file.format == "hub":
        yield opened_table(file.path).features.arrow_schema
        return
    if file.format == "parquet":
        try:
            with open_file(file) as stream:
                yield pq.ParquetFile(stream).schema_arrow.remove_metadata()  # it tells libraries of these columns alone
        except UNREADABLE as error:  # whoever reads the file finds what is wrong with it
            raise_if_storage(error, file)
        return
    rows = (row for _, row, _ in read_rows([file], as_records=True))
    while some := list(itertools.islice(rows, 1024)):
        records = [record for row in some if not isinstance(record := record_of(row), Problem)]
        yield pa.schema(list(pa.array(records, pa.struct([]) if not records else None).type))
