"""Conversations to texts: the one place where that is done, for training, answering and serving alike.

A conversation is a list of messages, each with a role and a content. The prompt is all that stands before an answer of the
assistant, written by the tokenizer's chat template; the response is the answer's content. Every answer is a sample, with
the messages before it as its prompt. A tokenizer without a template has PLAIN.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from threading import Lock
from typing import Any, NamedTuple

from hrm_lm.data import chat_template
from hrm_lm.data.tokenizer import PretrainedTokenizer, Tokenizer
from hrm_lm.errors import UserError

ROLES = ("system", "developer", "user", "assistant", "tool")
PLAIN = """\
{% if messages | length == 1 and messages[0].role == "user" %}
{{ messages[0].content }}
{%- else %}
{% for message in messages %}
{{ message.role }}: {{ message.content }}
{% endfor %}
{% if add_generation_prompt %}assistant:{% endif %}
{% endif %}"""
"""A lone question stands as it is, as in a dataset of prompts and responses. A longer conversation is written with roles."""

MOST_TEXT = 1 << 28
"""Characters that the prompts of a conversation may have together, at most: each repeats those before it."""

Message = dict[str, Any]


class Malformed(UserError):
    """What is no conversation, or not one that the chat template takes. `reason` is the same for all of a kind."""

    def __init__(self, reason: str, detail: str = ""):
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}" if detail else reason)


class Chat(NamedTuple):
    """How conversations are written."""

    template: str = PLAIN
    tokens: tuple[tuple[str, str], ...] = ()
    """The texts of the special tokens that a template may name: `bos_token` and the like."""

    @classmethod
    def of(cls, tokenizer: Tokenizer | None) -> "Chat":
        """None stands for a tokenizer that is yet to be made of the texts."""
        if not isinstance(tokenizer, PretrainedTokenizer) or tokenizer.chat_template is None:
            return cls()
        ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
        return cls(
            tokenizer.chat_template, tuple((name, tokenizer.tokenizer.id_to_token(i) or "") for name, i in ids.items())
        )

    def prompts(self, conversations: Sequence[list[Message]]) -> list[str]:
        """The text of each checked conversation, up to where an answer begins. Raises Malformed."""
        if self.template == PLAIN:
            texts = [chat_template.fill(_plain(), {}, messages) for messages in conversations]
        else:
            texts = _rendered(json.dumps([self.template, dict(self.tokens)]), conversations)
        return [whole(text) for text in texts]

    def samples(self, messages: Any) -> list[tuple[str, str]]:
        """Prompt and response of each answer that has a message before it. Raises Malformed."""
        messages = checked(messages)
        answers = [i for i, message in enumerate(messages) if i and message["role"] == "assistant"]
        if not answers:
            raise Malformed("the messages have no assistant's answer to another message")
        if len(answers) * sum(len(message["content"]) for message in messages) > MOST_TEXT:
            raise Malformed(
                "the conversation is too long for a prompt of each answer", f"it has {len(answers)} answers"
            )
        prompts = self.prompts([messages[:i] for i in answers])
        return [(prompt, messages[i]["content"]) for prompt, i in zip(prompts, answers, strict=True)]


def render(tokenizer: Tokenizer, messages: Any) -> str:
    """The prompt that a conversation is: what a model reads before its next answer.

    messages: a list of mappings with `role` (one of ROLES) and `content`, which is a text or a list of parts of type text.
    Raises UserError where they are anything else, and where the tokenizer's chat template refuses them.
    """
    return Chat.of(tokenizer).prompts([checked(messages)])[0]


def checked(messages: Any) -> list[Message]:
    """Messages whose contents are texts, parts of a content joined. Other fields stay, unless they are null."""
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise Malformed("messages must be a list of at least one message")
    return [_message(message) for message in messages]


def _message(message: Any) -> Message:
    if not isinstance(message, Mapping):
        raise Malformed("a message must be an object with role and content", str(message)[:60])
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise Malformed(f"a message's role must be one of {', '.join(ROLES)}", f"it is {str(role)[:60]!r}")
    if isinstance(content, Sequence) and not isinstance(content, str | bytes):
        texts = [part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") == "text"]
        is_text = len(texts) == len(content) and all(isinstance(text, str) for text in texts)
        content = "".join(map(str, texts)) if is_text else None
    if not isinstance(content, str):
        raise Malformed("a message's content must be a text, or parts of type text", str(message.get("content"))[:60])
    # Columns of Arrow have every field in every row.
    others = {key: value for key, value in message.items() if value is not None}
    return others | {"role": role, "content": whole(content)}


def whole(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Malformed("not Unicode text, but half a character") from None
    return text


@lru_cache(maxsize=1)
def _plain():
    return chat_template.compiled(PLAIN)


def _rendered(start: str, conversations: Sequence[list[Message]]) -> list[str]:
    """start: the template and its tokens, as the process takes them."""
    line = None
    while line is None:
        process, lock = _process(os.getpid(), start)
        with lock:
            if process.poll() is None:
                line = _asked(process, json.dumps(conversations, default=str))
        if not line:  # this conversation, or another thread's, has ended it
            _process.cache_clear()
    if not line:
        limits = f"{chat_template.CPU_SECONDS} s or {chat_template.MEMORY >> 20} MiB"
        raise Malformed(f"the tokenizer's chat template took more than {limits}")
    answer = json.loads(line)
    if "error" in answer:
        raise Malformed("the tokenizer's chat template refuses the messages", " ".join(answer["error"].split())[:200])
    return answer["texts"]


def _asked(process: subprocess.Popen, line: str) -> str:
    """The line that answers; nothing where the process has ended."""
    assert process.stdin and process.stdout
    try:
        print(line, file=process.stdin, flush=True)
        if answer := process.stdout.readline():
            return answer
    except BrokenPipeError:
        pass
    process.kill()
    with suppress(BrokenPipeError):
        process.communicate()  # which closes all
    return ""


@lru_cache(maxsize=8)
def _process(owner: int, start: str) -> tuple[subprocess.Popen, Lock]:
    """A process that renders. owner: this process, as a fork must not share it. It ends when this process does."""
    process = subprocess.Popen(
        [sys.executable, "-P", chat_template.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="utf-8",
    )
    print(start, file=process.stdin, flush=True)
    return process, Lock()
