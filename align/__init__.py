"""RL alignment of image, video and language models from preference and binary feedback.

    from align import load_config, load_prompts, Samples, Scores, AlignError

Names are imported when they are first used: `import align` loads neither torch nor pydantic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from align.config import DanceGRPOConfig, load_config
    from align.errors import AlignError
    from align.prompts import load_prompts
    from align.types import Samples, Scores

__version__ = "0.1.0"
__all__ = ["AlignError", "DanceGRPOConfig", "Samples", "Scores", "__version__", "load_config", "load_prompts"]

_HOMES = {
    "AlignError": "align.errors",
    "DanceGRPOConfig": "align.config",
    "Samples": "align.types",
    "Scores": "align.types",
    "load_config": "align.config",
    "load_prompts": "align.prompts",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'align' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
