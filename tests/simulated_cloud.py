"""A cloud of folders, for `ray up` on this machine: a machine is a folder, which is the HOME of what runs on it.

Ray's own fake provider starts raylets itself and runs no command of a cluster's file. Here Ray does all that it does on a
cloud: it reaches a new machine by `ssh`, copies the file's mounts by `rsync`, runs the setup commands and starts Ray.
Stand-ins are `ssh` and `rsync`, which go to the folder; `uv`, which installs nothing, as a machine has the Python of the
tests; and `ray`, whose `stop` would end every Ray of this machine, and whose ports must be free. So neither the network
nor the installation nor the patterns of `rsync_filter` are put to the test.
"""

import os
import shutil
import signal
import stat
import sys
from contextlib import suppress
from pathlib import Path

PROGRAMS = ("ssh", "rsync", "uv", "ray", "python")
LOGIN = "case $- in *i*) ;; *) return;; esac\n"  # how Ubuntu's .bashrc begins


def new_machine(home: Path) -> None:
    """A machine whose image has uv."""
    programs(home / ".local/bin", "uv")
    (home / ".bashrc").write_text(LOGIN)


def programs(folder: Path, *names: str) -> Path:
    """The folder, with the stand-ins of these names. Ray may run a setup command twice."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text(f'#!/bin/sh\nexec {sys.executable} {os.path.abspath(__file__)} {name} "$@"\n')
        (folder / name).chmod(stat.S_IRWXU)
    return folder


def ssh(*arguments: str) -> None:
    """Runs the command as sshd would: in a shell of the machine, without the caller's environment."""
    place = next(i for i, argument in enumerate(arguments) if argument.startswith("ubuntu@"))
    home = Path(os.environ["SIMULATED_CLOUD"]) / arguments[place].removeprefix("ubuntu@")
    kept = ["PYTHONPATH", "SIMULATED_CLOUD", "DASHBOARD_PORT", "RAY_TMPDIR", "RAY_FAKE_CLUSTER"]
    environment = {name: os.environ[name] for name in [*kept, "AUTOSCALER_UPDATE_INTERVAL_S"]}
    environment |= {"HOME": str(home), "PATH": "/usr/local/bin:/usr/bin:/bin"}
    os.chdir(home)
    os.execve("/bin/bash", ["bash", "-c", " ".join(arguments[place + 1 :])], environment)


def rsync(*arguments: str) -> None:
    """Copies a file or a folder to a machine, without what the file excludes by name."""
    *options, source, target = arguments
    excluded = [options[i + 1].removeprefix("**/") for i, option in enumerate(options) if option == "--exclude"]
    host, _, path = target.removeprefix("ubuntu@").partition(":")
    to = Path(path.replace("~", f"{os.environ['SIMULATED_CLOUD']}/{host}"))
    if os.path.isdir(source):
        shutil.copytree(source, to, ignore=shutil.ignore_patterns(*excluded), dirs_exist_ok=True)
    else:
        shutil.copy(source, to)


def uv(command: str, *arguments: str) -> None:
    """`uv venv FOLDER`, and `uv pip install`, which looks whether there is what it is to install."""
    if command == "venv":
        (folder,) = (Path(argument) for argument in arguments if argument.startswith("/"))
        programs(folder / "bin", *PROGRAMS)
        (folder / "bin/activate").write_text(f'export PATH="{folder}/bin:$PATH"\n')
    elif "-e" in arguments:
        project = Path(arguments[-1])
        assert (project / "pyproject.toml").exists() and not (project / ".git").exists()


def ray(command: str, *arguments: str) -> None:
    if command == "stop":
        return
    ports = ["--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"]
    if "--head" in arguments:
        ports += [f"--dashboard-port={os.environ['DASHBOARD_PORT']}", f"--temp-dir={os.environ['RAY_TMPDIR']}"]
    python("-m", "ray.scripts.scripts", command, *arguments, *ports)


def python(*arguments: str) -> None:
    os.execv(sys.executable, [sys.executable, *arguments])


if __name__ == "__main__":
    {"ssh": ssh, "rsync": rsync, "uv": uv, "ray": ray, "python": python}[sys.argv[1]](*sys.argv[2:])
else:
    from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider

    class SimulatedCloud(FakeMultiNodeProvider):
        """Ray's fake provider with machines in place of raylets. The names of machines are their addresses."""

        def __init__(self, provider_config, cluster_name):
            super().__init__(provider_config, cluster_name)
            self._nodes = provider_config.get("nodes", {})

        def prepare_for_head_node(self, cluster_config):
            """Tells the head's autoscaler of the head."""
            cluster_config["provider"]["nodes"] = self._nodes
            return cluster_config

        def create_node(self, node_config, tags, count):
            with self.lock:
                for _ in range(count):
                    self._next_node_id += 1
                    name = f"{tags['ray-user-node-type']}-{self._next_node_id}"
                    new_machine(Path(os.environ["SIMULATED_CLOUD"]) / name)
                    self._nodes[name] = {"tags": dict(tags)}

        def create_node_with_resources_and_labels(self, node_config, tags, count, resources, labels):
            self.create_node(node_config, tags, count)

        def set_node_tags(self, node_id, tags):
            with self.lock:
                self._nodes[node_id]["tags"].update(tags)

        def terminate_node(self, node_id):
            home = f"HOME={os.environ['SIMULATED_CLOUD']}/{node_id}\0".encode()
            with self.lock:
                del self._nodes[node_id]
            for process in Path("/proc").glob("[0-9]*"):
                with suppress(OSError):  # it ended, or is another user's
                    if home in (process / "environ").read_bytes():
                        os.kill(int(process.name), signal.SIGKILL)
