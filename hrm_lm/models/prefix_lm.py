"""HRMPrefixLM: the published HRM-Text model (arXiv 2605.20613), one token stream through HRMCore.

The sequence of a sample is its prompt and, right behind it, its response (`hrm_lm.data.collate.TokenRows`). The prompt's
last token predicts the first token of the response, so there is no BOS. Prompt tokens see the whole prompt, response
tokens see everything before them. Only positions that predict a label get logits.

As published: blocks of the `hrm_text` kind, a norm at each stack's end, an embedding scaled by the inverse of its
initial standard deviation, a fixed random low-level initial state, and an untied head. Where the applications without
gradient cut the embedding off, no gradient reaches it.

`h_cycles: 0` is the baseline without recurrence: the same blocks, H's and L's together, as one plain stack applied
once. So it has the parameters of the HRM it is compared with; for its compute, give it more layers.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hrm_lm.config import Cycles, ModelConfig
from hrm_lm.data.collate import Stream, TokenRows, join
from hrm_lm.models.cache import Cursor, Decoding, KVCache
from hrm_lm.models.contract import LanguageModel
from hrm_lm.models.hrm import Carry, HRMCore, Thought
from hrm_lm.models.layers import Head, Mask, Rotary, ScaledEmbedding, Stack, lecun_normal_, rotary
from hrm_lm.models.masks import needs_dense, visible


class TokenStream(LanguageModel):
    """A model that takes samples through the core as single sequences (`TokenRows`): the base class of `HRMPrefixLM` and
    `hrm_lm.models.puzzle.HRMPuzzle`.
    """

    hrm_text: bool
    """Whether its blocks are the published ones."""

    def __init__(self, config: ModelConfig, vocab_size: int):
        super().__init__()
        self.config, hrm = config, config.hrm
        C, sizes = config.d_model, (config.d_model, config.n_heads, config.expansion, config.dropout)
        self.head_dim = C // config.n_heads
        self.embedding = ScaledEmbedding(vocab_size, C)
        self.core: HRMCore | None = None
        self.stack: Stack | None = None
        if hrm.h_cycles:
            h_stack = Stack(hrm.h_layers, *sizes, hrm_text=self.hrm_text)
            l_stack = None if hrm.shared else Stack(hrm.l_layers, *sizes, hrm_text=self.hrm_text)
            self.core = HRMCore(h_stack, l_stack, C, straight_through=0.0, inject=hrm.inject)
            lecun_normal_(self.core.z_l0, fan_in=1)
        else:
            self.stack = Stack(hrm.h_layers + hrm.l_layers, *sizes, hrm_text=self.hrm_text)
        self.head = Head(C, vocab_size)

    def embed(self, ids: Tensor) -> Tensor:
        """ids: (B, T)."""
        return self.embedding(ids)

    def think(
        self,
        x: Tensor,
        rope: Rotary,
        mask: Mask,
        cycles: Cycles,
        backprop_steps: int | None = None,
        caches: list[list[KVCache]] | None = None,
        carry: Carry | None = None,
        tokens: Tensor | None = None,
    ) -> Thought:
        """x: (B, T, C). The arguments are those of `HRMCore`."""
        if self.stack is not None:
            return Thought.of(self.stack(x, rope, mask, caches[0] if caches else None))
        assert self.core is not None
        return self.core(x, rope, mask, cycles, backprop_steps, caches, carry, tokens)

    def states(
        self, batch: TokenRows, cycles: Cycles, backprop_steps: int | None = None, carry: Carry | None = None
    ) -> tuple[list[Tensor], Thought | None]:
        dense = cycles.halt is not None or needs_dense(self.head_dim, self.config.dropout if self.training else 0.0)
        mask = visible(batch.sees_from, batch.sees_to, batch.ids.shape[1], dense)
        x, rope = self.embed(batch.ids), rotary(batch.positions, self.head_dim)
        thought = self.think(x, rope, mask, cycles, backprop_steps, None, carry, batch.thought_about)
        states = thought.states if self.training and self.config.hrm.deep_supervision else thought.states[-1:]
        # The gradient of plain indexing sorts its indices, that of index_select adds. Places come once, and padding has no gradient.
        read = [z_h.flatten(0, 1).index_select(0, batch.label_at) for z_h in states]
        return read, thought if self.core else None


class HRMPrefixLM(TokenStream):
    hrm_text = True
    collate = staticmethod(join)

    def __init__(self, config: ModelConfig, vocab_size: int):
        super().__init__(config, vocab_size)
        self.stream = Stream(causal=config.mask == "causal")

    def open(self, rows: int, prompt_len: int, max_new_tokens: int, cycles: Cycles) -> Decoding:
        """Room to generate for so many samples at a time, whose prompts have up to `prompt_len` tokens."""
        if self.core is None:
            stacks: list[Any] = [self.stack]
        else:
            stacks = ([self.core.fast] * cycles.l + [self.core.h_stack]) * cycles.h
        cursor = Cursor(rows, prompt_len + max_new_tokens, self.embedding.weight.device)
        caches = [[KVCache(cursor) for _ in stack.blocks] for stack in stacks]
        return Decoding(cycles, cursor, caches, rotary(cursor.places, self.head_dim), memory=[])

    def prefill(self, prompt_ids: Tensor, prompt_lens: Sequence[int], bos_id: int, decoding: Decoding) -> Tensor:
        """Reads prompts (B, S), padded on the right, and adds their samples. Returns the logits (B, V) of the first new
        token. `bos_id` is for models whose decoder starts with BOS; here the prompt's last token predicts.
        """
        S, lens = prompt_ids.shape[1], torch.tensor(prompt_lens).to(prompt_ids.device, non_blocking=True)
        places = decoding.cursor.places[:S]
        visible = places < lens[:, None]
        cos, sin = (values[:S] for values in decoding.rope)
        logits = []
        for some in decoding.cursor.read(S, prompt_lens):
            mask = visible[some, None, None]
            if self.stream.causal:
                mask = mask & (places <= places[:, None])
            x = self.embedding(prompt_ids[some])
            thought = self.think(x, (cos, sin), mask, decoding.cycles, caches=decoding.caches, tokens=visible[some])
            states = decoding.settled(thought)
            logits.append(self.head(states[torch.arange(len(states), device=states.device), lens[some] - 1]))
        return torch.cat(logits)

    def decode(self, tokens: Tensor, decoding: Decoding) -> Tensor:
        """Appends tokens (B,) and returns the logits (B, V) of the next token."""
        cursor, B = decoding.cursor, len(tokens)
        rope = cursor.rope(decoding.rope, B)
        x = self.embedding(tokens[:, None])
        tokens = x.new_ones(B, 1)
        thought = self.think(x, rope, cursor.mask(B), decoding.cycles, caches=decoding.caches, tokens=tokens)
        states = decoding.settled(thought)
        cursor.advance(B)
        return self.head(states[:, -1])
