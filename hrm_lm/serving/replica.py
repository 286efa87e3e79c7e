"""A replica: the model, its engine and the routes, in an actor of Ray Serve. Replicas take requests without anything between
them and Serve's proxies.
"""

import asyncio
from contextlib import suppress

import torch
from ray import serve

from hrm_lm.cluster.ray_private import publish, published
from hrm_lm.filesystem import local_copy
from hrm_lm.inference.engine import Engine
from hrm_lm.serving.app import App
from hrm_lm.serving.metrics import Metrics, merged
from hrm_lm.serving.plan import Settings
from hrm_lm.serving.protocol import Model
from hrm_lm.serving.worker import Worker
from hrm_lm.training.checkpoint import load_model

BOARD, PUBLISH_S = "hrm_lm_metrics", 1.0
"""Where replicas put their metrics for one another, and how often."""


@serve.deployment
@serve.ingress()
class Replica:
    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Serve awaits it
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with local_copy(settings.checkpoint, settings.fs) as folder:
            model, tokenizer, checkpoint = load_model(folder, device)
        engine = Engine(model, tokenizer, settings.slots, settings.mixed_precision)
        self.worker = Worker(engine, asyncio.get_running_loop(), settings.max_queue)
        served = Model(settings.name, model, tokenizer, settings.cycles, checkpoint.config.train.sample_h_cycles)
        await self.worker.warm_up(served)
        self.id = serve.get_replica_context().replica_id.unique_id
        self.metrics = Metrics(self.worker, self.id)
        self.asgi = App(served, self.worker, self.metrics, self.everyones_metrics, settings.timeout, settings.key)
        self.publishing = asyncio.create_task(self.publish())

    def __serve_build_asgi_app__(self):
        return self.asgi

    def check_health(self) -> None:
        self.worker.check()

    async def publish(self) -> None:
        while True:
            with suppress(Exception):  # the next time may do better
                await asyncio.to_thread(publish, BOARD, self.id, self.metrics.text())
            await asyncio.sleep(PUBLISH_S)

    async def everyones_metrics(self) -> str:
        await asyncio.to_thread(publish, BOARD, self.id, self.metrics.text())
        return merged(await asyncio.to_thread(published, BOARD, 10 * PUBLISH_S))
