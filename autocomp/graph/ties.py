"""Which channels of a model must go together: its graph followed, node by node, by the rules of each operation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autocomp.graph.labels import Ties, Tracer
from autocomp.graph.program import CanonicalModel
from autocomp.graph.rules import MODULES, RULES


def trace(model: CanonicalModel, layers: Mapping[str, Any], skipped: Mapping[str, str]) -> Ties:
    """Follow the channels of ``layers`` through a graph that was observed; atoms come back as numbers of components."""
    assert model.code.graph is not None
    tracer = Tracer(model, layers, skipped, RULES, MODULES)
    for node in model.code.graph.nodes:
        tracer.see(node)
    return tracer.finish()
