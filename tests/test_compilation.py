"""What compiled blocks compute again in their backward pass, where `train.activation_memory` is below 1."""

import pytest
import torch
import torch._functorch.config
import torch._inductor.config
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch.nn.attention import flex_attention
from torch.nn.attention.flex_attention import create_block_mask

from hrm_lm.models.layers import Block, rotary
from hrm_lm.training.compilation import keep_activations


@pytest.fixture
def compiler(monkeypatch):
    """Leaves what a test sets behind, and lets flex attention be traced with gradients on a CPU."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    torch._dynamo.reset()
    as_before = {
        name: getattr(torch._functorch.config, name)
        for name in ("activation_memory_budget", "is_non_builtin_to_include")
    }
    with torch._functorch.config.patch(as_before), torch._inductor.config.patch(joint_custom_pre_pass=None):
        yield


def computed_again(block: Block, share: float) -> list[str]:
    """The products and attentions of a block's forward pass that its backward pass has, too."""
    B, T, C = 2, 256, block.mlp.out.out_features
    graphs: list[fx.GraphModule] = []

    def partition(joint: fx.GraphModule, *args, **kwargs):
        torch._inductor.config.joint_custom_pre_pass(joint.graph)
        graphs.extend(min_cut_rematerialization_partition(joint, *args, **kwargs))
        raise InterruptedError  # nothing needs to run

    keep_activations(share)
    decompositions = select_decomp_table()
    backend = aot_autograd(
        fw_compiler=lambda graph, inputs: graph, partition_fn=partition, decompositions=decompositions
    )
    mask = create_block_mask(lambda b, h, q, k: k <= q, B, None, T, T, device="cpu")
    x = torch.randn(B, T, C, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(Exception, match="InterruptedError"):
        torch.compile(block, backend=backend)(x, rotary(torch.arange(T), C // 4), mask)
    forward, backward = ({node.name: node for node in graph.graph.nodes} for graph in graphs)
    again = [node.target for name, node in backward.items() if node.op == "call_function" and name in forward]
    return sorted(target.__name__ for target in again if target.__name__ in ("mm.default", "flex_attention"))


@pytest.mark.slow  # a compiler runs
@pytest.mark.parametrize(("share", "again"), [(1.0, []), (0.45, ["mm.default"]), (0.3, ["mm.default"])])
def test_products_are_computed_again_and_attention_is_not(compiler, share, again):
    assert computed_again(Block(128, 4, 4.0, hrm_text=True), share) == again
