"""`ray_jobs.prepare` on a generated corpus, against the tokenizer alone: `python benchmarks/prepare.py [--pairs 1000000]`.

Prints pairs/s, MB/s, the share of (tokenizer alone in one process) x cores, CPU time, which a busy machine does not
distort, and peak memory of the processes of the tasks (what each holds for itself, shared pages not counted).
"""

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from hrm_lm.cluster.start import init_ray
from hrm_lm.data.tokenizer import resolve_tokenizer
from hrm_lm.prepare.pipeline import prepare
from hrm_lm.prepare.tasks import ENCODED_TOGETHER, Settings

WORDS_EACH = (30, 10)  # of prompt and response, on average


def write_corpus(folder: Path, pairs: int, files: int = 8) -> int:
    """JSONL of pseudo-words, the frequent ones more often (Zipf). Returns its size in bytes."""
    rng = np.random.default_rng(0)
    syllables = [c + v for c in "bcdfghklmnprstvz" for v in "aeiou"]
    words = np.array(["".join(rng.choice(syllables, rng.integers(1, 5))) for _ in range(20_000)])
    for number in range(files):
        with open(folder / f"{number}.jsonl", "w") as file:
            for start in range(0, pairs // files, 10_000):
                count = min(10_000, pairs // files - start)
                lengths = rng.poisson(WORDS_EACH, (count, 2)) + 1
                drawn = words[np.minimum(rng.zipf(1.3, lengths.sum()) - 1, len(words) - 1)].tolist()
                at = 0
                for prompt, response in lengths.tolist():
                    texts = " ".join(drawn[at : at + prompt]), " ".join(drawn[at + prompt : at + prompt + response])
                    file.write(f'{{"prompt": "{texts[0]}", "response": "{texts[1]}"}}\n')
                    at += prompt + response
    return sum(file.stat().st_size for file in folder.iterdir())


def train_tokenizer(corpus: Path, path: Path) -> None:
    import tokenizers

    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = byte_level, tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=8192, special_tokens=["<pad>", "<bos>", "<eos>"], show_progress=False
    )
    tokenizer.train_from_iterator((text for pair in sample(corpus, 20_000) for text in pair), trainer)
    path.write_text(tokenizer.to_str())


def sample(corpus: Path, pairs: int) -> list[tuple[str, str]]:
    with open(corpus / "0.jsonl") as lines:
        return [tuple(json.loads(line).values()) for line, _ in zip(lines, range(pairs))]


def tokenizer_alone(path: Path, corpus: Path) -> tuple[float, float]:
    """Pairs per second, and per second of CPU time, of one process with one thread."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer, texts = resolve_tokenizer(str(path)), [text for pair in sample(corpus, 50_000) for text in pair]
    tokenizer.encode_batch(texts[:1000])
    start, cpu_start = time.perf_counter(), time.process_time()
    for at in range(0, len(texts), 2 * ENCODED_TOGETHER):
        tokenizer.encode_batch(texts[at : at + 2 * ENCODED_TOGETHER])
    return len(texts) / 2 / (time.perf_counter() - start), len(texts) / 2 / (time.process_time() - cpu_start)


class TaskProcesses:
    """Watches the processes of this program's Ray (Linux only): their peak of private memory and their CPU time."""

    def __init__(self):
        self.task_mib = self.driver_mib = 0.0
        self.cpu_seconds: dict[str, float] = {}
        self.ended = threading.Event()
        threading.Thread(target=self.watch, daemon=True).start()

    def watch(self) -> None:
        while not self.ended.wait(0.5):  # looking takes 20 ms
            self.look()

    def look(self) -> None:
        self.driver_mib = max(self.driver_mib, private_mib(Path("/proc/self")))
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if (process / "cmdline").read_bytes().startswith(b"ray::") and descends(process):
                    self.task_mib = max(self.task_mib, private_mib(process))
                    times = stat(process)[11:13]  # user and system
                    self.cpu_seconds[process.name] = sum(map(int, times)) / os.sysconf("SC_CLK_TCK")
            except OSError:  # it has ended
                pass


def stat(process: Path) -> list[str]:
    """Fields of /proc/PID/stat from the state (the third) on."""
    return (process / "stat").read_text().rpartition(")")[2].split()


def descends(process: Path) -> bool:
    while (parent := stat(process)[1]) != "0":
        if int(parent) == os.getpid():
            return True
        process = Path("/proc") / parent
    return False


def private_mib(process: Path) -> float:
    lines = (process / "smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--cpus", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="prepare_") as temporary:
        corpus, tokenizer = Path(temporary) / "corpus", Path(temporary) / "tokenizer.json"
        corpus.mkdir()
        size = write_corpus(corpus, args.pairs)
        train_tokenizer(corpus, tokenizer)
        alone, alone_cpu = tokenizer_alone(tokenizer, corpus)
        start = time.perf_counter()
        init_ray(num_cpus=args.cpus)
        started = time.perf_counter()
        watched = TaskProcesses()
        report = prepare(Settings(tokenizer=str(tokenizer)), [str(corpus)], f"{temporary}/out")
        seconds = time.perf_counter() - started
        watched.ended.set()
        watched.look()
        assert report["train"] + report["val"] + report["duplicates"] == args.pairs
    rate = args.pairs / seconds
    print(
        f"{args.pairs:,} pairs, {size / 1e6:.0f} MB: {seconds:.1f} s (and {started - start:.1f} s to start Ray), "
        f"{rate:,.0f} pairs/s, {size / 1e6 / seconds:.1f} MB/s\n"
        f"tokenizer alone, one process: {alone:,.0f} pairs/s; {rate / (alone * args.cpus):.0%} of that x {args.cpus} cores\n"
        f"CPU time: the tokenizer alone {args.pairs / alone_cpu:.0f} s, the tasks {sum(watched.cpu_seconds.values()):.0f} s\n"
        f"peak memory: {watched.task_mib:.0f} MiB a task, {watched.driver_mib:.0f} MiB the driver"
    )


if __name__ == "__main__":
    sys.exit(main())
