"""Malformed configs, datasets, prepared folders, tokenizers and checkpoints at every entry point: no traceback, no hang, no
file outside the output, no code run. `tests/fuzzing.py` says how an input is made and what is watched.

The suite always throws the same inputs. This throws some 100,000 others:

    HYPOTHESIS_PROFILE=thorough python -m pytest tests/test_fuzz.py --timeout 0
"""

import gzip
import io
import json
import os
import random
import shutil
import threading
import time
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
import ray
import torch
import yaml
from conftest import DIGITS, LocalSession, Remote, sums, train_locally, write_prepared
from fuzzing import (
    KEYS,
    MARKUP,
    SCALARS,
    TEMPLATE,
    VALUES,
    Files,
    Sandbox,
    files_of,
    mutated_bytes,
    mutated_files,
    mutated_json,
    mutated_lines,
    mutated_tree,
    mutated_yaml,
    redescribed,
    resealed,
    sandboxed,
)
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load

from hrm_lm.cluster.loggers import followed
from hrm_lm.cluster.ray_private import SNAPSHOT
from hrm_lm.cluster.run_folder import RunFolder
from hrm_lm.commands.evaluate import main as evaluate
from hrm_lm.commands.export import main as export
from hrm_lm.commands.generate import main as generate
from hrm_lm.commands.import_ import main as import_
from hrm_lm.commands.predict import main as predict
from hrm_lm.commands.prepare import main as prepare
from hrm_lm.commands.report import main as report
from hrm_lm.commands.train import main as train
from hrm_lm.commands.tune import main as tune
from hrm_lm.config import Config, flatten, load_config, parse_set
from hrm_lm.data.collate import pad
from hrm_lm.data.loading import val_batches
from hrm_lm.data.registry import load_dataset
from hrm_lm.data.tokenizer import ByteTokenizer, PretrainedTokenizer
from hrm_lm.errors import UserError
from hrm_lm.inference.engine import Engine
from hrm_lm.models.build import build_model
from hrm_lm.predict.pipeline import Answerer
from hrm_lm.predict.pipeline import read as read_chunks
from hrm_lm.prepare.pipeline import run_task
from hrm_lm.serving.protocol import Chat, Completion, Model, Refused, parse
from hrm_lm.training.checkpoint import Progress, save_model
from hrm_lm.training.checkpoint_files import safetensors_pieces
from hrm_lm.training.loop import train as train_loop

THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
TIMES = 60 if THOROUGH else 1
"""How many times the inputs of the suite are thrown."""

# --- what is valid -----------------------------------------------------------------------------------------------

MODEL = {
    "d_model": 16,
    "n_heads": 2,
    "max_prompt_len": 96,
    "max_response_len": 12,
    "hrm": {"h_cycles": 1, "l_cycles": 1},
}
TRAIN = {"steps": 4, "batch_size": 8, "val_every": 2}
SMALL = {"model": MODEL, "train": TRAIN, "optim": {"lr": 0.01}, "ray": {"storage_path": "runs"}}
SYNTHETIC = {"num_samples": 100, "max_digits": 1}
CONFIGS: list[dict[str, Any]] = [
    SMALL | {"data": {"dataset": "synthetic", "synthetic": SYNTHETIC}},
    SMALL | {"data": {"dataset": "data.jsonl", "tokenizer": "bytes", "val_fraction": 0.3, "truncate": True}},
    SMALL | {"data": {"dataset": "prepared", "cache_gb": 1.0, "max_val_samples": 3}, "base": "base.yaml"},
    SMALL
    | {
        "data": {
            "mixture": {"a": {"dataset": "data.jsonl", "weight": 1.0}, "b": {"dataset": "synthetic"}},
            "synthetic": SYNTHETIC,
        }
    },
    {
        "model": MODEL | {"architecture": "prefix_lm"},
        "optim": {"name": "muon", "betas": [0.9, 0.95]},
        "train": TRAIN | {"packing": True, "batch_tokens": 100, "length_window": 16, "sample_h_cycles": [1, 2]},
        "data": {"dataset": "canary_module:main"},
        "ray": {"num_workers": "1:2", "run_name": "r"},
    },
]
SWEEP = {
    "base": "base.yaml",
    "search_space": {
        "optim.lr": {"loguniform": [1e-4, 1e-2]},
        "model.hrm.h_cycles": {"choice": [1, 2]},
        "train.grad_clip": {"quniform": [0.1, 1.0, 0.1]},
        "train.seed": {"randint": [1, 5]},
    },
    "tune": {
        "num_samples": 2,
        "scheduler": "asha",
        "grace_steps": 1,
        "max_concurrent_trials": 1,
        "time_budget_s": 10.0,
    },
}
METRICS = {"step": 2, "val_loss": 1.0, "val_exact_match": 0.0, "seconds": 1.0, "tokens": 100, "save_ms": 1.0}


def lines(records: Iterable[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def parquet(records: list[dict[str, Any]]) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(records), stream, row_group_size=4)
    return stream.getvalue()


PAIRS = [{"prompt": p, "response": r} for p, r in sums(12)]
TALKS = [
    {"messages": [{"role": role, "content": c} for role, c in zip(["user", "assistant"] * 2, [p, r, "1", "2"])]}
    for p, r in sums(12)
]
TEXT, TALK = lines(PAIRS), lines(TALKS)
RECIPE = {
    "sources": {
        "a": {"input": "case/data.jsonl", "condition": "synth,cot", "cap": 8, "repeat": 2},
        "b": {"input": ["case/talk.jsonl"], "condition": "direct"},
        "c": {"input": "case/tasks.jsonl", "prompt_field": "{q}", "response_field": "a", "condition": "{kind}"},
    },
    "conditions": {"cot": "<c>", "x": "<x>"},
    "prompt_template": "{condition}{prompt}",
}
TASKS = [
    {
        "q": p, "a": f"#### {r}", "of": [r, "7"], "right": "B" if r == "7" else 0, "kind": "x" if len(p) > 3 else "cot", "difficulty": i,
        "spans": {"number": "", "date": {"day": "1"}, "spans": [r, "7"]}, "all": {"spans": [[r]], "number": [r], "date": [{}]},
    }
    for i, (p, r) in enumerate(sums(16))
]  # fmt: skip
SUITE = {
    "conditions": {"cot": "<c>"},
    "prompt_template": "{condition}{prompt}",
    "tasks": {
        "a": {"prompt": "{q}", "response": "a", "metric": "number", "facets": ["kind"], "limit": 5, "condition": "cot"},
        "b": {"prompt": "{q} {options}", "options": "of", "answer": "right", "shots": 2, "shots_by": "kind"},
        "c": {"prompt": "q", "options": ["{q}", "7"], "labels": [0, "B"], "answer": "right", "max_new_tokens": 2},
        "d": {"prompt": "q", "answers": ["spans", "all"], "metric": "f1"},
        "e": {"prompt": "q", "response": "a", "metric": "boxed"},
    },
}
ASKED: list[tuple[type[Completion] | type[Chat], dict[str, Any]]] = [
    (Completion, {
        "model": "m", "prompt": ["1+1", "2"], "n": 2, "max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "seed": 1,
        "stop": ["7"], "logprobs": 2, "stream": True, "stream_options": {"include_usage": True}, "frequency_penalty": 0,
    }),
    (Completion, {"model": "m", "prompt": [[49, 43]], "max_tokens": 2, "h_cycles": 1, "echo": True, "user": "a", "best_of": 1}),
    (Chat, {
        "model": "m", "messages": [{"role": "user", "content": "1+1"}, {"role": "user", "content": [{"type": "text", "text": "2"}]}],
        "max_completion_tokens": 2, "logprobs": True, "top_logprobs": 1, "reasoning_effort": "low", "tools": [],
    }),
]  # fmt: skip
TRIAL = {"step": 2, "timestamp": 10**9, "loss": 1.0, "lr": 0.1, "hostname": "h"} | METRICS


def dumped(tree: Any) -> bytes:
    return yaml.safe_dump(tree, sort_keys=False).encode()


class Valid:
    """An artefact of each kind, as files. They are made once."""

    def __init__(self, folder: Path):
        self.prepared = files_of(write_prepared(folder / "prepared", sums(20)))
        fields = flatten(CONFIGS[0]) | {"train.steps": 2, "train.ema_decay": 0.5, "train.loggers": ["mlflow"]}
        session = LocalSession(folder / "run")
        session.event_folder = folder / "events"
        train_loop(load_config(overrides=fields), session)
        self.checkpoint = files_of(session.last_checkpoint)
        self.sharded = sharded(self.checkpoint)
        fields = fields | {
            "train.init_from": str(session.last_checkpoint),
            "train.lora.rank": 1,
            "optim.warmup_steps": 0,
        }
        self.lora = files_of(train_locally(load_config(overrides=fields), folder / "lora").last_checkpoint)
        (events,) = files_of(session.event_folder).values()
        self.run = {
            "config.yaml": self.checkpoint["config.yaml"], "events.out.tfevents.1.events": events,
            "result.json": b'{"status": "failed", "step": 2, "tokens_per_s": 5.5, "seconds": 1, "error": "no"}',
            ".mlflow.json": b'{"id": "a", "read": {"events.out.tfevents.1.events": 200}}',
        }  # fmt: skip
        self.trial = {
            "params.json": b"{}", "checkpoint_1_a/config.yaml": self.checkpoint["config.yaml"],
            "result.json": lines([TRIAL, TRIAL | {"step": 4, "status": "failed", "error": "no"}]),
        }  # fmt: skip

        prefix_lm = load_config(overrides=flatten(CONFIGS[0]) | {"model.architecture": "prefix_lm"})
        for name, tokenizer in {"prefix_lm": DIGITS, "reader": ByteTokenizer()}.items():
            (folder / name).mkdir()
            model = build_model(prefix_lm.model, tokenizer.vocab_size)
            save_model(folder / name, model, prefix_lm, tokenizer, Progress(val_loss=1.0))
        self.served = Model("m", model.config, model.recurs_per_token, tokenizer, model.config.hrm.cycles)
        self.engine = Engine(model, tokenizer, rows=4)
        self.prefix_lm, self.reader = files_of(folder / "prefix_lm"), files_of(folder / "reader")
        assert export(["--checkpoint", str(folder / "prefix_lm"), "--output", str(folder / "transformers")]) == 0
        self.transformers = files_of(folder / "transformers")

        self.tokenizers = tokenizers(self.transformers)
        self.saved = saved_to_disk(folder)
        saved = {"version": 0, "checkpoint_dir_name": "checkpoint_a", "metrics": METRICS}
        self.snapshot = {
            "ray_version": ray.__version__, "checkpoint_results": [saved], "checkpoint_report_indices": [0],
            "latest_checkpoint_result": saved, "pending_training_results": [], "pending_validation_specs": [],
            "current_report_index": 1, "validated_checkpoint_dir_names": [],
            "timed_out_validation_checkpoint_dir_names": [], "failed_validation_checkpoint_dir_names": [],
        }  # fmt: skip

    def beside(self) -> Files:
        """What the configs name."""
        prepared = {f"prepared/{name}": data for name, data in self.prepared.items()}
        return {"base.yaml": dumped(CONFIGS[0]), "data.jsonl": TEXT} | prepared


def sharded(checkpoint: Files) -> Files:
    """The checkpoint as two workers of a sharded model write it."""
    files = {name: data for name, data in checkpoint.items() if not name.endswith(".safetensors")}
    for kind in ("model", "average", "optimizer"):
        tensors = load(checkpoint[f"{kind}.safetensors"])
        for rank in range(2):
            parts, starts = {}, {}
            for name, tensor in tensors.items():
                halves = tensor.chunk(2) if tensor.dim() else [tensor]
                if rank < len(halves):
                    parts[name] = halves[rank].contiguous()
                    starts[name] = [rank * len(halves[0]), *[0] * (tensor.dim() - 1)] if tensor.dim() else []
            file = f"{kind}/shard-{rank + 1:05d}-model-00001-of-00001.safetensors"
            files[file] = b"".join(map(bytes, safetensors_pieces(parts, starts)))
    state = json.loads(files["trainer_state.json"])
    state["files"] = {name: {} for name in files if name != "trainer_state.json"}
    return resealed(files | {"trainer_state.json": json.dumps(state).encode()})


def saved_to_disk(folder: Path) -> list[Files]:
    """What `save_to_disk` writes, of a table and of several."""
    from datasets import Dataset, DatasetDict

    pairs, talks = Dataset.from_list(PAIRS), Dataset.from_list(TALKS)
    for name, table in {"pairs": pairs, "talks": talks, "both": DatasetDict(train=pairs, val=talks)}.items():
        table.save_to_disk(folder / name)
    return [files_of(folder / name) for name in ("pairs", "talks", "both")]


def tokenizers(transformers: Files) -> list[Files]:
    """This project's and Hugging Face's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe, alphabet = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel.alphabet()[:20]
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<eos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["12+34=46"], trainer)
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), *((c, -1.0) for c in "0123456789+=")], unk_id=0))
    ours = PretrainedTokenizer(json.loads(bpe.to_str()), 0, 1, 2, bpe.get_vocab_size())
    names = b'{"eos_token": "<eos>", "pad_token": {"content": "<pad>"}}'
    return [
        *({"tokenizer.json": tokenizer.to_json().encode()} for tokenizer in (DIGITS, ByteTokenizer(), ours)),
        {"tokenizer.json": bpe.to_str().encode(), "tokenizer_config.json": names},
        {"tokenizer.json": bpe.to_str().encode(), "chat_template.jinja": TEMPLATE, "tokenizer_config.json": names},
        {"tokenizer.json": unigram.to_str().encode()},
        {name: transformers[name] for name in ("tokenizer.json", "tokenizer_config.json")},
    ]


# --- what is thrown ----------------------------------------------------------------------------------------------

Rng = random.Random


def assignment(rng: Rng) -> str:
    """For --set."""
    path = rng.choice([*flatten(Config().to_dict()), "model", "data", "data.mixture.a", "base", "tune.metric"])
    if rng.random() < 0.3:
        path = rng.choice([f"{path}.x", f"{path}.", f".{path}", path.partition(".")[0], rng.choice(KEYS)])
    value = rng.choice([rng.choice(SCALARS), repr(rng.choice(VALUES))])
    return f"{path}={value}" if rng.random() < 0.95 else rng.choice([path, value, "=", ""])


def own(text: str) -> str:
    """What the user names runs, and is no canary."""
    return text.replace("canary_module", "no_such_module")


def a_config(rng: Rng, box: Sandbox, valid: Valid) -> None:
    files = valid.beside() | {"c.yaml": dumped(rng.choice(CONFIGS))}
    kind, arguments = rng.random(), ["--config", "c.yaml"]
    if kind < 0.8:
        name = "c.yaml" if kind < 0.75 else "base.yaml"
        files[name] = mutated_yaml(rng, files[name])
    if kind > 0.7:
        arguments += ["--set", own(assignment(rng))] * rng.choice([1, 1, 2])
    if rng.random() < 0.1:
        flag = rng.choice(["steps", "num_workers", "dataset", "run_name", "save_dir", "init_from", "use_gpu"])
        arguments += [f"--{flag}", own(str(rng.choice(VALUES)))]
    if rng.random() < 0.5:
        files["trainer_state.json"] = b"{}"  # a stranger's, whose code must not run
    else:
        files = {
            name: own(data.decode(errors="surrogateescape")).encode(errors="surrogateescape")
            for name, data in files.items()
        }
    dry_run = str(int(rng.random() < 0.2))
    if dry_run == "1":
        arguments += ["--set", "train.compile=false"]  # which would start compilers
    box.fresh(files)
    os.chdir(box.case)
    box.attempt(lambda: train([*arguments, "--dry_run", dry_run]))


def a_sweep(rng: Rng, box: Sandbox, valid: Valid) -> None:
    sweep = dict(SWEEP)
    if rng.random() < 0.5:
        sweep["base"] = rng.choice(CONFIGS)
    if rng.random() < 0.3:
        sweep["search_space"] = SWEEP["search_space"] | {
            "data.dataset": {"choice": ["synthetic", "canary_module:main"]}
        }
    files = valid.beside() | {"s.yaml": dumped(sweep), "trainer_state.json": b"{}"}
    arguments = ["--config", "s.yaml", "--run_name", "s", "--save_dir", "sweeps"]
    kind = rng.random()
    if kind < 0.7:
        files["s.yaml"] = mutated_yaml(rng, files["s.yaml"])
    elif kind < 0.8:
        files["sweeps/s/sweep.yaml"] = mutated_yaml(rng, files["s.yaml"])
        arguments += ["--resume"]
    if kind > 0.65:
        arguments += ["--set", own(rng.choice(["", "tune."]) + assignment(rng))]
    box.fresh(files)
    os.chdir(box.case)
    box.attempt(lambda: tune(arguments))


def a_dataset(rng: Rng, box: Sandbox, valid: Valid) -> None:
    files: Files = {"train.jsonl": TEXT, "val.jsonl": TEXT}
    for name in rng.choice([["train.jsonl"], ["train.jsonl"], ["val.jsonl"], ["train.jsonl", "val.jsonl"]]):
        files[name] = mutated_lines(rng, rng.choice([TEXT, TALK]))
    if rng.random() < 0.1:
        files = mutated_files(rng, files)
    dataset = rng.choice(["case", "case/train.jsonl"])
    options = ["data.val_fraction=0.4", *rng.choice([[], ["data.tokenizer=bytes"], ["data.tokenizer=characters"]])]
    box.fresh(files)
    box.attempt(lambda: train(["--dataset", dataset, *(f"--set={option}" for option in options)]))
    box.attempt(lambda: read(dataset, options))


def read(dataset: str, options: list[str]) -> int:
    """Reads a dataset as a worker does. Asserts that the model would know every id."""
    config = load_config(overrides=flatten(SMALL) | {"data.dataset": dataset} | parse_set(options))
    splits = load_dataset(config.data, config.model, 0)
    for split in (splits.train, splits.val):
        for batch in (batch for group in val_batches(split, splits.tokenizer, pad, 4) for batch in group):
            ids = torch.cat(
                [batch.encoder_ids.flatten(), batch.decoder_input_ids.flatten(), batch.labels.flatten().clamp(0)]
            )
            assert ids.min() >= 0 and ids.max() < splits.tokenizer.vocab_size
            assert (batch.encoder_mask.sum(1) > 0).all() and batch.encoder_ids.shape[1] <= config.model.max_prompt_len
    return 0


def a_saved_dataset(rng: Rng, box: Sandbox, valid: Valid) -> None:
    box.fresh(mutated_files(rng, rng.choice(valid.saved)))
    name = "hf:case" + rng.choice(["", "", "", ",split=val", ",val_split=val", ",split=train[:50%]"])
    box.attempt(lambda: train(["--dataset", name]))
    box.attempt(lambda: read(name, ["data.val_fraction=0.4"]))


def a_prepared_dataset(rng: Rng, box: Sandbox, valid: Valid) -> None:
    files = mutated_files(rng, valid.prepared)
    box.fresh(redescribed(files) if rng.random() < 0.7 else files)
    cache = box.root / "cache"
    shutil.rmtree(cache)
    cache.mkdir()
    place = rng.choice(["case", "remote://case"])
    with pytest.MonkeyPatch.context() as patch:
        if place != "case":
            patch.setattr("hrm_lm.data.prepared.reader.resolve", lambda location: (Remote(), str(box.case)))
            patch.setattr(box, "writable", {*box.writable, str(cache)})
        box.attempt(lambda: train(["--dataset", place]))
        box.attempt(lambda: read(place, []))
    for thread in threading.enumerate():
        if thread.name == "fetch":  # of a file that is not needed any more, since another file was damaged
            thread.join()


def a_tokenizer(rng: Rng, box: Sandbox, valid: Valid) -> None:
    tokenizer = rng.choice(valid.tokenizers)
    data = TALK if "chat_template.jinja" in tokenizer else TEXT
    box.fresh(mutated_files(rng, tokenizer) | {"data.jsonl": data})
    name = rng.choice(["case", "case/tokenizer.json"])
    options = [f"data.tokenizer={name}", "data.val_fraction=0.4"]
    if rng.random() < 0.8:
        box.attempt(lambda: train(["--dataset", "case/data.jsonl", *(f"--set={option}" for option in options)]))
        box.attempt(lambda: read("case/data.jsonl", options))
    else:
        box.attempt(lambda: prepared(["--input", "case/data.jsonl", "--output", "out", "--tokenizer", name]))


def a_checkpoint(rng: Rng, box: Sandbox, valid: Valid) -> None:
    files = rng.choice([valid.checkpoint, valid.sharded, valid.lora, valid.prefix_lm, valid.prefix_lm])
    files = mutated_files(rng, files)
    box.fresh(resealed(files) if rng.random() < 0.7 else files)
    here = ["--checkpoint", "case"]
    match rng.randrange(6):
        case 0 | 1 | 2:
            flag = rng.choice(["--max_new_tokens", "--h_cycles", "--l_cycles", "--temperature", "--top_k", "--seed"])
            more = [flag, str(rng.choice([0, 1, 2, -1, 2**70, "nan"]))] if rng.random() < 0.1 else []
            box.attempt(lambda: generate([*here, "--prompt", "1+1", "--max_new_tokens", "3", *more]))
        case 3:
            more = ["--set", assignment(rng)] if rng.random() < 0.3 else []
            box.attempt(lambda: evaluate([*here, "--output", "out", *map(own, more)]))
        case 4:
            box.attempt(lambda: train(["--config", "case/config.yaml", "--init_from", "case", "--save_dir", "runs"]))
        case _:
            box.attempt(lambda: export([*here, "--output", "out"]))


class Worker:
    """A worker that goes on from a checkpoint, for a step."""

    rank, world_size, device, display, event_folder = 0, 1, torch.device("cpu"), "lines", None

    def __init__(self, checkpoint: Path):
        self.checkpoint = checkpoint

    def alive(self) -> None:
        pass

    def preempted(self, step: int) -> bool:
        return False

    def checkpoints(self):
        return [("checkpoint", nullcontext(self.checkpoint))]

    def report(self, metrics, snapshot) -> None:
        snapshot.write(pyarrow.fs.LocalFileSystem(), os.path.abspath("out"))


def a_task(rng: Rng, box: Sandbox, valid: Valid) -> None:
    kind, suite, records, name = rng.random(), dumped(SUITE), lines(TASKS), "r.jsonl"
    if kind < 0.4:
        suite = mutated_yaml(rng, suite)
    elif kind < 0.7:
        place = rng.randrange(len(TASKS))
        records = lines([*TASKS[:place], mutated_tree(rng, TASKS[place]), *TASKS[place + 1 :]])
    elif kind < 0.8:
        records = mutated_lines(rng, records)
    elif kind < 0.9:
        records, name = mutated_bytes(rng, b"q,a,right\n" + b"1+1,2,0\n" * 5), rng.choice(["r.csv", "r.tsv"])
    else:
        columns = ["q", "a", "of", "kind", "difficulty"]  # which have the same type in all records
        records, name = parquet([{column: task[column] for column in columns} for task in TASKS]), "r.parquet"
        records = mutated_bytes(rng, records)
    if rng.random() < 0.7:
        tasks = ",".join(["case/s.yaml", *(f"{task}=case/{name}" for task in [*SUITE["tasks"], "b_shots"])])
    else:
        options = [
            "metric=number",
            "facets=kind",
            "answers=spans+all",
            "limit=3",
            "options=of",
            "answer=right",
            "shots=1",
        ]
        options = rng.sample([*options, f"shots_data=case/{name}", "response=a"], rng.randrange(4))
        tasks = ",".join([f"case/{name}", "prompt=" + rng.choice(["q", "q", "{q}", "{x}"]), *options])
    if rng.random() < 0.2:
        place = rng.randrange(len(tasks))
        tasks = f"{tasks[:place]}{rng.choice(',=[({+')}{tasks[place:]}"
    box.fresh({f"m/{file}": data for file, data in valid.reader.items()} | {"s.yaml": suite, name: records})
    code, *_ = box.attempt(lambda: evaluate(["--checkpoint", "case/m", "--tasks", tasks, "--output", "out"]))
    assert code != 0 or MARKUP not in (box.out / "report.html").read_text()


class Logger:
    """One that takes everything."""

    def __init__(self, folder: RunFolder, fields: dict[str, Any], id: str | None):
        self.id = id or "a"

    def log(self, events) -> None:
        pass

    def finish(self, result, page) -> None:
        pass


def a_page(rng: Rng, box: Sandbox, valid: Valid) -> None:
    if rng.random() < 0.7:
        files = mutated_files(rng, valid.run)
    else:
        files = valid.trial | {"result.json": mutated_lines(rng, valid.trial["result.json"])}
        files = files if rng.random() < 0.7 else mutated_files(rng, valid.trial)
    runs = ["case/r", "case/s"][: rng.choice([1, 2])]
    box.fresh({f"r/{name}": data for name, data in files.items()} | {f"s/{name}": b for name, b in valid.run.items()})
    code, *_ = box.attempt(lambda: report([*runs, "--output", "out/page.html"]))
    assert code != 0 or MARKUP not in (box.out / "page.html").read_text()
    if rng.random() < 0.3:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("hrm_lm.cluster.loggers.LOGGERS", {"mlflow": Logger})
            patch.setattr(box, "writable", {*box.writable, str(box.case)})
            box.attempt(follow)


def follow() -> int:
    with followed(load_config("case/s/config.yaml"), RunFolder("case", "r")) as result:
        result |= {"status": "finished", "step": 2}
    return 0


def a_run(rng: Rng, box: Sandbox, valid: Valid) -> None:
    kind, snapshot = rng.random(), json.dumps(valid.snapshot).encode()
    checkpoint = whole = rng.choice([valid.checkpoint, valid.sharded, valid.lora])
    if kind < 0.5:
        snapshot = mutated_json(rng, snapshot)
    if kind > 0.4:
        checkpoint = mutated_files(rng, whole)
        checkpoint = resealed(checkpoint) if rng.random() < 0.7 else checkpoint
    files = {f"r/{SNAPSHOT}": snapshot} | {f"r/checkpoint_a/{name}": data for name, data in checkpoint.items()}
    box.fresh(files | {"c.yaml": whole["config.yaml"]})
    match rng.randrange(4):
        case 0:
            steps = rng.choice(["2", "3"])
            box.attempt(
                lambda: train(["--config", "case/c.yaml", "--run_name", "r", "--save_dir", "case", "--steps", steps])
            )
        case 1:
            box.attempt(
                lambda: generate(["--run_name", "r", "--save_dir", "case", "--prompt", "1", "--max_new_tokens", "3"])
            )
        case 2:
            box.attempt(lambda: evaluate(["--save_dir", "case", "--output", "out"]))
        case _:
            config = load_config("case/c.yaml", {"train.steps": 3})
            box.attempt(lambda: 0 if train_loop(config, Worker(box.case / "r" / "checkpoint_a")) else 1)


def a_transformers_folder(rng: Rng, box: Sandbox, valid: Valid) -> None:
    box.fresh(mutated_files(rng, valid.transformers))
    box.attempt(lambda: import_(["--input", "case", "--output", "out"]))


def a_corpus(rng: Rng, box: Sandbox, valid: Valid) -> None:
    kind, rows = rng.choice(["jsonl", "jsonl.gz", "jsonl.zst", "jsonl.bz2", "parquet", "csv", "tsv", "txt"]), sums(12)
    if kind == "parquet":
        data = mutated_bytes(rng, parquet(PAIRS))
    elif kind in ("csv", "tsv", "txt"):
        separator = "\t" if kind == "tsv" else ","
        lines = [separator.join(row) for row in [("prompt", "response"), *rows]]
        data = mutated_bytes(rng, "\n".join(lines).encode())
    else:
        data = mutated_lines(rng, rng.choice([TEXT, TALK]))
        if kind != "jsonl":
            data = pa.compress(data, "zstd", asbytes=True) if kind == "jsonl.zst" else gzip.compress(data)
            data = mutated_bytes(rng, data) if rng.random() < 0.6 else data
    files: Files = {f"data.{kind}": data}
    if rng.random() < 0.3:
        files["more.jsonl"] = TEXT
    if rng.random() < 0.1:
        files = mutated_files(rng, files)
    arguments = ["--tokenizer", rng.choice(["characters", "bytes"])] + ["--strict"] * (rng.random() < 0.2)
    if rng.random() < 0.3:
        specs = ["{prompt}", "{a.0}", "{", "a.b", "", "{prompt!r}", "{0}", "{}", "prompt.0", "{prompt} {response}"]
        arguments += [rng.choice(["--prompt_field", "--response_field"]), rng.choice([*specs, str(rng.choice(VALUES))])]
    flags = ["val_fraction", "shard_mb", "max_prompt_len", "max_response_len", "vocab_size", "text_prompt_chars"]
    flag, value = "val_fraction", "0.4"
    if rng.random() < 0.2:
        flag, value = rng.choice(flags), str(rng.choice([0, 1, 0.5, "nan", "inf", -1, 1e-9, 2**70, "x", 1e308, 3]))
    box.fresh(files)
    if rng.random() < 0.05:  # what a killed command left, or so it seems
        (box.out / ".prepare").mkdir(parents=True)
        name = rng.choice([".prepare/plan.json", ".prepare/survey-00000.json", "meta.json", "report.json"])
        (box.out / name).write_bytes(mutated_json(rng, b'{"plan": "x", "groups": [1]}'))
    code, *_ = box.attempt(lambda: prepared(["--input", "case", "--output", "out", *arguments, f"--{flag}", value]))
    if code == 0:
        box.attempt(lambda: read("out", []))


def a_recipe(rng: Rng, box: Sandbox, valid: Valid) -> None:
    files: Files = {"c.yaml": dumped(RECIPE), "data.jsonl": TEXT, "talk.jsonl": TALK, "tasks.jsonl": lines(TASKS)}
    name = "c.yaml" if rng.random() < 0.7 else rng.choice(sorted(files))
    files[name] = mutated_yaml(rng, files[name]) if name == "c.yaml" else mutated_lines(rng, files[name])
    box.fresh(files)
    arguments = ["--sources", "case/c.yaml", "--output", "out", "--tokenizer", rng.choice(["characters", "bytes"])]
    code, *_ = box.attempt(lambda: prepared([*arguments, "--val_fraction", "0.4"]))
    if code == 0:
        box.attempt(lambda: read("out", []))


def prepared(arguments: list[str]) -> int:
    """`hrm-lm prepare`, whose tasks run here in place of Ray's."""

    def run_step(job, name, title, items, task, together=1) -> list:
        rows = [run_task(job, name, list(items), task, {"i": i}) for i in range(len(items))]
        if errors := [row["error"] for row in rows if row["error"]]:
            raise UserError(errors[0])
        return [json.loads(row["result"]) for row in rows]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hrm_lm.cluster.start.started_ray", nullcontext)
        patch.setattr("hrm_lm.prepare.pipeline.run_step", run_step)
        return prepare(arguments)


def a_prediction(rng: Rng, box: Sandbox, valid: Valid) -> None:
    kind, arguments = rng.choice(["jsonl", "jsonl", "jsonl.gz", "parquet", "csv"]), []
    if kind == "parquet":
        data = mutated_bytes(rng, parquet(PAIRS))
    elif kind == "csv":
        data = mutated_bytes(rng, "\n".join(",".join(row) for row in [("prompt", "response"), *sums(12)]).encode())
    else:
        data = mutated_lines(rng, rng.choice([TEXT, TALK]))
        data = gzip.compress(data) if kind == "jsonl.gz" else data
    if rng.random() < 0.3:
        specs = [
            "{prompt}",
            "{a.0}",
            "{",
            "a.b",
            "",
            "{prompt!r}",
            "prompt.0",
            "{prompt} {response}",
            str(rng.choice(VALUES)),
        ]
        arguments += [rng.choice(["--prompt_field", "--response_field"]), rng.choice(specs)]
    if rng.random() < 0.3:
        arguments += rng.choice([["--format=parquet"], ["--strict"], ["--n=2", "--temperature=1"], ["--batch_size=3"]])
    if rng.random() < 0.1:
        flag = rng.choice(["--n", "--batch_size", "--num_workers", "--max_new_tokens", "--h_cycles", "--temperature"])
        arguments += [flag, str(rng.choice([0, -1, 2**70, "nan", "x"]))]
    files: Files = {f"data.{kind}": data} | ({"more.jsonl": TEXT} if rng.random() < 0.3 else {})
    box.fresh({f"m/{file}": b for file, b in valid.reader.items()} | {f"i/{file}": b for file, b in files.items()})
    if rng.random() < 0.1:  # what a killed command left, or so it seems
        (box.out / ".predict").mkdir(parents=True)
        name = rng.choice([".predict/plan.json", ".predict/chunk-000000.json", "_report.json"])
        (box.out / name).write_bytes(mutated_json(rng, b'{"plan": "x", "first_size": 1, "is_last": true}'))
    box.attempt(
        lambda: predicted(["--input=case/i", "--output=out", "--checkpoint=case/m", "--max_new_tokens=2", *arguments])
    )


def predicted(arguments: list[str]) -> int:
    """`hrm-lm predict`, whose chunks are answered here in place of Ray's actors."""

    def run_actors(job, done, num_workers):
        answer = Answerer(job)
        for rows in read_chunks(job, done, None):
            (row,) = answer(rows).to_pylist()
            if row["error"]:
                raise UserError(row["error"])
            yield row["number"], json.loads(row["result"]), row["num_bytes"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hrm_lm.predict.pipeline.started_ray", nullcontext)
        patch.setattr("hrm_lm.predict.pipeline.run_actors", run_actors)
        return predict(arguments)


def a_request(rng: Rng, box: Sandbox, valid: Valid) -> None:
    """The body of a request to the server, which is refused in words or answered."""
    kind, fields = rng.choice(ASKED)
    body = mutated_json(rng, json.dumps(fields).encode())
    box.attempt(lambda: asked(body, kind, valid))


def asked(body: bytes, kind: type[Completion] | type[Chat], valid: Valid) -> int:
    try:
        job = parse(body, kind, valid.served, most=8)
    except Refused as refused:
        assert 400 <= refused.status < 500 and json.dumps(refused.body()).encode() and refused.message
        return 0
    with valid.engine as engine:
        answers = [engine.add(request) for request in job.requests]
        while engine.waiting or engine.running:
            engine.step()
    assert all(answer.finish_reason in ("stop", "length") for answer in answers)
    return 0


def prompts(rng: Rng, box: Sandbox, valid: Valid) -> None:
    name = rng.choice(["p.jsonl", "p.txt"])
    box.fresh({f"m/{file}": data for file, data in valid.checkpoint.items()} | {name: mutated_lines(rng, TEXT)})
    arguments = ["--checkpoint", "case/m", "--prompts_file", f"case/{name}", "--max_new_tokens", "2"]
    box.attempt(lambda: generate(arguments))


TARGETS = {
    a_config: 250, a_sweep: 200, a_dataset: 100, a_prepared_dataset: 150, a_tokenizer: 100, a_checkpoint: 200, a_run: 150,
    a_transformers_folder: 50, a_corpus: 100, prompts: 30, a_saved_dataset: 60, a_task: 40, a_page: 30, a_recipe: 60, a_prediction: 60,
    a_request: 300,
}  # fmt: skip
"""What is thrown, and how many inputs of it in the suite."""


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    return Valid(tmp_path_factory.mktemp("valid"))


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    with sandboxed(tmp_path_factory.mktemp("fuzz") / "box") as box:
        yield box


@pytest.mark.slow
@pytest.mark.parametrize("throw", TARGETS, ids=lambda throw: throw.__name__)
def test_whatever_is_malformed_is_told_in_a_message_or_works(throw, box, valid, capsys):
    start, before = time.perf_counter(), box.inputs

    @settings(
        max_examples=TARGETS[throw] * TIMES,
        derandomize=not THOROUGH,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(st.randoms(use_true_random=False))
    def thrown(rng):
        os.chdir(box.work)
        throw(rng, box, valid)

    thrown()
    count, minutes = box.inputs - before, (time.perf_counter() - start) / 60
    if THOROUGH:
        with capsys.disabled():
            print(f"{throw.__name__}: {count:,} inputs, {count / minutes:,.0f} a minute")
