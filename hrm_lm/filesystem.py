"""Folders and URIs: everything that is read or written may be on a local disk or in object storage."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.fs

from hrm_lm.errors import StorageError, UserError


def resolve(location: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """File system and path of a folder or URI; raises UserError where there is no such file system."""
    if "://" not in location:
        return pyarrow.fs.LocalFileSystem(), str(Path(location).expanduser().absolute())
    try:
        fs, path = pyarrow.fs.FileSystem.from_uri(location)
    except OSError as error:  # a bucket's region is asked for over the network
        raise storage_error(without_secrets(location), error) from None
    except pyarrow.ArrowException as error:
        raise UserError(f"{without_secrets(location)}: {one_line(error)}") from None
    return fs, path.rstrip("/")


def without_secrets(location: str) -> str:
    """A folder or URI for messages: a URI may carry keys and options, which are nobody's business."""
    scheme, separator, rest = location.rpartition("://")
    return scheme + separator + rest.partition("?")[0].rpartition("@")[2] if separator else location


def shown(fs: pyarrow.fs.FileSystem, path: str) -> str:
    """The path within a file system as a user writes it: a local path, or a URI without keys and options."""
    schemes = {"local": "", "gcs": "gs://", "abfs": "abfss://"}
    return schemes.get(fs.type_name, f"{fs.type_name}://") + path


def read_bytes(fs: pyarrow.fs.FileSystem, path: str) -> bytes:
    """A file's bytes. Raises OSError."""
    with fs.open_input_file(path) as file:  # unlike a stream, it is never decompressed for its name
        return file.read()


def read_text(fs: pyarrow.fs.FileSystem, path: str) -> str:
    """A file's text. Raises OSError, and UnicodeDecodeError where it is no UTF-8."""
    return read_bytes(fs, path).decode("utf-8")


def reason(error: OSError) -> str:
    """Why a file could not be read or written, in a line."""
    return os.strerror(error.errno) if error.errno else one_line(error)


def storage_error(what: str, error: OSError) -> UserError:
    """`what` and the reason. A StorageError, unless another try is in vain: the file is missing or not allowed."""
    permanent = isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError)
    return (UserError if permanent else StorageError)(f"{what}: {reason(error)}")


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


@contextmanager
def local_copy(location: str, fs: pyarrow.fs.FileSystem | None = None) -> Iterator[Path]:
    """A folder as a local folder. Where it is elsewhere, it is downloaded for the time being.

    location: a folder or URI, or with `fs` a path in it. Raises UserError where it cannot be downloaded.
    """
    if fs is None:
        fs, location = resolve(location)
    if isinstance(fs, pyarrow.fs.LocalFileSystem):
        yield Path(location)
        return
    with tempfile.TemporaryDirectory(prefix="hrm_lm_") as folder:
        try:
            if fs.get_file_info(location).type != pyarrow.fs.FileType.Directory:
                raise UserError(f"{shown(fs, location)}: no such folder")
            here = pyarrow.fs.LocalFileSystem()
            pyarrow.fs.copy_files(location, folder, source_filesystem=fs, destination_filesystem=here)
        except OSError as error:
            raise storage_error(f"{shown(fs, location)}: cannot be read", error) from None
        yield Path(folder)
