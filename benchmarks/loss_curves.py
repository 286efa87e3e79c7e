"""Whether packed, compiled training in bf16 and in fp8 follows eager float32: loss curves of the three over the same steps, for
several seeds.

All take the same samples in the same order from the same initial weights. Two have them packed end to end; float32 has them
in rows of their own, in micro-batches of alike lengths, with dense masks and exact float32 products. The text is a
chain of tokens in which a few successors, by Zipf's law, follow each token; a seed draws other weights and another chain
through the same successors. The differences of the smoothed curves are set beside those that seeds make.

    python benchmarks/loss_curves.py --output DIR/loss_curves.json --plot DIR/loss_curves.svg       # HRM-Text B
    python benchmarks/loss_curves.py --seeds 1 --kinds fp8 ...    # adds these to a file of the same settings, or repeats them
    python benchmarks/loss_curves.py --quick --output DIR/loss_curves.json --plot DIR/loss_curves.svg     # tiny, also on CPU
"""

import argparse
import gc
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

from hrm_lm.config import load_config, parse_set
from hrm_lm.data.collate import TokenRows, join, pack, to_device
from hrm_lm.data.splits import Ragged, Sample
from hrm_lm.models import masks
from hrm_lm.training.step import Stats, build_state, train_step

ROOT = Path(__file__).parent.parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KINDS = {"float32": "eager float32, unpacked", "bf16": "compiled bf16, packed", "fp8": "compiled fp8, packed"}
SUCCESSORS = 8
MICRO_BATCHES = 4  # of float32 without packing, to save memory and padding
SMOOTH = 20  # steps of the running mean
STYLES = {"float32": "solid", "bf16": "dashed", "fp8": "dotted"}
DASHES = {"float32": "", "bf16": ' stroke-dasharray="5 4"', "fp8": ' stroke-dasharray="1.5 3"'}


class Vocabulary:
    pad_id, bos_id, eos_id = 0, 1, 2


def chain(seed: int, tokens: int) -> Iterator[int]:
    """Token ids from 3 on. The successors are the same for every seed."""
    laws = np.random.default_rng(0)
    ranks = 1 / np.arange(1, tokens + 1)
    successors = laws.choice(tokens, (tokens, SUCCESSORS), p=ranks / ranks.sum()).tolist()
    rng, at = np.random.default_rng((seed, 1)), 0
    ranks = 1 / np.arange(1, SUCCESSORS + 1)
    while True:
        for choice in rng.choice(SUCCESSORS, 4096, p=ranks / ranks.sum()).tolist():
            at = successors[at][choice]
            yield 3 + at


def samples_of(seed: int, steps: int, budget: int, longest: int) -> Iterator[list[Sample]]:
    """For each step the samples, of log-normal lengths, that fit `budget` tokens."""
    rng = np.random.default_rng((seed, 2))
    text = chain(seed, min(512, budget))
    for _ in range(steps):
        samples: list[Sample] = []
        used = 0
        while True:
            pair = np.exp(rng.normal(np.log(longest / 5) - 0.32, 0.8, 2)).clip(1, longest).astype(int).tolist()
            used += sum(pair)
            if used > budget:
                break
            samples.append(Sample(*(list(itertools.islice(text, n)) for n in pair)))
        yield samples


def micro_batches(samples: list[Sample]) -> list[TokenRows]:
    ordered = sorted(samples, key=lambda sample: len(sample.prompt) + len(sample.response))
    size = -(-len(ordered) // MICRO_BATCHES)
    return [join(Ragged.of(ordered[i : i + size]), Vocabulary()) for i in range(0, len(ordered), size)]


def losses(kind: str, seed: int, args: argparse.Namespace) -> list[float]:
    """The mean loss of a label, of each step."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
    budget, longest = (512, 60) if args.quick else (args.tokens, min(1023, args.tokens // 2))
    packed = kind != "float32"
    fields = {
        "train.seed": seed, "train.steps": args.steps, "train.compile": packed and not args.quick,
        "train.mixed_precision": kind if packed else "none", "train.ema_decay": 0.0, "train.cuda_graphs": False,
        "train.packing": False, "train.batch_tokens": None, "train.length_window": 0, "train.grad_accum_steps": 1,
        # As the recipe does in its first fifth, in so few steps.
        "optim.warmup_steps": args.steps // 10, "model.hrm.backprop_warmup_steps": args.steps // 5,
    }  # fmt: skip
    if args.quick:
        fields |= {"model.d_model": 64, "model.n_heads": 4, "model.hrm.h_layers": 1, "model.hrm.l_layers": 1}
    config = load_config(ROOT / "configs" / f"hrm_text_{args.preset}.yaml", fields | parse_set(args.set))
    torch.set_float32_matmul_precision("highest")
    torch._dynamo.reset()
    state = build_state(config, 1024 if args.quick else 65_536, DEVICE)
    stats, curve, start = Stats(state), [], time.perf_counter()
    with patch.object(masks, "FLEX_FROM", masks.FLEX_FROM if packed else float("inf")):
        for samples in samples_of(seed, args.steps, budget, longest):
            rows = [pack(Ragged.of(samples), Vocabulary(), width=budget)] if packed else micro_batches(samples)
            train_step(state, [to_device(batch, DEVICE) for batch in rows], stats)
            curve.append(stats.read()["loss"])
    print(
        f"seed {seed}, {KINDS[kind]}: loss {curve[0]:.3f} to {np.mean(curve[-SMOOTH:]):.3f}, "
        f"{time.perf_counter() - start:.0f} s", flush=True,
    )  # fmt: skip
    return curve


def smoothed(curve: list[float]) -> np.ndarray:
    """Means of `SMOOTH` steps on end; fewer values than steps."""
    return np.convolve(curve, np.ones(SMOOTH) / SMOOTH, mode="valid")


def reference(curves: dict[str, dict[str, list[float]]]) -> str:
    """Returns the most exact of the kinds that were trained."""
    return next(kind for kind in KINDS if curves[kind])


def differences(curves: dict[str, dict[str, list[float]]]) -> dict[str, np.ndarray]:
    """Absolute differences of smoothed curves: (seeds, steps) of a kind from the `reference`, (pairs, steps) between the
    reference's seeds.
    """
    smooth = {kind: {seed: smoothed(curve) for seed, curve in of.items()} for kind, of in curves.items()}
    exact = smooth.pop(reference(curves))
    apart = {
        kind: np.array([np.abs(curve - exact[seed]) for seed, curve in sorted(of.items()) if seed in exact])
        for kind, of in smooth.items()
    }
    return apart | {
        "seeds": np.array([np.abs(exact[a] - exact[b]) for a, b in itertools.combinations(sorted(exact), 2)])
    }


def plot(curves: dict[str, dict[str, list[float]]], apart: dict[str, np.ndarray]) -> str:
    """An SVG: the smoothed curves above, and below the differences, on a logarithmic scale."""
    width, left, top, heights, gap = 720, 64, 28, (260, 150), 52
    colors = ("#1b6ca8", "#c1440e", "#3a7d44", "#7b4fa3", "#a67c00")
    steps = len(next(curve for of in curves.values() for curve in of.values()))
    x = left + (np.arange(steps - SMOOTH + 1) + SMOOTH) / steps * (width - left - 16)
    parts = []

    def panel(title: str, y0: int, height: int, low: float, high: float, ticks: list[tuple[float, str]], lines) -> None:
        def at(value):
            return y0 + height * (high - np.clip(value, low, high)) / (high - low)

        parts.append(f'<text x="{left}" y="{y0 - 8}">{title}</text>')
        parts.append(f'<rect x="{left}" y="{y0}" width="{width - left - 16}" height="{height}" class="frame"/>')
        for value, text in ticks:
            parts.append(
                f'<line x1="{left}" x2="{width - 16}" y1="{at(value):.1f}" y2="{at(value):.1f}" class="grid"/>'
            )
            parts.append(f'<text x="{left - 6}" y="{at(value) + 4:.1f}" text-anchor="end">{text}</text>')
        for values, style in lines:
            points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, at(values)))
            parts.append(f'<polyline points="{points}" fill="none" {style}/>')

    lines = []
    for kind, dash in DASHES.items():
        for i, curve in enumerate(curve for _, curve in sorted(curves[kind].items())):
            color = colors[i % len(colors)]
            lines.append((smoothed(curve), f'stroke="{color}" stroke-width="1.6"{dash}'))
    values = np.concatenate([line for line, _ in lines])
    low, high = np.floor(values.min()), np.ceil(values.max())
    ticks = [(value, f"{value:g}") for value in np.arange(low, high + 1)]
    styles = "; ".join(f"{how}: {kind}" for kind, how in STYLES.items() if curves[kind])
    title = f"Loss, mean of {SMOOTH} steps; a colour a seed; {styles}"
    panel(title, top, heights[0], low, high, ticks, lines)
    lines = [(np.log10(line + 1e-6), 'stroke="#888" stroke-width="1.2"') for line in apart["seeds"]]
    for kind in (kind for kind in KINDS if kind in apart):
        style = f'stroke="#111" stroke-width="1.6"{DASHES[kind]}'
        lines += [(np.log10(line + 1e-6), style) for line in apart[kind]]
    ticks = [(value, f"{10.0**value:g}") for value in range(-4, 1)]
    first = reference(curves)
    title = f"Their differences: black, from {first}; grey, between seeds of {first}"
    panel(title, top + heights[0] + gap, heights[1], -4, 0, ticks, lines)
    bottom = top + sum(heights) + gap
    for step in np.linspace(0, steps, 7):
        place = left + step / steps * (width - left - 16)
        parts.append(f'<text x="{place:.0f}" y="{bottom + 18}" text-anchor="middle">{step:.0f}</text>')
    parts.append(f'<text x="{(left + width) / 2:.0f}" y="{bottom + 36}" text-anchor="middle">step</text>')
    style = "text{font:12px sans-serif;fill:#222}.frame{fill:none;stroke:#999}.grid{stroke:#ddd}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {bottom + 46}">\n<style>{style}</style>\n'
        f'<rect width="100%" height="100%" fill="#fff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("b", "l", "xl"), default="b")
    parser.add_argument("--steps", type=int, help="[300; 60 if --quick]")
    parser.add_argument("--tokens", type=int, default=4096, help="of a step")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--kinds", default=",".join(KINDS), help="which to train")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "loss_curves.json")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "loss_curves.svg")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    args.steps = args.steps or (60 if args.quick else 300)

    if unknown := set(args.kinds.split(",")) - KINDS.keys():
        parser.error(f"--kinds: {', '.join(sorted(unknown))}: known are {', '.join(KINDS)}")

    made = {name: getattr(args, name) for name in ("preset", "steps", "tokens", "quick", "set")}
    known = json.loads(args.output.read_text(encoding="utf-8")) if args.output.exists() else {}
    curves: dict[str, dict[str, list[float]]] = {kind: {} for kind in KINDS}
    if known and known["made"] != made:
        parser.error(f"{args.output} holds curves of other settings ({known['made']}); take these, or another --output")
    curves |= known.get("curves", {})
    origins: dict[str, dict[str, dict[str, str]]] = known.get("origins", {})
    for seed, kind in itertools.product(args.seeds.split(","), args.kinds.split(",")):
        curves[kind][seed] = losses(kind, int(seed), args)
        apart = differences(curves)
        summary = {
            name: {"max": float(of.max()), "mean": float(of.mean())} for name, of in apart.items() if of.size
        }  # fmt: skip
        device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"
        origins.setdefault(kind, {})[seed] = {"device": device, "torch": torch.__version__}
        content = {"made": made, "origins": origins, "differences": summary, "curves": curves}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(content) + "\n", encoding="utf-8")
        args.plot.write_text(plot(curves, apart), encoding="utf-8")
    exact = reference(curves)
    for name, of in summary.items():
        what = f"{exact}, seed to seed" if name == "seeds" else f"{KINDS[name]}, from {exact}"
        print(f"{what}: the smoothed losses differ by {of['mean']:.4f}, at most {of['max']:.4f}")


if __name__ == "__main__":
    main()
