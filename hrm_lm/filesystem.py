"""Folders and URIs: everything that is read or written may be on a local disk or in object storage."""

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
        raise UserError(without_secrets(f"{location}: {one_line(error)}")) from None
    return fs, path.rstrip("/")


KEYS = re.compile(r"(?<=://)(?:[^/?\s]*|[^/?:\s]*:\S*)@")
"""What stands before the host of a URI. With a slash or a question mark in a key the URI is invalid, and the key is still
not for everybody's eyes.
"""
OPTIONS = re.compile(r"(://[^?]*)\?[^\s'\"]*")
PUBLIC_OPTIONS = {
    *(
        "region",
        "scheme",
        "endpoint_override",
        "allow_bucket_creation",
        "allow_bucket_deletion",
        "tls_verify_certificates",
    ),
    *("project_id", "retry_limit_seconds", "replication", "blob_storage_authority", "dfs_storage_authority"),
    *("blob_storage_scheme", "dfs_storage_scheme", "enable_tls", "credential_kind", "tenant_id", "client_id"),
}
"""Options of a URI that say where the storage is and how to talk to it. Any other option may be a secret."""


def without_secrets(text: str) -> str:
    """A folder or URI for messages, or a message: URIs may carry keys and options, which are nobody's business."""
    return OPTIONS.sub(r"\1", KEYS.sub("", text))


def without_keys(value: Any) -> Any:
    """A config's values, nested or not, for files. A URI loses its keys and keeps PUBLIC_OPTIONS: it leads to the same
    place, for whoever has keys.
    """
    if isinstance(value, dict):
        return {key: without_keys(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_keys(inner) for inner in value]
    if not isinstance(value, str) or "://" not in value:
        return value

    def user(keys: re.Match[str]) -> str:
        name = keys[0].removesuffix("@").partition(":")[0]
        return f"{name}@" if name and not value.startswith("s3:") else ""  # of Azure, it is an account or a container

    place, _, options = KEYS.sub(user, value, count=1).partition("?")
    public = [item for item in options.split("&") if item.partition("=")[0] in PUBLIC_OPTIONS and "@" not in item]
    return place + ("?" + "&".join(public) if public else "")


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
