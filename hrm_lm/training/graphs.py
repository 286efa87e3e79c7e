"""Optimisation steps as CUDA graphs. The kernels of a small model take less time than it takes to launch them, and a
graph launches all kernels of a step at once.

A graph repeats the same kernels on the same memory. So there is a graph for each kind of step (shapes of the batches,
cycles, applications with gradient), and whatever else changes from step to step is read from tensors: the batches, the
learning rate, the number of the step. The first step of a kind runs eagerly, which compiles, tunes and allocates what
is made on first use. The second step of the kind is captured, and from then on the graph is replayed. Each of them is
a step of the run: no step is repeated or left out.

All graphs share a pool of memory, which is as large as the largest of their steps.
"""

from collections.abc import Callable, Hashable
from functools import cache

import torch
from torch import Tensor

from hrm_lm.config import Config
from hrm_lm.data.collate import AnyBatch
from hrm_lm.errors import UserError

MOST_GRAPHS = 64
"""Kinds of steps that get a graph. Steps of further kinds run eagerly."""
SMALL = 0.25
"""Share of a GPU's memory that a step may take for `train.cuda_graphs: auto`. What a graph holds is lost to the rest."""


@cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The same for all runs of a process: cuBLAS keeps a workspace for each stream that it has seen."""
    return torch.cuda.Stream(device)


class StepGraphs:
    """The graphs of a run, by the kind of step."""

    def __init__(self, device: torch.device, only_small: bool):
        """only_small: gives up graphs once a step takes more memory than SMALL says."""
        self.device, self.only_small = device, only_small
        self.lr = torch.zeros((), device=device)
        """The learning rate, for the optimizer to read; float32, as fused optimizers want it."""
        self.stream = capture_stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.given_up = False
        self.seen: set[Hashable] = set()
        self.captured: dict[Hashable, tuple[torch.cuda.CUDAGraph, list[Tensor]]] = {}
        torch.cuda.reset_peak_memory_stats(device)

    def run(self, kind: Hashable, batches: list[AnyBatch], step: Callable[[list[AnyBatch]], None]) -> None:
        """`step(batches)`, or a replay of it. kind: all that the step depends on besides tensors and their shapes.

        step: launches work on the device and does not wait for it. Raises UserError where it cannot be captured.
        """
        if self.given_up:
            step(batches)
            return
        tensors = [tensor for batch in batches for tensor in batch]
        key = (kind, *(tensor.shape for tensor in tensors))
        if key in self.captured:
            graph, inputs = self.captured[key]
            torch._foreach_copy_(inputs, tensors)
            graph.replay()
            return
        # Clones for the first step of a kind, too: torch.compile tells tensors from views, and would compile again.
        own = [type(batch)(*(tensor.clone() for tensor in batch)) for batch in batches]
        if key in self.seen and len(self.captured) < MOST_GRAPHS:
            graph = self._capture(own, step)
            self.captured[key] = graph, [tensor for batch in own for tensor in batch]
            graph.replay()
        else:
            self._run_eagerly(own, step)
            if self.only_small and key not in self.seen and not self._is_small():
                self.given_up = True
                torch.cuda.synchronize(self.device)
                self.captured.clear()
                torch.cuda.empty_cache()  # what is kept for another stream
            self.seen.add(key)

    def _run_eagerly(self, batches: list[AnyBatch], step: Callable[[list[AnyBatch]], None]) -> None:
        """On the stream of the captures, since cuBLAS and autograd keep something for each stream."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            step(batches)
        current.wait_stream(self.stream)

    def _capture(self, batches: list[AnyBatch], step: Callable[[list[AnyBatch]], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        try:
            # Another thread copies batches meanwhile, hence "thread_local".
            with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                step(batches)
        except RuntimeError as error:
            cause = error.__context__ or error  # the end of a capture complains in its turn
            if isinstance(cause, torch.OutOfMemoryError) or not isinstance(cause, Exception):
                raise cause from None
            # The run cannot go on eagerly: a broken capture leaves PyTorch's allocator in the midst of it.
            reason = str(cause).strip().partition("\n")[0]
            raise UserError(
                f"train.cuda_graphs: the step cannot be captured ({reason}); set train.cuda_graphs=false"
            ) from cause
        return graph

    def _is_small(self) -> bool:
        """Whether the steps so far took little of the memory that this process has, or could have."""
        free, _ = torch.cuda.mem_get_info(self.device)
        mine = torch.cuda.memory_reserved(self.device)
        return torch.cuda.max_memory_allocated(self.device) <= SMALL * (free + mine)


def step_graphs(config: Config, device: torch.device) -> StepGraphs | None:
    """The graphs that `train.cuda_graphs` asks for; None where steps run eagerly. Raises UserError without a GPU."""
    wanted = config.train.cuda_graphs
    if wanted is True and device.type != "cuda":
        raise UserError("train.cuda_graphs: true needs a CUDA GPU; auto takes graphs where there is a GPU")
    if wanted == "auto":
        # Batches of so many tokens hardly ever have the same shape twice.
        unfit = config.graphs_obstacle or config.train.batch_tokens or config.train.activation_memory < 1
        wanted = device.type == "cuda" and not unfit
    return StepGraphs(device, only_small=config.train.cuda_graphs == "auto") if wanted else None
