"""lm-evaluation-harness: our model class, against the harness's own where both read alike, and against the model itself."""

import json
import sys

import pytest
import torch
from conftest import small_config

from hrm_lm.commands.export import main as export
from hrm_lm.commands.lm_eval import main as lm_eval_command
from hrm_lm.config import Cycles
from hrm_lm.data.splits import Ragged, Sample
from hrm_lm.data.tokenizer import SimpleTokenizer
from hrm_lm.models.build import build_model
from hrm_lm.models.contract import EvalOptions
from hrm_lm.models.decoding import generate_ids
from hrm_lm.training.checkpoint import Progress, load_model, save_model

pytest.importorskip("lm_eval")
pytest.importorskip("transformers")
TOKENIZER = SimpleTokenizer("What is+?0123456789\n")


def instances(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, one, i) for i, one in enumerate(arguments)]


def random_checkpoint(folder, architecture, h_cycles=2):
    config = small_config(
        model__architecture=architecture, model__d_model=32, model__n_heads=4, model__max_response_len=24,
        model__max_prompt_len=16, model__hrm__h_cycles=h_cycles,
    )  # fmt: skip
    torch.manual_seed(3)
    model = build_model(config.model, TOKENIZER.vocab_size)
    with torch.no_grad():  # sure of itself, so that a wrong reading is far off
        model.head.weight *= 8
    folder.mkdir()
    save_model(folder, model, config, TOKENIZER, Progress())
    return folder


@pytest.fixture(scope="module")
def prefix_lm(tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("harness") / "checkpoint", "prefix_lm")


@pytest.fixture(scope="module")
def models(prefix_lm):
    """Ours, and the harness's own on an export of the same checkpoint."""
    from lm_eval.models.huggingface import HFLM

    from hrm_lm.evaluation.harness import HarnessModel

    assert export(["--checkpoint", str(prefix_lm), "--output", str(prefix_lm.parent / "exported")]) == 0
    theirs = HFLM(pretrained=str(prefix_lm.parent / "exported"), device="cpu", dtype="float32", batch_size=3)
    return HarnessModel(checkpoint=str(prefix_lm), batch_size=3), theirs


def test_a_prompt_of_one_token_or_none_is_read_as_the_harness_reads_an_export(models):
    pairs = [
        ("W", "hat is 1+2?"),
        ("", "3+4"),
        ("7", "8"),
        ("?", "0123456789+01234567"),
        ("", "What is 9?"),
        ("+", "\n\n"),
    ]
    requests = instances("loglikelihood", *pairs)
    (ours, greedy), (theirs, their_greedy) = (zip(*model.loglikelihood(requests)) for model in models)
    assert torch.tensor(ours) == pytest.approx(torch.tensor(theirs), abs=1e-4) and greedy == their_greedy
    texts = instances("loglikelihood_rolling", ("What is 12+3?",), ("0",), ("9+9+9+9+9+9+9",))
    ours, theirs = (model.loglikelihood_rolling(texts) for model in models)
    assert ours == pytest.approx(theirs, abs=1e-4)
    asked = instances("generate_until", *((prompt, {"until": [], "max_gen_toks": 24}) for prompt in "W7?+"))
    ours, theirs = (model.generate_until(asked) for model in models)
    assert ours == theirs


def test_a_longer_prompt_is_read_both_ways_which_the_harness_does_not(models, prefix_lm):
    import transformers

    pairs = [("What is 1+2?", "3"), ("What is 9+9?", "18\n"), ("123456789", "0")]
    requests = instances("loglikelihood", *pairs)
    ours, theirs = ([logprob for logprob, _ in model.loglikelihood(requests)] for model in models)
    hf = transformers.AutoModelForCausalLM.from_pretrained(prefix_lm.parent / "exported").eval()
    both_ways = []
    for prompt, text in pairs:
        ids = torch.tensor([TOKENIZER.encode(prompt + text)])
        sees = torch.tensor([[1] * len(prompt) + [0] * len(text)])
        with torch.no_grad():
            logprobs = hf(input_ids=ids, token_type_ids=sees).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
        both_ways.append(logprobs.gather(1, ids[0, len(prompt) :, None]).sum().item())
    assert ours == pytest.approx(both_ways, abs=1e-4)
    assert all(abs(a - b) > 1e-2 for a, b in zip(ours, theirs))


@pytest.mark.parametrize("architecture, h_cycles", [("prefix_lm", 0), ("encoder_decoder", 2), ("encoder_decoder", 0)])
def test_log_likelihoods_are_the_models_own(tmp_path, architecture, h_cycles):
    from hrm_lm.evaluation.harness import HarnessModel

    folder = random_checkpoint(tmp_path / "checkpoint", architecture, h_cycles)
    ours, (model, tokenizer, _) = HarnessModel(checkpoint=str(folder), batch_size=2), load_model(folder)
    pairs = [("What is 1+2?", "3"), ("1", "18\n"), ("", "0"), ("9+9", "18"), ("0" * 30, "1")]
    cycles = Cycles(h_cycles, model.config.hrm.l_cycles)
    for (context, text), (logprob, greedy) in zip(
        pairs, ours.loglikelihood(instances("loglikelihood", *pairs)), strict=True
    ):
        prompt = tokenizer.encode(context)[-16:] or [tokenizer.bos_id]
        batch = model.collate(Ragged.of([Sample(prompt, tokenizer.encode(text), ends=False)]), tokenizer)
        with torch.no_grad():
            prediction = model(batch, cycles).predictions[-1]
        assert logprob == pytest.approx(-prediction.losses.sum().item(), abs=1e-4)
        said = generate_ids(model, tokenizer, [prompt], EvalOptions(cycles=cycles), max_new_tokens=len(text))
        assert greedy == (said == [tokenizer.encode(text)])


def test_a_text_that_is_longer_than_a_window_has_what_stands_before_as_its_prompt(models):
    ours, text = models[0], "What is 12+3? What is 4+56? What is 7?"
    ids = TOKENIZER.encode(text)  # 38, of which a window takes 24, and a prompt 16
    parts = ours.score([Sample([TOKENIZER.bos_id], ids[:24], False), Sample(ids[8:24], ids[24:], False)])
    (whole,) = ours.loglikelihood_rolling(instances("loglikelihood_rolling", (text,)))
    assert whole == pytest.approx(sum(logprob for logprob, _ in parts), abs=1e-4)


def test_answers_end_at_a_stop_text_and_requests_may_differ(models):
    ours = models[0]
    ask = lambda prompt, **said: ours.generate_until(instances("generate_until", (prompt, said)))[0]  # noqa: E731
    whole = ask("What is 1+2?", until=[], max_gen_toks=12)
    middle = whole[len(whole) // 2]
    mixed = ours.generate_until(
        instances(
            "generate_until", ("What is 1+2?", {"until": [middle], "max_gen_toks": 12}),
            ("What is 1+2?", {"until": [], "max_gen_toks": 3}), ("What is 1+2?", {"until": "", "max_gen_toks": 12}),
        )
    )  # fmt: skip
    assert mixed == [whole[: whole.index(middle)], whole[:3], whole] and len(whole) > 3
    hot = dict(do_sample=True, temperature=9.0, max_gen_toks=12)
    assert ask("1", **hot, seed=1) == ask("1", **hot, seed=1) != ask("1", **hot, seed=2)


@pytest.mark.slow
def test_the_command_runs_the_harness_with_our_model(command, prefix_lm, tmp_path, monkeypatch):
    (tmp_path / "sums.jsonl").write_text("".join(f'{{"q": "What is {i}+1?", "a": "{i + 1}"}}\n' for i in range(4)))
    (tmp_path / "sums.yaml").write_text(
        f"task: sums\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/sums.jsonl}}}}\ntest_split: test\n"
        "output_type: generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\ngeneration_kwargs: {until: [\"\\n\"]}\n"
        "metric_list: [{metric: exact_match}]\n"
    )
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr(sys, "argv", ["hrm-lm"])
    code, out, err = command(
        lm_eval_command, "--model", "hrm_lm", "--model_args", f"checkpoint={prefix_lm},h_cycles=1",
        "--tasks", tmp_path / "sums.yaml", "--output_path", tmp_path / "out",
    )  # fmt: skip
    assert code == 0 and "exact_match" in out, err
    (results,) = (tmp_path / "out").rglob("results_*.json")
    written = json.loads(results.read_text())
    assert written["results"]["sums"]["exact_match,none"] == 0 and written["config"]["h_cycles"] == 1


def test_what_a_user_can_mend_is_a_line(command, prefix_lm):
    from hrm_lm.evaluation.harness import HarnessModel

    def tried(requests=None, **arguments):
        def run(_):
            ours = HarnessModel(**arguments)
            return requests(ours)

        code, out, err = command(run)
        return code, err.splitlines()[-1]

    ask = lambda kind, *args: lambda ours: getattr(ours, kind)(instances(kind, args))  # noqa: E731
    mine = {"checkpoint": str(prefix_lm)}
    assert tried(checkpoint="/nowhere") == (2, "error: /nowhere: no such checkpoint folder")
    assert tried(**mine, h_cycles=0)[1].startswith("error: --h_cycles must be at least 1")
    assert "character 'é'" in tried(ask("loglikelihood", "é", "1"), **mine)[1]
    assert "log-likelihood of an empty text" in tried(ask("loglikelihood", "1", ""), **mine)[1]
    assert "gen_kwargs: top_p is not among" in tried(ask("generate_until", "1", {"top_p": 0.5}), **mine)[1]
