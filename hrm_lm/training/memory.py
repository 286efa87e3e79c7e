"""Whether a run fits the memory of its GPU, known before the first step: the largest batch that the config allows is
taken through forward and backward beside all that training will hold.

It changes nothing: no weight, no statistic, no random draw. Validation and the optimizer's passing memory are not tried.
"""

from collections.abc import Iterable

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hrm_lm.config import Config, Cycles
from hrm_lm.data.collate import AnyBatch, Rows, SpecialTokens, padded_length, to_device
from hrm_lm.data.sampler import batch_rows, global_batches
from hrm_lm.data.splits import Ragged, Splits
from hrm_lm.errors import UserError
from hrm_lm.models.contract import autocast, layout
from hrm_lm.models.float8 import float8_weights
from hrm_lm.training.optim import hidden_matrices, local, new_slots
from hrm_lm.training.parallel import forget_gathered, is_sharded
from hrm_lm.training.step import TrainState, backprop_steps_of


def most_cycles(config: Config) -> tuple[Cycles, int | None]:
    """The cycles and `backprop_steps` of the step that takes most of them."""
    cycles = config.model.hrm.cycles
    if config.train.sample_h_cycles:
        cycles = cycles._replace(h=config.train.sample_h_cycles[1])
    return cycles, backprop_steps_of(config.model.hrm, config.train.steps - 1, cycles)


def largest_lengths(
    config: Config, lengths: np.ndarray | None = None, rows: Rows | None = None
) -> tuple[int, int, int]:
    """Samples of the largest micro-batch that the config allows, and the tokens of their prompts and of their labels.

    rows: that it is packed into. They are always as wide, so those samples are the largest that have the most labels.
    lengths: (B, 2), of the samples of some batch. Where these are all alike, others will be, too: the model is compiled
    for that shape alone, and a larger one that never comes would cost it.
    """
    prompt, response = config.model.max_prompt_len, config.model.max_response_len
    if config.model.architecture == "puzzle":  # it answers in the prompt's places
        response = min(response, prompt + 1)
    train = config.train
    if rows:
        # In two rows a sample takes at least a token of a prompt besides, and the rows together do not grow.
        most = rows[0] // response if len(rows) == 1 else min(rows[1] // response, sum(rows) // (1 + response))
        count = max(most, 1)
        return count, 1 if len(rows) == 1 else min(max(rows[0] // count, 1), prompt), response
    if train.batch_tokens is None:
        if lengths is not None and not train.length_window and (lengths == lengths[0]).all():
            prompt, response = lengths[0].tolist()
        return config.micro_batch_size, prompt, response
    # Of all lengths, those that make most positions of what `train.batch_tokens` admits; of these, those of most labels.
    p, r = (np.unique(np.minimum(padded_length(np.arange(1, most + 1)), most)) for most in (prompt, response))
    p, r = (lengths.ravel() for lengths in np.meshgrid(p, r))
    admitted = np.maximum(train.batch_tokens // (padded_length(p) + padded_length(r)), 1)
    counts = -(-admitted // config.shares)
    one_stream = config.model.architecture == "prefix_lm"
    positions = counts * (padded_length(p + r - 1) if one_stream else padded_length(p) + padded_length(r))
    best = np.lexsort((counts * r, positions))[-1]
    return int(counts[best]), int(p[best]), int(r[best])


def batch_of(
    state: TrainState, tokens: SpecialTokens, count: int, prompt: int, labels: int, rows: Rows | None = None
) -> AnyBatch:
    """`count` samples of these lengths as training would lay them out, on the state's device. Every token is EOS."""
    ids = np.full(count * (prompt + 1 + labels), tokens.eos_id, dtype=np.int64)
    samples = Ragged(ids, np.full(count, prompt), np.full(count, labels), np.ones(count, dtype=bool))
    collate = layout(state.model, rows, state.config.train.objective)
    return to_device(
        collate(samples, tokens, state.graphs is not None or state.config.train.length_window > 0), state.device
    )


def kept_bytes(model: nn.Module, config: Config) -> dict[str, int]:
    """What a run keeps from step to step, over all workers that share it. An optimizer keeps two moments of a parameter,
    but Muon keeps one moment of a matrix.
    """

    def size(parameters: Iterable[nn.Parameter]) -> int:
        return sum(p.numel() * p.element_size() for p in parameters)

    trained = size(p for p in model.parameters() if p.requires_grad)
    spared = size(hidden_matrices(model)) if config.optim.name == "muon" else 0
    kept = {"weights": size(model.parameters()), "gradients": trained, "optimizer": 2 * trained - spared}
    if config.train.mixed_precision == "fp8" and not config.ray.shards(config.ray.workers.most):
        kept["float8 copies"] = 2 * sum(weight.numel() for weight in float8_weights(model))
    return kept | ({"average": trained} if config.train.ema_decay else {})


def does_not_fit(state: TrainState, splits: Splits) -> str | None:
    """What to tell the user where the largest batch does not fit the memory, else None. All workers are told alike.

    Raises UserError instead where the model is sharded: the other workers wait for this worker, and must be ended.
    """
    config = state.config.for_workers(state.world_size)
    lengths, (_, rows) = None, batch_rows(splits.train, config)
    if config.train.compile and not config.train.length_window:
        lengths = splits.train.lengths(next(global_batches(splits.train, config.train, state.step)))
    count, prompt, labels = largest_lengths(config, lengths, rows)
    error = _tried(state, splits.tokenizer, count, prompt, labels, rows)
    forget_gathered(state.model)
    state.model.zero_grad(set_to_none=True)
    if state.device.type == "cuda":
        torch.cuda.empty_cache()  # training starts with the memory that it would have without this
        torch.cuda.reset_peak_memory_stats(state.device)  # `train.cuda_graphs: auto` goes by what steps take
    if error is not None:
        parameters = list(state.model.parameters())
        mine = sum(p.numel() for p in local(parameters)) / sum(p.numel() for p in parameters)
        kept = " and ".join(", ".join(kept_bytes(state.model, config)).rsplit(", ", 1))
        held = sum(kept_bytes(state.model, config).values()) * mine / 2**30
        when = (
            f"with the largest batch that the config allows ({count:,} samples of {prompt:,} + {labels:,} tokens on "
            f"this worker), beside {held:.1f} GiB of {kept}"
        )
        error = out_of_memory(state.config, when, error)
        if is_sharded(state.model):
            raise UserError(error)
    if state.world_size > 1:
        failed = torch.tensor(float(error is not None), device=state.device)
        dist.all_reduce(failed)
        if failed and error is None:
            return "out of memory on another worker, whose log says more"
    return error


def _tried(
    state: TrainState, tokens: SpecialTokens, count: int, prompt: int, labels: int, rows: Rows | None
) -> str | None:
    """Takes such a batch forward and backward, as the step of most cycles would. Returns the error where memory
    runs out.
    """
    config = state.config
    # Sharded weights are gathered and gradients reduced, as ever. Replicas do not communicate: a worker that runs out
    # of memory leaves no other worker waiting.
    model = state.parallel if is_sharded(state.model) else state.model
    hooks = []
    if isinstance(state.parallel, DistributedDataParallel):  # it has room for the gradients already
        trained = [p for p in state.model.parameters() if p.requires_grad]
        hooks = [p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None)) for p in trained]
    cycles, backprop_steps = most_cycles(config)
    with torch.random.fork_rng([state.device] if state.device.type == "cuda" else []):
        try:
            # Room for what the optimizer will keep of parameters that it has not met yet.
            groups, known = state.optimizer.param_groups, state.optimizer.state
            room = [new_slots(group, p) for group in groups for p in group["params"] if not known.get(p)]
            batch = batch_of(state, tokens, count, prompt, labels, rows)
            with autocast(state.device, config.train.mixed_precision):
                predictions = model(batch, cycles, backprop_steps).predictions
            torch.stack([prediction.losses.sum() for prediction in predictions]).sum().backward()
            del room
        except torch.OutOfMemoryError as error:
            return str(error)
        finally:
            for hook in hooks:
                hook.remove()
    return None


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether memory lacked: a GPU's, or this machine's, for which PyTorch has no class."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def out_of_memory(config: Config, when: str, error: str) -> str:
    """What to tell the user. when: completes "out of memory". error: PyTorch's words, which have the GPU's numbers."""
    reason = error.partition(" If reserved")[0]
    size = "train.batch_size" if config.train.batch_tokens is None else "train.batch_tokens"
    return (
        f"out of memory {when}: {reason}\n"
        f"raise train.grad_accum_steps ({config.train.grad_accum_steps}), or lower {size} "
        f"({config.train.batch_tokens or config.train.batch_size}) or train.activation_memory "
        f"({config.train.activation_memory:g}; needs train.compile)"
        + (", or set train.cuda_graphs=auto" if config.train.cuda_graphs is True else "")
    )
