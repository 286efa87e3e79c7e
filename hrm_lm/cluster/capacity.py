"""What the cluster has room for: the resources of the workers of a run or of a sweep's trials."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

import yaml

from hrm_lm.cluster.start import say
from hrm_lm.config import Config
from hrm_lm.errors import UserError

if TYPE_CHECKING:
    from ray.train import ScalingConfig

UNKNOWN_GROWTH = "(where Ray cannot tell that, as under KubeRay: --set ray.wait_for_nodes=true)"
"""Ends the message that workers do not fit."""


def plan_workers(config: Config) -> "ScalingConfig":
    """The ScalingConfig; raises UserError where the cluster neither has the workers' resources nor can grow to them."""
    from ray.train import ScalingConfig

    nodes, grown = cluster_nodes()
    num_gpus, num_cpus = (int(sum(node.get(kind, 0) for node in nodes)) for kind in ("GPU", "CPU"))
    least, most = config.ray.workers
    use_gpu = wants_gpus(config, nodes + grown)
    if config.train.mixed_precision == "fp16" and not use_gpu:
        raise UserError("train.mixed_precision: fp16 needs a CUDA GPU and the cluster has none; use bf16 or none")
    if config.train.cuda_graphs is True and not use_gpu:
        raise UserError("train.cuda_graphs: true needs a CUDA GPU and the cluster has none; use auto")

    cpus = config.ray.cpus_per_worker
    if cpus == "auto":
        smallest = min((int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1), default=1)
        cpus = 1 if use_gpu else min(max(num_cpus // most, 1), smallest)
    resources = {"CPU": cpus} | ({"GPU": 1} if use_gpu else {})
    room = workers_that_fit(resources, nodes, grown)
    workers = f"{least}" if least == most else f"{least} to {most}"
    if room < least and not config.ray.wait_for_nodes:
        each = " and ".join(f"{amount} {kind}" for kind, amount in resources.items())
        raise UserError(
            f"ray.num_workers: {workers} workers of {each} each do not fit the cluster: it has {len(nodes)} node(s), "
            f"{num_cpus} CPUs, {num_gpus} GPUs, room for {room} such workers with all it can grow to "
            f"{UNKNOWN_GROWTH}"
        )
    say(f"Ray: {len(nodes)} node(s), {num_cpus} CPUs, {num_gpus} GPUs; {workers} worker(s) of {resources}")
    num_workers = most if least == most else (least, most)
    return ScalingConfig(num_workers=num_workers, use_gpu=use_gpu, resources_per_worker=resources)


def wants_gpus(config: Config, nodes: list[dict[str, float]]) -> bool:
    """Whether each worker takes a GPU."""
    if config.ray.use_gpu == "auto":
        return any(node.get("GPU", 0) for node in nodes)
    return config.ray.use_gpu


def workers_that_fit(resources: Mapping[str, float], *clusters: list[dict[str, float]]) -> int:
    """How many workers of these resources the roomiest of the clusters holds. Each worker is on a single node.

    clusters: resources of each node. Ten tenths of a GPU are a GPU, rounding aside.
    """
    return max(
        sum(min(int(node.get(kind, 0) / amount + 1e-6) for kind, amount in resources.items()) for node in nodes)
        for nodes in clusters
    )


def cluster_nodes() -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Resources of each node that is there, and of each node of the cluster at its largest, as far as Ray can know it."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    heads = [node for node in nodes if "node:__internal_head__" in node]
    path = os.path.expanduser("~/ray_bootstrap_config.yaml")  # where `ray up` leaves the head its cluster.yaml
    if not heads or not os.path.exists(path):
        return nodes, nodes
    with open(path, encoding="utf-8") as file:
        cluster = yaml.safe_load(file)
    head = cluster.get("head_node_type")
    return nodes, heads + [
        kind.get("resources", {})
        for name, kind in cluster.get("available_node_types", {}).items()
        for _ in range(kind.get("max_workers", cluster.get("max_workers", 0)) if name != head else 0)
    ]
