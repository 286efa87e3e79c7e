"""From prompts to responses, token by token.

On CUDA, a step from a token to the next one is captured as a CUDA graph and replayed, since launching its many small
kernels takes longer than they do. Blocks that are compiled for training run uncompiled here: prompts and caches come in
too many shapes to compile for. The host does not wait for the device at every token.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hrm_lm.data.tokenizer import Tokenizer
from hrm_lm.models.cache import Decoding, Moves
from hrm_lm.models.contract import EvalOptions, LanguageModel, autocast

LOOK_EVERY = {"cpu": 1, "cuda": 8}
"""By the kind of device, after how many tokens the host looks which samples have ended."""
WASTE = 1
"""Samples that have ended keep their rows until they have wasted so many steps' work together: to drop them, and to read other
prompts, takes about as long."""


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
    top_p: float = 1.0,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
    scores: list[float] | None = None,
    in_step: bool = False,
    alive: Callable[[], None] = lambda: None,
    taken: list[tuple[list[int], Tensor]] | None = None,
) -> list[list[int]]:
    """The responses to `prompts`, in their order; each ends before EOS or after `max_new_tokens` (the model's most).

    `options.batch_size` samples run at a time, and others take the places of samples that have ended.

    Greedy at temperature 0, else drawn (`pick`). What is drawn for a prompt is a function of `seed` and of the prompt's
    number: its place in `prompts`, or what `numbers` has there. scores: gets the mean log-probability of each response's
    tokens at temperature 1; EOS is one of them. in_step: takes all steps whatever the answers, as workers that share a
    model must, and captures no graph, since they communicate. alive: called whenever samples have ended.
    taken: where samples halt, gets places in `prompts` and the H-cycles that these took (`Decoding.taken`), for prompts
    and, where the recurrence runs for each token, for each token.
    """
    if not prompts:
        return []
    device = next(model.parameters()).device
    most = max_new_tokens or model.config.max_response_len
    rows = min(options.batch_size, len(prompts))
    waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # alike lengths together: little padding
    running: list[int] = []  # the prompt of each row
    growing = Growing(rows, most, tokenizer.eos_id, device)
    finished: list[tuple[list[int], Tensor, Tensor]] = []
    wasted = 0
    # Autocast remembers the weights that it has cast until it ends. Graphs read these copies, so it lasts for all of them.
    with autocast(device, options.mixed_precision):
        decoding = model.open(rows, max(map(len, prompts)), most, options.cycles)
        plain = in_step or device.type != "cuda" or options.cycles.halt is not None
        decode = model.decode if plain else graphed(model)
        while waiting or running:
            if waiting and not wasted and len(running) < rows:
                chosen, waiting = waiting[: rows - len(running)], waiting[rows - len(running) :]
                ids, lens = padded([prompts[i] for i in chosen], tokenizer.pad_id, device)
                new = slice(len(running), len(running) + len(chosen))
                running += chosen
                drawn = [draws(seed, numbers[i] if numbers else i, most) for i in chosen] if temperature else []
                growing.begin(new, drawn)
                logits, was_read = model.prefill(ids, lens, tokenizer.bos_id, decoding), True
            else:
                was_read = False
                new = slice(0, len(running))
                logits = decode(growing.last[: step_rows(len(running), rows, device)], decoding)[: len(running)]
            if taken is not None:
                # Others have ended, and wait until they are dropped.
                going = ~growing.done[new] & (growing.count[new] < most)
                which = [i for i, goes in zip(running[new], going.tolist()) if goes or was_read]
                taken += [(which, cycles if was_read else cycles[: len(going)][going]) for cycles in decoding.taken]
            decoding.taken.clear()
            tokens = pick(logits, temperature, top_k, top_p, growing.uniforms(new))
            growing.extend(new, tokens, logits if scores is not None else None)
            ended = growing.ended(in_step)
            wasted += len(ended)
            if len(ended) == len(running) or wasted >= WASTE * rows:
                wasted = 0
                finished.append(([running[row] for row in ended], *growing.of(ended)))
                moves = decoding.drop(ended)
                growing.drop(moves)
                running = moves.of(running)
                alive()
    responses: list[list[int]] = [[] for _ in prompts]
    means = [0.0] * len(prompts)
    for chosen, tokens, logprobs in finished:
        for i, row, logprob in zip(chosen, tokens.tolist(), logprobs.tolist()):
            responses[i] = row[: row.index(tokenizer.eos_id)] if tokenizer.eos_id in row else row
            means[i] = logprob / min(len(responses[i]) + 1, most)
    if scores is not None:
        scores[:] = means
    return responses


class Growing:
    """The responses of running samples, by row. What changes from token to token is on the device."""

    def __init__(self, rows: int, most: int, eos_id: int, device: torch.device):
        self.most, self.eos_id, self.device = most, eos_id, device
        # A sample that has ended goes on until it is dropped. What is beyond `most` goes to a column of its own.
        self.tokens = torch.full((rows, most + 1), eos_id, device=device)
        self.draws = torch.zeros(rows, most + 1, device=device)
        """What the tokens are drawn with."""
        self.last, self.count = torch.zeros(2, rows, dtype=torch.long, device=device)
        self.logprob = torch.zeros(rows, device=device)
        self.done = torch.zeros(rows, dtype=torch.bool, device=device)
        self.counted: list[int] = []
        """`count` of the rows that are in use, as the host knows it."""
        self.known: set[int] = set()
        """The rows whose samples have ended, as far as the host knows."""
        self.steps, self.look_every = 0, LOOK_EVERY[device.type]
        is_cuda = device.type == "cuda"
        self.answer = torch.zeros(rows, dtype=torch.bool, pin_memory=is_cuda)
        self.copied = torch.cuda.Event() if is_cuda else None
        self.asked = 0
        """The first rows, of which `answer` says what `done` was when the host asked."""

    def begin(self, new: slice, drawn: list[np.ndarray]) -> None:
        """Samples come into these rows. drawn: what `draws` returns for each; nothing where the likeliest tokens are taken."""
        self.tokens[new], self.count[new], self.logprob[new], self.done[new] = self.eos_id, 0, 0.0, False
        if drawn:
            self.draws[new, : self.most] = torch.from_numpy(np.stack(drawn)).to(self.device, non_blocking=True)
        self.counted += [0] * (new.stop - new.start)

    def uniforms(self, rows: slice) -> Tensor:
        """What the next tokens are drawn with, (B,)."""
        return self.draws[rows].gather(1, self.count[rows, None])[:, 0]

    def extend(self, rows: slice, tokens: Tensor, logits: Tensor | None) -> None:
        """Gives each of the rows its next token. logits: those of the tokens, where scores are wanted."""
        count, done = self.count[rows], self.done[rows]
        if logits is not None:
            logprob = logits.float().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
            self.logprob[rows] += logprob.masked_fill(done | (count == self.most), 0.0)
        self.tokens[rows].scatter_(1, count[:, None], tokens[:, None])
        self.last[rows] = tokens
        done |= tokens == self.eos_id
        count.add_(1).clamp_(max=self.most)
        self.counted[rows] = [counted + 1 for counted in self.counted[rows]]

    def ended(self, in_step: bool) -> set[int]:
        """The rows whose samples have ended, as far as the host knows.

        Where it looks seldom, it sees the answer to what it asked when it looked before. That has come by now, and the
        device has work until the host has read it.
        """
        self.steps += 1
        self.known |= {row for row, counted in enumerate(self.counted) if counted >= self.most}
        if not in_step and self.steps % self.look_every == 0:
            seen = self.done[: len(self.counted)]
            if self.look_every > 1:
                if self.copied:
                    self.copied.synchronize()
                seen = self.answer[: self.asked].clone()
                self.ask()
            self.known |= {row for row, is_done in enumerate(seen.tolist()) if is_done}
        return self.known

    def ask(self) -> None:
        self.asked = len(self.counted)
        self.answer.copy_(self.done, non_blocking=True)
        if self.copied:
            self.copied.record()

    def of(self, rows: Iterable[int]) -> tuple[Tensor, Tensor]:
        """Tokens (B, most) and the sums of their log-probabilities (B,)."""
        index = torch.tensor(list(rows)).to(self.device, non_blocking=True)
        return self.tokens[:, : self.most].index_select(0, index), self.logprob.index_select(0, index)

    def drop(self, moves: Moves) -> None:
        for kept in (self.tokens, self.draws, self.last, self.count, self.logprob, self.done):
            moves.make(kept)
        self.counted, self.known = moves.of(self.counted), set()
        self.ask()


def step_rows(samples: int, rows: int, device: torch.device) -> int:
    """How many of the rows a step takes: on CUDA a power of two, so that few graphs serve all."""
    return min(1 << (samples - 1).bit_length(), rows) if device.type == "cuda" else samples


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


def draws(seed: int, number: int, count: int) -> np.ndarray:
    """Uniform numbers from 0 to 1 (not reached) for as many tokens: float32, a function of seed and number alone."""
    return np.random.Generator(np.random.Philox(key=[seed % 2**64, number])).random(count, dtype=np.float32)


def pick(logits: Tensor, temperature: float, top_k: int | None, top_p: float, uniforms: Tensor) -> Tensor:
    """The next token of each row: logits (B, V), uniforms (B,) -> (B,).

    The likeliest at temperature 0, else drawn from the `top_k` likeliest (None: from all), and of these from the fewest
    likeliest that have the probability `top_p` together (arXiv 1904.09751).
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = (logits.float() - logits.amax(-1, keepdim=True)) / temperature  # finite, however small the temperature
    if top_k or top_p < 1:
        likeliest, tokens = logits.topk(min(top_k or logits.shape[-1], logits.shape[-1]))
        probabilities = likeliest.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        kept = likeliest.masked_fill(before >= top_p, -torch.inf)  # the first never is
        logits = torch.full_like(logits, -torch.inf).scatter(-1, tokens, kept)
    # In float64 no rounding reaches a token of probability 0.
    reached = logits.softmax(-1).double().cumsum(-1)
    wanted = uniforms.double() * reached[:, -1]
    tokens = torch.searchsorted(reached, wanted[:, None], right=True)[:, 0]
    return tokens.clamp_(max=logits.shape[-1] - 1)  # of a model that gives NaN
