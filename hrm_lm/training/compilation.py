"""What `train.compile` compiles, and what compiled blocks keep for their backward pass where `train.activation_memory` is
below 1.

PyTorch chooses what they keep. It weighs an operation's memory against its FLOPs, but only if its own list names the
operation, as it does matrix products. It takes all others for free, and computes them again first. Its list has neither
attention over a BlockMask nor casts to float8, though these take longer, for the memory that they leave, than any
product does. So this attention is always kept here, and casts are weighed with `CAST_FLOPS`. Their scales are kept, too: a
scale takes four bytes at most, and a pass over a tensor to find again.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from threading import Thread
from typing import Any

import torch
import torch._dynamo.config
import torch._functorch.config
import torch._inductor.config
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.utils.checkpoint import CheckpointPolicy
from torch.utils.flop_counter import register_flop_formula

from hrm_lm.config import TrainConfig
from hrm_lm.models.contract import LanguageModel
from hrm_lm.models.layers import Block, Stack


def start_compilers(device: torch.device) -> Thread:
    """Imports PyTorch's compiler beside what follows. For a GPU it does, too, what PyTorch would do at its first compilation: start
    the processes that compile kernels (until they are there, kernels are compiled in turn), and find the hash by which caches
    know Triton. The thread is to be joined before something is compiled.
    """
    index = torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index

    def start() -> None:
        triton = Thread(target=identify_triton, args=(index,), daemon=True)
        if device.type == "cuda":
            with suppress(Exception):  # these are PyTorch's own affair; without them the first compilation takes longer
                from torch._inductor.async_compile import maybe_warm_pool

                maybe_warm_pool()
            triton.start()
        with suppress(Exception):
            import torch._inductor.compile_fx  # noqa: F401
        if device.type == "cuda":
            triton.join()

    thread = Thread(target=start, daemon=True)
    thread.start()
    return thread


def identify_triton(device: int) -> None:
    """Hashes Triton's files and builds its link to the driver. PyTorch keeps the hash. Python's lock is mostly free meanwhile."""
    with suppress(Exception), torch.cuda.device(device):
        from torch.utils._triton import triton_hash_with_backend

        triton_hash_with_backend()


def compile_model(model: LanguageModel, config: TrainConfig, device: torch.device) -> None:
    """From here on the model's parts are compiled when they first run."""
    # Block by block: they are alike, so one compilation serves all of them in every cycle. (Stacks compiled whole
    # measured no faster.) Encoder and decoder, with and without gradient, fixed and free lengths, training and not
    # make more kinds than Dynamo would keep.
    torch._dynamo.config.recompile_limit = 64
    # Under DDP, Dynamo would cut a block where DDP's buckets end, to reduce some of its gradients before the others. Here
    # they are ready all at once, when the first application of the block has had its backward pass.
    torch._dynamo.config.optimize_ddp = False
    keep_activations(config.activation_memory)
    if config.mixed_precision == "fp8" and device.type == "cuda":
        weigh_casts()
    # What PyTorch 2.13 compiles for a CPU casts to float8 with infinities, at times.
    eager_blocks = config.mixed_precision == "fp8" and device.type == "cpu"
    for module in model.modules():
        if isinstance(module, Block) and not eager_blocks:
            module.compile()
        elif isinstance(module, Stack) and device.type == "cpu":
            # Its norm stands outside of its blocks. A GPU has a kernel for it.
            module.norm.compile()
    # The backward pass of losses follows at once, so what they keep for it adds nothing to a step's peak of memory. With deep
    # supervision the losses of other outputs come first.
    share = config.activation_memory if model.config.hrm.deep_supervision else 1.0
    model.head.label_losses = torch.compile(model.head.label_losses, backend=compiler_of_losses(share))


@cache
def compiler_of_losses(share: float) -> Callable:
    """Returns PyTorch's compiler, for the losses of labels. They keep `share` of their memory, whatever the blocks keep."""

    def compile_losses(graph: fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        from torch._inductor.compile_fx import compile_fx

        # With two forms of a kernel of the backward pass PyTorch times both. The kernel overwrites the logits, so it first copies
        # them to pinned memory of the host: 2 GiB, rounded up to 4, which takes seconds.
        one_form = {"dynamic_scale_rblock": False} if hasattr(torch._inductor.config, "dynamic_scale_rblock") else None
        with torch._functorch.config.patch(activation_memory_budget=share):
            return compile_fx(graph, inputs, config_patches=one_form)

    return compile_losses


CAST_FLOPS = 6000
"""What a cast of a value to float8, both ways, weighs. Making the value again and casting it move some 10 bytes. In that time
an H200 does 3,000 FLOPs of a float8 product. They are doubled, because PyTorch counts the memory of both copies, and only the
transposed copy is kept.
"""


@cache
def weigh_casts() -> None:
    """Tells PyTorch what the kernels that cast to float8 cost. They need Triton."""
    from hrm_lm.models.float8_kernels import CASTS

    @register_flop_formula(CASTS, get_raw=True)
    def flops(*_, kwargs: dict[str, Any], **__) -> int:
        return CAST_FLOPS * kwargs["rows"].numel()


class KeepCostly(CustomGraphPass):
    """Marks what is not to be computed again, in the joint graph of forward and backward: attention over a BlockMask, and the
    largest magnitude of a tensor.
    """

    def __call__(self, graph: fx.Graph) -> None:
        if not any(graph.find_nodes(op="call_function", target=product) for product in PRODUCTS):
            return  # PyTorch chooses among nothing then, and would keep attention's tuple in place of its tensors
        attention = graph.find_nodes(op="call_function", target=torch.ops.higher_order.flex_attention)
        largest = graph.find_nodes(op="call_function", target=torch.ops.aten.amax.default)
        for node in [*attention, *(node for node in largest if node.meta["val"].dim() == 0)]:
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE

    def uuid(self) -> bytes:
        """Compiled kernels on disk are found again while what chooses is the same."""
        return get_hash_for_files((__file__,))


PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten._scaled_mm.default)


def keep_activations(share: float) -> None:
    """From here on what is compiled keeps about `share` of the memory for its backward pass that it would keep at best."""
    torch._functorch.config.activation_memory_budget = share
    torch._functorch.config.is_non_builtin_to_include = share < 1  # casts are weighed, too
    torch._inductor.config.joint_custom_pre_pass = KeepCostly() if share < 1 else None
