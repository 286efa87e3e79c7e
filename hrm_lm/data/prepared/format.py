"""The prepared dataset on disk: token ids, opened and not loaded. `ray_jobs.prepare` writes it.

meta.json           what is there: format version, counts, lengths, shards, each file's size and SHA-256; written last
tokenizer.json
train-00000.bin     token ids, sample after sample: prompt, BOS, response, EOS
train-00000.idx     int64: where each prompt and each response ends in the .bin, after a leading 0
val-00000.bin ...
"""

import numpy as np
import pyarrow.fs

from hrm_lm.filesystem import outlasting, shown

FORMAT_VERSION = 1
META, TOKENIZER = "meta.json", "tokenizer.json"


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned type that holds the vocabulary, little-endian."""
    return np.min_scalar_type(vocab_size - 1).newbyteorder("<")


def write_file(fs: pyarrow.fs.FileSystem, path: str, content: bytes) -> None:
    """Writes all or nothing. A file of object storage appears whole by itself; elsewhere that takes a rename.

    Storage that is away is waited for. Raises UserError where it stays away.
    """
    renames = isinstance(fs, pyarrow.fs.LocalFileSystem)
    written = path + ".partial" if renames else path

    def write() -> None:
        with fs.open_output_stream(written) as file:
            file.write(content)
        if renames:
            fs.move(written, path)

    outlasting(f"{shown(fs, path)}: cannot be written", write)
