"""Folders and URIs: everything that is read or written may be on a local disk or in object storage."""

from pathlib import Path

import pyarrow.fs

from hrm_lm.errors import UserError


def resolve(location: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """File system and path of a folder or URI; raises UserError where there is no such file system."""
    if "://" not in location:
        return pyarrow.fs.LocalFileSystem(), str(Path(location).expanduser().absolute())
    try:
        fs, path = pyarrow.fs.FileSystem.from_uri(location)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{location}: {' '.join(str(error).split())}") from None
    return fs, path.rstrip("/")


def without_secrets(location: str) -> str:
    """A folder or URI for messages: a URI may carry keys and options, which are nobody's business."""
    scheme, separator, rest = location.rpartition("://")
    return scheme + separator + rest.partition("?")[0].rpartition("@")[2] if separator else location
