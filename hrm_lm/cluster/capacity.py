"""What the cluster has room for: the resources of a run's workers."""

import os
from typing import TYPE_CHECKING

import yaml

from hrm_lm.cluster.start import say
from hrm_lm.config import Config
from hrm_lm.errors import UserError

if TYPE_CHECKING:
    from ray.train import ScalingConfig


def plan_workers(config: Config) -> "ScalingConfig":
    """The ScalingConfig; raises UserError where the cluster neither has the workers' resources nor can grow to them."""
    import ray
    from ray.train import ScalingConfig

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    growth = cluster_growth()
    num_gpus, num_cpus = (int(sum(node.get(kind, 0) for node in nodes)) for kind in ("GPU", "CPU"))
    workers = config.ray.num_workers
    use_gpu = config.ray.use_gpu
    if use_gpu == "auto":
        use_gpu = num_gpus > 0 or any(node.get("GPU", 0) for node in growth)
    if config.train.mixed_precision == "fp16" and not use_gpu:
        raise UserError("train.mixed_precision: fp16 needs a CUDA GPU and the cluster has none; use bf16 or none")
    if config.train.cuda_graphs is True and not use_gpu:
        raise UserError("train.cuda_graphs: true needs a CUDA GPU and the cluster has none; use auto")

    cpus = config.ray.cpus_per_worker
    if cpus == "auto":
        smallest = min((int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1), default=1)
        cpus = 1 if use_gpu else min(max(num_cpus // workers, 1), smallest)
    resources = {"CPU": cpus} | ({"GPU": 1} if use_gpu else {})

    def room(available: list[dict[str, float]]) -> int:
        return sum(min(int(node.get(kind, 0) // amount) for kind, amount in resources.items()) for node in available)

    if room(nodes) < workers and room(nodes + growth) < workers and not config.ray.wait_for_nodes:
        each = " and ".join(f"{amount} {kind}" for kind, amount in resources.items())
        raise UserError(
            f"ray.num_workers: {workers} workers of {each} each do not fit the cluster: it has {len(nodes)} node(s), "
            f"{num_cpus} CPUs, {num_gpus} GPUs, room for {room(nodes + growth)} such workers with all it can grow to "
            "(where Ray cannot tell that, as under KubeRay: --set ray.wait_for_nodes=true)"
        )
    say(f"Ray: {len(nodes)} node(s), {num_cpus} CPUs, {num_gpus} GPUs; {workers} worker(s) of {resources}")
    return ScalingConfig(num_workers=workers, use_gpu=use_gpu, resources_per_worker=resources)


def cluster_growth() -> list[dict[str, float]]:
    """Resources of each node that an autoscaler may add, as far as Ray can know them."""
    path = os.path.expanduser("~/ray_bootstrap_config.yaml")  # where `ray up` leaves the head its cluster.yaml
    if not os.path.exists(path):
        return []
    import ray

    if not any(node["Alive"] and "node:__internal_head__" in node["Resources"] for node in ray.nodes()):
        return []
    with open(path, encoding="utf-8") as file:
        cluster = yaml.safe_load(file)
    head = cluster.get("head_node_type")
    return [
        kind.get("resources", {})
        for name, kind in cluster.get("available_node_types", {}).items()
        for _ in range(kind.get("max_workers", cluster.get("max_workers", 0)) if name != head else 0)
    ]
