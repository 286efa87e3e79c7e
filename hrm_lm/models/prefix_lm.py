"""HRMPrefixLM: the published HRM-Text model (arXiv 2605.20613), one token stream through HRMCore.

The sequence of a sample is its prompt and, right behind it, its response without the last token: what predicts the
first response token is the last prompt token, so the batch's BOS has no place in it. Prompt tokens see the whole
prompt, response tokens everything before them. Only positions that predict a response token get logits.

As published: blocks of the `hrm_text` kind, a norm at each stack's end, an embedding scaled by the inverse of its
initial standard deviation, a fixed random low-level initial state, an untied head, and no gradient to the embedding
from a window that cuts it off.

`h_cycles: 0` is the baseline without recurrence: the same blocks, H's and L's together, as one plain stack applied
once. So it has the parameters of the HRM it is compared with; for its compute, give it more layers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hrm_lm.config import ModelConfig
from hrm_lm.data.collate import Batch
from hrm_lm.models.hrm import HRMCore
from hrm_lm.models.layers import KVCache, Rotary, ScaledEmbedding, Stack, lecun_normal_, linear, rotary


@dataclass
class Decoding:
    """Where a generation stands: what is cached, and what of it each sample may see."""

    caches: list[list[KVCache]]
    lengths: Tensor
    """(B,): tokens of each sample so far, hence the next one's position."""
    visible: Tensor
    """(B, capacity): cached positions that are no padding; all those yet to come are none."""
    h_cycles: int
    l_cycles: int


class HRMPrefixLM(nn.Module):
    def __init__(self, config: ModelConfig, vocab_size: int):
        super().__init__()
        self.config, hrm = config, config.hrm
        C, sizes = config.d_model, (config.d_model, config.n_heads, config.expansion, config.dropout)
        self.head_dim = C // config.n_heads
        self.embedding = ScaledEmbedding(vocab_size, C)
        self.core = self.stack = None
        if hrm.h_cycles:
            stacks = (Stack(layers, *sizes, hrm_text=True) for layers in (hrm.h_layers, hrm.l_layers))
            self.core = HRMCore(*stacks, C, straight_through=0.0)
            lecun_normal_(self.core.z_l0, fan_in=1)
        else:
            self.stack = Stack(hrm.h_layers + hrm.l_layers, *sizes, hrm_text=True)
        self.head = linear(C, vocab_size)

    def set_step(self, step: int) -> None:
        """Nothing in this model follows a schedule of its own."""

    def _states(
        self,
        ids: Tensor,
        rope: Rotary,
        mask: Tensor,
        h_cycles: int,
        l_cycles: int,
        backprop_steps: int | None = None,
        caches: list[list[KVCache]] | None = None,
    ) -> list[Tensor]:
        """ids: (B, T). Returns the states after each H-cycle, each (B, T, C)."""
        x = self.embedding(ids)
        if self.core is None:
            return [self.stack(x, rope, mask, caches[0] if caches else None)]
        return self.core(x, rope, mask, h_cycles, l_cycles, backprop_steps, caches)

    def forward(
        self,
        batch: Batch,
        h_cycles: int | None = None,
        l_cycles: int | None = None,
        backprop_steps: int | None = None,
    ) -> list[Tensor]:
        """Logits (B, T, V), aligned with `batch.labels`; the last of the list is the model's answer.

        While training with deep supervision the earlier H-cycles' logits come before it.
        """
        ids, _ = compact(
            torch.cat([batch.encoder_ids, batch.decoder_input_ids[:, 1:]], dim=1),
            torch.cat([batch.encoder_mask, batch.decoder_mask[:, 1:]], dim=1),
        )
        prompt_len = batch.encoder_mask.sum(dim=1)  # (B,)
        positions = torch.arange(ids.shape[1], device=ids.device)
        rope, mask = rotary(positions, self.head_dim), prefix_mask(positions, prompt_len)
        states = self._states(ids, rope, mask, *self.config.hrm.cycles(h_cycles, l_cycles), backprop_steps)
        if not (self.training and self.config.hrm.deep_supervision):
            states = states[-1:]
        # Label t of a sample is predicted at position prompt_len - 1 + t.
        at = (prompt_len[:, None] - 1 + positions[: batch.labels.shape[1]])[..., None]  # (B, T, 1)
        return [self.head(z_h.gather(1, at.expand(-1, -1, z_h.shape[2]))) for z_h in states]

    def prefill(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        bos_id: int,
        max_new_tokens: int,
        h_cycles: int | None = None,
        l_cycles: int | None = None,
    ) -> tuple[Tensor, Decoding]:
        """Reads prompts (B, S), padded on either side. Returns the first new token's logits (B, V) and where decoding
        stands. `bos_id` is for models whose decoder starts with one; here the prompt's last token predicts.
        """
        ids, mask = compact(prompt_ids, prompt_mask)
        (B, S), lengths = ids.shape, mask.sum(dim=1)
        h_cycles, l_cycles = self.config.hrm.cycles(h_cycles, l_cycles)
        stacks = [self.stack]
        if self.core is not None:
            stacks = ([self.core.l_stack] * l_cycles + [self.core.h_stack]) * h_cycles
        caches = [[KVCache(S + max_new_tokens) for _ in stack.blocks] for stack in stacks]
        positions = torch.arange(S, device=ids.device)
        rope = rotary(positions, self.head_dim)
        states = self._states(ids, rope, prefix_mask(positions, lengths), h_cycles, l_cycles, caches=caches)[-1]
        logits = self.head(states[torch.arange(B, device=ids.device), lengths - 1])
        visible = torch.cat([mask.bool(), mask.new_ones(B, max_new_tokens, dtype=torch.bool)], dim=1)
        return logits, Decoding(caches, lengths, visible, h_cycles, l_cycles)

    def decode(self, tokens: Tensor, decoding: Decoding) -> Tensor:
        """Appends tokens (B,) and returns the next one's logits (B, V)."""
        rope = rotary(decoding.lengths[:, None], self.head_dim)
        keys = decoding.caches[0][0].length + 1
        mask = decoding.visible[:, None, None, :keys]
        states = self._states(tokens[:, None], rope, mask, decoding.h_cycles, decoding.l_cycles, caches=decoding.caches)
        decoding.lengths = decoding.lengths + 1
        return self.head(states[-1][:, -1])


def compact(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """ids, mask: (B, T). Both with each row's tokens moved to its left, in order, and the padding behind them."""
    order = mask.argsort(dim=1, descending=True, stable=True)
    return ids.gather(1, order), mask.gather(1, order)


def prefix_mask(positions: Tensor, prompt_len: Tensor) -> Tensor:
    """(T,) and (B,) -> (B, 1, T, T), True where a key may be seen: the prompt by all, the rest causally.

    Padding stands behind every token, so no token sees it.
    """
    return (positions <= positions[:, None]) | (positions < prompt_len[:, None, None, None])
