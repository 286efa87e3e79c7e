"""The life of a run on one worker: build, restore, {batch, step, maybe log, maybe validate, maybe save}, done."""

import math
import statistics
import time
from collections.abc import Generator
from contextlib import nullcontext
from typing import Any

import torch

from hrm_lm.config import Config
from hrm_lm.data.collate import AnyBatch
from hrm_lm.data.loading import prefetch, train_batches
from hrm_lm.data.registry import load_dataset
from hrm_lm.data.sampler import WindowStart, batch_rows, window_of
from hrm_lm.data.splits import Splits
from hrm_lm.data.tokenizer import model_vocab_size, same_tokens
from hrm_lm.errors import DamagedCheckpoint, UserError
from hrm_lm.filesystem import local_copy, without_secrets
from hrm_lm.models.contract import EvalOptions, layout
from hrm_lm.training.checkpoint import Progress, Snapshot, load_state, load_weights, read_checkpoint, whole_checkpoint
from hrm_lm.training.environment import environment
from hrm_lm.training.flops import interval_flops, matrix_peak
from hrm_lm.training.memory import does_not_fit, out_of_memory
from hrm_lm.training.metrics import MetricsLog
from hrm_lm.training.parallel import is_sharded
from hrm_lm.training.profiling import profiled
from hrm_lm.training.rollback import Diverged, Guard, is_left_out, leave_out
from hrm_lm.training.session import Session
from hrm_lm.training.step import SentStats, Stats, TrainState, build_state, learning_rate, train_step
from hrm_lm.training.validation import sample_answers, validate


def train(config: Config, session: Session) -> dict[str, Any]:
    """Trains to the end. Returns `status`: "finished", "early_stopped", "preempted" (saved, and to be
    continued elsewhere), or with an `error` "diverged" or "failed".

    A divergence is returned, not raised: it would only repeat itself if Ray restarted the worker. So is a step that does
    not fit the memory of a GPU.
    """
    splits = load_dataset(config.data, config.model, config.train.seed)
    state = build_state(
        config, model_vocab_size(config.model, splits.tokenizer), session.device, session.rank, session.world_size
    )
    progress = restore(state, session, splits)
    patience = config.train.early_stopping_patience
    status = "finished"
    if patience and progress.stale_validations >= patience:
        return {"status": "early_stopped", "step": state.step}
    if state.device.type == "cuda" and state.step < config.train.steps and (told := does_not_fit(state, splits)):
        return {"status": "failed", "step": state.step, "error": told}

    # With LoRA a step has fewer FLOPs than are counted: matrices that stay as they are take no gradient.
    peak = None if config.train.lora.rank else matrix_peak(state.device, config.train.mixed_precision)
    stats = Stats(state, progress.watched)
    log = MetricsLog(session.event_folder, session.display, state.step, config.train.steps)
    if session.event_folder:
        log.text(state.step, "environment", environment(state.device, state.world_size))
    # Who shares the model must take part in its answers; otherwise the worker gives them that logs.
    answers = config.train.sample_answers if session.event_folder or is_sharded(state.model) else 0
    guard = Guard(state, stats, progress, log.tell)
    group = config.for_workers(session.world_size)
    step_rows, rows = batch_rows(splits.train, group)
    starts = [WindowStart(progress.window_step, progress.window)]  # the thread that makes batches adds to it

    def batches_from_here() -> Generator[list[AnyBatch], None, None]:
        source = train_batches(
            splits.train,
            splits.tokenizer,
            layout(state.model, rows, group.train.objective),
            group.train,
            state.step,
            session.rank,
            session.world_size,
            round_up=state.graphs is not None,
            rows=step_rows,
            starts=starts,
        )
        return prefetch(source, state.device)

    writes = session.rank == 0 or is_sharded(state.model)
    snapshot = Snapshot(state, splits.tokenizer) if writes else None
    waits: list[float] = []  # of training for checkpoints, in milliseconds
    batches = batches_from_here()
    if config.train.profile and session.event_folder:
        batches = profiled(batches, session.event_folder / "profile", state.device, config.train.steps - state.step)
    logged_step = state.step
    stats.begin()

    def log_interval(step: int, sent: SentStats) -> dict[str, float] | None:
        """Logs the interval that ended with `step`; None where the run went back because of it."""
        nonlocal logged_step, progress, batches
        interval = sent.read()
        if back := guard.rolled_back(interval):
            progress = back
            batches.close()
            batches = batches_from_here()
            log.rewind(state.step)
            logged_step = state.step
            stats.begin()
            return None
        seconds = sent.seconds()
        progress.watched = interval["watched"]
        progress.seconds += seconds
        progress.tokens += int(interval["tokens"])
        metrics = {
            "loss": interval["loss"],
            "lr": learning_rate(config.optim, config.train.steps, step - 1),
            "grad_norm": interval["grad_norm"],
            "samples_per_s": interval["samples"] / seconds,
            "tokens_per_s": interval["tokens"] / seconds,
            "padding": interval["padding"],
        } | guard.counts(progress)
        if peak and interval["tokens"]:
            amounts = interval["tokens"], interval["labels"], interval["samples"]
            flops = interval_flops(state.model, config, range(logged_step, step), *amounts)
            metrics["mfu"] = flops / (seconds * peak * session.world_size)
        logged_step = step
        log.record(step, {"seconds": progress.seconds, "tokens": progress.tokens})
        log.write(step, metrics)
        return metrics

    due: tuple[int, SentStats] | None = None  # an interval that is to be logged
    try:
        while (micro_batches := next(batches, None)) is not None:
            if is_left_out(progress, state.step + 1):
                leave_out(state, stats)
            else:
                train_step(state, micro_batches, stats)

            leaving = session.preempted(state.step)
            last = state.step == config.train.steps
            validating = last or is_due(config.train.val_every, state.step)
            saving = validating or leaving or is_due(config.train.checkpoint_every, state.step)
            logging = saving or is_due(config.train.log_every, state.step)
            # On a GPU an interval is logged while later steps are under way: it idles if the host waits for its last step.
            if due and (logging or due[1].arrived()):
                metrics, due = log_interval(*due), None
                if metrics is None:
                    continue
            if not logging:
                continue
            due = state.step, stats.send()
            if not (saving or due[1].arrived()):
                continue
            metrics, due = log_interval(*due), None
            if metrics is None or not saving:
                continue
            if validating:
                state.model.set_step(state.step)
                with state.average.applied() if state.average else nullcontext():
                    options = EvalOptions.of(group, rows=rows)
                    val = validate(state.model, splits, options, session.alive)
                    if answers:
                        answered = sample_answers(state.model, splits, options, answers, session.alive)
                        log.text(state.step, "answers", answered)
                if not math.isfinite(val["val_loss"]):
                    raise Diverged(state.step)
                progress.update(state.step, val["val_loss"], val["val_exact_match"])
                log.write(state.step, val)
                metrics |= val
            progress.window_step, progress.window = window_of(state.step - 1, starts)
            saving_from = time.perf_counter()
            save(state, progress, session, snapshot, metrics, waits)
            guard.keep(progress)
            waits.append(1000 * (time.perf_counter() - saving_from))
            log.record(state.step, {"save_ms": waits[-1]})
            session.alive()
            stats.begin()
            if patience and progress.stale_validations >= patience and not last:
                status = "early_stopped"
                break
            if leaving and not last:
                status = "preempted"
                break
    except Diverged as error:
        return {"status": "diverged", "step": error.step, "error": divergence(config, error)}
    except torch.OutOfMemoryError as error:
        told = out_of_memory(config, f"in the step after step {state.step}", str(error))
        if session.world_size > 1:
            raise UserError(told) from None  # the others wait for this worker, and must be ended
        return {"status": "failed", "step": state.step, "error": told}
    finally:
        batches.close()
        log.close()
    return {"status": status, "step": state.step}


def restore(state: TrainState, session: Session, splits: Splits) -> Progress:
    """Continues from the session's last whole checkpoint, or starts from `train.init_from`'s weights, or from nothing."""
    damage = None
    for name, opened in session.checkpoints():
        with opened as folder:
            try:
                checkpoint = whole_checkpoint(folder, name, state.device, state.world_size)
            except DamagedCheckpoint as error:
                damage = error
                continue
            if not same_tokens(checkpoint.tokenizer, splits.tokenizer):
                raise UserError(f"{name}: was trained with another tokenizer than the dataset now has")
            if checkpoint.progress.num_train_samples != len(splits.train):
                raise UserError(
                    f"{name}: was trained on {checkpoint.progress.num_train_samples} samples, the dataset now has "
                    f"{len(splits.train)}: the sample order would change"
                )
            load_state(checkpoint, state)
            return checkpoint.progress
    if damage:
        raise damage
    if state.config.train.init_from:
        with local_copy(state.config.train.init_from) as folder:
            checkpoint = read_checkpoint(folder)
            if not same_tokens(checkpoint.tokenizer, splits.tokenizer):
                source = without_secrets(state.config.train.init_from)
                raise UserError(
                    f"train.init_from: {source} has another tokenizer than the dataset; "
                    "data.tokenizer names the one to read JSONL with"
                )
            load_weights(checkpoint, state.model)
            if state.average:
                state.average.restart()
    return Progress(num_train_samples=len(splits.train))


def save(
    state: TrainState,
    progress: Progress,
    session: Session,
    snapshot: Snapshot | None,
    metrics: dict[str, float],
    waits: list[float],
) -> None:
    """Reports a checkpoint, of rank 0, or of all where each has a part.

    waits: the milliseconds that training waited for each checkpoint before. The reported `save_ms` is the mean over all.
    """
    start, progress.step = time.perf_counter(), state.step
    if snapshot:
        snapshot.take(progress)
    save_ms = statistics.fmean([*waits, 1000 * (time.perf_counter() - start)])
    counts = {"step": state.step, "seconds": progress.seconds, "tokens": progress.tokens, "save_ms": save_ms}
    session.report(metrics | counts, snapshot)


def is_due(interval: int, step: int) -> bool:
    """Whether what happens every `interval` steps happens at `step`; an interval of 0 means never."""
    return interval > 0 and step % interval == 0


def divergence(config: Config, error: Diverged) -> str:
    lr = learning_rate(config.optim, config.train.steps, error.step - 1)
    clip = "lower optim.lr"
    clip += (
        f" or train.grad_clip ({config.train.grad_clip:g})"
        if config.train.grad_clip > 0
        else " or set train.grad_clip (1.0, say)"
    )
    return f"{error.what} at step {error.step}, lr {lr:.2e}: {clip}"
