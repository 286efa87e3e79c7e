"""A replica: the model, its engine and the routes, in an actor of Ray Serve. Replicas take requests without anything between
them and Serve's proxies.
"""

import asyncio
import sys

import torch
from ray import serve

from hrm_lm.filesystem import local_copy
from hrm_lm.inference.engine import Engine
from hrm_lm.serving.app import Service, build_app
from hrm_lm.serving.metrics import RayMetrics
from hrm_lm.serving.plan import Settings
from hrm_lm.serving.protocol import Model
from hrm_lm.serving.worker import Worker
from hrm_lm.training.checkpoint import load_model

SWITCH_S = 5e-4
"""How long the engine's thread may keep Python to itself while a request waits."""


@serve.deployment
@serve.ingress()
class Replica:
    async def __init__(self, settings: Settings):
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with local_copy(settings.checkpoint, settings.fs) as folder:
            model, tokenizer, _ = load_model(folder, device)
        sys.setswitchinterval(SWITCH_S)
        engine = Engine(model, tokenizer, settings.slots, settings.mixed_precision)
        self.worker = Worker(engine, asyncio.get_running_loop(), settings.max_queue)
        served = Model(settings.name, model, tokenizer, settings.cycles)
        await self.worker.warm_up(served)
        self.service = Service(served, self.worker, RayMetrics(self.worker), settings.timeout, settings.key)

    def __serve_build_asgi_app__(self):
        return build_app(self.service)

    def check_health(self) -> None:
        self.worker.check()
