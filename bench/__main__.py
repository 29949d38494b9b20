# SPDX-License-Identifier: Apache-2.0
"""Measure labs beside its neighbours in one run: same model, dtype, prompts and number of tokens.

    uv run --extra bench python -m bench                              the table of all neighbours
    uv run --extra bench python -m bench single many context ...      labs over a peer, by parts
    uv run --extra bench python -m bench --gpu-report [1B 8B 0.6B]    random weights on a GPU
    uv run --extra bench python -m bench --models [llama bert ...]    how types of models run
    uv run --extra bench python -m bench --schemas FOLDER [answers]   schemas of JSONSchemaBench

--models without types tries all that transformers knows and writes docs/models.md. FOLDER is
maskbench/data of github.com/guidance-ai/jsonschemabench.
The table is also written to bench.json and docs/bench.svg. Its neighbours are transformers'
generate and continuous batching, `transformers serve`, llama-cpp-python (where it is installed) and
labs, in process and over HTTP. They are asked in turn, because machines drift and the ratios of one
run do not. A row of a part is the median of interleaved pairs with its 90 % bootstrap interval. All
is greedy, and equal work without end-of-sequence, except over HTTP and in llama.cpp.
"""

from __future__ import annotations

import sys

from bench import draft, gpu, models, parts, table

NAMES = ("single", "many", "context", "arrivals", "sampling", "long", "memory", "start", "prefix")
NAMES += ("shared", "serving", "overhead", "manners", "batch", "typed", "documents", "ray")
PARTS = {name: getattr(parts, name) for name in NAMES} | {"draft": draft.draft}


def main() -> None:
    match sys.argv[1:]:
        case []:
            table.table()
        case ["--worker", name]:
            table.worker(name)
        case ["--gpu-report", *shapes]:
            gpu.gpu_report(*shapes)
        case ["--models", *kinds]:
            models.models(*kinds)
        case ["--schemas", folder, *answers] if answers in ([], ["answers"]):
            from bench import schemas  # needs llguidance and jsonschema

            schemas.schemas(folder, *answers)
        case names if unknown := set(names) - PARTS.keys():
            raise SystemExit(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
        case names:
            print(f"{'':58} {'labs':>8} {'other':>8} {'ratio':>6} 90 % interval")
            for name in names:
                PARTS[name]()


if __name__ == "__main__":
    main()
