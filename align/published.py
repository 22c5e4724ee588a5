"""What is known of a model without loading it: published sizes, latent shape, and the memory that training holds."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from align.config import ModelConfig, VisualConfig

BUILTIN = {"digits": 4 * 8 * 8}  # models and prompts that go by a name instead of a path, with their latent size


@dataclass(frozen=True)
class Published:
    """A published pipeline.

    Args:
        family: its diffusers pipeline class.
        parameters: weights of the denoiser.
        adapted: weights of a LoRA adapter of rank 1 on the family's own targets.
        side: pixels, height and width, that the pipeline makes by itself.
        channels: of a latent.
        frames: that the pipeline makes by itself; None for images.
        licence: that its hub page names; empty where we do not know it.
    """

    family: str
    parameters: int
    adapted: int
    side: tuple[int, int]
    channels: int = 16
    frames: int | None = None
    licence: str = ""


PUBLISHED = {
    "CompVis/stable-diffusion-v1-4": Published(
        "StableDiffusionPipeline", 859_520_964, 374_016, (512, 512), 4, licence="creativeml-openrail-m",
    ),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": Published(
        "StableDiffusionPipeline", 859_520_964, 374_016, (512, 512), 4,
        licence="creativeml-openrail-m",
    ),
    "stabilityai/stable-diffusion-xl-base-1.0": Published(
        "StableDiffusionXLPipeline", 2_567_463_684, 2_616_320, (1024, 1024), 4,
        licence="openrail++",
    ),
    "stabilityai/stable-diffusion-3-medium-diffusers": Published(
        "StableDiffusion3Pipeline", 2_028_328_000, 1_308_672, (1024, 1024),
        licence="stabilityai-ai-community",
    ),
    "stabilityai/stable-diffusion-3.5-medium": Published(
        "StableDiffusion3Pipeline", 2_243_171_520, 1_468_416, (1024, 1024),
        licence="stabilityai-ai-community",
    ),
    "stabilityai/stable-diffusion-3.5-large": Published(
        "StableDiffusion3Pipeline", 8_056_627_520, 3_297_792, (1024, 1024),
        licence="stabilityai-ai-community",
    ),
    "black-forest-labs/FLUX.1-dev": Published(
        "FluxPipeline", 11_901_408_320, 4_085_760, (1024, 1024), licence="flux-1-dev-non-commercial-license",
    ),
    "black-forest-labs/FLUX.1-schnell": Published(
        "FluxPipeline", 11_891_178_560, 4_085_760, (1024, 1024), licence="apache-2.0",
    ),
    "Qwen/Qwen-Image": Published(
        "QwenImagePipeline", 20_430_401_088, 6_635_520, (1024, 1024), licence="apache-2.0",
    ),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": Published(
        "WanPipeline", 1_418_996_800, 1_367_040, (480, 832), frames=81,
        licence="apache-2.0",
    ),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": Published(
        "WanPipeline", 14_288_491_584, 4_792_320, (480, 832), frames=81, licence="apache-2.0",
    ),
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": Published(
        "WanImageToVideoPipeline", 16_394_878_784, 5_611_520, (480, 832), frames=81,
        licence="apache-2.0",
    ),
    "hunyuanvideo-community/HunyuanVideo": Published(
        "HunyuanVideoPipeline", 12_821_012_544, 4_411_392, (720, 1280), frames=129
    ),
    "Skywork/SkyReels-V1-Hunyuan-I2V": Published(
        "HunyuanSkyreelsImageToVideoPipeline", 12_821_209_152, 4_411_392, (544, 960), frames=97
    ),
}  # fmt: skip
"""Published pipelines by their hub name. Counted on the architectures as diffusers builds them."""


LICENCE_OF_OURS = {"digits": "cc-by-4.0", "tiny": "apache-2.0"}
"""Of the embedded models: what the digits were published under, and that of this library's random weights."""


def licence_of(model: str, folder: str | Path) -> dict[str, str]:
    """Return the licence of a model, and where that is said; `{}` where nothing says it.

    Args:
        model: as a configuration names it.
        folder: where it lies; the front matter of a README.md there goes before what is known of published models.

    Returns:
        `licence`, `said_by`, and where the README has them `name` and `link`.
    """
    from align.errors import AlignError
    from align.textfiles import parse_yaml

    readme, licence = Path(folder) / "README.md", ""
    try:
        opening = readme.read_bytes()[: 64 << 10].decode("utf-8", "replace")
        front = re.match(r"---[ \t]*\r?\n(.*?)\n---[ \t]*(\r?\n|$)", opening, re.DOTALL)
        said = parse_yaml(front[1], str(readme)).value if front else {}
    except (OSError, AlignError):
        said = {}
    given = (
        {key: said[key] for key in ("license", "license_name", "license_link") if isinstance(said.get(key), str)}
        if isinstance(said, dict)
        else {}
    )
    if "license" in given:
        found = {key.removeprefix("license_"): value for key, value in given.items() if key != "license"}
        return {"licence": given["license"], "said_by": "its README.md", **found}
    if is_embedded(model):
        licence, by = LICENCE_OF_OURS[model.partition("/")[0]], "align"
    elif model in PUBLISHED and PUBLISHED[model].licence:
        licence, by = PUBLISHED[model].licence, "its page on the hub, as align knows it"
    return {"licence": licence, "said_by": by} if licence else {}


def is_builtin(model: str) -> bool:
    """Whether a model goes by a name of ours, such as `digits` or `digits/sd`."""
    return model.partition("/")[0] in BUILTIN


def is_embedded(model: str) -> bool:
    """Whether align builds a model itself, of images or of text."""
    return model == "tiny" or is_builtin(model)


def is_ours(data: str) -> bool:
    """Whether data go by a name of ours, such as `digits/thumbs` or `toy`, and are no file."""
    return data in ("toy", "simulated") or is_builtin(data)


def is_hub_name(model: str) -> bool:
    """Whether a model is `owner/name`, to be fetched from the hub, and no folder here; `runs/name` is a run of ours."""
    named = re.fullmatch(r"(?!runs/)[\w-][\w.-]*/[\w.-]+", model)
    return bool(named) and not is_builtin(model) and not Path(model).exists()


def published(model: ModelConfig) -> Published | None:
    """Return what is known of a model that is not here, by its hub name or by its family; None for a folder."""
    if Path(model.path).exists():
        return None
    return PUBLISHED.get(model.path) or _of_family(model.family)


def _of_family(family: str | None) -> Published | None:
    return next((known for known in PUBLISHED.values() if known.family == family), None)


def makes(model: ModelConfig) -> str | None:
    """Return whether a model of images or videos makes an "image" or a "video"; None where nothing tells."""
    if is_builtin(model.path):
        return "image"
    known = published(model) or _of_family(_read(Path(model.path) / "model_index.json").get("_class_name"))
    return None if known is None else "image" if known.frames is None else "video"


def latent_dim(config: VisualConfig) -> int | None:
    """Return the latent elements of one image or video, or None where nothing tells."""
    if is_builtin(config.model.path):
        return BUILTIN[config.model.path.partition("/")[0]]
    shape = latent_shape(config)
    return None if shape is None else math.prod(shape)


def latent_shape(config: VisualConfig) -> tuple[int, ...] | None:
    """Return the shape of one latent, `[C, H / f, W / f]` or `[C, (F - 1) / g + 1, H / f, W / f]`, f and g the factors
    of the VAE; None where nothing tells."""
    sampler, model = config.sampler, config.model
    known = published(model)
    if known is not None:
        channels, space, time, side, frames = known.channels, 8, 4, known.side, known.frames
    else:
        folder = _folder(Path(model.path))
        if folder is None:
            return None
        channels, space, time, side, frames = folder
    height, width = (own if own is not None else native for own, native in zip(
        (sampler.height, sampler.width), side, strict=True
    ))  # fmt: skip
    sizes: list[Any] = [channels, height and height // space, width and width // space]
    if frames is not None:
        sizes.insert(1, ((sampler.frames or frames) - 1) // time + 1)
    return tuple(sizes) if all(isinstance(n, int) for n in sizes) else None


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _folder(folder: Path) -> tuple[Any, int, int, tuple[Any, Any], int | None] | None:
    """Return channels, factors in space and time, native side and frames of a pipeline folder."""
    vae, index = _read(folder / "vae" / "config.json"), _read(folder / "model_index.json")
    denoiser = _read(folder / "transformer" / "config.json") or _read(folder / "unet" / "config.json")
    kind = vae.get("_class_name")
    get, space, time = vae.get, 8, 1
    if kind == "AutoencoderKL":
        channels, space = get("latent_channels"), 2 ** (len(get("block_out_channels", [0])) - 1)
    elif kind == "AutoencoderKLQwenImage":
        channels, space = get("z_dim"), 2 ** len(get("temperal_downsample", [0] * 3))
    elif kind == "AutoencoderKLWan":
        channels, space, time = get("z_dim"), get("scale_factor_spatial", 8), get("scale_factor_temporal", 4)
    elif kind == "AutoencoderKLHunyuanVideo":
        channels = get("latent_channels")
        space, time = get("spatial_compression_ratio", 8), get("temporal_compression_ratio", 4)
    else:
        return None
    known = _of_family(index.get("_class_name"))
    native = denoiser.get("sample_size")
    side = (native * space,) * 2 if isinstance(native, int) else known.side if known else (None, None)
    return channels, space, time, side, known.frames if known else None


def denoiser_size(model: ModelConfig) -> tuple[int, int] | None:
    """Return the weights of the denoiser and of an adapter of rank 1, from a folder's headers where there is one."""
    known = published(model)
    if known is not None:
        return known.parameters, known.adapted
    total = adapted = 0
    for name in ("transformer", "unet"):
        for file in (Path(model.path) / name).glob("*.safetensors"):
            if file.name.count(".") > 1:  # another precision of the same weights
                continue
            for key, shape in _shapes(file).items():
                total += math.prod(shape)
                if len(shape) == 2 and any(part in key for part in (".attn", ".ff", "_mlp.", ".proj_out.")):
                    adapted += sum(shape)
    return (total, adapted) if total else None


def _shapes(file: Path) -> dict[str, list[int]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np") as tensors:
            return {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return {}


def training_memory(config: VisualConfig, processes: int = 1) -> float | None:
    """Return the bytes of weights, gradients and moments that each of `processes` holds under ZeRO-2.

    Trained weights stand there in float32 (4 B) with a bf16 copy while they run (2 B), a gradient and two moments
    (12 B), their average (4 B) and, of a full fine-tune with `kl_weight`, a reference (4 B); frozen ones in bf16 or
    float32 alone. ZeRO-2 splits gradients, moments and a second copy of the weights (16 B). Activations, VAE,
    encoders and cached prompts come on top. None where the model's size is not known.
    """
    size, model = denoiser_size(config.model), config.model
    if size is None:
        return None
    half, full = model.dtype == "bf16", model.train == "full"
    trained = size[0] if full else size[1] * model.lora.rank
    frozen = 0 if full else size[0] * (2 if half else 4)
    whole = 4 + 2 * half + 4 * (config.optimizer.ema_decay is not None) + 4 * bool(full and config.objective.kl_weight)
    return frozen + trained * (whole + (12 if processes == 1 else 16 / processes))
