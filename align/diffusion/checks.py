"""What `align check` says of a model's family: whether one runs it, and whether it can learn from given images."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from align.checks import Finding
from align.diffusion.families import FAMILIES, read_index, require_encoding
from align.errors import AlignError
from align.published import is_builtin, is_hub_name

if TYPE_CHECKING:
    from align.config import ModelConfig


def family_findings(model: ModelConfig, *, images: bool) -> list[Finding]:
    """Return an error for a pipeline folder that no family can train so; none for a model that is not here.

    Args:
        model: a folder, or a name on the hub, which is read from the cache.
        images: whether the run learns from given images; looked at where diffusers is installed.
    """
    folder = None if is_builtin(model.path) else Path(model.path)
    if is_hub_name(model.path):
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(model.path, "model_index.json")
        folder = Path(cached).parent if isinstance(cached, str) else None
    if folder is None:
        return []
    try:
        name, _ = read_index(folder, model.family)
        if images and find_spec("diffusers"):
            require_encoding(FAMILIES.get(name))
    except AlignError as error:
        message = f"{error.what}: {error.why}" if error.why else error.what
        return [Finding("error", "family", message, error.do, "model.family" if model.family else "model.path")]
    return []
