"""Finds the model inside a wrapper of PEFT or sentence-transformers, which does the work.

`generate` of a `PeftModel` calls the model that it adapts. `encode` of a `SentenceTransformer` passes
objects that no graph takes. So the model inside gets the graphs, and the wrapper's own Python runs.
"""

from typing import Any

from torch import nn


def model_inside(module: Any) -> nn.Module | None:
    """Returns the model that does the work of a wrapper; None where the module is no such wrapper."""
    found: Any = None
    if _is_a(module, "peft", "PeftModel"):
        found = module.get_base_model()
    elif _is_a(module, "sentence_transformers", "SentenceTransformer"):
        first = next(iter(module.children()), None)
        found = getattr(first, "auto_model", None) or getattr(first, "model", None)
    return found if isinstance(found, nn.Module) and found is not module else None


def _is_a(module: Any, package: str, name: str) -> bool:
    kinds = type(module).__mro__
    return any(kind.__name__ == name and kind.__module__.partition(".")[0] == package for kind in kinds)
