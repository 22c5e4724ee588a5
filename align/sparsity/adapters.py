"""LoRA adapters as the weights they merge into, worked out row by row as they are read.

    W1 = round(W0 + scale B A),  scale = alpha / r, with rsLoRA alpha / sqrt(r)

in double precision, rounded once to the format of W0, so that what is added has the rank of B A but for that rounding.
(PEFT's merge rounds B A too, so its last bits may differ.)
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from align.errors import ModelError
from align.sparsity.formats import FORMATS
from align.sparsity.sources import Entry, Source

PREFIXES = ("module.", "_orig_mod.", "base_model.model.", "actor.", "transformer.", "unet.", "model.")


def plain(name: str) -> str:
    """Return a tensor's name without the prefixes that wrappers add to it."""
    for prefix in PREFIXES:
        while name.startswith(prefix):
            name = name[len(prefix) :]
    return name


def merged(base: Source, adapter: Source, form: str = "") -> Source:
    """Return `base` with `adapter` merged into it, lazily.

    Args:
        form: the format that merged weights are rounded to; that of the base when empty.

    Raises:
        ModelError: a kind of adapter that is not merged here, or one of another model.
    """
    config = adapter.config
    if config.get("peft_type", "LORA") != "LORA" or config.get("use_dora"):
        kind = "DoRA" if config.get("use_dora") else config.get("peft_type")
        raise ModelError(
            "This kind of adapter is not merged here",
            where=adapter.path,
            why=str(kind),
            do="Merge it, and compare the merged model",
        )
    if "lora_alpha" not in config and not any(f.stem == "pytorch_lora_weights" for f in adapter.files):
        raise ModelError(
            "An adapter does not say its scale",
            where=adapter.path,
            why="there is no lora_alpha beside it",
            do="Give the exported adapter, with adapter_config.json",
        )
    denoisers_last = sorted(base.entries, key=lambda name: name.partition("/")[0] in ("transformer", "unet"))
    by_plain = {plain(name.partition("/")[2] or name): name for name in denoisers_last}
    entries, used, parts = dict(base.entries), set(), set()
    for name, down in adapter.entries.items():
        module, is_down, _ = name.partition(".lora_A.")
        if not is_down:
            continue
        up_name = next((n for n in adapter.entries if n.startswith(module + ".lora_B.")), None)
        target = by_plain.get(plain(f"{module}.weight")) or by_plain.get(plain(f"{module}.base_layer.weight"))
        if up_name is None or target is None:
            raise ModelError(
                "An adapter of another model", where=adapter.path, why=f"the base has no {plain(module)}.weight"
            )
        up = adapter.entries[up_name]
        scale, transposed = _scale(config, module, down.shape[0]), bool(config.get("fan_in_fan_out"))
        entries[target] = _merge(base.entries[target], down, up, scale, transposed, form)
        used |= {name, up_name}
        parts.add(target.partition("/")[0] if "/" in target else "")
    for name, entry in adapter.entries.items():
        if name not in used:
            target = by_plain.get(plain(name.replace(".modules_to_save", "").replace(".default.", ".")))
            if target is None or entry.shape != base.entries[target].shape:
                raise ModelError(
                    "An adapter holds what is not merged here",
                    where=adapter.path,
                    why=name,
                    do="Merge it, and compare the merged model",
                )
            entries[target] = entry
    if len(parts) == 1 and (part := parts.pop()):  # of a pipeline, the component that the adapter belongs to
        entries = {name.removeprefix(f"{part}/"): e for name, e in entries.items() if name.startswith(f"{part}/")}
    return Source(adapter.path, "adapter, merged", entries, dict(base.aliases), base.config, files=adapter.files)


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    def pattern(name: str, default: float) -> float:
        table = config.get(name) or {}
        return next((float(v) for k, v in table.items() if re.search(rf"(.*\.)?{k}$", module)), default)

    alpha = pattern("alpha_pattern", float(config.get("lora_alpha", rank)))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _merge(base: Entry, down: Entry, up: Entry, scale: float, transposed: bool, dtype: str) -> Entry:
    def matrix(entry: Entry) -> NDArray[np.float64]:
        return FORMATS[entry.dtype].values(entry.read(0, entry.count)).reshape(entry.shape[0], -1)

    a, b = matrix(down), matrix(up) * scale
    if transposed:
        a, b = b.T.copy(), a.T.copy()
    rows, columns = base.shape[0], base.count // max(base.shape[0], 1)
    if b.shape[0] != rows or a.shape[1] != columns:
        raise ModelError(
            "An adapter of another model",
            where=f"{down.file}, {down.name}",
            why=f"{b.shape[0]} x {a.shape[1]} for {list(base.shape)}",
        )
    form, stored = FORMATS[dtype or base.dtype], FORMATS[base.dtype]

    def read(start: int, stop: int) -> NDArray[Any]:
        first, last = start // columns, -(-stop // columns)
        delta = (b[first:last] @ a).reshape(-1)[start - first * columns : stop - first * columns]
        return form.encode(stored.values(base.read(start, stop)) + delta)

    return Entry(base.name, form.name, base.shape, down.file, down.offset, read, factors=(b, a))
