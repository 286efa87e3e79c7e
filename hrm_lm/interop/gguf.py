"""Checkpoint -> GGUF file, for llama.cpp, which has the model as `hrm_text`.

llama.cpp's own `convert_hf_to_gguf.py` reads exported folders, too, but only those with the tokenizer of a model that it
knows. The keys and the names of tensors are those of that script.
"""

import json
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor

from hrm_lm.data.chat import Chat
from hrm_lm.data.tokenizer import ByteTokenizer, Tokenizer
from hrm_lm.errors import UserError
from hrm_lm.interop.export import as_it_answers, hf_tokenizer, hrm_text_config, make_folder
from hrm_lm.interop.hrm_text import to_hrm_text
from hrm_lm.training.checkpoint import load_model

ARCHITECTURE = "hrm_text"
OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "lm_head.weight": "output.weight",
    "model.z_L_init": "hrm.z_l_init",
}
INSIDE = {
    "self_attn.gate_proj": "attn_gate",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def export_gguf(checkpoint_path: Path, output: Path) -> None:
    """Writes the file `output`, with weights in float32; `llama-quantize` makes it smaller.

    Raises UserError for a checkpoint whose model or tokenizer llama.cpp does not have, and where the file is there.
    """
    gguf = require_gguf()
    if output.exists():
        raise UserError(f"--output: {output} is there already; give another name")
    model, tokenizer, checkpoint = load_model(checkpoint_path)
    answering = as_it_answers(checkpoint.config)
    config, hrm = hrm_text_config(answering, tokenizer), answering.hrm
    vocabulary = vocabulary_of(tokenizer, config.vocab_size)

    make_folder(output.parent)
    partial = output.with_name(f"{output.name}.partial")
    writer = gguf.GGUFWriter(partial, ARCHITECTURE)
    writer.add_name(output.stem)
    writer.add_block_count(hrm.h_layers * hrm.h_cycles * (hrm.l_cycles + 1))  # of caches; the file holds 2 * h_layers
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_attention_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_embedding_scale(config.embedding_scale)
    writer.add_uint32(f"{ARCHITECTURE}.hrm.layers_per_stack", hrm.h_layers)
    writer.add_uint32(f"{ARCHITECTURE}.hrm.h_cycles", hrm.h_cycles)
    writer.add_uint32(f"{ARCHITECTURE}.hrm.l_cycles", hrm.l_cycles)
    writer.add_bool(f"{ARCHITECTURE}.hrm.prefix_lm", config.prefix_lm)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)

    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types([getattr(gguf.TokenType, kind) for kind in vocabulary.kinds])
    writer.add_token_merges(vocabulary.merges)
    writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_chat_template(Chat.of(tokenizer).template)

    for name, tensor in to_hrm_text(model.state_dict()).items():
        writer.add_tensor(tensor_name(name, hrm.h_layers), as_float32(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(output)


def require_gguf() -> ModuleType:
    try:
        import gguf
    except ImportError:
        raise UserError("a .gguf file needs the gguf library: pip install 'hrm-lm[interop]'") from None
    return gguf


def tensor_name(name: str, layers: int) -> str:
    """The name of HrmTextForCausalLM's tensor in GGUF: L's layers are blocks from 0 on, H's follow."""
    if name in OUTSIDE:
        return OUTSIDE[name]
    _, stack, _, layer, part = name.split(".", 4)
    block = int(layer) + (layers if stack == "H_module" else 0)
    return f"blk.{block}.{INSIDE[part.removesuffix('.weight')]}.weight"


def as_float32(tensor: Tensor) -> Any:
    return tensor.detach().float().contiguous().numpy()


class Vocabulary(NamedTuple):
    """A byte-level BPE, as GPT-2 has it: each byte of a token is a printable character."""

    tokens: list[str]
    kinds: list[str]
    """Of each token, a name of gguf.TokenType."""
    merges: list[str]


def vocabulary_of(tokenizer: Tokenizer, size: int) -> Vocabulary:
    """Raises UserError where the tokenizer is none of bytes, of ASCII characters, or a byte-level BPE that cuts texts as GPT-2."""
    definition = json.loads(hf_tokenizer(tokenizer).backend_tokenizer.to_str())
    ids: dict[str, int] = definition["model"]["vocab"]
    special = {token["content"]: token["id"] for token in definition["added_tokens"]}
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in definition["model"].get("merges", [])]
    if definition["model"]["type"] == "WordLevel":  # what `single_tokens` makes
        if not isinstance(tokenizer, ByteTokenizer):
            ids = {token if token in special else byte_level(token): i for token, i in ids.items()}
        merges = ["\u0100 \u0100"]  # llama.cpp wants some; what two zero bytes make is no token
    elif definition["pre_tokenizer"] != {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }:
        raise UserError(
            "llama.cpp cuts a text before its BPE in a way that a file cannot tell: export a folder, and try its convert_hf_to_gguf.py"
        )
    by_id = {i: token for token, i in (ids | special).items()}
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(size)]
    kinds = ["UNUSED" if i not in by_id else "CONTROL" if by_id[i] in special else "NORMAL" for i in range(size)]
    return Vocabulary(tokens, kinds, merges)


def byte_level(character: str) -> str:
    """Raises UserError for a character of several bytes: without merges llama.cpp would read it as bytes."""
    if not character.isascii():
        raise UserError(
            f"llama.cpp has no tokenizer of characters beyond ASCII, such as {character!r}: train with data.tokenizer=bytes"
        )
    return character if "!" <= character <= "~" else chr(256 + (ord(character) if character <= " " else 33))
