# SPDX-License-Identifier: Apache-2.0
"""The models of a server that generate no text: embedding models and cross-encoders, by name.

    desk = labs_kinds.start(config)             # loads the model, as labs_models does on demand
    name = labs_kinds.Kinds(config, None).name_of(None, "embedding")

Needs labs_apart.py, labs_asked.py, labs_desk.py, labs_embed.py, labs_rerank.py and labs_turns.py.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import labs
import labs_apart
import labs_asked
import labs_embed
import labs_names
import labs_rerank
import labs_turns
from labs_desk import Desk

KINDS: dict[str, Any] = {"embedding": labs_embed.Encoder, "rerank": labs_rerank.Scorer}


@functools.lru_cache(maxsize=2)
def remembered(spec: labs.ModelSpec) -> Any:
    """Return an Encoder or a Scorer; the two used last stay loaded."""
    return KINDS[spec.kind](spec)


def start(config: labs.Config) -> Desk:
    """Load the embedding model or cross-encoder of a configuration. Raises ModelError."""
    model = KINDS[config.model.kind](config.model)
    began = time.perf_counter()
    labs_apart.run(model.load)
    desk = Desk(model, config.server.max_waiting, load_s=time.perf_counter() - began)
    labs_turns.close_at_exit(desk)
    return desk


class Kinds:
    """Which model of a server answers a request for vectors or scores.

    encoder: of the documents, which has a desk of its own, as labs_rag.py uses it too.
    """

    def __init__(self, config: labs.Config, encoder: labs_embed.Encoder | None) -> None:
        self._configs = config.by_name()
        self._default = config
        self._own: dict[str, Desk] = {}
        if encoder is not None and encoder.spec.model_name not in self._configs:
            name = labs_names.short(encoder.spec.model_name, self._configs)
            self._own[name] = Desk(encoder, config.server.max_waiting)

    def kinds(self) -> dict[str, Any]:
        """Return the kind of each model by its name, also of those that generate text."""
        found: dict[str, Any] = {name: each.model.kind for name, each in self._configs.items()}
        return found | dict.fromkeys(self._own, "embedding")

    def find(self, asked: str) -> str | None:
        """Return the name of the model that a request means, or None."""
        own = {name: desk.maker.spec.model_name for name, desk in self._own.items()}
        short = labs_names.find_in(asked, {name: name for name in own})
        return labs_names.find(asked, self._configs) or short or labs_names.find_in(asked, own)

    def own(self, name: str) -> Desk | None:
        """Return the desk of the documents' embedding model, None for another name."""
        return self._own.get(name)

    def model_of(self, name: str) -> Any:
        """Return a model without a desk, for a program that makes one request at a time."""
        own = self._own.get(name)
        return remembered(self._configs[name].model) if own is None else own.maker

    def timeout_s(self, name: str) -> float | None:
        """Return how long a request to a model may take, None if there is no limit."""
        return self._configs.get(name, self._default).generation.timeout_s

    def name_of(self, asked: str | None, kind: str) -> str:
        """Return the model that a request names, or else the first one of the kind.

        Raises Refusal for an unknown model, and for one of another kind.
        """
        kinds = self.kinds()
        names = [name for name, each in kinds.items() if each == kind]
        found = None if asked is None else self.find(asked)
        if found in names:
            return str(found)
        if not names:
            hint = f'kind = "{kind}" in [models.NAME] names one'
            text = f"this server has no model of the kind {kind}; {hint}"
            raise labs_asked.Refusal(text, "model_not_found", "model", 404)
        if asked is None:
            return names[0]
        known = f"models of the kind {kind}: {', '.join(names)}"
        if found is not None:
            text = f"model: {found} is of the kind {kinds[found]}; {known}"
            raise labs_asked.Refusal(text, "invalid_value", "model")
        text = f"{labs_names.unknown(asked, names)} {known}"
        raise labs_asked.Refusal(text, "model_not_found", "model", 404)
