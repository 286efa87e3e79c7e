"""The batch: the guide's five tensors, and the one place that makes them."""

from typing import NamedTuple, Sequence

import numpy as np
import torch
from torch import Tensor

from hrm_lm.data.tokenizer import Sample

IGNORE = -100
"""Label of a position that carries no loss."""


class Batch(NamedTuple):
    """B samples, S and T the longest prompt's and response's length; all int64, padded on the right."""

    encoder_ids: Tensor  # (B, S)
    decoder_input_ids: Tensor  # (B, T): BOS + response[:-1]
    labels: Tensor  # (B, T): the response, IGNORE at padding
    encoder_mask: Tensor  # (B, S): 1 where a token is, 0 at padding
    decoder_mask: Tensor  # (B, T)

    def to(self, device: torch.device) -> "Batch":
        """Copied to `device`; from pinned memory the copy is asynchronous."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))

    def pin_memory(self) -> "Batch":
        return Batch(*(tensor.pin_memory() for tensor in self))


def pad_batch(samples: Sequence[Sample], pad_id: int, round_up: bool = False) -> Batch:
    """Pads the samples on the right, each side to its longest, or `round_up` to that one's `padded_length`."""
    prompts, inputs, labels = zip(*samples)
    encoder_ids, encoder_mask = _pad(prompts, pad_id, round_up)
    decoder_input_ids, decoder_mask = _pad(inputs, pad_id, round_up)
    padded_labels, _ = _pad(labels, IGNORE, round_up)
    return Batch(encoder_ids, decoder_input_ids, padded_labels, encoder_mask, decoder_mask)


def pad_ragged(
    ids: np.ndarray, prompt_lens: np.ndarray, response_lens: np.ndarray, pad_id: int, round_up: bool = False
) -> Batch:
    """`pad_batch` for samples that lie one after another: of each its prompt, BOS and response, in `ids` (total,).

    prompt_lens, response_lens: (B,) int64, BOS not counted.
    """
    widths = np.array([prompt_lens.max(), response_lens.max()])
    s, t = padded_length(widths) if round_up else widths
    places, lens = np.arange(max(s, t + 1), dtype=np.int32), np.stack([prompt_lens, response_lens + 1]).astype(np.int32)
    mask = np.concatenate([places[:s] < lens[0, :, None], places[: t + 1] < lens[1, :, None]], axis=1)  # (B, S + 1 + T)
    packed = np.full(mask.shape, pad_id, dtype=ids.dtype)
    packed[mask] = ids  # row-major, as they lie
    rows, ones = packed.astype(np.int64), mask.astype(np.int64)
    labels = np.where(mask[:, s + 1 :], rows[:, s + 1 :], IGNORE)
    rows[np.arange(len(rows)), s + response_lens] = pad_id  # the last token is a label alone
    tensors = (rows[:, :s], rows[:, s:-1], labels, ones[:, :s], ones[:, s + 1 :])
    return Batch(*map(torch.from_numpy, tensors))


def padded_length(lengths: np.ndarray) -> np.ndarray:
    """Lengths rounded up to one of few sizes: eight to an octave and multiples of 8, so 32 of them up to 512."""
    step = np.maximum(8, 2 ** np.floor(np.log2(np.maximum(lengths, 1))).astype(np.int64) // 8)
    return -(-lengths // step) * step


def _pad(rows: Sequence[Sequence[int]], fill: int, round_up: bool) -> tuple[Tensor, Tensor]:
    """Returns the rows as (B, width) int64, and where they are (1) and are not (0)."""
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    width = padded_length(lengths.max()) if round_up else lengths.max()
    mask = np.arange(width) < lengths[:, None]
    ids = np.full(mask.shape, fill, dtype=np.int64)
    ids[mask] = np.concatenate(rows)  # row-major, as the mask is read
    return torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))
