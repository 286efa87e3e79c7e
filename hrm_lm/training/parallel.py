"""How a model is spread over the workers of the process group: replicated (DDP), or sharded (FSDP2).

Where the model is sharded, every worker holds its part of each parameter, of its gradient and of the optimizer's state,
in float32. It gathers a block's weights before the block runs, in bf16 where `train.mixed_precision` says so; gradients
are reduced in float32. A block is gathered once for all its applications in a pass, and given up at the pass's end.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from hrm_lm.config import Config
from hrm_lm.models.layers import Block


def parallelize(model: nn.Module, config: Config, device: torch.device, world_size: int) -> nn.Module:
    """What to call in place of `model`. FSDP changes `model` itself: its parameters become sharded tensors."""
    if world_size == 1:
        return model
    if config.ray.parallel == "ddp":
        return DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )
    mesh = init_device_mesh(device.type, (world_size,))
    policy = MixedPrecisionPolicy()
    if config.train.mixed_precision == "bf16":
        # Inputs are left as they are: the rotary cosines must not lose their precision.
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    # What a decoder block attends to is projected before the block runs, so that projection is a unit of its own.
    projections = [block.cross.kv for block in blocks if block.cross is not None]
    for module in [*projections, *blocks, model]:  # from the inside out, as fully_shard wants it
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for method in ("prefill", "decode"):
        register_fsdp_forward_method(model, method)
    return model


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
    """Gives up gathered weights. A pass without backward leaves them behind; the next pass would take them for new."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
