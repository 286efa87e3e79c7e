"""Conversations: what becomes of their messages, and what a stranger's chat template cannot do."""

import json
import os
import random
import threading

import pytest

from hrm_lm.data import chat_template
from hrm_lm.data.chat import ROLES, Chat, Malformed, _process, render
from hrm_lm.data.tokenizer import ByteTokenizer, PretrainedTokenizer, SimpleTokenizer, resolve_tokenizer, same_tokens
from hrm_lm.errors import UserError

CHATML = """\
{%- if messages[0].role != "system" %}{{ bos_token }}{% endif %}
{%- for message in messages %}
    {{- "<|im_start|>" + message["role"] + "\\n" + message.content | trim + "<|im_end|>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\\n" }}{% endif %}"""
MARKED = """\
{% set ns = namespace(turns=0) %}
{% for message in messages if message.role != 'system' %}
{% if message.role == 'user' %}{% set ns.turns = ns.turns + 1 %}Q{{ ns.turns }}: {{ message.content }}
{% elif message.role == 'assistant' %}{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}

{% else %}{{ message | tojson }}{% continue %}
{% endif %}
{% endfor %}
{% if add_generation_prompt and tools is none %}A:{% endif %}"""
STRICT = """\
{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('roles must alternate') }}{% endif %}{{ message.content }}|{% endfor %}"""
VOCABULARY = {"a": 0, "<s>": 1, "</s>": 2, "b": 3}
DEFINITION = {
    "version": "1.0",
    "model": {"type": "WordLevel", "vocab": VOCABULARY, "unk_token": "a"},
    "added_tokens": [],
}


def with_template(template):
    return PretrainedTokenizer(DEFINITION, 2, 1, 2, 4, template)


def messages(*contents, first="user"):
    """Messages of user and assistant by turns."""
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def conversations(seed):
    """Random conversations of all roles, as files have them."""
    rng = random.Random(seed)
    for _ in range(40):
        some = []
        for _ in range(rng.randint(1, 7)):
            content = "".join(rng.choice("ab é∑\n{%}") for _ in range(rng.randint(0, 9)))
            parts = [{"type": "text", "text": content[:3]}, {"type": "text", "text": content[3:]}]
            some.append({"role": rng.choice(ROLES), "content": parts if rng.random() < 0.3 else content})
            if rng.random() < 0.3:
                some[-1]["name"] = rng.choice(["ann", None])
        yield some


# --- the text ----------------------------------------------------------------------------------------------------


def test_without_a_template_a_lone_question_stands_as_it_is_and_turns_are_written_with_their_roles():
    for tokenizer in (ByteTokenizer(), SimpleTokenizer("2+ "), with_template(None)):
        assert render(tokenizer, messages("2 + 2")) == "2 + 2"
    asked = [{"role": "system", "content": "Be brief."}, *messages("2 + 2", "4", "and 3?")]
    assert render(ByteTokenizer(), asked) == "system: Be brief.\nuser: 2 + 2\nassistant: 4\nuser: and 3?\nassistant:"


@pytest.mark.parametrize("template", [CHATML, MARKED, STRICT])
def test_a_template_gives_the_text_that_transformers_gives(template):
    transformers = pytest.importorskip("transformers")
    ours = with_template(template)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=ours.tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", chat_template=template
    )
    texts = 0
    for some in [*conversations(1), messages("q"), messages("q", "a", " r ")]:
        joined = [
            message | ({"content": "".join(p["text"] for p in c)} if isinstance(c := message["content"], list) else {})
            for message in some
        ]
        joined = [{key: value for key, value in message.items() if value is not None} for message in joined]
        try:
            expected = theirs.apply_chat_template(joined, tokenize=False, add_generation_prompt=True)
        except Exception as error:
            with pytest.raises(UserError, match=f"refuses the messages: {error}"):
                render(ours, some)
        else:
            assert render(ours, some) == expected
            texts += 1
    assert texts > 1


@pytest.mark.parametrize("template", [None, CHATML])
def test_every_answer_is_a_sample_whose_prompt_is_what_the_conversation_so_far_renders_to(template):
    tokenizer, found = with_template(template), 0
    for some in conversations(2):
        answers = [i for i, message in enumerate(some) if i and message["role"] == "assistant"]
        if not answers:
            with pytest.raises(Malformed, match="no assistant's answer"):
                Chat.of(tokenizer).samples(some)
            continue
        samples = Chat.of(tokenizer).samples(some)
        assert [prompt for prompt, _ in samples] == [render(tokenizer, some[:i]) for i in answers]
        contents = [some[i]["content"] for i in answers]
        contents = ["".join(p["text"] for p in c) if isinstance(c, list) else c for c in contents]
        assert [response for _, response in samples] == contents
        found += len(samples)
    assert found > 20


@pytest.mark.parametrize(
    "wrong, message",
    [
        ([], "messages must be a list of at least one message"),
        ("hello", "messages must be a list"),
        ({"role": "user", "content": "x"}, "messages must be a list"),
        (None, "messages must be a list"),
        (["hello"], "a message must be an object with role and content: hello"),
        ([{"content": "x"}], "a message's role must be one of system, .*: it is 'None'"),
        ([{"role": "human", "content": "x"}], "a message's role must be one of system, .*: it is 'human'"),
        ([{"role": ["user"], "content": "x"}], "a message's role must be one of"),
        ([{"role": "user"}], "a message's content must be a text, or parts of type text: None"),
        ([{"role": "user", "content": 5}], "a message's content must be a text, or parts of type text: 5"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "or parts of type text"),
        ([{"role": "user", "content": [{"type": "text"}]}], "or parts of type text"),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], "or parts of type text"),
        ([{"role": "user", "content": "half \ud83d"}], "not Unicode text, but half a character"),
        ([{"role": "user", "content": "x", "name": "half \ud83d"}], "not Unicode text, but half a character"),
    ],
)
def test_what_is_no_conversation_is_told_in_a_line(wrong, message):
    for template in ("{{ messages[0].content }}{{ messages[0].name }}", None):
        if template is None and "name" in str(wrong):
            continue  # the plain form does not write it
        with pytest.raises(UserError, match=message) as raised:
            render(with_template(template), wrong)
        assert "\n" not in str(raised.value)


def test_a_conversation_whose_prompts_would_fill_the_memory_is_refused():
    some = messages(*["x" * 1000] * 2000)
    with pytest.raises(Malformed, match="too long for a prompt of each answer: it has 1000 answers"):
        Chat().samples(some)
    assert len(Chat().samples(some[:200])) == 100


# --- a stranger's template ---------------------------------------------------------------------------------------

NEVER_ENDING = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    "template",
    [
        NEVER_ENDING,
        "{{ ('a' * 2 ** 30) | length }}",
        "{% set ns = namespace(x='aa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ [1] | batch(10 ** 10, 'x') | list }}",
    ],
)
def test_a_template_that_takes_time_or_memory_without_end_is_ended(monkeypatch, tmp_path, template):
    # The process reads the limits from a copy of the file: a second is enough to see that it ends.
    copy = tmp_path / "chat_template.py"
    with open(chat_template.__file__) as file:
        copy.write_text(file.read().replace("CPU_SECONDS = 5", "CPU_SECONDS = 0"))
    monkeypatch.setattr(chat_template, "__file__", str(copy))
    tokenizer = with_template(template + " ")  # no process of another test has it
    with pytest.raises(UserError, match="took more than|refuses the messages: (MemoryError|RecursionError)"):
        render(tokenizer, messages("q"))
    assert render(with_template(CHATML), messages("q")), "the next conversation gets a process of its own"


@pytest.mark.parametrize(
    "template",
    [
        "{{ cycler.__init__.__globals__.os.system('touch PWNED') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ('{0.__init__.__globals__}').format(cycler) }}",
        "{{ messages | attr('__class__') | attr('__mro__') }}",
        "{% set ns = namespace(__html__='{0.__class__}'.format) %}{{ ns | forceescape }}",
        "{% set ns = namespace() %}{% set ns.__html__ = '{0.__class__}'.format %}{{ ns | forceescape }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ raise_exception.__globals__ }}",
        "{% include '/etc/passwd' %}",
        "{{ open('/etc/passwd') }}",
        "{% broken",
    ],
)
def test_a_template_reaches_nothing_but_the_conversation(in_folder, template):
    tokenizer, some = with_template(template), messages("q")
    try:
        assert render(tokenizer, some) in ("", "[]"), "an undefined value leaves no text"
    except UserError as error:
        assert str(error).startswith("the tokenizer's chat template refuses the messages: ")
        assert "\n" not in str(error)
    assert not list(in_folder.iterdir()) and some == messages("q")


def test_what_a_template_refuses_is_told_with_its_own_words_and_the_next_conversation_renders():
    tokenizer = with_template(STRICT)
    with pytest.raises(UserError, match="the tokenizer's chat template refuses the messages: roles must alternate"):
        render(tokenizer, messages("a", "b", first="assistant"))
    assert render(tokenizer, messages("a", "b")) == "a|b|"


def test_a_process_that_was_ended_is_made_anew(capfd):
    tokenizer = with_template(CHATML + "{# of this test #}")
    expected = render(tokenizer, messages("q"))
    process, _ = _process(os.getpid(), json.dumps([tokenizer.chat_template, dict(Chat.of(tokenizer).tokens)]))
    process.kill()
    process.wait()
    assert render(tokenizer, messages("q")) == expected
    assert not capfd.readouterr().err


def test_threads_that_render_at_once_get_each_its_own_text():
    tokenizer, texts = with_template(CHATML), {}

    def ask(name):
        texts[name] = {render(tokenizer, messages(f"{name} {i}")) for i in range(50)}

    threads = [threading.Thread(target=ask, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in "abcd":
        expected = {f"<s><|im_start|>user\n{name} {i}<|im_end|>\n<|im_start|>assistant\n" for i in range(50)}
        assert texts[name] == expected


# --- where a template comes from ---------------------------------------------------------------------------------


def write(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        file = folder / name.replace("__", ".")
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(folder)


def test_a_template_comes_from_the_files_beside_a_hugging_face_tokenizer(tmp_path):
    folder = write(tmp_path / "t", tokenizer__json=DEFINITION)
    assert resolve_tokenizer(folder).chat_template is None
    write(tmp_path / "t", tokenizer_config__json={"chat_template": "from config"})
    assert resolve_tokenizer(folder).chat_template == "from config"
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "the default"}]
    write(tmp_path / "t", tokenizer_config__json={"chat_template": several})
    assert resolve_tokenizer(f"file://{folder}").chat_template == "the default"
    write(tmp_path / "t", chat_template__jinja="from its own file")
    assert resolve_tokenizer(folder).chat_template == "from its own file"


@pytest.mark.parametrize("template", [5, [{"name": "default"}], ["x"]])
def test_a_template_that_is_no_text_is_told_with_its_file(tmp_path, template):
    folder = write(tmp_path / "t", tokenizer__json=DEFINITION, tokenizer_config__json={"chat_template": template})
    with pytest.raises(UserError, match="data.tokenizer: .*tokenizer.json is not a usable tokenizer"):
        resolve_tokenizer(folder)


def test_a_template_is_kept_in_this_projects_file_and_tokenizers_are_the_same_without_regard_to_it(tmp_path):
    kept = write(tmp_path / "kept", tokenizer__json=with_template(CHATML).to_json())
    assert resolve_tokenizer(kept).chat_template == CHATML
    assert same_tokens(resolve_tokenizer(kept), with_template(None))
    older = json.loads(with_template(None).to_json())
    assert "chat_template" not in older, "earlier versions read it"
    assert resolve_tokenizer(write(tmp_path / "older", tokenizer__json=older)).chat_template is None
