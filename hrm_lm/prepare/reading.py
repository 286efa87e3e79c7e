"""Files to pairs of texts: which files there are, how they are cut into parts, how a part is read. No Ray in here.

A part is what one task reads and what one shard holds. Reading a part is a pure function of its bytes, so a part can be
read twice, or again after a kill, and gives the same pairs in the same order. Where something cannot be read, a
`Problem` takes its place and reading goes on behind it.
"""

import csv
import gzip
import hashlib
import io
import itertools
import json
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import pyarrow
import pyarrow.fs
import pyarrow.parquet as pq

from hrm_lm.data.chat import Chat
from hrm_lm.data.hub import CORRUPT, PREFIX, READ_TOGETHER, HubDataset, records
from hrm_lm.data.records import Fields, Missing, Template, fill_template
from hrm_lm.errors import UserError
from hrm_lm.filesystem import resolve, retrying, shown, without_secrets
from hrm_lm.parsing import one_line, parse_json

FORMATS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".txt": "text",
}  # fmt: skip
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".lz4": "lz4"}
MAX_RECORD = 1 << 20
"""Bytes of the longest line or pair that is read; a longer line or pair is a fault of its file."""
BLOCK = 1 << 18
"""Bytes that are read at once."""
UNREADABLE = (OSError, EOFError, zlib.error, pyarrow.ArrowException)
"""What a damaged file raises."""
STORAGE_SAYS = ("AWS Error", "google::cloud", "Azure")
"""What the message of a fault of the storage contains."""


class Tags(NamedTuple):
    """What stands in a prompt beside what the record says: the texts of its tags."""

    condition: Template
    """The tags of a record, with commas between them."""
    texts: dict[str, str]
    """The text of each tag that there may be."""
    prompt: Template
    """Of `condition`, the texts of the tags one after another, and of `prompt`."""

    def named(self, record: Any) -> list[str]:
        """The tags of a record. Raises Missing."""
        tags = [tag.strip() for tag in fill_template(self.condition, record).split(",") if tag.strip()]
        if unknown := [tag for tag in tags if tag not in self.texts]:
            raise Missing("no such condition", f"{unknown[0][:60]!r}; there are {', '.join(self.texts)}")
        return tags

    def applied(self, record: Any, prompt: str) -> str:
        """The prompt as it is trained on. Raises Missing."""
        return fill_template(
            self.prompt, {"condition": "".join(self.texts[tag] for tag in self.named(record)), "prompt": prompt}
        )


class Mapping(NamedTuple):
    """Where a record has its prompt and its response."""

    prompt: str
    """A field (`question`, `data.question`, `turns.0.text`) or a template (`{question}\\nContext: {context}`)."""
    response: str
    text_prompt_chars: int = 400
    """Characters of a prompt that is cut out of plain text."""
    text_response_chars: int = 100
    """Characters of the continuation of such a prompt."""
    chat: Chat = Chat()
    """How conversations are written."""
    tags: Tags | None = None
    """What is put before prompts, if anything is."""


class Piece(NamedTuple):
    """A stretch of a file: the lines that begin in bytes [start, stop), or the row groups [start, stop) of Parquet.

    stop -1: to the end of the file. Of a `datasets.Dataset` (format `hub`, whose path is its name) they are rows.
    """

    fs: pyarrow.fs.FileSystem
    path: str
    format: str
    compression: str | None
    num_bytes: int
    start: int = 0
    stop: int = -1
    source: int = 0
    """The number of the source that the file belongs to."""


class Pair(NamedTuple):
    prompt: str
    response: str
    position: int
    """The line, counted from 1 at the piece's start; of a table the row, counted from 1 at the table's start."""
    origin: str
    """What decides whether the pair is held out: its prompt without tags, and of a conversation the first prompt."""


class Problem(NamedTuple):
    reason: str
    position: int
    text: str = ""
    """What the file has there, for the report."""
    lost: int = 1
    """How many records are lost."""


class End(NamedTuple):
    """The last item of a piece that is read by lines."""

    lines: int
    """How many lines begin in the piece."""


# --- which files, in which parts ---------------------------------------------------------------------------------


def find_files(locations: list[str], flag: str = "--input") -> list[tuple[Piece, int]]:
    """Finds every file of the given files, folders, URIs and `hf:` datasets.

    Returns each file as a whole piece with its modification time (ns); a folder's files come in order of their path.
    Raises UserError, naming the flag, where a location cannot be read or has no file of a known format.
    """
    found = {}
    for location in locations:
        if location.startswith(PREFIX):
            piece, version = find_table(location, flag)
            found[piece.path] = (piece, version)
            continue
        fs, path = resolve(location)
        place = without_secrets(location)
        what = f"{flag} {place}: cannot be read"
        try:
            info = retrying(what, partial(fs.get_file_info, path))
            if info.type == pyarrow.fs.FileType.File:
                infos = [info]
                if file_format(path) is None:
                    raise UserError(
                        f"{flag} {place}: not a kind of file that is read: {', '.join(FORMATS)}, compressed or not"
                    )
            elif info.type == pyarrow.fs.FileType.Directory:
                infos = retrying(what, partial(fs.get_file_info, pyarrow.fs.FileSelector(path, recursive=True)))
                infos = [i for i in infos if i.type == pyarrow.fs.FileType.File and file_format(i.path)]
                if not infos:
                    raise UserError(f"{flag} {place}: no {', '.join(FORMATS)} file in it, compressed or not")
            else:
                raise UserError(f"{flag} {place}: does not exist")
        except OSError as error:
            raise UserError(f"{what}: {one_line(error)}") from None
        for i in sorted(infos, key=lambda i: i.path):
            if kind := file_format(i.path):
                found[i.path] = (Piece(fs, i.path, *kind, i.size), i.mtime_ns or 0)
    return list(found.values())


def find_table(location: str, flag: str) -> tuple[Piece, int]:
    """An `hf:` dataset as a whole piece, and a number that is another one where its content is."""
    name = HubDataset.parse(location, flag)
    if name.val_split:
        raise UserError(f"{flag} {location}: prepare holds out by itself; name a single split")
    table = name.load(name.split, flag)
    # Datasets have no public name for their content; files and options make this one.
    version = int.from_bytes(hashlib.blake2b(table._fingerprint.encode(), digest_size=8).digest(), "big")
    return Piece(pyarrow.fs.LocalFileSystem(), str(name), "hub", None, table.data.nbytes, 0, len(table)), version


def file_format(path: str) -> tuple[str, str | None] | None:
    """Format and compression by the name's endings; None where the format is not known."""
    *_, outer, inner = ["", "", *PurePosixPath(path.lower()).suffixes]
    compression = COMPRESSIONS.get(inner)
    form = FORMATS.get(outer if compression else inner)
    return (form, compression) if form and not (form == "parquet" and compression) else None


def plan_parts(files: list[Piece], part_bytes: int) -> list[list[Piece]]:
    """Cuts large files where that can be done and puts small files of a source together.

    Returns parts of about `part_bytes`, in the order of the files.
    """
    parts: list[list[Piece]] = [[]]
    size = 0
    for file in files:
        for piece in cut(file, part_bytes):
            if parts[-1] and (size + piece.num_bytes > part_bytes or parts[-1][-1].source != piece.source):
                parts.append([])
                size = 0
            parts[-1].append(piece)
            size += piece.num_bytes
    return parts


def cut(file: Piece, part_bytes: int) -> list[Piece]:
    """Pieces of about `part_bytes`. A compressed file and a CSV file, whose quotes may hold line ends, stay whole."""
    if file.num_bytes <= part_bytes or file.compression or file.format == "csv":
        return [file]
    if file.format == "hub":
        count = min(-(-file.num_bytes // part_bytes), file.stop)
        borders = [file.stop * i // count for i in range(count + 1)]
        return [
            file._replace(num_bytes=file.num_bytes // count, start=a, stop=b) for a, b in itertools.pairwise(borders)
        ]
    if file.format == "parquet":
        try:
            with open_file(file) as stream:
                metadata = pq.ParquetFile(stream).metadata
                sizes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
        except UNREADABLE:
            return [file]  # whoever reads the file will find what is wrong with it
        pieces, start = [], 0
        for i in range(len(sizes)):
            if i + 1 == len(sizes) or sum(sizes[start : i + 2]) > part_bytes:
                share = file.num_bytes * sum(sizes[start : i + 1]) // max(sum(sizes), 1)
                pieces.append(file._replace(num_bytes=share, start=start, stop=i + 1))
                start = i + 1
        return pieces
    borders = [*range(0, file.num_bytes, part_bytes), file.num_bytes]
    return [file._replace(num_bytes=b - a, start=a, stop=b) for a, b in itertools.pairwise(borders)]


# --- records to pairs --------------------------------------------------------------------------------------------


def read_piece(piece: Piece, mapping: Mapping) -> Iterator[Pair | Problem | End]:
    """Yields what a piece holds, in order. A piece that is read by lines ends with an End."""
    if not piece.num_bytes:
        yield Problem("the file is empty", 0)
        return
    fields = Fields.of(mapping.prompt, mapping.response, mapping.chat, "--")
    items: Iterator[Any]
    if piece.format in ("parquet", "hub"):
        others = mapping.tags.condition if mapping.tags else ()
        read = read_parquet if piece.format == "parquet" else read_table
        items = read(piece, lambda schema: fields.columns(schema, others))
    elif piece.format == "text":
        items = read_text(piece, mapping)
    else:
        items = {"jsonl": read_jsonl, "csv": read_csv}[piece.format](piece)
    for item in items:
        if isinstance(item, (Problem, End)):
            yield item
            continue
        position, record = item
        try:
            pairs = [record] if piece.format == "text" else fields.pairs(record)
            for prompt, response in pairs:
                whole = mapping.tags.applied(record, prompt) if mapping.tags else prompt
                if not prompt:
                    yield Problem("the prompt is empty", position, excerpt(record))
                elif len(whole) + len(response) > MAX_RECORD:
                    yield Problem(f"longer than {MAX_RECORD:,} bytes", position, whole[:80])
                else:
                    yield Pair(whole, response, position, pairs[0][0])
        except Missing as missing:
            yield Problem(missing.reason, position, missing.detail or excerpt(record))


def excerpt(record: Any) -> str:
    text = record if isinstance(record, str) else json.dumps(record, ensure_ascii=True, default=str)
    return text[:80]


# --- formats -----------------------------------------------------------------------------------------------------


def read_lines(piece: Piece) -> Iterator[tuple[int, str] | Problem | End]:
    """Yields each line that begins in the piece, decoded from UTF-8 and without its end, with its number from 1.

    The last line may reach into the next piece. That piece begins with the first line that begins in it.
    """
    number, rest, skipping = 0, b"", False
    offset = piece.start  # where `rest` begins in the file
    try:
        with open_stream(piece) as stream:
            read = getattr(stream, "read1", stream.read)  # gzip's `read` would lose the text before a fault
            if piece.start:
                stream.seek(piece.start - 1)
                while (block := read(BLOCK)) and b"\n" not in block:
                    offset += len(block)
                before, _, rest = block.partition(b"\n")
                offset += len(before)
            while True:
                block = read(BLOCK)
                *lines, rest = (rest + block).split(b"\n")
                if not block and rest:  # the last line has no end
                    lines, rest = [*lines, rest], b""
                for line in lines:
                    if 0 <= piece.stop <= offset and not skipping:
                        yield End(number)
                        return
                    number += 1
                    offset += len(line) + 1
                    if skipping or len(line) > MAX_RECORD:
                        skipping = False
                        yield Problem(f"longer than {MAX_RECORD:,} bytes", number, line[:80].decode(errors="replace"))
                        continue
                    if number == 1 and not piece.start:
                        line = line.removeprefix(b"\xef\xbb\xbf")
                    try:
                        yield number, line.decode()
                    except UnicodeDecodeError:
                        yield Problem("not UTF-8 text", number, line[:80].decode(errors="replace"))
                if not block:
                    if skipping:
                        number += 1
                        yield Problem(f"longer than {MAX_RECORD:,} bytes", number)
                    yield End(number)
                    return
                if len(rest) > MAX_RECORD:
                    skipping, offset, rest = True, offset + len(rest), b""
    except UNREADABLE as error:
        raise_if_storage(error, piece)
        yield Problem("unreadable from here on", number + 1, one_line(error))
        yield End(number)


def raise_if_storage(error: Exception, piece: Piece) -> None:
    """Raises UserError where the storage failed and not the file.

    A storage that fails today may work tomorrow, so the file's pairs must not be counted as damaged and left out.
    """
    message = str(error)
    if getattr(error, "errno", None) or any(name in message for name in STORAGE_SAYS):
        raise UserError(f"{piece.path}: cannot be read: {one_line(message)}") from None


def open_stream(piece: Piece):
    """The file of a piece, decompressed."""
    if piece.compression == "gzip":  # where a file is cut, pyarrow's reader would lose up to a block before the cut
        return gzip.GzipFile(fileobj=open_file(piece))
    if piece.compression:
        return pyarrow.CompressedInputStream(open_file(piece), piece.compression)
    return open_file(piece)


def open_file(piece: Piece):
    """The file of a piece as it is stored."""
    if isinstance(piece.fs, pyarrow.fs.LocalFileSystem):
        return piece.fs.open_input_file(piece.path)
    return io.BufferedReader(RemoteFile(piece), BLOCK)


class RemoteFile(io.RawIOBase):
    """A file of object storage. A read that fails is made again where that may help, and alone: what came before stays."""

    def __init__(self, piece: Piece):
        self.what = f"{shown(piece.fs, piece.path)}: cannot be read"
        self.file = retrying(self.what, lambda: piece.fs.open_input_file(piece.path))
        self.place, self.size = 0, retrying(self.what, self.file.size)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.size}[whence]
        return self.place

    def readinto(self, buffer: Any) -> int:
        wanted = max(min(len(buffer), self.size - self.place), 0)
        block = retrying(self.what, lambda: self.file.read_at(wanted, self.place))
        buffer[: len(block)] = block
        self.place += len(block)
        return len(block)


def read_jsonl(piece: Piece) -> Iterator[tuple[int, Any] | Problem | End]:
    for item in read_lines(piece):
        if isinstance(item, (Problem, End)):
            yield item
        elif item[1] and not item[1].isspace():
            yield parse_line(*item)


def parse_line(number: int, line: str) -> tuple[int, Any] | Problem:
    """The record of a line of JSONL, with the line's number."""
    try:
        return number, parse_json(line)
    except ValueError:
        return Problem("not JSON", number, line[:80])


def read_csv(piece: Piece) -> Iterator[tuple[int, Any] | Problem | End]:
    csv.field_size_limit(MAX_RECORD)
    problems, number = [], 0

    def lines() -> Iterator[str]:
        nonlocal number
        for item in read_lines(piece):
            if isinstance(item, (Problem, End)):
                problems.append(item)
            else:
                number = item[0]
                yield item[1] + "\n"

    rows = csv.reader(lines(), delimiter="\t" if ".tsv" in piece.path.lower() else ",")
    header = None
    while True:
        first = number + 1
        try:
            row = next(rows, None)
        except csv.Error as error:
            row = []
            yield Problem("not CSV", first, str(error))
        yield from problems
        problems.clear()
        if row is None:
            return
        if not row:
            continue
        if header is None:
            header = row
        elif len(row) > len(header):
            yield Problem("more fields than the header", first, excerpt(row))
        else:
            yield first, dict(zip(header, row))


def read_parquet(
    piece: Piece, columns_of: Callable[[pyarrow.Schema], list[str]]
) -> Iterator[tuple[int, Any] | Problem]:
    """columns_of: the columns to read; raises Missing where one of them lacks."""
    for item in read_batches(piece, columns_of):
        if isinstance(item, Problem):
            yield item
        else:
            for row, record in enumerate(records_of(item[1]), start=item[0]):
                yield record._replace(position=row) if isinstance(record, Problem) else (row, record)


def read_batches(
    piece: Piece, columns_of: Callable[[pyarrow.Schema], list[str]]
) -> Iterator[tuple[int, pyarrow.RecordBatch] | Problem]:
    """Rows together, with the number of the first of them."""
    row = 0
    try:
        with open_file(piece) as stream:
            file = pq.ParquetFile(stream)
            groups = range(piece.start, piece.stop if piece.stop >= 0 else file.metadata.num_row_groups)
            row = sum(file.metadata.row_group(i).num_rows for i in range(piece.start))
            try:
                columns = columns_of(file.schema_arrow)
            except Missing as missing:
                yield from no_row(missing, row, sum(file.metadata.row_group(i).num_rows for i in groups))
                return
            for batch in file.iter_batches(1024, row_groups=groups, columns=columns):
                yield row + 1, batch
                row += len(batch)
    except UNREADABLE as error:
        raise_if_storage(error, piece)
        yield Problem("unreadable from here on", row + 1, one_line(error))


def records_of(batch: pyarrow.RecordBatch | pyarrow.Table) -> Iterator[dict[str, Any] | Problem]:
    """Each row. A Problem takes the place of a row that Python has no values for."""
    try:
        yield from batch.to_pylist()
    except (ValueError, OverflowError):
        for i in range(batch.num_rows):
            try:
                yield batch.slice(i, 1).to_pylist()[0]
            except (ValueError, OverflowError) as error:
                yield Problem("not UTF-8 text" if isinstance(error, UnicodeDecodeError) else one_line(error), 0)


def no_row(missing: Missing, row: int, count: int) -> Iterator[Problem]:
    """The problem of `count` rows that begin behind `row`."""
    if count:
        yield Problem(missing.reason, row + 1, f"all {count} rows; {missing.detail}"[:200], count)


def read_table(piece: Piece, columns_of: Callable[[pyarrow.Schema], list[str]]) -> Iterator[tuple[int, Any] | Problem]:
    """Rows of an `hf:` dataset. A node that lacks the dataset fetches it."""
    table = opened_table(piece.path)
    if len(table) < piece.stop:
        raise UserError(f"{piece.path}: changed while it was read; give another --output, or delete what is there")
    try:
        table = table.select_columns(columns_of(table.features.arrow_schema))
    except Missing as missing:
        yield from no_row(missing, piece.start, piece.stop - piece.start)
        return
    for first in range(piece.start, piece.stop, READ_TOGETHER):
        end = min(first + READ_TOGETHER, piece.stop)
        try:
            yield from enumerate(records(table, first, end), start=first + 1)
        except CORRUPT as error:
            yield Problem("unreadable rows", first + 1, one_line(error), end - first)


@lru_cache(maxsize=4)  # for each process: it has many parts of a table
def opened_table(location: str) -> Any:
    name = HubDataset.parse(location, "--input")
    return name.load(name.split, "--input")


def read_text(piece: Piece, mapping: Mapping) -> Iterator[tuple[int, tuple[str, str]] | Problem | End]:
    """Cuts a document at white space into prompts, each with its continuation. No text of the document is left out."""
    whole = mapping.text_prompt_chars + mapping.text_response_chars
    buffer, first, last = "", 1, 1
    for item in read_lines(piece):
        if isinstance(item, (Problem, End)):
            yield item
            continue
        last, line = item
        buffer += line + "\n"
        while len(buffer) > whole + 2:  # what then remains still makes a pair
            middle = cut_at_space(buffer, mapping.text_prompt_chars)
            end = middle + cut_at_space(buffer[middle:], mapping.text_response_chars)
            yield first, (buffer[:middle], buffer[middle:end])
            buffer, first = buffer[end:], last
    buffer = buffer.removesuffix("\n")
    if len(buffer) > 1 and not buffer.isspace():
        middle = cut_at_space(buffer, max(len(buffer) * mapping.text_prompt_chars // whole, 1))
        yield first, (buffer[:middle], buffer[middle:])


def cut_at_space(text: str, limit: int) -> int:
    """Where to cut `text`: at most `limit` characters come before the cut, which is between words where it can be."""
    if len(text) <= limit:
        return len(text)
    return next((end for end in range(limit, 0, -1) if text[end].isspace()), limit)
