"""Folders and URIs: everything that is read or written may be on a local disk or in object storage."""

import errno
import os
import random
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import sleep
from typing import Any, TypeVar

import pyarrow.fs

from hrm_lm.errors import StorageError, UserError
from hrm_lm.parsing import is_text, one_line, short

T = TypeVar("T")

PATIENCE = 600.0
"""Seconds that `retrying` waits in all for storage that is away or full."""
LONGEST_WAIT = 60.0

IN_VAIN = {
    *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG),
    *(errno.ELOOP, errno.ENXIO, errno.ENODEV),
}
"""Errors of a file system that another try does not mend. A full disk is not among them: somebody empties it."""
# The names that object storage gives such errors, as pyarrow quotes them; S3's, and those of Google's status codes. And
# what pyarrow says of a folder in a file's place.
REFUSED = re.compile(
    r"ACCESS_DENIED|NO_SUCH_BUCKET|NO_SUCH_KEY|RESOURCE_NOT_FOUND|INVALID_ACCESS_KEY_ID|INVALID_CLIENT_TOKEN_ID"
    r"|UNRECOGNIZED_CLIENT|SIGNATURE_DOES_NOT_MATCH|MISSING_AUTHENTICATION_TOKEN|HTTP status 30\d"
    r"|PERMISSION_DENIED|UNAUTHENTICATED|Bucket '.*' not found|is a directory$"
)


def resolve(location: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """File system and path of a folder or URI; raises UserError where there is no such file system."""
    if not is_text(location):
        raise UserError(f"{short(location)}: not a path: it has half a character or a zero byte")
    if "://" not in location:  # os.path leaves ~nobody as it is, for which Path raises
        return pyarrow.fs.LocalFileSystem(), str(Path(os.path.expanduser(location)).absolute())
    try:
        fs, path = pyarrow.fs.FileSystem.from_uri(location)
    except OSError as error:  # a bucket's region is asked for over the network
        raise storage_error(without_secrets(location), error) from None
    except pyarrow.ArrowException as error:
        raise UserError(f"{without_secrets(location)}: {one_line(without_secrets(str(error)))}") from None
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
    """A file's bytes. Raises OSError, also for a folder, and for a pipe or a device, which may have no end."""
    if isinstance(fs, pyarrow.fs.LocalFileSystem) and os.path.exists(path) and not os.path.isfile(path):
        raise IsADirectoryError("not a file")
    with fs.open_input_file(path) as file:  # unlike a stream, it is never decompressed for its name
        return file.read()


def read_text(fs: pyarrow.fs.FileSystem, path: str) -> str:
    """A file's text. Raises OSError, and UnicodeDecodeError where it is no UTF-8."""
    return read_bytes(fs, path).decode("utf-8")


def write_text(fs: pyarrow.fs.FileSystem, path: str, text: str) -> None:
    """Writes a file, in a folder that need not be there. Raises OSError."""
    fs.create_dir(path.rpartition("/")[0], recursive=True)
    with fs.open_output_stream(path, compression=None) as stream:
        stream.write(text.encode())


def reason(error: OSError) -> str:
    """Why a file could not be read or written, in a line."""
    return os.strerror(error.errno) if error.errno else one_line(error) or type(error).__name__


def is_permanent(error: OSError) -> bool:
    """Whether another try is in vain: the file or bucket is missing, or access to it is not allowed."""
    missing_or_refused = FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError
    return isinstance(error, missing_or_refused) or error.errno in IN_VAIN or bool(REFUSED.search(str(error)))


def storage_error(what: str, error: OSError) -> UserError:
    """`what` and the reason. A StorageError, unless another try is in vain."""
    return (UserError if is_permanent(error) else StorageError)(f"{what}: {reason(error)}")


def retrying(what: str, action: Callable[[], T]) -> T:
    """What `action()` returns, which is called again after an OSError that may pass: storage is away, a disk is full.

    Waits grow from a second to LONGEST_WAIT, shortened at random lest all workers come back at once, and each wait is
    told on standard error. what: what failed, for that line ("s3://bucket/run: cannot be written").
    Raises the last OSError after waits of PATIENCE in all, and at once where another try is in vain.
    """
    wait, waited = 1.0, 0.0
    while True:
        try:
            return action()
        except OSError as error:
            if is_permanent(error) or waited >= PATIENCE:
                raise
            pause = wait * random.SystemRandom().uniform(0.5, 1)
            print(f"{what}: {reason(error)}; next try in {pause:.0f} s", file=sys.stderr, flush=True)
        sleep(pause)
        waited += pause
        wait = min(2 * wait, LONGEST_WAIT)


@contextmanager
def local_copy(location: str, fs: pyarrow.fs.FileSystem | None = None) -> Iterator[Path]:
    """A folder as a local folder. Where it is elsewhere, it is downloaded for the time being.

    location: a folder or URI, or with `fs` a path in it. Storage that is away is waited for (`retrying`). Raises
    UserError where the folder cannot be downloaded.
    """
    if fs is None:
        fs, location = resolve(location)
    if isinstance(fs, pyarrow.fs.LocalFileSystem):
        yield Path(location)
        return
    with tempfile.TemporaryDirectory(prefix="hrm_lm_") as folder:
        what = f"{shown(fs, location)}: cannot be read"

        def download() -> None:
            if fs.get_file_info(location).type != pyarrow.fs.FileType.Directory:
                raise UserError(f"{shown(fs, location)}: no such folder")
            here = pyarrow.fs.LocalFileSystem()
            pyarrow.fs.copy_files(location, folder, source_filesystem=fs, destination_filesystem=here)

        try:
            retrying(what, download)
        except OSError as error:
            raise storage_error(what, error) from None
        yield Path(folder)


def outlasting(what: str, action: Callable[[], T]) -> T:
    """`retrying`, whose last error is a UserError (`storage_error`)."""
    try:
        return retrying(what, action)
    except OSError as error:
        raise storage_error(what, error) from None
