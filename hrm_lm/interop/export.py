"""Checkpoint -> Transformers folder. The command is `hrm_lm.commands.export`.

`AutoModelForCausalLM.from_pretrained(DIR)` and `AutoTokenizer.from_pretrained(DIR)` load it, with no remote code.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from hrm_lm.config import Config, ModelConfig
from hrm_lm.data.chat import Chat
from hrm_lm.data.tokenizer import ByteTokenizer, PretrainedTokenizer, SimpleTokenizer, Tokenizer, model_vocab_size
from hrm_lm.errors import UserError
from hrm_lm.filesystem import storage_error
from hrm_lm.interop.card import Results, model_card
from hrm_lm.interop.hrm_text import require_transformers, to_hrm_text
from hrm_lm.models.hrm import carries_gradient
from hrm_lm.models.layers import SwiGLU
from hrm_lm.training.checkpoint import load_model
from hrm_lm.training.step import backprop_steps_of


def export(checkpoint_path: Path, output: Path, results: Sequence[Results] = ()) -> None:
    """Writes config, weights, tokenizer, generation config and model card into the new or empty folder `output`.

    results: of evaluations, for the card. Raises UserError for a checkpoint whose model Transformers does not have.
    """
    transformers = require_transformers()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output: {output} is there already; give a new or empty folder")
    model, tokenizer, checkpoint = load_model(checkpoint_path)
    card = model_card(checkpoint, sum(p.numel() for p in model.parameters()), results, output.name)
    hf_model = transformers.HrmTextForCausalLM(hrm_text_config(as_it_answers(checkpoint.config), tokenizer))
    hf_model.load_state_dict(to_hrm_text(model.state_dict()))
    hf_model.generation_config = transformers.GenerationConfig(
        max_new_tokens=model.config.max_response_len,
        pad_token_id=tokenizer.pad_id,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
    )
    make_folder(output)
    hf_model.save_pretrained(output)
    hf_tokenizer(tokenizer).save_pretrained(output)
    (output / "README.md").write_text(card, encoding="utf-8")


def make_folder(folder: Path) -> None:
    """Raises UserError where there can be none."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(f"--output: {folder} cannot be made", error) from None


def as_it_answers(config: Config) -> ModelConfig:
    """The model's config with the H-cycles that it answers with: those of all segments of a training step."""
    hrm = config.model.hrm.model_copy(update={"h_cycles": config.cycles.h})
    return config.model.model_copy(update={"hrm": hrm})


def hrm_text_config(config: ModelConfig, tokenizer: Tokenizer):
    """The `HrmTextConfig`; raises UserError where there is none for this model."""
    hrm = config.hrm
    if config.architecture != "prefix_lm" or not hrm.h_cycles:
        what = f"model.architecture {config.architecture} with model.hrm.h_cycles {hrm.h_cycles}"
        raise UserError(f"{what} has no counterpart in Transformers: only prefix_lm with H-cycles can be exported")
    if hrm.inject != "none" or hrm.shared:
        what = f"model.hrm.inject {hrm.inject} and model.hrm.shared {str(hrm.shared).lower()}"
        raise UserError(f"{what} have no counterpart in Transformers: its HRM-Text has inject none and two stacks")
    if hrm.h_layers != hrm.l_layers:
        layers = f"model.hrm.h_layers ({hrm.h_layers}) and l_layers ({hrm.l_layers})"
        raise UserError(f"{layers} differ: Transformers has one number for both")
    l_carries, _ = carries_gradient(hrm.cycles, backprop_steps_of(hrm, hrm.backprop_warmup_steps, hrm.cycles))
    return require_transformers().HrmTextConfig(
        architectures=["HrmTextForCausalLM"],
        vocab_size=model_vocab_size(config, tokenizer),
        hidden_size=config.d_model,
        intermediate_size=SwiGLU.hidden_size(config.d_model, config.expansion, multiple=256),
        num_hidden_layers=hrm.h_layers,
        num_attention_heads=config.n_heads,
        head_dim=config.d_model // config.n_heads,
        H_cycles=hrm.h_cycles,
        L_cycles=hrm.l_cycles,
        # Theirs always lets gradient through H, and counts the applications of L that do in each H-cycle.
        L_bp_cycles=[sum(carries) for carries in l_carries],
        max_position_embeddings=config.max_prompt_len + config.max_response_len,
        rms_norm_eps=1e-6,
        initializer_range=1 / math.sqrt(config.d_model),
        embedding_scale=math.sqrt(config.d_model),
        prefix_lm=config.mask == "prefix",
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_id,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
    )


def hf_tokenizer(tokenizer: Tokenizer):
    """The tokenizer as Transformers' own. It pads on the left, as `generate` wants prompts."""
    if isinstance(tokenizer, PretrainedTokenizer):
        inner = tokenizer.tokenizer
    elif isinstance(tokenizer, SimpleTokenizer | ByteTokenizer):
        inner = single_tokens(tokenizer)
    else:
        raise UserError(f"a {type(tokenizer).__name__} has no counterpart in Transformers")
    names = {f"{kind}_token": inner.id_to_token(getattr(tokenizer, f"{kind}_id")) for kind in ("pad", "bos", "eos")}
    return require_transformers().PreTrainedTokenizerFast(
        tokenizer_object=inner,
        **names,
        chat_template=Chat.of(tokenizer).template,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def single_tokens(tokenizer: SimpleTokenizer | ByteTokenizer):
    """Characters or bytes as a tokenizer of the `tokenizers` library: the same ids. An unknown character is `<unk>`."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors

    special = {"<pad>": tokenizer.pad_id, "<bos>": tokenizer.bos_id, "<eos>": tokenizer.eos_id}
    each = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), behavior="isolated")
    if isinstance(tokenizer, SimpleTokenizer):
        special["<unk>"] = tokenizer.unk_id
        vocabulary = {character: i for i, character in enumerate(tokenizer.characters, start=tokenizer.SPECIAL)}
        steps, decoder = [each], decoders.Fuse()
    else:
        # The library's byte level writes a byte as a printable character: itself, or else the next one from 256 on.
        plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in plain]
        vocabulary = {chr(byte): tokenizer.SPECIAL + byte for byte in plain}
        vocabulary |= {chr(256 + n): tokenizer.SPECIAL + byte for n, byte in enumerate(others)}
        steps, decoder = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), each], decoders.ByteLevel()
    inner = tokenizers.Tokenizer(models.WordLevel(special | vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Sequence(steps), decoder
    # Type 1 marks the prompt, whose tokens see one another both ways; without it the model reads causally.
    inner.post_processor = processors.TemplateProcessing(single="$A:1", pair="$A:1 $B:0", special_tokens=[])
    inner.add_special_tokens(list(special))
    return inner


if __name__ == "__main__":
    from hrm_lm.commands.export import main
    from hrm_lm.commands.main import run_command

    sys.exit(run_command(main))
