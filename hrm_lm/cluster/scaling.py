"""How many workers an elastic run has (`ray.num_workers: 1:4`): it starts with those that fit, and grows at checkpoints.

Ray Train can only start all workers again from the last checkpoint, and has no way to ask them for a checkpoint before.
Its own policy does so once a minute, and the steps since the last checkpoint are lost. Here the workers are started again
just when a checkpoint has been stored: what is repeated are the steps that were taken while it was uploaded, and until Ray
Train saw it (`RAY_TRAIN_HEALTH_CHECK_INTERVAL_S`). A run shrinks when workers fail: those that fit are started again.
"""

import socket
import time
from contextlib import suppress
from typing import Any

import ray
from ray._private.state import available_resources_per_node, state
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.controller.state import ReschedulingState, RunningState, TrainControllerState
from ray.train.v2._internal.execution.scaling_policy import (
    AUTOSCALING_REQUESTS_GET_TIMEOUT_S,
    ElasticScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
)
from ray.train.v2._internal.execution.worker_group import WorkerGroupPollStatus, WorkerGroupState

from hrm_lm.cluster.capacity import workers_that_fit
from hrm_lm.cluster.start import say


class ScalingPolicy(ElasticScalingPolicy):
    """Lives in Ray Train's controller, whose standard error Ray hands to the driver.

    scaling_config: its `elastic_resize_monitor_interval_s` is how long workers run at least before the run grows.
    """

    def __init__(self, scaling_config: ScalingConfig, last_step: int):
        super().__init__(scaling_config)
        self._last_step = last_step
        self._held: int | None = 0
        """Workers whose resources are not free because the run has them; None where that cannot be known."""
        self._reported: dict[int, int] = {}
        """The step of the last checkpoint that a rank has reported."""
        self._waiting = False

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        decision = super().make_decision_for_non_running_worker_group()
        if isinstance(decision, ResizeDecision):
            self._waiting = False
            self._tell(decision)
        else:
            if not self._waiting:
                self._waiting = True
                say(f"waiting until at least {self.scaling_config.min_workers} worker(s) fit the cluster")
            time.sleep(self.GET_RESERVED_RESOURCES_INTERVAL_S)  # the controller would ask again at once, for ever
        return decision

    def make_decision_for_running_worker_group(
        self, worker_group_state: WorkerGroupState, worker_group_status: WorkerGroupPollStatus
    ) -> ScalingDecision:
        """Grows only when a checkpoint has just been stored, and is not the run's last."""
        self._maybe_send_resource_request()
        workers = worker_group_status.worker_statuses
        before = min(self._reported.get(rank, 0) for rank in workers)
        for rank, worker in workers.items():
            if worker.training_report is not None:
                self._reported[rank] = worker.training_report.metrics["step"]
        step = min(self._reported.get(rank, 0) for rank in workers)
        decision: ScalingDecision = NoopDecision()
        if before < step < self._last_step:
            self._held = worker_group_state.num_workers
            decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
            self._held = None
        if isinstance(decision, ResizeDecision):
            self._tell(decision, f"instead of {worker_group_state.num_workers}, from the checkpoint of step {step}")
        return decision

    def after_controller_state_update(
        self, previous_state: TrainControllerState, current_state: TrainControllerState
    ) -> None:
        if isinstance(current_state, RunningState):
            self._held = None  # should the workers fail, Ray Train frees their resources after it has asked
        elif isinstance(current_state, ReschedulingState):
            self._held = 0  # they could not be started

    def _tell(self, decision: ResizeDecision, how: str = "") -> None:
        self._reported.clear()
        least, most = self.scaling_config.min_workers, self.scaling_config.max_workers
        say(f"training with {decision.num_workers} worker(s) of {least} to {most} {how}".rstrip())

    def _count_possible_workers(self, reserved_resources: dict[str, dict[str, float]]) -> int:
        """Ray reserves for this run what others of its libraries do not use, but a task or an actor may use it."""
        possible = super()._count_possible_workers(reserved_resources)
        if self._held is None:
            return possible
        free = list(available_resources_per_node().values())
        return min(possible, self._held + workers_that_fit(self.scaling_config._resources_per_worker_not_none, free))

    def _get_reserved_resources(self) -> Any:
        """As the cluster is now, without nodes that are drained. What Ray's own gives may be 20 s old, and has a dead node until
        its health checks are over; workers would wait for that node for a minute.
        """
        try:
            reserved = ray.get(
                self._autoscaling_coordinator.get_reserved_resources.remote(self._requester_id, recompute=True),
                timeout=AUTOSCALING_REQUESTS_GET_TIMEOUT_S,
            )
        except ray.exceptions.RayError:  # the controller asks again
            return None
        addresses = {node["NodeID"]: (node["NodeManagerAddress"], node["NodeManagerPort"]) for node in ray.nodes()}
        leaving = state.get_draining_nodes()
        return {
            node: resources for node, resources in reserved.items() if node not in leaving and answers(*addresses[node])
        }


def answers(host: str, port: int) -> bool:
    """Whether something listens there, as the raylet of a node that lives does."""
    with suppress(OSError), socket.create_connection((host, port), timeout=2):
        return True
    return False
