"""What is to be served, and by how many replicas with which resources."""

from dataclasses import dataclass

import pyarrow.fs

from hrm_lm.cluster.capacity import cluster_nodes, workers_that_fit
from hrm_lm.cluster.start import say
from hrm_lm.config import Cycles
from hrm_lm.errors import UserError
from hrm_lm.models.contract import Precision


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a replica serves, and how."""

    fs: pyarrow.fs.FileSystem
    checkpoint: str
    """Its path in `fs`."""
    name: str
    """The model's, for clients."""
    cycles: Cycles
    slots: int
    """Answers that are given at a time."""
    max_queue: int
    """Answers that wait beyond that."""
    timeout: float
    mixed_precision: Precision
    key: bytes | None
    """See `hrm_lm.serving.app.App`."""


@dataclass(frozen=True)
class Plan:
    """An application: replicas of the same settings."""

    settings: Settings
    least: int
    most: int
    cpus: int
    """Of each replica; PyTorch takes as many threads. A small model only waits for a second one."""
    gpus: float | None
    """Of each replica. None: one where the cluster has GPUs."""

    def resources(self) -> dict[str, float]:
        """Of each replica. To be called where Ray runs."""
        nodes, grown = cluster_nodes()
        gpus = float(any(node.get("GPU", 0) for node in nodes + grown)) if self.gpus is None else self.gpus
        return {"CPU": self.cpus} | ({"GPU": gpus} if gpus else {})

    def check_room(self, may_grow: bool) -> None:
        """Raises UserError where the cluster has no room for the replicas and cannot get it, as far as is known here."""
        resources, nodes = self.resources(), cluster_nodes()
        if workers_that_fit(resources, *nodes) >= self.least:
            return
        each = " and ".join(f"{amount:g} {kind}" for kind, amount in resources.items())
        if not may_grow:
            raise UserError(f"--replicas {self.least}: this machine has no room for them, with {each} each")
        say(f"waiting for nodes: the cluster has no room yet for {self.least} replica(s) with {each} each")
