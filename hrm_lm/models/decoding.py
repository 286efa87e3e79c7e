"""From prompts to responses, token by token.

On CUDA, a step from a token to the next one is captured as a CUDA graph and replayed, since launching its many small
kernels takes longer than they do. Blocks that are compiled for training run uncompiled here: prompts and caches come in
too many shapes to compile for. The host does not wait for the device at every token.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hrm_lm.data.tokenizer import Tokenizer
from hrm_lm.models.cache import Decoding
from hrm_lm.models.contract import EvalOptions, LanguageModel, autocast

LOOK_EVERY = {"cpu": 1, "cuda": 8}
"""By the kind of device, after how many tokens the host looks whether all samples have ended."""


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
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
    alive: Callable[[], None] = lambda: None,
    taken: list[Tensor] | None = None,
) -> list[list[int]]:
    """The responses to `prompts`, in their order; each ends before EOS or after `max_new_tokens` (the model's most).

    Greedy at temperature 0, else sampled from the `top_k` likeliest tokens (all of them for None). `in_step`: takes all
    steps whatever the answers, as workers that share a model must, and captures no graph, since they communicate. alive:
    called after each batch. taken: gets the H-cycles of each prompt and token where samples halt (`Decoding.taken`).
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    max_new_tokens = max_new_tokens or model.config.max_response_len
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # alike lengths together: little padding
    responses: list[list[int]] = [[] for _ in prompts]
    # Autocast remembers the weights that it has cast until it ends. Graphs read these copies, so it lasts for all of them.
    with autocast(device, options.mixed_precision):
        for start in range(0, len(order), options.batch_size):
            chosen = order[start : start + options.batch_size]
            ids, lens = padded([prompts[i] for i in chosen], tokenizer.pad_id, device)
            decoding = model.open(len(ids), ids.shape[1], max_new_tokens, options.cycles)
            logits = model.prefill(ids, lens, tokenizer.bos_id, decoding)
            plain = in_step or device.type != "cuda" or options.cycles.halt is not None
            decode = model.decode if plain else graphed(model)
            tokens = [pick(logits, temperature, top_k, generator)]
            done = tokens[0] == tokenizer.eos_id
            ended = ends(done)
            while len(tokens) < max_new_tokens:
                if not in_step and len(tokens) % LOOK_EVERY[device.type] == 0 and next(ended):
                    break
                tokens.append(pick(decode(tokens[-1], decoding), temperature, top_k, generator))
                done |= tokens[-1] == tokenizer.eos_id
            for i, row in zip(chosen, torch.stack(tokens, dim=1).tolist()):
                responses[i] = row[: row.index(tokenizer.eos_id)] if tokenizer.eos_id in row else row
            if taken is not None:
                taken += decoding.taken
            alive()
    return responses


def ends(done: Tensor) -> Iterator[bool]:
    """Whether all of `done` (B,), which changes in place, is true. On CUDA the answer is that of the look before: it has
    come by now, and the device has work until the host has read it.
    """
    if not done.is_cuda:
        while True:
            yield bool(done.all())
    answer, copied = torch.zeros((), dtype=torch.bool, pin_memory=True), torch.cuda.Event()
    while True:
        copied.synchronize()
        ended = bool(answer)
        answer.copy_(done.all(), non_blocking=True)
        copied.record()
        yield ended


def padded(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, list[int]]:
    """Prompts as a model reads them: ids (B, S), padded on the right, and their lengths."""
    rows = [torch.tensor(np.asarray(prompt, dtype=np.int64)) for prompt in prompts]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id)
    return ids.to(device), [len(row) for row in rows]


def graphed(model: LanguageModel) -> Callable[[Tensor, Decoding], Tensor]:
    """`model.decode` of one `Decoding`, as CUDA graphs: one for each shape of a step.

    The first step of a shape runs without a graph, and so makes ready what must not happen during a capture: kernels are
    loaded, libraries take their workspace, autocast casts weights. Logits are overwritten by the next step. All graphs
    share their memory.
    """
    graphs: dict[tuple[int, ...], tuple[torch.cuda.CUDAGraph, Tensor, Tensor] | None] = {}
    pool: Any = None

    def decode(tokens: Tensor, decoding: Decoding) -> Tensor:
        nonlocal pool
        shape = (len(tokens), *decoding.shape)
        if shape not in graphs:
            graphs[shape] = None
            return model.decode(tokens, decoding)
        if captured := graphs[shape]:
            graph, token, logits = captured
            token.copy_(tokens)
            decoding.cursor.count()
        else:
            token, graph = tokens.clone(), torch.cuda.CUDAGraph()
            # The thread that makes batches ready may use the GPU meanwhile.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                logits = model.decode(token, decoding)
            pool = graph.pool()
            graphs[shape] = graph, token, logits
        graph.replay()
        return logits

    return decode


def pick(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> Tensor:
    """The next token of each row: logits (B, V) -> (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    # As `torch.multinomial` draws one token, which on CUDA would wait for the device to check the probabilities.
    probabilities = logits.softmax(-1)
    return (probabilities / torch.empty_like(probabilities).exponential_(generator=generator)).argmax(-1)
