"""Many small kernels launched as one: a CUDA graph of a function, recorded after a few calls with equal arguments.

A step launches some seventy kernels and a CPU takes 30 us for each, which is longer than a small dictionary's kernels
run. Replaying a graph costs one launch, and the bits are the same: the same kernels in the same order.
"""

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")

SETTLED = 3  # calls with equal arguments before one is recorded: a last short batch is not worth it


class GraphedFunction(Generic[Result]):
    """`function(x, **constants)` on a GPU from a graph; on other devices, and before it is recorded, the function.

    Pass the same function at every call. It must not wait for the GPU, must have no side effect, and the other tensors
    that it reads must keep their addresses. The next replay overwrites the results of this one. One graph is kept, for
    the last arguments.
    """

    def __init__(self) -> None:
        self._arguments: object = None
        self._calls = 0
        self._recording: tuple[torch.cuda.CUDAGraph, Tensor, Result] | None = None

    def __call__(self, function: Callable[..., Result], x: Tensor, **constants: float) -> Result:
        if not x.is_cuda or torch.version.hip or torch.cuda.is_current_stream_capturing():
            return function(x, **constants)
        arguments = (x.shape, x.dtype, x.device, constants)
        if arguments != self._arguments:
            self._arguments, self._calls, self._recording = arguments, 0, None
        self._calls += 1
        if self._recording is not None:
            graph, given, result = self._recording
            given.copy_(x)
            graph.replay()
            return result
        if self._calls < SETTLED:
            return function(x, **constants)
        given = x.clone(memory_format=torch.contiguous_format)
        now = function(given, **constants)  # compiles and loads what the recording launches
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads copy and allocate meanwhile
            result = function(given, **constants)
        self._recording = graph, given, result
        return now
