"""Storage that is away, full, or closed to the user."""

import errno
import os

import pyarrow.fs
import pytest

from hrm_lm import filesystem
from hrm_lm.errors import StorageError, UserError
from hrm_lm.filesystem import retrying, storage_error


def failing(times: int, error: OSError):
    """An action that fails `times` times, and then gives the number of its calls."""
    calls = []

    def action():
        calls.append(1)
        if len(calls) <= times:
            raise error
        return len(calls)

    return action


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError("When uploading: AWS Error NETWORK_CONNECTION"),
        TimeoutError(),
    ],
)
def test_storage_that_is_away_or_full_is_waited_for_with_growing_waits_and_said(error, waits, capsys):
    assert retrying("s3://b/x: cannot be written", failing(5, error)) == 6
    assert len(waits) == 5 and waits[4] > 2 * waits[1]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5 and lines[0].startswith(
        f"s3://b/x: cannot be written: {filesystem.reason(error)}; next try in"
    )


def test_patience_ends_with_an_error_that_restarts_the_workers(waits):
    with pytest.raises(OSError, match="AWS Error SLOW_DOWN") as caught:
        retrying("x", failing(10**6, OSError("AWS Error SLOW_DOWN")))
    assert type(storage_error("x", caught.value)) is StorageError
    assert filesystem.PATIENCE <= sum(waits) <= filesystem.PATIENCE + filesystem.LONGEST_WAIT


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied"),
        OSError(errno.EROFS, "Read-only file system"),
        OSError("When reading information for key 'x': AWS Error ACCESS_DENIED during HeadObject operation"),
        OSError("When listing: AWS Error NO_SUCH_BUCKET during ListObjectsV2 operation: The specified bucket does not exist"),
        OSError("Bucket 'x' not found. To create buckets, enable the allow_bucket_creation option."),
    ],
)  # fmt: skip
def test_what_no_waiting_mends_fails_at_once(error, waits):
    with pytest.raises(OSError) as caught:
        retrying("x", failing(1, error))
    assert waits == [] and type(storage_error("x", caught.value)) is UserError


def test_a_bucket_that_is_not_there_is_not_waited_for(bucket, waits):
    fs, _ = pyarrow.fs.FileSystem.from_uri(
        bucket("x").replace("allow_bucket_creation=true", "allow_bucket_creation=false")
    )
    for action in (
        lambda: fs.create_dir("nowhere/x"),
        lambda: fs.get_file_info(pyarrow.fs.FileSelector("nowhere/x")),
        lambda: fs.open_output_stream("nowhere/x").close(),
    ):
        with pytest.raises(OSError):
            retrying("x", action)
    assert waits == []


def test_a_folder_or_a_device_in_place_of_a_file_is_not_waited_for(tmp_path, waits):
    fs = pyarrow.fs.LocalFileSystem()
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path, "/dev/zero", tmp_path / "loop", tmp_path / ("x" * 300)):
        with pytest.raises(UserError) as error:
            filesystem.outlasting("x", lambda: filesystem.read_text(fs, str(path)))
        assert not isinstance(error.value, StorageError) and not waits
    with pytest.raises(OSError) as error:  # as a file system says it that is not known to be local
        fs.open_input_file(str(tmp_path))
    assert filesystem.is_permanent(error.value)


@pytest.mark.parametrize("location", ["a\0b", "a\ud800b"])
def test_what_no_path_can_be_is_refused(location):
    with pytest.raises(UserError, match="not a path"):
        filesystem.resolve(location)


def test_the_folder_of_nobody_is_a_path_like_any_other():
    assert filesystem.resolve("~no_such_user/x")[1].endswith("/~no_such_user/x")
