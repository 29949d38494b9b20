# SPDX-License-Identifier: Apache-2.0
"""How much memory slots use, and how much may hold what later requests could use again.

    most = labs_memory.keepable_bytes(cache, held)

Needs labs_decode.py, which is imported inside functions: labs_engine.py starts without torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from labs_decode import Batch, Slots

KEPT_SHARE = 0.125  # the share of free memory for stored prefixes and for unused slots
UNKNOWN_BUDGET = 2**30  # bytes, assumed if the system does not report its free memory


def keepable_bytes(cache: Slots, held: int) -> int:
    """Return how many bytes may be stored beside `cache` for later; `held` are stored already."""
    import labs_decode

    free = labs_decode.available_bytes(cache.buffers[0].device)
    return UNKNOWN_BUDGET if free == sys.maxsize else int(KEPT_SHARE * (free + held))


def cache_usage(batches: Sequence[Batch]) -> float:
    """Return the filled bytes of slots as a share, 0 to 1, of those held or still available."""
    import labs_decode

    caches = [batch.cache for batch in batches if batch.cache.buffers]
    used = sum(b.cache.bytes_per_column * (r.written - r.shared) for b in batches for r in b.rows)
    held = sum(buffer.nbytes for cache in caches for buffer in cache.buffers)
    device = caches[-1].buffers[0].device if caches else None
    return used / (held + labs_decode.slot_budget(device)) if device is not None else 0.0
