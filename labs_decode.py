# SPDX-License-Identifier: Apache-2.0
"""The decode batch of labs: tensors only, no configuration, no text.

Rows live in left-aligned slots: row b owns the first columns of a preallocated buffer, so that rows
of any length join and leave at any step and nothing is copied in between. Four functions touch the
cache; each consumes the batch it is given and returns the next one:

    prefill   write the next chunk of one newcomer's prompt, alone; its last logits wait for `step`
              (`prefill_together`: several short prompts in one call, with the bits of alone)
    join      give the newcomer a free slot beside the others
    step      forward one token of every row, then choose the next ones
    keep      let rows go: the last row moves into the hole

The model makes its own masks: `attend` and `see` are registered with transformers as an attention
implementation, and `see` asks the cache where the query of each row stands.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import gc
import inspect
import logging
import math
import sys
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, cache_utils
from transformers.cache_utils import CacheLayerMixin, LinearAttentionLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

COMPANY = 4  # rows of a lone row and its copies: oneDNN is faster with four than with two
CHUNK = 256  # prompt tokens per prefill call: the longest anyone else waits for a newcomer
GPU_CHUNKS = 8  # of them in a call on a GPU, which takes a millisecond to be asked for anything
COLUMNS = 64  # attention reads whole blocks of columns, see `_blocks`
PACKED_ROWS = 16  # what oneDNN chooses its blocks for: as fast beside 1 row or 256
ROOMY = 512  # columns at least of slots whose steps are captured
CAPTURE_AFTER = 4  # steps of one shape, before it is worth a CUDA graph
GRAPH_COLUMNS = 256  # a graph reads whole blocks of so many, so that it serves as many steps
NGRAMS = (3, 2)  # how many tokens have to be the same for a guess
LOW_32 = 0xFFFFFFFF  # bits
GROUP = 32  # 4-bit weights that share a scale
PREFIX_SHARE = 0.125  # of the free memory, what prefixes that are kept may take
CANDIDATES = (128, 1024)  # how many of the likeliest a draw looks at before it takes them all
MEMORY_SHARE = 0.5  # of the free memory, what slots may take
MOST_ROWS = 64  # of a batch, where nothing is said
TYPICAL = 1024  # columns of a row, to tell how many rows the memory holds
NO_MEMORY = ("can't allocate memory", "not enough memory")  # torch's, on Linux and elsewhere
UNTOLD = 2**30  # bytes to keep for what may come, where the system tells of no free memory

CAPTURING = threading.Lock()  # torch captures one graph at a time in a process
log = logging.getLogger("labs.decode")
Tensor = torch.Tensor
How = Literal["joins", "whole", "alone"]


# ---------------------------------------------------------------- rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How one row chooses its tokens, in plain values. Temperature 0 is greedy.

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
    processors: tuple[Callable[[list[int], Tensor], Tensor], ...] = ()


@dataclass(slots=True, eq=False)
class Row:
    """One sequence. `ids` grows; `written` counts the columns its slot holds.

    exact: how many of them were prefilled in whole chunks from the first on. lookahead: how many
    tokens a step may guess from the text so far.
    """

    id: Any
    ids: list[int]
    max_new_tokens: int
    sampling: Sampling
    prompt_length: int = 0
    written: int = 0
    exact: int = 0
    lookahead: int = 0
    generated: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.prompt_length = len(self.ids)

    @property
    def columns(self) -> int:
        return self.prompt_length + self.max_new_tokens

    def take(self, token: int, written: int = 1) -> None:
        self.written += written
        self.ids.append(token)
        self.generated[token] += 1


@dataclass(frozen=True, slots=True)
class Choice:
    """The token chosen for a row, with log-probabilities if the row asked, or what went wrong."""

    token: int = -1
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows and their slots. `alone` stands in for the slots of a model that cannot be batched.

    logits: what a prompt's last token gave, float32 [1, V], until `step` makes a token of it.
    at_once: how many rows a forward call takes, 0 for all; fewer where memory ran out.
    homes: where its slots go at its end, with the graphs that read them; see `_begin`.
    """

    rows: tuple[Row, ...]
    cache: Slots
    alone: Generator[Tensor, int, None] | None = None
    logits: Tensor | None = None
    at_once: int = 0
    homes: list[Slots] | None = None

    @property
    def pending(self) -> int:
        """Tokens that `prefill` has still to write before this newcomer's next step."""
        row = self.rows[0]
        known = len(row.ids) - 1 if row.generated else row.prompt_length
        return 0 if self.alone is not None else max(known - row.written, 0)


# ---------------------------------------------------------------- slots


@dataclass(slots=True)
class Cursor:
    """Where the forward call under way writes and how far it reads, shared by all layers.

    Prefill writes one row from column `start`; a step writes row index[b], which is first + b, at
    positions[b]. ahead: all of them are columns of the first row, which each reads to its own.
    """

    rows: int
    columns: int
    top: int = 0
    start: int = 0
    first: int = 0
    positions: Tensor | None = None
    index: Tensor | None = None
    ahead: bool = False

    @property
    def live(self) -> int:
        return 1 if self.positions is None else len(self.positions)


class SlotLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values as [rows, heads, columns, head_dim], allocated once.

    The slot of a live row holds finite numbers in every column, because 0 * NaN is NaN.
    """

    is_sliding = False  # all columns are kept; the mask makes the window
    keys: Any  # None until the first call
    values: Any

    def __init__(self, cursor: Cursor, **kwargs: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cursor = cursor

    @property
    def buffers(self) -> tuple[Any, ...]:
        return (self.keys, self.values) if self.is_initialized else ()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = (
            states.new_empty(
                (self.cursor.rows, states.shape[1], self.cursor.columns, states.shape[3])
            )
            for states in (key_states, value_states)
        )
        self.keys[:1], self.values[:1], self.is_initialized = 0, 0, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        at = self.cursor
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            if at.positions is None or at.index is None:
                buffer[:1, :, at.start : at.top] = states
            else:
                index, positions = at.index.to(buffer.device), at.positions.to(buffer.device)
                buffer[index, :, positions] = states[: at.live, :, 0]
        rows = slice(at.first, at.first + (1 if at.ahead else at.live))
        keys, values = self.keys[rows, :, : at.top], self.values[rows, :, : at.top]
        if at.ahead:
            keys, values = (each.expand(at.live, -1, -1, -1) for each in (keys, values))
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cursor.top, 0

    def get_seq_length(self) -> int:
        return self.cursor.start if self.cursor.positions is None else self.cursor.top - 1

    def get_max_length(self) -> int:
        return -1

    def resize(self, live: int, rows: int, columns: int) -> None:
        """Move the first `live` rows into larger buffers."""
        for name in ("keys", "values") if self.is_initialized else ():
            old = getattr(self, name)
            shape = max(rows, len(old)), old.shape[1], max(columns, old.shape[2]), old.shape[3]
            if shape == old.shape:
                continue  # an earlier try ran out of memory after this layer
            new = old.new_empty(shape)
            new[:live, :, : old.shape[2]] = old[:live]
            new[:live, :, old.shape[2] :] = 0
            setattr(self, name, new)  # growing costs one layer's copy at a time

    def begin(self, *states: Tensor) -> None:
        """Fill the first columns of the first slot: keys, values [1, heads, columns, dim]."""
        self.lazy_initialization(*states)
        for buffer, first in zip(self.buffers, states, strict=True):
            buffer[:1, :, : first.shape[2]] = first

    def write(self, row: int, other: SlotLayer, columns: int) -> None:
        """Copy the first `columns` of another layer's first row into slot `row`."""
        for mine, theirs in zip(self.buffers, other.buffers, strict=True):
            mine[row, :, :columns] = theirs[0, :, :columns]
            mine[row, :, columns:] = 0

    def move(self, source: int, target: int, columns: int) -> None:
        for buffer in self.buffers:
            buffer[target, :, :columns] = buffer[source, :, :columns]

    def cut(self, live: int) -> None:
        """Forget the rows from `live` on; their slots stay for newcomers."""


class StateLayer(LinearAttentionLayer):
    """Recurrent states, one row of each tensor per row of the batch."""

    def __init__(self, cursor: Cursor, number_of_states: int = 1) -> None:
        super().__init__(number_of_states=number_of_states)

    def _states(self) -> list[tuple[dict[int, Any], int]]:
        return [(states, i) for states in (self.conv_states, self.recurrent_states) for i in states]

    def write(self, row: int, other: StateLayer, columns: int) -> None:
        """Put a newcomer's states below; a kind that the model does not use is None in both."""
        for (states, i), (others, _) in zip(self._states(), other._states(), strict=True):
            if states[i] is not None:
                states[i] = torch.cat([states[i][:row], others[i]])

    def resize(self, live: int, rows: int, columns: int) -> None:
        """States have no columns, and rows are added as they come."""

    def move(self, source: int, target: int, columns: int) -> None:
        for states, i in self._states():
            if states[i] is not None:
                states[i][target] = states[i][source]

    def cut(self, live: int) -> None:
        for states, i in self._states():
            states[i] = None if states[i] is None else states[i][:live].clone()


class HybridLayer(StateLayer, SlotLayer):  # type: ignore[override, no-untyped-call]
    """Slots beside recurrent states, for layers that hold both."""

    is_compileable = False

    def __init__(self, cursor: Cursor, number_of_states: int = 1) -> None:
        SlotLayer.__init__(self, cursor)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        kind = SlotLayer if args else LinearAttentionLayer
        kind.lazy_initialization(self, *args, **kwargs)

    def resize(self, live: int, rows: int, columns: int) -> None:
        SlotLayer.resize(self, live, rows, columns)

    def write(self, row: int, other: Any, columns: int) -> None:
        SlotLayer.write(self, row, other, columns)
        StateLayer.write(self, row, other, columns)

    def move(self, source: int, target: int, columns: int) -> None:
        SlotLayer.move(self, source, target, columns)
        StateLayer.move(self, source, target, columns)


# By exact type: a subclass may keep more than keys and values. Not every version has every name.
_LAYERS: dict[type, type | None] = {
    getattr(cache_utils, name): kind
    for name, kind in (
        ("DynamicLayer", SlotLayer),
        ("DynamicSlidingWindowLayer", SlotLayer),
        ("LinearAttentionAndFullAttentionLayer", HybridLayer),
        ("LinearAttentionAndSlidingWindowAttentionLayer", HybridLayer),
        ("LinearAttentionLayer", StateLayer),
        ("DummyLayer", None),
    )
    if hasattr(cache_utils, name)
}


class Slots(cache_utils.Cache):
    """A transformers cache whose rows are slots; made from the layers its own cache would have."""

    def __init__(self, config: Any, columns: int) -> None:
        self.cursor = Cursor(rows=1, columns=_blocks(columns))
        self.captured: dict[tuple[int, int], Any] = {}  # or how often the shape was stepped
        super().__init__(layers=[self._layer(old) for old in _layers(config)])

    def _layer(self, old: Any) -> Any:
        kind = _LAYERS[type(old)]
        return (
            kind(self.cursor, number_of_states=getattr(old, "number_of_states", 1)) if kind else old
        )

    @property
    def filled(self) -> list[Any]:
        """The layers that hold anything of their own."""
        return [layer for layer in self.layers if isinstance(layer, (SlotLayer, StateLayer))]

    @property
    def buffers(self) -> list[Tensor]:
        return [b for layer in self.layers if isinstance(layer, SlotLayer) for b in layer.buffers]

    @property
    def bytes_per_column(self) -> int:
        """Bytes of one token of one row, over all layers."""
        return sum(buffer[0, :, 0].nbytes for buffer in self.buffers)

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        return self.cursor.start if self.cursor.positions is None else self.cursor.positions

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.cursor.start if self.cursor.positions is None else self.cursor.top - 1

    def make_room(self, live: int, columns: int) -> None:
        """Make room for one more row beside `live`; rows double."""
        at = self.cursor
        rows = at.rows if live < at.rows else 2 * at.rows
        self.resize(live, rows, max(columns, at.columns))

    def resize(self, live: int, rows: int, columns: int) -> None:
        """Move the first `live` rows into slots of another size."""
        if (rows, columns) != (self.cursor.rows, self.cursor.columns):
            self.captured.clear()  # they read the old buffers
            for layer in self.filled:
                layer.resize(live, rows, columns)
        self.cursor.rows, self.cursor.columns = rows, columns


class RowOfPrompts(cache_utils.Cache):
    """Several newcomers' slots in one call: their prompts lie one behind the other in one row."""

    def __init__(
        self, newcomers: Sequence[Slots], lengths: list[int], device: torch.device
    ) -> None:
        layers = zip(*(slots.layers for slots in newcomers), strict=True)
        super().__init__(layers=[PromptsLayer(group, lengths) for group in layers])
        prompts = [torch.full((n,), i, device=device) for i, n in enumerate(lengths)]
        positions = [torch.arange(n, device=device) for n in lengths]
        self.places = torch.stack([torch.cat(prompts), torch.cat(positions)])  # [2, T]

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        return self.places


class PromptsLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer of several newcomers; each gets its part, attention gets all."""

    is_sliding = False

    def __init__(self, layers: Sequence[Any], lengths: list[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layers, self.lengths = layers, lengths

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        parts = (torch.split(states, self.lengths, 2) for states in (key_states, value_states))
        for layer, keys, values in zip(self.layers, *parts, strict=True):
            layer.update(keys, values)
        return key_states, value_states

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Each newcomer's layer does so itself."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


def _layers(config: Any) -> list[Any]:
    return cast("list[Any]", DynamicCache(config=config).layers)


def _blocks(columns: int) -> int:
    """Round up to 64, 128, 256, 512, then to blocks: sums of other lengths may have other bits."""
    if columns <= 8 * COLUMNS:
        return max(COLUMNS, 1 << (columns - 1).bit_length())
    return math.ceil(columns / COLUMNS) * COLUMNS


# ---------------------------------------------------------------- attention


def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> Any:
    """Return attention [B, Q, heads, dim] by sdpa, which knows neither caps nor sinks."""
    if lengths := getattr(mask, "lengths", None):  # prompts in one row: as each would be alone
        parts = zip(*(torch.split(states, lengths, 2) for states in (q, k, v)), strict=True)
        return torch.cat(
            [attend(module, a, b, c, None, **options)[0] for a, b, c in parts], 1
        ), None
    special = options.get("softcap") is not None or options.get("s_aux") is not None
    if special or (options.get("position_bias") is None and _are_few(q, k)):
        return _products(q, k, v, mask, options), None
    return sdpa_attention_forward(module, q, k, v, mask, **options)


def attend_invariant(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any
) -> Any:
    """Return attention that gives a row the same bits in any company, on CPU.

    In float32 sdpa does not, plain products do. In 16 bits sdpa does where each of its threads has
    an aligned scratch buffer: with a multiple of eight queries, so the heads of a group are padded.
    """
    special = options.get("softcap") is not None or options.get("s_aux") is not None
    if q.shape[2] > 1:
        return attend(module, q, k, v, mask, **options)
    # The copies that keep a lone row company have no slots: they take the row's output.
    live = q[: len(k)]
    if special or q.dtype == torch.float32:
        output = _products(live, k, v, mask, options)
    else:
        output = _padded_sdpa(live, k, v, mask, options.get("scaling"))
    return output.expand(len(q), -1, -1, -1), None


def _padded_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """Return attention [B, 1, heads, dim] of one query a row: a group's heads are its queries."""
    (batch, heads, _, dim), groups = q.shape, k.shape[1]
    queries = q.reshape(batch, groups, -1, dim)
    real = queries.shape[2]
    queries = torch.nn.functional.pad(queries, (0, 0, 0, -real % 8))
    attention = torch.nn.functional.scaled_dot_product_attention
    output = attention(queries, k, v, attn_mask=mask, scale=scale)[:, :, :real]
    return output.reshape(batch, 1, heads, -1)


def _products(q: Tensor, k: Tensor, v: Tensor, mask: Any, options: dict[str, Any]) -> Tensor:
    """Return softmax(q k) v; q: [B, heads, Q, dim], k and v: [B, groups, T, dim]."""
    (batch, heads, queries, dim), (groups, total) = q.shape, k.shape[1:3]
    if mask is None:
        mask = q.new_ones((1, 1, queries, total), dtype=torch.bool).tril(total - queries)
    if queries > CHUNK:  # scores are much larger than what they are made of
        parts = zip(*(torch.split(each, CHUNK, 2) for each in (q, mask)), strict=True)
        return torch.cat([_products(part, k, v, seen, options) for part, seen in parts], 1)
    scores = _scores(q.reshape(batch, groups, -1, dim), k)
    scores = scores.mul_(options.get("scaling") or dim**-0.5)
    if (cap := options.get("softcap")) is not None:
        scores = cap * torch.tanh(scores / cap)
    if mask.dtype == torch.bool:
        mask = _additive(mask, scores.dtype)
    scores.view(batch, groups, -1, queries, total).add_(mask.unsqueeze(2))
    if (sinks := options.get("s_aux")) is not None:  # a sink takes its share and gives nothing
        sinks = sinks.to(scores.dtype).view(1, groups, -1, 1).repeat_interleave(queries, 2)
        scores = torch.cat([scores, sinks.expand(batch, -1, -1, -1)], -1)
    weights = scores.softmax(-1)[..., :total].to(v.dtype)
    return (weights @ v).view(batch, heads, queries, -1).transpose(1, 2)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """Return q k, float32 on a GPU, as kernels for all of attention have it; [B, groups, ., T]."""
    if not _sums_in_float32(q):
        return q @ k.transpose(2, 3)
    q3, k3 = (each.reshape(-1, *each.shape[2:]) for each in (q, k))
    return torch.bmm(q3, k3.transpose(1, 2), out_dtype=torch.float32).view(*q.shape[:3], -1)


def _sums_in_float32(q: Tensor) -> bool:
    has_it = hasattr(torch.ops.aten.bmm, "dtype")  # since torch 2.8
    return q.is_cuda and q.dtype != torch.float32 and has_it


def _are_few(q: Tensor, k: Tensor) -> bool:
    """Tell whether one query a row gives sdpa too few heads to fill a GPU; products split columns.

    An H200 takes 20 instead of 83 us for one row of 4,096 columns and 8 heads of keys.
    """
    if q.shape[2] > 1 or not _sums_in_float32(q):
        return False
    return 2 * k.shape[0] * k.shape[1] < _processors(q.device)


@functools.cache
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, -torch.inf)


def see(batch_size: int, q_length: int, kv_length: int, q_offset: Any = 0, **options: Any) -> Any:
    """Return what each query sees, [B, 1, Q, T]; the pattern is the model's own mask_function."""
    if not isinstance(q_offset, torch.Tensor):
        return sdpa_mask(batch_size, q_length, kv_length, q_offset, **options)
    if q_offset.ndim == 2:
        return _see_prompts(*q_offset, **options)
    rows = torch.arange(len(q_offset), device=q_offset.device).view(-1, 1, 1, 1)
    columns = torch.arange(kv_length, device=q_offset.device).view(1, 1, 1, -1)
    queries = q_offset.view(-1, 1, 1, 1)
    seen = options["mask_function"](rows, torch.zeros_like(rows), queries, columns)
    # Additive, because sdpa would turn a bool mask into this again in every layer.
    return _additive(seen, options["dtype"])


def _see_prompts(prompts: Tensor, positions: Tensor, **options: Any) -> Tensor:
    """Return a mask [1, 1, T, T] in which each prompt of the row sees itself only.

    `lengths` on it tells `attend` that there is no other pattern, so that prompts can go apart.
    """
    none = torch.zeros((1, 1, 1, 1), dtype=torch.long, device=prompts.device)
    queries, columns = positions.view(1, 1, -1, 1), positions.view(1, 1, 1, -1)
    seen = options["mask_function"](none, none, queries, columns)
    mask = _additive(seen & (prompts[:, None] == prompts), options["dtype"])
    if options["mask_function"] is causal_mask_function:
        mask.lengths = prompts.bincount().tolist()  # type: ignore[attr-defined]
    return mask


for _name, _function in (("labs", attend), ("labs_invariant", attend_invariant)):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, see)


# ---------------------------------------------------------------- which models, and how


CACHE_WORDS = ("cache", "past_key_values", "cache_params")  # 5.24, before it, mamba
WHOLE = frozenset({"mamba", "falcon_mamba", "jamba"})  # their scan drops its state between chunks
ALONE = frozenset({"bloom", "mpt", "recurrent_gemma", "deepseek_v32", "rwkv", "minimax"})


@dataclass(frozen=True, slots=True)
class Decoder:
    """A transformers causal model and how its rows run.

    how: "joins" the batch; "whole": joins, but its prompt is prefilled in one call; "alone".
    invariant: the bits of a row do not depend on its company. pairs: for that, a lone row is
    computed beside copies of itself, because a product with one row has other bits.
    shares: short prompts may lie in one row, because all that its layers keep is keys and values.
    reuses: the columns of a row may be cut anywhere, and be the beginning of another.
    """

    model: Any
    how: How
    why: str
    invariant: bool
    pairs: bool
    shares: bool
    reuses: bool
    accepts: frozenset[str]
    weight_bytes: int
    graphs: Graphs | None = None

    @property
    def config(self) -> Any:
        return self.model.config.get_text_config()

    @property
    def device(self) -> torch.device:
        """Where ids go: the device of the input embedding, sharded models included."""
        return cast("torch.device", self.model.get_input_embeddings().weight.device)

    @property
    def chunk(self) -> int:
        """Prompt tokens per prefill call."""
        return CHUNK * (GPU_CHUNKS if self.device.type == "cuda" else 1)


def prepare(
    model: Any,
    *,
    batch_invariant: bool = True,
    method: str | None = None,
    cuda_graphs: bool = True,
) -> Decoder:
    """Decide how the rows of `model` run; give it the attention and the products that this needs.

    Linear layers and norms of `model` are replaced: `pack`, which takes the method, `fuse_norms`.
    Raises ValueError where a method has nothing to work on.
    """
    how, why = how_it_runs(model)
    layers = _layers(model.config.get_text_config()) if how == "joins" else []
    recurrent = any(isinstance(layer, LinearAttentionLayer) for layer in layers)
    devices = {parameter.device for parameter in model.parameters()}
    on_cpu = {device.type for device in devices} == {"cpu"}
    split = getattr(model.config, "distributed_config", None) is not None  # over processes
    packs = how == "joins" and not recurrent and not split
    invariant = batch_invariant and on_cpu and packs
    if how != "alone" and model._can_set_attn_implementation():
        model.set_attn_implementation("labs_invariant" if invariant else "labs")
    accepts = frozenset(inspect.signature(model.forward).parameters)
    plain = bool(layers) and all(type(layer) is cache_utils.DynamicLayer for layer in layers)
    shares = plain and {"position_ids", "logits_to_keep"} <= accepts
    reuses = bool(layers) and all(_LAYERS.get(type(layer)) in (SlotLayer, None) for layer in layers)
    on_one_gpu = len(devices) == 1 and next(iter(devices)).type == "cuda" and not split
    if packs:  # others ask for `weight`, which unpacks it, at each step
        pack(model, method)
    if packs and on_one_gpu:
        fuse_norms(model)
    packed = {each.together for each in model.modules() if isinstance(each, PackedLinear)}
    left = sum(each.numel() for each in _unpacked(model))
    if method and left > sum(together.packed.numel for together in packed):
        raise ValueError(f"{method}: needs a model of plain linear layers, all on CPU")
    weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
    weight_bytes += sum(together.packed.nbytes for together in packed)
    pairs = invariant and not (method and left == 0)
    graphs = Graphs(devices.pop()) if cuda_graphs and on_one_gpu and reuses else None
    return Decoder(model, how, why, invariant, pairs, shares, reuses, accepts, weight_bytes, graphs)


def _unpacked(model: Any) -> list[Tensor]:
    """Return the weights of products that are no packed layers."""
    embedding = model.get_input_embeddings().weight
    return [each for each in model.parameters() if each is not embedding and each.ndim > 1]


def how_it_runs(model: Any) -> tuple[How, str]:
    """Return how the rows of a model run, and the reason in words."""
    config = model.config.get_text_config()
    kind = config.model_type
    if kind in ALONE or getattr(config, "alibi", False):
        return "alone", f"{kind} has no batch in which rows may differ in length"
    if rope := _whole_call_rope(config):
        return "alone", f"its {rope} positions depend on the longest row of a call"
    layers = {type(layer) for layer in _layers(config)}
    if unknown := sorted(layer.__name__ for layer in layers if layer not in _LAYERS):
        return "alone", f"its cache has layers that labs does not know: {', '.join(unknown)}"
    slotted = any(_LAYERS[layer] in (SlotLayer, HybridLayer) for layer in layers)
    if not {*CACHE_WORDS} & {*inspect.signature(model.forward).parameters}:
        return "alone", f"{kind} takes its cache by a name that labs does not know"
    if slotted and not model._can_set_attn_implementation():
        return "alone", f"{kind} does not take another attention implementation"
    if kind in WHOLE:
        return "whole", f"{kind} drops its state between the chunks of a prompt"
    return "joins", "rows join and leave at any step"


def _whole_call_rope(config: Any) -> str | None:
    rope = getattr(config, "rope_parameters", None) or {}
    tables = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    kinds = {table.get("rope_type") for table in tables}
    return next((kind for kind in ("longrope", "dynamic") if kind in kinds), None)


# ---------------------------------------------------------------- products and norms


class OneDNN:
    """A weight in the blocks that oneDNN computes with.

    A plain one is reordered at every call. Packed, a step of 1 to 32 rows takes 0.6 to 0.8 of the
    time, and a row has the same bits beside any number of others but none, which MKL's products in
    float32 do not give.
    """

    def __init__(self, weight: Tensor) -> None:
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_ROWS)
        self.nbytes, self.numel = weight.nbytes, weight.numel()

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        product = torch.ops.mkldnn._linear_pointwise(x, self.packed, bias, "none", [], "")
        return cast("Tensor", product)

    def weight(self) -> Tensor:
        return cast("Tensor", self.packed.to_dense())


class Plain:
    """A weight as it is, for layers that are one product: a GPU is asked once, and reads faster."""

    def __init__(self, weight: Tensor) -> None:
        self.packed, self.nbytes, self.numel = weight, weight.nbytes, weight.numel()

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return torch.nn.functional.linear(x, self.packed, bias)

    def weight(self) -> Tensor:
        return self.packed


class FewerBits:
    """What products of weights in 8 and 4 bits share: the kernels take rows, and no bias."""

    def product(self, rows: Tensor) -> Any:
        raise NotImplementedError

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        product = self.product(x.reshape(-1, x.shape[-1]))
        product = product if bias is None else product + bias
        return cast("Tensor", product.view(*x.shape[:-1], -1))


class Int4(FewerBits):
    """A weight as 4-bit numbers, a scale and a zero point for each GROUP of them, as in Q4_1.

    For few rows that is less to read, and faster; for many it is slower, because each row unpacks
    it anew. A row has the same bits beside any number of others.
    """

    def __init__(self, weight: Tensor) -> None:
        self.shape = weight.shape
        padded = torch.nn.functional.pad(weight.float(), (0, 0, 0, -len(weight) % 16))
        groups = padded.view(len(padded), -1, GROUP)
        low, high = groups.amin(-1), groups.amax(-1)
        scales = ((high - low) / 15).clamp_min(torch.finfo(torch.float32).tiny)
        levels = ((groups - low[..., None]) / scales[..., None]).round_().clamp_(0, 15)
        levels = levels.to(torch.int32).view(padded.shape)
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 1)
        scales = torch.stack([scales, low + 8 * scales], -1)  # the kernel's zero is in the middle
        self.scales = scales.transpose(0, 1).contiguous().to(weight.dtype)
        self.nbytes, self.numel = self.packed.nbytes + self.scales.nbytes, weight.numel()

    def product(self, rows: Tensor) -> Any:
        kernel = torch.ops.aten._weight_int4pack_mm_for_cpu
        return kernel(rows, self.packed, GROUP, self.scales)[:, : self.shape[0]]

    def weight(self) -> Tensor:
        return self(torch.eye(self.shape[1], dtype=self.scales.dtype), None).t().contiguous()


class Int8(FewerBits):
    """A weight as 8-bit numbers with a scale for each output; else as Int4."""

    def __init__(self, weight: Tensor) -> None:
        scales = weight.float().abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
        self.packed = (weight.float() / scales[:, None]).round_().to(torch.int8)
        self.scales = scales.to(weight.dtype)
        self.nbytes, self.numel = self.packed.nbytes + self.scales.nbytes, weight.numel()

    def product(self, rows: Tensor) -> Any:
        return torch.ops.aten._weight_int8pack_mm(rows, self.packed, self.scales)

    def weight(self) -> Tensor:
        return self.packed.to(self.scales.dtype) * self.scales[:, None]


PACKINGS: dict[str | None, Any] = {None: OneDNN, "int8": Int8, "int4": Int4}
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # read the same input


class Together:
    """The product of layers that read the same input: whoever comes first computes it for all."""

    def __init__(self, linears: Sequence[torch.nn.Linear], packing: Any) -> None:
        self.sizes = [linear.out_features for linear in linears]
        self.packed = packing(torch.cat([linear.weight.detach() for linear in linears]))
        biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
        self.bias = torch.cat(biases) if biases else None
        self.last: tuple[Tensor | None, Sequence[Tensor]] = None, ()  # one tuple: threads

    def part(self, x: Tensor, index: int) -> Tensor:
        known, parts = self.last
        if known is not x:
            parts = torch.split(self.packed(x, self.bias), self.sizes, -1)
        self.last = (x, parts) if index + 1 < len(parts) else (None, ())
        return parts[index]


class PackedLinear(torch.nn.Module):
    """A linear layer whose weight is packed, alone or with others that read its input."""

    def __init__(self, linear: torch.nn.Linear, together: Together, index: int) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias, self.together, self.index = linear.bias, together, index

    @property
    def weight(self) -> Tensor:
        """The weight, unpacked at each call; of 4 and 8 bits what they stand for."""
        return torch.split(self.together.packed.weight(), self.together.sizes)[self.index]

    def forward(self, x: Tensor) -> Tensor:
        return self.together.part(x, self.index)


@torch.inference_mode()
def pack(model: Any, method: str | None = None) -> None:
    """Replace the plain linear layers by packed ones; their weights go, one group at a time.

    On a GPU only those that become one product. method, for a CPU: "int8"; "int4", with 8 bits for
    the output layer, where 4 are heard; None for the weights as they are.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    types = _packed_types() if method is None else [torch.float32, torch.bfloat16, torch.float16]
    for parent in [module for module in model.modules() if type(module) is not torch.nn.Linear]:
        children = dict(parent.named_children())
        names = [name for name in children if _can_pack(children[name], types, method)]
        del children  # it holds weights
        for group in _together(parent, names):
            linears = [getattr(parent, name) for name in group]
            kind = "int8" if method == "int4" and linears == [head] else method
            on_cpu = linears[0].weight.is_cpu
            if len(group) == 1 and not on_cpu:
                continue
            try:
                together = Together(linears, PACKINGS[kind] if on_cpu else Plain)
            except torch.OutOfMemoryError:  # a GPU that has room for the weights, but not twice
                return
            for index, (name, linear) in enumerate(zip(group, linears, strict=True)):
                setattr(parent, name, PackedLinear(linear, together, index))
            del linears, linear
    torch.cuda.empty_cache()  # what the weights left that are one now


def _packed_types() -> list[torch.dtype]:
    if not (torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return []
    bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return [torch.float32, torch.bfloat16] if bf16 else [torch.float32]


def _together(parent: Any, names: list[str]) -> list[tuple[str, ...]]:
    """Return the groups of layers that are one product, and each other one alone."""

    def alike(group: tuple[str, ...]) -> bool:
        linears = [getattr(parent, name) for name in group if name in names]
        kinds = {(x.in_features, x.weight.dtype, x.bias is None) for x in linears}
        return len(linears) == len(group) and len(kinds) == 1

    groups = [group for group in TOGETHER if alike(group)]
    grouped = {name for group in groups for name in group}
    return [*groups, *((name,) for name in names if name not in grouped)]


def _can_pack(module: Any, types: list[torch.dtype], method: str | None) -> bool:
    if type(module) is not torch.nn.Linear or _is_hooked(module):
        return False
    if type(module.weight) is not torch.nn.Parameter:  # of a quantisation
        return False
    if module.weight.is_cuda:
        return method is None
    fits = method != "int4" or module.in_features % GROUP == 0
    return fits and module.weight.is_cpu and module.weight.dtype in types


def _is_hooked(module: Any) -> bool:
    hooks = module._forward_hooks or module._forward_pre_hooks
    return bool(hooks) or hasattr(module, "_hf_hook") or "forward" in vars(module)


@torch.inference_mode()
def fuse_norms(model: Any) -> None:
    """Let norms that are torch's rms_norm be computed by it: one kernel instead of six.

    What a norm is, its output tells: some add one to their weight, or leave rows as they are.
    """
    for module in model.modules():
        weight, eps = (getattr(module, name, None) for name in ("weight", "variance_epsilon"))
        if eps is None or weight is None or weight.ndim != 1 or _is_hooked(module):
            continue
        if weight.dtype != model.dtype or len(inspect.signature(module.forward).parameters) != 1:
            continue  # some have a gate
        norm = functools.partial(_rms_norm, weight=weight, eps=eps)
        x = torch.linspace(-2, 3, 2 * len(weight), device=weight.device, dtype=weight.dtype)
        x = x.view(1, 2, -1)
        with contextlib.suppress(Exception):  # of code that came with a model
            theirs = module(x).float()
            if (norm(x).float() - theirs).norm() <= 0.01 * theirs.norm():
                module.forward = norm


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)


# ---------------------------------------------------------------- the four functions


def enter(decoder: Decoder, row: Row) -> Batch:
    """Return a batch of one newcomer, nothing computed yet."""
    alone = _alone(decoder, row) if decoder.how == "alone" else None
    return Batch(
        (row,), Slots(decoder.config, row.columns) if alone is None else Slots(None, 0), alone
    )


@torch.inference_mode()
def prefill(decoder: Decoder, batch: Batch) -> Batch:
    """Write the next chunk of the newcomer's prompt; the last one leaves logits for `step`."""
    row, at = batch.rows[0], batch.cache.cursor
    chunk = batch.pending if decoder.how == "whole" else decoder.chunk
    end = row.written + min(chunk, batch.pending)
    at.start, at.top, at.positions, at.ahead = row.written, end, None, False
    ids = torch.tensor([row.ids[row.written : end]], device=decoder.device)
    positions = torch.arange(row.written, end, device=ids.device)[None]
    # Two, because a product with one row has other bits, see `forward`.
    logits = _call(decoder, ids, positions, batch.cache, 2)[:, -1].float()
    if row.exact == row.written == end - decoder.chunk:
        row.exact = end
    row.written = end
    return batch if batch.pending else replace(batch, logits=logits)


@torch.inference_mode()
def prefill_together(decoder: Decoder, newcomers: Sequence[Batch]) -> list[Batch]:
    """Write whole short prompts in one call, as `sharing` found them."""
    rows = [newcomer.rows[0] for newcomer in newcomers]
    lengths = [row.prompt_length for row in rows]
    for newcomer, length in zip(newcomers, lengths, strict=True):
        at = newcomer.cache.cursor
        at.start, at.top, at.positions, at.ahead = 0, length, None, False
    ids = torch.tensor([[i for row in rows for i in row.ids]], device=decoder.device)
    cache = RowOfPrompts([newcomer.cache for newcomer in newcomers], lengths, ids.device)
    ends = torch.tensor(lengths, device=ids.device).cumsum(0) - 1
    logits = _call(decoder, ids, cache.places[1:], cache, ends)[0].float()
    if len(logits) != len(rows):  # a model that takes logits_to_keep and keeps all
        logits = logits[ends]
    for row in rows:
        row.written = row.prompt_length
    return [replace(each, logits=logits[i : i + 1]) for i, each in enumerate(newcomers)]


def sharing(decoder: Decoder, newcomers: Sequence[Batch]) -> list[Batch]:
    """Return the first newcomers whose prompts go through the model together, in one chunk.

    A prompt of one token stays alone: its products have one row, and so other bits.
    """
    together: list[Batch] = []
    for newcomer in newcomers if decoder.shares else ():
        tokens = sum(each.pending for each in (*together, newcomer))
        if newcomer.rows[0].written or newcomer.pending < 2 or tokens > decoder.chunk:
            break
        together.append(newcomer)
    return together or list(newcomers[:1])


@torch.inference_mode()
def join(batch: Batch, newcomer: Batch) -> Batch:
    """Give the newcomer, who has made its first step alone, a slot of its own in `batch`."""
    row, live = newcomer.rows[0], len(batch.rows)
    columns = newcomer.cache.cursor.columns
    if batch.homes is not None and columns > batch.cache.cursor.columns:
        columns = _roomy(batch.cache, columns)
    batch.cache.make_room(live, columns)
    for mine, theirs in zip(batch.cache.filled, newcomer.cache.filled, strict=True):
        mine.write(live, theirs, row.written)
    return replace(batch, rows=(*batch.rows, row))


@torch.inference_mode()
def step(decoder: Decoder, batch: Batch) -> tuple[Batch, list[Choice]]:
    """Forward one token of each row and choose the next; a failed step of slots may be repeated.

    A newcomer's first step chooses from its prompt's logits.
    """
    logits = forward(decoder, batch) if batch.logits is None else batch.logits
    choices = choose(logits, batch.rows)
    for row, choice in zip(batch.rows, choices, strict=True):
        row.take(choice.token, batch.logits is None)
    return replace(batch, logits=None), choices


@torch.inference_mode()
def step_ahead(decoder: Decoder, batch: Batch) -> tuple[Batch, list[Choice]]:
    """Do as `step` for one row, but take several tokens at once where the next ones are guessed.

    Returns one choice or more, all of the one row: those that further steps would have given, since
    each guess is computed as a row of its own that reads the same slot.
    """
    [row], choices = batch.rows, list[Choice]()
    guess = look_up(row) if batch.logits is None and decoder.reuses else []
    if not guess:
        return step(decoder, batch)
    ids = torch.tensor([[row.ids[-1]], *([token] for token in guess)], device=decoder.device)
    logits = _forward_slots(decoder, batch, ids, [row.written + i for i in range(len(ids))])
    for line, token in zip(logits, (*guess, None), strict=True):
        choices += choose(line[None], batch.rows)
        row.take(choices[-1].token)
        if choices[-1].token != token:
            break
    return batch, choices


def look_up(row: Row) -> list[int]:
    """Return what followed the last tokens where they last stood before, as a guess."""
    most = min(row.lookahead, row.columns - len(row.ids) - 1)
    for size in NGRAMS if most > 0 else ():
        tail = row.ids[-size:]
        for start in range(len(row.ids) - size - 1, -1, -1):
            if row.ids[start : start + size] == tail:
                return row.ids[start + size : start + size + most]
    return []


@torch.inference_mode()
def keep(batch: Batch, ids: Iterable[Any]) -> Batch | None:
    """Let all rows go but those named; the last row moves into each hole. None if none is left."""
    kept, rows = set(ids), list(batch.rows)
    for hole in range(len(rows) - 1, -1, -1):
        if rows[hole].id in kept:
            continue
        last = rows.pop()
        if hole < len(rows):
            rows[hole] = last
            for layer in batch.cache.filled:
                layer.move(len(rows), hole, last.written)
    for layer in batch.cache.filled:
        layer.cut(len(rows))
    at_once = batch.at_once if len(rows) > batch.at_once else 0  # that many did fit
    if not rows and batch.homes is not None:
        size = sum(buffer.nbytes for buffer in batch.cache.buffers)
        if size <= _keepable(batch.cache, size):
            batch.homes[:] = [batch.cache]
    return replace(batch, rows=tuple(rows), at_once=at_once) if rows else None


def halve(decoder: Decoder, batch: Batch) -> list[Batch]:
    """Return what takes half the memory in a step that ran out of it; [] if that is one row.

    Slots stay as they are and are read by more calls. A failed step leaves recurrent states halfway
    in place: those rows are written anew from their ids, into two batches.
    """
    size = batch.at_once or len(batch.rows)
    if size == 1:
        return []
    half = (size + 1) // 2
    if not any(isinstance(layer, StateLayer) for layer in batch.cache.layers):
        return [replace(batch, at_once=half)]
    batch.cache.layers.clear()
    return [_rewritten(decoder, rows) for rows in (batch.rows[:half], batch.rows[half:])]


def _rewritten(decoder: Decoder, rows: Sequence[Row]) -> Batch:
    batches: list[Batch] = []
    for row in rows:
        row.written = 0
        newcomer = enter(decoder, row)
        while newcomer.pending:
            newcomer = prefill(decoder, newcomer)
        newcomer = replace(newcomer, logits=None)  # its token is known
        batches = [join(batches[0], newcomer) if batches else newcomer]
    return batches[0]


# ---------------------------------------------------------------- prefixes


@dataclass(frozen=True, slots=True)
class Prefix:
    """The first columns of a row, for rows that begin with the same ids.

    exact: how many have the bits that any other row's prefill gives them. buffers: keys and values
    [heads, columns, head_dim], layer by layer.
    """

    owner: str
    ids: list[int]
    exact: int
    buffers: list[Tensor]

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers)


class Prefixes:
    """Keys and values of recent rows; the least recently used go first.

    Rows find those of their own owner only: how fast an answer begins would tell others' prompts.
    max_bytes: what they may take, by default PREFIX_SHARE of the free memory; 0 keeps none.
    """

    def __init__(self, max_bytes: int | None = None) -> None:
        self.max_bytes = max_bytes
        self.kept: list[Prefix] = []

    @property
    def nbytes(self) -> int:
        return sum(prefix.nbytes for prefix in self.kept)

    def clear(self) -> None:
        self.kept.clear()

    def find(self, owner: str, ids: list[int], border: int) -> tuple[Prefix | None, int]:
        """Return the prefix that spares most of a prompt, and how many columns; (None, 0) if none.

        border: the length of chunks, where only columns that have the bits of a prefill count; 0
        for all of them. The last token is always computed, and little is not worth the copying.
        """
        best, most = None, CHUNK - 1
        for prefix in (each for each in self.kept if each.owner == owner):
            columns = _common(prefix.ids, ids[:-1])
            if border:
                columns = min(columns, prefix.exact) // border * border
            if columns > most:
                best, most = prefix, columns
        if best is None:
            return None, 0
        self.kept.append(self.kept.pop(self.kept.index(best)))
        return best, most

    def add(self, owner: str, batch: Batch, index: int, *, exact: bool) -> None:
        """Copy what rows[index] has written; exact: only what every request may use."""
        row, cache = batch.rows[index], batch.cache
        columns = row.exact if exact else row.written
        size, ids = columns * cache.bytes_per_column, row.ids[:columns]
        mine = [prefix for prefix in self.kept if prefix.owner == owner]
        known = any(p.exact >= row.exact and p.ids[:columns] == ids for p in mine)
        whole = len(cache.buffers) == 2 * len(cache.filled)
        if known or not whole or columns < CHUNK or size > (most := self._most(cache)):
            return
        for prefix in mine:  # what the new one holds too
            if prefix.exact <= row.exact and prefix.ids == ids[: len(prefix.ids)]:
                self.kept.remove(prefix)
        while self.nbytes + size > most:
            del self.kept[0]
        buffers = [buffer[index, :, :columns].clone() for buffer in cache.buffers]
        self.kept.append(Prefix(owner, ids, row.exact, buffers))

    def _most(self, cache: Slots) -> int:
        if self.max_bytes is not None:
            return self.max_bytes
        return _keepable(cache, self.nbytes)


def _keepable(cache: Slots, held: int) -> int:
    """Return how many bytes may lie beside `cache` for what may come; `held` do already."""
    free = free_memory(cache.buffers[0].device)
    return UNTOLD if free == sys.maxsize else int(PREFIX_SHARE * (free + held))


def _common(a: list[int], b: list[int]) -> int:
    """Return how many ids two lists begin with in common."""
    shorter = range(min(len(a), len(b)) + 1)
    return bisect.bisect_left(shorter, True, key=lambda n: a[:n] != b[:n]) - 1


@torch.inference_mode()
def recall(decoder: Decoder, newcomer: Batch, prefix: Prefix, columns: int) -> Batch:
    """Begin a newcomer of whom nothing is computed yet with the first columns of a prefix."""
    row, buffers = newcomer.rows[0], iter(prefix.buffers)
    for layer in newcomer.cache.filled:
        layer.begin(next(buffers)[None, :, :columns], next(buffers)[None, :, :columns])
    row.written, row.exact = columns, min(columns, prefix.exact) // decoder.chunk * decoder.chunk
    return newcomer


# ---------------------------------------------------------------- several batches


def place(decoder: Decoder, batches: Sequence[Batch], newcomer: Batch) -> list[Batch]:
    """Join the newcomer to the first batch that it does not slow down, or to none.

    All rows of a call are read as far as the longest. That costs less than reading the weights
    once more only while the padding's bytes stay below the weights' own.
    """
    for index, batch in enumerate(batches):
        lengths = [len(row.ids) for row in (*batch.rows, *newcomer.rows)]
        padding = max(lengths) * len(lengths) - sum(lengths)
        if padding * newcomer.cache.bytes_per_column < decoder.weight_bytes:
            try:
                return [*batches[:index], join(batch, newcomer), *batches[index + 1 :]]
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise  # else the newcomer stays in the slot that it has
                for layer in batch.cache.filled:
                    layer.cut(len(batch.rows))  # some may hold its states already
    return [*batches, _begin(decoder, newcomer)]


def _begin(decoder: Decoder, newcomer: Batch) -> Batch:
    """Begin a batch with a newcomer, in the slots of one that ended where it fits into them.

    Their graphs are captured already. The first ones get room for longer rows than its own.
    """
    if decoder.graphs is None or decoder.graphs.failed:
        return newcomer
    homes, columns = decoder.graphs.homes, newcomer.cache.cursor.columns
    home: Slots | None = None
    with contextlib.suppress(IndexError):  # pop, because a batch of another thread may be quicker
        home = homes.pop()
    if home is not None and home.cursor.columns >= columns:
        return join(Batch((), home, homes=homes), newcomer)
    del home  # before larger ones are made
    try:
        newcomer.cache.resize(1, 1, _roomy(newcomer.cache, columns))
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return newcomer  # it has slots of its own
    return replace(newcomer, homes=homes)


def _roomy(cache: Slots, columns: int) -> int:
    """Return as many columns or, where memory is free, more.

    Slots that seldom grow are seldom captured anew.
    """
    more = max(ROOMY, 1 << (columns - 1).bit_length())
    size = 2 * cache.cursor.rows * more * cache.bytes_per_column
    return more if size <= MEMORY_SHARE * free_memory(cache.buffers[0].device) else columns


def out_of_memory(error: BaseException) -> bool:
    """Tell whether memory ran out: on a GPU, in Python, or torch on a CPU, by its words."""
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or any(words in str(error) for words in NO_MEMORY)


def has_room(decoder: Decoder, batches: Sequence[Batch], newcomers: Sequence[Batch]) -> bool:
    """Tell whether the newcomers' slots fit beside the others; a first one is always tried."""
    if not batches and len(newcomers) == 1:
        return True
    own = [newcomer.cache.cursor.columns for newcomer in newcomers]
    live, at = (len(batches[0].rows), batches[0].cache.cursor) if batches else (0, Cursor(0, 0))
    rows = max(at.rows, 1)
    while rows < live + len(newcomers):
        rows *= 2
    grown = rows * max(at.columns, *own) - at.rows * at.columns
    per_column = batches[0].cache.bytes_per_column if batches else column_bytes(decoder)
    return (sum(own) + grown) * per_column < MEMORY_SHARE * free_memory(decoder.device)


def cache_usage(batches: Sequence[Batch]) -> float:
    """Return the share of written columns in what slots take and may still take, 0 to 1."""
    used = held = 0
    device = None
    for batch in batches:
        column, at, buffers = batch.cache.bytes_per_column, batch.cache.cursor, batch.cache.buffers
        used += column * sum(row.written for row in batch.rows)
        held += column * at.rows * at.columns
        device = buffers[0].device if buffers else device
    return used / (held + MEMORY_SHARE * free_memory(device)) if device is not None else 0.0


def column_bytes(decoder: Decoder) -> int:
    """Return the bytes that keys and values of one token take, by the model's configuration.

    An estimate: 0 where the configuration does not tell.
    """
    config = decoder.config
    slotted = [_LAYERS.get(type(layer)) in (SlotLayer, HybridLayer) for layer in _layers(config)]
    latent, rotary = _told(config, "kv_lora_rank"), _told(config, "qk_rope_head_dim")
    heads = _told(config, "num_attention_heads")
    dim = _told(config, "head_dim") or _told(config, "hidden_size") // max(heads, 1)
    width = latent + rotary if latent else 2 * (_told(config, "num_key_value_heads") or heads) * dim
    return int(sum(slotted) * width * decoder.model.dtype.itemsize)


def _told(config: Any, name: str) -> int:
    try:
        value = getattr(config, name, None)
    except Exception:  # transformers raises where the layers differ
        return 0
    return value if isinstance(value, int) else 0


def rows_in_memory(decoder: Decoder, most: int = MOST_ROWS) -> int:
    """Return how many rows of TYPICAL columns the free memory holds, at most `most`."""
    if decoder.how == "alone":
        return 1
    row = TYPICAL * column_bytes(decoder)
    fitting = int(MEMORY_SHARE * free_memory(decoder.device)) // row if row else most
    return max(1, min(fitting, most))


def free_memory(device: torch.device) -> int:
    """Return the bytes that can still be taken on a device, where the system tells."""
    if device.type == "cuda":  # what torch holds in reserve is free for it
        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + reserve
    with contextlib.suppress(OSError):  # Linux; the page cache counts as free there
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return sys.maxsize


# ---------------------------------------------------------------- forward


def upload(values: Sequence[Any], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return values as a tensor on a device; a GPU is not waited for, as torch.tensor does."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def numbers(values: Sequence[float], like: Tensor) -> Tensor:
    """Return values as a tensor of another one's type, where it lies."""
    return upload(values, like.device, like.dtype)


@torch.inference_mode()
def forward(decoder: Decoder, batch: Batch) -> Tensor:
    """Return the float32 logits [B, V] that follow each row's last token."""
    if batch.alone is not None:
        row = batch.rows[0]
        return (batch.alone.send(row.ids[-1]) if row.generated else next(batch.alone)).float()
    size = batch.at_once or len(batch.rows)
    calls = range(0, len(batch.rows), size)
    return torch.cat([_forward_rows(decoder, batch, first, first + size) for first in calls])


def _forward_rows(decoder: Decoder, batch: Batch, first: int, end: int) -> Tensor:
    rows = batch.rows[first:end]
    ids = upload([[row.ids[row.written]] for row in rows], decoder.device)
    written = [row.written for row in rows]
    if decoder.graphs is not None and not batch.at_once:
        return decoder.graphs.forward(decoder, batch, ids, written)
    return _forward_slots(decoder, batch, ids, written, first)


def _forward_slots(
    decoder: Decoder, batch: Batch, ids: Tensor, written: list[int], first: int = 0
) -> Tensor:
    """Return logits [B, V] after ids [B, 1] at the columns `written` of the slots from `first` on.

    More ids than rows are guesses for the first slot.
    """
    at, live = batch.cache.cursor, len(ids)
    positions = upload(written, ids.device)[:, None]
    at.ahead = live > len(batch.rows)
    at.first, at.positions, at.top = first, positions[:, 0], _blocks(max(written) + 1)
    slots = [0] * live if at.ahead else range(first, first + live)
    at.index = upload(slots, ids.device)
    if live == 1 and decoder.pairs:
        ids, positions = ids.expand(COMPANY, 1), positions.expand(COMPANY, 1)
    return _call(decoder, ids, positions, batch.cache, 1)[:live, -1].float()


class Graphs:
    """Steps as CUDA graphs, which need one launch where a model has thousands.

    A shape, so many rows and so many columns, is captured once it was stepped a few times, and
    checked against the step that it stands for; if capturing fails, all steps go on without.
    Where rows are fewer than the shape has, dead slots are computed beside them.
    homes: the slots of the batch that ended last, for the next one.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.failed = device, False
        self.pool: Any = None  # of memory, shared: a graph's output is read before the next one
        self.first: Any = None  # a graph that keeps the pool, which would go with the last one
        self.stream: Any = None  # to capture on: torch's own one is of the device that came first
        self.homes: list[Slots] = []
        self.lock = threading.Lock()

    def give_way(self) -> None:
        """Free what no batch under way needs."""
        self.homes.clear()
        self.pool = self.first = None

    def forward(self, decoder: Decoder, batch: Batch, ids: Tensor, written: list[int]) -> Tensor:
        """Return logits [B, V] as _forward_slots does."""
        at, captured = batch.cache.cursor, batch.cache.captured
        blocks = math.ceil((max(written) + 1) / GRAPH_COLUMNS)
        shape = 1 << (len(ids) - 1).bit_length(), min(blocks * GRAPH_COLUMNS, at.columns)
        known = captured.get(shape, 0)
        if isinstance(known, Captured):
            with self.lock:  # another thread's batch must not replay before the logits are read
                return known.forward(ids, written)
        logits = _forward_slots(decoder, batch, ids, written)
        captured[shape] = known + 1
        if known + 1 > CAPTURE_AFTER and not self.failed:
            self._capture(decoder, batch, shape, (ids, written, logits))
        return logits

    def _capture(
        self, decoder: Decoder, batch: Batch, shape: Any, step: tuple[Tensor, list[int], Tensor]
    ) -> None:
        ids, written, expected = step
        try:
            with self.lock:
                captured = Captured(decoder, batch.cache, shape, ids, written)
                captured.logits.fill_(math.nan)  # else a replay of nothing would look right
                found = captured.forward(ids, written)
            off = float((found - expected).abs().max())
            if not off <= 0.05 * float(expected.abs().max()):
                raise ArithmeticError(f"its logits are off by {off:.3g}")
        except Exception as error:  # of the model's code, of the driver: nothing depends on it
            self.failed = True
            log.warning("steps run without CUDA graphs: %s", str(error).partition("\n")[0])
            return
        batch.cache.captured[shape] = captured


class Captured:
    """The step of a shape: ids and positions are put in, logits come out."""

    def __init__(
        self, decoder: Decoder, cache: Slots, shape: tuple[int, int], ids: Tensor, written: Any
    ) -> None:
        rows, top = shape
        self.ids = torch.zeros((rows, 1), dtype=torch.long, device=ids.device)
        self.positions = torch.zeros_like(self.ids)
        self.index = torch.arange(rows, device=ids.device)  # read by each replay, as those two
        self._put(ids, written)
        ids, positions, index = self.ids, self.positions, self.index  # not self: it holds the graph

        def step() -> Tensor:
            at = cache.cursor
            at.first, at.positions, at.index = 0, positions[:, 0], index
            at.top, at.ahead = top, False
            return _call(decoder, ids, positions, cache, 1)[:, -1]

        self.replay, self.logits = record(decoder.graphs, step)

    def _put(self, ids: Tensor, written: list[int]) -> None:
        live, dead = len(ids), len(self.ids) - len(ids)
        self.ids[:live], self.ids[live:] = ids, 0
        self.positions.copy_(upload([*written, *[0] * dead], self.ids.device)[:, None])

    def forward(self, ids: Tensor, written: list[int]) -> Tensor:
        self._put(ids, written)
        self.replay()
        return self.logits[: len(ids)].to(torch.float32, copy=True)


def record(graphs: Any, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Return what repeats a step on the GPU, and the tensor that it fills."""
    with torch.cuda.device(graphs.device), CAPTURING:
        cuda: Any = torch.cuda
        graphs.stream = graphs.stream or cuda.Stream(graphs.device)
        if graphs.pool is None:
            graphs.pool, graphs.first = torch.cuda.graph_pool_handle(), torch.cuda.CUDAGraph()
            with _capturing(graphs, graphs.first):
                torch.zeros(1, device=graphs.device)
        graph = torch.cuda.CUDAGraph()
        with _capturing(graphs, graph):
            logits = step()
    return graph.replay, logits


@contextlib.contextmanager
def _capturing(graphs: Graphs, graph: Any) -> Iterator[None]:
    collects = gc.isenabled()
    gc.disable()  # an older graph that is found to be garbage meanwhile spoils this one
    try:  # other threads may use the GPU meanwhile, to ask how much memory is free
        mode = "thread_local"
        with torch.cuda.graph(graph, graphs.pool, graphs.stream, capture_error_mode=mode):
            yield
    finally:
        if collects:
            gc.enable()


def _call(decoder: Decoder, ids: Tensor, positions: Tensor, cache: Any, keep: Any) -> Tensor:
    """Call the model with the words that its forward knows; return logits, the last ones at least.

    keep: how many of the last positions, or which positions, as logits_to_keep.
    """
    words = {"position_ids": positions, "logits_to_keep": keep, "use_cache": True}
    words |= dict.fromkeys(CACHE_WORDS, cache)
    known = {name: value for name, value in words.items() if name in decoder.accepts}
    return cast("Tensor", decoder.model(input_ids=ids, return_dict=True, **known).logits)


def _alone(decoder: Decoder, row: Row) -> Generator[Tensor, int, None]:
    """Yield logits [1, V] and take tokens; cache and inputs are those that the model makes."""
    ids = torch.tensor([row.ids], device=decoder.device)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": row.max_new_tokens}
    options |= {"do_sample": False, "custom_generate": _by_the_model}
    return cast("Generator[Tensor, int, None]", decoder.model.generate(ids, **options))


def _by_the_model(model: Any, input_ids: Tensor, **kwargs: Any) -> Generator[Tensor, int, None]:
    """Decode as transformers' own loop does (GenerationMixin._sample), one token a send."""
    length = None  # the whole prompt, then one token at a time where there is a cache
    for name in ("logits_processor", "stopping_criteria", "generation_config"):
        kwargs.pop(name, None)
    while True:
        inputs = model.prepare_inputs_for_generation(
            input_ids, next_sequence_length=length, is_first_iteration=length is None, **kwargs
        )
        outputs = model(**inputs, return_dict=True)
        token = yield outputs.logits[:, -1]
        kwargs = model._update_model_kwargs_for_generation(outputs, kwargs)
        input_ids = torch.cat([input_ids, input_ids.new_tensor([[token]])], -1)
        length = 1 if kwargs.get("use_cache") else None


@torch.inference_mode()
def score(decoder: Decoder, ids: Sequence[int], start: int) -> list[float]:
    """Return the log-probability of each of ids[start:] after those before it, in one call."""
    scored = torch.tensor(ids[start:], device=decoder.device)
    words = {"use_cache": False, "logits_to_keep": len(scored) + 1}
    known = {name: value for name, value in words.items() if name in decoder.accepts}
    inputs = torch.tensor([list(ids)], device=decoder.device)
    logits = decoder.model(input_ids=inputs, return_dict=True, **known).logits
    logprobs = logits[0, -len(scored) - 1 : -1].float().log_softmax(-1)
    return cast("list[float]", logprobs.gather(-1, scored[:, None])[:, 0].tolist())


@torch.inference_mode()
def shares_of(
    decoder: Decoder, prompt: list[int], options: list[list[int]], ends: list[int]
) -> list[float]:
    """Return the probability of each option, with one of `ends` after it, among all options.

    One call: the rows are padded on the right, where nothing before can see.
    """
    longest = max(map(len, options))
    rows = [[*prompt, *each, *[0] * (longest - len(each))] for each in options]
    words = {"use_cache": False, "logits_to_keep": longest + 1}
    known = {name: value for name, value in words.items() if name in decoder.accepts}
    inputs = torch.tensor(rows, device=decoder.device)
    logits = decoder.model(input_ids=inputs, return_dict=True, **known).logits
    logprobs = logits[:, -longest - 1 :].float().log_softmax(-1)
    totals = [
        sum(row[place, token] for place, token in enumerate(each))
        + (row[len(each), ends].logsumexp(-1) if ends else 0.0)
        for row, each in zip(logprobs, options, strict=True)
    ]
    return cast("list[float]", torch.stack(totals).cpu().double().softmax(-1).tolist())


# ---------------------------------------------------------------- choose


def choose(logits: Tensor, rows: Sequence[Row]) -> list[Choice]:
    """Choose one token per row from float32 logits [B, V], each by its row's own options.

    An error in a row's part, or logits that are not finite, become that row's Choice.error.
    """
    scores = logits.clone() if any(_changes_logits(row.sampling) for row in rows) else logits
    errors = _process(scores, rows)
    # A GPU is asked for all of it before the first answer is waited for.
    highest = scores.amax(-1)
    greedy = [i for i, row in enumerate(rows) if not row.sampling.temperature]
    best = scores[upload(greedy, scores.device)].argmax(-1) if greedy else None
    drawn = [i for i, row in enumerate(rows) if row.sampling.temperature and i not in errors]
    tokens = dict(zip(drawn, draw(scores, rows, drawn), strict=True))
    tokens |= {} if best is None else dict(zip(greedy, best.tolist(), strict=True))
    for index, value in enumerate(highest.tolist()):
        if not math.isfinite(value):
            errors.setdefault(index, ArithmeticError("the model gave logits that are not finite"))
    return [
        Choice(error=errors[i]) if i in errors else _choice(logits[i], row, tokens[i])
        for i, row in enumerate(rows)
    ]


def _changes_logits(s: Sampling) -> bool:
    penalised = s.repetition_penalty != 1 or s.frequency_penalty != 0 or s.presence_penalty != 0
    return penalised or bool(s.logit_bias) or bool(s.processors)


def _process(scores: Tensor, rows: Sequence[Row]) -> dict[int, Exception]:
    """Apply all rows' options and processors to scores [B, V], in place; return what went wrong."""
    errors: dict[int, Exception] = {}
    _penalise(scores, rows)
    for index, row in enumerate(rows):
        if any(token >= scores.shape[-1] for token, _ in row.sampling.logit_bias):
            errors[index] = IndexError(f"logit_bias: the model has {scores.shape[-1]} tokens")
        try:
            for processor in row.sampling.processors:
                scores[index] = processor(row.ids, scores[index])
        except Exception as error:  # a processor that a request brought ends its own row only
            errors[index] = error
    return errors


def _penalise(scores: Tensor, rows: Sequence[Row]) -> None:
    """Apply all rows' penalties and biases to scores [B, V], in place.

    repetition_penalty as transformers' RepetitionPenaltyLogitsProcessor: over prompt and answer.
    frequency_penalty and presence_penalty as in OpenAI's API reference: over the answer.
    """
    options = [(i, row, row.sampling) for i, row in enumerate(rows)]
    every = range(scores.shape[-1])  # some models cut off what their vocabulary is padded with
    if seen := [
        ({token for token in row.ids if token in every}, i, s.repetition_penalty)
        for i, row, s in options
        if s.repetition_penalty != 1
    ]:
        ids, lines, penalties = _spread(seen, scores)
        old = scores[lines, ids]
        scores[lines, ids] = torch.where(old < 0, old * penalties, old / penalties)
    if used := [
        (row.generated, i, s.frequency_penalty, s.presence_penalty)
        for i, row, s in options
        if (s.frequency_penalty or s.presence_penalty) and row.generated
    ]:
        ids, lines, frequency, presence = _spread(used, scores)
        counts = [count for generated, *_ in used for count in generated.values()]
        scores[lines, ids] -= numbers(counts, scores) * frequency + presence
    if biased := [
        ({token: bias for token, bias in s.logit_bias if token in every}, i)
        for i, _, s in options
        if s.logit_bias
    ]:
        ids, lines = _spread(biased, scores)
        biases = [bias for each, _ in biased for bias in each.values()]
        scores[lines, ids] += numbers(biases, scores)


def _spread(table: Sequence[tuple[Any, ...]], scores: Tensor) -> list[Tensor]:
    """Return all ids of a table of (ids, line, numbers ...), and for each its line and numbers."""
    ids = [token for some, *_ in table for token in some]
    lengths = upload([len(some) for some, *_ in table], scores.device)
    columns = [upload([row[1] for row in table], scores.device)]
    for place in range(2, len(table[0])):
        columns.append(numbers([row[place] for row in table], scores))
    many = [each.repeat_interleave(lengths, output_size=len(ids)) for each in columns]
    return [upload(ids, scores.device), *many]


def _choice(logits: Tensor, row: Row, token: int) -> Choice:
    """Add what the row asked to know: the model's own log-probabilities, before any option."""
    if row.sampling.logprobs is None:
        return Choice(token)
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.topk(row.sampling.logprobs)
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return Choice(token, float(logprobs[token]), top)


def draw(
    scores: Tensor, rows: Sequence[Row], places: Sequence[int], sizes: Sequence[int] = CANDIDATES
) -> list[int]:
    """Draw a token for each of rows[places] from scores [B, V], by Gumbel-max over its kept set.

    The noise is a hash of (seed, step, token id): no state, the same numbers in any company and on
    any device but mps. A row whose kept set may go on below the candidates is drawn again from
    more. Where no option cuts anything off, all that is no candidate takes part as one lump
    (exact, by the maximum's own distribution) and is looked at only if the lump wins.
    """
    if not places:
        return []
    chosen, device = [rows[i] for i in places], scores.device
    temperatures = numbers([row.sampling.temperature for row in chosen], scores)
    scaled = scores[upload(places, device)] / temperatures[:, None]
    size = min(*sizes[:1], scaled.shape[-1]) if sizes else scaled.shape[-1]
    top = scaled.topk(size)  # [N, K], descending
    kept = kept_candidates(
        top.values, scaled.logsumexp(-1, keepdim=True), [row.sampling for row in chosen]
    )
    noisy = (top.values + gumbel(chosen, top.indices)).masked_fill(~kept, -torch.inf)
    best = noisy.max(-1)
    tokens: list[int] = top.indices.gather(-1, best.indices[:, None])[:, 0].tolist()
    whole = size == scaled.shape[-1]
    open_ended = [] if whole else [n for n, last in enumerate(kept[:, -1].tolist()) if last]
    cut = [n for n in open_ended if _cuts(chosen[n].sampling, size)]
    # What top_p is a share of, top_k decides: all that top_k keeps must be seen.
    options = [] if whole else [row.sampling for row in chosen]
    deep = [n for n, s in enumerate(options) if s.top_k > size and s.top_p < 1]
    cut = sorted({*cut, *deep})
    for n, token in zip(cut, draw(scores, rows, [places[n] for n in cut], sizes[1:]), strict=True):
        tokens[n] = token
    lumps = [n for n in open_ended if chosen[n].sampling.top_k == 0 and n not in cut]
    if lumps:
        at = upload(lumps, device)
        rest = scaled[at].scatter(-1, top.indices[at], -torch.inf)
        won = _draw_lumps(rest, [chosen[n] for n in lumps], best.values[at])
        for place, token in won.items():
            tokens[lumps[place]] = token
    return tokens


def _cuts(s: Sampling, size: int) -> bool:
    """Tell whether some option may cut the vocabulary off below its first `size` tokens."""
    return s.top_p < 1 or s.min_p > 0 or s.top_k > size


def kept_candidates(top: Tensor, total: Tensor, options: Sequence[Sampling]) -> Tensor:
    """Return which of the candidates [N, K], descending logits over temperature, the options keep.

    total: their log-sum over the vocabulary, [N, 1]. The same sets as transformers' TopK-, TopP-
    and MinPLogitsWarper in that order (ties of top_k kept, top_p over what top_k left).
    """
    size = top.shape[-1]
    last = upload([min(s.top_k or size, size) - 1 for s in options], top.device)
    kept = top >= top.gather(-1, last[:, None])
    limited = upload([0 < s.top_k <= size for s in options], top.device)[:, None]
    below = top.masked_fill(~kept, -torch.inf).logsumexp(-1, keepdim=True)
    probabilities = (top - torch.where(limited, below, total)).exp()
    before = probabilities.cumsum(-1) - probabilities
    share = [s.top_p if s.top_p < 1 else math.inf for s in options]  # sums round
    kept &= before < numbers(share, top)[:, None]
    floor = [math.log(s.min_p) if s.min_p > 0 else -math.inf for s in options]
    kept &= top >= top[:, :1] + numbers(floor, top)[:, None]
    kept[:, 0] = True
    return kept


def _draw_lumps(rest: Tensor, rows: Sequence[Row], best: Tensor) -> dict[int, int]:
    """Return a token of rest [N, V] for each row whose lump, all of them, beats `best` [N]."""
    lump = torch.full((len(rows), 1), rest.shape[-1], device=rest.device)  # an id no token has
    wins = rest.logsumexp(-1) + gumbel(rows, lump)[:, 0] > best
    ids = torch.arange(rest.shape[-1], device=rest.device)[None]
    return {
        n: int((rest[n] + gumbel([rows[n]], ids)[0]).argmax())
        for n, won in enumerate(wins.tolist())
        if won
    }


def gumbel(rows: Sequence[Row], ids: Tensor) -> Tensor:
    """Return Gumbel noise for token ids [N, K], a function of (seed, step, id) alone.

    Two rounds of murmur3's finaliser over the id, keyed by a 64-bit hash of seed and step.
    """
    keys = [_key(row.sampling.seed, len(row.ids) - row.prompt_length) for row in rows]
    low, high = (
        upload([key >> at & LOW_32 for key in keys], ids.device)[:, None] for at in (0, 32)
    )
    hashed = _mix((_mix(ids ^ low) + high) & LOW_32)
    real = torch.float32 if ids.device.type == "mps" else torch.float64  # mps has no float64
    below = 1 - torch.finfo(real).eps / 2  # the last of them would round to 1, and its noise be inf
    return -torch.log(-torch.log(((hashed.to(real) + 0.5) / 2**32).clamp(max=below)))


def _mix(x: Tensor) -> Tensor:
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & LOW_32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & LOW_32
    return x ^ (x >> 16)


def _key(seed: int, step: int) -> int:
    """Return splitmix64 of seed and step."""
    x = (seed * 0x9E3779B97F4A7C15 + (step + 1) * 0xD1342543DE82EF95) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)
