"""Transformers folder -> checkpoint. The command is `hrm_lm.commands.import_`."""

import math
import sys
from pathlib import Path
from typing import Any

import torch

from hrm_lm.config import MOST_TOKENS, Config, parse_config
from hrm_lm.data.tokenizer import SPECIAL_TOKENS, Tokenizer, model_vocab_size, resolve_tokenizer
from hrm_lm.errors import UserError
from hrm_lm.filesystem import read_text, reason, resolve
from hrm_lm.interop.hrm_text import from_hrm_text, require_transformers
from hrm_lm.models.build import build_model
from hrm_lm.parsing import one_line, parse_json, short
from hrm_lm.training.checkpoint import Progress, save_model


def import_(source: Path, output: Path) -> None:
    """Writes the checkpoint folder `output`, float32. Raises UserError where the folder holds another kind of model, or less
    than a whole model.
    """
    if output.exists():
        raise UserError(f"--output: {output} is there already; give another path")
    hf_config = read_config(source / "config.json")
    config, tokenizer = config_of(hf_config, source), read_tokenizer(source, hf_config)
    vocab_size = model_vocab_size(config.model, tokenizer)
    with torch.device("meta"):
        count = sum(p.numel() for p in build_model(config.model, vocab_size).parameters())
    held = sum(file.stat().st_size for file in source.glob("*.safetensors") if file.is_file())
    if count > held:  # before that much memory is taken
        raise UserError(f"{source}: has no safetensors files for the {count:,} parameters of its config.json")
    model = build_model(config.model, vocab_size)
    weights = read_weights(source, hf_config)
    model.load_state_dict(from_hrm_text(weights, config.model.hrm.h_layers, hf_config.embedding_scale), strict=True)
    output.mkdir(parents=True)
    save_model(output, model, config, tokenizer, Progress())


def read_config(file: Path):
    """The `HrmTextConfig` of a config.json. What else the file says may name code, adapters and kernels: it is left out."""
    transformers = require_transformers()
    fields = read_json(file)
    if fields.get("model_type") != "hrm_text":
        raise UserError(f"{file}: model_type is {short(fields.get('model_type'))}, not 'hrm_text'")
    known = {*transformers.HrmTextConfig.__annotations__, "rope_theta", "rope_scaling"}
    try:
        return transformers.HrmTextConfig(**{name: value for name, value in fields.items() if name in known})
    except Exception as error:  # of many kinds, by which of the library's checks it fails
        raise UserError(f"{file}: not a config of HRM-Text: {one_line(error)}") from None


def read_weights(source: Path, hf_config) -> dict[str, torch.Tensor]:
    """All weights of HrmTextForCausalLM, float32. Neither pickles are read nor code that the folder brings along."""
    transformers = require_transformers()
    if (source / "adapter_config.json").exists():
        raise UserError(f"{source}: holds an adapter to another model; merge the two, and save the whole model")
    transformers.utils.logging.set_verbosity_error()  # what is missing is told below
    try:
        hf_model, info = transformers.HrmTextForCausalLM.from_pretrained(
            source,
            config=hf_config,
            generation_config=transformers.GenerationConfig(),
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # of many kinds, by where its loader stumbles
        raise UserError(f"{source}: cannot be loaded: {one_line(error)}") from None
    if missing := sorted(info["missing_keys"]):  # these are random now
        raise UserError(f"{source}: not a whole model: {missing[0]} is missing in its safetensors files")
    return hf_model.state_dict()


def config_of(hf_config, source: Path) -> Config:
    """A config whose model is theirs; raises UserError for what this project's model does not have."""
    rope = hf_config.rope_parameters or {}
    sizes = "vocab_size hidden_size num_attention_heads intermediate_size num_layers_per_stack H_cycles L_cycles"
    for name in [*sizes.split(), "max_position_embeddings"]:
        if not 1 <= getattr(hf_config, name) <= MOST_TOKENS:
            raise UserError(f"{source / 'config.json'}: {name} is {short(getattr(hf_config, name))}")
    needed = {
        "hidden_act": (hf_config.hidden_act, "silu"),
        "rms_norm_eps": (hf_config.rms_norm_eps, 1e-6),
        "attention_bias": (hf_config.attention_bias, False),
        "mlp_bias": (hf_config.mlp_bias, False),
        "tie_word_embeddings": (hf_config.tie_word_embeddings, False),
        "rope_type": (rope.get("rope_type"), "default"),
        "rope_theta": (rope.get("rope_theta"), 10_000.0),
        "head_dim": (hf_config.head_dim, hf_config.hidden_size // hf_config.num_attention_heads),
        "intermediate_size": (hf_config.intermediate_size, math.ceil(hf_config.intermediate_size / 256) * 256),
    }
    for name, (value, supported) in needed.items():
        if value != supported:
            difference = f"{name} is {short(value)}; this project's model has only {supported!r}"
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
        fields = parse_json(read_text(*resolve(str(file))))
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {reason(error)}") from None
    except ValueError as error:
        raise UserError(f"{file}: not JSON: {one_line(error)}") from None
    if not isinstance(fields, dict):
        raise UserError(f"{file}: not a JSON object")
    return fields


if __name__ == "__main__":
    from hrm_lm.commands.import_ import main
    from hrm_lm.commands.main import run_command

    sys.exit(run_command(main))
