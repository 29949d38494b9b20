# SPDX-License-Identifier: Apache-2.0
"""Steps of a batch as CUDA graphs, which need one launch in place of thousands.

    decoder = replace(decoder, graphs=labs_graphs.Graphs(torch.device("cuda:0")))

labs_fast does this for models on one GPU. This file needs labs_decode.py.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch

import labs_decode
import labs_memory
from labs_decode import Batch, Decoder, Slots, Tensor

MIN_GRAPH_COLUMNS = 512  # columns of the smallest slots whose steps are captured
CAPTURE_AFTER = 4  # steps of one shape before it is captured
GRAPH_COLUMNS = 256  # columns per block: a graph reads whole blocks and so serves as many steps
CAPTURING = threading.Lock()  # torch captures one graph at a time in a process
log = logging.getLogger("labs.graphs")


class Graphs:
    """The captured steps of a batch, by shape.

    A shape (rows, columns) is captured after a few steps, and the graph is checked against a step.
    If capturing fails, all steps run without graphs. If a batch has fewer rows than the shape, dead
    slots are computed beside them. spare_slots: those of the batch that ended last.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.failed = device, False
        self.pool: Any = None  # memory shared by graphs: each output is read before the next replay
        self.first: Any = None  # an empty graph, which keeps the pool alive without other graphs
        self.stream: Any = None  # torch's default stream for captures belongs to its first device
        self.spare_slots: list[Slots] = []
        self.lock = threading.Lock()

    def release(self) -> bool:
        """Free the spare slots; return whether there were any."""
        held = bool(self.spare_slots)
        self.spare_slots.clear()
        self.pool = self.first = None
        return held

    def take_slots(self, cache: Slots) -> None:
        """Keep the slots of a batch that has ended for the next batch, if enough memory is free."""
        size = sum(buffer.nbytes for buffer in cache.buffers)
        if size <= labs_memory.keepable_bytes(cache, size):
            self.spare_slots[:] = [cache]

    def begin(self, newcomer: Batch) -> Batch:
        """Begin a batch in the spare slots, whose graphs are captured, if the newcomer fits."""
        if self.failed:
            return newcomer
        columns, spare = newcomer.cache.cursor.columns, None
        with contextlib.suppress(IndexError):  # another thread's batch may take them first
            spare = self.spare_slots.pop()
        if spare is not None and spare.cursor.columns >= columns:
            return labs_decode.join(Batch((), spare, graphs=self), newcomer)
        del spare  # free them before larger slots are made
        try:
            newcomer.cache.resize(1, 1, self.padded_columns(newcomer.cache, columns))
        except (RuntimeError, MemoryError) as error:
            if not labs_decode.out_of_memory(error):
                raise
            return newcomer  # it keeps the slot of its prefill
        return replace(newcomer, graphs=self)

    def padded_columns(self, cache: Slots, columns: int) -> int:
        """Return more columns if memory is free, because slots that grow lose their graphs."""
        more = max(MIN_GRAPH_COLUMNS, 1 << (columns - 1).bit_length())
        size = 2 * cache.cursor.rows * more * cache.bytes_per_column
        return more if size <= labs_decode.slot_budget(cache.buffers[0].device) else columns

    def forward(self, decoder: Decoder, batch: Batch, ids: Tensor, written: list[int]) -> Tensor:
        """Return logits [B, V] as labs_decode.forward_slots does."""
        at, captured = batch.cache.cursor, batch.cache.captured
        blocks = math.ceil((max(written) + 1) / GRAPH_COLUMNS)
        shape = 1 << (len(ids) - 1).bit_length(), min(blocks * GRAPH_COLUMNS, at.columns)
        known = captured.get(shape, 0)  # the number of steps of this shape, then its graph
        if isinstance(known, Captured):
            with self.lock:  # another thread must not replay before the logits are read
                return known.forward(ids, written)
        logits = labs_decode.forward_slots(decoder, batch, ids, written)
        captured[shape] = steps = cast("int", known) + 1
        if steps > CAPTURE_AFTER and not self.failed:
            self._capture(decoder, batch, shape, (ids, written, logits))
        return logits

    def _capture(
        self, decoder: Decoder, batch: Batch, shape: Any, step: tuple[Tensor, list[int], Tensor]
    ) -> None:
        ids, written, expected = step
        try:
            with self.lock:
                captured = Captured(decoder, batch.cache, shape, ids, written)
                captured.logits.fill_(math.nan)  # otherwise an empty replay would look right
                found = captured.forward(ids, written)
            off = float((found - expected).abs().max())
            if not off <= 0.05 * float(expected.abs().max()):
                raise ArithmeticError(f"the logits of a graph are off by {off:.3g}")
        except Exception as error:  # the model's code and the driver may raise anything
            self.failed = True
            log.warning("steps run without CUDA graphs: %s", str(error).partition("\n")[0])
            return
        batch.cache.captured[shape] = captured


class Captured:
    """The captured step of one shape: from ids and positions in fixed buffers to logits."""

    def __init__(
        self, decoder: Decoder, cache: Slots, shape: tuple[int, int], ids: Tensor, written: Any
    ) -> None:
        rows, top = shape
        self.ids = torch.zeros((rows, 1), dtype=torch.long, device=ids.device)
        self.positions = torch.zeros_like(self.ids)
        self.index = torch.arange(rows, device=ids.device)  # each replay reads these three
        self._put(ids, written)
        ids, positions, index = self.ids, self.positions, self.index  # self would make a cycle

        def step() -> Tensor:
            at = cache.cursor
            at.first_row, at.positions, at.index = 0, positions[:, 0], index
            at.read_to, at.write_from, at.speculative = top, -1, False
            return labs_decode.call_model(decoder, ids, positions, cache, 1)[:, -1]

        self.replay, self.logits = record(decoder.graphs, step)

    def _put(self, ids: Tensor, written: list[int]) -> None:
        live, dead = len(ids), len(self.ids) - len(ids)
        self.ids[:live], self.ids[live:] = ids, 0
        self.positions.copy_(labs_decode.upload([*written, *[0] * dead], self.ids.device)[:, None])

    def forward(self, ids: Tensor, written: list[int]) -> Tensor:
        self._put(ids, written)
        self.replay()
        return self.logits[: len(ids)].to(torch.float32, copy=True)


def record(graphs: Any, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Capture a step; return a function that replays it, and the tensor that it fills."""
    cuda: Any = torch.cuda
    gc.collect()  # freeing an older graph during the capture would break it

    def capture(graph: Any) -> Any:  # thread_local: other threads may read the free memory
        return cuda.graph(graph, graphs.pool, graphs.stream, capture_error_mode="thread_local")

    with cuda.device(graphs.device), CAPTURING:
        graphs.stream = graphs.stream or cuda.Stream(graphs.device)
        if graphs.pool is None:
            graphs.pool, graphs.first = cuda.graph_pool_handle(), cuda.CUDAGraph()
            with capture(graphs.first):
                torch.zeros(1, device=graphs.device)
        graph = cuda.CUDAGraph()
        with capture(graph):
            logits = step()
    return graph.replay, logits
