"""What tests/test_fuzz.py throws at the commands: valid files, mutated as their structure allows, and a sandbox that sees
what a command does with them.

A file that is changed in one or two places comes further than random text: the mutations know JSON, YAML, safetensors, the
index of a prepared shard and lines of text, and they renew the checksums that would otherwise find every change.
"""

import copy
import hashlib
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import sys
import threading
import zlib
from collections.abc import Callable
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import plotly.io
import pytest
import yaml

from hrm_lm.commands.main import run_command
from hrm_lm.data import chat_template
from hrm_lm.report.events import parsed
from hrm_lm.training.checkpoint_files import sealed

CPU_SECONDS = 10
"""Of an input. The slowest valid input takes a tenth of a second."""
MEMORY = 3 << 29
"""Bytes of address space that an input may add."""
MESSAGE = 6000
"""Characters of the longest message, paths of the sandbox included."""


# --- mutations ---------------------------------------------------------------------------------------------------
#
# They draw from a `random.Random` that hypothesis makes (`st.randoms`), so hypothesis can shrink what fails.

MARKUP = "<canary>"
"""A page on what a stranger made has it with its angle brackets escaped."""
DEEP = json.loads("[" * 300 + "]" * 300)

VALUES = [
    None, True, False, 0, 1, 2, 3, -1, 7, 0.0, -0.0, 0.5, 1e-300, 1e300, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 2**70,
    10**30, -(2**63), float("nan"), float("inf"), float("-inf"), "", "a", "1", "nan", "0x10", " ", "é", "\ud800", "\x00",
    "a\nb", "\x1b[2J", "a" * 5000, "x" * 300, ".", "..", "../../escaped", "/", "~nobody", "a/b", "a:b", "canary_module:main", "s4://x",
    "file:///nowhere", "file://", "://", "mock://a", MARKUP, "bytes", "characters", "synthetic", "synthetic:x", "reasoning_gym:x", "none",
    "auto", "1:4", "{x}", "%s", [], [[]], [None], [0], [1, 2], [-1, 5], ["a"], {}, {"": None}, {"a": {}}, {"a": 1}, {"0": []}, DEEP,
]  # fmt: skip
KEYS = [
    "", "a", "version", "base", "dataset", "type", "<<", "model.d_model", "data.dataset", "__class__", "..", "é", "a b", "x" * 3000,
    ".".join("a" * 500), "\ud800", "a\nb",
]  # fmt: skip


def odd_value(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(VALUES))  # what is drawn next may change it


def places(tree: Any, path: tuple = ()) -> list[tuple]:
    """The paths of all nodes but the root."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    inner = inner if len(path) < 20 else ()
    return [found for key, value in inner for found in [(*path, key), *places(value, (*path, key))]]


def at(tree: Any, path: tuple) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def mutated_tree(rng: random.Random, tree: Any) -> Any:
    """A JSON-like tree with one to three nodes changed. The tree itself stays."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if not (paths := places(tree)):
            return odd_value(rng)
        *way, key = rng.choice(paths)
        owner = at(tree, tuple(way))
        match rng.randrange(10):
            case 0:
                del owner[key]
            case 1 | 2 | 3 | 4:
                owner[key] = odd_value(rng)
            case 5:
                owner[key] = copy.deepcopy(at(tree, rng.choice(paths)))
            case 6:
                owner[key] = rng.choice(
                    [[owner[key]], {"a": owner[key]}, [owner[key]] * 3, str(owner[key]), owner[key]]
                )
            case 7 if isinstance(owner[key], int | float) and not isinstance(owner[key], bool):
                owner[key] = rng.choice(
                    [lambda n: n + 1, lambda n: n - 1, lambda n: -n, lambda n: n * 1000, float, str]
                )(owner[key])
            case 8 if isinstance(owner, dict):
                owner[rng.choice(KEYS)] = owner.pop(key)
            case _:
                if isinstance(owner, dict):
                    owner[rng.choice(KEYS)] = odd_value(rng)
                else:
                    owner.append(odd_value(rng))
    return tree


class _Payload:
    def __reduce__(self):
        return os.system, ("touch CANARY",)


PICKLE = pickle.dumps(_Payload())
FRAGMENTS = [
    b"", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\r\n", b"\n\n", b"\xed\xa0\x80", b"{", b"[" * 5000, b"9" * 5000, b'{"a":' * 3000, b"1e999", b"NaN",
    b"-Infinity", b'"\\ud800"', b"\\u0000", b"\xe2\x80\xa8", b'"', b",", b" ", b"x" * 3000,
]  # fmt: skip


def mutated_bytes(rng: random.Random, data: bytes) -> bytes:
    """Bytes that are cut, flipped, overwritten or have something put in or taken out."""
    place = rng.randrange(len(data) + 1)
    match rng.randrange(7):
        case 0:
            return data[:place]
        case 1 if data:
            place %= len(data)
            return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]
        case 2:
            number = rng.choice([0, -1, 2**31, 2**60, 2**63 - 1, 10**15])
            return data[:place] + struct.pack("<q", number) + data[place + 8 :]
        case 3:
            return data[:place] + data[place + rng.randrange(1, 50) :]
        case 4:
            return data[place:]
        case _:
            return data[:place] + rng.choice(FRAGMENTS) + data[place:]


def mutated_json(rng: random.Random, data: bytes) -> bytes:
    if rng.random() < 0.2:
        return mutated_bytes(rng, data)
    return json.dumps(mutated_tree(rng, json.loads(data))).encode()


SCALARS = [
    "2024-99-99", "2001-01-01", "2001-01-01 25:61:00", "1:99:99", "190:20:30", ".inf", "-.inf", ".nan", "-0.0", "0x" + "f" * 5000, "9" * 5000,
    "0b" + "1" * 5000, "-", "0o17", "0777", "1_000", "~", "!!int ''", "!!int abc", "!!float abc", "!!bool maybe", "!!null x", "!!timestamp x",
    "!!binary x", "!!binary 'YQ=='", "!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1]", "!!str 1", "!unknown x", "!!python/name:os.system",
    "!!python/object/apply:os.system ['touch CANARY']", "!!python/object/new:os.system ['touch CANARY']", "!!python/module:canary_module",
    "&a [*a]", "&a {x: *a}", "&a {<<: *a}", "*missing", "{<<: 1}", "{<<: [1, 2]}", "{<<: {a: 1}}", "{[1, 2]: 3}", "{{a: 1}: 2}", "{1: 2}",
    "{null: 1}", "{2001-01-01: 1}", "{.nan: 1}", "{? a : b}", '"\\ud800"', '"\\x00"', "'\\x1b[2J'", "|\n  text", "[", "{", "'", '"', "%x", "@x", "`x",
    "---", "...", "# x", "a: b: c", "[" * 2000, "[" * 90 + "]" * 90, "{a: " * 300, "yes", "on", "No", "1e3", "1.e+3", "+1", "=", "<<", "1 2",
]  # fmt: skip
LAUGHS = "a0: &a0 [lol, lol]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
MERGES = "a0: &a0 {l: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 30))


def mutated_yaml(rng: random.Random, data: bytes) -> bytes:
    """Changed as a tree, then as lines of text."""
    kind = rng.random()
    if kind < 0.05:
        return mutated_bytes(rng, data)
    tree = yaml.safe_load(data)
    if kind < 0.6:
        tree = mutated_tree(rng, tree)
    text = yaml.safe_dump(tree, allow_unicode=False, sort_keys=False, width=10**6) if kind < 0.9 else json.dumps(tree)
    if kind < 0.5:
        return text.encode("utf-8", "surrogatepass")
    lines = text.split("\n")
    for _ in range(rng.choice([1, 1, 2])):
        place = rng.randrange(len(lines))
        line = lines[place]
        key, colon, _ = line.partition(": ")
        match rng.randrange(8):
            case 0:
                del lines[place : place + 1]
                lines = lines or [""]
            case 1:
                lines.insert(place, line)
            case 2:
                lines[place] = "  " + line
            case 3:
                bomb = rng.choice([LAUGHS, MERGES])
                lines = [*bomb.splitlines(), *lines] if rng.random() < 0.5 else lines
                lines[place] = f"{key}: *a29" if "a29" in bomb else line
            case _:
                lines[place] = f"{key}: {rng.choice(SCALARS)}" if colon or line.endswith(":") else rng.choice(SCALARS)
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def mutated_safetensors(rng: random.Random, data: bytes) -> bytes:
    """Another header over the same bytes, a header that is said to be as long as it is not, or other bytes."""
    (length,) = struct.unpack("<Q", data[:8])
    kind = rng.random()
    if kind < 0.2:
        return mutated_bytes(rng, data)
    if kind < 0.3:
        return (
            struct.pack("<Q", rng.choice([0, 1, length - 1, length + 1, len(data), 2**31, 2**60, 2**63, 2**64 - 1]))
            + data[8:]
        )
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    if kind < 0.4:  # numbers that are none
        place = rng.randrange(max(len(body) // 4, 1)) * 4
        body = body[:place] + struct.pack("<f", rng.choice([np.nan, np.inf, 1e38])) + body[place + 4 :]
    elif kind < 0.6:  # as safetensors may say it
        name = rng.choice([name for name in header if name != "__metadata__"])
        entry = header[name]
        match rng.randrange(5):
            case 0:
                entry["dtype"] = rng.choice(["F64", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "X", "C64"])
            case 1:
                entry["shape"] = rng.choice(
                    [[], [0], [1], [2**60], [2**32, 2**32], [-1], entry["shape"][::-1], [*entry["shape"], 1]]
                )
            case 2:
                entry["data_offsets"] = rng.choice([[0, 0], [0, 2**60], [8, 4], entry["data_offsets"][::-1], [-4, 4]])
            case 3:
                header[rng.choice(KEYS)] = header.pop(name)
            case _:
                del header[name]
    else:
        header = mutated_tree(rng, header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


def mutated_array(rng: random.Random, data: bytes) -> bytes:
    """Numbers in place of others: ids out of range, ends that run backwards."""
    if rng.random() < 0.3 or len(data) < 8:
        return mutated_bytes(rng, data)
    array = np.frombuffer(data, "<i8" if len(data) % 8 == 0 and rng.random() < 0.5 else "u1").copy()
    for _ in range(rng.choice([1, 1, 5])):
        place, most = rng.randrange(len(array)), np.iinfo(array.dtype).max
        array[place] = rng.choice([0, 1, most, most - 1, array[rng.randrange(len(array))], rng.randrange(256)])
    return array.tobytes()


def mutated_lines(rng: random.Random, data: bytes) -> bytes:
    """JSON lines, of which one is changed."""
    if rng.random() < 0.3:
        return mutated_bytes(rng, data)
    lines = data.split(b"\n")
    for _ in range(rng.choice([1, 1, 2])):
        place = rng.randrange(len(lines))
        if not lines[place].startswith(b"{") or rng.random() < 0.3:
            lines[place] = mutated_bytes(rng, lines[place])
        else:
            with suppress(ValueError, RecursionError):  # it is JSON no more
                lines[place] = mutated_json(rng, lines[place])
    return rng.choice([b"\n", b"\n", b"\n", b"\r\n", b"\r"]).join(lines)


TEMPLATE = b"{% for m in messages %}{{ bos_token + m.content }}{% if not loop.last %}+{% endif %}{% endfor %}="
TEMPLATES = [
    b"{{ ''.__class__.__mro__ }}", b"{{ lipsum.__globals__.os.system('touch CANARY') }}", b"{% include 'x' %}", b"{% import 'os' as os %}",
    b"{{ 'x' * 10**10 }}", b"{{ raise_exception('\x1b[2J') }}", b"{{ messages | tojson }}", b"{{ 1 / 0 }}", b"{{ x.y.z }}", b"{%", b"",
    b"{{ range(10**9) }}", b"{{ '{0.__class__}'.format(messages) }}", b"{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    b"{% set n = namespace(x=messages) %}{% set n.__html__ = messages.append %}{{ n }}", b"{{ '\\ud800' }}", b"{{ '(' * 5000 }}",
]  # fmt: skip


def mutated_template(rng: random.Random, data: bytes) -> bytes:
    return mutated_bytes(rng, data) if rng.random() < 0.3 else rng.choice(TEMPLATES)


def mutated_events(rng: random.Random, data: bytes) -> bytes:
    """Of one event the time, the step, a number, a name or a text is another; or other bytes."""
    events, _ = parsed(data)
    event = rng.choice(events)
    values = [value for event in events for value in event.summary.value]
    value = rng.choice(values)
    texts = [value for value in values if value.tensor.string_val]
    match rng.randrange(7):
        case 0:
            return mutated_bytes(rng, data)
        case 1:
            event.wall_time = rng.choice([-1.0, 0.0, 1e18, 1e300, np.nan, np.inf, -np.inf])
        case 2:
            event.step = rng.choice([-(2**63), -1, 0, 1, 2**62, 2**63 - 1])
        case 3:
            value.simple_value = rng.choice([-1.0, 0.0, 1e30, np.nan, np.inf, -np.inf])
        case 4:
            value.tag = rng.choice(
                ["", "a", "loss", "tokens", "seconds", "mfu", "val_loss/x", "answers/text_summary", MARKUP]
            )
        case _:
            text = rng.choice(texts).tensor
            text.string_val[0] = mutated_json(rng, text.string_val[0])
    return b"".join(
        struct.pack("<Q4x", len(text)) + text + bytes(4) for text in (event.SerializeToString() for event in events)
    )


BY_SUFFIX = {
    ".json": mutated_json, ".yaml": mutated_yaml, ".safetensors": mutated_safetensors, ".idx": mutated_array,
    ".bin": mutated_array, ".jsonl": mutated_lines, ".jinja": mutated_template, ".events": mutated_events,
}  # fmt: skip

Files = dict[str, bytes | str]
"""The files of a folder by their path in it. A text is where a symbolic link leads to."""
STRANGE = [
    "extra.safetensors",
    "model/extra.safetensors",
    "pytorch_model.bin",
    "adapter_config.json",
    "canary_module.py",
]
LINKS = [".", "/dev/null", "/dev/zero", "nowhere", "..", "/etc/hostname"]


def mutated_files(rng: random.Random, files: Files) -> Files:
    """A folder of which a file or two are changed, gone, or something else."""
    files = dict(files)
    for _ in range(rng.choice([1, 1, 1, 2])):
        name = rng.choice(sorted(files))
        data = files[name]
        kind = rng.random()
        if kind < 0.05:
            del files[name]
        elif kind < 0.08:
            files[name] = rng.choice([*LINKS, Path(name).name])
        elif kind < 0.11:
            del files[name]
            files[f"{name}/inner"] = b""
        elif kind < 0.14:
            files[name] = rng.choice([PICKLE, files[rng.choice(sorted(files))]])
        elif kind < 0.17:
            files[rng.choice([f"{name}.partial", *STRANGE])] = data
        elif isinstance(data, bytes):
            try:
                files[name] = BY_SUFFIX.get(Path(name).suffix, mutated_bytes)(rng, data)
            except Exception:  # it is another file by now
                files[name] = mutated_bytes(rng, data)
        if not files:
            return files
    return files


def resealed(files: Files) -> Files:
    """A checkpoint whose records are those of its files, as far as it still has a `trainer_state.json` that can be read."""
    try:
        state = json.loads(files["trainer_state.json"])
        state.pop("crc32", None)
        if isinstance(state.get("files"), dict):
            for name in state["files"]:
                if isinstance(data := files.get(name), bytes) and name != "trainer_state.json":
                    state["files"][name] = {"size": len(data), "crc32": zlib.crc32(data)}
        return files | {"trainer_state.json": sealed(state).encode()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return files


def redescribed(files: Files) -> Files:
    """The same for a prepared dataset and its meta.json."""
    try:
        meta = json.loads(files["meta.json"])
        for name in meta["files"]:
            if isinstance(data := files.get(name), bytes):
                meta["files"][name] = [len(data), hashlib.sha256(data).hexdigest()]
        return files | {"meta.json": json.dumps(meta).encode()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return files


def files_of(folder: Path) -> Files:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def write_files(folder: Path, files: Files) -> Path:
    folder.mkdir(parents=True)
    for name, data in files.items():
        file = folder / name
        if any(parent.is_file() or parent.is_symlink() for parent in file.parents if parent != folder):
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(data, str):
            file.symlink_to(data)
        elif not file.is_dir():
            file.write_bytes(data)
    return folder


# --- the sandbox -------------------------------------------------------------------------------------------------


class StartedRay(BaseException):
    """The command would now start Ray: its input passed for good."""


class Hung(BaseException):
    """An input took longer than CPU_SECONDS, or it would wait for storage that does not come."""


FORBIDDEN = {
    "pickle.find_class",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
    "socket.connect",
}
"""Events of the interpreter (PEP 578). Chat templates may have their process, and Ray Data's tasks their pickles."""
PASSED = [("hrm_lm.predict.chunks", "Chunk"), ("hrm_lm.prepare.reading", "Problem")]
_seen: list[str] | None = None
_others: set[int] = set()
"""Threads that were there before the command: Ray's, of a cluster that other tests share."""


def _audit(event: str, arguments: tuple) -> None:
    if _seen is None or threading.get_ident() in _others:
        return
    if event == "subprocess.Popen" and chat_template.__file__ in arguments[1]:
        return
    if event == "pickle.find_class" and arguments in PASSED:
        return  # what one of our own tasks hands to another
    if event in FORBIDDEN or (event == "import" and "canary" in str(arguments[0])):
        _seen.append(f"{event} {str(arguments)[:200]}")


sys.addaudithook(_audit)


class Sandbox:
    """A folder tree that holds the working directory, the home, the cache and the inputs of commands in this process."""

    def __init__(self, root: Path):
        self.root = root
        self.work = root / "a" / "b" / "c" / "work"  # so deep that ../../.. is still in the tree
        self.case = self.work / "case"
        """The input of a command."""
        self.out = self.work / "out"
        """The only folder that a command may write."""
        for folder in (self.work, root / "home", root / "cache"):
            folder.mkdir(parents=True)
        (self.work / "canary_module.py").write_text(f"open({str(root / 'CANARY')!r}, 'w')\ndef main(*_): pass\n")
        self.writable = {str(self.out), str(root / "hub")}
        self.inputs = 0

    def listing(self) -> dict[str, tuple]:
        found, stack = {}, [str(self.root)]
        while stack:
            with os.scandir(stack.pop()) as entries:
                for entry in entries:
                    if entry.path in self.writable:
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        found[entry.path] = ()
                        stack.append(entry.path)
                    else:
                        stat = entry.stat(follow_symlinks=False)
                        found[entry.path] = (stat.st_size, stat.st_mtime_ns)
        return found

    def fresh(self, files: Files) -> Path:
        """The case's folder, with these files alone; and no output."""
        shutil.rmtree(self.case, ignore_errors=True)
        shutil.rmtree(self.out, ignore_errors=True)
        return write_files(self.case, files)

    def attempt(self, action: Callable[[], Any]) -> tuple[int | None, str, str]:
        """The exit code, standard output and standard error of a command; code None where it would have started Ray.

        Asserts what holds for every input: it ends, and without a traceback, writes nothing but its output, runs nothing,
        and says in few words what is wrong.
        """
        global _seen, _others
        self.inputs += 1
        _others = {thread.ident for thread in threading.enumerate()} - {threading.get_ident()}
        before, _seen = self.listing(), []
        out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
        err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace", write_through=True)
        try:
            with redirect_stdout(out), redirect_stderr(err), limited():
                code = run_command(action)
        except StartedRay:
            code = None
        except SystemExit as exit:  # argparse
            code = exit.code
        finally:
            seen, _seen = _seen, None
        texts = [stream.buffer.getvalue().decode() for stream in (out, err)]
        assert not seen, seen
        after = self.listing()
        assert after == before, sorted(after.items() ^ before.items())
        assert code in (None, 0, 2), (code, texts[1])
        if code == 2:
            said = texts[1].partition("error: ")[2]
            assert said.strip(), texts
            assert len(said) < MESSAGE and len(said.splitlines()) <= 12, (len(said), said[:500])
            assert all(char.isprintable() or char == "\n" for char in said), said
        assert "Traceback" not in texts[1], texts[1][-3000:]
        return code, *texts


@contextmanager
def limited():
    """Bounds the CPU time and the memory of what runs meanwhile."""

    def hung(*_):
        raise Hung(f"still running after {CPU_SECONDS} s of CPU time")

    usual = signal.signal(signal.SIGPROF, hung)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    most = used + MEMORY if hard == resource.RLIM_INFINITY else min(used + MEMORY, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, usual)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def sandboxed(root: Path):
    """A Sandbox, and Ray does not start while it lasts."""
    from hrm_lm.cluster import run, start
    from hrm_lm.tuning import sweep

    @contextmanager
    def started_ray():
        raise StartedRay
        yield

    def sleep(seconds: float) -> None:
        raise Hung(f"waits {seconds:.1f} s for storage")

    sandbox = Sandbox(root)
    with pytest.MonkeyPatch.context() as patch:
        for module in (run, start, sweep):
            patch.setattr(module, "started_ray", started_ray)
        patch.setattr("hrm_lm.filesystem.sleep", sleep)
        # Pages without what is always the same in them and takes longest.
        patch.setitem(plotly.io.templates._templates, "plotly_white", go.layout.Template())
        patch.setattr("hrm_lm.pages.get_plotlyjs", str)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", root / "hub")
        patch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setattr("torch.cuda.is_available", lambda: False)  # CUDA would reserve more than MEMORY
        patch.setenv("HOME", str(root / "home"))
        patch.setenv("HRM_LM_CACHE", str(root / "cache"))
        patch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
        patch.chdir(sandbox.work)
        patch.syspath_prepend(str(sandbox.work))
        yield sandbox
