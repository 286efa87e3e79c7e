"""Transformers folder -> checkpoint. The command is `hrm_lm.commands.import_`."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch

from hrm_lm.config import Config, parse_config
from hrm_lm.data.tokenizer import SPECIAL_TOKENS, Tokenizer, model_vocab_size, resolve_tokenizer
from hrm_lm.errors import UserError
from hrm_lm.interop.hrm_text import from_hrm_text, require_transformers
from hrm_lm.models.build import build_model
from hrm_lm.training.checkpoint import Progress, save_model


def import_(source: Path, output: Path) -> None:
    """Writes the checkpoint folder `output`, float32. Raises UserError where the folder holds another kind of model."""
    transformers = require_transformers()
    if output.exists():
        raise UserError(f"--output: {output} is there already; give another path")
    model_type = read_json(source / "config.json").get("model_type")
    if model_type != "hrm_text":
        raise UserError(f"{source / 'config.json'}: model_type is {model_type!r}, not 'hrm_text'")
    hf_config = transformers.HrmTextConfig.from_pretrained(source)
    config, tokenizer = config_of(hf_config, source), read_tokenizer(source, hf_config)
    try:
        # Not pickles, and not code that the folder may bring along.
        hf_model = transformers.HrmTextForCausalLM.from_pretrained(source, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{source}: cannot be loaded: {' '.join(str(error).split())[:300]}") from None
    model = build_model(config.model, model_vocab_size(config.model, tokenizer))
    model.load_state_dict(
        from_hrm_text(hf_model.state_dict(), config.model.hrm.h_layers, hf_config.embedding_scale), strict=True
    )
    output.mkdir(parents=True)
    save_model(output, model, config, tokenizer, Progress())


def config_of(hf_config, source: Path) -> Config:
    """A config whose model is theirs; raises UserError for what this project's model does not have."""
    rope = hf_config.rope_parameters
    needed = {
        "hidden_act": (hf_config.hidden_act, "silu"),
        "rms_norm_eps": (hf_config.rms_norm_eps, 1e-6),
        "attention_bias": (hf_config.attention_bias, False),
        "mlp_bias": (hf_config.mlp_bias, False),
        "tie_word_embeddings": (hf_config.tie_word_embeddings, False),
        "rope_type": (rope["rope_type"], "default"),
        "rope_theta": (float(rope["rope_theta"]), 10_000.0),
        "head_dim": (hf_config.head_dim, hf_config.hidden_size // hf_config.num_attention_heads),
        "intermediate_size": (hf_config.intermediate_size, math.ceil(hf_config.intermediate_size / 256) * 256),
    }
    for name, (value, supported) in needed.items():
        if value != supported:
            difference = f"{name} is {value!r}; this project's model has only {supported!r}"
            raise UserError(f"{source / 'config.json'}: {difference}")
    H, L = hf_config.H_cycles, hf_config.L_cycles
    padded = [1] * (H - len(hf_config.L_bp_cycles)) + list(hf_config.L_bp_cycles)
    window = H + sum(padded[:H])
    prompt_len = hf_config.max_position_embeddings // 2
    return parse_config(
        {
            "model": {
                "architecture": "prefix_lm",
                "mask": "prefix" if hf_config.prefix_lm else "causal",
                "d_model": hf_config.hidden_size,
                "n_heads": hf_config.num_attention_heads,
                "vocab_size": hf_config.vocab_size,
                "expansion": hf_config.intermediate_size * 1.5 / hf_config.hidden_size,
                "max_prompt_len": prompt_len,
                "max_response_len": hf_config.max_position_embeddings - prompt_len,
                "hrm": {
                    "h_cycles": H,
                    "l_cycles": L,
                    "h_layers": hf_config.num_layers_per_stack,
                    "l_layers": hf_config.num_layers_per_stack,
                    "backprop_steps": "all" if window >= H * (L + 1) else max(window, 2),
                },
            }
        },
        source=str(source / "config.json"),
    )


def read_tokenizer(source: Path, hf_config) -> Tokenizer:
    """The folder's tokenizer, with the special tokens that the model's config names."""
    ids = {role: getattr(hf_config, f"{role}_token_id") for role in SPECIAL_TOKENS}
    ids = {role: i[0] if isinstance(i, list) else i for role, i in ids.items() if i is not None}
    return resolve_tokenizer(str(source), "--input", ids)


def read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{file}: not JSON: {error}") from None


if __name__ == "__main__":
    from hrm_lm.commands.import_ import main
    from hrm_lm.commands.main import run_command

    sys.exit(run_command(main))
