"""How good a model is on held-out samples, over all workers: loss, exact match, and the task's own verdict."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from hrm_lm.data.collate import IGNORE, AnyBatch
from hrm_lm.data.loading import prefetch, val_batches
from hrm_lm.data.splits import Splits
from hrm_lm.models.contract import EvalOptions, LanguageModel, Prediction, autocast, layout
from hrm_lm.models.decoding import generate_ids
from hrm_lm.training.parallel import forget_gathered, is_sharded

ANSWER_TOKENS = 64
"""The most that a sample answer has: it is to be looked at, and costs little."""


class Tally(NamedTuple):
    """Sums over samples, of one dataset or of several."""

    loss: float  # over labelled tokens
    tokens: float
    right: float
    samples: float
    score: float  # over the samples that have a verdict
    scored: float

    def means(self, name: str = "") -> dict[str, float]:
        """`val_loss`, `val_exact_match` and, where there were verdicts, `val_score`; of dataset `name`, if given."""
        means = {
            "val_loss": self.loss / max(self.tokens, 1),
            "val_exact_match": self.right / max(self.samples, 1),
        }
        if self.scored:
            means["val_score"] = self.score / self.scored
        return {f"{key}/{name}" if name else key: value for key, value in means.items()}


def metric_names(splits: Splits) -> list[str]:
    """The names of what `validate` returns for these splits."""
    scored = {name: member.val.verdict is not None for name, member in splits.members.items()}
    names = Tally(0, 0, 0, 0, 0, scored=any(scored.values()) or splits.val.verdict is not None).means()
    for name, has_verdict in scored.items():
        names |= Tally(0, 0, 0, 0, 0, scored=has_verdict).means(name)
    return list(names)


@torch.no_grad()
def validate(
    model: LanguageModel, splits: Splits, options: EvalOptions, alive: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """`val_loss` and the like over all validation samples and, of a mixture, of each member (`val_loss/<name>`).

    Of a model with a core also `residual/<n>`, |z' - z| / |z'| of H-cycle n as a mean over the tokens that the core reads; or,
    where samples halt, `mean_h_cycles`, how many they took.

    Every worker of the process group takes its share and gets the same numbers. alive: called after each batch.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    tallies, rests = {}, []
    for name, member in (splits.members or {"": splits}).items():
        collate = layout(model, options.rows)
        batches = val_batches(
            member.val,
            member.tokenizer,
            collate,
            options.batch_size,
            rank,
            world_size,
            options.round_up,
            options.rows,
        )
        with autocast(device, options.mixed_precision):
            sums, rest = predicted(model, prefetch(batches, device), options, alive)
        verdicts = [0.0, 0.0]
        if member.val.verdict is not None:
            verdicts = answered(model, member, options, rank, world_size, alive)
        sums = torch.cat([sums, sums.new_tensor(verdicts)])
        if dist.is_initialized():
            dist.all_reduce(sums)
            dist.all_reduce(rest)
        rests.append(rest)
        tallies[name] = Tally(*sums.tolist())
    model.train(was_training)
    forget_gathered(model)
    metrics = Tally(*map(sum, zip(*tallies.values(), strict=True))).means()
    for name in splits.members:
        metrics |= tallies[name].means(name)
    if model.core is not None:
        *changes, count = torch.stack(rests).sum(0).tolist()
        means = [change / max(count, 1) for change in changes]
        halts = options.cycles.halt is not None
        metrics |= (
            {"mean_h_cycles": means[0]} if halts else {f"residual/{h}": mean for h, mean in enumerate(means, start=1)}
        )
    return metrics


def predicted(
    model: LanguageModel, batches: Iterable[list[AnyBatch]], options: EvalOptions, alive: Callable[[], None]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(4,) float64: loss, labelled tokens, samples predicted whole, samples. And what `validate` says of the core, summed: the
    residual of each H-cycle and how many tokens there are, (h_cycles + 1,), or cycles and samples, (2,), where these halt.

    A sample whose every labelled token is the argmax under teacher forcing is one that greedy decoding gets right: not so
    where samples halt and the recurrence runs for each token, which then halts by itself.
    """
    device, halts = next(model.parameters()).device, options.cycles.halt is not None
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    rest = torch.zeros(2 if halts else options.cycles.h + 1, dtype=torch.float64, device=device)
    for group in batches:
        for batch in group:
            predictions, thought = model(batch, options.cycles)
            losses, labels, right = by_sample(predictions[-1], batch)
            there = labels > 0
            sums += torch.stack([losses, labels, (right == labels) & there, there]).sum(dim=1)
            if thought is not None and thought.cycles is not None:
                rest += torch.stack([(thought.cycles * there).sum(), there.sum()])
            elif thought is not None:
                tokens = batch.thought_about * there.any()  # a batch without labels counts for nothing
                residuals = (thought.changes().sqrt() * tokens).sum((1, 2))
                rest += torch.cat([residuals, tokens.sum()[None]])
            alive()
    return sums, rest


def by_sample(prediction: Prediction, batch: AnyBatch) -> torch.Tensor:
    """(3, B) float64: of a prediction that was made without gradient, the loss over each sample's labels, how many labels it
    has, and how many of them are the likeliest token.
    """
    assert prediction.right is not None
    of_labels = (prediction.losses, batch.labels != IGNORE, prediction.right)
    return torch.stack([batch.per_sample(values.double()) for values in of_labels])


def answered(
    model: LanguageModel, splits: Splits, options: EvalOptions, rank: int, world_size: int, alive: Callable[[], None]
) -> list[float]:
    """What the task's verifier says of this worker's share of greedy answers, and how many they are."""
    mine = np.arange(rank, len(splits.val), world_size)
    most = -(-len(splits.val) // world_size)
    asked = np.resize(mine if len(mine) else np.zeros(1, dtype=np.int64), most)  # as many on every worker
    prompts = [splits.val[i].prompt for i in asked.tolist()]
    answers = generate_ids(model, splits.tokenizer, prompts, options, in_step=is_sharded(model), alive=alive)
    verdict, texts = splits.val.verdict, map(splits.tokenizer.decode, answers)
    assert verdict is not None
    return [math.fsum(verdict(i, text) for i, text in zip(mine.tolist(), texts, strict=False)), float(len(mine))]


@torch.no_grad()
def sample_answers(
    model: LanguageModel, splits: Splits, options: EvalOptions, count: int, alive: Callable[[], None] = lambda: None
) -> list[dict[str, Any]]:
    """Greedy answers to `count` validation prompts, always the same, of a mixture as many of each member.

    Of each a `prompt`, the `expected` response, the `answer` and whether it is `right`: by the task's verdict where there
    is one. Long texts are cut. Workers that share a model must all call it.
    """
    members = splits.members or {"": splits}
    names, each = list(members), -(-count // len(members))
    turns = [(names[i % len(names)], i // len(names)) for i in range(count)]
    places = dict.fromkeys((name, len(members[name].val) * turn // each) for name, turn in turns)
    asked = [members[name].val[i] for name, i in places]
    longest = max(len(sample.response) for sample in asked)
    most = min(ANSWER_TOKENS, model.config.max_response_len, 2 * longest + 8)
    was_training = model.training
    model.eval()
    prompts = [sample.prompt for sample in asked]
    answers = generate_ids(
        model, splits.tokenizer, prompts, options, max_new_tokens=most, in_step=is_sharded(model), alive=alive
    )
    model.train(was_training)
    forget_gathered(model)
    shown = []
    for (name, i), sample, ids in zip(places, asked, answers, strict=True):
        prompt, expected, answer = map(splits.tokenizer.decode, (sample.prompt, sample.response, ids))
        verdict = members[name].val.verdict
        right = verdict(i, answer) == 1 if verdict else answer == expected
        texts = {"prompt": cut(prompt), "expected": cut(expected), "answer": cut(answer)}
        shown.append(({"dataset": name} if name else {}) | texts | {"right": bool(right)})
    return shown


def cut(text: str) -> str:
    return text if len(text) <= 600 else f"{text[:400]} … {text[-200:]}"
