"""Several data sets as a single data set. Each member gives a fixed number of every BLOCK samples, by its weight.
The samples of a block come in a random order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from functools import cached_property

import numpy as np

from hrm_lm.data.flat import FlatSplit
from hrm_lm.data.order import Seed
from hrm_lm.data.splits import Prompt, Ragged, Sample, Split, Splits
from hrm_lm.errors import UserError

BLOCK = 4096


class Concatenation(Split):
    """Splits of several data sets, one after another."""

    def __init__(self, members: Sequence[Split]):
        self._members = members

    @property
    def members(self) -> Sequence[Split]:
        return self._members

    @cached_property
    def starts(self) -> np.ndarray:
        return np.cumsum([0, *map(len, self.members)])

    @cached_property
    def _flat(self) -> FlatSplit | None:
        """Where all members are flat: their samples in a single split, whose batches need no sorting by member."""
        return FlatSplit.merged(self.members)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, i: int) -> Sample:
        home = int(np.searchsorted(self.starts, i, side="right")) - 1
        return self.members[home][i - int(self.starts[home])]

    def place(self, i: int) -> str:
        home = int(np.searchsorted(self.starts, i, side="right")) - 1
        return self.members[home].place(i - int(self.starts[home]))

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        if self._flat is not None:
            return self._flat.lengths(indices)
        lengths = np.empty((len(indices), 2), dtype=np.int64)
        for member, start, here in self._by_member(indices):
            lengths[here] = member.lengths(indices[here] - start)
        return lengths

    def ragged(self, indices: np.ndarray) -> Ragged:
        if self._flat is not None:
            return self._flat.ragged(indices)
        groups = self._by_member(indices)
        pieces = [member.ragged(indices[here] - start) for member, start, here in groups]
        if len(pieces) == 1:
            return pieces[0]
        return Ragged.concatenate(pieces).take(np.argsort(np.concatenate([here for *_, here in groups])))

    def fetch(self, indices: np.ndarray) -> None:
        for member, start, here in self._by_member(indices):
            member.fetch(indices[here] - start)

    def _by_member(self, indices: np.ndarray) -> list[tuple[Split, int, np.ndarray]]:
        """Each member that is asked for, its first number, and which of the `indices` (B,) are its samples'."""
        homes = np.searchsorted(self.starts, indices, side="right") - 1
        order = np.argsort(homes, kind="stable")
        found, firsts = np.unique(homes[order], return_index=True)
        runs = np.split(order, firsts[1:])
        return [
            (self.members[home], int(self.starts[home]), here) for home, here in zip(found.tolist(), runs, strict=True)
        ]


class Mixture(Concatenation):
    """Training samples, drawn from the members by `weights`, without the prompts that the validation splits hold out.

    Prompts are looked through when a sample is first asked for. A driver, which only checks the data sets, never asks.
    """

    def __init__(self, members: Mapping[str, Split], weights: Sequence[float], held_out: Sequence[Split] = ()):
        super().__init__(list(members.values()))
        self.names, self.held_out = list(members), held_out
        shares = np.array(weights) / sum(weights)
        self.counts = np.maximum(np.rint(shares * BLOCK).astype(int), 1)
        self.counts[self.counts.argmax()] += BLOCK - self.counts.sum()

    @cached_property
    def members(self) -> Sequence[Split]:  # type: ignore[override]
        prompts: Set[Prompt] = frozenset().union(*(split.prompts() for split in self.held_out))
        members = [split.without(prompts) for split in self._members] if prompts else self._members
        for name, split in zip(self.names, members, strict=True):
            if not len(split):
                raise UserError(f"data.mixture: every training sample of {name} is held out by another dataset")
        return members

    def order(self, start: int, stop: int, seed: Seed) -> np.ndarray:
        """A row of blocks; each member goes through a row of its own in them."""
        first, last = start // BLOCK, -(-stop // BLOCK)
        row = np.concatenate([self._block(block, seed) for block in range(first, last)])
        return row[start - first * BLOCK : stop - first * BLOCK]

    def expect(self, start: int, stop: int, seed: Seed) -> None:
        first, last = start // BLOCK, -(-stop // BLOCK)
        for number, (member, count) in enumerate(zip(self.members, self.counts.tolist(), strict=True)):
            member.expect(first * count, last * count, (seed, number))

    def _block(self, block: int, seed: Seed) -> np.ndarray:
        samples = np.concatenate(
            [
                start + member.order(block * count, (block + 1) * count, (seed, number))
                for number, (member, start, count) in enumerate(
                    zip(self.members, self.starts.tolist(), self.counts.tolist(), strict=False)
                )
            ]
        )
        return np.random.default_rng([seed, block, 2]).permutation(samples)


def mix(members: Mapping[str, Splits], weights: Sequence[float]) -> Splits:
    """Loaded data sets as one mixture, whose members share a tokenizer.

    No member trains on a prompt that another member holds out, except for prepared splits: these are taken as they are.
    """
    vals = [member.val for member in members.values()]
    train = Mixture({name: member.train for name, member in members.items()}, weights, vals)
    return Splits(train, Concatenation(vals), next(iter(members.values())).tokenizer, members=members)
