"""Samples to a batch: the one place where BOS, EOS, labels and padding are made.

The model says which layout it wants (`LanguageModel.collate`). `Batch` is the guide's: prompts and responses apart, in
five tensors. `TokenRows` is a single token stream of prompt and response, which a decoder-only model reads, or of the prompt
alone, in whose places a puzzle is answered (`in_place`). Samples stand in rows of their own (`pad`, `join`), or they are packed: they lie end to end in a row (`pack`), or in two
rows, one of prompts and one of responses (`pack_apart`, which makes a `PackedBatch`).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from hrm_lm.data.splits import Ragged, Sample
from hrm_lm.errors import UserError

IGNORE = -100
"""Label of a position that carries no loss."""


class SpecialTokens(Protocol):
    """A tokenizer, as far as batches go."""

    pad_id: int
    bos_id: int
    eos_id: int


class Batch(NamedTuple):
    """B samples, S and T the longest prompt's and response's length; all int64, padded on the right."""

    encoder_ids: Tensor  # (B, S)
    decoder_input_ids: Tensor  # (B, T): BOS + response[:-1]
    labels: Tensor  # (B, T): the response, IGNORE at padding
    encoder_mask: Tensor  # (B, S): 1 where a token is, 0 at padding
    decoder_mask: Tensor  # (B, T)

    @property
    def num_samples(self) -> int:
        return len(self.labels)

    @property
    def num_tokens(self) -> Tensor:
        """(): tokens that are read, padding not counted."""
        return self.encoder_mask.sum() + self.decoder_mask.sum()

    @property
    def num_positions(self) -> int:
        """Tokens and padding."""
        return self.encoder_mask.numel() + self.decoder_mask.numel()

    @property
    def thought_about(self) -> Tensor:
        """(B, S) int64: 1 where the core has a token, 0 at padding."""
        return self.encoder_mask

    def per_sample(self, values: Tensor) -> Tensor:
        """(B,): sums over each sample's labels of `values`, which are shaped like `labels`."""
        return values.sum(dim=1)


class TokenRows(NamedTuple):
    """B samples in R rows of T tokens; all int64. A sample's tokens are its prompt and, right behind it, its labels less the last.

    So the prompt's last token predicts the first label. What a token may see is a range of its row: the sample's prompt
    and, for a token of the response, the response up to the token itself. Padding sees itself.
    """

    ids: Tensor  # (R, T)
    positions: Tensor  # (R, T): within the sample; (T,) where they are the same in every row
    sees_from: Tensor  # (R, T): the first token of the row that a token may see
    sees_to: Tensor  # (R, T): the last one
    label_at: Tensor  # (M,): where labels are predicted, as row * T + column
    labels: Tensor  # (M,): sample after sample; IGNORE at padding, which is at the end
    label_sample: Tensor  # (M,): the number of each label's sample
    lengths: Tensor  # (B,): tokens of each sample

    @property
    def num_samples(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> Tensor:
        return self.lengths.sum()

    @property
    def num_positions(self) -> int:
        return self.ids.numel()

    @property
    def thought_about(self) -> Tensor:
        """(R, T) bool: where the core has a token, and no padding."""
        used = self.lengths if len(self.ids) == len(self.lengths) else self.lengths.sum(0, keepdim=True)
        return torch.arange(self.ids.shape[1], device=used.device) < used[:, None]

    def per_sample(self, values: Tensor) -> Tensor:
        sums = values.new_zeros(self.num_samples)
        return sums.index_add(0, self.label_sample, values)


class PackedBatch(NamedTuple):
    """B samples, the prompts end to end in a row of S tokens, the responses end to end in a row of T; all int64.

    What a token of either row may see of the prompts is a range: its own sample's prompt. Padding of the encoder's row
    sees itself, and padding of the decoder's row sees what the last sample sees.
    """

    encoder_ids: Tensor  # (1, S)
    encoder_positions: Tensor  # (1, S): within the prompt
    encoder_sees_from: Tensor  # (1, S): the first token of the encoder's row that a token of it may see
    encoder_sees_to: Tensor  # (1, S): the last one
    decoder_input_ids: Tensor  # (1, T): of each sample BOS + response[:-1]
    decoder_positions: Tensor  # (1, T): within the sample; a token sees as many before it in the decoder's row
    decoder_sees_from: Tensor  # (1, T): the first token of the encoder's row that a token may see
    decoder_sees_to: Tensor  # (1, T): the last one
    labels: Tensor  # (1, T): the responses, IGNORE at padding
    label_sample: Tensor  # (1, T): the number of each label's sample
    lengths: Tensor  # (B,): tokens of each sample

    @property
    def num_samples(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> Tensor:
        return self.lengths.sum()

    @property
    def num_positions(self) -> int:
        return self.encoder_ids.numel() + self.decoder_input_ids.numel()

    @property
    def thought_about(self) -> Tensor:
        """(1, S) bool: where the core has a token, and no padding."""
        last = self.decoder_sees_to.amax(dim=1, keepdim=True)
        return torch.arange(self.encoder_ids.shape[1], device=last.device) <= last

    def per_sample(self, values: Tensor) -> Tensor:
        sums = values.new_zeros(self.num_samples)
        return sums.index_add(0, self.label_sample[0], values[0])


class Stream(NamedTuple):
    """How samples are read as single sequences."""

    causal: bool = False
    """Whether a prompt's tokens see what is before them alone, as a response's do."""
    everything: bool = False
    """Whether a prompt's tokens are labels, too, but for the first. It needs `causal`."""


Rows = tuple[int, ...]
"""Tokens of the rows that packed samples lie in: of the single row, or of the encoder's and of the decoder's."""
AnyBatch = Batch | TokenRows | PackedBatch
Collate = Callable[[Ragged, SpecialTokens, bool], AnyBatch]
"""(samples, special tokens, whether sizes are rounded up to one of few) -> batch."""


def to_device(batch: AnyBatch, device: torch.device) -> AnyBatch:
    """Copied to `device`. What goes to a GPU goes in one piece and from pinned memory, so the copy is asynchronous."""
    if device.type != "cuda":
        return type(batch)(*(tensor.to(device) for tensor in batch))
    whole = torch.cat([tensor.flatten() for tensor in batch]).pin_memory().to(device, non_blocking=True)
    pieces = whole.split([tensor.numel() for tensor in batch])
    return type(batch)(*(piece.view(tensor.shape) for piece, tensor in zip(pieces, batch, strict=True)))


def pad_batch(samples: Sequence[Sample], tokens: SpecialTokens, round_up: bool = False) -> Batch:
    """The guide's five tensors of `samples`; see `pad`."""
    return pad(Ragged.of(samples), tokens, round_up)


def pad(samples: Ragged, tokens: SpecialTokens, round_up: bool = False) -> Batch:
    """Prompts and responses apart, each side padded to its longest, or with `round_up` to the `padded_length` of that."""
    prompt_lens, label_lens = samples.prompt_lens, samples.label_lens
    widths = np.array([prompt_lens.max(), label_lens.max()])
    s, t = (padded_length(widths) if round_up else widths).tolist()
    places = np.arange(max(s, t + 1), dtype=np.int32)
    lens = np.stack([prompt_lens, label_lens + 1]).astype(np.int32)
    mask = np.concatenate([places[:s] < lens[0, :, None], places[: t + 1] < lens[1, :, None]], axis=1)  # (B, S + 1 + T)
    rows = np.full(mask.shape, tokens.pad_id, dtype=np.int64)
    rows[mask] = samples.ids  # row-major, as they lie
    number = np.arange(len(rows))
    rows[:, s] = tokens.bos_id
    rows[number[samples.ends], (s + label_lens)[samples.ends]] = tokens.eos_id
    ones = mask.astype(np.int64)
    labels = np.where(mask[:, s + 1 :], rows[:, s + 1 :], IGNORE)
    rows[number, s + label_lens] = tokens.pad_id  # the last token is a label alone
    tensors = (rows[:, :s], rows[:, s:-1], labels, ones[:, :s], ones[:, s + 1 :])
    return Batch(*map(torch.from_numpy, tensors))


def join(samples: Ragged, tokens: SpecialTokens, round_up: bool = False, stream: Stream = Stream()) -> TokenRows:
    """A row for each sample. With `round_up` the width is a `padded_length`, and so is the number of labels."""
    lengths = samples.token_lens
    width = int(padded_length(lengths.max()) if round_up else lengths.max())
    starts = np.arange(len(lengths)) * width
    return _rows(samples, tokens, starts, len(lengths), width, round_up, stream)


def in_place(samples: Ragged, tokens: SpecialTokens, round_up: bool = False) -> TokenRows:
    """A row for each sample: its prompt, and BOS, which is the place for the end of a response as long as the prompt. All of
    these tokens see one another, and the i-th of them predicts the i-th label. Raises UserError for a longer response.
    """
    lengths = samples.prompt_lens + 1
    if (beyond := samples.label_lens > lengths).any():
        prompt, labels = (side[beyond][0] for side in (samples.prompt_lens, samples.label_lens))
        raise UserError(
            f"model.architecture puzzle: a response of {labels - 1} tokens to a prompt of {prompt}: it answers in the prompt's "
            "places, so a response is at most as long; take encoder_decoder or prefix_lm"
        )
    width = int(padded_length(lengths.max()) if round_up else lengths.max())
    return _rows(samples, tokens, np.arange(len(lengths)) * width, len(lengths), width, round_up, in_place=True)


def pack(
    samples: Ragged,
    tokens: SpecialTokens,
    round_up: bool = False,
    width: int | None = None,
    stream: Stream = Stream(),
) -> TokenRows:
    """All samples end to end in one row. width: of that row, which is wider where they do not fit it; None: as wide as
    the samples are long together.
    """
    lengths = samples.token_lens
    used = int(lengths.sum())
    if width is None or used > width:
        width = int(padded_length(used)) if width or round_up else used
    return _rows(samples, tokens, np.cumsum(lengths) - lengths, 1, width, round_up, stream)


def pack_apart(samples: Ragged, tokens: SpecialTokens, round_up: bool = False, rows: Rows | None = None) -> PackedBatch:
    """All prompts end to end in one row, and all responses in another. rows: what the two rows hold; None: what it takes.

    Where a side does not fit its row, the other row gives way: both together hold what `rows` do.
    """
    prompt_lens, label_lens, sizes = samples.prompt_lens, samples.label_lens, samples.sizes
    used = np.array([prompt_lens.sum(), label_lens.sum()])
    if rows is None:
        s, t = (padded_length(used) if round_up else used).tolist()
    else:
        s = int(np.clip(rows[0], used[0], sum(rows) - used[1]))
        t = sum(rows) - s
    first = np.cumsum(sizes) - sizes  # of each sample in `ids`
    ids = samples.ids.astype(np.int64)
    ids[first + prompt_lens] = tokens.bos_id
    ids[(first + sizes - 1)[samples.ends]] = tokens.eos_id
    within = np.arange(len(ids)) - np.repeat(first, sizes)
    after = within - np.repeat(prompt_lens, sizes)  # BOS at 0, the labels from 1 on
    prompt, read = after < 0, (after >= 0) & (after < np.repeat(label_lens, sizes))

    def row(values: np.ndarray, width: int, padding: Any) -> np.ndarray:
        laid = np.empty((1, width), np.int64)
        laid[:] = padding
        laid[0, : len(values)] = values
        return laid

    starts = np.cumsum(prompt_lens) - prompt_lens
    ends, places = starts + prompt_lens - 1, np.arange(s)
    arrays = (
        row(ids[prompt], s, tokens.pad_id),
        row(within[prompt], s, 0),
        row(np.repeat(starts, prompt_lens), s, places),
        row(np.repeat(ends, prompt_lens), s, places),
        row(ids[read], t, tokens.pad_id),
        row(after[read], t, 0),
        row(np.repeat(starts, label_lens), t, starts[-1]),
        row(np.repeat(ends, label_lens), t, ends[-1]),
        row(ids[after > 0], t, IGNORE),
        row(np.repeat(np.arange(len(sizes)), label_lens), t, 0),
        prompt_lens + label_lens,
    )
    return PackedBatch(*map(torch.from_numpy, arrays))


def _rows(
    samples: Ragged,
    tokens: SpecialTokens,
    starts: np.ndarray,
    num_rows: int,
    width: int,
    round_up: bool,
    stream: Stream = Stream(),
    in_place: bool = False,
) -> TokenRows:
    """starts: (B,), where each sample begins in the flattened rows. in_place: see the function of that name."""
    prompt_lens, label_lens, sizes = samples.prompt_lens, samples.label_lens, samples.sizes
    lengths = prompt_lens + 1 if in_place else samples.token_lens
    first = np.cumsum(sizes) - sizes  # of each sample in `ids`
    ids = samples.ids.astype(np.int64)
    ids[(first + sizes - 1)[samples.ends]] = tokens.eos_id
    within = np.arange(len(ids)) - np.repeat(first, sizes)
    prompts = np.repeat(prompt_lens, sizes)
    labels = ids[(within > prompts) | (stream.everything & (within > 0) & (within < prompts))]
    if in_place:
        ids[first + prompt_lens] = tokens.bos_id
        read = within <= prompts
    else:
        read = (within != prompts) & (within != np.repeat(sizes - 1, sizes))  # neither BOS's place nor the last label

    within = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    at = np.repeat(starts, lengths) + within
    begins = np.repeat(starts % width, lengths)
    row, places = np.full(num_rows * width, tokens.pad_id), np.tile(np.arange(width), num_rows)
    row[at] = ids[read]
    positions, sees_from, sees_to = np.zeros_like(places), places.copy(), places.copy()
    positions[at], sees_from[at] = within, begins
    sees_to[at] = begins + np.maximum(within, 0 if stream.causal else np.repeat(prompt_lens - (not in_place), lengths))

    first_at = starts if in_place or stream.everything else starts + prompt_lens - 1
    label_lens = label_lens + (prompt_lens - 1 if stream.everything else 0)
    count = len(labels)
    most = int(padded_length(count)) if round_up else count
    label_at, label_sample = np.zeros(most, np.int64), np.zeros(most, np.int64)
    steps = np.arange(count) - np.repeat(np.cumsum(label_lens) - label_lens, label_lens)
    label_at[:count] = np.repeat(first_at, label_lens) + steps
    label_sample[:count] = np.repeat(np.arange(len(label_lens)), label_lens)
    labels = np.concatenate([labels, np.full(most - count, IGNORE)])
    shape = (num_rows, width)
    row, positions, sees_from, sees_to = (array.reshape(shape) for array in (row, positions, sees_from, sees_to))
    arrays = (row, positions, sees_from, sees_to, label_at, labels, label_sample, lengths)
    return TokenRows(*map(torch.from_numpy, arrays))


def without_labels(batch: AnyBatch) -> AnyBatch:
    """The batch, counting for nothing."""
    return batch._replace(labels=torch.full_like(batch.labels, IGNORE))


def padded_length(lengths: Any) -> Any:
    """A length, or an array of lengths, rounded up to one of few sizes: eight to an octave and multiples of 8, so 32 of them up to 512."""
    step = np.maximum(8, 2 ** np.floor(np.log2(np.maximum(lengths, 1))).astype(np.int64) // 8)
    return -(-lengths // step) * step
