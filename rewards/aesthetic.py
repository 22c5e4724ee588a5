"""LAION's aesthetic predictor V2 (linearMSE): how much people like an image, whatever was asked for.

Its head is five linear layers with nothing between them, so it is one affine map, and is folded into it:

    score = w e + b,    w = W_5 W_4 W_3 W_2 W_1,    b = W_5 (W_4 (W_3 (W_2 b_1 + b_2) + b_3) + b_4) + b_5

of the *unit* embedding `e` of OpenAI's CLIP ViT-L/14. Unnormalised embeddings give 20 to 30 in place of 1 to 10.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from align.errors import ModelError
from align.hub import locate
from align.types import Samples, Scores
from align.weights import load_tensors, weights_sha256
from rewards.base import REWARDS, RewardCard, identity_of
from rewards.media import clip_pixels, problems, require_media, score_samples, stacked
from rewards.placement import Placement
from rewards.towers import find_weights, load_towers, require_scorable


def fold_head(state: Mapping[str, Tensor], where: str = "head") -> tuple[Tensor, Tensor]:
    """Return `w [D]` and `b []` in float64 of a chain of linear layers `layers.N.{weight, bias}` with one output.

    Raises:
        ModelError: another set of tensors, or layers that do not follow one another.
    """
    layers = sorted({int(m.group(1)) for m in map(re.compile(r"layers\.(\d+)\.weight").fullmatch, state) if m})
    named = {f"layers.{n}.{kind}" for n in layers for kind in ("weight", "bias")}
    if not layers or named != set(state):
        raise ModelError(
            "This is no head of linear layers", where=where, why=f"it has the tensors {', '.join(sorted(state)[:4])}"
        )
    weight, bias = state[f"layers.{layers[0]}.weight"].double(), state[f"layers.{layers[0]}.bias"].double()
    for n in layers[1:]:
        after, shift = state[f"layers.{n}.weight"].double(), state[f"layers.{n}.bias"].double()
        if after.ndim != 2 or weight.ndim != 2 or after.shape[1] != len(weight) or len(shift) != len(after):
            raise ModelError("Layers of a head do not follow one another", where=f"{where}, layers.{n}")
        weight, bias = after @ weight, after @ bias + shift
    if weight.ndim != 2 or len(weight) != 1 or bias.shape != (1,):
        raise ModelError("The head of a reward has one output", where=where, why=f"this has {tuple(bias.shape)}")
    return weight[0], bias[0]


class Aesthetic:
    """`w e + b` of an image's unit embedding; reads no prompt.

    Args:
        path: file or folder of the CLIP's weights; None fetches the published ones from the hub.
        head: file of the head; None fetches the published one.
        placement, dtype, batch_size: see `rewards.placement.Placement`.
        architecture: open_clip's name of the towers, for weights and a head of one's own.

    Raises:
        ModelError: weights or a head of another shape.
    """

    def __init__(
        self,
        path: str | None = None,
        head: str | None = None,
        placement: str = "resident",
        dtype: str = "fp32",
        batch_size: int | None = None,
        architecture: str | None = None,
    ) -> None:
        self.card: RewardCard = REWARDS.get("aesthetic").card
        self.names = self.card.components
        self.placement = Placement(placement, dtype, batch_size)
        self.architecture = architecture or "ViT-L-14-quickgelu"
        published_head, published = self.card.weights
        own = architecture is not None and head is not None
        top = Path(str(head)).expanduser() if own else locate(published_head, head)
        self.weight, self.bias = (t.to(self.placement.device) for t in fold_head(load_tensors(top), str(top)))
        file = find_weights(published, path, architecture)
        self.towers = load_towers(file, self.architecture, quick_gelu=True, placement=self.placement)
        width = self.towers.model.visual.output_dim
        if len(self.weight) != width:
            raise ModelError("A head for another CLIP", where=str(top), why=f"{len(self.weight)} inputs, not {width}")
        self.sha256 = [weights_sha256(file), weights_sha256(top)]

    def identity(self) -> str:
        """Return a hash over the weights, the head, the towers and the precision."""
        arguments = {"weights": self.sha256, "architecture": self.architecture, "dtype": self.placement.dtype}
        return identity_of(self.card, arguments)

    def score(self, samples: Samples) -> Scores:
        """Return `w e + b` of B images, `[B, 1]`."""
        require_media(samples, "image", self.card.name)

        def forward(part: Samples) -> tuple[Tensor, dict[str, list[object]]]:
            return self._values(stacked(part.images, self.placement.device)), {}

        wrong = problems(samples, prompts=False)
        modules = (self.towers.model.visual,)
        return score_samples(samples, self.names, forward, self.placement, modules, wrong=wrong)

    def differentiable(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the scores `[B, 1]` of images `[B, 3, h, w]` in [0, 1], on the graph of their pixels.

        Raises:
            DataError: what `score` would call missing.
            ConfigError: the reward is offloaded.
        """
        require_scorable(images, None)
        self.placement.require_graph(self.card.name)
        with self.placement.active(self.towers.model.visual) as device:
            return self._values(stacked(images, device))

    def _values(self, images: Tensor) -> Tensor:
        embedded = self.towers.embed_pixels(clip_pixels(images, self.towers.size))
        return (embedded.double() @ self.weight + self.bias)[:, None]
