"""What Ray Train runs on each worker."""

from typing import Any

import ray.train

from hrm_lm.cluster import ray_private
from hrm_lm.cluster.preemption import Preempted
from hrm_lm.cluster.sessions import RayTrainSession
from hrm_lm.config import parse_config
from hrm_lm.training.loop import train


def train_loop_per_worker(loop_config: dict[str, Any]) -> dict[str, Any]:
    """What `TorchTrainer` runs on every worker. loop_config: `config` (as a dict) and RayTrainSession's arguments."""
    config = parse_config(loop_config["config"])
    options = {key: value for key, value in loop_config.items() if key != "config"}
    session = RayTrainSession(hang_timeout=config.ray.hang_timeout, **options)
    try:
        outcome = train(config, session)
    finally:
        session.close()
    if outcome["status"] == "preempted":
        # Ray answers when all workers' parts of the checkpoint are in storage. Steps taken from here would be lost.
        ray.train.get_all_reported_checkpoints(consistency_mode=ray.train.CheckpointConsistencyMode.COMMITTED)
        ray_private.fail_worker(Preempted(f"a node is about to go, and step {outcome['step']} is saved"))
    return outcome
