"""Transformer parts: rotary positions, attention, SwiGLU, the pre-norm block.

Chosen: pre-norm with RMSNorm, rotary positions (no learned positions), SwiGLU, no biases, fused qkv and gate-up
projections. Attention goes through `scaled_dot_product_attention`, or through flex attention where the mask is a
BlockMask. Weights are drawn from a truncated LeCun normal (variance 1 / fan_in).

Under autocast in bf16 the residual stream is in bf16 from the embedding on. Statistics of norms, angles of rotary
positions and losses are computed in float32, whatever the stream's dtype.

A block comes in two kinds: this project's, and with `hrm_text` the published one (arXiv 2605.20613), whose norms have
no parameters, whose attention has a sigmoid gate on its output, and whose SwiGLU is rounded up to a multiple of 256.

Shapes: B batch, T positions, H heads, D head size, C = H * D model width.
"""

import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint

from hrm_lm.data.collate import IGNORE
from hrm_lm.models.cache import KVCache

Rotary = tuple[Tensor, Tensor]
Mask: TypeAlias = Tensor | BlockMask | None
"""What may be seen: bool, broadcastable to (B, H, T, keys), True where a key may be; or the same as blocks."""


class Linear(nn.Linear):
    """Has no bias, and draws its weight as this project does."""

    def __init__(self, fan_in: int, fan_out: int):
        super().__init__(fan_in, fan_out, bias=False)

    def reset_parameters(self) -> None:
        if self.weight.numel() < LARGE:
            super().reset_parameters()  # small weights keep the draws that they always had, which came after these
        lecun_normal_(self.weight, self.in_features)


class RMSNorm(nn.RMSNorm):
    """Keeps the stream's dtype: PyTorch's own has no fused kernel for a float32 weight on a stream in bf16."""

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


def rms_norm(d_model: int, hrm_text: bool = False) -> RMSNorm:
    return RMSNorm(d_model, eps=1e-6, elementwise_affine=not hrm_text)


def lecun_normal_(weight: Tensor, fan_in: int) -> Tensor:
    """Normal with variance 1 / fan_in, truncated at two standard deviations and rescaled for what that cuts off.

    `nn.init.trunc_normal_` of PyTorch 2.13 draws all values again until they are within. For large weights that takes long,
    so there a uniform draw goes through the inverse of the distribution, which is eight times as fast.
    """
    std = 1 / math.sqrt(fan_in) / 0.87962566103423978
    if weight.numel() < LARGE:
        return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
    within = math.erf(math.sqrt(2))  # the share of values within two standard deviations

    def draw(part: Tensor, generator: torch.Generator | None = None) -> None:
        part.uniform_(-within, within, generator=generator).erfinv_().mul_(std * math.sqrt(2)).clamp_(-2 * std, 2 * std)

    with torch.no_grad():
        draw(weight) if weight.device.type != "cpu" else in_parts(draw, weight.detach())
    return weight


def in_parts(draw: Callable[[Tensor, torch.Generator], None], weight: Tensor) -> None:
    """Has parts of the weight drawn at once, each by a generator of its own: PyTorch draws one value after another. The values
    do not depend on the number of threads.
    """
    parts = weight.view(-1).split(PART)
    first = int(torch.randint(2**32 - len(parts), ()))  # a CPU's generator takes 32 bits of a seed
    with drawing_at_once() as threads:
        for _ in threads.map(lambda i: draw(parts[i], torch.Generator().manual_seed(first + i)), range(len(parts))):
            pass


PART = 1 << 17
"""Values of a part: so many that Python is in no thread's way."""


@contextmanager
def drawing_at_once() -> Iterator[ThreadPoolExecutor]:
    """Yields threads that draw. Where it is entered again within, it yields the same threads: beside a thread that is busy in Python,
    starting threads for each weight takes longer than drawing it.
    """
    if threads := DRAWING.get():
        yield threads
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Not `torch.get_num_threads`: Ray sets that to 1 in a worker with a GPU.
    with ThreadPoolExecutor(min(cores, 16)) as threads:
        token = DRAWING.set(threads)
        try:
            yield threads
        finally:
            DRAWING.reset(token)


DRAWING: ContextVar[ThreadPoolExecutor | None] = ContextVar("DRAWING", default=None)
LARGE = 1 << 20
"""Weights from which on it matters how fast they are drawn. Smaller ones keep the draws that they always had."""


class ScaledEmbedding(nn.Embedding):
    """Token embedding whose output has unit variance at the start: drawn with std 1/sqrt(C), scaled by sqrt(C)."""

    def __init__(self, vocab_size: int, d_model: int):
        super().__init__(vocab_size, d_model)
        self.scale = math.sqrt(d_model)

    def reset_parameters(self) -> None:
        if self.weight.numel() < LARGE:
            super().reset_parameters()
        lecun_normal_(self.weight, self.embedding_dim)

    def forward(self, ids: Tensor) -> Tensor:
        x = super().forward(ids) * self.scale
        device = x.device.type
        in_bf16 = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
        return x.to(torch.bfloat16) if in_bf16 else x  # float16 has too narrow a range for a stream of sums


def rotary(positions: Tensor, head_dim: int, theta: float = 10_000.0) -> Rotary:
    """Cosines and sines of rotary positions (RoFormer, arXiv 2104.09864), halves rotated against each other. The sines of the
    left half are negative, as `rotate` wants them.

    positions: (T,) or (B, T), integer. Returns two float32 tensors, (T, 1, D) or (B, T, 1, D), the same for all heads.
    """
    frequencies = 1 / theta ** (torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    angles = positions[..., None, None].float() * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, rope: Rotary) -> Tensor:
    """x: (B, T, H, D), turned by its positions; keeps the dtype."""
    cos, sin = rope
    return (x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin).to(x.dtype)


def compiled_flex_attention():
    """For blocks that are not compiled: uncompiled, flex attention would hold all scores in memory."""
    if torch._dynamo.config.recompile_limit < 64:  # which PyTorch 2.13 keeps for each thread
        torch._dynamo.config.recompile_limit = 64
    return flex_attention_once_compiled()


@cache
def flex_attention_once_compiled():
    """Returns the same compiled function each time, so that what it has compiled is kept."""
    return torch.compile(flex_attention)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, causal: bool = False, dropout: float = 0.0) -> Tensor:
    """q: (B, H, T, D); k, v: (B, H, keys, D). Returns (B, H, T, D). There is no dropout where the mask is a BlockMask."""
    if isinstance(mask, BlockMask):
        flex = flex_attention if torch.compiler.is_compiling() else compiled_flex_attention()
        return flex(q, k, v, block_mask=mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, dropout_p=dropout)


class SelfAttention(nn.Module):
    """Multi-head attention; `gated`: each element of its output is scaled by a sigmoid of the input."""

    def __init__(self, d_model: int, n_heads: int, dropout: float = 0.0, gated: bool = False):
        super().__init__()
        self.n_heads, self.dropout = n_heads, dropout
        self.qkv = Linear(d_model, (4 if gated else 3) * d_model)  # the gate's rows come first
        self.out = Linear(d_model, d_model)

    def forward(
        self, x: Tensor, rope: Rotary, mask: Mask = None, causal: bool = False, cache: KVCache | None = None
    ) -> Tensor:
        """x: (B, T, C). Returns the same shape."""
        B, T, C = x.shape
        heads = (B, T, -1, C // self.n_heads)
        qkv = self.qkv(x)
        gate, qk, v = qkv.split([qkv.shape[-1] - 3 * C, 2 * C, C], dim=-1)
        qk = rotate(qk.view(heads), rope)  # together: half as many operations
        # Views of (B, T, ...) until the end: in backward what the projection reads is then made in one pass.
        q, k, v = (part.transpose(1, 2) for part in (*qk.chunk(2, dim=2), v.view(heads)))  # each (B, H, T, D)
        if cache is not None:
            k, v = cache.append(k, v)
        y = attend(q, k, v, mask, causal, self.dropout if self.training else 0.0).transpose(1, 2).reshape(B, T, C)
        return self.out(torch.sigmoid(gate) * y if gate.shape[-1] else y)


class CrossAttention(nn.Module):
    def __init__(self, d_model: int, n_heads: int, dropout: float = 0.0):
        super().__init__()
        self.n_heads, self.dropout = n_heads, dropout
        self.q = Linear(d_model, d_model)
        self.kv = Linear(d_model, 2 * d_model)
        self.out = Linear(d_model, d_model)

    def keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """memory: (B, S, C). Returns keys and values, (B, H, S, D)."""
        B, S, _ = memory.shape
        k, v = self.kv(memory).view(B, S, 2, self.n_heads, -1).permute(2, 0, 3, 1, 4)
        return k, v

    def forward(self, x: Tensor, keys_values: tuple[Tensor, Tensor], mask: Mask = None) -> Tensor:
        """x: (B, T, C); mask: over S keys."""
        B, T, C = x.shape
        q = self.q(x).view(B, T, self.n_heads, -1).transpose(1, 2)
        y = attend(q, *keys_values, mask, dropout=self.dropout if self.training else 0.0)
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class SwiGLU(nn.Module):
    """Gated feed-forward (arXiv 2002.05202): out(silu(gate(x)) * up(x)), hidden size a multiple of `multiple`."""

    def __init__(self, d_model: int, expansion: float, multiple: int = 32):
        super().__init__()
        hidden = self.hidden_size(d_model, expansion, multiple)
        self.gate_up = Linear(d_model, 2 * hidden)
        self.out = Linear(hidden, d_model)

    @staticmethod
    def hidden_size(d_model: int, expansion: float, multiple: int) -> int:
        return math.ceil(round(expansion * d_model * 2 / 3) / multiple) * multiple

    def forward(self, x: Tensor) -> Tensor:
        gate_up = self.gate_up(x)
        return self.out(SiluMul.apply(gate_up) if torch.compiler.is_compiling() else silu_mul(gate_up))


def silu_mul(gate_up: Tensor) -> Tensor:
    """(..., 2 h) -> (..., h)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class SiluMul(torch.autograd.Function):
    """Computes `silu_mul`. Its gradient is that of autograd, in a form that compiles well."""

    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return silu_mul(gate_up)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        return silu_mul_gradient(gate_up, gradient)


def silu_mul_gradient(gate_up: Tensor, gradient: Tensor) -> Tensor:
    """(..., 2 h) and (..., h) -> (..., 2 h). It avoids `cat`: Inductor makes a kernel of it that computes both halves for each
    element.
    """
    gate, up = gate_up.unflatten(-1, (2, -1)).float().split(1, dim=-2)  # (..., 1, h)
    of_gate = torch.arange(2, device=gate.device)[:, None] == 0
    sigmoid = gate.sigmoid()
    slope = torch.where(of_gate, up * (sigmoid * (1 + gate * (1 - sigmoid))), gate * sigmoid)
    return (gradient.unsqueeze(-2) * slope).to(gate_up.dtype).flatten(-2)


class Head(Linear):
    """States to logits of the next token, or to losses of labels. Logits are made so many at a time that they stay small: of a
    vocabulary of 65,536, the float32 copies of those of 16,384 labels would take 4 GiB, and their gradients as much.
    """

    def __init__(self, d_model: int, vocab_size: int):
        super().__init__(d_model, vocab_size)
        self.label_losses = label_losses
        self.logits_at_once = LOGITS_AT_ONCE
        """If there are more, some of them are held at a time, and computed once more in backward."""

    def losses(self, states: Tensor, labels: Tensor) -> Tensor:
        """states: (..., C), where `labels` (...) are predicted. Returns their cross-entropy (...), float32, 0 at IGNORE."""
        rows, targets = states.flatten(0, -2), labels.flatten()
        pieces = -(-rows.shape[0] * self.out_features // self.logits_at_once)
        if pieces == 1:
            return self.label_losses(rows, self.weight, targets).view_as(labels)
        size = -(-len(targets) // pieces)
        losses = [
            checkpoint(self.label_losses, some, self.weight, those, use_reentrant=False, preserve_rng_state=False)
            for some, those in zip(rows.split(size), targets.split(size), strict=True)
        ]
        return torch.cat(losses).view_as(labels)

    def right(self, states: Tensor, labels: Tensor) -> Tensor:
        """(...) bool: whether the label is the likeliest token."""
        rows, targets = states.flatten(0, -2), labels.flatten()
        size = max(LOGITS_AT_ONCE // self.out_features, 1)
        pieces = [
            self(some).argmax(-1) == those for some, those in zip(rows.split(size), targets.split(size), strict=True)
        ]
        return torch.cat(pieces).view_as(labels)


LOGITS_AT_ONCE = 1 << 28
"""Logits that are held at a time while losses are computed, in float32: 1 GiB."""


def label_losses(states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """(N, C), (V, C) and (N,) -> (N,) float32."""
    return F.cross_entropy(F.linear(states, weight).float(), labels, ignore_index=IGNORE, reduction="none")


class Block(nn.Module):
    """Pre-norm block: self-attention, optionally gated cross-attention, feed-forward."""

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        expansion: float,
        dropout: float = 0.0,
        cross: bool = False,
        hrm_text: bool = False,
    ):
        super().__init__()
        self.attention_norm = rms_norm(d_model, hrm_text)
        self.attention = SelfAttention(d_model, n_heads, dropout, gated=hrm_text)
        self.cross: CrossAttention | None = None
        if cross:
            self.cross_norm = rms_norm(d_model, hrm_text)
            self.cross = CrossAttention(d_model, n_heads, dropout)
        self.mlp_norm = rms_norm(d_model, hrm_text)
        self.mlp = SwiGLU(d_model, expansion, multiple=256 if hrm_text else 32)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        rope: Rotary,
        mask: Mask = None,
        causal: bool = False,
        cache: KVCache | None = None,
        memory: tuple[tuple[Tensor, Tensor], Mask, Tensor] | None = None,
    ) -> Tensor:
        """memory: keys and values to attend to, their mask and the gate that scales what comes from them."""
        x = x + self.dropout(self.attention(self.attention_norm(x), rope, mask, causal, cache))
        if memory is not None and self.cross is not None:
            keys_values, memory_mask, gate = memory
            x = x + gate.to(x.dtype) * self.dropout(self.cross(self.cross_norm(x), keys_values, memory_mask))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class Stack(nn.Module):
    """Blocks and a closing norm, which keeps activations bounded however often the stack is applied."""

    def __init__(
        self,
        n_layers: int,
        d_model: int,
        n_heads: int,
        expansion: float,
        dropout: float = 0.0,
        hrm_text: bool = False,
    ):
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(d_model, n_heads, expansion, dropout, hrm_text=hrm_text) for _ in range(n_layers)
        )
        self.norm = rms_norm(d_model, hrm_text)

    def forward(self, x: Tensor, rope: Rotary, mask: Mask = None, caches: list[KVCache] | None = None) -> Tensor:
        """caches: one for each block."""
        for i, block in enumerate(self.blocks):
            x = block(x, rope, mask, cache=caches[i] if caches else None)
        return self.norm(x)
