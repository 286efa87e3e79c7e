"""From prompts to responses, token by token."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hrm_lm.data.tokenizer import Tokenizer
from hrm_lm.models.contract import EvalOptions, LanguageModel, autocast


@torch.no_grad()
def generate_ids(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    options: EvalOptions,
    *,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
    in_step: bool = False,
) -> list[list[int]]:
    """The responses to `prompts`, in their order; each ends before EOS or after `max_new_tokens` (the model's most).

    Greedy at temperature 0, else sampled from the `top_k` likeliest tokens (all of them for None). `in_step`: takes all
    steps whatever the answers, as workers that share a model must.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    max_new_tokens = max_new_tokens or model.config.max_response_len
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # alike lengths together: little padding
    responses: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), options.batch_size):
        chosen = order[start : start + options.batch_size]
        rows = [torch.tensor(np.asarray(prompts[i], dtype=np.int64)) for i in chosen]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_id).to(device)
        lens = torch.tensor([len(row) for row in rows], device=device)
        with autocast(device, options.mixed_precision):
            logits, decoding = model.prefill(ids, lens, tokenizer.bos_id, max_new_tokens, options.cycles)
            tokens = [pick(logits, temperature, top_k, generator)]
            done = tokens[0] == tokenizer.eos_id
            while len(tokens) < max_new_tokens and (in_step or not done.all()):
                tokens.append(pick(model.decode(tokens[-1], decoding), temperature, top_k, generator))
                done |= tokens[-1] == tokenizer.eos_id
        for i, row in zip(chosen, torch.stack(tokens, dim=1).tolist()):
            responses[i] = row[: row.index(tokenizer.eos_id)] if tokenizer.eos_id in row else row
    return responses


def pick(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> Tensor:
    """The next token of each row: logits (B, V) -> (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
