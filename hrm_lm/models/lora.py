"""`train.lora`: fine-tuning that changes the blocks' matrices by products of two small ones (LoRA, arXiv 2106.09685).

    y = W x + alpha / rank * B (A x)

W takes no gradient, nor does any other parameter of the model. A is drawn at random and B begins with zeros, so the model
begins as what it was. The factors are small, and so are gradients, optimizer and average; the recurrence applies them as
often as the matrix. A model is `merged` wherever it does not train: what it saves in memory costs nothing later.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrm_lm.config import LoRAConfig
from hrm_lm.models.layers import CrossAttention, SelfAttention, SwiGLU


class LoRALinear(nn.Linear):
    """Takes a linear layer's place and its parameter."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        self.scale = alpha / rank
        self.lora_a = nn.Parameter(self.weight.new_empty(rank, linear.in_features))
        self.lora_b = nn.Parameter(self.weight.new_zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))  # as the authors' code draws it

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.scale * F.linear(F.linear(x, self.lora_a), self.lora_b)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.weight + self.scale * self.lora_b @ self.lora_a)
        return linear


def add_lora(model: nn.Module, config: LoRAConfig) -> None:
    """From here on only the factors of the matrices that `config.targets` names take gradient; with rank 0 nothing changes."""
    if not config.rank:
        return
    attention, mlp = (config.targets in (name, "all") for name in ("attention", "mlp"))
    kinds = (SelfAttention, CrossAttention) * attention + (SwiGLU,) * mlp
    model.requires_grad_(False)
    for module in list(model.modules()):
        if isinstance(module, kinds):
            for name, linear in list(module.named_children()):
                setattr(module, name, LoRALinear(linear, config.rank, config.alpha))


def merge_lora(model: nn.Module) -> None:
    """The model of plain linear layers that computes the same."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LoRALinear):
                setattr(module, name, child.merged())
    model.requires_grad_(True)


def is_factor(name: str) -> bool:
    """Whether a parameter of that name is a factor of LoRA, which a model without LoRA does not have."""
    return name.endswith((".lora_a", ".lora_b"))
