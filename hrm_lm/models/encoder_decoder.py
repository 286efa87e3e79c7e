"""HRMEncoderDecoder: token embedding -> bidirectional encoder -> HRMCore -> bridge -> causal decoder.

Chosen: encoder and decoder share the embedding; the head is untied; the bridge is either cross-attention in every
decoder block, or `prefix_len` vectors pooled from the core's states and put before the decoder's input. A learned
gate scales what crosses the bridge. `h_cycles: 0` leaves the core out: the baseline without HRM.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hrm_lm.config import BridgeConfig, Cycles, ModelConfig
from hrm_lm.data.collate import Batch, PackedBatch
from hrm_lm.models import cache
from hrm_lm.models.cache import Cursor, KVCache
from hrm_lm.models.contract import LanguageModel
from hrm_lm.models.hrm import Carry, HRMCore, Thought
from hrm_lm.models.layers import Block, CrossAttention, Head, Mask, Rotary, ScaledEmbedding, Stack, rms_norm, rotary
from hrm_lm.models.masks import needs_dense, takes_blocks, visible, visible_blocks


class Bridge(nn.Module):
    """What takes the core's states to the decoder, and the gate on it."""

    def __init__(self, config: BridgeConfig, d_model: int, n_heads: int):
        super().__init__()
        self.warmup_steps = config.gate_warmup_steps
        self.gate = nn.Parameter(torch.tensor([2.0]))  # sigmoid(2) = 0.88: nearly open; FSDP shards no scalars
        # Saved with the weights, so that a checkpoint from within the warm-up generates as it was trained.
        self.register_buffer("open", torch.tensor(0.0 if self.warmup_steps else 1.0))
        self._is_open = not self.warmup_steps
        if config.type == "prefix":
            self.queries = nn.Parameter(torch.randn(config.prefix_len, d_model))
            self.pool = CrossAttention(d_model, n_heads)

    def set_step(self, step: int) -> None:
        """Opens the gate once optimisation step `step` is past the warm-up; costs nothing in between."""
        if self._is_open != (step >= self.warmup_steps):
            self._is_open = not self._is_open
            self.open.fill_(float(self._is_open))

    def scale(self) -> Tensor:
        return self.open * torch.sigmoid(self.gate)

    def prefix(self, states: Tensor, mask: Mask) -> Tensor:
        """states: (B, S, C); mask: over S keys. Returns (B, prefix_len, C): attention pooling by learned queries."""
        queries = self.queries.expand(len(states), -1, -1).to(states.dtype)
        return self.scale() * self.pool(queries, self.pool.keys_values(states), mask)


class Sight(NamedTuple):
    """Where the tokens of a batch stand in their samples, and what they see."""

    encoder_positions: Tensor  # (S,) or (B, S)
    encoder_mask: Mask
    decoder_positions: Tensor  # (T,) or (B, T); the vectors of the prefix bridge count
    decoder_mask: Mask  # None: all before
    cross_mask: Mask


@dataclass
class Decoding(cache.Decoding):
    gate: Tensor
    """What scales the bridge."""


class HRMEncoderDecoder(LanguageModel):
    recurs_per_token = False

    def __init__(self, config: ModelConfig, vocab_size: int):
        super().__init__()
        self.config = config
        C, sizes = config.d_model, (config.d_model, config.n_heads, config.expansion, config.dropout)
        self.head_dim = C // config.n_heads
        self.embedding = ScaledEmbedding(vocab_size, C)
        self.encoder = Stack(config.encoder_layers, *sizes)
        self.core: HRMCore | None = None
        if config.hrm.h_cycles:
            h_stack = Stack(config.hrm.h_layers, *sizes)
            l_stack = None if config.hrm.shared else Stack(config.hrm.l_layers, *sizes)
            self.core = HRMCore(h_stack, l_stack, C, inject=config.hrm.inject)
        self.bridge = Bridge(config.bridge, C, config.n_heads)
        cross = config.bridge.type == "cross_attention"
        self.decoder = nn.ModuleList(Block(*sizes, cross=cross) for _ in range(config.decoder_layers))
        self.norm = rms_norm(C)
        self.head = Head(C, vocab_size)

    def set_step(self, step: int) -> None:
        self.bridge.set_step(step)

    def encode(
        self,
        ids: Tensor,
        positions: Tensor,
        mask: Mask,
        cycles: Cycles,
        backprop_steps: int | None = None,
        carry: Carry | None = None,
        tokens: Tensor | None = None,
    ) -> Thought:
        """ids: (B, S). cycles to tokens: those of `HRMCore`."""
        rope = rotary(positions, self.head_dim)
        x = self.encoder(self.embedding(ids), rope, mask)
        if self.core is None:
            return Thought.of(x)
        return self.core(x, rope, mask, cycles, backprop_steps, None, carry, tokens)

    def _cross(self, states: Tensor, mask: Mask) -> list:
        """What each decoder block attends to besides its own past: keys and values, mask, gate."""
        if self.config.bridge.type == "prefix":
            return [None] * len(self.decoder)
        gate = self.bridge.scale()
        return [(block.cross.keys_values(states), mask, gate) for block in self.decoder]

    def _decode(
        self, x: Tensor, rope: Rotary, memory: list, mask: Mask = None, caches: list[KVCache] | None = None
    ) -> Tensor:
        """mask: of x's tokens; None where each sees all before it."""
        for i, block in enumerate(self.decoder):
            x = block(x, rope, mask, causal=mask is None, cache=caches[i] if caches else None, memory=memory[i])
        return x

    def _decoder_inputs(self, states: Tensor, mask: Mask, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        if self.config.bridge.type == "prefix":
            x = torch.cat([self.bridge.prefix(states, mask).to(x.dtype), x], dim=1)
        return x

    def states(
        self,
        batch: Batch | PackedBatch,
        cycles: Cycles,
        backprop_steps: int | None = None,
        carry: Carry | None = None,
    ) -> tuple[list[Tensor], Thought | None]:
        sight = self._packed_sight(batch) if isinstance(batch, PackedBatch) else self._sight(batch, cycles)
        positions, mask = sight.encoder_positions, sight.encoder_mask
        tokens = batch.thought_about
        thought = self.encode(batch.encoder_ids, positions, mask, cycles, backprop_steps, carry, tokens)
        states = []
        for z_h in thought.states if self.training and self.config.hrm.deep_supervision else thought.states[-1:]:
            x = self._decoder_inputs(z_h, sight.cross_mask, batch.decoder_input_ids)
            rope = rotary(sight.decoder_positions, self.head_dim)
            x = self._decode(x, rope, self._cross(z_h, sight.cross_mask), sight.decoder_mask)
            states.append(self.norm(x[:, x.shape[1] - batch.decoder_input_ids.shape[1] :]))  # without the prefix
        return states, thought if self.core else None

    @property
    def _dense(self) -> bool:
        return needs_dense(self.head_dim, self.config.dropout if self.training else 0.0)

    def _sight(self, batch: Batch, cycles: Cycles) -> Sight:
        """Of samples in rows of their own. A mask over keys alone costs nothing, except in a compiled block on CUDA: there
        each call of attention spreads it over all queries. So long rows take blocks there.
        """
        S, T = batch.encoder_ids.shape[1], batch.decoder_input_ids.shape[1]
        keys = batch.encoder_mask[:, None, None, :].bool()
        may_take = (
            self.decoder[0]._compiled_call_impl is not None and cycles.halt is None
        )  # whose samples leave the batch

        def over_prompts(queries: int) -> Mask:
            if not (may_take and takes_blocks(keys, queries, S, self._dense)):
                return keys
            last = (batch.encoder_mask.sum(dim=1, keepdim=True) - 1).repeat(1, queries)
            return visible_blocks(torch.zeros_like(last), last, S)

        prefix = self.config.bridge.type == "prefix"
        places = torch.arange(max(S, T + self.config.bridge.prefix_len), device=keys.device)
        return Sight(
            encoder_positions=places[:S],
            encoder_mask=over_prompts(S),
            decoder_positions=places[: T + self.config.bridge.prefix_len * prefix],
            decoder_mask=None,
            cross_mask=keys if prefix else over_prompts(T),
        )

    def _packed_sight(self, batch: PackedBatch) -> Sight:
        S, T = batch.encoder_ids.shape[1], batch.decoder_input_ids.shape[1]
        place = torch.arange(T, device=batch.decoder_positions.device)[None]
        return Sight(
            encoder_positions=batch.encoder_positions,
            encoder_mask=visible(batch.encoder_sees_from, batch.encoder_sees_to, S, self._dense),
            decoder_positions=batch.decoder_positions,
            decoder_mask=visible(place - batch.decoder_positions, place, T, self._dense),
            cross_mask=visible(batch.decoder_sees_from, batch.decoder_sees_to, S, self._dense),
        )

    def open(self, rows: int, prompt_len: int, max_new_tokens: int, cycles: Cycles) -> Decoding:
        """Room to generate for so many samples at a time, whose prompts have up to `prompt_len` tokens."""
        device, prefix = self.embedding.weight.device, self.config.bridge.type == "prefix"
        width = 1 + (self.config.bridge.prefix_len if prefix else 0)
        cursor, prompts = Cursor(rows, width + max_new_tokens, device), Cursor(rows, prompt_len, device)
        caches = [KVCache(cursor) for _ in self.decoder]
        memory = [] if prefix else [KVCache(prompts) for _ in self.decoder]
        rope = rotary(cursor.places, self.head_dim)
        return Decoding(cycles, cursor, [caches], rope, memory, self.bridge.scale())

    def prefill(self, prompt_ids: Tensor, prompt_lens: Sequence[int], bos_id: int, decoding: Decoding) -> Tensor:
        """Reads prompts (B, S), padded on the right, and adds their samples. Returns the logits (B, V) of the first new
        token.
        """
        B, S = prompt_ids.shape
        places, lens = torch.arange(S, device=prompt_ids.device), torch.tensor(prompt_lens)
        keys = (places < lens.to(prompt_ids.device, non_blocking=True)[:, None])[:, None, None, :]
        width = 1 + (0 if decoding.memory else self.config.bridge.prefix_len)
        rope = tuple(values[:width] for values in decoding.rope)
        reads = [decoding.cursor.read(max(S, width), [width] * B)]
        if decoding.memory:
            # Responses look as far as their prompt's last place, as if it were the next token's.
            reads.append(decoding.memory[0].cursor.read(max(S, width), [length - 1 for length in prompt_lens]))
        logits = []
        for some, *_ in zip(*reads, strict=True):
            mask = keys[some]
            thought = self.encode(prompt_ids[some], places, mask, decoding.cycles, tokens=mask[:, 0, 0])
            states = decoding.settled(thought)
            x = self._decoder_inputs(states, keys[some], prompt_ids.new_full((len(states), 1), bos_id))
            memory = self._cross(states, keys[some])
            for kept, (keys_values, *_) in zip(decoding.memory, memory):
                kept.append(*keys_values)
            x = self._decode(x, rope, memory, caches=decoding.caches[0])
            logits.append(self.head(self.norm(x[:, -1])))
        return torch.cat(logits)

    def decode(self, tokens: Tensor, decoding: Decoding) -> Tensor:
        """Appends tokens (B,) and returns the logits (B, V) of the next token."""
        cursor, (caches,), B = decoding.cursor, decoding.caches, len(tokens)
        memory: list = [None] * len(caches)
        if decoding.memory:
            mask = decoding.memory[0].cursor.mask(B)
            memory = [(kept.filled(B), mask, decoding.gate) for kept in decoding.memory]
        rope = cursor.rope(decoding.rope, B)
        x = self._decode(self.embedding(tokens[:, None]), rope, memory, cursor.mask(B), caches)
        cursor.advance(B)
        return self.head(self.norm(x[:, -1]))
