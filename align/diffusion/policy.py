"""The model being aligned: a family, the weights that are trained, guidance, its reference, prompts encoded once."""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from align.config import LoraConfig, ModelConfig
from align.diffusion.families import FAMILIES, Conditioning, Family, Size, device_of, read_index, require_encoding
from align.errors import ModelError, first_line
from align.hub import download_pipeline
from align.published import is_hub_name
from align.seeding import seed as derive_seed
from align.types import ImagePrompt, Prompt
from align.weights import require_inert

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from peft import LoraConfig as PeftLoraConfig

ADAPTER = "policy"
_LIBRARIES = ("diffusers", "transformers", "stable_diffusion")
"""Where the components of a pipeline come from; the last is the module of the safety checker in diffusers."""
QUERY_KEY_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")


def store_frozen(family: Family) -> None:
    """Keep what does not train in bfloat16, for half the memory: encoders whole, and matrices of the denoiser.

    Autocast would round the denoiser's matrices alike in every forward. So are the norms of queries and keys, which
    read what autocast made bfloat16: torch's fused RMSNorm wants one type, and diffusers' own makes float32 of two.
    Trained weights, other norms, embeddings and the VAE stay float32.
    """
    for name in set(family.encoders) - {"vae"}:
        encoder = getattr(family.pipeline, name, None)
        if encoder is not None:
            encoder.to(torch.bfloat16)
    for name, module in family.denoiser.named_modules():
        of_attention = type(module).__name__ == "RMSNorm" and name.rpartition(".")[2] in QUERY_KEY_NORMS
        if of_attention or isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)):
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(torch.bfloat16)


def load_family(path: str | Path, family: str | None = None) -> Family:
    """Load a diffusers pipeline folder in float32, frozen, in eval mode, on the CPU.

    Args:
        path: the folder, holding `model_index.json`.
        family: a pipeline class name that overrides the one in `model_index.json`.

    Raises:
        ModelError: not a pipeline folder, a pipeline of no known family, or a component that cannot be loaded.
    """
    folder = Path(path)
    name, listed = read_index(folder, family)
    import diffusers

    # A component saved as absent (SD3 without T5) has to be passed as absent to be loaded so.
    parts = {part: home for part, home in listed.items() if isinstance(home, list)}
    absent = {part: None for part, home in parts.items() if home[0] is None}
    lost = [part for part in parts if part not in absent and not (folder / part).is_dir()]
    if lost:
        raise ModelError(
            f"The {name} folder cannot be loaded", where=str(folder),
            why=f"its model_index.json lists {lost[0]}, and there is no such folder in it",
            do="Download the whole pipeline, or save it again with save_pretrained",
        )  # fmt: skip
    for part, home in parts.items():
        if part not in absent and (len(home) != 2 or home[0] not in _LIBRARIES):
            raise ModelError(
                "A pipeline names code of its own", where=str(folder / "model_index.json"), why=f"{part} is {home}",
                do="Do not trust it; a component is a class of diffusers or transformers",
            )  # fmt: skip
        require_inert(folder / part)
    require_inert(folder)
    try:
        with quiet_loading():
            pipeline: DiffusionPipeline = getattr(diffusers, name).from_pretrained(
                folder, dtype=torch.float32, **absent
            )
    except (OSError, ValueError, TypeError, RuntimeError, KeyError, AttributeError) as error:
        raise ModelError(f"The {name} folder cannot be loaded", where=str(folder), why=first_line(error)) from error
    pipeline.set_progress_bar_config(disable=True)
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


def _ends(name: str, ending: str) -> bool:
    """Whether a layer's name ends in `ending`, in which `*` stands for anything."""
    return fnmatchcase(f".{name}", f"*.{ending}")


def adapter_config(lora: LoraConfig, layers: Sequence[str]) -> PeftLoraConfig:
    """Return PEFT's own configuration of adapters on `layers`."""
    from peft import LoraConfig as PeftLoraConfig

    return PeftLoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=0.0, target_modules=list(layers), init_lora_weights=True
    )


def add_lora(family: Family, lora: LoraConfig, run_seed: int) -> None:
    """Add a LoRA adapter to the denoiser: `W + (alpha / rank) B A`, with B = 0, so it starts as the base model.

    Raises:
        ModelError: a target that matches no module, or a denoiser that diffusers has no adapters for.
    """
    if not hasattr(family.denoiser, "add_adapter"):
        raise ModelError(
            "This denoiser takes no adapters", where=type(family.denoiser).__name__, why="diffusers gives it none",
            do="Set model.train: full",
        )  # fmt: skip
    names = [name for name, module in family.denoiser.named_modules() if isinstance(module, nn.Linear)]
    endings = lora.targets or family.lora_targets
    targets = [n for n in names if any(_ends(n, e) for e in endings) and n not in family.idle_layers]
    missing = [e for e in lora.targets or () if not any(_ends(n, e) for n in targets)]
    if missing or not targets:
        raise ModelError(
            "A LoRA target matches no linear layer",
            where=", ".join(missing) or type(family.denoiser).__name__,
            do=f"Layers end like: {', '.join(sorted({n.rsplit('.', 1)[-1] for n in names})[:12])}",
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(run_seed, "lora"))
        family.denoiser.add_adapter(adapter_config(lora, targets), adapter_name=ADAPTER)
    family.denoiser.set_adapter(ADAPTER)


@contextlib.contextmanager
def present(family: Family, components: Iterable[str]) -> Iterator[None]:
    """Have components of a pipeline where its denoiser is within the block, and back where they were after it."""
    device = device_of(family.denoiser)
    modules = [m for m in (getattr(family.pipeline, name, None) for name in components) if isinstance(m, nn.Module)]
    before = [device_of(module) for module in modules]
    for module in modules:
        module.to(device)
    try:
        yield
    finally:
        for module, where in zip(modules, before, strict=True):
            module.to(where)


class Encodings:
    """Encoded prompts, in `limit` bytes: those of `add` while they fill no more than half, the others while used.

    A prompt whose conditioning is shorter than another's is filled up with zeros where they are stacked; a family
    whose conditioning has no fixed length gives its mask along with it.
    """

    def __init__(self, family: Family, size: Size, limit: int = 2 << 30) -> None:
        self.family, self.size, self.limit = family, size, limit
        self._held, self._passing = dict[Prompt, Conditioning](), OrderedDict[Prompt, Conditioning]()
        self._batch = 64

    def add(self, prompts: Iterable[Prompt]) -> None:
        """Encode prompts, in order, to be held for good, until half of the limit is full.

        From then on, prompts are encoded one by one, so that a prompt's numbers never depend on what went before.
        """
        new = [p for p in dict.fromkeys(prompts) if p not in self._held]
        if not new:
            return
        with present(self.family, self.family.encoders):
            for start in range(0, len(new), self._batch):
                if self._batch == 1 or _bytes(self._held.values()) >= self.limit // 2:
                    self._batch = 1
                    break
                self._held |= self._encoded(new[start : start + self._batch])

    def _encoded(self, prompts: Sequence[Prompt]) -> dict[Prompt, Conditioning]:
        encoded = self.family.encode(list(prompts), self.size)
        return {p: {name: _kept(value[i]) for name, value in encoded.items()} for i, p in enumerate(prompts)}

    def _require(self, prompts: Sequence[Prompt]) -> None:
        """Have prompts among those held, or those passing through; drop the least recently used of these."""
        wanted = [p for p in dict.fromkeys(prompts) if p not in self._held]
        new = [p for p in wanted if p not in self._passing]
        if new:
            with present(self.family, self.family.encoders):
                for start in range(0, len(new), self._batch):
                    self._passing |= self._encoded(new[start : start + self._batch])
        for prompt in wanted:
            self._passing.move_to_end(prompt)
        while new and len(self._passing) > len(wanted) and _bytes(self._passing.values()) > self.limit // 2:
            self._passing.popitem(last=False)

    def stack(self, prompts: Sequence[Prompt]) -> Conditioning:
        """Return the conditioning of B prompts, encoding what is not held."""
        self._require(prompts)
        rows = [self._held.get(p) or self._passing[p] for p in prompts]
        return {name: _stacked([row[name] for row in rows]) for name in rows[0]}


def _bytes(rows: Iterable[Conditioning]) -> int:
    return sum(value.nbytes for row in rows for value in row.values())


def _kept(row: Tensor) -> Tensor:
    return row.float() if row.dtype == torch.bfloat16 else row.clone()


def _stacked(rows: Sequence[Tensor]) -> Tensor:
    same = all(row.shape == rows[0].shape for row in rows)
    return torch.stack(list(rows)) if same else nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


class Policy:
    """A denoiser with its conditioning: `velocity(x, timestep, prompts)`.

    Args:
        family: the adapter of the loaded pipeline.
        guidance: "off" uses the conditional output alone; "both_branches" computes
            `v = v_uncond + guidance_scale (v_cond - v_uncond)` in one doubled batch, with gradients through
            both; "uncond_detached" computes the same with two forwards, the unconditional one without
            gradient, which takes half the memory and moves the prompted branch only.
        guidance_scale: used by the two modes with guidance.
        embedded_guidance: the scale that a guidance-distilled denoiser is told; the pipeline's own when None.
        size: what to make.
        dtype: "fp32", or "bf16" for autocast compute over float32 latents and trained weights.

    Raises:
        ModelError: an embedded guidance scale for a denoiser that is told none; frames a second of images.
    """

    def __init__(
        self, family: Family, *, guidance: str = "off", guidance_scale: float = 1.0,
        embedded_guidance: float | None = None, size: Size = Size(), dtype: str = "fp32",
    ) -> None:  # fmt: skip
        self.family, self.guidance, self.guidance_scale, self.dtype = family, guidance, guidance_scale, dtype
        if embedded_guidance is not None and family.embedded_guidance is None:
            raise ModelError(
                "This denoiser is told no guidance scale", where=type(family.denoiser).__name__,
                do="Set sampler.embedded_guidance to null; sampler.guidance_scale is classifier-free guidance",
            )  # fmt: skip
        if size.fps is not None and family.fps is None:
            raise ModelError("This model makes images", why=f"sampler.fps is {size.fps:g}", do="Set it to null")
        self.embedded_guidance = family.embedded_guidance if embedded_guidance is None else embedded_guidance
        self.size = size
        self.latent_shape = family.latent_shape(size)
        self.encodings = Encodings(family, size)
        self._frozen: nn.Module | None = None

    @classmethod
    def load(cls, path: str | Path, model: ModelConfig, *, seed: int, **options: Any) -> Policy:
        """Load the pipeline at `path` and make its weights trainable as `model` says; `options` are the policy's.

        Weights that do not train are made small before they go to the accelerator. With `model.offload`, encoders and
        VAE stay on the CPU, where they are fetched from when they are used; see `present`.
        """
        family = load_family(path, model.family)
        if model.train == "lora":
            add_lora(family, model.lora, seed)
        else:
            family.denoiser.requires_grad_(True)
        if model.gradient_checkpointing:
            family.denoiser.enable_gradient_checkpointing()
        if model.dtype == "bf16":
            store_frozen(family)
        where = "cuda" if torch.cuda.is_available() else "cpu"
        (family.denoiser if model.offload else family.pipeline).to(where)
        return cls(family, dtype=model.dtype, **options)

    def with_guidance(self, guidance_scale: float) -> Policy:
        """Return this policy at another guidance scale, sharing weights and encoded prompts; 1 turns it off."""
        other = Policy(
            self.family,
            guidance="off" if guidance_scale == 1.0 else "both_branches",
            guidance_scale=guidance_scale,
            embedded_guidance=self.embedded_guidance,
            size=self.size,
            dtype=self.dtype,
        )
        other.encodings = self.encodings
        return other

    @property
    def device(self) -> torch.device:
        """Where the denoiser lives."""
        return device_of(self.family.denoiser)

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

    def decode(self, latents: Tensor) -> Tensor:
        """Return pixels in [0, 1], `[B, C, H, W]` or `[B, F, C, H, W]`."""
        with present(self.family, ("vae",)):
            return self.family.decode(latents)

    def to_latents(self, pixels: Tensor) -> Tensor:
        """Return the latents of pixels in [0, 1], `[B, ...]`."""
        require_encoding(self.family)
        with present(self.family, ("vae",)):
            return self.family.to_latents(pixels.to(self.device))

    def velocity(self, x: Tensor, timestep: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Return the guided model output `[B, ...]`, float32, at latents x and timesteps `[B]`.

        It is what the schedule says the model predicts: a velocity for flows, noise or v for diffusion.
        The unconditional rows stand first in a doubled batch, as in diffusers' pipelines.
        """
        empty = [self._unconditional(prompt) for prompt in prompts]
        if self.guidance == "both_branches":
            doubled = self._predict(torch.cat([x, x]), torch.cat([timestep, timestep]), [*empty, *prompts])
            uncond, cond = doubled.chunk(2)
        elif self.guidance == "uncond_detached":
            with torch.no_grad():
                uncond = self._predict(x, timestep, empty)
            cond = self._predict(x, timestep, prompts)
        else:
            return self._predict(x, timestep, prompts)
        return self.family.guide(uncond, cond, self.guidance_scale)

    def _unconditional(self, prompt: Prompt) -> Prompt:
        """Return what the branch without a prompt is asked for: nothing, from the same first frame."""
        empty = self.family.unconditional
        return ImagePrompt(empty, prompt.image) if isinstance(prompt, ImagePrompt) else empty

    def _predict(self, x: Tensor, timestep: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        conditioning = self.encodings.stack(prompts)
        if self.embedded_guidance is not None:
            conditioning["guidance"] = x.new_full((len(x),), self.embedded_guidance)
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=self.dtype == "bf16"):
            return self.family.predict(x, timestep, conditioning).float()


def resolve_model(path: str) -> Path:
    """Return the folder of a model: `digits` and `digits/<recipe>` are built, `owner/name` fetched, on first use.

    Raises:
        ModelError: no folder, and no pipeline on the hub, of that name.
    """
    if path == "digits" or path.startswith("digits/"):
        from align.diffusion.digits import build_digits

        return build_digits(recipe=path.partition("/")[2] or "default")
    return download_pipeline(path) if is_hub_name(path) else Path(path)
