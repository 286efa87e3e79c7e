"""A folder in the shape of the HRM-Text release, with random weights and less width: what `finetune.sh` takes where the
release is not at hand.

    python examples/release_shape.py --output release --width 128
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from hrm_lm.config import load_config
from hrm_lm.data.tokenizer import PretrainedTokenizer
from hrm_lm.interop.export import export
from hrm_lm.models.build import build_model
from hrm_lm.training.checkpoint import Progress, save_model

XL = Path(__file__).parent.parent / "configs" / "hrm_text_xl.yaml"
VOCAB_SIZE = 65_536


def tokenizer() -> PretrainedTokenizer:
    """A byte-level BPE without merges, of as many ids as the release has rows."""
    inner, byte_level = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.pre_tokenizer, inner.decoder = byte_level, decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<eos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=259, special_tokens=special, initial_alphabet=byte_level.alphabet(), show_progress=False
    )
    inner.train_from_iterator([], trainer)
    return PretrainedTokenizer(json.loads(inner.to_str()), 0, 1, 2, inner.get_vocab_size())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to be made")
    parser.add_argument("--width", type=int, default=128, help="the release has 1536 (default: %(default)s)")
    args = parser.parse_args()
    config = load_config(
        str(XL),
        overrides={
            "model.d_model": args.width,
            "model.n_heads": max(args.width // 128, 1),
            "model.vocab_size": VOCAB_SIZE,
            "train.ema_decay": 0.0,
        },
    )
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), build_model(config.model, VOCAB_SIZE), config, tokenizer(), Progress())
        export(Path(folder), args.output)


if __name__ == "__main__":
    main()
