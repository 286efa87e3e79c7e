"""Transformers' HRM-Text and ours are one model: logits, gradients, generation, folders there and back."""

import json

import pytest
import torch
import yaml
from conftest import ROOT, small_config, train_locally, without_checksums
from safetensors.torch import load_file, save_file

from hrm_lm.commands.export import main as export
from hrm_lm.commands.generate import main as generate_main
from hrm_lm.commands.import_ import main as import_
from hrm_lm.commands.prepare import main as prepare
from hrm_lm.config import load_config
from hrm_lm.data.chat import render
from hrm_lm.data.collate import join
from hrm_lm.data.splits import Ragged, Sample
from hrm_lm.data.tokenizer import ByteTokenizer, SimpleTokenizer, resolve_tokenizer, same_tokens
from hrm_lm.errors import UserError
from hrm_lm.inference.generate import generate
from hrm_lm.interop.export import hf_tokenizer, hrm_text_config
from hrm_lm.interop.hrm_text import to_hrm_text
from hrm_lm.models.build import build_model
from hrm_lm.models.contract import layout
from hrm_lm.training.checkpoint import Progress, load_model, save_model
from hrm_lm.training.step import backprop_steps_of

transformers = pytest.importorskip("transformers")
TOKENIZER = SimpleTokenizer("What is+?0123456789\n")
SHAPES = {
    "two_cycles": dict(d_model=32, n_heads=4, h_cycles=2, l_cycles=3, layers=1, backprop_steps=5),
    "one_h_cycle": dict(d_model=48, n_heads=2, h_cycles=1, l_cycles=2, layers=2, backprop_steps="all"),
    "three_h_cycles": dict(d_model=64, n_heads=8, h_cycles=3, l_cycles=1, layers=1, backprop_steps=4),
    "one_l_step": dict(d_model=32, n_heads=2, h_cycles=2, l_cycles=2, layers=2, backprop_steps=3),
}
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def random_checkpoint(folder, d_model, n_heads, h_cycles, l_cycles, layers, backprop_steps, **overrides):
    config = small_config(
        model__architecture="prefix_lm", model__d_model=d_model, model__n_heads=n_heads, model__hrm__h_cycles=h_cycles,
        model__hrm__l_cycles=l_cycles, model__hrm__h_layers=layers, model__hrm__l_layers=layers,
        model__hrm__backprop_steps=backprop_steps, model__max_response_len=20, **overrides,
    )  # fmt: skip
    torch.manual_seed(d_model)
    folder.mkdir()
    save_model(folder, build_model(config.model, TOKENIZER.vocab_size), config, TOKENIZER, Progress(val_loss=1.5))
    return folder


def random_batch():
    generator = torch.Generator().manual_seed(2)
    draw = lambda n: torch.randint(4, TOKENIZER.vocab_size, (n,), generator=generator).tolist()  # noqa: E731
    return join(Ragged.of([Sample(draw(s), draw(t)) for s, t in [(3, 5), (40, 1), (9, 0), (1, 16)]]), TOKENIZER)


def their_logits(hf_model, batch):
    """Transformers' logits, brought to where `batch.labels` are."""
    places = torch.arange(batch.ids.shape[1])
    mask = (places < batch.lengths[:, None]).long()
    prompt = ((batch.sees_to > places) | (places == batch.sees_to[:, :1])).long()  # a response token sees itself last
    logits = hf_model(input_ids=batch.ids, attention_mask=mask, token_type_ids=prompt).logits
    return logits.flatten(0, 1)[batch.label_at]


def our_logits(model, batch):
    return model.head(model.states(batch, model.config.hrm.cycles)[0][-1])


def assert_same_logits(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def save_transformers_folder(folder, tokenizer_folder, shape):
    """Random weights of Transformers' own, with another embedding scale and 7 more rows than the tokenizer has tokens."""
    torch.manual_seed(1)
    hf_model = transformers.HrmTextForCausalLM(
        transformers.HrmTextConfig(
            vocab_size=TOKENIZER.vocab_size + 7, hidden_size=shape["d_model"], intermediate_size=512,
            num_hidden_layers=shape["layers"], num_attention_heads=shape["n_heads"], H_cycles=shape["h_cycles"],
            head_dim=shape["d_model"] // shape["n_heads"], L_cycles=shape["l_cycles"], initializer_range=0.1,
            embedding_scale=3.0, pad_token_id=0, bos_token_id=1, eos_token_id=[2, 3], max_position_embeddings=90,
        )
    ).eval()  # fmt: skip
    torch.nn.init.normal_(hf_model.model.z_L_init)
    hf_model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tokenizer_folder / name).read_bytes())
    return hf_model


@pytest.fixture
def export_to(tmp_path, command):
    def run(checkpoint):
        code, out, err = command(export, "--checkpoint", checkpoint, "--output", tmp_path / "hf")
        assert code == 0, err
        return tmp_path / "hf"

    return run


# --- the same function -------------------------------------------------------------------------------------------


@EVERY_SHAPE
def test_an_exported_model_gives_the_same_logits_in_transformers(tmp_path, export_to, shape):
    model, _, _ = load_model(random_checkpoint(tmp_path / "ours", **shape))
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(export_to(tmp_path / "ours"))
    batch = random_batch()
    with torch.no_grad():
        assert_same_logits(our_logits(model, batch), their_logits(hf_model, batch))


@EVERY_SHAPE
def test_an_imported_model_gives_the_same_logits_here(tmp_path, command, export_to, shape):
    hf_model = save_transformers_folder(
        tmp_path / "theirs", export_to(random_checkpoint(tmp_path / "ours", **shape)), shape
    )
    code, _, err = command(import_, "--input", tmp_path / "theirs", "--output", tmp_path / "back")
    assert code == 0, err
    model, tokenizer, checkpoint = load_model(tmp_path / "back")
    batch = random_batch()
    with torch.no_grad():
        assert_same_logits(our_logits(model, batch), their_logits(hf_model, batch))
    assert tokenizer.encode("What is 1 + 2?") == TOKENIZER.encode("What is 1 + 2?")
    assert tokenizer.decode([2, *TOKENIZER.encode("a 7\n"), 0]) == "a 7\n"
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert checkpoint.config.model.max_prompt_len + checkpoint.config.model.max_response_len == 90
    assert (checkpoint.config.model.vocab_size, tokenizer.vocab_size) == (
        TOKENIZER.vocab_size + 7,
        TOKENIZER.vocab_size,
    )


@EVERY_SHAPE
def test_gradients_agree_where_the_windows_do(tmp_path, export_to, shape):
    model, _, checkpoint = load_model(random_checkpoint(tmp_path / "ours", **shape))
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(export_to(tmp_path / "ours"))
    batch = random_batch()
    hrm = checkpoint.config.model.hrm
    model.train()(batch, hrm.cycles, backprop_steps_of(hrm, 0, hrm.cycles)).predictions[-1].losses.sum().backward()
    torch.nn.functional.cross_entropy(their_logits(hf_model.train(), batch), batch.labels, reduction="sum").backward()
    ours = to_hrm_text({name: p.grad for name, p in model.named_parameters()})
    theirs = {name: p.grad for name, p in hf_model.named_parameters() if p.requires_grad}
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert theirs[name].norm() > 0
        assert (ours[name] - theirs[name]).norm() < 1e-4 * theirs[name].norm(), name


# --- generation --------------------------------------------------------------------------------------------------


@EVERY_SHAPE
def test_greedy_generation_is_theirs_token_for_token(tmp_path, export_to, shape):
    model, tokenizer, _ = load_model(random_checkpoint(tmp_path / "ours", **shape))
    folder = export_to(tmp_path / "ours")
    hf_model, hf_tokenizer = (
        kind.from_pretrained(folder) for kind in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer)
    )
    prompts = ["What is 1 + 2?", "7", "123 + 456 is\nWhat 0123456789"]
    inputs = hf_tokenizer(prompts, return_tensors="pt", padding=True)
    assert inputs["token_type_ids"].equal(inputs["attention_mask"]) and not inputs["attention_mask"].all()
    output = hf_model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
    theirs = hf_tokenizer.batch_decode(output, skip_special_tokens=True)
    assert generate(model, tokenizer, prompts) == theirs
    assert len({len(text) for text in theirs} | set(theirs)) > 1, "answers that tell"


def test_the_presets_have_the_published_shapes():
    """XL's numbers are those of the released config.json; the vocabulary is its tokenizer's."""
    published = {"b": (1024, 2816, 6, 8), "l": (1280, 3584, 12, 10), "xl": (1536, 4096, 16, 12)}
    for size, (hidden, intermediate, layers, heads) in published.items():
        config = load_config(ROOT / "configs" / f"hrm_text_{size}.yaml")
        theirs = hrm_text_config(config.model, TOKENIZER)
        assert (theirs.hidden_size, theirs.intermediate_size, theirs.num_layers_per_stack) == (
            hidden,
            intermediate,
            layers,
        )
        assert (theirs.num_attention_heads, theirs.head_dim) == (heads, 128)
        assert (theirs.H_cycles, theirs.L_cycles, theirs.L_bp_cycles) == (2, 3, [0, 3])
        assert theirs.max_position_embeddings == 4096
        hrm, fifth = config.model.hrm, config.train.steps // 5
        windows = [backprop_steps_of(hrm, step, hrm.cycles) for step in (0, fifth // 2, fifth - 1, fifth)]
        assert windows == [2, 3, 4, 5]


# --- folders -----------------------------------------------------------------------------------------------------


def test_a_trained_checkpoint_survives_the_way_there_and_back_and_trains_on(tmp_path, command, export_to):
    (tmp_path / "sums.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{a}+{b}", "response": str(a + b)}) + "\n" for a in range(9) for b in range(9))
    )
    options = dict(model__architecture="prefix_lm", data__dataset=str(tmp_path / "sums.jsonl"), train__steps=80)
    train_locally(small_config(**options, optim__lr=0.01), tmp_path / "run")
    first = max((tmp_path / "run").glob("step_*"))
    folder = export_to(first)
    card = (folder / "README.md").read_text()
    assert "validation exact match" in card and "architecture: prefix_lm" in card
    assert command(import_, "--input", folder, "--output", tmp_path / "back")[0] == 0
    ask = lambda path: command(generate_main, "--checkpoint", path, "--prompt", "3+4", "--prompt", "8+8")[1]  # noqa: E731
    assert ask(tmp_path / "back") == ask(first) and ask(first).strip()

    again = small_config(**options, train__init_from=str(tmp_path / "back"), model__max_response_len=64,
                         data__tokenizer=str(tmp_path / "back" / "tokenizer.json"))  # fmt: skip
    session = train_locally(again, tmp_path / "again")
    assert session.reports[-1]["step"] == 80
    with pytest.raises(UserError, match="another tokenizer than the dataset; data.tokenizer names"):
        train_locally(small_config(**options, train__init_from=str(tmp_path / "back")), tmp_path / "wrong")


def test_a_model_with_more_rows_than_its_tokenizer_has_tokens_trains_on_a_corpus_prepared_with_it(
    cluster, tmp_path, command, export_to
):
    shape = SHAPES["two_cycles"]
    folder = tmp_path / "theirs"
    save_transformers_folder(folder, export_to(random_checkpoint(tmp_path / "ours", **shape)), shape)
    lines = [json.dumps({"prompt": f"What is {a} + {a}?", "response": f"{2 * a}"}) + "\n" for a in range(40)]
    (tmp_path / "sums.jsonl").write_text("".join(lines))
    options = ["--input", tmp_path / "sums.jsonl", "--output", tmp_path / "corpus", "--val_fraction", 0.3]
    code, _, err = command(prepare, *options, "--tokenizer", folder)
    assert code == 0, err
    back = tmp_path / "back"
    assert command(import_, "--input", folder, "--output", back)[0] == 0

    overrides = {"data.dataset": str(tmp_path / "corpus"), "train.init_from": str(back), "train.batch_size": 4}
    session = train_locally(load_config(back / "config.yaml", overrides | {"train.steps": 2}), tmp_path / "run")
    assert session.reports[-1]["step"] == 2
    last = max((tmp_path / "run").glob("step_*"))
    model, tokenizer, checkpoint = load_model(last)
    assert len(model.embedding.weight) == TOKENIZER.vocab_size + 7
    assert len(generate(model, tokenizer, ["What is 3 + 3?"], max_new_tokens=3)) == 1
    assert hrm_text_config(checkpoint.config.model, tokenizer).vocab_size == TOKENIZER.vocab_size + 7


def test_a_checkpoint_imported_by_an_older_version_loads(tmp_path, command, export_to):
    """Its tokenizer.json holds the model's vocabulary size, and its config no model.vocab_size."""
    shape = SHAPES["two_cycles"]
    folder, back = tmp_path / "theirs", tmp_path / "back"
    hf_model = save_transformers_folder(folder, export_to(random_checkpoint(tmp_path / "ours", **shape)), shape)
    assert command(import_, "--input", folder, "--output", back)[0] == 0
    tokenizer = json.loads((back / "tokenizer.json").read_text())
    (back / "tokenizer.json").write_text(json.dumps(tokenizer | {"vocab_size": TOKENIZER.vocab_size + 7}))
    config = yaml.safe_load((back / "config.yaml").read_text())
    assert config["model"].pop("vocab_size") == TOKENIZER.vocab_size + 7
    (back / "config.yaml").write_text(yaml.safe_dump(config))
    without_checksums(back)
    model, tokenizer, _ = load_model(back)
    batch = random_batch()
    with torch.no_grad():
        assert_same_logits(our_logits(model, batch), their_logits(hf_model, batch))
    assert same_tokens(tokenizer, resolve_tokenizer(str(folder)))


@pytest.mark.parametrize(
    "overrides, message",
    [
        (dict(model__architecture="encoder_decoder"), "only prefix_lm with H-cycles can be exported"),
        (dict(h_cycles=0), "only prefix_lm with H-cycles can be exported"),
        (dict(model__hrm__h_layers=2), r"h_layers (2) and l_layers (1) differ"),
    ],
)
def test_what_transformers_does_not_have_is_refused_in_a_line(tmp_path, command, overrides, message):
    fields = SHAPES["two_cycles"] | overrides
    shape = {key: fields.pop(key) for key in SHAPES["two_cycles"]}
    config = dict(
        model__architecture="prefix_lm", model__d_model=32, model__n_heads=4, model__hrm__h_cycles=shape["h_cycles"]
    )
    config = small_config(**config | fields)
    (tmp_path / "ours").mkdir()
    save_model(tmp_path / "ours", build_model(config.model, TOKENIZER.vocab_size), config, TOKENIZER, Progress())
    code, out, err = command(export, "--checkpoint", tmp_path / "ours", "--output", tmp_path / "hf")
    assert code == 2 and message in err and len(err.splitlines()) == 1 and not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "llama"}, "model_type is 'llama', not 'hrm_text'"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_theta is 500000.0"),
        ({"eos_token_id": None}, None),
    ],
)
def test_a_folder_of_another_model_is_refused_in_a_line(tmp_path, command, export_to, change, message):
    folder = export_to(random_checkpoint(tmp_path / "ours", **SHAPES["two_cycles"]))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    code, out, err = command(import_, "--input", folder, "--output", tmp_path / "back")
    if message is None:  # the tokenizer's own config says it too
        assert code == 0 and load_model(tmp_path / "back")[1].eos_id == TOKENIZER.eos_id
        return
    assert code == 2 and message in err and len(err.splitlines()) == 1 and not (tmp_path / "back").exists()


def test_a_causal_model_is_a_causal_model_there_and_back(tmp_path, command, export_to):
    folder = random_checkpoint(tmp_path / "ours", **SHAPES["two_cycles"], model__mask="causal")
    exported = export_to(folder)
    model, *_ = load_model(folder)
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(exported)
    batch = layout(model, None)(Ragged.of([Sample([5, 6, 7, 8, 9], [10, 11])]), TOKENIZER, False)
    with torch.no_grad():
        assert_same_logits(our_logits(model, batch), hf_model(input_ids=batch.ids).logits.flatten(0, 1)[batch.label_at])
    code, _, err = command(import_, "--input", exported, "--output", tmp_path / "back")
    assert code == 0, err
    assert load_model(tmp_path / "back")[2].config.model.mask == "causal"


@pytest.mark.parametrize("fields", [{"model__hrm__inject": "add"}, {"model__hrm__shared": True}])
def test_a_recurrence_that_transformers_does_not_have_is_refused(tmp_path, command, fields):
    folder = random_checkpoint(tmp_path / "ours", **SHAPES["two_cycles"], **fields)
    code, _, err = command(export, "--checkpoint", folder, "--output", tmp_path / "hf")
    assert code == 2 and "no counterpart in Transformers" in err and len(err.splitlines()) == 1


def test_without_transformers_the_message_says_what_to_install(tmp_path, command, monkeypatch):
    import sys

    folder = random_checkpoint(tmp_path / "ours", **SHAPES["two_cycles"])
    monkeypatch.setitem(sys.modules, "transformers", None)
    code, _, err = command(export, "--checkpoint", folder, "--output", tmp_path / "hf")
    assert code == 2 and "pip install 'hrm-lm[interop]'" in err


@pytest.mark.parametrize(
    "tokenizer", [ByteTokenizer(), SimpleTokenizer.from_texts(["héllo ∑\n\t 7"])], ids=["bytes", "characters"]
)
def test_an_exported_tokenizer_gives_the_same_ids_and_text(tmp_path, tokenizer):
    hf_tokenizer(tokenizer).save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("héllo ∑\n", "  l\t77", "\n"):
        assert theirs(text)["input_ids"] == tokenizer.encode(text)
        assert (
            theirs.decode([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id], skip_special_tokens=True)
            == text
        )


@pytest.mark.parametrize("template", [None, "{% for m in messages %}{{ m.content }}|{% endfor %}{{ eos_token }}"])
def test_an_exported_tokenizer_writes_conversations_as_ours_does_and_keeps_that_on_the_way_back(tmp_path, template):
    hf_tokenizer(ByteTokenizer()).save_pretrained(tmp_path / "first")
    (tmp_path / "first/chat_template.jinja").unlink()
    ours = resolve_tokenizer(str(tmp_path / "first"))
    assert ours.chat_template is None
    ours.chat_template = template
    hf_tokenizer(ours).save_pretrained(tmp_path / "second")
    theirs, back = (
        transformers.AutoTokenizer.from_pretrained(tmp_path / "second"),
        resolve_tokenizer(str(tmp_path / "second")),
    )
    contents = ["2 + 2", "4", "and 3?"]
    for n in (1, 3):
        asked = [{"role": role, "content": text} for role, text in zip(["user", "assistant", "user"][:n], contents)]
        expected = theirs.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        assert render(ours, asked) == render(back, asked) == expected


def test_a_model_that_is_not_whole_is_refused_and_not_filled_up_with_random_weights(tmp_path, command, export_to):
    folder = export_to(random_checkpoint(tmp_path / "ours", **SHAPES["two_cycles"]))
    weights = load_file(folder / "model.safetensors")
    name = "model.L_module.layers.0.mlp.down_proj.weight"
    save_file({key: tensor for key, tensor in weights.items() if key != name}, folder / "model.safetensors")
    run = lambda: command(import_, "--input", folder, "--output", tmp_path / "back")  # noqa: E731
    code, _, err = run()
    assert code == 2 and f"not a whole model: {name} is missing" in err and not (tmp_path / "back").exists()

    save_file(weights | {name: weights[name].T.contiguous()}, folder / "model.safetensors")
    code, _, err = run()
    assert code == 2 and "cannot be loaded" in err and not (tmp_path / "back").exists()

    save_file(weights, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 10_000_000}))
    code, _, err = run()  # before memory is taken for it
    assert code == 2 and "has no safetensors files for the" in err

    (folder / "config.json").write_text(json.dumps(config))
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "another"}')
    code, _, err = run()
    assert code == 2 and "holds an adapter to another model" in err


def test_what_a_config_names_beside_the_model_is_left_out(tmp_path, command, export_to):
    folder = export_to(random_checkpoint(tmp_path / "ours", **SHAPES["two_cycles"]))
    config = json.loads((folder / "config.json").read_text())
    names = {"attn_implementation": "someone/kernel", "_attn_implementation": "someone/kernel", "__class__": "x",
             "quantization_config": {"quant_method": "bitsandbytes"}, "auto_map": {"AutoConfig": "code.Config"}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config | names))
    code, _, err = command(import_, "--input", folder, "--output", tmp_path / "back")
    assert code == 0, err
