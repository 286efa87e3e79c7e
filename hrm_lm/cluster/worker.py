"""What Ray Train runs on each worker."""

from typing import Any

from hrm_lm.cluster.sessions import RayTrainSession
from hrm_lm.config import parse_config
from hrm_lm.training.loop import train


def train_loop_per_worker(loop_config: dict[str, Any]) -> dict[str, Any]:
    """What `TorchTrainer` runs on every worker. loop_config: `config` (as a dict) and RayTrainSession's arguments."""
    config = parse_config(loop_config["config"])
    session = RayTrainSession(**{key: value for key, value in loop_config.items() if key != "config"})
    try:
        return train(config, session)
    finally:
        session.copy_events()  # what was written after the last report
