"""latteflow: one model that understands pictures and makes them.

Importing this package loads nothing heavy; the names below do when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latteflow.models.transformer import LatteFlowTransformer
    from latteflow.pipeline import LatteFlowPipeline

__version__ = "0.1.0"
__all__ = ["LatteFlowPipeline", "LatteFlowTransformer", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "LatteFlowPipeline":
        from latteflow.pipeline import LatteFlowPipeline

        return LatteFlowPipeline
    if name == "LatteFlowTransformer":
        from latteflow.models.transformer import LatteFlowTransformer

        return LatteFlowTransformer
    raise AttributeError(f"module 'latteflow' has no attribute {name!r}")
