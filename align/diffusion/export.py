"""Trained weights in the layouts that other tools load: a diffusers LoRA, a PEFT adapter, a pipeline, ComfyUI's.

What is exported is what a run delivers: the running average where there is one, else the last weights. An export is a
folder, written whole or not at all, with a record (`export.json`) of what it is and where it comes from. Only the
denoiser is loaded, on the CPU, and only where its weights are needed.
"""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from align import checkpoint
from align.config import VisualConfig, load_config
from align.diffusion.comfyui import NOT_OPENED, to_comfyui
from align.diffusion.families import FAMILIES, read_index
from align.diffusion.policy import ADAPTER, adapter_config, quiet_loading, resolve_model
from align.errors import CheckpointError, ConfigError, ModelError, first_line
from align.exporting import Finish, describe_export, require_choices, write_whole
from align.offline_config import OfflineConfig
from align.published import is_builtin, is_hub_name, licence_of
from align.weights import file_sha256, weights_sha256, without_storage

if TYPE_CHECKING:
    from peft import LoraConfig as PeftLoraConfig

_KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Trained:
    """What a checkpoint delivers, and the base model that it changes.

    Args:
        config: of the run.
        run: the run folder.
        step: of the checkpoint.
        group: "average" or "model", the weights that are delivered.
        weights: by name, in the denoiser's own names.
        sha256: of the file they were read from; of the manifest, where they lie in pieces.

    A base that goes by a name is built or fetched when it is first asked for, which a plan does not.
    """

    config: VisualConfig | OfflineConfig
    run: Path
    step: int
    group: str
    weights: dict[str, Tensor]
    sha256: str

    @cached_property
    def base(self) -> Path:
        """The base pipeline's folder."""
        return resolve_model(self.config.model.path)

    @cached_property
    def _index(self) -> tuple[str, dict[str, Any]]:
        return read_index(self.base, self.config.model.family)

    @property
    def pipeline(self) -> str:
        """Class of the base pipeline."""
        return self._index[0]

    @property
    def listed(self) -> dict[str, Any]:
        """The base pipeline's `model_index.json`."""
        return self._index[1]

    @property
    def component(self) -> str:
        """Name of the denoiser among the pipeline's components."""
        return FAMILIES.get(self.pipeline).component

    @property
    def adapters(self) -> dict[str, tuple[Tensor, Tensor]]:
        """A `[r, in]` and B `[out, r]` of every adapted layer, by its name."""
        ending = f".lora_A.{ADAPTER}.weight"
        layers = [name.removesuffix(ending) for name in self.weights if name.endswith(ending)]
        return {n: (self.weights[n + ending], self.weights[f"{n}.lora_B.{ADAPTER}.weight"]) for n in layers}

    @property
    def peft_config(self) -> PeftLoraConfig:
        """PEFT's configuration of these adapters, its layers in one order whatever the process."""
        config = adapter_config(self.config.model.lora, list(self.adapters))
        config.target_modules = sorted(config.target_modules)
        return config

    def adapter_state(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the adapters under PEFT's names: `<layer>.lora_A.weight`, `<layer>.lora_B.weight`."""
        state = {}
        for name, (a, b) in self.adapters.items():
            state |= {f"{name}.lora_A.weight": a.to(dtype), f"{name}.lora_B.weight": b.to(dtype)}
        return state

    def denoiser(self, *, empty: bool = False) -> nn.Module:
        """Return the base denoiser in float32, or without its weights.

        Raises:
            ModelError: a denoiser that cannot be loaded.
        """
        import diffusers

        folder = self.base / self.component
        try:
            with quiet_loading():
                kind = getattr(diffusers, self.listed[self.component][1])
                if not empty:
                    return kind.from_pretrained(folder, dtype=torch.float32)
                with without_storage():
                    return kind.from_config(kind.load_config(folder))
        except (OSError, ValueError, TypeError, RuntimeError, LookupError, AttributeError) as error:
            raise ModelError(
                "The base model's denoiser cannot be loaded", where=str(folder), why=first_line(error)
            ) from error


def find_trained(source: str | Path) -> Trained:
    """Return what a run folder (its last checkpoint) or a checkpoint folder delivers.

    Raises:
        CheckpointError: no run there, or one without a checkpoint.
        ConfigError: a run of a language model, or a fit.
        ModelError: a base model that is gone.
    """
    found = checkpoint.find_run(source)
    if found is None:
        raise CheckpointError(
            "There is nothing trained here to export",
            where=str(source),
            do="Give a run folder or one of its checkpoints",
        )
    run, folder = found
    config = load_config(run / "config.yaml")
    if not isinstance(config, (VisualConfig, OfflineConfig)):
        raise ConfigError(
            "This is no run of a model of images", where=str(source), why=f"its trainer is {config.trainer}",
            do="Use trainers.language_export for language models; of a fit, its folder `reward` is what others load",
        )  # fmt: skip
    group = checkpoint.delivered_group(folder)
    saved = checkpoint.load(folder, only=group)
    model = config.model
    if not (is_builtin(model.path) or is_hub_name(model.path)):
        read_index(Path(model.path), model.family)
    files = checkpoint.files_of(folder, group)
    sha256 = file_sha256(folder / "manifest.json" if checkpoint.in_pieces(files) else files[0])
    return Trained(config, run, saved.step, group, saved.tensors[group], sha256)


def _diffusers_lora(trained: Trained, folder: Path, dtype: torch.dtype) -> str:
    """Write what `pipeline.load_lora_weights` reads, alpha and rank in the file's metadata."""
    import diffusers

    part = trained.component
    getattr(diffusers, trained.pipeline).save_lora_weights(
        folder,
        **{f"{part}_lora_layers": trained.adapter_state(dtype)},
        **{f"{part}_lora_adapter_metadata": trained.peft_config.to_dict()},
    )
    return 'pipeline.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors")'


def _peft(trained: Trained, folder: Path, dtype: torch.dtype) -> str:
    """Write what `PeftModel.from_pretrained` reads."""
    from safetensors.torch import save_file

    config = trained.peft_config
    config.base_model_name_or_path, config.inference_mode = trained.config.model.path, True
    config.save_pretrained(str(folder))
    state = {f"base_model.model.{name}": value for name, value in trained.adapter_state(dtype).items()}
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return f"PeftModel.from_pretrained(pipeline.{trained.component}, folder)"


def _full(trained: Trained, folder: Path, dtype: torch.dtype) -> str:
    """Write a pipeline folder: the base's, with the trained denoiser, into which adapters are merged.

        W + (alpha / rank) B A

    All other components are the base's files. Layers that diffusers keeps in float32 stay so.
    """
    denoiser, lora = trained.denoiser(), trained.config.model.lora
    state = dict(denoiser.named_parameters())
    with torch.no_grad():
        if trained.config.model.train == "lora":
            for name, (a, b) in trained.adapters.items():
                state[f"{name}.weight"].add_((lora.alpha / lora.rank) * (b @ a))
        else:
            for name, value in trained.weights.items():
                state[name].copy_(value)
    kept = tuple(denoiser._keep_in_fp32_modules or ())
    for name, parameter in state.items():
        if not any(part in name.split(".") for part in kept):
            parameter.data = parameter.data.to(dtype)
    parts = [name for name, home in trained.listed.items() if isinstance(home, list) and home[0] is not None]
    for part in set(parts) - {trained.component}:
        shutil.copytree(trained.base / part, folder / part)
    index = {**trained.listed, "_class_name": trained.pipeline}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    denoiser.save_pretrained(folder / trained.component)
    return f"{trained.pipeline}.from_pretrained(folder)"


def _comfyui(trained: Trained, folder: Path, dtype: torch.dtype) -> str:
    """Write one file of LoRA weights under ComfyUI's names; see `align.diffusion.comfyui`."""
    from safetensors.torch import save_file

    layers = trained.denoiser(empty=True).named_modules()
    widths = {name: module.out_features for name, module in layers if isinstance(module, nn.Linear)}
    family, lora = FAMILIES.get(trained.pipeline).name, trained.config.model.lora
    tensors = to_comfyui(trained.adapters, lora.alpha, family, widths)
    tensors = {name: value if name.endswith(".alpha") else value.to(dtype) for name, value in tensors.items()}
    save_file(tensors, folder / "comfyui_lora.safetensors", metadata={"format": "pt", "note": NOT_OPENED})
    return "put comfyui_lora.safetensors into ComfyUI's models/loras"


LAYOUTS: dict[str, Callable[[Trained, Path, torch.dtype], str]] = {
    "diffusers-lora": _diffusers_lora,
    "peft": _peft,
    "full": _full,
    "comfyui": _comfyui,
}
"""Layout to what writes it into a folder and returns how it is loaded."""


def plan_export(source: str | Path, *, to: str, out: str | Path, dtype: str = "fp32") -> Trained:
    """Check everything that `export` checks before it writes, and return what it would export; see there."""
    require_choices(LAYOUTS, to=to, out=out, dtype=dtype)
    trained = find_trained(source)
    if to != "full" and trained.config.model.train == "full":
        raise ConfigError(
            f"All weights of this model were trained, which {to} cannot hold", where="--to",
            why="it holds LoRA adapters", do="Use --to full",
        )  # fmt: skip
    return trained


def export(
    source: str | Path, *, to: str, out: str | Path, dtype: str = "fp32", finish: Finish | None = None
) -> dict[str, Any]:
    """Write what a run delivers as another tool loads it, into the new folder `out`, whole or not at all.

    Args:
        source: a run folder (its last checkpoint), or a checkpoint folder.
        to: "diffusers-lora", "peft", "full" (a pipeline folder, adapters merged) or "comfyui" (not opened in ComfyUI).
        dtype: of the exported weights: "fp32", or "bf16" for half the size.
        finish: writes what else the folder is to hold, such as `align.reports.modelcard.write_card`.

    Returns:
        the record that is written beside the weights.

    Raises:
        ConfigError: an unknown layout, a layout that cannot hold what was trained, or an `out` that is taken.
        CheckpointError, ModelError: see `find_trained`.
    """
    trained = plan_export(source, to=to, out=out, dtype=dtype)

    def write(folder: Path) -> dict[str, Any]:
        with quiet_loading():
            load = LAYOUTS[to](trained, folder, _KINDS[dtype])
        return _record(trained, to=to, dtype=dtype, load=load)

    return write_whole(out, write, finish)


def _record(trained: Trained, **how: str) -> dict[str, Any]:
    import diffusers

    model, family = trained.config.model.path, FAMILIES.get(trained.pipeline)
    takes = inspect.signature(getattr(diffusers, trained.pipeline).__call__).parameters
    base = {
        "pipeline": trained.pipeline, "component": trained.component,
        "sha256": weights_sha256(trained.base / trained.component), "licence": licence_of(model, trained.base),
        "absent": [part for part, home in trained.listed.items() if isinstance(home, list) and home[0] is None],
        "takes_image": family.takes_image, "makes": "image" if family.fps is None else "video", "fps": family.fps,
        "guidance": "true_cfg_scale" if "true_cfg_scale" in takes else "guidance_scale",
    }  # fmt: skip
    run = {
        "folder": str(trained.run), "step": trained.step,
        "weights": "running average" if trained.group == "average" else "last", "sha256": trained.sha256,
    }  # fmt: skip
    record = describe_export(trained.config, base, run, len(trained.adapters), **how)
    return {**record, "note": NOT_OPENED} if how["to"] == "comfyui" else record
