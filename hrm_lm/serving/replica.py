"""A replica: the routes, in an actor of Ray Serve, and the engine in a process of the actor's own. No other actor stands
between the replicas and Serve's proxies.

To be imported once it is clear which Ray this is: Ray Serve reads its environment variables when it is imported.
"""

import asyncio
import multiprocessing
import os
import sys
from contextlib import suppress

from ray import serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig

from hrm_lm.cluster.ray_private import publish, published
from hrm_lm.serving.app import App
from hrm_lm.serving.host import host_engine
from hrm_lm.serving.metrics import Metrics, merged
from hrm_lm.serving.plan import Plan, Settings
from hrm_lm.serving.protocol import Model
from hrm_lm.serving.worker import Worker

BOARD, PUBLISH_S = "hrm_lm_metrics", 1.0
"""Where replicas put their metrics for one another, and how often."""


@serve.deployment
@serve.ingress()
class Replica:
    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Serve awaits it
        processes = multiprocessing.get_context("spawn")
        connection, its = processes.Pipe()
        self.engine = processes.Process(target=host_engine, args=(settings, its), name="engine", daemon=True)
        self.engine.start()
        its.close()
        try:
            served: Model | Exception = await asyncio.to_thread(connection.recv)
        except EOFError:
            raise RuntimeError(self.how_the_engine_ended()) from None
        if isinstance(served, Exception):
            raise served
        self.worker = Worker(connection, settings.slots, settings.max_queue, self.end)
        await self.worker.warm_up(served)
        self.id = serve.get_replica_context().replica_id.unique_id
        self.metrics = Metrics(self.worker, self.id)
        self.asgi = App(served, self.worker, self.metrics, self.everyones_metrics, settings.timeout, settings.key)
        self.publishing = asyncio.create_task(self.publish())

    def __serve_build_asgi_app__(self):
        return self.asgi

    def check_health(self) -> None:
        self.worker.check()

    def end(self) -> None:
        """Without its engine a replica is as good as dead, and Serve knows best what to do about that."""
        print(self.how_the_engine_ended(), file=sys.stderr, flush=True)
        os._exit(1)

    def how_the_engine_ended(self) -> str:
        self.engine.join(1)
        return f"the engine's process has ended by itself (exit code {self.engine.exitcode})"

    async def publish(self) -> None:
        while True:
            with suppress(Exception):  # the next time may do better
                await asyncio.to_thread(publish, BOARD, self.id, self.metrics.text())
            await asyncio.sleep(PUBLISH_S)

    async def everyones_metrics(self) -> str:
        await asyncio.to_thread(publish, BOARD, self.id, self.metrics.text())
        return merged(await asyncio.to_thread(published, BOARD, 10 * PUBLISH_S))


def application(plan: Plan) -> serve.Application:
    """To be called where Ray runs."""
    # Another replica comes when answers wait for places. Each replica refuses what is too much by itself, in the form of
    # OpenAI's errors; Serve's own limits are for the time in which no replica is there.
    resources, taken = plan.resources(), plan.settings.slots + plan.settings.max_queue
    scaling = AutoscalingConfig(
        min_replicas=plan.least,
        max_replicas=plan.most,
        target_ongoing_requests=plan.settings.slots,
        upscale_delay_s=10,
    )
    return Replica.options(  # type: ignore[attr-defined]  # Serve made it a Deployment
        **{"num_replicas": plan.least} if plan.least == plan.most else {"autoscaling_config": scaling},
        ray_actor_options={"num_cpus": resources["CPU"], "num_gpus": resources.get("GPU", 0)},
        max_ongoing_requests=2 * taken,
        max_queued_requests=taken,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        health_check_period_s=5,
    ).bind(plan.settings)
