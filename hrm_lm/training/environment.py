"""What a run runs on: versions and kinds of hardware, for its report. No names of hosts, no paths."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import hrm_lm


def environment(device: torch.device, world_size: int) -> dict[str, Any]:
    """Of this worker, by name; a list where there are several of it."""
    found: dict[str, Any] = {"workers": world_size, "device": device_name(device)}
    if device.type == "cpu":
        found["threads per worker"] = torch.get_num_threads()
    found |= {"python": platform.python_version(), "torch": torch.__version__.partition("+")[0]}
    for name, package in {"ray": "ray", "hrm_lm": "hrm-lm"}.items():
        try:
            found[name] = version(package)
        except PackageNotFoundError:  # runs from a checkout
            continue
    if device.type == "cuda":
        found["cuda"] = torch.version.cuda
    if commit := git_commit():
        found["git commit"] = commit
    return found | {"system": f"{platform.system()} {platform.machine()}"}


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "CPU"


def git_commit() -> str | None:
    """Of the checkout that this package lies in, with `+` where files were changed; None where it lies in no checkout."""
    root = Path(hrm_lm.__file__).parent.parent
    if not (root / ".git").exists():  # a repository further up may be anybody's
        return None

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10
        )
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + "+" * bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None
