"""The work of an evaluation, in slices, and what a worker makes of a slice.

A slice is some samples of a task with the cycles to take. A worker needs the model and the slice, no data and no verdict:
the driver, which has read the tasks, judges the answers.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from hrm_lm.config import Cycles
from hrm_lm.data.collate import to_device
from hrm_lm.data.sampler import by_length
from hrm_lm.data.splits import Ragged
from hrm_lm.data.tokenizer import Tokenizer
from hrm_lm.errors import UserError
from hrm_lm.evaluation.tasks import Task
from hrm_lm.models.contract import EvalOptions, LanguageModel, autocast
from hrm_lm.models.decoding import generate_ids
from hrm_lm.training.memory import is_out_of_memory
from hrm_lm.training.validation import by_sample

SHOWN_ANSWERS = 64
"""Where no verdict wants the answers, so many wrong ones of a task are generated all the same, to be looked at."""


class Slice(NamedTuple):
    task: int
    cycles: int
    """Which of the cycle counts of the evaluation."""
    indices: np.ndarray
    """(n,): which samples of the task."""
    samples: Ragged
    options: EvalOptions
    max_new_tokens: int | None
    answers: int
    """How many answers that are not the response are generated."""


class Scores(NamedTuple):
    """Of n samples."""

    loss: np.ndarray
    """(n,) float64, over the labels of the sample."""
    labels: np.ndarray
    """(n,) float64: how many labels the sample has."""
    right: np.ndarray
    """(n,) bool: whether greedy decoding gives the response, which it does where each label is the likeliest token."""
    answers: list[str | None]
    """None where the answer was not wanted."""
    cycles: np.ndarray | None
    """(n,) float64: the H-cycles of each sample, where samples halt; where tokens do, the mean over its prompt and its tokens."""


def slices_of(tasks: Sequence[Task], every_cycles: Sequence[Cycles], options: EvalOptions, size: int) -> list[Slice]:
    """The slices of all tasks for all cycle counts, of up to `size` samples of alike lengths. The longest come first: what
    comes last decides how long the others wait.
    """
    found = []
    for number, task in enumerate(tasks):
        every = np.arange(len(task.split))
        order = every[by_length(task.split.lengths(every), len(every) / options.batch_size)]
        pieces = [order[start : start + size] for start in range(0, len(order), size)]
        answers = size if task.split.verdict is not None else -(-SHOWN_ANSWERS // len(pieces))
        for piece in pieces:
            samples = task.split.ragged(piece)
            for which, cycles in enumerate(every_cycles):
                taken = replace(options, cycles=cycles)
                found.append(Slice(number, which, piece, samples, taken, task.max_new_tokens, answers))
    return sorted(found, key=lambda one: -len(one.samples.ids) * (one.options.cycles.h + one.options.cycles.l))


def score(model: LanguageModel, tokenizer: Tokenizer, work: Slice) -> Scores:
    """Raises UserError where the memory does not hold a batch."""
    options = work.options
    if options.mixed_precision == "fp16" and next(model.parameters()).device.type != "cuda":
        options = replace(options, mixed_precision="none")  # fp16 is CUDA's alone
    try:
        sums, cycles = losses(model, tokenizer, work.samples, options)
        loss, labels, right = sums[0], sums[1], sums[1] == sums[2]
        prompts, responses = apart(work.samples)
        if options.cycles.halt is not None and model.recurs_per_token:
            return generated_scores(model, tokenizer, work, options, sums)
        known = right & work.samples.ends
        answers = [tokenizer.decode(ids) if there else None for ids, there in zip(responses, known, strict=True)]
        asked = np.flatnonzero(~known)[: work.answers].tolist()
        generated = generate_ids(
            model, tokenizer, [prompts[i] for i in asked], options, max_new_tokens=work.max_new_tokens
        )
        for i, ids in zip(asked, generated, strict=True):
            answers[i] = tokenizer.decode(ids)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        longest = f", or max_new_tokens ({work.max_new_tokens}) a smaller one" if work.max_new_tokens else ""
        raise UserError(
            f"--batch_size {options.batch_size}: more than the memory holds; give a smaller one{longest}"
        ) from None
    return Scores(loss, labels, right, answers, cycles)


def generated_scores(
    model: LanguageModel, tokenizer: Tokenizer, work: Slice, options: EvalOptions, sums: np.ndarray
) -> Scores:
    """Where each token that is generated halts by itself, only generating tells what is right. sums: see `losses`; a sample's
    loss is that of halting once, after its prompt and its response.
    """
    prompts, responses = apart(work.samples)
    taken: list[tuple[list[int], torch.Tensor]] = []
    longest = max(len(response) for response in responses) + 1
    most = work.max_new_tokens and min(max(work.max_new_tokens, longest), model.config.max_response_len)
    generated = generate_ids(model, tokenizer, prompts, options, max_new_tokens=most, taken=taken)
    right = [
        ids == response.tolist() if ends else ids[: len(response)] == response.tolist()
        for ids, response, ends in zip(generated, responses, work.samples.ends, strict=True)
    ]
    cycles, times = np.zeros((2, len(prompts)))
    for which, counts in taken:
        cycles[which] += counts.cpu().numpy()
        times[which] += 1
    answers: list[str | None] = [tokenizer.decode(ids[: work.max_new_tokens]) for ids in generated]
    return Scores(sums[0], sums[1], np.array(right), answers, cycles / times)


@torch.no_grad()
def losses(
    model: LanguageModel, tokenizer: Tokenizer, samples: Ragged, options: EvalOptions
) -> tuple[np.ndarray, np.ndarray | None]:
    """(3, n): what `by_sample` says of each sample, taken `options.batch_size` at a time in their order; and the H-cycles of
    each, (n,), where samples halt.
    """
    device = next(model.parameters()).device
    found, taken = [], []
    with autocast(device, options.mixed_precision):
        for first in range(0, len(samples.ends), options.batch_size):
            chosen = samples.take(np.arange(first, min(first + options.batch_size, len(samples.ends))))
            batch = to_device(model.collate(chosen, tokenizer, options.round_up), device)
            predictions, thought = model(batch, options.cycles)
            found.append(by_sample(predictions[-1], batch))
            if thought is not None and thought.cycles is not None:
                taken.append(thought.cycles)
    return torch.cat(found, dim=1).cpu().numpy(), torch.cat(taken).cpu().numpy() if taken else None


def apart(samples: Ragged) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The prompts and the responses, without places for BOS and EOS."""
    starts = np.cumsum(samples.sizes) - samples.sizes
    middles, stops = starts + samples.prompt_lens, starts + samples.sizes - samples.ends
    prompts = [samples.ids[a:b] for a, b in zip(starts.tolist(), middles.tolist(), strict=True)]
    return prompts, [samples.ids[a + 1 : b] for a, b in zip(middles.tolist(), stops.tolist(), strict=True)]
