import pytest
import torch
from conftest import small_config

from hrm_lm.data.collate import pad_batch
from hrm_lm.models.build import LanguageModel, build_model
from hrm_lm.models.hrm import HRMCore, gradient_window
from hrm_lm.models.layers import Stack, rotary
from hrm_lm.training.step import token_loss

VOCAB = 20
BRIDGES = pytest.mark.parametrize("bridge", ["cross_attention", "prefix"])
KINDS = {
    "cross_attention": {},
    "prefix": {"model__bridge__type": "prefix"},
    "prefix_lm": {"model__architecture": "prefix_lm"},
    "prefix_lm_plain": {"model__architecture": "prefix_lm", "model__hrm__h_cycles": 0},
}
MODELS = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
ARCHITECTURES = pytest.mark.parametrize("architecture", ["encoder_decoder", "prefix_lm"])


def build(**overrides) -> LanguageModel:
    torch.manual_seed(0)
    return build_model(small_config(**overrides).model, VOCAB)


def samples(*lengths: tuple[int, int]):
    generator = torch.Generator().manual_seed(1)
    draw = lambda n: torch.randint(4, VOCAB, (n,), generator=generator).tolist()  # noqa: E731
    return [(draw(s), draw(t), draw(t)) for s, t in lengths]


@MODELS
def test_a_sample_gets_the_same_logits_alone_and_beside_longer_ones(kind):
    model = build(**kind).eval()
    short, *longer = samples((3, 2), (9, 7), (5, 4))
    alone = model(pad_batch([short], 0))[-1]
    together = model(pad_batch([short, *longer], 0))[-1]
    torch.testing.assert_close(together[:1, :2], alone, atol=1e-5, rtol=1e-5)


@MODELS
def test_the_response_does_not_see_the_future(kind):
    model = build(**kind).eval()
    ((prompt, inputs, labels),) = samples((4, 6))
    changed = (prompt, inputs[:3] + [5, 6, 7], labels)
    a, b = model(pad_batch([(prompt, inputs, labels)], 0))[-1], model(pad_batch([changed], 0))[-1]
    torch.testing.assert_close(a[:, :3], b[:, :3])
    assert not torch.allclose(a[:, 3:], b[:, 3:])


def applications_with_gradient(backprop_steps, h_cycles=2, l_cycles=2) -> str:
    """Which applications, of L and H in order, carry gradient: upper case for those that do."""
    order = []

    class Spy(torch.nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name, self.weight = name, torch.nn.Parameter(torch.ones(()))

        def forward(self, x, rope, mask, caches):
            order.append(self.name if torch.is_grad_enabled() else self.name.lower())
            return x * self.weight

    core = HRMCore(Spy("H"), Spy("L"), d_model=2)
    x = torch.ones(1, 1, 2, requires_grad=True)
    core(x, None, None, h_cycles, l_cycles, backprop_steps)[-1].sum().backward()
    assert x.grad is not None, "the encoder must learn whatever the window"
    assert core.h_stack.weight.grad is not None and core.l_stack.weight.grad is not None
    return "".join(order)


@pytest.mark.parametrize(
    "window, expected", [(None, "LLHLLH"), (2, "llhlLH"), (3, "llHlLH"), (4, "llHLLH"), (5, "lLHLLH"), (99, "LLHLLH")]
)
def test_the_gradient_window_takes_the_last_applications_of_h_first_and_at_least_one_of_l(window, expected):
    assert applications_with_gradient(window) == expected


def test_the_gradient_window_of_the_release_covers_both_h_cycles_and_the_last_three_of_l():
    assert gradient_window(h_cycles=2, l_cycles=3, backprop_steps=5) == [False] * 3 + [True] + [True] * 4


def test_a_prefix_lm_passes_nothing_around_a_window_that_cuts_the_embedding_off():
    model = build(model__architecture="prefix_lm")
    batch = pad_batch(samples((4, 3)), 0)
    token_loss(model(batch, backprop_steps=2)[-1], batch.labels).backward()
    assert model.embedding.weight.grad.abs().sum() == 0  # there, as DistributedDataParallel needs it, but zero
    model.zero_grad()
    token_loss(model(batch, backprop_steps=3)[-1], batch.labels).backward()
    assert model.embedding.weight.grad.abs().sum() > 0


def test_the_recurrence_is_the_one_of_the_paper():
    torch.manual_seed(0)
    h, l = Stack(1, 8, 2, 4.0), Stack(1, 8, 2, 4.0)
    x, rope = torch.randn(2, 5, 8), rotary(torch.arange(5), 4)
    z_h, z_l = x, torch.zeros(8)
    for _ in range(2):
        for _ in range(3):
            z_l = l(z_l + z_h, rope)
        z_h = h(z_h + z_l, rope)
    torch.testing.assert_close(HRMCore(h, l, 8)(x, rope, None, 2, 3)[-1], z_h)


@ARCHITECTURES
@pytest.mark.parametrize("window", [3, 4])
def test_bf16_gradients_survive_the_parts_without_a_graph(architecture, window):
    """Autocast caches weights cast under no_grad; reused in the window they would leave the stacks without gradient."""
    model = build(model__architecture=architecture)
    batch = pad_batch(samples((4, 3)), 0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = token_loss(model(batch, backprop_steps=window)[-1], batch.labels)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@ARCHITECTURES
def test_zero_h_cycles_is_a_model_without_a_core(architecture):
    model = build(model__hrm__h_cycles=0, model__architecture=architecture)
    assert not [name for name in model.state_dict() if "core" in name]
    assert model(pad_batch(samples((4, 3)), 0))[-1].shape == (1, 3, VOCAB)


def test_a_plain_prefix_lm_has_the_parameters_of_its_hrm():
    plain, hrm = (build(model__architecture="prefix_lm", model__hrm__h_cycles=cycles) for cycles in (0, 2))
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in hrm.parameters())


@ARCHITECTURES
def test_a_model_can_be_run_with_more_cycles_than_it_was_built_with(architecture):
    model = build(model__architecture=architecture).eval()
    batch = pad_batch(samples((4, 3)), 0)
    assert not torch.allclose(model(batch)[-1], model(batch, h_cycles=5, l_cycles=3)[-1])


@ARCHITECTURES
def test_deep_supervision_gives_the_logits_of_every_h_cycle_while_training(architecture):
    model = build(model__hrm__deep_supervision=0.5, model__hrm__h_cycles=3, model__architecture=architecture)
    batch = pad_batch(samples((4, 3)), 0)
    assert len(model(batch)) == 3
    assert len(model.eval()(batch)) == 1


@BRIDGES
def test_the_gate_is_shut_during_its_warmup_and_a_checkpoint_remembers(bridge):
    model = build(model__bridge__type=bridge, model__bridge__gate_warmup_steps=5).eval()
    a, b = (pad_batch([(prompt, [1, 5], [5, 2])], 0) for prompt in ([4, 5, 6], [7, 8, 9, 10]))
    model.set_step(4)
    torch.testing.assert_close(model(a)[-1], model(b)[-1])  # nothing of the prompt crosses
    copy = build(model__bridge__type=bridge, model__bridge__gate_warmup_steps=5).eval()
    model.set_step(5)
    assert not torch.allclose(model(a)[-1], model(b)[-1])
    copy.load_state_dict(model.state_dict())
    torch.testing.assert_close(copy(a)[-1], model(a)[-1])


@MODELS
@pytest.mark.parametrize("side", ["right", "left"])
def test_decoding_with_a_cache_gives_the_logits_of_the_whole_sequence(kind, side):
    model = build(**kind).eval()
    batch = pad_batch([(p, [1, *t[1:]], l) for p, t, l in samples((3, 6), (8, 6))], 0)
    whole = model(batch)[-1]
    ids, mask = batch.encoder_ids, batch.encoder_mask
    if side == "left":
        ids, mask = (torch.stack([tensor[0].roll(8 - 3), tensor[1]]) for tensor in (ids, mask))
    logits, decoding = model.prefill(ids, mask, 1, max_new_tokens=6)
    steps = [logits] + [model.decode(batch.decoder_input_ids[:, t], decoding) for t in range(1, 6)]
    torch.testing.assert_close(torch.stack(steps, dim=1), whole, atol=1e-5, rtol=1e-5)
