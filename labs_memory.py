# SPDX-License-Identifier: Apache-2.0
"""How much memory may hold what later requests could use again.

    most = labs_memory.keepable_bytes(cache, held)

Needs labs_decode.py.
"""

from __future__ import annotations

import sys

import labs_decode

KEPT_SHARE = 0.125  # the share of free memory for stored prefixes and for unused slots
UNKNOWN_BUDGET = 2**30  # bytes, assumed if the system does not report its free memory


def keepable_bytes(cache: labs_decode.Slots, held: int) -> int:
    """Return how many bytes may be stored beside `cache` for later; `held` are stored already."""
    free = labs_decode.available_bytes(cache.buffers[0].device)
    return UNKNOWN_BUDGET if free == sys.maxsize else int(KEPT_SHARE * (free + held))
