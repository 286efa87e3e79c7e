"""What HRMPrefixLM and Transformers' `HrmTextForCausalLM` call the same things.

The two compute the same function (tests hold logits and gradients against each other), so this is renaming and
splitting: here the projections of gate, q, k and v are one matrix, in this order of rows, as are SwiGLU's gate and up.
"""

import math
from types import ModuleType

import torch
from torch import Tensor

from hrm_lm.errors import UserError

STACKS = {"core.h_stack.blocks.": "model.H_module.layers.", "core.l_stack.blocks.": "model.L_module.layers."}
OUTSIDE = {
    "embedding.weight": "model.embed_tokens.weight",
    "head.weight": "lm_head.weight",
    "core.z_l0": "model.z_L_init",
}
INSIDE = {
    "attention.qkv.weight": [f"self_attn.{name}_proj.weight" for name in ("gate", "q", "k", "v")],
    "attention.out.weight": ["self_attn.o_proj.weight"],
    "mlp.gate_up.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    "mlp.out.weight": ["mlp.down_proj.weight"],
}


def require_transformers() -> ModuleType:
    try:
        import transformers

        transformers.HrmTextForCausalLM  # noqa: B018 (older versions have none)
    except (ImportError, AttributeError):
        raise UserError("this needs the transformers library, 5.9 or later: pip install 'hrm-lm[interop]'") from None
    transformers.utils.logging.disable_progress_bar()
    return transformers


def to_hrm_text(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """HRMPrefixLM's weights under the names of HrmTextForCausalLM."""
    renamed = {}
    for name, tensor in weights.items():
        targets = _targets(name)
        renamed |= zip(targets, tensor.chunk(len(targets)))
    return renamed


def from_hrm_text(weights: dict[str, Tensor], layers: int, embedding_scale: float) -> dict[str, Tensor]:
    """HrmTextForCausalLM's weights under the names of HRMPrefixLM.

    layers: in each stack. embedding_scale: theirs; ours is fixed at sqrt(d_model), so the weights take the difference.
    """
    names = [f"{stack}{i}.{part}" for stack in STACKS for i in range(layers) for part in INSIDE] + list(OUTSIDE)
    renamed = {name: torch.cat([weights[target] for target in _targets(name)]) for name in names}
    renamed["embedding.weight"] *= embedding_scale / math.sqrt(renamed["embedding.weight"].shape[1])
    return renamed


def _targets(name: str) -> list[str]:
    for ours, theirs in STACKS.items():
        if name.startswith(ours):
            layer, _, part = name.removeprefix(ours).partition(".")
            return [f"{theirs}{layer}.{target}" for target in INSIDE[part]]
    return [OUTSIDE[name]]
