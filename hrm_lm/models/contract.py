"""The model contract: what the loop, validation and generation ask of a model, and the values they hand it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from hrm_lm.config import Config, Cycles, ModelConfig
from hrm_lm.data.collate import AnyBatch, Collate, Rows, SpecialTokens, Stream, join, pack, pack_apart, pad
from hrm_lm.data.splits import Ragged
from hrm_lm.models.cache import Decoding
from hrm_lm.models.hrm import Carry, Thought
from hrm_lm.models.layers import Head

Precision = Literal["none", "bf16", "fp16", "fp8"]


def autocast(device: torch.device, mixed_precision: Precision) -> AbstractContextManager:
    """With fp8, what is not in float8 is in bf16; see `hrm_lm.models.float8`."""
    dtype = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}[mixed_precision]
    return torch.autocast(device.type, dtype) if dtype else nullcontext()


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """How a model is run where it does not learn. One value, so that no option is lost on the way."""

    cycles: Cycles
    mixed_precision: Precision = "none"
    batch_size: int = 64
    round_up: bool = False
    """Whether sizes are rounded up to those that training has seen, for compiled models."""
    rows: Rows | None = None
    """Samples lie end to end in rows of so many tokens, instead of `batch_size` of them in rows of their own."""

    @classmethod
    def of(cls, config: Config, **changes: Any) -> EvalOptions:
        """As the run of `config` validates, but for `changes`."""
        options = cls(
            cycles=config.cycles,
            mixed_precision=config.train.mixed_precision,
            batch_size=config.micro_batch_size,
            round_up=config.train.length_window > 0,
        )
        return replace(options, **changes)


def layout(model: LanguageModel, rows: Rows | None, objective: Literal["response", "all"] = "response") -> Collate:
    """How samples become the model's batches: as its architecture wants, or with `rows` packed into these. objective: which
    of their tokens are labels; see `train.objective`.
    """
    if rows is not None and len(rows) == 2:
        return partial(pack_apart, rows=rows)
    stream = model.stream._replace(everything=objective == "all")
    if rows is not None:
        return partial(pack, width=rows[0], stream=stream)
    return model.collate if stream == Stream() else partial(join, stream=stream)


class Prediction(NamedTuple):
    """What a model makes of a batch's labels; both tensors are shaped like `batch.labels`."""

    losses: Tensor
    """float32: cross-entropy of each label, 0 where it is IGNORE."""
    right: Tensor | None
    """bool: whether the label is the likeliest token; False where it is IGNORE. None while training, which has no use
    for it."""


class Output(NamedTuple):
    """What a model makes of a batch."""

    predictions: list[Prediction]
    """The last is the model's answer. While training with deep supervision, those of the earlier H-cycles come before it."""
    thought: Thought | None
    """The core's states; None where there is no core."""


class LanguageModel(nn.Module):
    """A model that answers prompts: the base class of `hrm_lm.models.encoder_decoder` and `prefix_lm`, and of yours."""

    config: ModelConfig
    head: Head
    core: nn.Module | None
    """The HRMCore, or None for a model without recurrence."""
    stream: Stream = Stream()
    """How samples are read where they are single sequences."""
    recurs_per_token: bool = True
    """Whether the core runs for every new token, and not only for the prompt."""

    @staticmethod
    def collate(samples: Ragged, tokens: SpecialTokens, round_up: bool = False) -> AnyBatch:
        """Makes the batch in the layout that the architecture wants. This is the guide's."""
        return pad(samples, tokens, round_up)

    def forward(
        self, batch: Any, cycles: Cycles, backprop_steps: int | None = None, carry: Carry | None = None
    ) -> Output:
        """batch: what `collate` made. backprop_steps, carry: see `HRMCore`; a carry is of the same batch."""
        states, thought = self.states(batch, cycles, backprop_steps, carry)
        return Output([predict(self.head, some, batch.labels) for some in states], thought)

    def states(
        self, batch: Any, cycles: Cycles, backprop_steps: int | None = None, carry: Carry | None = None
    ) -> tuple[list[Tensor], Thought | None]:
        """What the head reads, (..., C), aligned with `batch.labels`, for each prediction that is due; and the core's states."""
        raise NotImplementedError

    def open(self, rows: int, prompt_len: int, max_new_tokens: int, cycles: Cycles) -> Decoding:
        """Room to generate for so many samples at a time, whose prompts have up to `prompt_len` tokens."""
        raise NotImplementedError

    def prefill(self, prompt_ids: Tensor, prompt_lens: Sequence[int], bos_id: int, decoding: Any) -> Tensor:
        """Reads prompts (B, S), padded on the right, and adds their samples to what `decoding` holds. Returns the logits
        (B, V) of the first new token. prompt_lens: at least 1 each.
        """
        raise NotImplementedError

    def decode(self, tokens: Tensor, decoding: Any) -> Tensor:
        """Appends tokens (B,) to the samples of `decoding` and returns the logits (B, V) of the next token. B may exceed the
        samples, up to the rows; what comes of the other rows means nothing. On CUDA this is captured as a graph: it
        reads and changes tensors in place, and its shapes follow B and `decoding.shape` alone.
        """
        raise NotImplementedError

    def set_step(self, step: int) -> None:
        """Follows schedules of the model's own, as of optimisation step `step`. A model without a schedule does nothing.
        What changes is a tensor that keeps its place in memory, since a CUDA graph reads it there.
        """


def predict(head: Head, states: Tensor, labels: Tensor) -> Prediction:
    """states: (..., C), where `labels` (...) are predicted."""
    return Prediction(head.losses(states, labels), None if torch.is_grad_enabled() else head.right(states, labels))
