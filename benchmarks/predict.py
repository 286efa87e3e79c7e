"""`hrm-lm predict` against `generate`, and through kills: `python benchmarks/predict.py [--run_name arithmetic]`.

The checkpoint is one of `configs/arithmetic.yaml`. First the same prompts in rounds that alternate, in one process with one
thread: `generate` alone, and all that a worker of `predict` does (reading, tokenizing, answering, a file for each chunk).
Then the command itself on Ray: it is killed with SIGKILL, given again, and an actor is killed. Each record must be there
once, in order, with the answer that `generate` gives. Before all that, samples in flight against whole batches. CPU time is
given because a busy machine distorts it least.
"""

import argparse
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs
import torch

from hrm_lm.commands.flags import add_checkpoint_flags
from hrm_lm.config import load_config
from hrm_lm.data.tokenizer import ByteTokenizer
from hrm_lm.filesystem import resolve
from hrm_lm.inference.choice import find_checkpoint
from hrm_lm.inference.generate import generate
from hrm_lm.models import decoding
from hrm_lm.models.build import build_model
from hrm_lm.models.contract import EvalOptions
from hrm_lm.models.decoding import generate_ids
from hrm_lm.predict.pipeline import Answerer, read
from hrm_lm.predict.tasks import Job, Settings
from hrm_lm.prepare.reading import find_files
from hrm_lm.training.checkpoint import load_model, read_checkpoint

MARK = "HRM_LM_BENCHMARK"


def write_prompts(path: Path, count: int) -> list[str]:
    draw = random.Random(0)
    prompts = [f"What is {draw.randrange(100)} + {draw.randrange(100)}?" for _ in range(count)]
    path.write_text("".join(json.dumps({"id": i, "prompt": prompt}) + "\n" for i, prompt in enumerate(prompts)))
    return prompts


def rates(
    checkpoint: tuple[pyarrow.fs.FileSystem, str], folder: Path, prompts: int, batch_size: int, rounds: int
) -> None:
    texts = write_prompts(folder / "some.jsonl", prompts)
    fs, path = resolve(str(folder / "some"))
    config = read_checkpoint(checkpoint[1], checkpoint[0]).config.model
    ((file, _),) = find_files([str(folder / "some.jsonl")])
    settings = Settings(
        prompt_field="prompt", response_field="response", format="jsonl", n=1, cycles=config.hrm.cycles,
        max_new_tokens=config.max_response_len, temperature=0.0, top_k=None, top_p=1.0, seed=0,
    )  # fmt: skip
    job = Job(
        settings=settings, files=[file], fs=fs, output=path, checkpoint=checkpoint[1], checkpoint_fs=checkpoint[0],
        batch_size=batch_size, strict=False, first_size=batch_size,
    )  # fmt: skip
    job.finished(path, "a benchmark's")
    actor, options = Answerer(job), EvalOptions(cycles=config.hrm.cycles, batch_size=batch_size)
    tokens = 0

    def predict() -> None:
        nonlocal tokens
        results = [json.loads(actor(rows)["result"][0].as_py()) for rows in read(job, set(), pa.table({}))]
        tokens = sum(result["tokens"] for result in results)

    sides: dict[str, Callable[[], object]] = {
        "generate": lambda: generate(actor.model, actor.tokenizer, texts, options),
        "predict": predict,
    }
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            began = time.process_time()
            side()
            taken[name].append(time.process_time() - began)
    medians = {name: tokens / statistics.median(seconds) for name, seconds in taken.items()}
    print(
        f"{prompts:,} prompts, batches of {batch_size}: generate {medians['generate']:,.0f} tokens per CPU second, a worker of "
        f"predict {medians['predict']:,.0f}: {medians['predict'] / medians['generate']:.0%}",
        flush=True,
    )


def places(rounds: int) -> None:
    """Samples that take the places of others, against batches that wait for their last sample, where answers are of various
    lengths: those of an untrained model in which every 20th token or so is EOS.
    """
    tokenizer, draw = ByteTokenizer(), random.Random(0)
    prompts = [[draw.randrange(3, 259) for _ in range(draw.randint(4, 60))] for _ in range(512)]
    for architecture in ("encoder_decoder", "prefix_lm"):
        torch.manual_seed(0)
        sizes = {"model.d_model": 256, "model.max_prompt_len": 64, "model.max_response_len": 64}
        config = load_config(overrides={"model.architecture": architecture, **sizes}).model
        model = build_model(config, tokenizer.vocab_size).eval()
        torch.nn.init.normal_(model.head.weight)
        model.head.weight.data[tokenizer.eos_id] *= 1.9
        taken: dict[float, list[float]] = {decoding.WASTE: [], math.inf: []}
        for _ in range(rounds):
            for waste in taken:
                decoding.WASTE = waste
                began = time.process_time()
                answers = generate_ids(model, tokenizer, prompts, EvalOptions(cycles=config.hrm.cycles))
                taken[waste].append(time.process_time() - began)
        decoding.WASTE = next(iter(taken))
        lengths = [len(answer) for answer in answers]
        new, whole = (sum(lengths) / statistics.median(seconds) for seconds in taken.values())
        print(
            f"{architecture}, answers of {min(lengths)} to {max(lengths)} tokens ({statistics.mean(lengths):.0f} on average): "
            f"{new:,.0f} tokens per CPU second, in batches that wait {whole:,.0f}: {new / whole:.2f} times",
            flush=True,
        )


def processes(mark: str) -> dict[int, bytes]:
    """The command lines of the processes that have `mark` in their environment, by id (Linux only)."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found[int(folder.name)] = (folder / "cmdline").read_bytes()
        except OSError:  # it has ended, or is another user's
            pass
    return found


def actors(mark: str) -> list[int]:
    return [pid for pid, command in processes(mark).items() if command.startswith(b"ray::MapWorker")]


def cpu_seconds(pids: list[int]) -> float:
    times = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13] for pid in pids]
    return sum(int(value) for pair in times for value in pair) / os.sysconf("SC_CLK_TCK")


def through_kills(checkpoint: str, folder: Path, prompts: int, batch_size: int) -> None:
    config = read_checkpoint(checkpoint).config.model
    options = EvalOptions(cycles=config.hrm.cycles, batch_size=batch_size)
    texts = write_prompts(folder / "in.jsonl", prompts)
    output, mark = folder / "out", f"{MARK}={folder}"
    command = [sys.executable, "-m", "ray_jobs.predict", "--checkpoint", checkpoint, "--input", folder / "in.jsonl"]
    command += ["--output", output, "--batch_size", batch_size]

    def start() -> subprocess.Popen:
        environment = os.environ | dict([mark.split("=", 1)])
        return subprocess.Popen(list(map(str, command)), env=environment, stdout=subprocess.PIPE, text=True)

    def done() -> dict[int, dict]:
        results = {}
        with suppress(FileNotFoundError):  # at the end the folder is removed
            for file in sorted((output / ".predict").glob("chunk-*.json")):
                results[int(file.stem[6:])] = json.loads(file.read_text())
        return results

    def answered() -> int:
        return sum(result["records"] for result in done().values())

    began = time.perf_counter()
    first = start()
    while answered() < prompts // 3:
        time.sleep(0.2)
    first.kill()
    first.wait()
    while processes(mark):  # Ray ends with its driver
        time.sleep(0.2)
    print(f"driver killed after {time.perf_counter() - began:.0f} s and {answered():,} records", flush=True)

    model, tokenizer, _ = load_model(checkpoint)
    second, killed = start(), False
    samples: dict[tuple[int, ...], list[np.ndarray]] = {}  # by the two actors
    while second.poll() is None:
        cpu = time.process_time()
        beside = generate_ids(model, tokenizer, [tokenizer.encode(text) for text in texts[:512]], options)
        cpu = time.process_time() - cpu
        results, pids = done(), tuple(sorted(actors(mark)))
        count = sum(result["records"] for result in results.values())
        if pids and not killed and count > prompts // 2:
            os.kill(pids[0], signal.SIGKILL)
            killed = True
            print(f"actor killed after {count:,} records", flush=True)
        elif len(pids) == 2 and results:
            tokens = sum(result["tokens"] for result in results.values())
            sample = [len(results), time.perf_counter(), tokens, cpu_seconds(list(pids)), sum(map(len, beside)), cpu]
            samples.setdefault(pids, []).append(np.array(sample))
    said, _ = second.communicate()
    print(said.strip(), flush=True)
    for some in samples.values():
        some = [sample for sample in some if sample[0] >= some[0][0] + 20]  # both have their models by then
        if len(some) > 10:
            _, seconds, tokens, cpu, *_ = some[-1] - some[0]
            *_, tokens_beside, cpu_beside = sum(some)
            workers, alone = tokens / cpu, tokens_beside / cpu_beside
            print(
                f"{seconds:.0f} s with two workers: {tokens / seconds / 2:,.0f} tokens/s each, {workers:,.0f} per CPU second; "
                f"generate beside them {alone:,.0f}: {workers / alone:.0%}"
            )
    print(f"{time.perf_counter() - began:.0f} s in all")
    found = [json.loads(line) for file in sorted(output.glob("part-*")) for line in file.read_text().splitlines()]
    assert [record["id"] for record in found] == list(range(prompts)), "a record is missing, or there twice"
    expected = generate(model, tokenizer, texts)
    same = sum(record["response"] == answer for record, answer in zip(found, expected))
    print(f"each of {prompts:,} records is there once; {same:,} answers are those of generate")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_checkpoint_flags(parser)
    parser.add_argument("--prompts", type=int, default=100_000)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint = find_checkpoint(args.checkpoint, args.run_name, args.save_dir)
    with tempfile.TemporaryDirectory(prefix="predict_") as folder:
        places(min(args.rounds, 3))
        rates(checkpoint, Path(folder), min(args.prompts, 32_768), args.batch_size, args.rounds)
        through_kills(checkpoint[1], Path(folder), args.prompts, args.batch_size)


if __name__ == "__main__":
    sys.exit(main())
