"""What compiled blocks keep for their backward pass, and what they compute again, where `train.activation_memory` is below 1.

PyTorch chooses: it weighs the memory of what a matrix product leaves against the product's FLOPs, and takes for free whatever it
knows no FLOPs of. Attention over a BlockMask and casts to float8 were computed again first, though they take longer for
what they leave than any product does. So attention is always kept here, and `hrm_lm.models.float8_kernels` says what a cast costs.
"""

import torch
import torch._functorch.config
import torch._inductor.config
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.utils.checkpoint import CheckpointPolicy


class KeepAttention(CustomGraphPass):
    """Marks attention over a BlockMask as not to be computed again, in the joint graph of forward and backward."""

    def __call__(self, graph: fx.Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=torch.ops.higher_order.flex_attention):
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE

    def uuid(self) -> bytes:
        return get_hash_for_files((__file__,))  # compiled kernels on disk are found again


def keep_activations(share: float) -> None:
    """From here on what is compiled keeps about `share` of the memory for its backward pass that it would keep at best."""
    torch._functorch.config.activation_memory_budget = share
    torch._functorch.config.is_non_builtin_to_include = True  # kernels of our own are weighed, too
    torch._inductor.config.joint_custom_pre_pass = KeepAttention()
