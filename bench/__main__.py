# SPDX-License-Identifier: Apache-2.0
"""Measure labs beside its neighbours in one run: same model, dtype, prompts and number of tokens.

    uv run --extra bench python -m bench                              the table of all neighbours
    uv run --extra bench python -m bench single many context ...      labs over a peer, by parts
    uv run --extra bench python -m bench --gpu-report [1B 8B 0.6B]    random weights on a GPU

The table is also written to bench.json and docs/bench.svg. Its neighbours are transformers'
generate on a static batch, its continuous batching, `transformers serve` with and without that,
llama-cpp-python (where it is installed) and labs, in process and over HTTP. They are asked in
turn, because machines drift and the ratios of one run do not. Each row of a part is the median of
interleaved pairs with its 90 % bootstrap interval.

Everything is greedy. All do equal work, without end-of-sequence, but over HTTP and in llama.cpp.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import documents
import gpu
import pairs
import servers
import table

PARTS = {
    part.__name__: part
    for part in (
        *(pairs.single, pairs.many, pairs.context, pairs.arrivals, pairs.sampling, pairs.long),
        *(pairs.memory, pairs.start, pairs.prefix, servers.serving, servers.overhead),
        *(servers.manners, pairs.batch, pairs.typed, documents.documents, servers.ray),
    )
}


def main() -> None:
    match sys.argv[1:]:
        case []:
            table.table()
        case ["--worker", name]:
            table.worker(name)
        case ["--gpu-report", *shapes]:
            gpu.gpu_report(*shapes)
        case names if unknown := set(names) - PARTS.keys():
            raise SystemExit(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
        case names:
            print(f"{'':58} {'labs':>8} {'other':>8} {'ratio':>6} 90 % interval")
            for name in names:
                PARTS[name]()


if __name__ == "__main__":
    main()
