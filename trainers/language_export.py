"""What a language model's run delivers, as transformers and PEFT load it: the adapters, or the whole model.

A checkpoint holds the Trainer's files too. An export holds the weights, the tokenizer or processor, and the record.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from align import checkpoint
from align.errors import CheckpointError, ConfigError, ModelError
from align.exporting import Finish, describe_export, require_choices, write_whole
from align.language_config import LanguageConfig
from align.published import is_embedded, licence_of
from align.weights import file_sha256, load_tensors, require_inert, weights_sha256
from trainers.language_model import quiet, takes_images, weights_folder
from trainers.sources import find_source

_KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16}
_NOT_OF_THE_TEXT = (
    "manifest.json", "state.json", "trainer_state.json", "config.json", "generation_config.json",
    "adapter_config.json", "model.safetensors.index.json",
)  # fmt: skip
"""Of a checkpoint's files: those of the Trainer, and those of weights, which each layout writes itself."""


@dataclass(frozen=True)
class TrainedLanguage:
    """What a checkpoint delivers, and the base model that it changes.

    Args:
        config: of the run.
        run: the run folder.
        folder: the checkpoint's.
        step: of the checkpoint.
    """

    config: LanguageConfig
    run: Path
    folder: Path
    step: int

    @cached_property
    def base(self) -> Path:
        """The folder of the model before training; the embedded one is built when it is first asked for."""
        return weights_folder(self.config.model.path)

    @property
    def adapted(self) -> bool:
        """Whether adapters were trained."""
        return self.config.model.train == "lora"

    @property
    def weights(self) -> Path:
        """The file, or of a model in shards the folder, of the trained weights."""
        name = "adapter_model.safetensors" if self.adapted else "model.safetensors"
        return self.folder / name if (self.folder / name).is_file() else self.folder


def find_trained_language(source: str | Path) -> TrainedLanguage:
    """Return what a run folder (its last checkpoint) or a checkpoint folder delivers.

    Raises:
        CheckpointError: no run there, one without a checkpoint, or one whose files have changed.
        ModelError: a base model that is gone.
    """
    found = find_source(source)
    if found.checkpoint is None or found.run is None:
        raise CheckpointError(
            "There is nothing trained here to export", where=str(source),
            do="Give a run folder or one of its checkpoints",
        )  # fmt: skip
    step = int(checkpoint.verify(found.checkpoint)["step"])
    if not is_embedded(found.config.model.path):
        weights_folder(found.config.model.path)
    return TrainedLanguage(found.config, found.run, found.checkpoint, step)


def _peft(trained: TrainedLanguage, folder: Path, dtype: torch.dtype) -> str:
    """Write what `PeftModel.from_pretrained` reads."""
    from peft import PeftConfig
    from safetensors.torch import save_file

    config = PeftConfig.from_pretrained(str(trained.folder))
    model = trained.config.model.path
    config.base_model_name_or_path, config.inference_mode = str(trained.base) if model == "tiny" else model, True
    config.save_pretrained(str(folder))
    state = load_tensors(trained.weights)
    save_file(
        {name: tensor.to(dtype) for name, tensor in state.items()}, folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )  # fmt: skip
    return f"{'PeftModel' if takes_images(model) else 'AutoPeftModelForCausalLM'}.from_pretrained(folder)"


def _full(trained: TrainedLanguage, folder: Path, dtype: torch.dtype) -> str:
    """Write a model folder, into which adapters are merged in float32: `W + (alpha / rank) B A`."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kind = AutoModelForImageTextToText if takes_images(trained.config.model.path) else AutoModelForCausalLM
    source = trained.base if trained.adapted else trained.folder
    require_inert(source)
    try:
        model: nn.Module = kind.from_pretrained(source, dtype=torch.float32, trust_remote_code=False)
        if trained.adapted:
            model = PeftModel.from_pretrained(model, trained.folder).merge_and_unload()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError("The model cannot be loaded", where=str(source), why=str(error).splitlines()[0]) from error
    model.config.use_cache = True
    model.to(dtype).save_pretrained(folder)
    return f"{kind.__name__}.from_pretrained(folder)"


LAYOUTS: dict[str, Callable[[TrainedLanguage, Path, torch.dtype], str]] = {"peft": _peft, "full": _full}
"""Layout to what writes it into a folder and returns how it is loaded."""


def plan_language_export(source: str | Path, *, to: str, out: str | Path, dtype: str = "fp32") -> TrainedLanguage:
    """Check everything that `export_language` checks before it writes, and return what it would export; see there."""
    if to in ("diffusers-lora", "comfyui"):
        raise ConfigError(f"{to} is a layout of models of images", where="--to", do="Use --to peft or --to full")
    require_choices(LAYOUTS, to=to, out=out, dtype=dtype)
    trained = find_trained_language(source)
    if to == "peft" and not trained.adapted:
        raise ConfigError(
            "All weights of this model were trained, which peft cannot hold", where="--to",
            why="it holds LoRA adapters", do="Use --to full",
        )  # fmt: skip
    return trained


def export_language(
    source: str | Path, *, to: str, out: str | Path, dtype: str = "fp32", finish: Finish | None = None
) -> dict[str, Any]:
    """Write what a language model's run delivers into the new folder `out`, whole or not at all.

    Args:
        source: a run folder (its last checkpoint), or a checkpoint folder.
        to: "peft", or "full" (a model folder, adapters merged).
        dtype: of the exported weights: "fp32", or "bf16" for half the size.
        finish: writes what else the folder is to hold, such as `align.reports.modelcard.write_card`.

    Returns:
        the record that is written beside the weights.

    Raises:
        ConfigError: a layout that is unknown or cannot hold what was trained, or an `out` that is taken.
        CheckpointError, ModelError: see `find_trained_language`.
    """
    trained = plan_language_export(source, to=to, out=out, dtype=dtype)

    def write(folder: Path) -> dict[str, Any]:
        with quiet():
            load = LAYOUTS[to](trained, folder, _KINDS[dtype])
        for path in sorted(trained.folder.iterdir()):  # the tokenizer, the processor, the chat template
            if path.suffix in (".json", ".jinja", ".txt", ".model") and path.name not in _NOT_OF_THE_TEXT:
                shutil.copy2(path, folder / path.name)
        return _record(trained, to=to, dtype=dtype, load=load)

    return write_whole(out, write, finish)


def _record(trained: TrainedLanguage, **how: str) -> dict[str, Any]:
    model = trained.config.model.path
    base = {
        "sha256": weights_sha256(trained.base), "licence": licence_of(model, trained.base),
        "takes_image": takes_images(model), "makes": "text",
    }  # fmt: skip
    sha256 = file_sha256(trained.weights) if trained.weights.is_file() else weights_sha256(trained.folder)
    run = {"folder": str(trained.run), "step": trained.step, "weights": "last", "sha256": sha256}
    layers = 0
    if trained.adapted:
        layers = sum(".lora_A." in name for name in load_tensors(trained.weights))
    return describe_export(trained.config, base, run, layers, **how)
