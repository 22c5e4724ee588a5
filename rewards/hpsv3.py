"""HPSv3: a Qwen2-VL-7B that reads image and prompt, and a head at its <|Reward|> token."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from torch import Tensor, nn

from align.errors import DataError
from align.types import Samples, Scores
from align.weights import load_tensors, weights_sha256
from rewards.base import REWARDS, RewardCard, identity_of
from rewards.media import problems, require_media, score_samples, stacked
from rewards.placement import Placement
from rewards.qwen_vl import PIXELS, PromptTemplate, Reader, build, find_checkpoint, patches, picture_tokens
from rewards.tokens import tokenizer_sha256, tokenizer_source

BASE = "Qwen/Qwen2-VL-7B-Instruct"
SPECIALS = ("<|Reward|>",)
TEMPLATE = PromptTemplate(
    (
        (2523, "0393599dad45a971903d1d62a3acf9bad3ccccdafa7f40f680523419e1f68b7a"),
        (68, "2471faca094ae5bd6fe17b71dce20c3d7583625545e235889f7e74e7eeb69d0a"),
    ),
    "INSTRUCTION followed by prompt_with_special_token, of hpsv3/dataset/data_collator_qwen.py in the package hpsv3",
)


def reward_head(width: int) -> nn.Sequential:
    """Return the head `width -> 1024 -> 16 -> (mu, log sigma)`, with its published keys 0, 3 and 5."""
    return nn.Sequential(
        nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
    )


class HPSv3:
    """Mean `mu` of a normal belief about how much people like an image for its prompt; unbounded, in logits.

    Its authors train `P(a over b) = E[sigmoid(z)]`, z normal with mean `mu_a - mu_b` and variance
    `sigma_a^2 + sigma_b^2`. The extra `log_sigma` is the second output.

    Args:
        path: `HPSv3.safetensors` or a folder that holds it; from the hub when None. The prompt template is read
            from `prompt_template.txt` beside it.
        base: folder or hub repository of Qwen2-VL-7B-Instruct, of which the configuration and the tokenizer are
            read; by default the folder of the weights if it holds them, else the hub.
        template: for weights of your own, the user's text with `{text_prompt}` and `<|Reward|>` once each, in place of
            that file; the scores and the identity are then another reward's.
        placement, dtype, batch_size: see `rewards.placement`; the weights are held in `dtype`, the head in fp32.

    Raises:
        ModelError: weights, a tokenizer or a template that are absent or foreign.

    Source: HPSv3 (arXiv 2508.03789), its released code; positions: see `rewards.qwen_vl`.
    """

    names = ("hpsv3",)

    def __init__(
        self,
        path: str | None = None,
        base: str | None = None,
        template: str | None = None,
        placement: str = "resident",
        dtype: str = "bf16",
        batch_size: int | None = None,
    ) -> None:
        self.card: RewardCard = REWARDS.get("hpsv3").card
        self.placement = Placement(placement, dtype, batch_size)
        self.file = find_checkpoint(self.card.weights[0], path, template is not None)
        base = tokenizer_source(base, self.file.parent, BASE)
        text = TEMPLATE.read([self.file.parent]) if template is None else template
        self.reader = Reader(base, text, SPECIALS, "image")
        self._tokenizer_sha256 = tokenizer_sha256(self.reader.tokenizer)
        state = load_tensors(self.file)
        self.network = build(base, len(self.reader.tokenizer), reward_head, state, str(self.file), self.placement)

    def identity(self) -> str:
        """Return a hash over the weights, the tokenizer, the template and the precision."""
        about = {"weights": weights_sha256(self.file), "tokenizer": self._tokenizer_sha256, "pixels": PIXELS}
        template = hashlib.sha256(self.reader.template.encode()).hexdigest()
        return identity_of(self.card, {**about, "template": template, "dtype": self.placement.dtype})

    def score(self, samples: Samples) -> Scores:
        """Return `mu`, `[B, 1]`; the extra `log_sigma` has one value a sample."""
        require_media(samples, "image", self.card.name)
        wrong = [
            message or self._problem(samples.prompts[i], samples.images[i])
            for i, message in enumerate(problems(samples))
        ]
        return score_samples(samples, self.names, self._forward, self.placement, (self.network,), wrong=wrong)

    def differentiable(self, images: Tensor | Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        """Return `mu` `[B, 1]` of images of one size in [0, 1], with a gradient to their pixels."""
        self.placement.require_graph(self.card.name)
        with self.placement.active(self.network):
            return self._forward(Samples(prompts=prompts, images=images))[0]

    def _problem(self, prompt: str, image: Tensor) -> str:
        try:
            height, width = image.shape[-2:]
            return self.reader.problem(prompt, picture_tokens(1, height, width))
        except DataError as error:
            return str(error)

    def _forward(self, samples: Samples) -> tuple[Tensor, dict[str, list[float]]]:
        device = self.placement.device
        values, grids = patches(stacked(samples.images, device)[:, None])
        ids, mask = self.reader.batch(samples.prompts, grids[0].tolist(), device)
        hidden = self.network.hidden(ids, mask, values, grids, self.reader.pad)
        mu_sigma = self.network.head_at(hidden, ids, self.reader.specials)[:, 0]
        return mu_sigma[:, :1], {"log_sigma": mu_sigma[:, 1].detach().tolist()}
