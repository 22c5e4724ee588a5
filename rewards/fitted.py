"""A reward that `align fit` fitted: an artefact of safetensors and JSON, read back as a reward."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from align.errors import ConfigError, DataError, ModelError
from align.types import Samples, Scores
from align.weights import file_sha256, load_into, load_tensors
from rewards.base import REWARDS, RewardCard, identity_of
from rewards.classifier import Classifier
from rewards.embeddings import Embedder, build_embedder
from rewards.media import problems, require_media
from rewards.placement import Placement

FORMAT = 1
ARTEFACT = "reward.json"
HEAD, TOWERS = "head.safetensors", "towers.safetensors"
OUTPUTS = ("probability", "score")
LOG_SCALE, MOST_LOG_SCALE = 2.3, math.log(100)
"""Of the head cos: where log s starts unless told otherwise, and CLIP's cap on it (arXiv 2103.00020, section 2.5)."""


class Head(nn.Module):
    """What turns an embedding into the latent reward, without an intercept: that belongs to who said what.

        linear   w . x,                           x the embedding, centred and scaled over the training outputs
        mlp      v . gelu(W x + c)
        cos      s <A e_i, B e_t> / (|A e_i| |B e_t|),   A = B = 1 at the start, e_i and e_t as the towers made them,
                 s at most 100: what an update adds beyond is taken back before the next one, as CLIP's authors do

    Args:
        kind: linear, mlp or cos.
        inputs: width of the embedding.
        width: hidden units of mlp.
        halves: width of each of the two embeddings that cos compares.
        log_scale: log s of cos at the start.
    """

    def __init__(self, kind: str, inputs: int, width: int, halves: int, log_scale: float = LOG_SCALE) -> None:
        super().__init__()
        self.kind, self.halves = kind, halves
        self.mean = nn.Parameter(torch.zeros(inputs), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(inputs), requires_grad=False)
        if kind == "linear":
            self.weight = nn.Parameter(torch.zeros(inputs))
        elif kind == "mlp":
            self.hidden = nn.Linear(inputs, width)
            self.weight = nn.Parameter(torch.zeros(width))
        else:
            self.image, self.text = nn.Parameter(torch.eye(halves)), nn.Parameter(torch.eye(halves))
            self.log_scale = nn.Parameter(torch.tensor([log_scale]))

    def standardise(self, features_ND: Tensor) -> None:
        """Take mean and spread of the training outputs: `x = (e - mean) / rms over features of their spreads`.

        One scale for all of them: a feature that hardly varies, such as a rare word, stays small, and the penalty
        keeps what it says small too.
        """
        if self.kind != "cos":
            spread = features_ND.std(0, correction=0)
            self.mean.data = features_ND.mean(0)
            self.scale.data = torch.ones_like(spread) / spread.square().mean().sqrt().clamp(min=1e-6)

    def penalty(self) -> Tensor:
        """Return half the squared weights; of cos, half the squared distance of its matrices from 1."""
        if self.kind == "cos":
            one = torch.eye(self.halves, device=self.image.device)
            return ((self.image - one).square().sum() + (self.text - one).square().sum()) / 2
        hidden = self.hidden.weight.square().sum() if self.kind == "mlp" else 0.0
        return (self.weight.square().sum() + hidden) / 2

    def forward(self, features_ND: Tensor) -> Tensor:
        """Return the latent reward `[N]` of embeddings `[N, D]`."""
        if self.kind == "cos":
            with torch.no_grad():  # not a clamp on the graph, which would hold it at the cap for good
                self.log_scale.clamp_(max=MOST_LOG_SCALE)
            image = features_ND[:, : self.halves] @ self.image.T
            text = features_ND[:, self.halves : 2 * self.halves] @ self.text.T
            return self.log_scale.exp() * nn.functional.cosine_similarity(image, text, dim=-1)
        x = (features_ND - self.mean) * self.scale
        if self.kind == "mlp":
            x = nn.functional.gelu(self.hidden(x))
        return x @ self.weight


def calibrated(logit_N: np.ndarray, calibration: Mapping[str, Any]) -> np.ndarray:
    """Return the probability of a thumb up: `sigmoid(a f + b)`, or linear between the points of an isotonic fit."""
    if calibration["kind"] == "isotonic":
        return np.interp(logit_N, calibration["x"], calibration["y"])
    z = calibration["a"] * logit_N + calibration["b"]
    return np.where(z > 0, 1 / (1 + np.exp(-np.abs(z))), np.exp(-np.abs(z)) / (1 + np.exp(-np.abs(z))))


def read_artefact(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """Return the folder of a fitted reward and what its JSON says; a run folder of `align fit` will do.

    Raises:
        ModelError: no such folder, or one that is no fitted reward.
    """
    folder = Path(path).expanduser()
    folder = folder if (folder / ARTEFACT).is_file() else folder / "reward"
    try:
        found = json.loads((folder / ARTEFACT).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(
            "There is no fitted reward", where=str(path), why=f"it has no {ARTEFACT}",
            do="Give the run folder of a finished `align fit`",
        ) from error  # fmt: skip
    except (OSError, ValueError) as error:
        raise ModelError("A fitted reward cannot be read", where=str(folder / ARTEFACT), why=str(error)) from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ModelError("This is a fitted reward of another version", where=str(folder / ARTEFACT))
    return folder, found


class Fitted:
    """The reward of a run of `align fit`, with everybody's own effect at 0.

    Args:
        path: the run folder, or the folder `reward` in it.
        output: "probability" of a thumb up, calibrated, or the latent "score"; None takes the first where there is one.
        placement, dtype, batch_size: see `Placement`.
        backbone: where the weights of its backbone are now, when they moved; they must be the same.

    Raises:
        ModelError: no fitted reward, or another backbone than it was fitted on.
        ConfigError: a probability of a reward that no thumbs were fitted to.
    """

    def __init__(
        self, path: str, output: str | None = None, placement: str = "resident", dtype: str = "fp32",
        batch_size: int | None = None, backbone: str | None = None,
    ) -> None:  # fmt: skip
        self.folder, self.artefact = read_artefact(path)
        self.placement = Placement(placement, dtype, batch_size)
        self.calibration = self.artefact["calibration"]
        self.output = output or ("score" if self.calibration is None else "probability")
        if self.output not in OUTPUTS:
            raise ConfigError(f"A fitted reward gives {' or '.join(OUTPUTS)}", where=f"output {output!r}")
        if self.output == "probability" and self.calibration is None:
            raise ConfigError(
                "This reward has no probability", where=str(path), why="no thumbs were held out to calibrate it on",
                do="Use output: score",
            )  # fmt: skip
        self.names = (str(self.artefact["name"]),)
        about = f"{REWARDS.get('fitted').card.definition}; here {self.output} of {self.artefact['name']}"
        media = self.artefact["media"]
        self.card: RewardCard = dataclasses.replace(REWARDS.get("fitted").card, definition=about, media=media)
        model = self.artefact["model"]
        self.classifier: Classifier | None = None
        self.embedder: Embedder | None = None
        if model["backbone"] == "classifier":
            self.classifier = Classifier(
                str(self.folder / "classifier"), model["template"], model["max_length"], placement, dtype, batch_size, 1
            )
            return
        self.trained = self.folder / TOWERS if model.get("unfreeze_image") or model.get("unfreeze_text") else None
        self.embedder = build_embedder(
            model["backbone"], path=backbone or model["path"], architecture=model["architecture"], size=model["size"],
            placement=self.placement, trained=self.trained,
        )  # fmt: skip
        if self.embedder.identity != self.artefact["embedder"]:
            raise ModelError(
                "The backbone is not the one this reward was fitted on", where=str(backbone or model["path"] or path),
                why=f"its identity is {self.embedder.identity} instead of {self.artefact['embedder']}",
                do="Give backbone: its folder, or fit again",
            )  # fmt: skip
        state = load_tensors(self.folder / HEAD)
        self.head = Head(model["head"], len(state["mean"]), model["width"], self.embedder.halves)
        load_into(self.head, state, str(self.folder / HEAD))
        self.head.requires_grad_(False).eval()

    def identity(self) -> str:
        """Return a hash over the weights, the calibration and the output."""
        own = {"output": self.output, "calibration": self.calibration, "embedder": self.artefact["embedder"]}
        if self.classifier is not None:
            return self.classifier.identity(REWARDS.get("fitted").card, own)
        weights = [file_sha256(file) for file in (self.folder / HEAD, self.trained) if file is not None]
        return identity_of(REWARDS.get("fitted").card, {**own, "weights": weights})

    def latent(self) -> Fitted:
        """Return this reward with the latent score as its output, over the same weights."""
        other = copy.copy(self)
        other.output = "score"
        return other

    def score(self, samples: Samples) -> Scores:
        """Return the probability of a thumb up, or the latent reward, `[B, 1]`; the extra `score` is the latter."""
        require_media(samples, self.card.media, "fitted")
        if self.classifier is not None:
            latent, wrong, _ = self.classifier.logits(samples, "fitted")
            latent = latent[:, 0]
        else:
            latent, wrong = self._latent(samples)
        good = np.isfinite(latent)
        values = latent.copy()
        if self.output == "probability":
            values[good] = calibrated(latent[good], self.calibration)
        wrong = [m or ("" if ok else "fitted: the score is not a number") for m, ok in zip(wrong, good, strict=True)]
        return Scores(values[:, None], good[:, None], self.names, tuple(wrong), {"score": latent})

    def _latent(self, samples: Samples) -> tuple[np.ndarray, list[str]]:
        wrong, latent = problems(samples, prompts=False), np.full(len(samples), np.nan)
        shapes: dict[Any, list[int]] = {}
        for i, message in enumerate(wrong):
            if not message:
                shapes.setdefault(() if samples.images is None else tuple(samples.images[i].shape), []).append(i)
        size = self.placement.batch_size or self.embedder.batch
        for rows in shapes.values():
            for start in range(0, len(rows), size):
                part = rows[start : start + size]
                try:
                    features = self.embedder.embed(samples.select(part))
                except DataError as error:
                    if len(part) == 1:
                        wrong[part[0]] = f"fitted: {error}"
                        continue
                    raise  # the caller scores one by one
                latent[part] = self.head(features).double().numpy()
        return latent, wrong
