"""Which tokenizer a name gives, from where, and when two of them may stand for one another."""

import json

import pytest

from hrm_lm.config import ModelConfig
from hrm_lm.data.tokenizer import (
    ByteTokenizer,
    PretrainedTokenizer,
    SimpleTokenizer,
    model_vocab_size,
    resolve_tokenizer,
    same_tokens,
)
from hrm_lm.errors import UserError

VOCABULARY = {"a": 0, "<s>": 1, "</s>": 2, "END": 3, "b": 4, "c": 5}


def definition(**changes):
    """A Hugging Face tokenizer.json of words."""
    model = {"type": "WordLevel", "vocab": VOCABULARY, "unk_token": "a"}
    return {"version": "1.0", "model": model, "pre_tokenizer": {"type": "Whitespace"}, "added_tokens": []} | changes


CUTS_AND_PADS = {
    "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
    "padding": {
        "strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 1, "pad_type_id": 0,
        "pad_token": "<s>",
    },
}  # fmt: skip


def write(path, fields):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(fields))
    return str(path)


def test_a_tokenizer_comes_back_from_its_file(tmp_path):
    tokenizer = SimpleTokenizer.from_texts(["héllo", "wörld ∑"])
    (tmp_path / "t.json").write_text(tokenizer.to_json(), encoding="utf-8")
    again = resolve_tokenizer(str(tmp_path / "t.json"))
    assert again.decode(again.encode("whéö ∑")) == "whéö ∑" and again.to_json() == tokenizer.to_json()


def test_an_unknown_character_is_an_error_or_an_id():
    with pytest.raises(UserError, match="'z'"):
        SimpleTokenizer("ab").encode("az")
    assert SimpleTokenizer("ab", unknown="id").encode("az") == [4, SimpleTokenizer.unk_id]


@pytest.mark.parametrize("tokenizer", [SimpleTokenizer("ab"), ByteTokenizer()], ids=["characters", "bytes"])
def test_ids_beyond_the_vocabulary_leave_no_text(tokenizer):
    """A model whose `model.vocab_size` is larger than the tokenizer's may answer with them."""
    assert tokenizer.decode([*tokenizer.encode("ab"), tokenizer.vocab_size, 65_535]) == "ab"


def test_bytes_take_any_text_and_come_back_from_their_file(tmp_path):
    (tmp_path / "t.json").write_text(ByteTokenizer().to_json())
    tokenizer = resolve_tokenizer(str(tmp_path / "t.json"))
    ids = tokenizer.encode("h\xe9\U0001f600\x00")
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == "h\xe9\U0001f600\x00"
    assert max(ids) < tokenizer.vocab_size == 259


# --- names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["file", "folder", "folder/", "uri of file", "uri of folder"])
@pytest.mark.parametrize("kind", ["ours", "hugging face"])
def test_a_tokenizer_is_named_by_its_file_folder_or_uri(tmp_path, kind, place):
    fields = json.loads(SimpleTokenizer("abc").to_json()) if kind == "ours" else definition()
    write(tmp_path / "t/tokenizer.json", fields)
    write(tmp_path / "t/tokenizer_config.json", {"eos_token": "END"})
    path = tmp_path / "t/tokenizer.json" if "file" in place else tmp_path / "t"
    name = f"file://{path}" if "uri" in place else f"{path}{'/' * place.endswith('/')}"
    tokenizer = resolve_tokenizer(name)
    assert type(tokenizer) is (SimpleTokenizer if kind == "ours" else PretrainedTokenizer)
    assert tokenizer.encode("b") == ([5] if kind == "ours" else [4])
    assert kind == "ours" or tokenizer.eos_id == 3


def test_a_tokenizer_that_cannot_be_had_is_a_line_with_flag_path_and_reason(tmp_path):
    bad = {
        str(tmp_path / "nothing.json"): r"nothing.json cannot be read: No such file",
        str(tmp_path): r"/tokenizer.json cannot be read: No such file",
        "s4://bucket/t.json": r"s4://bucket/t.json: ",
        "characters": "characters needs a text to take them from; here, give bytes or a tokenizer.json",
        write(tmp_path / "list.json", [1]): r"list.json is not a usable tokenizer: not a tokenizer of a known type",
        write(tmp_path / "other.json", {"a": 1}): r"other.json is not a usable tokenizer: neither this project's",
        write(
            tmp_path / "cut.json", definition(model={"type": "BPE"})
        ): r"cut.json is not a usable tokenizer: it has no",
        write(tmp_path / "type.json", {"type": "words"}): r"type.json is not a usable tokenizer: not a tokenizer of a",
    }
    (tmp_path / "text.json").write_text("{")
    for name, reason in (bad | {str(tmp_path / "text.json"): "text.json is not a usable tokenizer: Expecting"}).items():
        with pytest.raises(UserError, match=f"^--tokenizer: .*{reason}"):
            resolve_tokenizer(name, "--tokenizer")


def test_special_tokens_are_the_callers_those_of_the_config_beside_or_those_with_usual_names(tmp_path):
    name = write(tmp_path / "tokenizer.json", definition())
    usual = resolve_tokenizer(name)
    assert (usual.pad_id, usual.bos_id, usual.eos_id, usual.vocab_size) == (2, 1, 2, 6)
    write(tmp_path / "tokenizer_config.json", {"eos_token": {"content": "END"}, "pad_token": None})
    named = resolve_tokenizer(name)
    assert (named.pad_id, named.bos_id, named.eos_id) == (3, 1, 3)
    known = resolve_tokenizer(name, special_ids={"eos": 9, "pad": 0})
    assert (known.pad_id, known.bos_id, known.eos_id, known.vocab_size) == (0, 1, 9, 10)
    (tmp_path / "tokenizer_config.json").unlink()
    write(tmp_path / "tokenizer.json", definition(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}))
    with pytest.raises(UserError, match="data.tokenizer: .*tokenizer.json .* has no end-of-text token"):
        resolve_tokenizer(name)


def test_special_tokens_of_a_unigram_vocabulary_are_found(tmp_path):
    model = {"type": "Unigram", "vocab": [["<unk>", 0.0], ["</s>", -1.0], ["a", -2.0]], "unk_id": 0}
    tokenizer = resolve_tokenizer(write(tmp_path / "tokenizer.json", definition(model=model)))
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (1, 3)


# --- truncation and padding --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ours", "hugging face"])
def test_truncation_and_padding_of_a_tokenizer_file_neither_cut_nor_pad_a_text(tmp_path, kind):
    """As Hugging Face writes them, and as an older checkpoint or prepared dataset still holds them."""
    fields = definition(**CUTS_AND_PADS)
    if kind == "ours":
        fields = {"type": "tokenizers", "definition": fields, "pad_id": 2, "bos_id": 1, "eos_id": 2, "vocab_size": 40}
    tokenizer = resolve_tokenizer(write(tmp_path / "tokenizer.json", fields))
    assert tokenizer.encode("a b c b") == [0, 4, 5, 4]
    assert tokenizer.encode_batch(["a b c b", "c"]) == [[0, 4, 5, 4], [5]]
    kept = json.loads(tokenizer.to_json())["definition"]
    assert kept["truncation"] is None and kept["padding"] is None


# --- two tokenizers, and a model ---------------------------------------------------------------------------------


def test_tokenizers_are_the_same_where_they_give_a_sample_the_same_ids():
    def pretrained(pad=2, bos=1, eos=2, size=6, **changes):
        return PretrainedTokenizer(definition(**changes), pad, bos, eos, size)

    assert same_tokens(pretrained(), pretrained(size=60, pad=0, **CUTS_AND_PADS))
    assert not same_tokens(pretrained(), pretrained(eos=3))
    assert not same_tokens(pretrained(), pretrained(bos=3))
    assert not same_tokens(pretrained(), pretrained(pre_tokenizer={"type": "WhitespaceSplit"}))
    assert not same_tokens(pretrained(), ByteTokenizer())
    assert same_tokens(SimpleTokenizer("ab"), SimpleTokenizer("ba"))
    assert not same_tokens(SimpleTokenizer("ab"), SimpleTokenizer("abc"))


def test_a_model_may_hold_more_tokens_than_its_tokenizer_but_not_fewer():
    assert model_vocab_size(ModelConfig(), ByteTokenizer()) == 259
    assert model_vocab_size(ModelConfig(vocab_size=300), ByteTokenizer()) == 300
    with pytest.raises(UserError, match="model.vocab_size: 258 is less than the 259 tokens of the tokenizer"):
        model_vocab_size(ModelConfig(vocab_size=258), ByteTokenizer())


def test_a_tokenizer_file_that_says_less_tokens_than_it_has_is_refused(tmp_path):
    fields = dict(type="tokenizers", definition=definition(), pad_id=0, bos_id=1, eos_id=2, vocab_size=5)
    write(tmp_path / "t.json", fields)
    with pytest.raises(UserError, match="t.json is not a usable tokenizer: it has ids up to 5, its vocab_size says 5"):
        resolve_tokenizer(str(tmp_path / "t.json"))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"type": "characters", "characters": "a\ud800"}, "surrogates not allowed"),
        ({"type": "characters", "characters": 5}, "'int' object has no attribute 'encode'"),
        ({"type": "characters", "characters": "a", "more": 1}, "unexpected keyword argument"),
        ({"type": "tokenizers", "definition": 5}, "missing 4 required positional arguments"),
        (dict(type="tokenizers", definition=definition(), pad_id=0, bos_id=-1, eos_id=2, vocab_size=6), "its bos_id is -1"),
        (dict(type="tokenizers", definition=definition(), pad_id=0, bos_id=1, eos_id=6, vocab_size=6), "ids up to 6"),
        (dict(type="tokenizers", definition=definition(), pad_id=0, bos_id=1, eos_id=2, vocab_size=2**40), "at most 10,000,000"),
        (
            dict(type="tokenizers", definition=definition(model={"type": "WordLevel", "vocab": {"a": 0, "b": 99}, "unk_token": "a"}),
                 pad_id=0, bos_id=1, eos_id=2, vocab_size=6),
            "ids up to 99, its vocab_size says 6",
        ),
        (definition(added_tokens=[{"id": 2**40, "content": "</s>"}]), "cannot read it"),
        (json.loads("[" * 900 + "]" * 900), "not a tokenizer of a known type"),
    ],
)  # fmt: skip
def test_a_tokenizer_file_that_no_tokenizer_can_be_made_of_is_refused_in_a_line(tmp_path, fields, message):
    write(tmp_path / "t.json", fields)
    with pytest.raises(UserError) as error:
        resolve_tokenizer(str(tmp_path / "t.json"))
    assert "t.json is not a usable tokenizer: " in str(error.value) and message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_text_with_a_word_that_the_tokenizer_does_not_know_is_an_error_of_a_line():
    words = definition(model={"type": "WordLevel", "vocab": VOCABULARY, "unk_token": "<unk>"})
    tokenizer = PretrainedTokenizer(words, 1, 1, 2, 6)
    for read in (tokenizer.encode, lambda text: tokenizer.encode_batch([text])):
        with pytest.raises(UserError, match="the tokenizer cannot read 'a nobody b': WordLevel error: Missing"):
            read("a nobody b")
