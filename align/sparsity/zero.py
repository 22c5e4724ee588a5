"""DeepSpeed checkpoints read in place: ZeRO 1, 2 and 3, and universal ones.

Under ZeRO 1 and 2 one file holds the 16-bit weights, and every process a slice of each group's flattened fp32
masters. Under ZeRO 3 every process holds the k-th part of each parameter, in fp32 alone: part k of a parameter of n
entries on P processes is its entries [k ceil(n/P), (k + 1) ceil(n/P)), the last one padded. The 16-bit weights are
these masters rounded, which is what DeepSpeed itself does after every step. A universal checkpoint has a file of
masters a parameter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.errors import ModelError
from align.sparsity.formats import TORCH_NAMES
from align.sparsity.pieces import Files, Piece, joined, rounded
from align.sparsity.sources import Entry, Source, set_aliases_apart
from align.unpickling import Inert, Placed, outline

INERT = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler", "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum", "deepspeed.utils.tensor_fragment.fragment_address",
    "argparse.Namespace",
)  # fmt: skip
"""Classes of which a DeepSpeed checkpoint holds objects; they are neither imported nor run."""
_RANK = re.compile(r"(?:(?:bf16_|fp16_)?zero_pp_rank_(\d+)_)?mp_rank_(\d+)_(?:model|optim)_states\.pt")


def zero_folder(path: Path) -> Path | None:
    """Return the folder of the step that a DeepSpeed checkpoint calls its latest, or that `path` itself is."""
    if any(path.glob("*_model_states.pt")) or any(path.glob("*_optim_states.pt")) or any(path.glob("zero/*/fp32.pt")):
        return path
    for name in ("latest", "latest_universal"):
        mark = path / name
        if mark.is_file() and mark.stat().st_size < 1000:
            tag = mark.read_text(encoding="utf-8", errors="replace").strip()
            if tag and Path(tag).name == tag and (path / tag).is_dir():
                return path / tag
    return None


def open_zero(path: Path, folder: Path, config: dict[str, Any]) -> Source:
    """Open a DeepSpeed checkpoint: its weights, and its fp32 masters where the weights are coarser.

    Args:
        path: as it was given.
        folder: that of the step, see `zero_folder`.
        config: of the model.

    Raises:
        ModelError: a file that is missing, truncated or asks for a class, or weights split by layers or by columns.
    """
    try:
        return _open(path, folder, config)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
        raise ModelError(
            "A DeepSpeed checkpoint is not laid out as expected", where=str(folder),
            why=f"{type(error).__name__}: {str(error)[:150]}", do="Convert it with its zero_to_fp32.py",
        ) from error  # fmt: skip


def _open(path: Path, folder: Path, config: dict[str, Any]) -> Source:
    models, optimizers = _by_rank(folder, "model"), _by_rank(folder, "optim")
    files, heads = Files(), {rank: outline(file, INERT) for rank, file in models.items()}
    if not heads:
        raise ModelError("A DeepSpeed checkpoint has no file of the model", where=str(folder), why="*_model_states.pt")
    head = heads[min(heads)]
    shapes = {name: tuple(shape) for group in head["param_shapes"] or () for name, shape in group.items()}
    frozen = {name: tuple(shape) for name, shape in (head.get("frozen_param_shapes") or {}).items()}
    shared = {str(a): str(b) for a, b in (head.get("shared_params") or {}).items()}
    flat: dict[str, Entry] = {}
    training: dict[str, Any] = {"steps": head.get("global_steps")}
    if any(folder.glob("zero/*/fp32.pt")):
        kind = "universal"
        flat = {
            name: _universal(files, folder / "zero" / name / "fp32.pt", name, shape) for name, shape in shapes.items()
        }
    else:
        states = {rank: outline(file, INERT) for rank, file in optimizers.items()}
        kind = "of one process" if not states else f"of {len(states)} processes"
        if states:
            flat, stage = _masters(files, optimizers, states, shapes)
            kind = f"stage {stage}, {kind}"
            training |= _settings(states[min(states)])
    source = Source(str(path), "", {}, config=config, files=[*models.values(), *optimizers.values()])
    placeholders = 0
    for name, placed in head["module"].items():
        if name in shared:
            source.aliases[name] = shared[name]
        elif placed.shape == shapes.get(name, frozen.get(name, placed.shape)):
            source.entries[name] = files.entry(models[min(models)], name, placed)
            source.entries[name].name = name
        elif name in frozen:
            parts = [(models[rank], heads[rank]["frozen_param_fragments"][name]) for rank in sorted(heads)]
            pieces = [Piece(files.entry(file, name, part), 0, math.prod(part.shape)) for file, part in parts]
            source.entries[name] = joined(name, frozen[name], pieces)
        else:
            if name not in flat:
                raise ModelError("A checkpoint lacks the weights of a parameter", where=str(folder), why=name)
            placeholders += 1
            dtype = TORCH_NAMES[placed.dtype]
            source.entries[name] = flat[name] if dtype == "F32" else rounded(flat[name], dtype)
    set_aliases_apart(source)
    source.masters = {
        name: entry for name, entry in flat.items() if name in source.entries and source.entries[name].dtype != "F32"
    }
    source.layout = f"DeepSpeed ZeRO, {kind}" + (
        ", weights rounded from masters" if placeholders and source.masters else ""
    )
    source.training = {key: value for key, value in training.items() if value is not None}
    return source


def _by_rank(folder: Path, what: str) -> dict[int, Path]:
    """Return the files of the processes, by rank.

    Raises:
        ModelError: a model that is split by layers, columns or experts, or a rank that is missing.
    """
    found: dict[int, Path] = {}
    layers = folder.glob("layer_*-model_*states.pt")
    for path in [*sorted(folder.glob(f"*_{what}_states.pt")), *sorted(layers)]:
        match = _RANK.fullmatch(path.name)
        if match is None or int(match[2]):
            raise ModelError(
                "A model that is split by layers, columns or experts is not read in place", where=str(folder),
                why=f"it has {path.name}", do="Export the whole model with the tool that trained it",
            )  # fmt: skip
        found[int(match[1] or 0)] = path
    if absent := sorted(set(range(max(found, default=0))) - set(found)):
        raise ModelError(
            "A process's file is missing", where=str(folder), why=f"that of rank {absent[0]}, {what} states"
        )
    return found


def _masters(
    files: Files, paths: Mapping[int, Path], states: Mapping[int, Any], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Entry], str]:
    """Return the masters by name, and the stage in words."""
    whole = {rank: state["optimizer_state_dict"] for rank, state in states.items()}
    first = whole[min(whole)]
    counts = first["partition_count"]
    world = max(counts) if isinstance(counts, list) else counts
    if world != len(whole):
        raise ModelError(
            "A process's file is missing", where=str(paths[min(paths)].parent),
            why=f"{len(whole)} files of optimizer states, where {world} processes wrote them", do="Copy all of them",
        )  # fmt: skip
    key = "fp32_flat_groups" if "fp32_flat_groups" in first else "single_partition_of_fp32_groups"
    flats: dict[int, list[Entry]] = {
        rank: [files.entry(paths[rank], f"{key}.{i}", part) for i, part in enumerate(whole[rank][key])]
        for rank in sorted(whole)
    }
    pieces: dict[str, list[Piece]] = {name: [] for name in shapes}
    if key == "fp32_flat_groups":
        for flat in flats.values():
            entry = joined(key, [sum(e.count for e in flat)], [Piece(e, 0, e.count) for e in flat])
            at = 0
            for name, shape in shapes.items():
                part = -(-math.prod(shape) // world)
                pieces[name].append(Piece(entry, at, part))
                at += part
            if at != entry.count:
                raise ValueError(f"the parts of its parameters have {at:,} entries, its masters {entry.count:,}")
    else:
        for rank, flat in flats.items():
            for entry, places in zip(flat, whole[rank]["param_slice_mappings"], strict=True):
                for name, place in places.items():
                    begin, count = int(place.get("start")), int(place.get("numel"))
                    if not 0 <= begin <= begin + count <= entry.count:
                        raise ValueError(f"{name} lies outside of its group")
                    pieces[name].append(Piece(entry, begin, count))
    enum = first.get("zero_stage")  # an optimizer of bf16 weights that is not ZeRO's own keeps none, and is stage 1
    stage = str(enum.arguments[0]) if isinstance(enum, Inert) and enum.arguments else str(enum or 1)
    return {name: joined(name, shape, pieces[name]) for name, shape in shapes.items()}, stage


def _universal(files: Files, path: Path, name: str, shape: tuple[int, ...]) -> Entry:
    if not path.is_file():
        raise ModelError("A universal checkpoint lacks a parameter", where=str(path), why="there is no such file")
    found = outline(path, INERT)
    placed = found if isinstance(found, Placed) else found["param"]
    entry = files.entry(path, name, placed)
    return joined(name, shape, [Piece(entry, 0, entry.count)])


def _settings(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a file of optimizer states says of the training."""
    inner = state["optimizer_state_dict"]
    base = inner.get("base_optimizer_state") or inner.get("optimizer_state_dict") or {}
    groups = base.get("param_groups") or [{}] if isinstance(base, Mapping) else [{}]
    named = (state.get("ds_config") or {}).get("optimizer") or {}
    return {"optimizer": named.get("type"), "learning_rate": groups[0].get("lr")}
