"""Training tokens/s of HRM-Text B here and of Transformers' HrmTextForCausalLM, side by side on one GPU.

Both take the same steps: bf16 autocast, AdamW, gradient through 5 applications, sequences of 1,024 tokens of which the
second half is response, 32,768 tokens a step, a vocabulary of 65,536. Rounds of both alternate; medians are compared.
Here blocks are compiled one by one (`train.compile`), there the whole model is.

    python benchmarks/throughput.py [--rounds 5] [--steps 10] [--output throughput.json]
    python benchmarks/throughput.py --quick        # tiny, also on CPU: shows that it works
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hrm_lm.config import load_config
from hrm_lm.data.collate import pad, to_device
from hrm_lm.data.splits import Ragged, Sample
from hrm_lm.errors import UserError
from hrm_lm.interop.export import hrm_text_config
from hrm_lm.interop.hrm_text import require_transformers
from hrm_lm.training.step import Stats, build_state, train_step

PRESET = Path(__file__).parent.parent / "configs" / "hrm_text_b.yaml"


class Vocabulary:
    """What building a model asks of a tokenizer."""

    pad_id, bos_id, eos_id = 0, 1, 2

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def ours(config, vocab_size: int, samples: Ragged, device: torch.device) -> Callable[[], None]:
    state = build_state(config, vocab_size, device)
    batch = to_device(state.model.collate(samples, Vocabulary(vocab_size)), device)
    stats = Stats(state)
    return lambda: train_step(state, [batch], stats)


def theirs(config, vocab_size: int, samples: Ragged, device: torch.device) -> Callable[[], None]:
    transformers = require_transformers()
    model = transformers.HrmTextForCausalLM(hrm_text_config(config.model, Vocabulary(vocab_size))).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optim.lr, fused=device.type == "cuda")
    forward = torch.compile(model) if config.train.compile else model
    batch = to_device(pad(samples, Vocabulary(vocab_size)), device)
    ids = torch.cat([batch.encoder_ids, batch.decoder_input_ids[:, 1:]], dim=1)
    prompt_len = batch.encoder_ids.shape[1]
    prompt = torch.zeros_like(ids)
    prompt[:, :prompt_len] = 1
    # Labels stand at their own token's place: Transformers shifts them itself. The last one has no place there.
    labels = ids.masked_fill(prompt.bool(), -100)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = forward(input_ids=ids, token_type_ids=prompt, labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="of a round")
    parser.add_argument("--sequences", type=int, default=32, help="of 1,024 tokens, a step")
    parser.add_argument("--eager", action="store_true", help="compile neither")
    parser.add_argument("--only", choices=("ours", "theirs"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    length, vocab_size = (64, 256) if args.quick else (1024, 65_536)
    tiny = {"model.d_model": 64, "model.n_heads": 4, "model.hrm.h_layers": 1, "model.hrm.l_layers": 1}
    overrides: dict[str, Any] = {
        "optim.name": "adamw", "train.batch_size": 2 if args.quick else args.sequences, "train.ema_decay": 0.0,
        "train.compile": not args.eager, "model.hrm.backprop_warmup_steps": 0,
    }  # fmt: skip
    config = load_config(PRESET, overrides | (tiny if args.quick else {}))
    torch.set_float32_matmul_precision("high")

    half = length // 2
    tokens = torch.randint(3, vocab_size, (config.train.batch_size, length + 1)).tolist()
    # half + (half + 1) - 1 positions
    samples = Ragged.of([Sample(row[:half], row[half:], ends=False) for row in tokens])
    steps, results = {}, {}
    for name, make in {"ours": ours, "theirs": theirs}.items():
        if args.only not in (None, name):
            continue
        start = time.perf_counter()
        try:
            steps[name] = make(config, vocab_size, samples, device)
            for _ in range(3):
                steps[name]()
            synchronize(device)
        except (UserError, torch.OutOfMemoryError) as error:
            print(f"{name}: {str(error).splitlines()[0]}", flush=True)
            steps.pop(name, None)
            continue
        results[name] = {"first_steps_s": time.perf_counter() - start, "tokens_per_s": []}
        print(f"{name}: three first steps {results[name]['first_steps_s']:.1f} s", flush=True)

    for _ in range(args.rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            for _ in range(args.steps):
                step()
            synchronize(device)
            seconds = time.perf_counter() - start
            results[name]["tokens_per_s"].append(config.train.batch_size * length * args.steps / seconds)
    for name, result in results.items():
        rates = result["tokens_per_s"]
        spread = f"median of {len(rates)}; {min(rates):,.0f} to {max(rates):,.0f}"
        print(f"{name}: {statistics.median(rates):,.0f} tokens/s ({spread})")
    if len(results) == 2:
        ratios = [a / b for a, b in zip(results["ours"]["tokens_per_s"], results["theirs"]["tokens_per_s"])]
        print(f"ratio {statistics.median(ratios):.3f}")
    if device.type == "cuda":
        results["device"], results["peak_gib"] = torch.cuda.get_device_name(), torch.cuda.max_memory_allocated() / 2**30
        print(f"{results['device']}, peak memory of both {results['peak_gib']:.1f} GiB")
    if args.output:
        args.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
