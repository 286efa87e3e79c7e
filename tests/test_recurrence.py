"""What the recurrence can do beside the published one: input that is read again, segments, drawn cycle counts, coming to rest."""

import json

import numpy as np
import pytest
import torch
from conftest import assert_resumes_exactly, assert_same_weights, batches_of, eval_options, small_config, train_locally

from hrm_lm.commands.evaluate import main as evaluate
from hrm_lm.commands.generate import main as generate
from hrm_lm.config import Cycles
from hrm_lm.data.collate import in_place, pack, pack_apart
from hrm_lm.data.registry import load_dataset
from hrm_lm.data.splits import Ragged, Sample
from hrm_lm.data.tokenizer import SimpleTokenizer
from hrm_lm.errors import UserError
from hrm_lm.evaluation.scoring import Slice, score
from hrm_lm.models.build import build_model
from hrm_lm.models.decoding import generate_ids
from hrm_lm.models.hrm import HRMCore
from hrm_lm.models.layers import Stack, rotary
from hrm_lm.training.checkpoint import load_model
from hrm_lm.training.step import Stats, build_state, cycles_of, train_step
from hrm_lm.training.validation import validate

ALL = ["encoder_decoder", "prefix_lm", "puzzle"]
ARCHITECTURES = pytest.mark.parametrize("architecture", ALL)
TOKENIZER = SimpleTokenizer("0123456789+?")
VOCAB = TOKENIZER.vocab_size


def build(**overrides):
    torch.manual_seed(0)
    model = build_model(small_config(**overrides, model__d_model=32).model, VOCAB).eval()
    torch.nn.init.normal_(model.head.weight)  # logits far apart: rounding changes no token
    return model


def samples(*sizes: tuple[int, int]) -> list[Sample]:
    draw = torch.Generator().manual_seed(0)

    def some(count: int) -> list[int]:
        return torch.randint(4, VOCAB, (count,), generator=draw).tolist()

    return [Sample(some(prompt), some(response)) for prompt, response in sizes]


SOME = samples((5, 3), (9, 9), (7, 2), (3, 3))


def batch_of(model, some=SOME):
    return model.collate(Ragged.of(some), TOKENIZER)


# --- what L reads ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inject", ["none", "add", "gated"])
@pytest.mark.parametrize("shared", [False, True])
def test_l_reads_the_input_again_as_asked(inject, shared):
    torch.manual_seed(0)
    h = Stack(1, 8, 2, 4.0)
    l = h if shared else Stack(1, 8, 2, 4.0)
    core = HRMCore(h, None if shared else l, 8, inject=inject)
    if inject == "gated":
        torch.nn.init.normal_(core.decay)
        torch.nn.init.normal_(core.scale)
    x, rope = torch.randn(2, 5, 8), rotary(torch.arange(5), 4)
    z_h, z_l = x, torch.zeros(8)
    for _ in range(2):
        for _ in range(3):
            read = {"none": z_l + z_h, "add": z_l + z_h + x}
            if inject == "gated":
                read["gated"] = torch.sigmoid(core.decay) * z_l + z_h + core.scale * x
            z_l = l(read[inject], rope)
        z_h = h(z_h + z_l, rope)
    torch.testing.assert_close(core(x, rope, None, Cycles(2, 3)).states[-1], z_h)


@ARCHITECTURES
@pytest.mark.parametrize("inject", ["add", "gated"])
def test_input_that_is_read_again_takes_gradient_through_any_window(architecture, inject):
    model = build(model__architecture=architecture, model__hrm__inject=inject).train()
    loss = model(batch_of(model), Cycles(2, 2), backprop_steps=2).predictions[-1].losses.sum()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_a_shared_stack_is_held_once():
    two, one = (build(model__hrm__shared=shared) for shared in (False, True))
    stack = sum(p.numel() for p in two.core.l_stack.parameters())
    assert sum(p.numel() for p in one.parameters()) == sum(p.numel() for p in two.parameters()) - stack
    assert not [name for name in one.state_dict() if "l_stack" in name]


# --- segments ----------------------------------------------------------------------------------------------------


@ARCHITECTURES
def test_segments_go_on_from_where_the_last_one_ended(architecture):
    model = build(model__architecture=architecture)
    batch = batch_of(model)
    with torch.no_grad():
        whole = model(batch, Cycles(6, 2))
        carry = None
        for _ in range(3):
            predictions, thought = model(batch, Cycles(2, 2), carry=carry)
            carry = thought.carry
    torch.testing.assert_close(predictions[-1].losses, whole.predictions[-1].losses)
    torch.testing.assert_close(carry.z_l, whole.thought.carry.z_l)


@ARCHITECTURES
@pytest.mark.parametrize("inject", ["none", "add"])
def test_a_step_of_segments_has_the_mean_gradient_of_each_segment_alone(architecture, inject):
    fields = {"model__architecture": architecture, "model__hrm__inject": inject, "train__batch_size": 4}
    config = small_config(**fields, train__segments=3, optim__lr=1e-12)
    state = build_state(config, VOCAB)
    batch, model = batch_of(state.model), state.model.train()
    labelled = (batch.labels >= 0).sum()
    seen, carry = [], None
    for _ in range(3):
        predictions, thought = model(batch, Cycles(2, 2), carry=carry)
        (predictions[-1].losses.sum() / labelled / 3).backward()
        seen.append(predictions[-1].losses.sum().item() / labelled.item())
        carry = thought.carry.detach()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    stats, kept = Stats(state), {}
    hooks = [
        p.register_post_accumulate_grad_hook(lambda p, n=n: kept.update({n: p.grad.clone()}))
        for n, p in model.named_parameters()
    ]
    train_step(state, [batch], stats)
    [hook.remove() for hook in hooks]
    for name in expected:
        torch.testing.assert_close(kept[name], expected[name], atol=1e-6, rtol=1e-4)
    assert stats.read()["loss"] == pytest.approx(seen[-1], rel=1e-5), "the loss that is told is the answer's"


def test_validation_takes_the_cycles_of_all_segments():
    config = small_config(train__segments=3)
    assert eval_options().of(config).cycles == Cycles(6, 2) == config.cycles


# --- drawn counts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, mean",
    [
        ({}, 8.5),
        ({"train__h_cycles_distribution": "poisson", "train__h_cycles_mean": 5.0}, 5.0),
        (
            {"train__h_cycles_distribution": "log_normal", "train__h_cycles_mean": 5.0, "train__h_cycles_sigma": 0.4},
            5.0,
        ),
    ],
)
def test_cycle_counts_are_drawn_from_the_distribution_within_bounds_the_same_on_every_worker(fields, mean):
    config = small_config(train__sample_h_cycles=[1, 16], **fields)
    drawn = [cycles_of(config, step).h for step in range(2000)]
    assert min(drawn) >= 1 and max(drawn) <= 16 and len(set(drawn)) > 8
    assert sum(drawn) / len(drawn) == pytest.approx(mean, rel=0.05)
    assert drawn == [cycles_of(config, step).h for step in range(2000)]
    assert drawn != [
        cycles_of(small_config(train__seed=1, train__sample_h_cycles=[1, 16], **fields), s).h for s in range(2000)
    ]


def test_draws_beyond_the_bounds_count_as_these():
    fields = {"train__h_cycles_distribution": "poisson", "train__h_cycles_mean": 6.0}
    config = small_config(train__sample_h_cycles=[5, 7], **fields)
    drawn = [cycles_of(config, step).h for step in range(500)]
    assert set(drawn) == {5, 6, 7} and drawn.count(5) > drawn.count(6)


# --- a fixed point -----------------------------------------------------------------------------------------------


@ARCHITECTURES
def test_the_penalty_is_the_mean_change_of_the_last_cycle_over_tokens(architecture):
    config = small_config(model__architecture=architecture, train__fixed_point=0.3, optim__lr=1e-12)
    state = build_state(config, VOCAB)
    batch, model = batch_of(state.model), state.model.train()
    predictions, thought = model(batch, Cycles(2, 2))
    old, new = thought.states
    relative = (new - old).square().sum(-1) / new.square().sum(-1)
    tokens = batch.thought_about.bool()
    (predictions[-1].losses.sum() / (batch.labels >= 0).sum() + 0.3 * relative[tokens].mean()).backward()
    expected = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    model.zero_grad()
    stats = Stats(state)
    train_step(state, [batch], stats)
    assert stats.read()["grad_norm"] == pytest.approx(expected.item(), rel=1e-4)


def test_accumulation_changes_nothing_of_the_penalty_but_rounding(tmp_path):
    fields = {"train__fixed_point": 0.5, "train__segments": 2, "model__hrm__inject": "add"}
    one, four = (
        train_locally(small_config(train__grad_accum_steps=parts, **fields), tmp_path / str(parts)) for parts in (1, 4)
    )
    assert_same_weights(one.last_weights(), four.last_weights(), atol=1e-5, rtol=1e-4)


def test_tokens_that_the_core_reads_are_known_in_every_layout():
    ragged = Ragged.of(SOME)
    prompts = sum(len(sample.prompt) for sample in SOME)
    labels = sum(len(sample.response) + 1 for sample in SOME)
    expected = {"encoder_decoder": prompts, "prefix_lm": prompts + labels - len(SOME), "puzzle": prompts + len(SOME)}
    for architecture, count in expected.items():
        model = build(model__architecture=architecture)
        for round_up in (False, True):
            batch = model.collate(ragged, TOKENIZER, round_up)
            assert batch.thought_about.sum() == count, architecture
    assert pack(ragged, TOKENIZER, width=60).thought_about.sum() == expected["prefix_lm"]
    assert pack_apart(ragged, TOKENIZER, rows=(40, 40)).thought_about.sum() == prompts


@ARCHITECTURES
def test_validation_reports_how_much_each_cycle_still_changes(architecture):
    config = small_config(model__architecture=architecture, data__synthetic__max_digits=1)
    splits = load_dataset(config.data, config.model, 0)
    model = build_state(config, splits.tokenizer.vocab_size).model
    scores = validate(model, splits, eval_options(7, cycles=Cycles(3, 2)))
    alone = validate(model, splits, eval_options(1000, cycles=Cycles(3, 2)))
    assert [name for name in scores if name.startswith("residual/")] == ["residual/1", "residual/2", "residual/3"]
    for name, value in scores.items():
        assert value == pytest.approx(alone[name], rel=1e-4)


# --- halting -----------------------------------------------------------------------------------------------------


def losses_by_sample(model, some, cycles):
    batch = batch_of(model, some)
    with torch.no_grad():
        output = model(batch, cycles)
    return batch.per_sample(output.predictions[-1].losses), output.thought


def resting(architecture, **fields):
    """A model whose samples rest after different counts, and a threshold at which they do."""
    model = build(model__architecture=architecture, model__hrm__inject="add", **fields)
    _, thought = losses_by_sample(model, SOME, Cycles(12, 2))
    tokens = batch_of(model).thought_about
    pairs = zip([thought.start, *thought.states], thought.states)
    gaps = torch.stack(
        [((new - old).square().sum(-1) * tokens).sum(1) / (new.square().sum(-1) * tokens).sum(1) for old, new in pairs]
    ).sqrt()  # (h, B)
    halt = gaps[2:8].min(dim=0).values.max().item() * 1.0001  # every sample gets there, one of them barely
    counts = [next(h + 1 for h in range(12) if gaps[h, b] <= halt) for b in range(len(SOME))]
    return model, halt, counts


@ARCHITECTURES
def test_a_sample_halts_where_its_states_come_to_rest_and_has_the_answer_of_that_count(architecture):
    model, halt, counts = resting(architecture)
    assert 1 < max(counts) <= 8
    together, thought = losses_by_sample(model, SOME, Cycles(12, 2, halt))
    assert thought.cycles.tolist() == counts
    for i, sample in enumerate(SOME):
        alone, _ = losses_by_sample(model, [sample], Cycles(counts[i], 2))
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-4, rtol=1e-4)
    _, thought = losses_by_sample(model, SOME, Cycles(2, 2, 1e-9))
    assert thought.cycles.tolist() == [2] * len(SOME), "never more than the most"


@ARCHITECTURES
def test_answers_of_samples_that_halt_do_not_depend_on_the_samples_beside_them(architecture):
    model, halt, _ = resting(architecture)
    prompts = [sample.prompt for sample in SOME]
    options, taken = eval_options(cycles=Cycles(12, 2, halt)), []
    together = generate_ids(model, TOKENIZER, prompts, options, max_new_tokens=6, taken=taken)
    alone = [generate_ids(model, TOKENIZER, [prompt], options, max_new_tokens=6)[0] for prompt in prompts]
    assert together == alone
    assert len(taken) == (6 if architecture == "prefix_lm" else 1)
    assert all(sorted(which) == list(range(len(SOME))) and len(counts) == len(SOME) for which, counts in taken)


@ARCHITECTURES
def test_of_samples_that_halt_the_models_own_greedy_answers_are_right_and_no_others(architecture):
    model, halt, _ = resting(architecture)
    model.head.weight.data[TOKENIZER.eos_id] *= 2  # some answers end early, and wait for the others
    prompts = [sample.prompt for sample in samples(*[(size, 1) for size in (9, 8, 7, 9, 8, 7, 8, 9) * 3])]

    def options(batch_size):
        return eval_options(batch_size, cycles=Cycles(12, 2, halt))

    answers = generate_ids(model, TOKENIZER, prompts, options(64), max_new_tokens=7)
    prompts, answers = zip(*[pair for pair in zip(prompts, answers) if pair[1]])
    assert len({*map(len, answers)}) > 1
    others = [[*answer[:-1], 4 if answer[-1] != 4 else 5] for answer in answers]
    shorter = [answer[:-1] for answer in answers]  # they would have to end there
    for responses, right in ((answers, True), (others, False), (shorter, False)):
        ends = [len(response) < len(answer) or len(answer) < 7 for response, answer in zip(responses, answers)]
        some = [Sample(prompt, *pair) for prompt, *pair in zip(prompts, responses, ends)]
        work = [Slice(0, 0, np.arange(len(some)), Ragged.of(some), options(size), 7, 0) for size in (64, 3, 1)]
        together, waiting, alone = (score(model, TOKENIZER, one) for one in work)
        assert together.right.tolist() == [right] * len(prompts)
        for scores in (together, waiting):
            assert scores.cycles == pytest.approx(alone.cycles), "whatever is beside a sample"


@ARCHITECTURES
def test_halting_never_is_taking_the_most(architecture):
    model = build(model__architecture=architecture)
    prompts = [sample.prompt for sample in SOME]
    fixed, halting = (
        generate_ids(model, TOKENIZER, prompts, eval_options(cycles=cycles), max_new_tokens=6)
        for cycles in (Cycles(4, 2), Cycles(4, 2, 1e-9))
    )
    assert fixed == halting


# --- puzzles -----------------------------------------------------------------------------------------------------


def test_a_puzzle_is_answered_in_its_places_by_generation_as_by_the_batch():
    model = build(model__architecture="puzzle")
    batch = batch_of(model)
    with torch.no_grad():
        states, _ = model.states(batch, Cycles(2, 2))
    whole = model.head(states[-1]).argmax(-1)
    answers = generate_ids(model, TOKENIZER, [sample.prompt for sample in SOME], eval_options(batch_size=3))
    for i, answer in enumerate(answers):
        mine = whole[batch.label_sample == i].tolist()
        length = min(len(mine), len(answer))
        assert answer[:length] == (mine[: mine.index(TOKENIZER.eos_id)] if TOKENIZER.eos_id in mine else mine)[:length]


def test_a_puzzle_goes_on_with_the_others_when_an_answer_ends_first():
    model = build(model__architecture="puzzle")
    prompts = [[5, 6, 7], [7, 6, 5], [6, 7, 8]]
    decoding = model.open(3, 3, 4, Cycles(2, 2))
    with torch.no_grad():
        model.prefill(torch.tensor(prompts), [3, 3, 3], TOKENIZER.bos_id, decoding)
        expected = decoding.answers[[2, 1]].clone()
        decoding.drop({0})
        logits = model.decode(torch.zeros(2, dtype=torch.long), decoding)
    torch.testing.assert_close(decoding.answers[:2], expected)
    torch.testing.assert_close(logits, model.head(expected[:, 1]))  # the first place was answered by the prefill


def test_places_of_a_puzzle_see_all_of_its_own_prompt():
    model = build(model__architecture="puzzle")
    changed = SOME[1]._replace(prompt=[*SOME[1].prompt[:-1], 4 + (SOME[1].prompt[-1] - 3) % (VOCAB - 4)])
    (a, _), (b, _) = (losses_by_sample(model, some, Cycles(2, 2)) for some in (SOME, [SOME[0], changed, *SOME[2:]]))
    torch.testing.assert_close(a[[0, 2, 3]], b[[0, 2, 3]])
    batches = [model.collate(Ragged.of([sample]), TOKENIZER) for sample in (SOME[1], changed)]
    with torch.no_grad():
        first, second = (model(batch, Cycles(2, 2)).predictions[-1].losses for batch in batches)
    assert not torch.isclose(first, second).any(), "every place looks at the last one"


def test_without_places_a_puzzle_takes_prompts_longer_than_those_trained_on():
    model = build(model__architecture="puzzle", model__places=False)
    assert not any("places" in name for name in model.state_dict())
    assert torch.equal(model.embed(torch.full((1, 9), 5)), model.embedding(torch.full((1, 9), 5)))


def test_a_response_that_is_longer_than_its_prompt_is_refused():
    with pytest.raises(UserError, match="a response of 4 tokens to a prompt of 3"):
        in_place(Ragged.of(samples((5, 5), (3, 4))), TOKENIZER)


def test_a_puzzle_run_resumes_bit_for_bit(tmp_path):
    fields = {
        "model__architecture": "puzzle", "model__hrm__inject": "gated", "model__hrm__shared": True, "train__segments": 2,
        "train__ema_decay": 0.9, "train__sample_h_cycles": [1, 3], "train__h_cycles_distribution": "poisson",
        "train__fixed_point": 0.1, "train__val_every": 1,
    }  # fmt: skip
    session = assert_resumes_exactly(small_config(**fields), tmp_path, 4, 9)
    assert load_model(session.last_checkpoint)[0].core.l_stack is None


def test_a_puzzle_learns(tmp_path):
    """One-digit sums: the answer stands in the first places of the question."""
    config = small_config(model__architecture="puzzle", model__d_model=32, train__steps=60, optim__lr=5e-3)
    losses = [metrics["val_loss"] for metrics in train_locally(config, tmp_path).reports]
    assert losses[-1] < 1.8, "ten characters at random would be 2.3"


def test_batches_of_puzzles_reach_the_model_as_those_of_others_do():
    config = small_config(model__architecture="puzzle", train__batch_size=4)
    splits = load_dataset(config.data, config.model, 0)
    (batch,) = next(batches_of(splits, config, collate=in_place))
    assert batch.ids.shape[0] == 4 and (batch.labels[batch.label_at >= 0] != -100).any()


# --- the commands ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ALL)
def test_evaluate_scores_samples_that_halt_beside_fixed_counts_and_says_how_long_they_thought(
    architecture, command, tmp_path
):
    config = small_config(model__architecture=architecture, train__steps=2, train__sample_h_cycles=[1, 3])
    folder = train_locally(config, tmp_path / "run").last_checkpoint
    code, out, err = command(evaluate, "--checkpoint", folder, "--h_cycles", "1,auto:1e9:6,auto:1e-9:3,3")
    assert code == 0, err
    first, soonest, latest, third = json.loads(out)
    score = lambda one, name: one["results"]["synthetic"][f"{name},none"]  # noqa: E731
    assert soonest["h_cycles"] == "auto:1e+09:6" and "mean_h_cycles,none" not in first["results"]["synthetic"]
    assert 1 <= score(soonest, "mean_h_cycles") <= 2 and score(latest, "mean_h_cycles") == 3
    assert score(latest, "val_loss") == pytest.approx(score(third, "val_loss"), abs=1e-4)
    (page,) = tmp_path.glob("evaluations/*/report.html")
    assert "auto (3.0)" in page.read_text() and "mean_h_cycles" in err

    asked = ["--checkpoint", folder, "--prompt", "What is 1 + 2?", "--h_cycles"]
    # Without a number it is the most of training, drawn counts included.
    (_, fixed, _), (code, auto, err) = command(generate, *asked, "3"), command(generate, *asked, "auto:1e-9")
    assert code == 0 and auto == fixed, err
