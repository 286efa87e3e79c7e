"""What is to be served, and by how many replicas with which resources. Ray Serve is imported late: it reads its
environment variables when it is.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow.fs

from hrm_lm.cluster.capacity import cluster_nodes
from hrm_lm.config import Cycles
from hrm_lm.models.contract import Precision

if TYPE_CHECKING:
    from ray.serve import Application


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

    def application(self) -> "Application":
        """To be called where Ray runs."""
        from ray.serve.config import AutoscalingConfig, BackpressureConfig

        from hrm_lm.serving.replica import Replica

        # Another replica comes when answers wait for places. Each replica refuses what is too much by itself, in the form
        # of OpenAI's errors; Serve's own limits are for the time in which no replica is there.
        taken = self.settings.slots + self.settings.max_queue
        scaling = AutoscalingConfig(
            min_replicas=self.least,
            max_replicas=self.most,
            target_ongoing_requests=self.settings.slots,
            upscale_delay_s=10,
        )
        return Replica.options(  # type: ignore[attr-defined]  # Serve made it a Deployment
            **{"num_replicas": self.least} if self.least == self.most else {"autoscaling_config": scaling},
            ray_actor_options=self.resources(),
            max_ongoing_requests=2 * taken,
            max_queued_requests=taken,
            backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
            health_check_period_s=5,
        ).bind(self.settings)

    def resources(self) -> dict[str, float]:
        """Of each replica."""
        nodes, grown = cluster_nodes()
        gpus = float(any(node.get("GPU", 0) for node in nodes + grown)) if self.gpus is None else self.gpus
        return {"num_cpus": self.cpus, "num_gpus": gpus}
