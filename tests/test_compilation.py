"""What is compiled, what compiled blocks compute again in their backward pass where `train.activation_memory` is below 1, and what
prepares the first compilation."""

import pytest
import torch
import torch._functorch.config
import torch._inductor.async_compile
import torch._inductor.compile_fx
import torch._inductor.config
import torch.utils._triton
from conftest import small_config
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch.nn.attention import flex_attention
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils.flop_counter import register_flop_formula

from hrm_lm.models import float8
from hrm_lm.models.layers import Block, rotary
from hrm_lm.training.compilation import CAST_FLOPS, keep_activations
from hrm_lm.training.step import build_state


@pytest.fixture
def compiler(monkeypatch):
    """Puts back what a test sets, and lets flex attention be traced with gradients on a CPU."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    torch._dynamo.reset()
    as_before = {
        name: getattr(torch._functorch.config, name)
        for name in ("activation_memory_budget", "is_non_builtin_to_include")
    }
    with torch._functorch.config.patch(as_before), torch._inductor.config.patch(joint_custom_pre_pass=None):
        yield


# They stand for the kernels that cast on a GPU.
@torch.library.custom_op("hrm_lm_test::cast_both", mutates_args=())
def cast_both(x: Tensor, factor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    raise NotImplementedError


@torch.library.custom_op("hrm_lm_test::cast_silu_mul_both", mutates_args=())
def cast_silu_mul_both(gate_up: Tensor, factor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    raise NotImplementedError


@torch.library.custom_op("hrm_lm_test::cast_silu_mul_gradient_both", mutates_args=())
def cast_silu_mul_gradient_both(
    gate_up: Tensor, gradient: Tensor, factor: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    raise NotImplementedError


@cast_both.register_fake
def _(x, factor, dtype):
    return x.to(dtype), x.t().contiguous().to(dtype)


@cast_silu_mul_both.register_fake
def _(gate_up, factor, dtype):
    h = gate_up.chunk(2, dim=-1)[0]
    return h.to(dtype).contiguous(), h.t().contiguous().to(dtype)


@cast_silu_mul_gradient_both.register_fake
def _(gate_up, gradient, factor, dtype):
    return gate_up.to(dtype), gate_up.t().contiguous().to(dtype)


KERNELS = {
    "cast_both": cast_both,
    "cast_silu_mul_both": cast_silu_mul_both,
    "cast_silu_mul_gradient_both": cast_silu_mul_gradient_both,
}


@register_flop_formula([torch.ops.hrm_lm_test.cast_both, torch.ops.hrm_lm_test.cast_silu_mul_gradient_both])
def cast_flops(shape: torch.Size, *_, **__) -> int:
    return CAST_FLOPS * shape.numel()


@register_flop_formula(torch.ops.hrm_lm_test.cast_silu_mul_both)
def silu_mul_cast_flops(shape: torch.Size, *_, **__) -> int:
    return CAST_FLOPS * shape.numel() // 2


def in_float8(block: Block, monkeypatch) -> Block:
    """The block as it is on a GPU."""
    for name, kernel in KERNELS.items():
        monkeypatch.setattr(float8, name, kernel)
    float8.use_float8(block, torch.device("cpu"))
    return block


def computed_again(function, share: float, *inputs) -> set[str]:
    """The products, attentions and casts of the forward pass that the backward pass has, too."""
    graphs: list[fx.GraphModule] = []

    def partition(joint: fx.GraphModule, *args, **kwargs):
        if torch._inductor.config.joint_custom_pre_pass:
            torch._inductor.config.joint_custom_pre_pass(joint.graph)
        graphs.extend(min_cut_rematerialization_partition(joint, *args, **kwargs))
        raise InterruptedError  # nothing needs to run

    keep_activations(share)
    decompositions = select_decomp_table()
    backend = aot_autograd(
        fw_compiler=lambda graph, inputs: graph, partition_fn=partition, decompositions=decompositions
    )
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(Exception, match="InterruptedError"):
        torch.compile(function, backend=backend)(*inputs)
    forward, backward = ({node.name: node for node in graph.graph.nodes} for graph in graphs)
    again = [node.target for name, node in backward.items() if node.op == "call_function" and name in forward]
    watched = ("mm", "_scaled_mm", "amax", "flex_attention", *KERNELS)
    return {name for target in again if (name := target.__name__.removesuffix(".default")) in watched}


B, T, C = 8, 1024, 1024  # HRM-Text B


def inputs_of_block() -> tuple:
    x = torch.randn(B, T, C, dtype=torch.bfloat16, requires_grad=True)
    return x, rotary(torch.arange(T), C // 8), create_block_mask(lambda b, h, q, k: k <= q, B, None, T, T, device="cpu")


@pytest.mark.slow  # a compiler runs
@pytest.mark.parametrize(("share", "again"), [(1.0, set()), (0.45, {"mm"}), (0.3, {"mm"})])
def test_products_are_computed_again_and_attention_is_not(compiler, share, again):
    assert computed_again(Block(C, 8, 4.0, hrm_text=True), share, *inputs_of_block()) == again


@pytest.mark.slow  # a compiler runs
@pytest.mark.parametrize(("share", "again"), [(1.0, set()), (0.8, {"_scaled_mm"})])
def test_in_float8_products_are_computed_again_and_neither_casts_nor_their_scales_are(
    compiler, monkeypatch, share, again
):
    block = in_float8(Block(C, 8, 4.0, hrm_text=True), monkeypatch)
    assert computed_again(block, share, *inputs_of_block()) == again


@pytest.mark.slow  # a compiler runs
def test_attention_that_is_compiled_on_its_own_is_computed_again_where_memory_is_short(compiler):
    """There is nothing else to choose from, and it is no tensor that could be kept."""
    q = torch.randn(B, 4, T, C // 4, requires_grad=True)
    mask = create_block_mask(lambda b, h, q, k: k <= q, B, None, T, T, device="cpu")
    attention = lambda q: flex_attention.flex_attention(q, q, q, block_mask=mask)  # noqa: E731
    assert computed_again(attention, 0.35, q) == {"flex_attention"}


def test_a_run_that_keeps_all_is_not_told_what_an_earlier_one_kept(compiler):
    build_state(small_config(train__compile=True, train__activation_memory=0.3), 20)
    assert torch._functorch.config.activation_memory_budget == 0.3
    build_state(small_config(), 20)
    assert torch._functorch.config.activation_memory_budget == 1.0


@pytest.mark.parametrize(("deep_supervision", "kept"), [(0.0, 1.0), (0.5, 0.3)])
def test_losses_keep_their_logits_whatever_blocks_keep_unless_those_of_other_outputs_come_first(
    compiler, monkeypatch, deep_supervision, kept
):
    shares = []

    def spy(graph, inputs, config_patches=None):
        shares.append(torch._functorch.config.activation_memory_budget)
        return graph.forward

    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", spy)
    fields = {"model__hrm__deep_supervision": deep_supervision, "train__activation_memory": 0.3}
    state = build_state(small_config(train__compile=True, **fields), 20)
    state.model.head.losses(torch.randn(5, state.config.model.d_model), torch.arange(5))
    assert shares == [kept]
    assert torch._functorch.config.activation_memory_budget == 0.3


def test_pytorch_has_what_is_prepared_before_the_first_compilation():
    """Where it has not, nothing fails, but the first step is late."""
    assert callable(torch._inductor.async_compile.maybe_warm_pool)
    assert callable(torch.utils._triton.triton_hash_with_backend)
    assert hasattr(torch._inductor.config, "dynamic_scale_rblock")


@pytest.mark.gpu
def test_the_first_backward_pass_of_the_losses_copies_no_logits_to_the_host(monkeypatch, tmp_path):
    """PyTorch copies what a kernel writes to before it times forms of the kernel, where a copy on the GPU would take memory."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # what was timed once is not timed again
    torch._dynamo.reset()
    state = build_state(small_config(train__compile=True, train__mixed_precision="bf16"), 65_536, torch.device("cuda"))
    states = torch.randn(16_416, state.config.model.d_model, device="cuda", requires_grad=True)
    labels = torch.zeros(len(states), dtype=torch.long, device="cuda")
    pinned = torch.zeros(1).pin_memory()  # from here on there are statistics
    before = torch.cuda.host_memory_stats()["allocated_bytes.allocated"]
    with torch.autocast("cuda", torch.bfloat16):
        loss = state.model.head.losses(states, labels).sum()
    torch.cuda.reset_peak_memory_stats()  # so a copy on the GPU would raise it
    loss.backward()
    copied = torch.cuda.host_memory_stats()["allocated_bytes.allocated"] - before
    assert copied < labels.numel() * 65_536, "bytes"
    del pinned
