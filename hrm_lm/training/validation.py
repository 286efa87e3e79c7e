"""How good a model is on held-out samples, over all workers: loss, exact match, and the task's own verdict."""

from typing import Iterable, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from hrm_lm.data.collate import IGNORE, Batch
from hrm_lm.data.loading import prefetch, val_batches
from hrm_lm.data.registry import Splits
from hrm_lm.inference.decoding import generate_ids
from hrm_lm.models.build import LanguageModel
from hrm_lm.training.parallel import forget_gathered, is_sharded
from hrm_lm.training.step import autocast, token_loss


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
    """What `validate` returns of these."""
    names = []
    for part, some in ({"": splits} | splits.parts).items():
        scored = some.score or any(part.score for part in some.parts.values())
        names += Tally(0, 0, 0, 0, 0, scored=bool(scored)).means(part)
    return names


@torch.no_grad()
def validate(
    model: LanguageModel,
    splits: Splits,
    batch_size: int,
    mixed_precision: str = "none",
    round_up: bool = False,
    h_cycles: int | None = None,
    l_cycles: int | None = None,
) -> dict[str, float]:
    """`val_loss` and the like over all validation samples and, of a mixture, of each dataset (`val_loss/<name>`).

    Every worker of the process group takes its share and gets the same numbers. `round_up`: to lengths that training
    has seen, for compiled models. Cycle counts of None are the trained ones.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    tallies = {}
    for name, part in (splits.parts or {"": splits}).items():
        batches = prefetch(val_batches(part, batch_size, rank, world_size, round_up), device)
        with autocast(device, mixed_precision):
            sums = predicted(model, batches, h_cycles, l_cycles)
            verdicts = [0.0, 0.0]
            if part.score:
                verdicts = answered(model, part, batch_size, rank, world_size, h_cycles, l_cycles)
        sums = torch.cat([sums, sums.new_tensor(verdicts)])
        if dist.is_initialized():
            dist.all_reduce(sums)
        tallies[name] = Tally(*sums.tolist())
    model.train(was_training)
    forget_gathered(model)
    metrics = Tally(*map(sum, zip(*tallies.values()))).means()
    for name in splits.parts:
        metrics |= tallies[name].means(name)
    return metrics


def predicted(
    model: LanguageModel, batches: Iterable[list[Batch]], h_cycles: int | None, l_cycles: int | None
) -> torch.Tensor:
    """(4,) float64: loss, labelled tokens, samples predicted whole, samples.

    A sample whose every labelled token is the argmax under teacher forcing is one that greedy decoding gets right.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=next(model.parameters()).device)
    for group in batches:
        for batch in group:
            logits = model(batch, h_cycles, l_cycles)[-1]
            labelled = batch.labels != IGNORE
            right = ((logits.argmax(-1) == batch.labels) | ~labelled).all(dim=1) & labelled.any(dim=1)
            counts = torch.stack([labelled.sum(), right.sum(), labelled.any(dim=1).sum()])
            sums += torch.cat([token_loss(logits, batch.labels)[None].double(), counts.double()])
    return sums


def answered(
    model: LanguageModel,
    splits: Splits,
    batch_size: int,
    rank: int,
    world_size: int,
    h_cycles: int | None,
    l_cycles: int | None,
) -> list[float]:
    """What the task's verifier says of this worker's share of greedy answers, and how many they are."""
    mine = np.arange(rank, len(splits.val), world_size)
    most = -(-len(splits.val) // world_size)
    asked = np.resize(mine if len(mine) else np.zeros(1, dtype=np.int64), most)  # as many on every worker
    answers = generate_ids(
        model,
        splits.tokenizer,
        [splits.val[i][0] for i in asked.tolist()],
        h_cycles=h_cycles,
        l_cycles=l_cycles,
        batch_size=batch_size,
        in_step=is_sharded(model),
    )
    texts = map(splits.tokenizer.decode, answers)
    return [sum(splits.score(i, text) for i, text in zip(mine.tolist(), texts)), float(len(mine))]
