"""The data contract: what a data set owes the trainer.

A data set is a training split, a validation split and the tokenizer that made both (`Splits`). A split is numbered
samples (`Split`). A sample is a prompt and a response, as token ids: BOS, EOS, labels and padding are made when a batch
is (`hrm_lm.data.collate`), and nowhere else.

A split must have a length and samples. It may override what it can do better than sample by sample: lengths, batches
(`ragged`), an order of its own, fitting the model's lengths, and leaving out prompts that are held out elsewhere. The
trainer calls these methods and no others.

Whatever else a data set's function returns (lists, tuples, arrays, generators, a `datasets.Dataset`, of texts or of token
ids) is wrapped in a split once, by `Splits` itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence, Set, Sized
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from hrm_lm.data.order import Seed, epochs
from hrm_lm.data.tokenizer import Tokenizer
from hrm_lm.errors import UserError

Prompt = tuple[int, ...]
"""A prompt's token ids, as a key."""


class Sample(NamedTuple):
    """Token ids without BOS and EOS."""

    prompt: Sequence[int] | np.ndarray
    response: Sequence[int] | np.ndarray
    ends: bool = True
    """Whether EOS follows the response. It does not where the response was cut."""


class Limits(NamedTuple):
    """The longest prompt and the most labels (a response and its EOS) that a model takes, in tokens."""

    prompt: int
    response: int


class Ragged(NamedTuple):
    """B samples, end to end. Of each there is its prompt, a place for BOS, its response and, where it ends, a place for EOS.

    What stands in those places does not count: collating writes BOS and EOS there.
    """

    ids: np.ndarray
    """(total,), integer."""
    prompt_lens: np.ndarray
    """(B,) int64."""
    label_lens: np.ndarray
    """(B,) int64: the response's tokens, and EOS where the response ends."""
    ends: np.ndarray
    """(B,) bool."""

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Ragged:
        place = (0,)
        runs = [run for s in samples for run in (s.prompt, place, s.response, place if s.ends else ())]
        lens = np.fromiter(map(len, runs), np.int64, len(runs)).reshape(-1, 4)
        ids = np.concatenate([np.asarray(run, dtype=np.int64) for run in runs])
        return cls(ids, lens[:, 0], lens[:, 2] + lens[:, 3], lens[:, 3].astype(bool))

    @property
    def sizes(self) -> np.ndarray:
        """(B,) int64: what each sample takes of `ids`."""
        return self.prompt_lens + 1 + self.label_lens

    @property
    def token_lens(self) -> np.ndarray:
        """(B,) int64: tokens of each sample as a single stream, prompt and labels less the last."""
        return stream_lengths(np.stack([self.prompt_lens, self.label_lens], axis=1))

    @classmethod
    def concatenate(cls, pieces: Sequence[Ragged]) -> Ragged:
        return cls(*map(np.concatenate, zip(*pieces, strict=True)))

    def take(self, order: np.ndarray) -> Ragged:
        """The samples (B,) in another order."""
        sizes, starts = self.sizes[order], (np.cumsum(self.sizes) - self.sizes)[order]
        within = np.repeat(starts - (np.cumsum(sizes) - sizes), sizes)
        ids = self.ids[within + np.arange(len(within))]
        return Ragged(ids, self.prompt_lens[order], self.label_lens[order], self.ends[order])


def stream_lengths(lengths: np.ndarray) -> np.ndarray:
    """(B, 2), tokens of prompts and labels -> (B,): tokens of each sample as a single stream, its last label left out."""
    return lengths.sum(axis=1) - 1


class Split(ABC):
    """Numbered samples, from 0 on."""

    places: Callable[[int], str] | None = None
    """Where a sample comes from, if that is known; see `place`."""
    verdict: Callable[[int, str], float] | None = None
    """The task's own verdict on an answer to a sample, from 0 to 1, where it has a verdict; see `score`."""
    facets: Callable[[int], Mapping[str, Any]] | None = None
    """What an evaluation also gives scores by, of a sample: how many digits it has, its subject, each under its name."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, i: int) -> Sample: ...

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """(B, 2) int64: tokens of the prompts at `indices` (B,), and of their labels (EOS counts)."""
        samples = (self[i] for i in indices.tolist())
        return np.array([(len(s.prompt), len(s.response) + s.ends) for s in samples], dtype=np.int64).reshape(-1, 2)

    def ragged(self, indices: np.ndarray) -> Ragged:
        """The samples at `indices` (B,), B at least 1."""
        return Ragged.of([self[i] for i in indices.tolist()])

    def order(self, start: int, stop: int, seed: Seed) -> np.ndarray:
        """(stop - start,) int64: samples `start` to `stop` of an endless row; a pure function of its arguments."""
        return epochs(start, stop, len(self), seed)

    def expect(self, start: int, stop: int, seed: Seed) -> None:  # noqa: B027 (most splits have nothing to fetch)
        """Told before samples `start` to `stop` of that row are read. A split whose samples are far away fetches them
        ahead, and those that come after; it must not wait for them.
        """

    def fetch(self, indices: np.ndarray) -> None:  # noqa: B027
        """Waits until the samples at `indices` (B,) can be read by a process that is forked from this process."""

    def fitted(self, limits: Limits, truncate: bool) -> Split:
        """The split, fit for a model of these limits. Longer samples are cut where `truncate`, else refused.

        Raises UserError with the place of the first sample that is too long, or whose prompt is empty.
        """
        lengths = self.lengths(np.arange(len(self)))
        refuse_empty(self, lengths)
        if not (lengths > limits).any():
            return self
        if truncate:
            return Truncated(self, limits)
        first = int((lengths > limits).any(axis=1).argmax())
        raise too_long(f"{self.place(first)}: the", lengths[first], limits)

    def prompts(self) -> Set[Prompt]:
        """The prompts that no other data set of a mixture may train on, where this is a validation split."""
        return {key(self[i].prompt) for i in range(len(self))}

    def without(self, prompts: Set[Prompt]) -> Split:
        """The split less the samples of these prompts."""
        kept = self.others(prompts)
        return self if len(kept) == len(self) else Subset(self, kept)

    def others(self, prompts: Set[Prompt]) -> np.ndarray:
        """(N,) int64: the samples whose prompts are not among these."""
        kept = [i for i in range(len(self)) if key(self[i].prompt) not in prompts]
        return np.array(kept, dtype=np.int64)

    def place(self, i: int) -> str:
        """Where sample `i` comes from, for messages: a file and line, say."""
        return self.places(i) if self.places else f"sample {i + 1}"


def key(prompt: Sequence[int] | np.ndarray) -> Prompt:
    return tuple(np.asarray(prompt).tolist())


def refuse_empty(split: Split, lengths: np.ndarray) -> None:
    """lengths: (N, 2), of all samples. Raises UserError with the place of the first sample that has no prompt, or no label."""
    for side, what in enumerate(("the prompt is empty", "the response is empty, and does not end either")):
        if (empty := lengths[:, side] == 0).any():
            raise UserError(f"{split.place(int(empty.argmax()))}: {what}")


def too_long(what: str, lengths: Sequence[int], limits: Limits) -> UserError:
    """The error for a sample of `lengths` (prompt, labels) beyond the limits; `what` introduces "prompt" or "response"."""
    side = 0 if lengths[0] > limits.prompt else 1
    name = ("prompt", "response")[side]
    return UserError(
        f"{what} {name} has {lengths[side]} tokens, more than model.max_{name}_len ({limits[side]}); "
        "raise that, or cut with data.truncate=true"
    )


class Subset(Split):
    """The samples of a split at `indices` (N,), under new numbers and in the usual order.

    indices: or a function that gives them when a sample is first asked for.
    """

    def __init__(self, split: Split, indices: np.ndarray | Callable[[], np.ndarray]):
        self.split, self._indices = split, indices
        self.places = lambda i: split.place(int(self.indices[i]))
        if (verdict := split.verdict) is not None:
            self.verdict = lambda i, answer: verdict(int(self.indices[i]), answer)
        if (facets := split.facets) is not None:
            self.facets = lambda i: facets(int(self.indices[i]))

    @cached_property
    def indices(self) -> np.ndarray:
        return self._indices() if callable(self._indices) else self._indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> Sample:
        return self.split[int(self.indices[i])]

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        return self.split.lengths(self.indices[indices])

    def ragged(self, indices: np.ndarray) -> Ragged:
        return self.split.ragged(self.indices[indices])

    def fetch(self, indices: np.ndarray) -> None:
        self.split.fetch(self.indices[indices])


class Capped(Subset):
    """At most so many samples of a validation split, spread evenly over it. All of its prompts stay held out."""

    def __init__(self, split: Split, most: int):
        super().__init__(split, np.arange(most) * len(split) // most)

    def prompts(self) -> Set[Prompt]:
        return self.split.prompts()


class Truncated(Split):
    """The samples of a split, cut to `limits` as they are read."""

    def __init__(self, split: Split, limits: Limits):
        self.split, self.limits = split, limits
        self.places, self.verdict, self.facets = split.place, split.verdict, split.facets

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, i: int) -> Sample:
        prompt, response, ends = self.split[i]
        ends = ends and len(response) < self.limits.response
        return Sample(prompt[: self.limits.prompt], response[: self.limits.response], ends)

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        return np.minimum(self.split.lengths(indices), self.limits)

    def order(self, start: int, stop: int, seed: Seed) -> np.ndarray:
        return self.split.order(start, stop, seed)

    def expect(self, start: int, stop: int, seed: Seed) -> None:
        self.split.expect(start, stop, seed)

    def fetch(self, indices: np.ndarray) -> None:
        self.split.fetch(indices)


class Samples(Split):
    """Samples of a list, or of anything else that has a length and items that `as_sample` reads."""

    def __init__(
        self,
        items: Sequence[Any],
        tokenizer: Tokenizer,
        places: Callable[[int], str] | None = None,
        verdict: Callable[[int, str], float] | None = None,
    ):
        self.items, self.tokenizer, self.places, self.verdict = items, tokenizer, places, verdict

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Sample:
        item = self.items[i]
        return item if isinstance(item, Sample) else as_sample(item, self.tokenizer, self.place(i))


def as_sample(item: Any, tokenizer: Tokenizer, place: str) -> Sample:
    """A sample of whatever stands for it: a Sample, a mapping with `prompt` and `response`, a pair of these, or the
    guide's triple (encoder_ids, decoder_input_ids, labels). Prompts and responses are texts or token ids.

    Raises UserError, with the place, for anything else.
    """
    if isinstance(item, Sample):
        return item
    try:
        fields = (item["prompt"], item["response"]) if isinstance(item, Mapping) else tuple(item)
    except KeyError as error:
        there = ", ".join(map(repr, item))
        raise UserError(f"{place}: a sample needs the field {error.args[0]!r}; it has {there}") from None
    except TypeError:
        fields = ()
    if len(fields) == 2 and not isinstance(item, str | bytes):
        prompt, response = (_token_ids(side, tokenizer, place) for side in fields)
        return Sample(prompt, response)
    if len(fields) == 3 and not isinstance(item, str | bytes):
        prompt, inputs, labels = (_token_ids(side, tokenizer, place).tolist() for side in fields)
        if not labels or inputs != [tokenizer.bos_id, *labels[:-1]]:
            raise UserError(f"{place}: decoder_input_ids must be BOS ({tokenizer.bos_id}) and the labels less the last")
        ends = labels[-1] == tokenizer.eos_id
        return Sample(prompt, labels[:-1] if ends else labels, ends)
    raise UserError(
        f"{place}: a sample is a prompt and a response, or the triple encoder_ids, decoder_input_ids, labels; "
        f"this is {type(item).__name__} {str(item)[:60]!r}"
    )


def _token_ids(side: Any, tokenizer: Tokenizer, place: str) -> np.ndarray:
    """(N,) int64. Raises UserError for what is neither a text nor the token ids of a text."""
    ids = np.asarray(tokenizer.encode(side) if isinstance(side, str) else side)
    if ids.ndim != 1 or (len(ids) and ids.dtype.kind not in "iu"):
        raise UserError(f"{place}: a prompt or response is a text or token ids, not {str(side)[:60]!r}")
    if len(ids) and not (ids.min() >= 0 and ids.max() < tokenizer.vocab_size):
        wrong = next(i for i in ids.tolist() if not 0 <= i < tokenizer.vocab_size)
        raise UserError(f"{place}: token id {wrong} is not in the tokenizer's vocabulary of {tokenizer.vocab_size}")
    return ids.astype(np.int64)


class Splits:
    """A data set: what its function returns and what training takes.

    train, val: a Split, or any number of samples that `as_sample` reads; a generator is read to its end.
    place: where a sample comes from, `(split, i) -> str`, for messages. score: the task's verdict on an answer to
    validation sample i, `(i, answer) -> float`. facets: what an evaluation also gives scores by, of validation sample i
    (`Split.facets`). members: a mixture's data sets by name.
    """

    def __init__(
        self,
        train: Split | Iterable[Any],
        val: Split | Iterable[Any],
        tokenizer: Tokenizer,
        place: Callable[[str, int], str] | None = None,
        score: Callable[[int, str], float] | None = None,
        members: Mapping[str, Splits] | None = None,
        facets: Callable[[int], Mapping[str, Any]] | None = None,
    ):
        place = place or (lambda split, i: f"{split} sample {i + 1}")
        self.tokenizer, self.members = tokenizer, dict(members or {})
        self.train = as_split(train, tokenizer, lambda i: place("train", i))
        self.val = as_split(val, tokenizer, lambda i: place("val", i), score)
        self.val.facets = self.val.facets or facets

    def map(self, change: Callable[[str, Split], Split]) -> Splits:
        """The same with `change(name, split)` in place of each split, "train" and "val"."""
        return Splits(change("train", self.train), change("val", self.val), self.tokenizer, members=self.members)


def as_split(
    samples: Split | Iterable[Any],
    tokenizer: Tokenizer,
    place: Callable[[int], str],
    score: Callable[[int, str], float] | None = None,
) -> Split:
    """A split of whatever holds samples. What has a length and items is read item by item, when they are asked for.

    Raises UserError for what has no order, which must be the same on every worker and after every restart.
    """
    if isinstance(samples, Split):
        samples.places, samples.verdict = samples.places or place, samples.verdict or score
        return samples
    if isinstance(samples, Set | Mapping):
        raise UserError(
            f"{place(0)}: samples need an order, which a {type(samples).__name__} does not have; make it a list"
        )
    items: Any = samples
    if not isinstance(samples, Sized) or not callable(getattr(samples, "__getitem__", None)):  # a generator, say
        items = list(samples)
    if isinstance(items, list | tuple | np.ndarray):  # converted once
        items = [as_sample(item, tokenizer, place(i)) for i, item in enumerate(items)]
    return Samples(items, tokenizer, place, score)
