"""VideoAlign's VideoReward: a Qwen2-VL-2B that watches a video, and one logit at each of three special tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from align.errors import DataError, ModelError
from align.types import Samples, Scores, Video
from align.weights import load_tensors, weights_sha256
from rewards.base import REWARDS, RewardCard, identity_of
from rewards.lora import merge_lora
from rewards.media import problems, require_media, score_samples, stacked
from rewards.placement import Placement
from rewards.qwen_vl import FACTOR, PromptTemplate, Reader, build, find_checkpoint, patches, picture_tokens
from rewards.tokens import tokenizer_sha256, tokenizer_source

BASE = "Qwen/Qwen2-VL-2B-Instruct"
SPECIALS = ("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>")
TEMPLATE = PromptTemplate(
    ((3997, "fdb6309bac618dd0c8b1b589d3a0970a974f7856eecbb355a190b2dce54af700"),),
    "DETAILED_PROMPT_WITH_SPECIAL_TOKEN, of prompt_template.py in the repository VideoAlign",
)
NORMS = {"vq": (3.6757, 2.2476), "mq": (1.1646, 1.3811), "ta": (2.8105, 2.5121)}
RATE, LEAST, MOST = 2.0, 4, 768
PIXELS = (128 * FACTOR * FACTOR, 256 * FACTOR * FACTOR)  # of a frame, least and most
ALPHA = 128.0


def reward_head(width: int) -> nn.Linear:
    """Return the head, a linear form without bias: one logit wherever it is read."""
    return nn.Linear(width, 1, bias=False)


def frame_indices(count: int, fps: float) -> list[int]:
    """Return which of `count` frames are watched: two a second of the true time, an even number, evenly spread.

    `n = 2 round(clamp(2 count / fps, 4, 2 floor(min(768, count) / 2)) / 2)`, frames `round(linspace(0, count-1, n))`.

    Raises:
        DataError: fewer than two frames.

    Source: VideoAlign, released code, after Qwen2-VL's.
    """
    wanted = min(max(count / fps * RATE, LEAST), min(MOST, count) // 2 * 2)
    chosen = min(round(wanted / 2) * 2, count)
    if chosen < 2:
        raise DataError("The video is too short to score", why=f"it has {count} frame, and motion needs two")
    return torch.linspace(0, count - 1, chosen).round().long().tolist()


class VideoAlign:
    """Visual quality, motion quality and text alignment of a video: `(x - mean) / std`, three separate components.

    The video is watched at two frames a second of its true time, each frame at 100,352 to 200,704 pixels. Scores are
    comparable within a prompt, or after normalisation.

    Args:
        path: `model.pth` or a folder that holds it; from the hub when None. `prompt_template.txt`, and
            `model_config.json` where there is one, are read beside it or in the folder above.
        base: folder or hub repository of Qwen2-VL-2B-Instruct, of which the configuration and the tokenizer are
            read; by default the folder of the weights if it holds them, else the hub.
        template: for weights of your own, the user's text with `{text_prompt}` and each special token once, in
            place of that file; the scores and the identity are then another reward's.
        placement, dtype, batch_size: see `rewards.placement`; the adapter is merged in float32, then the weights
            are held in `dtype` and the head in fp32.

    Raises:
        ModelError: weights, a tokenizer, a template or a configuration that are absent or foreign.

    Source: VideoAlign (arXiv 2501.13918), its released code; positions: see `rewards.qwen_vl`.
    """

    names = ("vq", "mq", "ta")

    def __init__(
        self,
        path: str | None = None,
        base: str | None = None,
        template: str | None = None,
        placement: str = "resident",
        dtype: str = "bf16",
        batch_size: int | None = None,
    ) -> None:
        self.card: RewardCard = REWARDS.get("videoalign").card
        self.placement = Placement(placement, dtype, batch_size)
        self.file = find_checkpoint(self.card.weights[0], path, template is not None)
        folders = [self.file.parent, self.file.parent.parent]
        self.settings = read_settings(folders)
        base = tokenizer_source(base, self.file.parent, BASE)
        text = TEMPLATE.read(folders) if template is None else template
        self.reader = Reader(base, text, SPECIALS, "video")
        self._tokenizer_sha256 = tokenizer_sha256(self.reader.tokenizer)
        state = merge_lora(load_tensors(self.file), self.settings["alpha"], str(self.file))
        self.network = build(base, len(self.reader.tokenizer), reward_head, state, str(self.file), self.placement)

    def identity(self) -> str:
        """Return a hash over the weights, the tokenizer, the template, the settings and the precision."""
        about = {"weights": weights_sha256(self.file), "tokenizer": self._tokenizer_sha256, **self.settings}
        template = hashlib.sha256(self.reader.template.encode()).hexdigest()
        return identity_of(self.card, {**about, "template": template, "dtype": self.placement.dtype})

    def score(self, samples: Samples) -> Scores:
        """Return vq, mq and ta, `[B, 3]`; the extra `frames` says how many were watched."""
        require_media(samples, "video", self.card.name)
        wrong = [
            message or self._problem(samples.prompts[i], samples.videos[i])
            for i, message in enumerate(problems(samples))
        ]
        return score_samples(samples, self.names, self._forward, self.placement, (self.network,), wrong=wrong)

    def differentiable(self, videos: Sequence[Video], prompts: Sequence[str]) -> Tensor:
        """Return vq, mq and ta `[B, 3]` of videos of one shape and rate, with a gradient to their frames.

        Raises:
            DataError: videos of several shapes or rates.
        """
        if len({(*video.frames.shape, video.fps) for video in videos}) != 1:
            raise DataError("A batch of videos needs one shape and one frame rate", do="Give them one by one")
        self.placement.require_graph(self.card.name)
        with self.placement.active(self.network):
            return self._forward(Samples(prompts=prompts, videos=videos))[0]

    def _problem(self, prompt: str, video: Video) -> str:
        try:
            watched = len(frame_indices(len(video.frames), video.fps))
            height, width = video.frames.shape[-2:]
            return self.reader.problem(prompt, picture_tokens(watched, height, width, *PIXELS))
        except DataError as error:
            return str(error)

    def _forward(self, samples: Samples) -> tuple[Tensor, dict[str, list[int]]]:
        device = self.placement.device
        watched = frame_indices(len(samples.videos[0].frames), samples.videos[0].fps)
        clips = torch.stack([stacked(video.frames[watched], device) for video in samples.videos])
        values, grids = patches(clips, *PIXELS)
        ids, mask = self.reader.batch(samples.prompts, grids[0].tolist(), device)
        hidden = self.network.hidden(ids, mask, values, grids, self.reader.pad)
        logits = self.network.head_at(hidden, ids, self.reader.specials)[..., 0]
        mean, std = logits.new_tensor([self.settings[name] for name in self.names]).T
        return (logits - mean) / std, {"frames": [len(watched)] * len(samples)}


def read_settings(folders: Sequence[Path]) -> dict[str, Any]:
    """Return what `model_config.json` says of the adapter's alpha and the scores' (mean, std); else the published ones.

    Raises:
        ModelError: it cannot be read, or describes another head, prompt or rate than this reward's.
    """
    file = next((folder / "model_config.json" for folder in folders if (folder / "model_config.json").is_file()), None)
    if file is None:
        return {"alpha": ALPHA, **NORMS}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        lora, norms = found.get("peft_lora_config", {}), found.get("inference_config") or {}
        alpha = float(lora.get("lora_alpha", ALPHA))
        read = {
            name: (float(norms.get(f"{name.upper()}_mean", mean)), float(norms.get(f"{name.upper()}_std", std)))
            for name, (mean, std) in NORMS.items()
        }
        said = {
            "output_dim": (found.get("model_config", {}).get("output_dim", 1), 1),
            "use_rslora": (lora.get("use_rslora", False), False),
            "fps": (float(found.get("data_config", {}).get("fps", RATE)), RATE),
            "max_frame_pixels": (found.get("data_config", {}).get("max_frame_pixels", PIXELS[1]), PIXELS[1]),
            "sample_type": (found.get("data_config", {}).get("sample_type", "uniform"), "uniform"),
        }
    except (ValueError, AttributeError, TypeError) as error:
        raise ModelError("The configuration of VideoReward cannot be read", where=str(file), why=str(error)) from error
    for key, (value, ours) in said.items():
        if value != ours:
            raise ModelError(
                "This is another reward than VideoReward", where=f"{file}, {key}", why=f"{value} instead of {ours}"
            )
    return {"alpha": alpha, **read}
