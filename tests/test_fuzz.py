"""Malformed configs, datasets, prepared folders, tokenizers and checkpoints at every entry point: no traceback, no hang, no
file outside the output, no code run.

    HYPOTHESIS_PROFILE=thorough python -m pytest tests/test_fuzz.py --timeout 0     100,000 other inputs every time
"""

import gzip
import io
import json
import os
import shutil
from contextlib import nullcontext
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import DIGITS, Remote, sums, train_locally, write_prepared
from fuzzing import (
    KEYS,
    SCALARS,
    VALUES,
    Files,
    files_of,
    mutated_bytes,
    mutated_files,
    mutated_json,
    mutated_lines,
    mutated_yaml,
    redescribed,
    resealed,
)

from hrm_lm.cluster.ray_private import SNAPSHOT
from hrm_lm.commands.evaluate import main as evaluate
from hrm_lm.commands.export import main as export
from hrm_lm.commands.generate import main as generate
from hrm_lm.commands.import_ import main as import_
from hrm_lm.commands.prepare import main as prepare
from hrm_lm.commands.train import main as train
from hrm_lm.commands.tune import main as tune
from hrm_lm.config import Config, flatten, load_config
from hrm_lm.data.collate import pad
from hrm_lm.data.loading import train_batches, val_batches
from hrm_lm.data.registry import load_dataset
from hrm_lm.models.build import build_model
from hrm_lm.training.checkpoint import Progress, save_model
from hrm_lm.training.loop import restore
from hrm_lm.training.step import build_state

SMALL = {
    "model": {"d_model": 16, "n_heads": 2, "max_prompt_len": 32, "max_response_len": 8, "hrm": {"h_cycles": 1, "l_cycles": 1}},
    "train": {"steps": 4, "batch_size": 8, "val_every": 2},
    "optim": {"lr": 0.01},
    "ray": {"storage_path": "runs"},
}
CONFIGS = [
    SMALL | {"data": {"dataset": "synthetic", "synthetic": {"num_samples": 100, "max_digits": 1}}},
    SMALL | {"data": {"dataset": "data.jsonl", "tokenizer": "bytes", "val_fraction": 0.3, "truncate": True}},
    SMALL | {"data": {"dataset": "prepared", "cache_gb": 1.0, "max_val_samples": 3}, "base": "base.yaml"},
    SMALL | {"data": {"mixture": {"a": {"dataset": "data.jsonl", "weight": 1.0}, "b": {"dataset": "synthetic"}}, "synthetic": {"num_samples": 50}}},
    {"model": SMALL["model"] | {"architecture": "prefix_lm"}, "optim": {"name": "muon", "betas": [0.9, 0.95]}, "train": SMALL["train"] | {"packing": True, "batch_tokens": 100, "length_window": 16, "sample_h_cycles": [1, 2]}, "data": {"dataset": "code:main"}, "ray": {"num_workers": "1:2", "run_name": "r"}},
]
SWEEP = {
    "base": "base.yaml",
    "search_space": {"optim.lr": {"loguniform": [1e-4, 1e-2]}, "model.hrm.h_cycles": {"choice": [1, 2]}, "train.grad_clip": {"uniform": [0.1, 1.0]}, "train.seed": {"randint": [1, 5]}},
    "tune": {"num_samples": 2, "scheduler": "asha", "grace_steps": 1, "max_concurrent_trials": 1, "time_budget_s": 10.0},
}
TEXT = b"".join(json.dumps({"prompt": p, "response": r}).encode() + b"\n" for p, r in sums(12))


class Valid:
    """An artefact of each kind, as files, made once."""

    def __init__(self, folder: Path):
        self.jsonl = TEXT
        self.prepared = files_of(write_prepared(folder / "prepared", sums(20)))
        config = load_config(overrides=flatten(CONFIGS[0]) | {"train.steps": 2, "train.ema_decay": 0.5})
        session = train_locally(config, folder / "run")
        self.checkpoints = {session.last_checkpoint.name: files_of(session.last_checkpoint)}
        self.checkpoint = files_of(session.last_checkpoint)
        self.checkpoint_config = config
        prefix = load_config(overrides=flatten(CONFIGS[0]) | {"model.architecture": "prefix_lm"})
        (folder / "prefix").mkdir()
        torch.manual_seed(0)
        save_model(folder / "prefix", build_model(prefix.model, DIGITS.vocab_size), prefix, DIGITS, Progress(val_loss=1.0))
        self.prefix = files_of(folder / "prefix")
        assert export(["--checkpoint", str(folder / "prefix"), "--output", str(folder / "hf")]) == 0
        self.transformers = files_of(folder / "hf")
        self.tokenizers = tokenizer_files(self)
        snapshot = {
            "ray_version": __import__("ray").__version__,
            "checkpoint_results": [{"version": 0, "checkpoint_dir_name": "checkpoint_a", "metrics": metrics(2)}],
            "checkpoint_report_indices": [0], "latest_checkpoint_result": {"version": 0, "checkpoint_dir_name": "checkpoint_a", "metrics": metrics(2)},
            "pending_training_results": [], "pending_validation_specs": [], "current_report_index": 1,
            "validated_checkpoint_dir_names": [], "timed_out_validation_checkpoint_dir_names": [], "failed_validation_checkpoint_dir_names": [],
        }  # fmt: skip
        self.run = {f"r/{SNAPSHOT}": json.dumps(snapshot).encode()} | {f"r/checkpoint_a/{name}": data for name, data in self.checkpoint.items()}


def metrics(step: int) -> dict:
    return {"step": step, "val_loss": 1.0, "val_exact_match": 0.0, "seconds": 1.0, "tokens": 100, "save_ms": 1.0}


def tokenizer_files(valid) -> list[Files]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from hrm_lm.data.tokenizer import ByteTokenizer, PretrainedTokenizer

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator(["12+34=46"], trainers.BpeTrainer(vocab_size=300, special_tokens=["<pad>", "<bos>", "<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()[:20], show_progress=False))
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), *((c, -1.0) for c in "0123456789+=")], unk_id=0))
    ours = PretrainedTokenizer(json.loads(bpe.to_str()), 0, 1, 2, bpe.get_vocab_size()).to_json()
    return [
        {"tokenizer.json": DIGITS.to_json().encode()},
        {"tokenizer.json": ByteTokenizer().to_json().encode()},
        {"tokenizer.json": ours.encode()},
        {"tokenizer.json": bpe.to_str().encode(), "tokenizer_config.json": b'{"eos_token": "<eos>", "pad_token": {"content": "<pad>"}}'},
        {"tokenizer.json": unigram.to_str().encode()},
        {name: valid.transformers[name] for name in ("tokenizer.json", "tokenizer_config.json")},
    ]


def assignment(rng) -> str:
    path = rng.choice([*flatten(Config().to_dict()), "model", "data", "data.mixture.a", "base", "tune.metric"])
    kind = rng.random()
    path = path if kind < 0.7 else rng.choice([path + ".x", path + ".", "." + path, path.partition(".")[0], rng.choice(KEYS), path.replace(".", "..")])
    value = rng.choice(SCALARS) if rng.random() < 0.5 else repr(rng.choice(VALUES))
    return f"{path}={value}" if rng.random() < 0.95 else rng.choice([path, value, "=", ""])


def base_files(valid) -> Files:
    prepared = {f"prepared/{name}": data for name, data in valid.prepared.items()}
    return {"base.yaml": yaml.safe_dump(SMALL).encode(), "data.jsonl": TEXT, **prepared}


# --- what is thrown ----------------------------------------------------------------------------------------------


def a_config(rng, sandbox, valid):
    config, files = rng.choice(CONFIGS), base_files(valid)
    files["c.yaml"] = yaml.safe_dump(config).encode()
    kind = rng.random()
    arguments = ["--config", "c.yaml"]
    if kind < 0.75:
        files["c.yaml"] = mutated_yaml(rng, files["c.yaml"])
    elif kind < 0.8:
        files["base.yaml"] = mutated_yaml(rng, files["base.yaml"])
    if kind > 0.7:
        for _ in range(rng.choice([1, 2])):
            arguments += ["--set", assignment(rng)]
    if rng.random() < 0.1:
        arguments += [rng.choice(["--steps", "--num_workers", "--dataset", "--run_name", "--save_dir", "--init_from", "--use_gpu"]), str(rng.choice(VALUES))]
    if rng.random() < 0.1:
        files["trainer_state.json"] = b"{}"  # a stranger's
    dry = rng.random() < 0.3
    sandbox.fresh(files)
    os.chdir(sandbox.case)
    sandbox.attempt(lambda: train([*arguments, "--dry_run", str(int(dry))]))


def a_sweep(rng, sandbox, valid):
    sweep = json.loads(json.dumps(SWEEP))
    if rng.random() < 0.5:
        sweep["base"] = CONFIGS[0]
        sweep["search_space"]["data.dataset"] = {"choice": ["synthetic", "code:main"]}
    files = base_files(valid) | {"s.yaml": yaml.safe_dump(sweep).encode()}
    files["base.yaml"] = yaml.safe_dump(CONFIGS[0]).encode()
    arguments = ["--config", "s.yaml", "--run_name", "s", "--save_dir", "sweeps"]
    kind = rng.random()
    if kind < 0.7:
        files["s.yaml"] = mutated_yaml(rng, files["s.yaml"])
    elif kind < 0.8:
        files["sweeps/s/sweep.yaml"] = mutated_yaml(rng, files["s.yaml"])
        arguments += ["--resume"]
    if kind > 0.65:
        arguments += ["--set", rng.choice(["", "tune."]) + assignment(rng)]
    sandbox.fresh(files)
    os.chdir(sandbox.case)
    sandbox.attempt(lambda: tune(arguments))


def a_dataset(rng, sandbox, valid):
    files = {"train.jsonl": TEXT, "val.jsonl": TEXT}
    for name in rng.choice([["train.jsonl"], ["train.jsonl"], ["val.jsonl"], ["train.jsonl", "val.jsonl"]]):
        files[name] = mutated_lines(rng, TEXT)
    if rng.random() < 0.1:
        files = mutated_files(rng, files)
    dataset = rng.choice(["case", "case/train.jsonl"])
    tokenizer = rng.choice([[], ["--set", "data.tokenizer=bytes"], ["--set", "data.tokenizer=characters"]])
    sandbox.fresh(files)
    sandbox.attempt(lambda: train(["--dataset", dataset, "--set", "data.val_fraction=0.4", *tokenizer]))
    if rng.random() < 0.3:
        sandbox.attempt(lambda: read(sandbox, dataset, tokenizer))


def read(sandbox, dataset, arguments=()) -> int:
    """What a worker does with a dataset: every batch has ids that its vocabulary knows."""
    from hrm_lm.config import parse_set

    overrides = flatten(SMALL) | {"data.dataset": dataset, "data.val_fraction": 0.4} | parse_set(arguments[1:])
    config = load_config(overrides=overrides)
    splits = load_dataset(config.data, config.model, 0)
    for batches in (train_batches(splits.train, splits.tokenizer, pad, config.train), val_batches(splits.val, splits.tokenizer, pad, 4)):
        for group in batches:
            for batch in group:
                assert batch.encoder_ids.min() >= 0 and batch.encoder_ids.max() < splits.tokenizer.vocab_size
                assert batch.decoder_input_ids.min() >= 0 and batch.labels.max() < splits.tokenizer.vocab_size
    return 0


def a_prepared_dataset(rng, sandbox, valid):
    files = mutated_files(rng, valid.prepared)
    if rng.random() < 0.7:
        files = redescribed(files)
    sandbox.fresh(files)
    shutil.rmtree(sandbox.root / "cache")
    (sandbox.root / "cache").mkdir()
    place = rng.choice(["case", "remote://case"])
    with pytest.MonkeyPatch.context() as patch:
        if place != "case":
            from hrm_lm.data.prepared import reader

            patch.setattr(reader, "resolve", lambda location: (Remote(), str(sandbox.case)))
            sandbox.writable.add(str(sandbox.root / "cache"))
        sandbox.attempt(lambda: train(["--dataset", place]))
        sandbox.attempt(lambda: read(sandbox, place))
    sandbox.writable.discard(str(sandbox.root / "cache"))


def a_tokenizer(rng, sandbox, valid):
    files = mutated_files(rng, rng.choice(valid.tokenizers))
    name = rng.choice(["case", "case/tokenizer.json"])
    sandbox.fresh(files | {"data.jsonl": TEXT})
    if rng.random() < 0.8:
        sandbox.attempt(lambda: train(["--dataset", "case/data.jsonl", "--set", f"data.tokenizer={name}", "--set", "data.val_fraction=0.4"]))
        sandbox.attempt(lambda: read(sandbox, "case/data.jsonl", ["--set", f"data.tokenizer={name}"]))
    else:
        sandbox.attempt(lambda: prepare(["--input", "case/data.jsonl", "--output", "out", "--tokenizer", name]))


def a_checkpoint(rng, sandbox, valid):
    prefix = rng.random() < 0.4
    files = mutated_files(rng, valid.prefix if prefix else valid.checkpoint)
    if rng.random() < 0.7:
        files = resealed(files)
    sandbox.fresh(files)
    match rng.randrange(6):
        case 0 | 1 | 2:
            action = lambda: generate(["--checkpoint", "case", "--prompt", "1+1", "--max_new_tokens", "3"])
        case 3:
            action = lambda: evaluate(["--checkpoint", "case"])
        case 4:
            action = lambda: train(["--config", "case/config.yaml", "--init_from", "case", "--save_dir", "runs"])
        case _:
            action = lambda: export(["--checkpoint", "case", "--output", "out"])
    sandbox.attempt(action)


class Session:
    """A worker that goes on from the case."""

    rank, world_size, device, display, event_folder = 0, 1, torch.device("cpu"), "lines", None

    def __init__(self, *folders):
        self.folders = folders

    def checkpoints(self):
        return map(nullcontext, self.folders)


def a_run(rng, sandbox, valid):
    kind = rng.random()
    files = dict(valid.run)
    if kind < 0.5:
        files[f"r/{SNAPSHOT}"] = mutated_json(rng, files[f"r/{SNAPSHOT}"])
    if kind > 0.4:
        checkpoint = mutated_files(rng, valid.checkpoint)
        checkpoint = resealed(checkpoint) if rng.random() < 0.7 else checkpoint
        files = {f"r/{SNAPSHOT}": files[f"r/{SNAPSHOT}"]} | {f"r/checkpoint_a/{name}": data for name, data in checkpoint.items()}
    sandbox.fresh(files)
    (sandbox.case / "r" / "checkpoint_a").mkdir(parents=True, exist_ok=True)
    config = yaml.safe_dump(valid.checkpoint_config.to_dict())
    (sandbox.case / "c.yaml").write_text(config)
    match rng.randrange(4):
        case 0:
            sandbox.attempt(lambda: train(["--config", "case/c.yaml", "--run_name", "r", "--save_dir", "case", "--steps", rng.choice(["2", "9"])]))
        case 1:
            sandbox.attempt(lambda: generate(["--run_name", "r", "--save_dir", "case", "--prompt", "1+1", "--max_new_tokens", "3"]))
        case 2:
            sandbox.attempt(lambda: evaluate(["--save_dir", "case"]))
        case _:
            sandbox.attempt(lambda: resume(valid, sandbox.case / "r" / "checkpoint_a"))


def resume(valid, folder) -> int:
    config = valid.checkpoint_config
    splits = load_dataset(config.data, config.model, config.train.seed)
    state = build_state(config, splits.tokenizer.vocab_size)
    progress = restore(state, Session(folder), splits)
    from hrm_lm.training.rollback import Guard
    from hrm_lm.training.step import Stats

    stats = Stats(state, progress.watched)
    Guard(state, stats, progress, print).counts(progress)
    return 0


def a_transformers_folder(rng, sandbox, valid):
    sandbox.fresh(mutated_files(rng, valid.transformers))
    sandbox.attempt(lambda: import_(["--input", "case", "--output", "out"]))


def a_corpus(rng, sandbox, valid):
    """Read by the tasks of `prepare`, without Ray."""
    kind = rng.choice(["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "csv", "tsv", "txt", "bz2"])
    rows = sums(12)
    if kind == "parquet":
        stream = io.BytesIO()
        pq.write_table(pa.table({"prompt": [p for p, _ in rows], "response": [r for _, r in rows]}), stream, row_group_size=4)
        data = mutated_bytes(rng, stream.getvalue())
    elif kind in ("csv", "tsv", "txt"):
        separator = "\t" if kind == "tsv" else ","
        data = mutated_bytes(rng, "\n".join([f"prompt{separator}response", *(f"{p}{separator}{r}" for p, r in rows)]).encode())
    elif kind == "jsonl":
        data = mutated_lines(rng, TEXT)
    else:
        text = mutated_lines(rng, TEXT) if rng.random() < 0.5 else TEXT
        data = gzip.compress(text) if kind == "jsonl.gz" else pa.compress(text, {"jsonl.zst": "zstd", "bz2": "gzip"}[kind], asbytes=True)
        data = mutated_bytes(rng, data) if rng.random() < 0.6 else data
        kind = "jsonl.bz2" if kind == "bz2" else kind
    files = {f"data.{kind}": data}
    if rng.random() < 0.3:
        files["more.jsonl"] = TEXT
    if rng.random() < 0.05:
        files = mutated_files(rng, files) or {"a.jsonl": b""}
    arguments = ["--tokenizer", rng.choice(["characters", "bytes"])]
    if rng.random() < 0.3:
        arguments += [rng.choice(["--prompt_field", "--response_field"]), rng.choice(["{prompt}", "{a.0}", "{", "a.b", "", "{prompt!r}", "{0}", "{}", "prompt.0", "{prompt} {response}", str(rng.choice(VALUES))])]
    if rng.random() < 0.2:
        arguments += [rng.choice(["--val_fraction", "--shard_mb", "--max_prompt_len", "--max_response_len", "--vocab_size", "--text_prompt_chars"]), str(rng.choice([0, 1, 0.5, "nan", "inf", -1, 1e-9, 2**70, "x", 1e308, 3]))]
    else:
        arguments += ["--val_fraction", "0.4"]
    arguments += ["--strict"] * (rng.random() < 0.2)
    sandbox.fresh(files)
    with pytest.MonkeyPatch.context() as patch:
        from hrm_lm.cluster import start
        from hrm_lm.prepare import pipeline

        patch.setattr(start, "started_ray", nullcontext)
        patch.setattr(pipeline, "run_step", run_step)
        code, *_ = sandbox.attempt(lambda: prepare(["--input", "case", "--output", "out", *arguments]))
    if code == 0:
        sandbox.attempt(lambda: read(sandbox, "out"))


def run_step(job, name, title, items, task, together=1):
    from hrm_lm.errors import UserError
    from hrm_lm.prepare.pipeline import run_task

    results = []
    for i in range(len(items := list(items))):
        row = run_task(job, name, items, task, {"i": i})
        if row["error"]:
            raise UserError(row["error"])
        results.append(json.loads(row["result"]))
    return results


def a_file_of_prompts(rng, sandbox, valid):
    name = rng.choice(["p.jsonl", "p.txt"])
    files = {f"m/{k}": v for k, v in valid.checkpoint.items()} | {name: mutated_lines(rng, TEXT)}
    sandbox.fresh(files)
    sandbox.attempt(lambda: generate(["--checkpoint", "case/m", "--prompts_file", f"case/{name}", "--max_new_tokens", "2"]))


TARGETS = [a_config, a_sweep, a_dataset, a_prepared_dataset, a_tokenizer, a_checkpoint, a_run, a_transformers_folder, a_corpus, a_file_of_prompts]
