"""Starting Ray, or joining the cluster that is there.

Preparing a corpus starts Ray too, and its tasks do without PyTorch: this module imports neither PyTorch nor, before it
is needed, Ray.
"""

import os
import random
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from hrm_lm.errors import RunFailed
from hrm_lm.parsing import one_line, printable

DASHBOARD_PORTS = range(20_000, 32_768)
"""Ports that no other component of Ray takes. Those get ports from the system, which gives 32768 and up, or
have 10002 to 19999. Ray does not start where a component has taken the dashboard's port before the dashboard does.
"""


@contextmanager
def started_ray() -> Iterator[None]:
    """A running cluster where there is one (RAY_ADDRESS, `ray start`), else a local Ray for as long as this lasts."""
    # Ray would take progress lines for repetitions of one another and drop most, and Ray Train show the others twice.
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    import ray

    if ray.is_initialized():  # a test's, or a notebook's
        yield
        return
    try:
        init_ray()
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise RunFailed(f"Ray did not start: {one_line(error)}") from None
    try:
        yield
    except KeyboardInterrupt:
        # No orderly shutdown, which can hang on workers in mid-step: a local Ray ends with this process. What they say
        # until then is no news.
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (until this process ends)
        raise
    except BaseException:
        ray.shutdown()
        raise
    ray.shutdown()


def init_ray(**options: Any) -> None:
    """`ray.init`, and if that starts a Ray, one whose processes know it from others on this machine.

    Ray Train frees what a dead run held through the dashboard, which it looks for with an empty environment, and gives
    up where it finds two of them.
    """
    import ray

    from hrm_lm.cluster.ray_private import agent_on_any_port, silence_false_alarm

    port = free_port()
    before = os.environ.get("RAY_API_SERVER_ADDRESS")
    os.environ["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{port}"
    try:
        with agent_on_any_port():
            ray.init(logging_level="error", dashboard_port=port, **options)
        silence_false_alarm()
    finally:
        if before is None:
            del os.environ["RAY_API_SERVER_ADDRESS"]
        else:
            os.environ["RAY_API_SERVER_ADDRESS"] = before


def free_port() -> int:
    """One of DASHBOARD_PORTS on which nothing listens. Seeds do not decide on it: two commands may have the same."""
    with socket.socket() as probe:
        for port in random.SystemRandom().sample(DASHBOARD_PORTS, len(DASHBOARD_PORTS)):
            with suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return port
    raise RuntimeError(
        f"every port from {DASHBOARD_PORTS[0]} to {DASHBOARD_PORTS[-1]} is taken, and its dashboard needs one"
    )


def say(line: str) -> None:
    """Tells the user what the driver does. Standard output is for results."""
    print(printable(line), file=sys.stderr, flush=True)
