"""A checkpoint's files: written from host memory straight to storage, with a checksum, and checked against it.

The checksum is CRC-32. It finds what storage and transfers do to a file, and zlib computes it several times as fast as
hashlib computes SHA-256 or BLAKE2, so it costs little beside reading.
"""

import json
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow.fs
import torch
from pydantic import ConfigDict, TypeAdapter
from torch import Tensor

from hrm_lm.config import Count
from hrm_lm.errors import DamagedCheckpoint
from hrm_lm.filesystem import retrying, shown, storage_error
from hrm_lm.parsing import one_line, parse_json

CHUNK = 1 << 24
"""Bytes that are written or read at a time."""
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""The names that safetensors has for the dtypes of models and optimizers."""
SIZES = {name: dtype.itemsize for dtype, name in DTYPES.items()}
"""Bytes of a value, by these names."""


RECORDS = TypeAdapter(dict[str, dict[str, Count]], config=ConfigDict(strict=True))


def write_file(fs: pyarrow.fs.FileSystem, path: str, pieces: Sequence[bytes | memoryview]) -> dict[str, int]:
    """Writes a file, and its folder, and returns its record: `size` in bytes and `crc32`.

    Storage that is away or full is waited for. Raises UserError where it cannot be written, StorageError where that may
    pass.
    """

    def attempt() -> dict[str, int]:
        fs.create_dir(path.rpartition("/")[0], recursive=True)
        size = crc32 = 0
        with fs.open_output_stream(path, compression=None) as stream:
            for piece in pieces:
                for start in range(0, len(piece), CHUNK):
                    chunk = piece[start : start + CHUNK]
                    stream.write(chunk)
                    size, crc32 = size + len(chunk), zlib.crc32(chunk, crc32)
        return {"size": size, "crc32": crc32}

    what = f"{shown(fs, path)}: cannot be written"
    try:
        return retrying(what, attempt)
    except OSError as error:
        raise storage_error(what, error) from None


def empty_folder(fs: pyarrow.fs.FileSystem, path: str) -> None:
    """Deletes what is in a folder, if there is one: a kill in mid-upload leaves files there. Raises as `write_file`."""
    what = f"{shown(fs, path)}: cannot be written"
    try:
        retrying(what, lambda: fs.delete_dir_contents(path, missing_dir_ok=True))
    except OSError as error:
        raise storage_error(what, error) from None


def safetensors_pieces(tensors: dict[str, Tensor], offsets: dict[str, list[int]] | None) -> list[bytes | memoryview]:
    """The bytes of a .safetensors file of contiguous CPU tensors, without a copy of them.

    offsets: where the tensors are parts, each part's first index in its tensor, by dimension. They are noted as
    torch.distributed.checkpoint notes them, whose HuggingFaceStorageReader then reads the files of all parts.
    """
    metadata = {"format": "pt"}
    if offsets is not None:
        metadata["DCP_SHARDING_INFO"] = json.dumps({name: {"saved_offsets": offsets[name]} for name in tensors})
    header: dict[str, Any] = {"__metadata__": metadata}
    end, pieces = 0, []
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])):  # so all are aligned
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        pieces.append(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little"), text, *pieces]


def sealed(fields: dict[str, Any]) -> str:
    """The fields as JSON, with a checksum of themselves."""
    return json.dumps({**fields, "crc32": _crc32_of(fields)}, indent=1)


def unsealed(text: str) -> dict[str, Any]:
    """What `sealed` was given, or fields that were never sealed. Raises ValueError where they have changed."""
    fields = parse_json(text)
    if isinstance(fields, dict) and "crc32" in fields and fields.pop("crc32") != _crc32_of(fields):
        raise ValueError("its bytes are not those that were written")
    return fields


def records(fields: Any) -> dict[str, dict[str, int]]:
    """The records of files as a checkpoint has them. Raises ValueError otherwise."""
    found = RECORDS.validate_python(fields)
    if strange := [name for name, record in found.items() if record.keys() != {"size", "crc32"}]:
        raise ValueError(f"the record of {one_line(strange[0])} is not whole")
    return found


def _crc32_of(fields: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(fields, sort_keys=True).encode())


def check_bytes(name: str, record: dict[str, int] | None, chunks: Iterable[bytes]) -> None:
    """Raises DamagedCheckpoint where a file is not what its record says; a file of older checkpoints has no record.

    name: the file's, for the message.
    """
    if record is None:
        return
    size = crc32 = 0
    for chunk in chunks:
        size, crc32 = size + len(chunk), zlib.crc32(chunk, crc32)
    if size != record["size"]:
        raise DamagedCheckpoint(f"{name}: torn or foreign: it has {size} bytes, and was written with {record['size']}")
    if crc32 != record["crc32"]:
        raise DamagedCheckpoint(f"{name}: damaged: its bytes are not those that were written")


def check_file(fs: pyarrow.fs.FileSystem, path: str, record: dict[str, int]) -> None:
    """Reads a file, and raises DamagedCheckpoint where it is not what its record says, StorageError where it cannot."""

    def attempt() -> None:
        with fs.open_input_file(path) as file:
            check_bytes(shown(fs, path), record, iter(lambda: file.read(CHUNK), b""))

    what = f"{shown(fs, path)}: cannot be read"
    try:
        retrying(what, attempt)
    except OSError as error:
        raise storage_error(what, error) from None
