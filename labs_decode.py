# SPDX-License-Identifier: Apache-2.0
"""ids → logits: how the rows of one transformers model share forward calls. Tensors only.

A slot is a row of preallocated buffers with a column for each token, filled from the left: rows of
any length join and leave at any step. These functions change the cache, in this order. All but
`forward` return the batch to go on with; the one that they were given is used up:

    prefill   write the next chunk of one new prompt, until none is pending
    join      copy a row that has made its first step alone into a free slot of another batch
    forward   write one token of every row and return the logits after it (labs_loop chooses)
    keep      drop all rows but those named; the last row moves into each hole

Importing this file registers `attention` and `attention_mask` with transformers; the mask applies
the model's own rule at the row's position, which it reads from the cache. This file needs torch and
transformers, but no other file of labs: faster parts are passed in, see the Protocols.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import inspect
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, cache_utils
from transformers.cache_utils import CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

LONE_ROW_COPIES = 4  # a lone row runs as 4 equal rows: 1 rounds differently, 2 take longer
CHUNK = 256  # prompt tokens per prefill call, which limits how long other rows wait for it
GPU_CHUNKS = 8  # chunks per prefill call on a GPU, where a launch costs about 1 ms
FIRST_COLUMNS = 256  # for new tokens, in slots that grow
COLUMNS = 64  # attention reads whole blocks of columns, see `blocks`
ALIGNED = 8  # queries: multiples of so many align the buffers of the kernel for 16 bits
SUMMED = 256  # columns that one product sums: libraries cut longer sums by their length
MEMORY_SHARE = 0.5  # the share of free memory for slots
OOM_MESSAGES = ("can't allocate memory", "not enough memory")  # torch's, on Linux and elsewhere

Tensor = torch.Tensor
Pair = tuple[Tensor, Tensor]
Processor = Callable[[list[int], Tensor], Tensor]  # (ids so far, float32 logits [V]) to logits
Mode = Literal["joins", "whole", "alone"]
PretrainedModel = Any  # untyped, because their attributes differ from model to model
PretrainedConfig = Any
Tokenizer = Any
CacheLayer = Any


# ---------------------------------------------------------------- rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How one row chooses its tokens. Temperature 0 is greedy.

    processors: each takes (ids so far, float32 logits [V]) and returns logits [V].
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    seed: int = 0
    processors: tuple[Processor, ...] = ()


@dataclass(slots=True, eq=False)
class Row:
    """One sequence. `ids` grows; `written` counts the columns that are filled in its slot.

    lookahead: tokens that a step may guess. owner: only prefixes of this owner are reused; with
    exact_prefix, only columns that a prefill computed. cancelled: set by any thread. over: the
    reader wants no more tokens. exact_columns: the leading columns prefilled in whole chunks.
    cached: prompt tokens taken from a prefix. drafted: of labs_draft. deadline, entered: by
    time.perf_counter(). seen: the distinct ids. bias: ids and values of logit_bias as tensors.
    waits: for memory, see labs_waiting. shared: columns that its slot leaves out, see labs_shared.
    """

    id: int
    ids: list[int]
    max_new_tokens: int
    sampling: Sampling
    lookahead: int = 0
    deadline: float = math.inf
    owner: str = ""
    exact_prefix: bool = False
    cancelled: bool = False
    over: bool = False
    waits: bool = False
    shared: int = 0
    prompt_length: int = 0
    written: int = 0
    exact_columns: int = 0
    cached: int = 0
    drafted: object = None
    entered: float = 0.0
    generated: Counter[int] = field(default_factory=Counter)
    seen: set[int] = field(default_factory=set)
    bias: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        self.prompt_length, self.seen = len(self.ids), {*self.ids}

    @property
    def columns(self) -> int:
        return self.prompt_length + self.max_new_tokens

    @property
    def late(self) -> bool:
        return time.perf_counter() > self.deadline

    def take(self, token: int, written: int = 1) -> None:
        self.written += written
        self.ids.append(token)
        self.generated[token] += 1
        self.seen.add(token)


@dataclass(slots=True)
class Batch:
    """Rows and their slots.

    stepwise: yields the logits, if the model cannot be batched and has no slots. logits: float32
    [1, V] after the last token of a prompt, until a step chooses from them. at_once: rows per
    forward call, 0 for all; lowered after a step ran out of memory. graphs: reuses the slots.
    """

    rows: tuple[Row, ...]
    cache: Slots
    stepwise: Generator[Tensor, int, None] | None = None
    logits: Tensor | None = None
    at_once: int = 0
    graphs: StepGraphs | None = None

    @property
    def pending(self) -> int:
        """Tokens that `prefill` must still write before this newcomer's next step."""
        row = self.rows[0]  # a restarted row prefills all ids but the last
        known = len(row.ids) - 1 if row.generated else row.prompt_length
        return 0 if self.stepwise is not None else max(known - row.written, 0)


# ---------------------------------------------------------------- slots


@dataclass(slots=True)
class Cursor:
    """Where the current forward call writes and how far it reads, shared by all layers.

    Prefill writes one row from column `write_from` on, and so does a step of one row on a CPU; in
    other steps it is -1. They write query b to row index[b], column positions[b]. index[b] is
    first_row + b, 0 with `speculative`. shared: columns that slots lack, but these numbers count.
    """

    rows: int
    columns: int
    read_to: int = 0
    write_from: int = 0
    first_row: int = 0
    positions: Tensor | None = None
    index: Tensor | None = None
    speculative: bool = False
    shared: int = 0

    @property
    def queries(self) -> int:
        return 1 if self.positions is None else len(self.positions)


class SlotLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values as [rows, heads, columns, head_dim], allocated once.

    Every column of a used slot is finite: masked columns get weight 0, and 0 * NaN is NaN.
    """

    is_sliding = False  # all columns are kept; the mask applies the window
    keys: Any  # None until the first call
    values: Any
    views: Any = None  # of them, kept by labs_attention

    def __init__(self, cursor: Cursor, **kwargs: object) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cursor = cursor

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        return (self.keys, self.values) if self.is_initialized else ()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, columns = self.cursor.rows, self.cursor.columns - self.cursor.shared
        self.keys, self.values = (
            states.new_empty((rows, states.shape[1], columns, states.shape[3]))
            for states in (key_states, value_states)
        )
        self.keys[:1], self.values[:1], self.is_initialized = 0, 0, True

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> Pair:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        at, end = self.cursor, self.cursor.read_to - self.cursor.shared
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            if at.positions is None or at.index is None:
                buffer[:1, :, at.write_from : end] = states
            else:
                index, positions = at.index, at.positions
                positions = positions - at.shared if at.shared else positions
                if index.device != buffer.device:
                    index, positions = index.to(buffer.device), positions.to(buffer.device)
                buffer[index, :, positions] = states[: at.queries, :, 0]
        rows = slice(at.first_row, at.first_row + (1 if at.speculative else at.queries))
        keys, values = self.keys[rows, :, :end], self.values[rows, :, :end]
        if at.speculative:
            keys, values = (each.expand(at.queries, -1, -1, -1) for each in (keys, values))
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cursor.read_to, 0

    def get_seq_length(self) -> int:
        return self.cursor.write_from if self.cursor.positions is None else self.cursor.read_to - 1

    def get_max_length(self) -> int:
        return -1

    def resize(self, live: int, rows: int, columns: int) -> None:
        """Move the first `live` rows into larger buffers."""
        columns, self.views = columns - self.cursor.shared, None
        for name in ("keys", "values") if self.is_initialized else ():
            old = getattr(self, name)
            shape = max(rows, len(old)), old.shape[1], max(columns, old.shape[2]), old.shape[3]
            if shape == old.shape:
                continue  # an earlier call ran out of memory after it resized this layer
            new = old.new_empty(shape)
            new[:live, :, : old.shape[2]] = old[:live]
            new[:live, :, old.shape[2] :] = 0
            setattr(self, name, new)  # only one layer's copy exists at a time

    def read(self, row: int, first: int, end: int) -> list[Tensor]:
        """Return these columns of a row's keys and values, [heads, columns, head_dim]."""
        return [buffer[row, :, first:end] for buffer in self.buffers]

    def write(self, row: int, other: SlotLayer, columns: int) -> None:
        """Copy the first `columns` of another layer's first row into slot `row`."""
        first = self.cursor.shared
        for mine, theirs in zip(self.buffers, other.read(0, first, columns), strict=True):
            mine[row, :, : columns - first] = theirs
            mine[row, :, columns - first :] = 0

    def move(self, source: int, target: int, columns: int) -> None:
        for buffer in self.buffers:
            own = slice(columns - self.cursor.shared)
            buffer[target, :, own] = buffer[source, :, own]

    def cut(self, live: int) -> None:
        """Do nothing: the slots of the rows from `live` on stay for newcomers."""


# By exact type, as a subclass may hold more. labs_states.py adds layers with recurrent states.
LAYERS: dict[type, type | None] = {
    cache_utils.DynamicLayer: SlotLayer,
    cache_utils.DynamicSlidingWindowLayer: SlotLayer,
    cache_utils.DummyLayer: None,  # it stays as it is
}


class Slots(cache_utils.Cache):
    """A transformers cache whose rows are slots, with a layer for each layer of its own cache."""

    attention = ""  # the name in transformers of an attention that reads other slots, see labs_kv
    of_step: Any = None  # instead of labs_attention.of_step for other columns, see labs_shared

    def __init__(self, config: PretrainedConfig, columns: int) -> None:
        self.cursor = Cursor(rows=1, columns=blocks(columns))
        self.captured: dict[tuple[int, int], object] = {}  # CUDA graphs that read these slots
        self.doubles = True  # in `make_room`, where memory is not short
        super().__init__(layers=[self._layer(old) for old in _cache_layers(config)])

    def _layer(self, old: CacheLayer) -> CacheLayer:
        kind, states = LAYERS[type(old)], getattr(old, "number_of_states", 1)
        return kind(self.cursor, number_of_states=states) if kind else old

    @property
    def stateful_layers(self) -> list[CacheLayer]:
        """The layers that hold keys, values or states."""
        return [layer for layer in self.layers if type(layer) not in LAYERS]

    @property
    def buffers(self) -> list[Tensor]:
        return [b for layer in self.layers if isinstance(layer, SlotLayer) for b in layer.buffers]

    @staticmethod
    def head_bytes(dim: int, itemsize: int) -> int:
        """Return the bytes of one head's key and value."""
        return 2 * dim * itemsize

    @property
    def bytes_per_column(self) -> int:
        """Bytes of one token of one row, over all layers."""
        return sum(buffer[0, :, 0].nbytes for buffer in self.buffers)

    def get_query_offset(self, layer_idx: int = 0) -> Tensor | int:  # type: ignore[override]
        """Return each row's position, which transformers passes to `attention_mask`."""
        return self.cursor.write_from if self.cursor.positions is None else self.cursor.positions

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.cursor.write_from if self.cursor.positions is None else self.cursor.read_to - 1

    def make_room(self, live: int, columns: int) -> None:
        """Have a slot free beside the first `live` ones, doubling their number if all are taken."""
        at = self.cursor
        rows = at.rows if live < at.rows else live + (at.rows if self.doubles else 1)
        self.resize(live, rows, max(columns, at.columns))

    def resize(self, live: int, rows: int, columns: int) -> None:
        """Move the first `live` rows into `rows` slots of `columns` columns."""
        if (rows, columns) != (self.cursor.rows, self.cursor.columns):
            self.captured.clear()  # they read the old buffers
            for layer in self.stateful_layers:
                layer.resize(live, rows, columns)
        self.cursor.rows, self.cursor.columns = rows, columns


def _is_slotted(layer: type) -> bool:
    return issubclass(LAYERS.get(layer) or object, SlotLayer)


def _cache_layers(config: PretrainedConfig) -> list[CacheLayer]:
    return list(DynamicCache(config=config).layers)


def blocks(columns: int) -> int:
    """Round up to 64, 128, or a multiple of SUMMED: with few lengths, sums round alike."""
    if columns <= SUMMED:
        return max(COLUMNS, 1 << (columns - 1).bit_length())
    return math.ceil(columns / SUMMED) * SUMMED


# ---------------------------------------------------------------- attention


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute attention [B, Q, heads, dim] by sdpa where it can and is fast, else by products.

    The parameters have transformers' names, because some models pass them by name.
    """
    states = query, key, value
    if lengths := getattr(attention_mask, "lengths", None):  # set by labs_calls.packed_mask
        parts = zip(*(torch.split(each, lengths, 2) for each in states), strict=True)
        outputs = [attention(module, a, b, c, None, **options)[0] for a, b, c in parts]
        return torch.cat(outputs, 1), None
    special = options.get("softcap") is not None or options.get("s_aux") is not None
    if special or (options.get("position_bias") is None and _too_few_heads_for_sdpa(query, key)):
        return _eager_attention(*states, attention_mask, options), None
    return sdpa_attention_forward(module, *states, attention_mask, **options)


def attention_invariant(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute attention that gives a row the same bits in any batch, in steps on a CPU.

    In float32, plain products do this and sdpa does not. In 16 bits sdpa does, for SUMMED columns
    and a multiple of ALIGNED queries, so queries are padded.
    """
    special = options.get("softcap") is not None or options.get("s_aux") is not None
    special = special or getattr(attention_mask, "dtype", torch.bool) == torch.bool  # a prompt's
    if query.shape[2] > 1 or options.get("position_bias") is not None:
        return attention(module, query, key, value, attention_mask, **options)
    # The copies of a lone row have no keys of their own: they get the row's output.
    live = query[: len(key)]
    if special or query.dtype == torch.float32 or key.shape[-1] != value.shape[-1]:
        output = _eager_attention(live, key, value, attention_mask, options)
    else:
        output = _flash(live, key, value, cast("Tensor", attention_mask), options.get("scaling"))
    return output.expand(len(query), -1, -1, -1), None


def _flash(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """Compute attention [B, 1, heads, dim]; heads that share keys become queries of one head."""
    (batch, heads, _, dim), (groups, total) = q.shape, k.shape[1:3]
    mask = mask.expand(batch, groups, 1, total).reshape(-1, 1, total)
    q, k, v = (each.reshape(batch * groups, -1, dim) for each in (q, k, v))
    parts = flash_parts(padded(q, ALIGNED), k, v, mask, scale)
    return combined(*parts)[:, : heads // groups].reshape(batch, 1, heads, dim)


def padded(lines: Tensor, multiple: int) -> Tensor:
    """Return lines [..., L, T] with zeros behind them, for a multiple of lines."""
    short = -lines.shape[-2] % multiple
    return torch.nn.functional.pad(lines, (0, 0, 0, short)) if short else lines


def flash_parts(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None) -> Pair:
    """Return attention [N, parts, Q, dim] to each SUMMED of k, v [N, T, dim], and their sums' logs.

    q: [N, Q, dim], `padded`. mask: [N, 1 or Q, T], to be added.
    """
    n, total = len(q), k.shape[1]
    parts = 1 if total % SUMMED else total // SUMMED
    q = q[:, None].expand(-1, parts, -1, -1)
    k, v = (each.view(n, parts, -1, each.shape[-1]) for each in (k, v))
    mask = mask.view(len(mask), -1, parts, k.shape[2]).transpose(1, 2)
    output, sums = flash(q, k, v, mask, scale)
    # The kernel gives a hidden part the sum 0, and not -inf.
    return output, sums.masked_fill(mask.amax(3) == -torch.inf, -torch.inf)


def flash(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Pair:
    """Call the kernel for 16 bits. A lone item is computed twice: threads would cut its sums."""
    if lone := q.shape[0] * q.shape[1] == 1:
        q, k, v = (each.expand(2, -1, -1, -1) for each in (q, k, v))
    kernel = torch._scaled_dot_product_flash_attention_for_cpu
    output, sums = kernel(q, k, v, attn_mask=mask, scale=scale)
    return (output[:1], sums[:1]) if lone else (output, sums)


def combined(output: Tensor, sums: Tensor) -> Tensor:
    """Return attention [N, Q, dim] from that to each part, weighted by the parts' sums."""
    if output.shape[1] == 1:
        return output[:, 0]
    return (output * sums.softmax(1).unsqueeze(3)).sum(1).to(output.dtype)


def _eager_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> Tensor:
    """Return [B, Q, heads, dim] from q [B, heads, Q, dim] and k, v [B, groups, T, dim]."""
    (batch, heads, queries, dim), (groups, total) = q.shape, k.shape[1:3]
    if mask is None:
        mask = q.new_ones((1, 1, queries, total), dtype=torch.bool).tril(total - queries)
    if queries > CHUNK:  # scores are much larger than queries and keys
        parts = zip(*(torch.split(each, CHUNK, 2) for each in (q, mask)), strict=True)
        return torch.cat([_eager_attention(part, k, v, seen, options) for part, seen in parts], 1)
    q3, k3 = q.reshape(batch * groups, -1, dim), k.reshape(batch * groups, total, dim)
    wide = q.is_cuda and q.dtype != torch.float32  # as fused attention kernels compute it
    scores = torch.bmm(q3, k3.mT, out_dtype=torch.float32) if wide else product(q3, k3.mT)
    scores = scores.mul_(options.get("scaling") or dim**-0.5).view(batch, groups, -1, total)
    if (cap := options.get("softcap")) is not None:
        scores = cap * torch.tanh(scores / cap)
    if mask.dtype == torch.bool:
        mask = additive(mask, scores.dtype)
    scores.view(batch, groups, -1, queries, total).add_(mask.unsqueeze(2))
    if (sinks := options.get("s_aux")) is not None:  # a sink takes weight, but adds no value
        sinks = sinks.to(scores.dtype).view(1, groups, -1, 1).repeat_interleave(queries, 2)
        scores = torch.cat([scores, sinks.expand(batch, -1, -1, -1)], -1)
    weights = scores.softmax(-1)[..., :total].to(v.dtype)
    return weighted(weights, v).view(batch, heads, queries, -1).transpose(1, 2)


def weighted(weights: Tensor, values: Tensor) -> Tensor:
    """Return weights [..., G, T] @ values [..., T, dim]; on a CPU its sums have a fixed order."""
    # MKL cuts longer sums than SUMMED by their length: zeros at the end would change bits.
    size = SUMMED if weights.is_cpu else max(1, weights.shape[-1])
    w, v = weights.flatten(0, -3), values.flatten(0, -3)
    parts = map(product, torch.split(w, size, -1), torch.split(v, size, -2))
    return functools.reduce(torch.add, parts).view(*weights.shape[:-1], -1)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return a [N, L, K] @ b [N, K, M]; a lone item twice on a CPU: threads would cut its sums."""
    if len(a) > 1 or not a.is_cpu:
        return torch.bmm(a, b)
    return torch.bmm(a.expand(2, -1, -1), b.expand(2, -1, -1))[:1]


def _too_few_heads_for_sdpa(q: Tensor, k: Tensor) -> bool:
    """Return whether sdpa would leave most of a GPU idle; plain products use more of it.

    An H200 takes 20 instead of 83 us for one query, 4,096 columns and 8 heads of keys.
    """
    if q.shape[2] > 1 or not q.is_cuda or q.dtype == torch.float32:
        return False
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    return 2 * k.shape[0] * k.shape[1] < int(processors)


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a bool mask as numbers to add to scores; sdpa would convert it in every layer."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, -torch.inf)


def attention_mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: Tensor | int = 0, **options: Any
) -> Tensor | None:
    """Return the mask [B, 1, Q, T] of the model's own mask_function at each row's position."""
    if not isinstance(q_offset, torch.Tensor):
        return sdpa_mask(batch_size, q_length, kv_length, q_offset, **options)
    if (own := getattr(q_offset, "mask", None)) is not None:  # set by labs_calls.packed_mask
        return cast("Tensor", own(q_offset, kv_length - q_length, **options))
    rows = torch.arange(len(q_offset), device=q_offset.device).view(-1, 1, 1, 1)
    columns = torch.arange(kv_length, device=q_offset.device).view(1, 1, 1, -1)
    queries = q_offset.view(-1, 1, 1, 1)
    seen = options["mask_function"](rows, torch.zeros_like(rows), queries, columns)
    return additive(seen, options["dtype"])


for _name, _function in (("labs", attention), ("labs_invariant", attention_invariant)):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, attention_mask)


# ---------------------------------------------------------------- optional parts


class StepGraphs(Protocol):
    """Steps as CUDA graphs, implemented by labs_graphs.Graphs."""

    def forward(self, decoder: Decoder, batch: Batch, ids: Tensor, written: list[int]) -> Tensor:
        """Return logits [B, V] as `forward_slots` does."""

    def begin(self, newcomer: Batch) -> Batch:
        """Return the newcomer's batch of one row in slots that graphs read."""

    def padded_columns(self, cache: Slots, columns: int) -> int:
        """Return `columns` or a larger number, so that slots seldom grow."""

    def take_slots(self, cache: Slots) -> None:
        """Take the slots of a batch that has ended, for the next batch."""

    def release(self) -> bool:
        """Free the slots that no batch is using; return whether there were any."""


class PrefixStore(Protocol):
    """Stored keys and values of prefixes of prompts, implemented by labs_prefixes.Prefixes."""

    def load(self, decoder: Decoder, newcomer: Batch) -> None:
        """Write the longest stored prefix of the newcomer's prompt into its slot."""

    def store(self, decoder: Decoder, batch: Batch, index: int) -> None:
        """Store the columns that rows[index] has written."""

    def release(self) -> bool:
        """Delete all prefixes; return whether there were any."""


PrefillPacked = Callable[["Decoder", Sequence[Batch]], list[Batch]]  # labs_calls.prefill_packed
Forward = Callable[[Tensor, Tensor, cache_utils.Cache, Any], Tensor]  # as call_model


# ---------------------------------------------------------------- how the rows of a model run


CACHE_PARAMETERS = ("cache", "past_key_values", "cache_params")  # new name, old, mamba's
WHOLE_PROMPT_TYPES = {"mamba", "falcon_mamba", "jamba"}  # they lose their state between chunks
ALONE_TYPES = frozenset({"bloom", "mpt", "recurrent_gemma", "deepseek_v32", "rwkv", "minimax"})


@dataclass(frozen=True, slots=True)
class Decoder:
    """A transformers causal model and how its rows run.

    mode: "joins": rows share calls; "whole": they do, but a prompt is prefilled in one call;
    "alone": each row runs by itself through transformers' generate. packable: labs_fast may replace
    its linear layers. can_reuse_prefix: a row's first columns can begin another row.
    forward_parameters: the names that the model's forward takes. invariant: the bits of a row do
    not depend on other rows; for that, at most `steady` rows share a call (0: any number), as do
    prompts that are all longer, with steady_prompts, and with duplicates_lone_row a lone row is
    computed beside copies of itself. came_with: each configuration in the model and its attention
    before labs changed it. forward: replaces the model's own; why_forward: why it does or not.
    quant_method: how weights are packed. prefill_packed: None if each prompt is prefilled alone.
    step_alone: steps a lone row by one token and guessed ones. halves: splits a batch in two after
    memory ran out. grow: adds columns before a step; None if slots have all from the beginning.
    waiting: a labs_waiting.Waiting, None if rows begin only where memory has all columns they may
    need. stepwise: yields the logits of a row in mode "alone", receives its tokens. join: replaces
    labs_loop.join_best. slots: their kind.
    """

    model: PretrainedModel
    mode: Mode
    reason: str
    packable: bool
    can_reuse_prefix: bool
    forward_parameters: frozenset[str]
    weight_bytes: int
    invariant: bool = False
    duplicates_lone_row: bool = False
    steady: int = 0
    steady_prompts: bool = False
    came_with: tuple[tuple[PretrainedConfig, str], ...] = ()
    graphs: StepGraphs | None = None
    forward: Forward | None = None
    why_forward: str = "labs_forward.py is not there"
    quant_method: str = "none"
    prefill_packed: PrefillPacked | None = None
    step_alone: Callable[[Decoder, Batch], tuple[Batch, list[Any]]] | None = None
    halves: Callable[[Decoder, Batch], list[Batch]] | None = None
    draft: Any = None
    grow: Callable[[Batch], None] | None = None
    slots: type[Slots] = Slots
    waiting: Any = None
    stepwise: Callable[[Decoder, Row], Generator[Tensor, int, None]] | None = None
    join: Callable[[Decoder, Sequence[Batch], Batch], list[Batch]] | None = None

    @property
    def config(self) -> PretrainedConfig:
        return self.model.config.get_text_config()

    @property
    def embedded(self) -> int:
        """The number of tokens in the input embedding; vocab_size may be another number."""
        return len(self.model.get_input_embeddings().weight)

    def wrong_prompt(self, ids: Sequence[object]) -> str | None:
        """Return why ids cannot be a prompt, as a phrase, or None if they can."""
        held = self.embedded
        if kinds := [i for i in ids if not hasattr(i, "__index__")]:
            return f"the prompt has {kinds[0]!r} in place of a token id"
        if wrong := [i for i in cast("Sequence[int]", ids) if not 0 <= i < held]:
            return f"the prompt has token id {wrong[0]}, but the model has only {held} tokens"
        return None if ids else "the prompt has no tokens"

    @property
    def device(self) -> torch.device:
        """The device of input ids, which is that of the input embedding in sharded models too."""
        return cast("torch.device", self.model.get_input_embeddings().weight.device)

    @property
    def chunk(self) -> int:
        """Prompt tokens per prefill call."""
        return CHUNK * (GPU_CHUNKS if self.device.type == "cuda" else 1)

    @property
    def column_bytes(self) -> int:
        """Bytes of one token's keys and values by the configuration; 0 if it does not say."""
        config, layers = self.config, _cache_layers(self.config)
        slotted = [_is_slotted(type(layer)) for layer in layers]
        latent, rotary = _int_of(config, "kv_lora_rank"), _int_of(config, "qk_rope_head_dim")
        heads, dim = _int_of(config, "num_attention_heads"), _int_of(config, "head_dim")
        dim = dim or _int_of(config, "hidden_size") // max(heads, 1)
        grouped = _int_of(config, "num_key_value_heads") or heads
        size = self.model.dtype.itemsize
        size = (latent + rotary) * size if latent else grouped * self.slots.head_bytes(dim, size)
        return int(sum(slotted) * size)


def prepare(model: PretrainedModel, *, batch_invariant: bool = True) -> Decoder:
    """Decide how the rows of `model` run, and set the attention that they need.

    torch's own linear layers in float32 are not batch-invariant; those of labs_fast are.
    """
    mode, reason = mode_of(model)
    layers = _cache_layers(model.config.get_text_config()) if mode == "joins" else []
    words = frozenset(inspect.signature(model.forward).parameters)
    parts: list[Any] = [getattr(each, "config", None) for each in model.modules()]
    parts = [each for each in parts if hasattr(each, "_attn_implementation")]
    slots_only = all(LAYERS.get(type(layer)) in (SlotLayer, None) for layer in layers)
    decoder = Decoder(
        model=model,
        mode=mode,
        reason=reason,
        packable=mode == "joins" and slots_only,
        can_reuse_prefix=bool(layers) and slots_only,
        forward_parameters=words,
        weight_bytes=sum(parameter.nbytes for parameter in model.parameters()),
        came_with=tuple((each, each._attn_implementation) for each in parts),
    )
    half = all(each.dtype != torch.float32 for each in model.parameters())
    return with_invariance(decoder, batch_invariant and half)


def with_invariance(decoder: Decoder, wanted: bool) -> Decoder:
    """Return a decoder whose rows have the same bits whatever else is in a batch, if possible.

    wanted: False if its linear layers mix the rounding of rows. Sets the attention to match.
    """
    model = decoder.model
    on_cpu = {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    invariant = wanted and on_cpu and decoder.packable
    if decoder.mode != "alone" and model._can_set_attn_implementation():
        usual = "labs_invariant" if invariant else "labs"
        model.set_attn_implementation(decoder.slots.attention or usual)
    return replace(decoder, invariant=invariant, duplicates_lone_row=invariant)


def mode_of(model: PretrainedModel) -> tuple[Mode, str]:
    """Return how the rows of a model run, and the reason as a phrase."""
    config = model.config.get_text_config()
    kind = config.model_type
    if kind in ALONE_TYPES or getattr(config, "alibi", False):
        return "alone", f"{kind} cannot batch rows of different length"
    if rope := _whole_call_rope(config):
        return "alone", f"its {rope} positions depend on the longest row in a call"
    try:
        layers = {type(layer) for layer in _cache_layers(config)}
    except Exception as error:  # the configuration may be of any kind
        return "alone", f"its configuration describes no cache ({type(error).__name__}: {error})"
    if unknown := sorted(layer.__name__ for layer in layers if layer not in LAYERS):
        return "alone", f"its cache has layers that labs does not know: {', '.join(unknown)}"
    slotted = any(map(_is_slotted, layers))
    if not {*CACHE_PARAMETERS} & {*inspect.signature(model.forward).parameters}:
        return "alone", f"{kind} takes its cache by a name that labs does not know"
    if slotted and not model._can_set_attn_implementation():
        return "alone", f"{kind} does not take another attention implementation"
    if kind in WHOLE_PROMPT_TYPES:
        return "whole", f"{kind} drops its state between the chunks of a prompt"
    return "joins", "rows join and leave at any step"


def _whole_call_rope(config: PretrainedConfig) -> str | None:
    rope = getattr(config, "rope_parameters", None) or {}
    tables = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    kinds = {table.get("rope_type") for table in tables}
    return next((kind for kind in ("longrope", "dynamic") if kind in kinds), None)


def context_length_of(config: PretrainedConfig, tokenizer: Tokenizer = None) -> int | None:
    """Return a model's context length in tokens by its configuration or tokenizer, if they say."""
    text = config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    limits = [value for name in names if isinstance(value := getattr(text, name, None), int)]
    stated = getattr(tokenizer, "model_max_length", None)
    if not limits and isinstance(stated, int) and stated < 10**9:  # tokenizers say 1e30 for "none"
        limits = [stated]
    return limits[0] if limits else None


def has_bf16(device: str) -> bool:
    """Return whether the device computes bfloat16 natively, not by emulation."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_capability(torch.device(device)) >= (8, 0)
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device == "cpu" and any(getattr(torch.cpu, name, bool)() for name in names)


# ---------------------------------------------------------------- rows come and go


def new_batch(decoder: Decoder, row: Row) -> Batch:
    """Return a batch of one newcomer for which nothing is computed yet."""
    if decoder.mode == "alone":
        if decoder.stepwise is None:
            raise RuntimeError(f"{decoder.reason}; to run rows one by one needs labs_alone.py")
        return Batch((row,), Slots(None, 0), decoder.stepwise(decoder, row))
    least = len(row.ids) + FIRST_COLUMNS if decoder.grow else row.columns
    return Batch((row,), decoder.slots(decoder.config, min(least, row.columns)))


@torch.inference_mode()
def prefill(decoder: Decoder, batch: Batch) -> Batch:
    """Write the next chunk of the newcomer's prompt; the last chunk also sets batch.logits."""
    row, at = batch.rows[0], batch.cache.cursor
    chunk = batch.pending if decoder.mode == "whole" else decoder.chunk
    end = row.written + min(chunk, batch.pending)
    at.write_from, at.read_to, at.positions, at.speculative = row.written, end, None, False
    ids = torch.tensor([row.ids[row.written : end]], device=decoder.device)
    positions = torch.arange(row.written, end, device=ids.device)[None]
    # Logits of two positions, because a product with a single row rounds differently.
    logits = call_model(decoder, ids, positions, batch.cache, 2)[:, -1].float()
    if row.exact_columns == row.written == end - decoder.chunk:
        row.exact_columns = end
    row.written = end
    return batch if batch.pending else replace(batch, logits=logits)


@torch.inference_mode()
def join(batch: Batch, newcomer: Batch) -> Batch:
    """Copy the newcomer, which has made its first step alone, into a free slot of `batch`."""
    row, live = newcomer.rows[0], len(batch.rows)
    columns = newcomer.cache.cursor.columns
    if batch.graphs is not None and columns > batch.cache.cursor.columns:
        columns = batch.graphs.padded_columns(batch.cache, columns)
    batch.cache.make_room(live, columns)
    layers = (each.cache.stateful_layers for each in (batch, newcomer))
    for mine, theirs in zip(*layers, strict=True):
        mine.write(live, theirs, row.written)
    return replace(batch, rows=(*batch.rows, row))


@torch.inference_mode()
def keep(batch: Batch, ids: Iterable[int]) -> Batch | None:
    """Drop all rows but those with these ids; the last row moves into each hole. None if all go."""
    kept, rows = set(ids), list(batch.rows)
    for hole in range(len(rows) - 1, -1, -1):
        if rows[hole].id in kept:
            continue
        last = rows.pop()
        if hole < len(rows):
            rows[hole] = last
            for layer in batch.cache.stateful_layers:
                layer.move(len(rows), hole, last.written)
    for layer in batch.cache.stateful_layers:
        layer.cut(len(rows))
    at_once = batch.at_once if len(rows) > batch.at_once else 0  # this many fit
    if not rows and batch.graphs is not None:
        batch.graphs.take_slots(batch.cache)
    return replace(batch, rows=tuple(rows), at_once=at_once) if rows else None


# ---------------------------------------------------------------- forward


def upload(x: Sequence[object], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return numbers as a tensor on a device, copied to a GPU without waiting for it."""
    if device.type != "cuda":
        return torch.tensor(x, dtype=dtype, device=device)
    return torch.tensor(x, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


@torch.inference_mode()
def forward(decoder: Decoder, batch: Batch) -> Tensor:
    """Return the float32 logits [B, V] that follow each row's last token."""
    if batch.stepwise is not None:
        row = batch.rows[0]
        return (batch.stepwise.send(row.ids[-1]) if row.generated else next(batch.stepwise)).float()
    most = min(batch.at_once or len(batch.rows), decoder.steady or len(batch.rows))
    size = math.ceil(len(batch.rows) / math.ceil(len(batch.rows) / most))  # equal calls
    calls = range(0, len(batch.rows), size)
    logits = [_forward_rows(decoder, batch, first, first + size) for first in calls]
    return torch.cat(logits) if len(logits) > 1 else logits[0]


def _forward_rows(decoder: Decoder, batch: Batch, first: int, end: int) -> Tensor:
    rows = batch.rows[first:end]
    ids = upload([[row.ids[row.written]] for row in rows], decoder.device)
    written = [row.written for row in rows]
    if decoder.graphs is not None and not batch.at_once:
        return decoder.graphs.forward(decoder, batch, ids, written)
    return forward_slots(decoder, batch, ids, written, first)


def forward_slots(
    decoder: Decoder, batch: Batch, ids: Tensor, written: list[int], first: int = 0
) -> Tensor:
    """Return logits [B, V] after ids [B, 1] at the columns `written` of the slots from `first` on.

    More ids than rows are guesses: all of them continue the first slot.
    """
    at, live = batch.cache.cursor, len(ids)
    positions = upload(written, ids.device)[:, None]
    at.speculative = live > len(batch.rows)
    at.first_row, at.positions = first, positions[:, 0]
    at.write_from = written[0] if live == 1 and ids.is_cpu else -1
    at.read_to = min(blocks(max(written) + 1), at.columns)
    slots = [0] * live if at.speculative else range(first, first + live)
    at.index = upload(slots, ids.device)
    if live == 1 and decoder.duplicates_lone_row:
        ids, positions = ids.expand(LONE_ROW_COPIES, 1), positions.expand(LONE_ROW_COPIES, 1)
    return call_model(decoder, ids, positions, batch.cache, 1)[:live, -1].float()


def call_model(
    decoder: Decoder, ids: Tensor, positions: Tensor, cache: cache_utils.Cache, wanted: int | Tensor
) -> Tensor:
    """Call the model with the keywords that its forward accepts; return its logits.

    wanted: logits_to_keep, as a number of last positions or a tensor of positions.
    """
    words: dict[str, object] = {"position_ids": positions, "logits_to_keep": wanted}
    words |= {"use_cache": True, **dict.fromkeys(CACHE_PARAMETERS, cache)}
    if decoder.forward is not None and not decoder.model._forward_hooks:  # hooks need modules
        return decoder.forward(ids, positions, cache, wanted)
    known = {name: value for name, value in words.items() if name in decoder.forward_parameters}
    return cast("Tensor", decoder.model(input_ids=ids, return_dict=True, **known).logits)


# ---------------------------------------------------------------- memory


def out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out: on a GPU, in Python, or in torch on a CPU (by its message)."""
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or any(words in str(error) for words in OOM_MESSAGES)


def _int_of(config: PretrainedConfig, name: str) -> int:
    with contextlib.suppress(Exception):  # transformers raises where the layers differ
        return int(getattr(config, name, None) or 0)
    return 0


def available_bytes(device: torch.device) -> int:
    """Return the bytes that are free on a device, sys.maxsize if this is not known."""
    if device.type == "cuda":  # the memory that torch holds in reserve is free
        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + reserve
    with contextlib.suppress(OSError):  # Linux; the page cache counts as free there
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return sys.maxsize


def release_memory() -> None:
    """Return freed memory to CUDA and, with glibc, to the system."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # only glibc has malloc_trim
        ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def slot_budget(device: torch.device) -> int:
    """Return the bytes that slots may still take on a device."""
    return int(MEMORY_SHARE * available_bytes(device))
