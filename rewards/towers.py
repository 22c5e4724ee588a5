"""CLIP's two towers: loaded once, frozen, with the embeddings of recent prompts kept.

    cos(image, prompt) = <f(pixels) / |f(pixels)|, g(tokens) / |g(tokens)|>

Every reward that compares an image with a prompt reads this cosine; what it makes of it, and what its tower sees, is
a `Recipe`. Weights come in open_clip's layout or in that of transformers; the two are the same numbers.
"""

from __future__ import annotations

import re
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from align.errors import ConfigError, DataError, ModelError
from align.hub import Weights, locate
from align.registry import suggest
from align.types import Samples, Scores
from align.weights import load_into, load_tensors, weights_sha256
from rewards.base import REWARDS, RewardCard, identity_of
from rewards.media import clip_pixels, pixel_problem, require_media, score_samples, stacked
from rewards.placement import Placement

PROMPTS_KEPT = 4096  # of 1,024 numbers each: 16 MB


@dataclass(frozen=True)
class Recipe:
    """One definition of a CLIP score.

    Args:
        name: of the reward, as registered.
        architecture: open_clip's name of the towers.
        quick_gelu: whether the weights were trained with `x sigmoid(1.702 x)` in place of GELU.
        value: makes the score of cosines `[B]` and the model's logit scale (a logarithm).
        pixels: how images are fitted, arguments of `rewards.media.clip_pixels`.
        prefix: what precedes every prompt.
    """

    name: str
    architecture: str
    quick_gelu: bool
    value: Callable[[Tensor, Tensor], Tensor] = lambda cosine, logit_scale: cosine
    pixels: Mapping[str, Any] = field(default_factory=dict)
    prefix: str = ""


class Towers:
    """The image tower and the prompt tower of one CLIP.

    Args:
        model: of open_clip, frozen.
        tokenizer: open_clip's, of this architecture.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.size = int(model.visual.image_size[0])
        self._prompts: OrderedDict[tuple[object, ...], tuple[Tensor, bool]] = OrderedDict()
        self._lock = threading.Lock()

    def embed_pixels(self, pixels_B3HW: Tensor) -> Tensor:
        """Return unit embeddings `[B, D]` of normalised pixels of the tower's own size, on their graph."""
        return F.normalize(_at_least_float32(self.model.encode_image(pixels_B3HW)), dim=-1)

    def embed_texts(self, prompts: Sequence[str]) -> tuple[Tensor, list[bool]]:
        """Return unit embeddings `[B, D]` on their graph, and which prompts lost their end to the context limit.

        A prompt that is too long keeps its first tokens and the end-of-text token, at which the embedding is read.
        """
        tokens = self.tokenizer(list(prompts), context_length=self.model.context_length)
        device = self.model.token_embedding.weight.device
        embedded = F.normalize(_at_least_float32(self.model.encode_text(tokens.to(device))), dim=-1)
        return embedded, [self._too_long(prompt, row) for prompt, row in zip(prompts, tokens, strict=True)]

    @torch.no_grad()
    def embed_prompts(self, prompts: Sequence[str]) -> tuple[Tensor, list[bool]]:
        """Return what `embed_texts` does, without a graph and keeping what was asked for recently."""
        weight = self.model.token_embedding.weight
        kind = weight.device.type
        half = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        with self._lock:
            keys = {p: (p, weight.dtype, half) for p in prompts}
            found = {p: self._prompts[key] for p, key in keys.items() if key in self._prompts}
            new = [p for p in keys if p not in found]
            if new:
                found |= {p: one for p, *one in zip(new, *self.embed_texts(new), strict=True)}
            for prompt, key in keys.items():
                self._prompts[key] = found[prompt]
                self._prompts.move_to_end(key)
            while len(self._prompts) > PROMPTS_KEPT:
                self._prompts.popitem(last=False)
        return torch.stack([found[p][0] for p in prompts]), [found[p][1] for p in prompts]

    def _too_long(self, prompt: str, tokens: Tensor) -> bool:
        return bool(tokens[-1]) and len(self.tokenizer.encode(prompt)) + 2 > len(tokens)


def _at_least_float32(embedding: Tensor) -> Tensor:
    return embedding.to(torch.promote_types(embedding.dtype, torch.float32))


_LOADED: weakref.WeakValueDictionary[tuple[str, ...], Towers] = weakref.WeakValueDictionary()
_LOADING = threading.Lock()


def load_towers(
    path: Path, architecture: str, *, quick_gelu: bool, placement: Placement, shared: bool = True
) -> Towers:
    """Return the towers of a file, or a folder, of weights; those that are in use already, where it is the same.

    The model is built without memory, so that its weights are written once, by the file.

    Args:
        shared: False gives towers of the caller's own, which it may change.

    Raises:
        ModelError: an unknown architecture, weights of another one, or one with the wrong activation.
    """
    if not path.exists():
        raise ModelError("The weights are not there", where=str(path), why="there is no such file or folder")
    key = (weights_sha256(path), architecture, str(placement.rest), str(placement.device))
    with _LOADING:
        towers = _LOADED.get(key) if shared else None
        if towers is None:
            model = build_model(architecture)
            require_activation(model, quick_gelu, architecture)
            load_into(model, _read(path), str(path))
            length = model.context_length
            model.attn_mask = torch.full((length, length), float("-inf")).triu_(1)  # in no file
            towers = Towers(placement.settle(model), open_clip.get_tokenizer(architecture))
            if shared:
                _LOADED[key] = towers
    require_activation(towers.model, quick_gelu, architecture)
    return towers


def unfreeze(model: Any, image_blocks: int, text_blocks: int) -> dict[str, nn.Parameter]:
    """Have the last blocks of each tower train, with the norm and the projection after them; return their weights.

    Args:
        model: of towers that are not shared.
        image_blocks, text_blocks: how many; 0 leaves that tower frozen as a whole.

    Raises:
        ConfigError: more blocks than a tower has.
    """
    sides = (
        ("unfreeze_image", "visual.transformer.resblocks", image_blocks, ("visual.ln_post.", "visual.proj")),
        ("unfreeze_text", "transformer.resblocks", text_blocks, ("ln_final.", "text_projection")),
    )
    found = {}
    for key, stack, blocks, ends in sides:
        depth = len(model.get_submodule(stack))
        if blocks > depth:
            raise ConfigError("The tower has fewer blocks", where=f"model.{key} {blocks}", why=f"it has {depth}")
        starts = tuple(f"{stack}.{i}." for i in range(depth - blocks, depth))
        for name, parameter in model.named_parameters() if blocks else ():
            if name.startswith((*starts, *ends)):
                found[name] = parameter.requires_grad_(True)
    return found


def overlay(model: Any, trained: Mapping[str, Tensor], where: str) -> None:
    """Write trained weights over those of towers that are not shared.

    Raises:
        ModelError: a tensor that has no place.
    """
    own = dict(model.named_parameters())
    for name, value in trained.items():
        if name not in own or own[name].shape != value.shape:
            raise ModelError("Trained weights do not belong to these towers", where=where, why=f"{name} has no place")
        own[name].data.copy_(value)


def _read(path: Path) -> dict[str, Tensor]:
    state = {key.removeprefix("module."): value for key, value in load_tensors(path).items()}
    if any(key.startswith("vision_model.") for key in state):
        state = hf_to_open_clip(state)
    # A copy: tensors of a file are a view of it, and would change with it.
    return {key: value.to(torch.float32, copy=True) for key, value in state.items()}


def build_model(architecture: str) -> Any:
    """Return open_clip's model of that name on the meta device: all of its shape, none of its memory.

    Raises:
        ModelError: no such architecture, or one that is not a CLIP of two transformers.
    """
    config = open_clip.get_model_config(architecture) if ":" not in architecture else None
    if config is None:
        raise ModelError(
            f"Unknown CLIP architecture {architecture!r}", do=suggest(architecture, open_clip.list_models())
        )
    plain = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"}
    foreign = {"hf_model_name", "hf_tokenizer_name", "timm_model_name"} & {*config["text_cfg"], *config["vision_cfg"]}
    if set(config) - plain or foreign or isinstance(config["vision_cfg"]["layers"], list):
        raise ModelError(
            f"The architecture {architecture!r} is not a CLIP of two transformers",
            why=f"it is made with {', '.join(sorted(set(config) - plain | foreign)) or 'a convolutional tower'}",
        )
    with torch.device("meta"):
        return open_clip.CLIP(**config)


def require_activation(model: Any, quick_gelu: bool, where: str) -> None:
    """Refuse towers whose activation is not the one their weights were trained with: they load, and score wrongly.

    Raises:
        ModelError: naming both activations.
    """
    wanted = "QuickGELU" if quick_gelu else "GELU"
    blocks = [*model.visual.transformer.resblocks, *model.transformer.resblocks]
    found = {type(block.mlp.gelu).__name__ for block in blocks}
    if found != {wanted}:
        raise ModelError(
            "These towers have another activation than their weights were trained with", where=where,
            why=f"{', '.join(sorted(found))} instead of {wanted}",
            do="Choose an architecture whose name " + ("ends" if quick_gelu else "does not end") + " in -quickgelu",
        )  # fmt: skip


_ENDS = (  # transformers, open_clip, whether the matrix is transposed
    ("logit_scale", "logit_scale", False),
    ("text_model.embeddings.token_embedding.weight", "token_embedding.weight", False),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding", False),
    ("text_model.final_layer_norm.weight", "ln_final.weight", False),
    ("text_model.final_layer_norm.bias", "ln_final.bias", False),
    ("text_projection.weight", "text_projection", True),
    ("vision_model.embeddings.class_embedding", "visual.class_embedding", False),
    ("vision_model.embeddings.patch_embedding.weight", "visual.conv1.weight", False),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding", False),
    ("vision_model.pre_layrnorm.weight", "visual.ln_pre.weight", False),
    ("vision_model.pre_layrnorm.bias", "visual.ln_pre.bias", False),
    ("vision_model.post_layernorm.weight", "visual.ln_post.weight", False),
    ("vision_model.post_layernorm.bias", "visual.ln_post.bias", False),
    ("visual_projection.weight", "visual.proj", True),
)
_BLOCK = (
    (("self_attn.q_proj.{}", "self_attn.k_proj.{}", "self_attn.v_proj.{}"), "attn.in_proj_{}"),
    (("self_attn.out_proj.{}",), "attn.out_proj.{}"),
    (("layer_norm1.{}",), "ln_1.{}"),
    (("layer_norm2.{}",), "ln_2.{}"),
    (("mlp.fc1.{}",), "mlp.c_fc.{}"),
    (("mlp.fc2.{}",), "mlp.c_proj.{}"),
)
_STACKS = (
    ("text_model.encoder.layers.", "transformer.resblocks."),
    ("vision_model.encoder.layers.", "visual.transformer.resblocks."),
)


def _pairs(keys: Sequence[str], side: int) -> Iterator[tuple[tuple[str, ...], str, bool]]:
    """The names of every tensor in both layouts; `side` says which one `keys` are in, to count its layers."""
    yield from (((theirs,), ours, flip) for theirs, ours, flip in _ENDS)
    for stack in _STACKS:
        pattern = re.compile(re.escape(stack[side]) + r"(\d+)\.")
        layers = {int(m.group(1)) for m in map(pattern.match, keys) if m}
        for layer in sorted(layers):
            for parts, ours in _BLOCK:
                for kind in ("weight", "bias"):
                    theirs = tuple(f"{stack[0]}{layer}.{part.format(kind)}" for part in parts)
                    yield theirs, f"{stack[1]}{layer}.{ours.format(kind)}", False


def hf_to_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a CLIP of transformers in open_clip's layout: renamed, projections transposed, q, k and v stacked.

    Raises:
        ModelError: a tensor that is missing, or one that has no place.
    """
    left = {key: value for key, value in state.items() if not key.endswith("embeddings.position_ids")}
    found = {}
    for theirs, ours, flip in _pairs(list(left), 0):
        parts = [_take(left, name) for name in theirs]
        found[ours] = parts[0].T.contiguous() if flip else parts[0] if len(parts) == 1 else torch.cat(parts)
    _require_empty(left)
    return found


def open_clip_to_hf(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a CLIP of open_clip in the layout of transformers: the inverse of `hf_to_open_clip`.

    Raises:
        ModelError: a tensor that is missing, or one that has no place.
    """
    left, found = dict(state), dict[str, Tensor]()
    for theirs, ours, flip in _pairs(list(left), 1):
        whole = _take(left, ours)
        parts = [whole.T.contiguous()] if flip else whole.chunk(len(theirs)) if len(theirs) > 1 else [whole]
        found |= dict(zip(theirs, parts, strict=True))
    _require_empty(left)
    return found


def _take(left: dict[str, Tensor], name: str) -> Tensor:
    if name not in left:
        raise ModelError("These are not the weights of a CLIP", why=f"they lack the tensor {name}")
    return left.pop(name)


def _require_empty(left: Mapping[str, Tensor]) -> None:
    if left:
        raise ModelError("These are not the weights of a CLIP", why=f"they have the foreign tensor {min(left)}")


def find_weights(weights: Weights, path: str | None, architecture: str | None) -> Path:
    """Return where weights are: the published ones, or, where an architecture is named, weights of one's own.

    Published weights are checked against their hash, also at a `path`; one's own cannot be.

    Raises:
        ConfigError: an architecture without a path.
        ModelError: see `align.hub.locate`.
    """
    if architecture is None:
        return locate(weights, path)
    if path is None:
        raise ConfigError("Weights of your own need a path", where=f"architecture {architecture}", do="Give path=")
    return Path(path).expanduser()


class ClipReward:
    """A reward that reads the cosine of CLIP's two towers as its `recipe` says.

    Args:
        path: file or folder of the weights; None fetches the published ones from the hub.
        placement, dtype, batch_size: see `rewards.placement.Placement`.
        architecture: open_clip's name of the towers, for weights of one's own; None for the published ones.

    Raises:
        ModelError: weights that are not what the recipe needs.
    """

    recipe: Recipe

    def __init__(
        self,
        path: str | None = None,
        placement: str = "resident",
        dtype: str = "fp32",
        batch_size: int | None = None,
        architecture: str | None = None,
    ) -> None:
        self.card: RewardCard = REWARDS.get(self.recipe.name).card
        self.names = self.card.components
        self.placement = Placement(placement, dtype, batch_size)
        self.architecture = architecture or self.recipe.architecture
        file = find_weights(self.card.weights[0], path, architecture)
        self.towers = load_towers(file, self.architecture, quick_gelu=self.recipe.quick_gelu, placement=self.placement)
        self.sha256 = weights_sha256(file)

    def identity(self) -> str:
        """Return a hash over the weights, the towers, the preprocessing and the precision."""
        arguments = {"weights": self.sha256, "architecture": self.architecture, "dtype": self.placement.dtype}
        return identity_of(self.card, arguments | {"pixels": dict(self.recipe.pixels), "prefix": self.recipe.prefix})

    def score(self, samples: Samples) -> Scores:
        """Return the recipe's value of B images, `[B, 1]`; the extra `truncated` says whose prompt was too long."""
        require_media(samples, "image", self.card.name)

        def forward(part: Samples) -> tuple[Tensor, dict[str, list[bool]]]:
            values, truncated = self._values(stacked(part.images, self.placement.device), part.prompts)
            return values, {"truncated": truncated}

        return score_samples(samples, self.names, forward, self.placement, (self.towers.model,))

    def differentiable(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the scores `[B, 1]` of images `[B, 3, h, w]` in [0, 1], on the graph of their pixels.

        Raises:
            DataError: what `score` would call missing.
            ConfigError: the reward is offloaded.
        """
        require_scorable(images, prompts)
        self.placement.require_graph(self.card.name)
        with self.placement.active(self.towers.model) as device:
            return self._values(stacked(images, device), prompts)[0]

    def _values(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, list[bool]]:
        texts, truncated = self.towers.embed_prompts([self.recipe.prefix + prompt for prompt in prompts])
        seen = self.towers.embed_pixels(clip_pixels(images, self.towers.size, **self.recipe.pixels))
        return self.recipe.value((seen * texts).sum(-1), self.towers.model.logit_scale)[:, None], truncated


def require_scorable(images: Tensor, prompts: Sequence[str] | None) -> None:
    """Refuse a batch with an image or a prompt that cannot be scored; None where the prompts are not read.

    Raises:
        DataError: naming the first one.
    """
    for i, image in enumerate(images):
        if problem := pixel_problem(image):
            raise DataError("An image cannot be scored", where=f"image {i}", why=problem)
        if prompts is not None and not prompts[i].strip():
            raise DataError("An image cannot be scored", where=f"image {i}", why="its prompt is empty")
