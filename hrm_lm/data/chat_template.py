"""Chat templates at work: Jinja in its sandbox, as Transformers' `apply_chat_template` has it.

A template comes with a tokenizer, from whoever published it. The sandbox lets it reach nothing but the conversation. It
could still loop for ever or fill the memory, so this file is also a script that renders for `hrm_lm.data.chat` in a process
of its own, within limits that the kernel keeps. The script imports nothing of this package, and starts in a tenth of a
second.

There is no `strftime_now`, which Transformers has: a prompt would be another one every day.
"""

import json
import resource
import sys
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

CPU_SECONDS = 5
"""Computing time that a conversation may take."""
MEMORY = 512 << 20
"""Bytes that the process may take."""


class Namespace(jinja2.utils.Namespace):
    """A template's variables. A name such as `__html__` would make Jinja itself call what the template put there."""

    def __init__(*args: Any, **values: Any) -> None:
        self, *rest = args  # as Jinja has it: `self` may be a variable
        for name in dict(*rest, **values):
            refuse_private(name)
        jinja2.utils.Namespace.__init__(self, *rest, **values)

    def __setitem__(self, name: str, value: Any) -> None:
        refuse_private(name)
        super().__setitem__(name, value)


def refuse_private(name: Any) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a variable of a namespace may not be called {name}")


class Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant says. It changes no text."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def compiled(source: str) -> jinja2.Template:
    """Raises TemplateError."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:  # Jinja's own escapes HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "namespace": Namespace}
    return environment.from_string(source)


def fill(template: jinja2.Template, tokens: dict[str, str], messages: list[dict[str, Any]]) -> str:
    """A conversation's text, up to where the assistant's answer begins. tokens: such as `bos_token`, by name."""
    return template.render(messages=messages, add_generation_prompt=True, tools=None, documents=None, **tokens)


def limit(kind: int, value: int) -> None:
    _, most = resource.getrlimit(kind)
    resource.setrlimit(kind, (value if most == resource.RLIM_INFINITY else min(value, most), most))


def serve() -> None:
    """Reads the template and its tokens, then a line with a list of conversations at a time. Answers each with a line."""
    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_AS, MEMORY)
    source, tokens = json.loads(sys.stdin.readline())
    template = None
    while line := sys.stdin.readline():
        conversations = json.loads(line)
        usage = resource.getrusage(resource.RUSAGE_SELF)
        # Beyond these seconds the kernel ends this process.
        limit(resource.RLIMIT_CPU, int(usage.ru_utime + usage.ru_stime) + 1 + CPU_SECONDS * len(conversations))
        try:
            template = template or compiled(source)
            answer: dict[str, Any] = {"texts": [fill(template, tokens, messages) for messages in conversations]}
        except jinja2.TemplateError as error:
            answer = {"error": str(error)}
        except Exception as error:  # a template may raise whatever Python's operators raise
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
