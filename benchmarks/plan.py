"""Hours of the published HRM-Text runs on so many GPUs, from measured rates of one GPU and a model of the network.

The model: a step takes its tokens at the rate of one GPU, and then its gradients go round in a ring, with nothing to
hide them, because with recurrence a weight's gradient is there only when backward is nearly done. Under DDP (B) each GPU
sends 2 (N - 1) / N of the float32 gradients. Under FSDP (L and XL) it sends (N - 1) / N of the bf16 weights and of the
float32 gradients. A GPU sends 450 GB/s over NVLink among the eight of a node (H100 SXM). A node sends 400 GB/s over
InfiniBand (8 x 400 Gb/s), which its rings share. `--two` is the measured speed-up of two GPUs (B, DDP): what the model
does not explain of it is taken off wherever there are several GPUs.

    python benchmarks/plan.py
    python benchmarks/plan.py --rate b=115710 --rate l=38800 --rate xl=22050 --two 1.94

Prints a Markdown table, and what the model says of two GPUs.
"""

import argparse
from pathlib import Path

import torch

from hrm_lm.config import load_config
from hrm_lm.models.build import build_model

CONFIGS = Path(__file__).parent.parent / "configs"
TOKENS, BATCH, AT_A_TIME = 60e9, 172_000, 32_768
"""Of a run and of a step, as published; and of a step of one GPU when its rate was measured."""
NVLINK, INFINIBAND, NODE = 450e9, 400e9, 8
"""Bytes/s that a GPU sends to others of its node, that a node sends to others; and its GPUs."""
GPUS = (1, 8, 16, 128)


def parameters(preset: str) -> int:
    config = load_config(CONFIGS / f"hrm_text_{preset}.yaml")
    with torch.device("meta"):
        return sum(p.numel() for p in build_model(config.model, 65_536).parameters())


def network_seconds(preset: str, gpus: int) -> float:
    """Of a step's gradients, and under FSDP of its weights."""
    sent = (2 * 4 if preset == "b" else 2 + 4) * parameters(preset) * (gpus - 1) / gpus
    return sent / (NVLINK if gpus <= NODE else min(NVLINK, INFINIBAND))


def rate_of(preset: str, gpus: int, batch: float, one: float, rest: float) -> float:
    """Tokens/s of all GPUs. one: of one GPU alone; rest: what is left of it among several, besides the network."""
    if gpus == 1:
        return one
    return batch / (batch / gpus / (one * rest) + network_seconds(preset, gpus))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", action="append", default=[], metavar="PRESET=TOKENS/S", help="of one GPU")
    parser.add_argument("--two", type=float, default=1.94, help="speed-up of two GPUs (default: %(default)s)")
    args = parser.parse_args()
    rates = {"b": 115_710.0, "l": 38_800.0, "xl": 22_050.0}
    rates |= {preset: float(rate) for preset, rate in (text.split("=") for text in args.rate)}

    modelled = rate_of("b", 2, 2 * AT_A_TIME, rates["b"], 1.0) / rates["b"]
    rest = args.two / modelled
    head = "| Model | GPUs | tokens a GPU and step | network | tokens/s a GPU | hours | hours at 32,768 tokens a GPU and step |"
    print(f"{head}\n| --- | --- | --- | --- | --- | --- | --- |")
    for preset, one in rates.items():
        for gpus in GPUS:
            rate, wide = (rate_of(preset, gpus, batch, one, rest) for batch in (BATCH, AT_A_TIME * gpus))
            share = network_seconds(preset, gpus) * rate / BATCH
            cells = [
                f"{preset.upper()} ({parameters(preset) / 1e9:.2f} B)",
                f"{gpus}",
                f"{BATCH / gpus:,.0f}",
                f"{share:.0%}",
            ]
            cells += [f"{rate / gpus:,.0f}", f"{TOKENS / rate / 3600:,.1f}", f"{TOKENS / wide / 3600:,.1f}"]
            print("| " + " | ".join(cells) + " |")
    print(
        f"\nTwo GPUs (B, DDP, 32,768 tokens each): the network alone would give {modelled:.2f} times one, {args.two:.2f} were"
    )
    print(f"measured; the factor between the two, {rest:.3f}, is taken off wherever there are several GPUs.")


if __name__ == "__main__":
    main()
