# SPDX-License-Identifier: Apache-2.0
"""Cache layers of models with recurrent states, such as Mamba: a state for each row of a batch.

Importing this file makes labs_decode.py use them for the rows of such models, which needs nothing
else. labs_calls.py imports it.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import cache_utils
from transformers.cache_utils import LinearAttentionLayer

import labs_decode
from labs_decode import CacheLayer, Cursor, SlotLayer


class StateLayer(LinearAttentionLayer):
    """Recurrent states, one row of each tensor per row of the batch."""

    def __init__(self, cursor: Cursor, number_of_states: int = 1) -> None:
        super().__init__(number_of_states=number_of_states)

    def _states(self) -> list[tuple[dict[int, Any], int]]:
        return [(states, i) for states in (self.conv_states, self.recurrent_states) for i in states]

    def write(self, row: int, other: StateLayer, columns: int) -> None:
        """Append a newcomer's states; those that the model does not use are None in both layers."""
        for (states, i), (others, _) in zip(self._states(), other._states(), strict=True):
            if states[i] is not None:
                states[i] = torch.cat([states[i][:row], others[i]])

    def resize(self, live: int, rows: int, columns: int) -> None:
        """Do nothing: states have no columns, and `write` appends their rows."""

    def move(self, source: int, target: int, columns: int) -> None:
        for states, i in self._states():
            if states[i] is not None:
                states[i][target] = states[i][source]

    def cut(self, live: int) -> None:
        for states, i in self._states():
            states[i] = None if states[i] is None else states[i][:live].clone()


class HybridLayer(StateLayer, SlotLayer):  # type: ignore[override, no-untyped-call]
    """Slots beside recurrent states, for layers that have both."""

    is_compileable = False

    def __init__(self, cursor: Cursor, number_of_states: int = 1) -> None:
        SlotLayer.__init__(self, cursor)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        kind = SlotLayer if args else LinearAttentionLayer
        kind.lazy_initialization(self, *args, **kwargs)

    def resize(self, live: int, rows: int, columns: int) -> None:
        SlotLayer.resize(self, live, rows, columns)

    def write(self, row: int, other: CacheLayer, columns: int) -> None:
        SlotLayer.write(self, row, other, columns)
        StateLayer.write(self, row, other, columns)

    def move(self, source: int, target: int, columns: int) -> None:
        SlotLayer.move(self, source, target, columns)
        StateLayer.move(self, source, target, columns)


labs_decode.LAYERS.update(
    {
        cache_utils.LinearAttentionAndFullAttentionLayer: HybridLayer,
        cache_utils.LinearAttentionAndSlidingWindowAttentionLayer: HybridLayer,
        cache_utils.LinearAttentionLayer: StateLayer,
    }
)
