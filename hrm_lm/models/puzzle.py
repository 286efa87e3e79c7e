"""HRMPuzzle: all places of a prompt are answered at once, from the core's states. There is no decoder.

That is the setting of HRM (arXiv 2506.21734) and TRM (arXiv 2510.04871): a grid is read, thought about, and filled in. The i-th
place of the prompt predicts the i-th token of the response, which is at most as long (`hrm_lm.data.collate.in_place`), and
all places see one another.

Chosen: this project's blocks, rotary positions and, besides, a learned vector for each place (`model.places`): in a grid a place is more
than a distance. `h_cycles: 0` is the baseline without recurrence, as for `HRMPrefixLM`. TRM is `model.hrm.shared` with
`model.hrm.inject: add` and `train.segments`.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hrm_lm.config import Cycles, ModelConfig
from hrm_lm.data.collate import in_place
from hrm_lm.models import cache
from hrm_lm.models.cache import Cursor, Moves
from hrm_lm.models.layers import lecun_normal_, rotary
from hrm_lm.models.prefix_lm import TokenStream


@dataclass
class Decoding(cache.Decoding):
    answers: Tensor
    """(rows, capacity, C): what the head reads at each place."""
    last: Tensor
    """(rows,): the last place of each sample."""

    def drop(self, rows: Collection[int]) -> Moves:
        moves = super().drop(rows)
        for kept in (self.answers, self.last):
            moves.make(kept)
        self.cursor.drop(moves)  # which no cache has
        return moves


class HRMPuzzle(TokenStream):
    hrm_text = False
    recurs_per_token = False
    collate = staticmethod(in_place)

    def __init__(self, config: ModelConfig, vocab_size: int):
        super().__init__(config, vocab_size)
        self.places: nn.Parameter | None = None
        if config.places:
            self.places = nn.Parameter(torch.empty(config.max_prompt_len + 1, config.d_model))
            lecun_normal_(self.places, fan_in=4)  # half of what a token's own vector has, in standard deviations

    def embed(self, ids: Tensor) -> Tensor:
        """ids: (B, T); each row begins at the first place."""
        x = self.embedding(ids)
        if self.places is None:
            return x
        places = self.places[: x.shape[1]]
        return x + nn.functional.pad(places, (0, 0, 0, x.shape[1] - len(places))).to(x.dtype)  # padding has no place

    def open(self, rows: int, prompt_len: int, max_new_tokens: int, cycles: Cycles) -> Decoding:
        """Room to answer so many samples at a time, whose prompts have up to `prompt_len` tokens."""
        places, device = prompt_len + 1, self.embedding.weight.device
        cursor = Cursor(rows, max(places, max_new_tokens), device)
        answers = torch.zeros(rows, places, self.config.d_model, device=device)
        rope = rotary(cursor.places[:places], self.head_dim)
        return Decoding(cycles, cursor, [], rope, [], answers, torch.zeros_like(cursor.place))

    def prefill(self, prompt_ids: Tensor, prompt_lens: Sequence[int], bos_id: int, decoding: Decoding) -> Tensor:
        """Reads prompts (B, S), padded on the right, and answers them. Returns the logits (B, V) of their first places."""
        B, S = prompt_ids.shape
        lens = torch.tensor(prompt_lens).to(prompt_ids.device, non_blocking=True)
        places = torch.arange(S + 1, device=prompt_ids.device)
        ids = nn.functional.pad(prompt_ids, (0, 1)).masked_fill(places == lens[:, None], bos_id)
        seen = (places <= lens[:, None])[:, None, None]
        rope, new = tuple(values[: S + 1] for values in decoding.rope), decoding.cursor.samples
        for some in decoding.cursor.read(S + 1, [1] * B):
            x = self.embed(ids[some])
            states = decoding.settled(self.think(x, rope, seen[some], decoding.cycles, tokens=seen[some, 0, 0]))
            decoding.answers[new + some.start : new + some.stop, : S + 1] = states
        decoding.last[new : new + B] = lens
        return self.head(decoding.answers[new : new + B, 0])

    def decode(self, tokens: Tensor, decoding: Decoding) -> Tensor:
        """The logits (B, V) of the next places, whatever `tokens` (B,) are. Beyond a prompt's places they are those of the
        last.
        """
        B = len(tokens)
        place = torch.minimum(decoding.cursor.place[:B], decoding.last[:B])
        states = decoding.answers[torch.arange(B, device=place.device), place]
        decoding.cursor.advance(B)
        return self.head(states)
