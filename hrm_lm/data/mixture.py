"""Several datasets as one: out of every BLOCK samples each gives a fixed number, by its weight, in a random order."""

from typing import Sequence

import numpy as np

from hrm_lm.config import DataConfig, ModelConfig
from hrm_lm.data.prepared import TOKENIZER, is_prepared
from hrm_lm.data.registry import Splits, load_dataset, sample_lengths
from hrm_lm.data.sampler import stream
from hrm_lm.data.tokenizer import Sample
from hrm_lm.errors import UserError

BLOCK = 4096


class Concatenation:
    """Datasets one after another."""

    def __init__(self, parts: Sequence[Sequence[Sample]]):
        self.parts = parts
        self.starts = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, i: int) -> Sample:
        home = int(np.searchsorted(self.starts, i, side="right")) - 1
        return self.parts[home][i - int(self.starts[home])]

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """(B, 2) int64: tokens of prompt and of response, EOS counted."""
        lengths = np.empty((len(indices), 2), dtype=np.int64)
        homes = np.searchsorted(self.starts, indices, side="right") - 1
        for home in np.unique(homes):
            here = homes == home
            lengths[here] = sample_lengths(self.parts[home], indices[here] - self.starts[home])
        return lengths


class Mixture(Concatenation):
    """Training samples, drawn from the parts by `weights`."""

    def __init__(self, parts: Sequence[Sequence[Sample]], weights: Sequence[float]):
        super().__init__(parts)
        shares = np.array(weights) / sum(weights)
        self.counts = np.maximum(np.rint(shares * BLOCK).astype(int), 1)
        self.counts[self.counts.argmax()] += BLOCK - self.counts.sum()

    def stream(self, start: int, stop: int, seed: int) -> np.ndarray:
        """Samples `start` to `stop` of an endless row of blocks; each part goes through its own row in it."""
        first, last = start // BLOCK, -(-stop // BLOCK)
        row = np.concatenate([self._block(block, seed) for block in range(first, last)])
        return row[start - first * BLOCK : stop - first * BLOCK]

    def _block(self, block: int, seed: int) -> np.ndarray:
        samples = np.concatenate(
            [
                start + stream(block * count, (block + 1) * count, part, (seed, number))
                for number, (part, start, count) in enumerate(zip(self.parts, self.starts, self.counts.tolist()))
            ]
        )
        return np.random.default_rng([seed, block, 2]).permutation(samples)


def build_mixture(config: DataConfig, model: ModelConfig, seed: int) -> Splits:
    """The datasets of `config.mixture`, all read with one tokenizer: `config.tokenizer`, a prepared one's, or bytes.

    What one holds out is not trained on in another, as far as that can be known without reading it all: prepared ones
    are taken as they are.
    """
    mixture = dict(sorted(config.mixture.items()))  # whatever the order they are written in
    ready = next((part.dataset for part in mixture.values() if is_prepared(part.dataset)), None)
    tokenizer = config.tokenizer or (f"{ready}/{TOKENIZER}" if ready else "bytes")
    parts: dict[str, Splits] = {}
    for name, part in mixture.items():
        own = part.model_dump(exclude={"weight"}, exclude_none=True) | {"mixture": {}, "tokenizer": tokenizer}
        parts[name] = load_dataset(config.model_copy(update=own), model, seed)
    held_out = {
        tuple(part.val[i][0]) for part in parts.values() if isinstance(part.val, list) for i in range(len(part.val))
    }
    train = [without(part.train, held_out) for part in parts.values()]
    for name, samples in zip(parts, train):
        if not len(samples):
            raise UserError(f"data.mixture: every training sample of {name} is held out by another dataset")
    return Splits(
        Mixture(train, [part.weight for part in mixture.values()]),
        Concatenation([part.val for part in parts.values()]),
        next(iter(parts.values())).tokenizer,
        parts=parts,
    )


def without(samples: Sequence[Sample], prompts: set[tuple[int, ...]]) -> Sequence[Sample]:
    if hasattr(samples, "without"):
        return samples.without(prompts)
    return [sample for sample in samples if tuple(sample[0]) not in prompts] if isinstance(samples, list) else samples
