"""Frozen embeddings that rewards are fitted on: of texts, of images, and of images with their prompts.

An embedder is a function of a sample alone. What it made of an output is kept on disk under the embedder's identity
and the output's content, so that a second fit reads it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align.diffusion.digits_data import cache_directory, load_judge, load_split, parse_prompt
from align.errors import DataError, ModelError, first_line
from align.types import Samples
from align.weights import load_tensors, require_inert, weights_sha256
from align.wordbags import embed_words, unit_rows
from rewards.chats import as_turns, completion_text
from rewards.media import clip_pixels, pixel_problem, resize, stacked
from rewards.placement import Placement

FLOOR = -8.0
PROMPT_WORDS, RESPONSE_WORDS = 256, 1024
VERSION = 1
"""To be raised when an embedding changes: what was kept, and what was fitted on it, is then of another one."""


@dataclass(frozen=True)
class Embedder:
    """What makes an embedding of a sample.

    Args:
        identity: a hash of everything the embedding depends on.
        embed: samples to `[B, D]` float32, on the CPU.
        halves: the two equal parts of it that a cosine compares, as their width; 0 where there are none.
        batch: samples at once.
        log_scale: logarithm of what the towers multiply that cosine by; None where there is none.
    """

    identity: str
    embed: Callable[[Samples], Tensor]
    halves: int = 0
    batch: int = 64
    log_scale: float | None = None


def build_embedder(
    backbone: str, *, path: str | None, architecture: str, size: int, placement: Placement, trained: Path | None = None
) -> Embedder:
    """Return the embedder of a backbone's name; see `FitModelConfig`.

    Args:
        trained: weights of clip that a fit moved; the identity stays that of the weights it began with.

    Raises:
        ModelError: weights that are not there or not what they should be.
    """
    if backbone == "words":
        return Embedder(_identity("words", PROMPT_WORDS, RESPONSE_WORDS), _words)
    if backbone == "hidden":
        states = HiddenStates(str(path))
        return Embedder(_identity("hidden", weights_sha256(states.folder)), lambda s: states.embed_samples(s), 0, 256)
    if backbone == "pixels":
        return Embedder(_identity("pixels", size), lambda samples: _pixels(samples, size))
    if backbone == "digits":
        return _digits()
    return _clip(str(path), architecture, placement, trained)


def _identity(*parts: Any) -> str:
    return hashlib.sha256(json.dumps([VERSION, *parts], sort_keys=True).encode()).hexdigest()[:16]


# --- texts ------------------------------------------------------------------------------------------


def _texts(samples: Samples) -> list[tuple[str, str]]:
    if samples.texts is None:
        raise DataError("These embeddings are of texts", why=f"got {samples.media}")
    return [(p, completion_text(t)) for p, t in zip(samples.prompts, samples.texts, strict=True)]


def _words(samples: Samples) -> Tensor:
    """Bags of the words of the prompt and of the response, and the logarithm of how many the response has."""
    pairs = _texts(samples)
    length = np.array([[np.log1p(len(response.split()))] for _, response in pairs]).reshape(-1, 1)
    prompts = embed_words((prompt for prompt, _ in pairs), PROMPT_WORDS)
    responses = embed_words((response for _, response in pairs), RESPONSE_WORDS)
    return torch.from_numpy(np.concatenate([prompts, responses, length], 1)).float()


class HiddenStates:
    """The mean last hidden state of a transformers model, an encoder or a decoder.

    Args:
        path: a folder with its tokenizer.

    Raises:
        ModelError: not such a folder.
    """

    def __init__(self, path: str) -> None:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        self.folder = Path(path).expanduser()
        if not (self.folder / "config.json").is_file():
            raise ModelError(
                "This is no folder of a transformers model", where=path, why="it has no config.json",
                do="Give a folder that save_pretrained wrote, or use bags of words, which need none",
            )  # fmt: skip
        require_inert(self.folder)
        level = logging.get_verbosity()
        logging.set_verbosity_error()  # a decoder's output layer is not needed, which is no news
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
            model = AutoModel.from_pretrained(
                self.folder, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
            )
        except (OSError, ValueError, KeyError) as error:
            why = first_line(error)
            raise ModelError("A model that is to embed texts cannot be loaded", where=path, why=why) from error
        finally:
            logging.set_verbosity(level)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model.eval().requires_grad_(False).to(self.device)
        limit = getattr(model.config, "max_position_embeddings", 512)
        self.longest = min(512, self.tokenizer.model_max_length, limit)

    def embed_samples(self, samples: Samples) -> Tensor:
        """Return the embeddings of conversations, their turns one a line."""
        if samples.texts is None:
            raise DataError("These embeddings are of texts", why=f"got {samples.media}")
        pairs = zip(samples.prompts, samples.texts, strict=True)
        whole = ["\n".join(turn["content"] for turn in as_turns(p, t)) for p, t in pairs]
        return torch.from_numpy(self.embed_texts(whole)).float()

    def embed_texts(self, texts: Sequence[str], *, batch: int = 32) -> np.ndarray:
        """Return `[N, H]`, of unit length; a text is cut to what the model reads, 512 tokens at most."""
        tokens = [self.tokenizer(text, truncation=True, max_length=self.longest)["input_ids"] for text in texts]
        order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
        found: dict[int, np.ndarray] = {}
        with torch.no_grad():
            for start in range(0, len(order), batch):
                part = order[start : start + batch]
                width = max(1, *(len(tokens[i]) for i in part))
                ids, mask = torch.zeros(len(part), width, dtype=torch.long), torch.zeros(len(part), width)
                for row, i in enumerate(part):
                    ids[row, : len(tokens[i])], mask[row, : len(tokens[i])] = torch.tensor(tokens[i]).long(), 1
                asked = {"input_ids": ids.to(self.device), "attention_mask": mask.long().to(self.device)}
                hidden = self.model(**asked).last_hidden_state.cpu()
                mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
                found.update(zip(part, mean.double().numpy(), strict=True))
        return unit_rows(np.stack([found[i] for i in range(len(tokens))]))


# --- images -----------------------------------------------------------------------------------------


def _images(samples: Samples, device: torch.device) -> Tensor:
    if samples.images is None:
        raise DataError("These embeddings are of images", why=f"got {samples.media}")
    for i, image in enumerate(samples.images):
        if problem := pixel_problem(image):
            raise DataError("An image cannot be embedded", where=samples.prompts[i], why=problem)
    return stacked(samples.images, device)


def _pixels(samples: Samples, size: int) -> Tensor:
    images = _images(samples, torch.device("cpu")).float()
    return resize(images, size, size).mean(1).flatten(1)


def _digits() -> Embedder:
    """What the digits judge sees before its last layer, the log-probability of the prompted digit, and the ink.

    Each in standard deviations of the judge's own split; the judge's features together weigh like one of the others.
    """
    judge, split = load_judge("reward"), load_split("reward")

    def raw(gray: Tensor, asked: Tensor) -> Tensor:
        with torch.no_grad():
            seen = judge[:-1](gray)
            logp = judge[-1](seen).log_softmax(1)[torch.arange(len(asked)), asked].clamp(min=FLOOR)
        return torch.cat([seen, logp[:, None], gray.mean((1, 2, 3))[:, None]], 1)

    own = raw(split.images, split.labels)
    mean, spread = own.mean(0), own.std(0).clamp(min=1e-3)
    spread[:-2] *= (own.shape[1] - 2) ** 0.5

    def embed(samples: Samples) -> Tensor:
        gray = _images(samples, torch.device("cpu")).float().mean(1, keepdim=True)
        asked = torch.tensor([parse_prompt(prompt)[0] for prompt in samples.prompts])
        return (raw(gray, asked) - mean) / spread

    weights = {k: hashlib.sha256(v.numpy().tobytes()).hexdigest() for k, v in judge.state_dict().items()}
    return Embedder(_identity("digits", weights), embed)


def clip_towers(path: str, architecture: str, placement: Placement, *, shared: bool) -> Any:
    """Return the towers of the backbone clip, whose architecture's name says which activation they have."""
    from rewards.towers import load_towers

    quick = architecture.endswith("-quickgelu")
    return load_towers(Path(path).expanduser(), architecture, quick_gelu=quick, placement=placement, shared=shared)


def clip_features(image_BD: Tensor, text_BD: Tensor) -> Tensor:
    """Return what heads read of two unit embeddings: both, and their product."""
    return torch.cat([image_BD, text_BD, image_BD * text_BD], 1).float()


def _clip(path: str, architecture: str, placement: Placement, trained: Path | None) -> Embedder:
    towers = clip_towers(path, architecture, placement, shared=trained is None)
    if trained is not None:
        from rewards.towers import overlay

        overlay(towers.model, load_tensors(trained), str(trained))

    def embed(samples: Samples) -> Tensor:
        with torch.no_grad(), placement.active(towers.model) as device:
            pixels = clip_pixels(_images(samples, device), towers.size)
            return clip_features(towers.embed_pixels(pixels), towers.embed_prompts(samples.prompts)[0]).cpu()

    identity = _identity("clip", weights_sha256(Path(path).expanduser()), architecture, placement.dtype)
    width = int(towers.model.text_projection.shape[1])
    return Embedder(identity, embed, halves=width, log_scale=float(towers.model.logit_scale))


# --- kept on disk -----------------------------------------------------------------------------------


def embed_all(embedder: Embedder, keys: Sequence[str], load: Callable[[Sequence[int]], Samples]) -> Tensor:
    """Return the embeddings `[N, D]` of outputs by the keys of their content; those on disk are not made again.

    Args:
        keys: hash of each output's content and prompt.
        load: reads the outputs at some places.

    Raises:
        DataError: embeddings that are no numbers, with how many.
    """
    file = cache_directory() / "embeddings" / f"{embedder.identity}.safetensors"
    known = _read(file)
    new = [i for i, key in enumerate(keys) if key not in known]
    new = list({keys[i]: i for i in new}.values())
    fresh: dict[str, Tensor] = {}
    for start in range(0, len(new), embedder.batch):
        part = new[start : start + embedder.batch]
        samples = load(part)
        shapes: dict[Any, list[int]] = {}
        for place in range(len(part)):
            shape = () if samples.images is None else tuple(samples.images[place].shape)
            shapes.setdefault(shape, []).append(place)
        for places in shapes.values():
            rows = embedder.embed(samples.select(places))
            fresh.update({keys[part[p]]: row for p, row in zip(places, rows, strict=True)})
    if bad := sum(not bool(row.isfinite().all()) for row in fresh.values()):
        raise DataError(
            "Some embeddings are no numbers", why=f"{bad} of {len(keys)} outputs have NaN or infinite features",
            do="Check the weights of the backbone, and leave those outputs out",
        )  # fmt: skip
    if fresh:
        known = {**_read(file), **fresh}
        _write(file, known)
    return torch.stack([known[key] for key in keys])


def _read(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        return {}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            names = json.loads((opened.metadata() or {}).get("keys", "[]"))
        return dict(zip(names, load_tensors(file)["embeddings"], strict=True))
    except (OSError, ValueError, KeyError, ModelError, SafetensorError):  # a torn cache is made again
        return {}


def _write(file: Path, rows: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    save_file({"embeddings": torch.stack(list(rows.values()))}, temporary, {"keys": json.dumps(list(rows))})
    os.replace(temporary, file)
