"""The rows of thumbs and pairs that an offline run learns from, and the embedded ones.

`digits/thumbs` and `digits/pairs` are made from samples of the digits model that is trained, judged by the training
split's rewards: a thumb up where the digit can be read and has the asked weight. Half of the samples get no thumb, and
one answer in twenty is turned round, as people's are.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np

from align.diffusion.digits_data import build_once, cache_directory, digit_prompts
from align.diffusion.policy import Policy, resolve_model
from align.errors import ConfigError
from align.image_feedback import ImageFeedback, load_image_feedback, training_and_heldout_rows
from align.offline_checks import BUILTIN_ROWS
from align.offline_config import OfflineConfig
from align.seeding import uniform

DIGITS_MEMBERS = 64
LEGIBLE_NATS, WEIGHT_STDS = -0.05, -0.1
THUMBED, FLIPPED = 0.5, 0.05


def resolve_rows(config: OfflineConfig) -> tuple[ImageFeedback, ImageFeedback]:
    """Return the training and the held-out rows of a configuration, as its loss takes them.

    Raises:
        DataError: see `load_image_feedback` and `ImageFeedback.for_loss`.
    """

    def load(path: str) -> ImageFeedback:
        root = None if path in BUILTIN_ROWS else config.data.root
        file = digits_rows(path, config.model.path) if path in BUILTIN_ROWS else path
        return load_image_feedback(file, root=root)

    heldout = None if config.data.heldout_path is None else load(config.data.heldout_path)
    sides = training_and_heldout_rows(load(config.data.path), heldout, config.data.heldout_fraction)
    return sides[0].for_loss(config.objective.loss), sides[1].for_loss(config.objective.loss, both=False)


def digits_rows(name: str, model: str) -> Path:
    """Return the Parquet file of embedded rows, built on first use and cached.

    Args:
        name: one of `BUILTIN_ROWS`.
        model: the digits model whose samples are judged; `digits` where another model is trained.
    """
    if name not in BUILTIN_ROWS:
        raise ConfigError(f"There are no embedded rows {name!r}", do=f"Choose {' or '.join(BUILTIN_ROWS)}")
    folder = resolve_model(model if model.partition("/")[0] == "digits" else "digits")
    source = Path(__file__).read_text(encoding="utf-8")
    key = hashlib.sha256(f"{folder.name} {source}".encode()).hexdigest()[:16]
    made = build_once(cache_directory() / f"digits-rows-{key}", lambda place: _build_digits_rows(folder, place))
    return made / f"{name.partition('/')[2]}.parquet"


def _build_digits_rows(model: Path, folder: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    from align.config import ModelConfig
    from rewards import get_reward
    from trainers.evaluation import generate

    policy = Policy.load(model, ModelConfig(path=str(model), train="full"), seed=0)
    prompts = digit_prompts()
    samples = generate(policy, prompts, DIGITS_MEMBERS, seed=1_000, solver_steps=20)
    legible, weight = (get_reward(n).score(samples).values[:, 0] for n in ("digits/legibility", "digits/ink_band"))
    images = [{"bytes": _png(image.numpy()), "path": None} for image in samples.images]
    up = (legible >= LEGIBLE_NATS) & (weight >= WEIGHT_STDS)

    def turned(*key: int | str) -> bool:
        return uniform("digits rows", *key, "turned") < FLIPPED

    thumbs = [
        {"prompt": samples.prompts[i], "image": images[i], "label": bool(up[i]) != turned(i)}
        for i in range(len(samples))
        if uniform("digits rows", i, "thumbed") < THUMBED
    ]
    pairs = []
    for i in range(0, len(samples), 2):  # members of one prompt, one after another
        total = legible + weight
        if total[i] != total[i + 1]:
            first = bool(total[i] > total[i + 1]) != turned(i, "pair")
            chosen, rejected = (i, i + 1) if first else (i + 1, i)
            row = {"prompt": samples.prompts[i], "chosen": images[chosen], "rejected": images[rejected]}
            pairs.append(row)
    for name, rows in (("thumbs", thumbs), ("pairs", pairs)):
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{name}.parquet")


def _png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    levels = (pixels.clip(0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0)
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "png")
    return file.getvalue()
