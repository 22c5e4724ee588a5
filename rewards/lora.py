"""Low-rank adapters that a published file holds beside the weights they change."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from align.errors import ModelError


def merge_lora(state: Mapping[str, Tensor], alpha: float, where: str) -> dict[str, Tensor]:
    """Return plain weights of a checkpoint in peft's layout: `W + (alpha / r) B A` at every site, in float32.

    The names lose peft's wrapping. Other weights are returned as they are.

    Raises:
        ModelError: a site without its A, B or W, or another kind of adapter.

    Source: LoRA (arXiv 2106.09685), section 4.1.
    """
    plain = {key.removeprefix("base_model.model."): value for key, value in state.items()}
    sites = {key.rsplit(".lora_A.", 1)[0] for key in plain if ".lora_A." in key}
    merged = {key.replace(".base_layer.", "."): value for key, value in plain.items() if ".lora_" not in key}
    for site in sites:
        try:
            down, up = (plain.pop(f"{site}.lora_{side}.default.weight").float() for side in "AB")
            base = plain[f"{site}.base_layer.weight"].float()
        except KeyError as error:
            raise ModelError("An adapter is incomplete", where=where, why=f"it has no {error.args[0]}") from error
        if down.shape[0] != up.shape[1] or (up.shape[0], down.shape[1]) != tuple(base.shape):
            raise ModelError("An adapter does not fit its weights", where=f"{where}, {site}")
        merged[f"{site}.weight"] = base + alpha / down.shape[0] * (up @ down)
    left = [key for key in plain if ".lora_" in key]
    if left:
        raise ModelError(
            "Another kind of adapter", where=where, why=f"it has {min(left)}", do="Merge it into its weights"
        )
    return merged
