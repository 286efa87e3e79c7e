"""`hrm-lm serve` on a Ray of its own: one server, asked as a user asks."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from http.client import HTTPConnection
from pathlib import Path

import openai
import pytest
import torch
from conftest import kill_processes_with, processes_with, small_config, wait_until

from hrm_lm.cluster.start import free_port
from hrm_lm.commands.serve import main, name_of
from hrm_lm.data.tokenizer import SimpleTokenizer
from hrm_lm.errors import RunFailed, UserError
from hrm_lm.models.build import build_model
from hrm_lm.serving import start
from hrm_lm.serving.access import digest
from hrm_lm.serving.start import direct_ingress, told_by
from hrm_lm.training.checkpoint import Progress, save_model

TOKENIZER = SimpleTokenizer("abcdefghijklmnopqrstuvwxyz0123456789 .,!?:\n")
LONGEST = 4000
"""Tokens of an answer that goes on until somebody ends it."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A model that never ends by itself."""
    torch.manual_seed(0)
    config = small_config(model__max_prompt_len=60, model__max_response_len=LONGEST)
    model = build_model(config.model, TOKENIZER.vocab_size)
    with torch.no_grad():
        model.head.weight.normal_()[: TOKENIZER.SPECIAL] = 0
    folder = tmp_path_factory.mktemp("runs") / "endless/checkpoint_00000001"
    folder.mkdir(parents=True)
    save_model(folder, model, config, TOKENIZER, Progress())
    return folder


# --- the command, before Ray -------------------------------------------------------------------------------------


@pytest.fixture
def planned(monkeypatch, command, checkpoint):
    """`planned(*flags)` is what would be served, and what the user would be told."""
    served = []
    monkeypatch.setattr(start, "serve_until_stopped", lambda plan, host, port, told: served.append((plan, told)))

    def run(*flags):
        assert command(main, "--checkpoint", checkpoint, *flags) == (0, "", "")
        return served.pop()

    return run


def test_without_a_key_only_this_machine_is_served_and_others_get_a_key_that_is_made(planned, monkeypatch):
    monkeypatch.delenv("HRM_LM_API_KEY", raising=False)
    plan, told = planned()
    assert plan.settings.key is None and told == "'endless' answers on http://127.0.0.1:8000, until Ctrl-C"
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.com"):
        plan, told = planned("--host", host)
        key = told.rpartition("#key=")[2]
        assert plan.settings.key == digest(key) and len(key) >= 32 and told.count(key) == 2
    monkeypatch.setenv("HRM_LM_API_KEY", "mine")
    for host in ("127.0.0.1", "0.0.0.0"):
        plan, told = planned("--host", host)
        assert plan.settings.key == digest("mine") and "mine" not in told


def test_flags_say_what_is_served(planned):
    plan, _ = planned("--replicas", "1:4", "--slots", 8, "--h_cycles", 3, "--gpus_per_replica", 0.5)
    assert (plan.least, plan.most, plan.cpus, plan.gpus) == (1, 4, 1, 0.5)
    assert (plan.settings.slots, plan.settings.cycles, plan.settings.name) == (8, (3, 2, None), "endless")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--replicas", "4:1"], "--replicas must be a number, or a range such as 1:4, not 4:1"),
        (["--replicas", "0"], "--replicas must be"),
        (["--slots", "0"], "--slots must be 1 to 65536, not 0"),
        (["--timeout", "nan"], "--timeout must be 0.001 to 1e+06, not nan"),
        (["--port", "70000"], "--port must be 1 to 65535"),
        (["--h_cycles", "0"], "--h_cycles must be at least 1"),
        (["--checkpoint", "nowhere"], "nowhere: no such checkpoint folder"),
    ],
)
def test_what_cannot_be_served_is_refused_before_ray_starts(command, checkpoint, flags, message):
    code, out, err = command(main, "--checkpoint", checkpoint, *flags)
    assert code == 2 and message in err and not out


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        (["Traceback", "hrm_lm.errors.UserError: --slots 9: too many"], UserError("--slots 9: too many")),
        (
            ["hrm_lm.errors.DamagedCheckpoint: c: damaged:", "weights are cut"],
            UserError("c: damaged:\nweights are cut"),
        ),
        (["Traceback", "torch.OutOfMemoryError: CUDA out of memory"], RunFailed("CUDA out of memory")),
        (["s3: the actor died"], RunFailed("s3: the actor died")),
    ],
)
def test_what_a_user_can_mend_in_a_replica_that_does_not_start_is_the_users_error(lines, error):
    told = told_by(lines)
    assert type(told) is type(error) and str(told) == f"nothing is served: {error}"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/runs/sums/checkpoint_00001500", "sums"),
        ("bucket/runs/sums/checkpoint_00001500_again/", "sums"),
        ("/sweeps/wide/best_checkpoint", "wide"),
        ("/models/imported", "imported"),
        ("checkpoint_1", "checkpoint_1"),
    ],
)
def test_a_model_is_called_after_its_run(path, name):
    assert name_of(path) == name


def test_replicas_of_a_ray_of_its_own_have_the_priority_of_other_processes(server):
    engines = [pid for pid in processes_with(server.mark) if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
    assert engines and {os.getpriority(os.PRIO_PROCESS, pid) for pid in engines} == {os.nice(0)}


def test_an_haproxy_that_is_left_ends_with_the_command():
    with direct_ingress(1):
        folder = os.environ["RAY_SERVE_HAPROXY_SERVER_STATE_BASE"]
        left = subprocess.Popen([sys.executable, "-c", "input()", f"{folder}/haproxy.cfg"], stdin=subprocess.PIPE)
    assert left.wait() == -signal.SIGKILL


# --- the server --------------------------------------------------------------------------------------------------


class Server:
    def __init__(self, folder: Path, *arguments):
        self.port, self.mark = free_port(), f"HRM_LM_TEST={folder}"
        self.log = folder / "log"
        environment = os.environ | dict([self.mark.split("=", 1)])
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "hrm_lm.commands", "serve", f"--port={self.port}", *map(str, arguments)],
                env=environment, cwd=folder, stdout=log, stderr=log, text=True,
            )  # fmt: skip
        self.client = self.connect()

    def connect(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0)

    def is_up(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        return "answers on" in self.log.read_text()

    def get(self, path: str) -> str:
        connection = HTTPConnection("127.0.0.1", self.port)
        connection.request("GET", path)
        return connection.getresponse().read().decode()

    def metric(self, name: str) -> float:
        """Over all replicas."""
        return sum(float(line.split()[-1]) for line in self.get("/metrics").splitlines() if line.startswith(name + "{"))

    def replicas(self) -> list[int]:
        return self.called("ServeReplica")

    def engines(self) -> list[int]:
        return self.called("spawn_main")

    def called(self, name: str) -> list[int]:
        """Processes of this server that have `name` in their command line."""
        commands = {pid: Path(f"/proc/{pid}/cmdline") for pid in processes_with(self.mark)}
        return [pid for pid, file in commands.items() if file.exists() and name.encode() in file.read_bytes()]


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"), "--checkpoint", checkpoint, "--slots", 4, "--max_queue", 4)
    try:
        wait_until(server.is_up)
        yield server
    finally:
        kill_processes_with(server.mark)


@pytest.mark.slow
def test_openais_client_is_answered_and_refused(server):
    assert [model.id for model in server.client.models.list()] == ["endless"]
    completion = server.client.completions.create(model="endless", prompt="what is it?", max_tokens=8)
    assert len(completion.choices[0].text) == 8
    messages = [{"role": "user", "content": "what is it?"}]
    options = {"model": "endless", "messages": messages, "max_completion_tokens": 8}
    chat = server.client.chat.completions.create(**options)
    assert chat.choices[0].message.content == completion.choices[0].text
    chunks = list(server.client.chat.completions.create(**options, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == completion.choices[0].text
    with pytest.raises(openai.BadRequestError, match="61 tokens"):
        server.client.completions.create(model="endless", prompt="a" * 61)
    with pytest.raises(openai.NotFoundError):
        server.client.completions.create(model="other", prompt="a")
    with pytest.raises(openai.BadRequestError, match="up to 8 at a time"):
        server.client.completions.create(model="endless", prompt="a", n=9)
    assert json.loads(server.get("/health")) == {"status": "ok"} and "<textarea" in server.get("/")


@pytest.mark.slow
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_makes_room(server, stream):
    before = server.metric("hrm_lm_tokens_total")
    body = json.dumps({"model": "endless", "prompt": "a", "n": 4, "stream": stream}).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body)
        wait_until(lambda: server.metric("hrm_lm_running") == 4)
    wait_until(lambda: server.metric("hrm_lm_running") == 0)
    assert 0 < server.metric("hrm_lm_tokens_total") - before < 4 * LONGEST


@pytest.mark.long
@pytest.mark.parametrize("what", ["replicas", "engines"])
def test_a_killed_replica_or_engine_loses_no_request(server, what):
    (killed,) = getattr(server, what)()
    answers = []

    def ask():
        with server.connect() as client:
            client.models.list()  # over a connection that is there, the head of a request comes before its body
            answers.append(client.completions.create(model="endless", prompt="what is it?", max_tokens=LONGEST))

    clients = [threading.Thread(target=ask) for _ in range(3)]
    for client in clients:
        client.start()
    wait_until(lambda: server.metric("hrm_lm_running") == 3)
    os.kill(killed, signal.SIGKILL)
    for client in clients:
        client.join()
    assert [len(answer.choices[0].text) for answer in answers] == [LONGEST] * 3
    assert killed not in getattr(server, what)() and len(server.engines()) == 1, "an engine ends with its replica"


@pytest.mark.slow
def test_a_port_that_is_taken_is_refused(server, checkpoint, command):
    code, out, err = command(main, "--checkpoint", checkpoint, "--port", server.port)
    assert code == 2 and f"--port {server.port}: Address already in use" in err and not out


@pytest.mark.slow
def test_ctrl_c_ends_it_and_leaves_nothing(server):
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait() == 0
    wait_until(lambda: not processes_with(server.mark))
    assert "Traceback" not in server.log.read_text()
