"""The model being aligned: a family, the weights that are trained, guidance, its reference, prompts encoded once."""

from __future__ import annotations

import contextlib
import copy
import json
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from align.config import LoraConfig, ModelConfig
from align.diffusion.families import FAMILIES, Conditioning, Family
from align.errors import ModelError
from align.registry import suggest
from align.seeding import seed as derive_seed

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

ADAPTER = "policy"


def load_family(path: str | Path, family: str | None = None, device: str | torch.device | None = None) -> Family:
    """Load a diffusers pipeline folder in float32, frozen, in eval mode, on `device`.

    Args:
        path: the folder, holding `model_index.json`.
        family: a pipeline class name that overrides the one in `model_index.json`.
        device: CUDA where there is one, else the CPU, when None.

    Raises:
        ModelError: not a pipeline folder, a pipeline of no known family, or a component that cannot be loaded.
    """
    folder = Path(path)
    index = folder / "model_index.json"
    if not index.is_file():
        raise ModelError(
            "This is not a diffusers pipeline folder",
            where=str(folder),
            why="it has no model_index.json" if folder.is_dir() else "there is no such folder",
            do="Give a folder written by save_pretrained, or 'digits' for the embedded model",
        )
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))
        name = family or listed["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError("A pipeline's model_index.json cannot be read", where=str(index), why=str(error)) from error
    if name not in FAMILIES:
        raise ModelError(f"No model family runs {name!r}", where=str(index), do=suggest(name, FAMILIES))
    import diffusers

    # A component saved as absent (SD3 without T5) has to be passed as absent to be loaded so.
    absent = {part: None for part, home in listed.items() if isinstance(home, list) and home[0] is None}
    try:
        with quiet_loading():
            pipeline: DiffusionPipeline = getattr(diffusers, name).from_pretrained(
                folder, dtype=torch.float32, **absent
            )
    except (OSError, ValueError, TypeError, RuntimeError, KeyError) as error:
        raise ModelError(
            f"The {name} folder cannot be loaded", where=str(folder), why=str(error).splitlines()[0]
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False).eval()
    return FAMILIES.get(name)(pipeline)


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Keep the libraries' own loading and saving bars off the terminal: a run shows one line of its own."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    shown = [log for log in (diffusers_logging, transformers_logging) if log.is_progress_bar_enabled()]
    for log in shown:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in shown:
            log.enable_progress_bar()


def add_lora(family: Family, lora: LoraConfig, run_seed: int) -> None:
    """Add a LoRA adapter to the denoiser: `W + (alpha / rank) B A`, with B = 0, so it starts as the base model.

    Raises:
        ModelError: a target that matches no module.
    """
    from peft import LoraConfig as PeftLoraConfig

    names = [name for name, module in family.denoiser.named_modules() if isinstance(module, nn.Linear)]
    endings = lora.targets or family.lora_targets
    targets = [n for n in names if any(f".{n}".endswith(f".{e}") for e in endings) and n not in family.idle_layers]
    missing = [e for e in lora.targets or () if not any(f".{n}".endswith(f".{e}") for n in targets)]
    if missing or not targets:
        raise ModelError(
            "A LoRA target matches no linear layer",
            where=", ".join(missing) or type(family.denoiser).__name__,
            do=f"Layers end like: {', '.join(sorted({n.rsplit('.', 1)[-1] for n in names})[:12])}",
        )
    config = PeftLoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=0.0, target_modules=targets, init_lora_weights=True
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(run_seed, "lora"))
        family.denoiser.add_adapter(config, adapter_name=ADAPTER)
    family.denoiser.set_adapter(ADAPTER)


class Encodings:
    """Encoded prompts by text, the least recently used dropped beyond `limit` bytes."""

    def __init__(self, family: Family, limit: int = 2 << 30) -> None:
        self.family, self.limit, self._rows, self._bytes = family, limit, OrderedDict[str, Conditioning](), 0

    def add(self, prompts: Iterable[str], batch: int = 64) -> None:
        """Encode the prompts that are not held."""
        wanted = list(dict.fromkeys(prompts))
        new = [p for p in wanted if p not in self._rows]
        for start in range(0, len(new), batch):
            chunk = new[start : start + batch]
            encoded = self.family.encode(chunk)
            for i, prompt in enumerate(chunk):
                self._rows[prompt] = {name: value[i].clone() for name, value in encoded.items()}
                self._bytes += sum(v.nbytes for v in self._rows[prompt].values())
        for prompt in wanted:
            self._rows.move_to_end(prompt)
        while self._bytes > self.limit and len(self._rows) > len(wanted):
            _, dropped = self._rows.popitem(last=False)
            self._bytes -= sum(v.nbytes for v in dropped.values())

    def stack(self, prompts: Sequence[str]) -> Conditioning:
        """Return the conditioning of B prompts, encoding what is not held."""
        self.add(prompts)
        rows = [self._rows[p] for p in prompts]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


class Policy:
    """A denoiser with its conditioning: `velocity(x, timestep, prompts)`.

    Args:
        family: the adapter of the loaded pipeline.
        guidance: "off" uses the conditional output alone; "both_branches" computes
            `v = v_uncond + guidance_scale (v_cond - v_uncond)` in one doubled batch, with gradients through
            both; "uncond_detached" computes the same with two forwards, the unconditional one without
            gradient, which takes half the memory and moves the prompted branch only.
        guidance_scale: used by the two modes with guidance.
        dtype: "fp32", or "bf16" for autocast compute over float32 weights and latents.
    """

    def __init__(
        self, family: Family, *, guidance: str = "off", guidance_scale: float = 1.0, dtype: str = "fp32"
    ) -> None:
        self.family, self.guidance, self.guidance_scale, self.dtype = family, guidance, guidance_scale, dtype
        self.encodings = Encodings(family)
        self._frozen: nn.Module | None = None

    @classmethod
    def load(
        cls, path: str | Path, model: ModelConfig, *, seed: int, guidance: str = "off", guidance_scale: float = 1.0
    ) -> Policy:
        """Load the pipeline at `path` and make its weights trainable as `model` says."""
        family = load_family(path, model.family)
        if model.train == "lora":
            add_lora(family, model.lora, seed)
        else:
            family.denoiser.requires_grad_(True)
        if model.gradient_checkpointing:
            family.denoiser.enable_gradient_checkpointing()
        return cls(family, guidance=guidance, guidance_scale=guidance_scale, dtype=model.dtype)

    def with_guidance(self, guidance_scale: float) -> Policy:
        """Return this policy at another guidance scale, sharing weights and encoded prompts; 1 turns it off."""
        other = Policy(
            self.family,
            guidance="off" if guidance_scale == 1.0 else "both_branches",
            guidance_scale=guidance_scale,
            dtype=self.dtype,
        )
        other.encodings = self.encodings
        return other

    @property
    def device(self) -> torch.device:
        """Where the denoiser lives."""
        return next(self.family.denoiser.parameters()).device

    def keep_reference(self) -> None:
        """Remember the model as it is now, before training, for `reference`.

        With adapters nothing needs keeping: the reference is the model with its adapter off.
        """
        if not getattr(self.family.denoiser, "peft_config", None):
            self._frozen = copy.deepcopy(self.family.denoiser).requires_grad_(False)

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """Be the model before training within the block, without gradients.

        Raises:
            ModelError: fully trained weights of which no copy was kept.
        """
        family, trained = self.family, self.family.denoiser
        adapted = bool(getattr(trained, "peft_config", None))
        if not adapted and self._frozen is None:
            raise ModelError("The model before training is gone", do="Call keep_reference() before training")
        if adapted:
            trained.disable_adapters()
        else:
            setattr(family.pipeline, family.component, self._frozen)
        try:
            with torch.no_grad():
                yield
        finally:
            if adapted:
                trained.enable_adapters()
            else:
                setattr(family.pipeline, family.component, trained)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by name."""
        return {n: p for n, p in self.family.denoiser.named_parameters() if p.requires_grad}

    def velocity(self, x: Tensor, timestep: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the guided model output `[B, ...]`, float32, at latents x and timesteps `[B]`.

        It is what the schedule says the model predicts: a velocity for flows, noise or v for diffusion.
        The unconditional rows stand first in a doubled batch, as in diffusers' pipelines.
        """
        empty = [""] * len(prompts)
        if self.guidance == "both_branches":
            doubled = self._predict(torch.cat([x, x]), torch.cat([timestep, timestep]), [*empty, *prompts])
            uncond, cond = doubled.chunk(2)
        elif self.guidance == "uncond_detached":
            with torch.no_grad():
                uncond = self._predict(x, timestep, empty)
            cond = self._predict(x, timestep, prompts)
        else:
            return self._predict(x, timestep, prompts)
        return uncond + self.guidance_scale * (cond - uncond)

    def _predict(self, x: Tensor, timestep: Tensor, prompts: Sequence[str]) -> Tensor:
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=self.dtype == "bf16"):
            return self.family.predict(x, timestep, self.encodings.stack(prompts)).float()


def resolve_model(path: str) -> Path:
    """Return the folder of a model: `digits` and `digits/<recipe>` are built and cached on first use."""
    if path == "digits" or path.startswith("digits/"):
        from align.diffusion.digits import build_digits

        return build_digits(recipe=path.partition("/")[2] or "default")
    return Path(path)
