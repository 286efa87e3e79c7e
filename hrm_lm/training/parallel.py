"""How a model is spread over the workers of the process group: replicated (DDP), or sharded (FSDP2).

Where the model is sharded, every worker holds its part of each parameter, of its gradient and of the optimizer's state,
in float32. With `hsdp` the parts are those of the workers of one node, and every node holds the whole model.

A worker gathers a block's weights before the block first runs, in bf16 where `train.mixed_precision` says so. They stay
for all applications, the backward pass, and all micro-batches of an optimisation step: they do not change before its
end, and gathering them again would cost more than it saves. So a worker holds the gathered weights of the whole model
for most of a step. FSDP2 gathers in a CUDA stream of its own, and the CPU is ahead of the GPU: so a block is gathered while
the block before it computes. Gradients are reduced in float32, a block's as soon as the backward pass has left the
block's first application.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from hrm_lm.config import Config
from hrm_lm.errors import UserError
from hrm_lm.models.contract import LanguageModel
from hrm_lm.models.layers import Block


def parallelize(model: LanguageModel, config: Config, device: torch.device, world_size: int) -> nn.Module:
    """What to call in place of `model`. FSDP changes `model` itself: its parameters become sharded tensors."""
    if world_size == 1:
        return model
    if config.ray.parallel == "ddp":
        with warnings.catch_warnings():
            # What PyTorch 2.13 would rather have it called, 2.11 does not know.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            return DistributedDataParallel(
                model,
                device_ids=[device] if device.type == "cuda" else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )
    mesh = _mesh(config.ray.parallel, device, world_size)
    policy = MixedPrecisionPolicy()
    if config.train.mixed_precision in ("bf16", "fp8"):
        # Inputs are left as they are: the rotary cosines must not lose their precision.
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    # What a decoder block attends to is projected before the block runs, so that projection is a unit of its own. So is
    # the head: its gradient is ready at the start of a backward pass, that of the embedding at the end.
    projections = [block.cross.kv for block in blocks if block.cross is not None]
    for module in [*projections, *blocks, model.head, model]:  # from the inside out, as fully_shard wants it
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    model.set_reshard_after_backward(False)  # FSDP would do it after every application; see `forget_gathered`
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nothing writes to what they return
    register_fsdp_forward_method(model.head, "losses")
    for method in ("open", "prefill", "decode"):
        register_fsdp_forward_method(model, method)
    return model


def _mesh(parallel: str, device: torch.device, world_size: int) -> DeviceMesh:
    """All workers; with `hsdp` nodes by the workers of a node, if there are several nodes.

    torchrun and Ray Train say in LOCAL_WORLD_SIZE how many workers this node has, and number the workers node by node.
    Raises UserError where a node has more workers than another.
    """
    if parallel == "hsdp":
        here = torch.tensor(int(os.environ.get("LOCAL_WORLD_SIZE", world_size)), device=device)
        everywhere = [torch.zeros_like(here) for _ in range(world_size)]
        dist.all_gather(everywhere, here)
        sizes = sorted({int(size) for size in everywhere})
        if len(sizes) > 1:
            raise UserError(
                f"ray.parallel: hsdp needs equally many workers on every node, here some have {sizes[0]} and others "
                f"{sizes[-1]}; change ray.num_workers, or take fsdp"
            )
        if sizes[0] < world_size:
            shape = (world_size // sizes[0], sizes[0])
            return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(device.type, (world_size,))


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def unsynchronized(parallel: nn.Module) -> AbstractContextManager[None]:
    """Backward passes in here add to a worker's own gradients. The workers do not communicate."""
    if isinstance(parallel, DistributedDataParallel):
        return parallel.no_sync()
    return _without_reduction(parallel) if is_sharded(parallel) else nullcontext()


@contextmanager
def _without_reduction(model: FSDPModule) -> Iterator[None]:
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def forget_gathered(model: nn.Module) -> None:
    """Gives up gathered weights; of a sharded model, parameters are its parts again. This is due before the parts change,
    and after a pass without backward: a pass takes what it finds gathered for new.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
