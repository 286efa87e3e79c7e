import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import small_config

from hrm_lm.config import Cycles
from hrm_lm.data.splits import Ragged, Sample
from hrm_lm.data.tokenizer import SimpleTokenizer
from hrm_lm.models import layers
from hrm_lm.models.build import build_model
from hrm_lm.models.contract import LanguageModel, layout
from hrm_lm.models.hrm import HRMCore, carries_gradient
from hrm_lm.models.layers import Stack, rotary
from hrm_lm.training.step import build_state

VOCAB = 20
CYCLES = Cycles(2, 2)
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


def samples(*lengths: tuple[int, int]) -> list[Sample]:
    """Random samples of so many tokens of prompt and of response."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda n: torch.randint(4, VOCAB, (n,), generator=generator).tolist()  # noqa: E731
    return [Sample(draw(s), draw(t)) for s, t in lengths]


def batch_of(model: LanguageModel, *some: Sample, round_up: bool = False):
    return model.collate(Ragged.of(some), SimpleTokenizer, round_up)


def losses(model: LanguageModel, batch, cycles: Cycles | None = None, **options):
    """The answer's loss of each label, in the order of the samples, and without padding."""
    return model(batch, cycles or model.config.hrm.cycles, **options).predictions[-1].losses[batch.labels >= 0]


@MODELS
def test_a_sample_gets_the_same_losses_alone_and_beside_longer_ones(kind):
    model = build(**kind).eval()
    short, *longer = samples((3, 2), (9, 7), (5, 4))
    alone = losses(model, batch_of(model, short))
    for round_up in (False, True):
        together = losses(model, batch_of(model, short, *longer, round_up=round_up))
        torch.testing.assert_close(together[:3], alone, atol=1e-5, rtol=1e-5)


PACKABLE = {
    "prefix_lm": {"model__architecture": "prefix_lm"},
    "encoder_decoder": {},
    "plain_encoder_decoder": {"model__hrm__h_cycles": 0},
    "deeply_supervised": {"model__hrm__deep_supervision": 0.5, "model__decoder_layers": 2},
}


@pytest.mark.parametrize("kind", PACKABLE.values(), ids=PACKABLE)
def test_packed_samples_get_the_losses_and_gradients_they_get_in_rows_of_their_own(kind):
    model, some = build(**kind), samples((3, 2), (9, 7), (1, 0), (5, 4))
    rows = (40,) if "model__architecture" in kind else (23, 40)
    packed = layout(model, rows).func
    results = []
    for batch in (
        batch_of(model, *some),
        packed(Ragged.of(some), SimpleTokenizer),
        packed(Ragged.of(some), SimpleTokenizer, True),
        layout(model, rows)(Ragged.of(some), SimpleTokenizer, True),
    ):
        model.zero_grad()
        predictions = model(batch, model.config.hrm.cycles).predictions
        each = torch.stack([prediction.losses[batch.labels >= 0] for prediction in predictions])
        each.sum().backward()
        per_sample = batch.per_sample(predictions[-1].losses.detach())
        results.append((each.detach(), per_sample, [p.grad.clone() for p in model.parameters()]))
    for each, per_sample, gradients in results[1:]:
        torch.testing.assert_close(each, results[0][0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(per_sample, results[0][1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(gradients, results[0][2], atol=1e-5, rtol=1e-4)


def test_losses_made_in_pieces_are_those_made_at_once(monkeypatch):
    model, some = build(model__architecture="prefix_lm"), samples((3, 2), (9, 7), (1, 0))
    results = []
    for at_once in (1 << 28, 5 * VOCAB):
        monkeypatch.setattr(layers, "LOGITS_AT_ONCE", at_once)
        model.head.logits_at_once = at_once
        model.zero_grad()
        each = losses(model.train(), batch_of(model, *some))
        each.sum().backward()
        with torch.no_grad():
            right = model(batch_of(model, *some), CYCLES).predictions[-1].right
        results.append((each.detach(), right, [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize(
    "fields, pieces",
    [
        ({}, 2),
        ({"train__compile": True}, 2),  # its logits are in float32
        ({"train__compile": True, "train__mixed_precision": "bf16"}, 0),
        ({"train__compile": True, "train__mixed_precision": "bf16", "model__hrm__deep_supervision": 0.5}, 2),
    ],
)
def test_compiled_losses_in_bf16_compute_no_logits_twice_where_others_do(monkeypatch, fields, pieces):
    again = []
    monkeypatch.setattr(layers, "checkpoint", lambda function, *args, **how: again.append(1) or function(*args))
    head = build_state(small_config(**fields), 1000).model.head
    count = layers.LOGITS_AT_ONCE // 1000 + 1
    head.label_losses = layers.label_losses  # not the compiled ones, for nothing is to be computed
    states, labels = torch.empty(count, head.in_features), torch.empty(count, dtype=torch.long)
    head.to("meta").losses(states.to("meta"), labels.to("meta"))
    assert len(again) == pieces


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_swiglu_that_is_made_for_compilers_is_that_of_autograd(dtype):
    gate_up, gradient = torch.randn(3, 5, 16).to(dtype), torch.randn(3, 5, 8).to(dtype)
    gate_up[0, 0, 0], gate_up[0, 0, 8] = -3e38, 2.0  # a gate and what it lets through
    gate_up.requires_grad_()
    for_compilers, expected = (
        torch.autograd.grad(function(gate_up), gate_up, gradient)[0]
        for function in (layers.SiluMul.apply, layers.silu_mul)
    )
    torch.testing.assert_close(for_compilers, expected)


@pytest.mark.parametrize("architecture", ["encoder_decoder", "prefix_lm"])
def test_under_autocast_the_stream_is_bf16_and_losses_are_float32(architecture):
    model, seen = build(model__architecture=architecture), []
    for block in model.modules():
        if isinstance(block, layers.Block):
            block.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].dtype, output.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        each = losses(model, batch_of(model, *samples((4, 3))))
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)} and each.dtype == torch.float32


@MODELS
def test_the_response_does_not_see_the_future(kind):
    model = build(**kind).eval()
    (sample,) = samples((4, 6))
    changed = sample._replace(response=[*sample.response[:2], 5, 6, 7, 8])
    a, b = (losses(model, batch_of(model, one)) for one in (sample, changed))
    torch.testing.assert_close(a[:2], b[:2])
    assert not torch.allclose(a[3:], b[3:])


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
    core(x, None, None, Cycles(h_cycles, l_cycles), backprop_steps).states[-1].sum().backward()
    assert x.grad is not None, "the encoder must learn whatever the window"
    assert core.h_stack.weight.grad is not None and core.l_stack.weight.grad is not None
    return "".join(order)


@pytest.mark.parametrize(
    "window, expected", [(None, "LLHLLH"), (2, "llhlLH"), (3, "llHlLH"), (4, "llHLLH"), (5, "lLHLLH"), (99, "LLHLLH")]
)
def test_the_gradient_window_takes_the_last_applications_of_h_first_and_at_least_one_of_l(window, expected):
    assert applications_with_gradient(window) == expected


def test_the_gradient_window_of_the_release_covers_both_h_cycles_and_the_last_three_of_l():
    assert carries_gradient(Cycles(2, 3), backprop_steps=5) == ([[False] * 3, [True] * 3], [True, True])


def test_a_prefix_lm_passes_nothing_around_a_window_that_cuts_the_embedding_off():
    model = build(model__architecture="prefix_lm")
    batch = batch_of(model, *samples((4, 3)))
    losses(model, batch, backprop_steps=2).sum().backward()
    assert model.embedding.weight.grad.abs().sum() == 0  # there, as DistributedDataParallel needs it, but zero
    model.zero_grad()
    losses(model, batch, backprop_steps=3).sum().backward()
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
    torch.testing.assert_close(HRMCore(h, l, 8)(x, rope, None, Cycles(2, 3)).states[-1], z_h)


@ARCHITECTURES
@pytest.mark.parametrize("window", [3, 4])
def test_bf16_gradients_survive_the_parts_without_a_graph(architecture, window):
    """Autocast caches weights cast under no_grad; reused in the window they would leave the stacks without gradient."""
    model = build(model__architecture=architecture)
    batch = batch_of(model, *samples((4, 3)))
    with torch.autocast("cpu", torch.bfloat16):
        loss = losses(model, batch, backprop_steps=window).sum()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@ARCHITECTURES
def test_zero_h_cycles_is_a_model_without_a_core(architecture):
    model = build(model__hrm__h_cycles=0, model__architecture=architecture)
    assert not [name for name in model.state_dict() if "core" in name]
    assert losses(model, batch_of(model, *samples((4, 3)))).shape == (4,)


def test_a_plain_prefix_lm_has_the_parameters_of_its_hrm():
    plain, hrm = (build(model__architecture="prefix_lm", model__hrm__h_cycles=cycles) for cycles in (0, 2))
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in hrm.parameters())


@ARCHITECTURES
def test_a_model_can_be_run_with_more_cycles_than_it_was_built_with(architecture):
    model = build(model__architecture=architecture).eval()
    batch = batch_of(model, *samples((4, 3)))
    assert not torch.allclose(losses(model, batch), losses(model, batch, Cycles(5, 3)))


@ARCHITECTURES
def test_deep_supervision_gives_a_prediction_of_every_h_cycle_while_training(architecture):
    model = build(model__hrm__deep_supervision=0.5, model__hrm__h_cycles=3, model__architecture=architecture)
    batch = batch_of(model, *samples((4, 3)))
    assert len(model(batch, Cycles(3, 2)).predictions) == 3
    assert len(model.eval()(batch, Cycles(3, 2)).predictions) == 1


@BRIDGES
def test_the_gate_is_shut_during_its_warmup_and_a_checkpoint_remembers(bridge):
    model = build(model__bridge__type=bridge, model__bridge__gate_warmup_steps=5).eval()
    a, b = (batch_of(model, Sample(prompt, [5])) for prompt in ([4, 5, 6], [7, 8, 9, 10]))
    model.set_step(4)
    torch.testing.assert_close(losses(model, a), losses(model, b))  # nothing of the prompt crosses
    copy = build(model__bridge__type=bridge, model__bridge__gate_warmup_steps=5).eval()
    model.set_step(5)
    assert not torch.allclose(losses(model, a), losses(model, b))
    copy.load_state_dict(model.state_dict())
    torch.testing.assert_close(losses(copy, a), losses(model, a))


@MODELS
def test_decoding_with_a_cache_gives_the_logits_of_the_whole_sequence(kind):
    model = build(**kind).eval()
    some = samples((3, 6), (8, 6))
    batch = batch_of(model, *some)
    (states,), _ = model.states(batch, CYCLES)
    whole = model.head(states).view(2, 7, VOCAB)
    prompts = torch.nn.utils.rnn.pad_sequence([torch.tensor(s.prompt) for s in some], batch_first=True)
    responses = torch.tensor([s.response for s in some])
    decoding = model.open(2, 8, max_new_tokens=7, cycles=CYCLES)
    logits = model.prefill(prompts, [3, 8], SimpleTokenizer.bos_id, decoding)
    steps = [logits] + [model.decode(responses[:, t], decoding) for t in range(6)]
    torch.testing.assert_close(torch.stack(steps, dim=1), whole, atol=1e-5, rtol=1e-5)


def test_large_and_small_weights_are_drawn_from_one_distribution(monkeypatch):
    drawn = []
    for large in (1000, 10**9):
        monkeypatch.setattr(layers, "LARGE", large)
        torch.manual_seed(0)
        drawn.append(layers.lecun_normal_(torch.empty(500, 400), fan_in=400).flatten().sort().values)
    assert drawn[0].std() == pytest.approx(1 / 20, rel=0.01)
    torch.testing.assert_close(*drawn, atol=2e-3, rtol=0.01)


def test_large_weights_do_not_depend_on_the_number_of_cores(monkeypatch):
    monkeypatch.setattr(layers, "LARGE", 1000)
    monkeypatch.setattr(layers, "PART", 1000)
    drawn = []
    for cores in (1, 3):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process, cores=cores: set(range(cores)), raising=False)
        torch.manual_seed(0)
        drawn.append(layers.lecun_normal_(torch.empty(50, 100), fan_in=100))
    assert torch.equal(*drawn)
    assert drawn[0].unique().numel() > 4500, "parts differ"


def test_threads_that_draw_weights_are_shared_while_a_model_is_built_and_gone_afterwards(monkeypatch):
    monkeypatch.setattr(layers, "LARGE", 100)
    made = []
    monkeypatch.setattr(layers, "ThreadPoolExecutor", lambda count: made.append(ThreadPoolExecutor(count)) or made[-1])
    build()
    assert len(made) == 1
    with pytest.raises(RuntimeError, match="after shutdown"):
        made[0].submit(print)


# --- a causal mask -----------------------------------------------------------------------------------------------


CAUSAL = {"model__architecture": "prefix_lm", "model__mask": "causal"}


def test_with_a_causal_mask_a_prompts_tokens_do_not_see_later_ones_and_decoding_agrees():
    model = build(**CAUSAL).eval()
    (sample,) = samples((6, 4))
    states = {}
    for name, prompt in {"given": sample.prompt, "changed": [*sample.prompt[:4], 5, 6]}.items():
        batch = layout(model, None, "all")(Ragged.of([sample._replace(prompt=prompt)]), SimpleTokenizer, False)
        (states[name],), _ = model.states(batch, CYCLES)
    assert len(states["given"]) == 6 - 1 + 4 + 1, "all tokens but the first, and the end"
    torch.testing.assert_close(states["given"][:4], states["changed"][:4])
    assert not torch.allclose(states["given"][4:], states["changed"][4:])
    decoding = model.open(1, 6, 5, CYCLES)
    steps = [model.prefill(torch.tensor([sample.prompt]), [6], 1, decoding)]
    steps += [model.decode(torch.tensor([token]), decoding) for token in sample.response]
    torch.testing.assert_close(torch.cat(steps), model.head(states["given"][5:]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [None, (64,)])
def test_labels_of_everything_are_each_samples_tokens_but_its_first_packed_or_not(rows):
    model = build(**CAUSAL).eval()
    some = samples((3, 2), (1, 4), (5, 1))
    batch = layout(model, rows, "all")(Ragged.of(some), SimpleTokenizer, False)
    tokens = [[*s.prompt, *s.response, SimpleTokenizer.eos_id] for s in some]
    assert batch.labels.tolist() == [token for row in tokens for token in row[1:]]
    assert batch.ids.flatten()[batch.label_at].tolist() == [token for row in tokens for token in row[:-1]]
    responses = layout(model, rows)(Ragged.of(some), SimpleTokenizer, False)
    ends = [[*s.response, SimpleTokenizer.eos_id] for s in some]
    assert responses.labels.tolist() == [token for row in ends for token in row]
    own = torch.cat([torch.arange(len(row) - 1) >= len(s.prompt) - 1 for row, s in zip(tokens, some)])
    both = [model(each, CYCLES).predictions[-1].losses for each in (batch, responses)]
    torch.testing.assert_close(both[0][own], both[1])
