"""Addition questions: `What is 12 + 7?` -> `19`.

Train and validation share no pair of operands, not even swapped: the split is over unordered pairs.
"""

import re

import numpy as np

from hrm_lm.config import DataConfig
from hrm_lm.data.splits import Splits
from hrm_lm.data.text import text_splits
from hrm_lm.data.tokenizer import SimpleTokenizer


def build_synthetic_dataset(config: DataConfig = DataConfig(), seed: int = 0) -> Splits:
    """Questions over operands of `min_digits` to `max_digits` digits, both orders of every pair drawn.

    All pairs are there when they make at most `num_samples` questions; else so many are drawn.
    """
    options = config.synthetic
    low = 10 ** (options.min_digits - 1) if options.min_digits > 1 else 0
    high = 10**options.max_digits  # exclusive
    pairs = _unordered_pairs(low, high, options.num_samples // 2 + 1, np.random.default_rng(seed))
    num_val = min(max(1, round(len(pairs) * config.val_fraction)), len(pairs) - 1)

    sides = []
    for chosen in (pairs[num_val:], pairs[:num_val]):
        ordered = [pair for a, b in chosen for pair in ([(a, b)] if a == b else [(a, b), (b, a)])]
        sides.append([(f"What is {a} + {b}?", str(a + b)) for a, b in ordered])
    train, val = sides
    splits = text_splits(config, train, val, lambda: SimpleTokenizer("What is +?0123456789"))

    def facets(i: int) -> dict[str, int]:
        return {"digits": max(map(len, re.findall(r"\d+", val[i][0])))}

    return Splits(splits.train, splits.val, splits.tokenizer, facets=facets)


def _unordered_pairs(low: int, high: int, limit: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """At most `limit` distinct pairs a <= b from [low, high), in random order."""
    size = high - low
    if size * (size + 1) // 2 <= limit:
        pairs = [(a, b) for a in range(low, high) for b in range(a, high)]
    else:
        drawn: set[tuple[int, int]] = set()
        while len(drawn) < limit:
            for a, b in rng.integers(low, high, size=(limit, 2)).tolist():
                drawn.add((min(a, b), max(a, b)))
        pairs = sorted(drawn)
    return [pairs[i] for i in rng.permutation(len(pairs))[:limit]]
