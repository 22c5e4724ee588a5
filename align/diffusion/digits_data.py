"""Real handwritten digits, bundled with scikit-learn: three disjoint splits, their prompts, and a judge a split.

1,797 scans of 8x8 pixels (UCI "Optical Recognition of Handwritten Digits"), enlarged to 16x16 by bicubic
interpolation; ink is 1 and paper 0. The generator, the training rewards and the held-out evaluator
never see one another's images.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from align.errors import ConfigError, DataError
from align.registry import suggest

SIZE = 16
SPLITS = {"generator": 0.5, "reward": 0.25, "evaluator": 0.25}
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WEIGHTS = ("plain", "bold", "thin")


@dataclass(frozen=True)
class DigitSplit:
    """Images `[B, 1, 16, 16]` in [0, 1] with ink 1, labels `[B]`, and ink `[B]`, the mean pixel."""

    images: Tensor
    labels: Tensor
    ink: Tensor


@functools.cache
def _all_digits() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError(
            "The digits need scikit-learn", why=str(error), do="pip install 'align[diffusion]'"
        ) from error
    data = load_digits()
    small = torch.tensor(data.images / 16.0, dtype=torch.float32)[:, None]
    return F.interpolate(small, size=SIZE, mode="bicubic", align_corners=False).clamp(0, 1), torch.tensor(data.target)


@functools.cache
def load_split(name: str) -> DigitSplit:
    """Return one of the disjoint splits "generator" (50 %), "reward" (25 %) and "evaluator" (25 %), by class.

    Raises:
        ConfigError: another name, or no scikit-learn.
    """
    if name not in SPLITS:
        raise ConfigError(f"Unknown digits split {name!r}", do=suggest(name, SPLITS))
    images, labels = _all_digits()
    order, edges = np.random.default_rng(0), np.cumsum([0.0, *SPLITS.values()])
    place = list(SPLITS).index(name)
    rows: list[int] = []
    for digit in range(10):
        own = order.permutation(np.flatnonzero(labels.numpy() == digit))
        rows.extend(own[round(edges[place] * len(own)) : round(edges[place + 1] * len(own))])
    rows.sort()
    return DigitSplit(images[rows], labels[rows], images[rows].mean((1, 2, 3)))


@functools.cache
def ink_bands(name: str) -> dict[tuple[int, str], tuple[float, float]]:
    """Return `(digit, weight) -> (low, high)` mean ink on a split.

    Thin is the bottom third of the class by ink and bold the top third, each cut off at the class's
    outer 3 %; plain is the class's central 94 %. A band says how much ink, not "more ink".
    """
    split = load_split(name)
    bands = {}
    for digit in range(10):
        low, third, two_thirds, high = np.quantile(
            split.ink[split.labels == digit], [0.03, 1 / 3, 2 / 3, 0.97]
        ).tolist()
        bands[digit, "thin"], bands[digit, "bold"], bands[digit, "plain"] = (
            (low, third),
            (two_thirds, high),
            (low, high),
        )
    return bands


def digit_prompts() -> list[str]:
    """Return the 30 prompts: ten digits, plain, bold and thin."""
    return [prompt_for(digit, weight) for weight in WEIGHTS for digit in range(10)]


def prompt_for(digit: int, weight: str = "plain") -> str:
    """Return the prompt of a digit: "a handwritten seven", "a bold handwritten seven"."""
    return f"a handwritten {WORDS[digit]}" if weight == "plain" else f"a {weight} handwritten {WORDS[digit]}"


def parse_prompt(text: str) -> tuple[int, str]:
    """Return `(digit, weight)` of a digits prompt.

    Raises:
        DataError: a text that does not name exactly one digit.
    """
    words = text.lower().replace(".", " ").replace(",", " ").split()
    digits = [WORDS.index(w) for w in words if w in WORDS]
    weights = [w for w in words if w in ("bold", "thin")]
    if len(digits) != 1 or len(weights) > 1:
        raise DataError(
            "This is not a prompt for one digit", why=f"found {text!r}", do="Write e.g. 'a bold handwritten seven'"
        )
    return digits[0], weights[0] if weights else "plain"


def cache_directory() -> Path:
    """Return where built models are kept: `$ALIGN_CACHE`, or `~/.cache/align`."""
    return Path(os.environ.get("ALIGN_CACHE") or Path.home() / ".cache" / "align").expanduser()


def content_key(recipe: object) -> str:
    """Return 16 hex digits that name a recipe: its constants, torch's version, and the sources that build it."""
    here = Path(__file__).parent
    sources = "".join(
        (here / name).read_text(encoding="utf-8") for name in ("digits_data.py", "digits_models.py", "digits.py")
    )
    text = json.dumps([recipe, torch.__version__.split("+")[0], sources], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Return `folder`, built under a temporary name and renamed when whole, so that half a build is never used."""
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".building_", dir=folder.parent))
        try:
            build(temporary)
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, with the same content
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _judge_network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, 2, 1), nn.GELU(), nn.Conv2d(16, 32, 3, 2, 1), nn.GELU(), nn.Flatten(),
        nn.Linear(512, 64), nn.GELU(), nn.Linear(64, 10),
    )  # fmt: skip


def _augment(images: Tensor, draw: torch.Generator) -> Tensor:
    """Shift by up to an eighth, shear, rescale the ink and add noise: what a judge should not care about."""
    count = len(images)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=draw)

    matrix = torch.eye(2, 3).repeat(count, 1, 1)
    matrix[:, :, 2] = (uniform(count, 2) - 0.5) * 0.25
    matrix[:, :, :2] += (uniform(count, 2, 2) - 0.5) * 0.2
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    warped = F.grid_sample(images, grid, align_corners=False)
    inked = (warped * (0.7 + 0.6 * uniform(count, 1, 1, 1))).clamp(0, 1)
    return inked + 0.05 * torch.randn(inked.shape, generator=draw)


def train_judge(split: DigitSplit, *, steps: int = 600, seed: int = 0) -> nn.Sequential:
    """Train a small convolutional classifier on one split: images `[B, 1, 16, 16]` to logits `[B, 10]`.

    Label smoothing of .02 keeps its log-probabilities within about 6 nats, so that no image is scored
    as impossible.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = _judge_network()
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3, weight_decay=1e-2)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        rows = torch.randint(len(split.images), (128,), generator=draw)
        logits = judge(_augment(split.images[rows], draw))
        loss = F.cross_entropy(logits, split.labels[rows], label_smoothing=0.02)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return judge.requires_grad_(False).eval()


@functools.cache
def load_judge(name: str) -> nn.Sequential:
    """Return the classifier of a split, trained on first use (about 4 CPU-seconds) and cached on disk."""
    from safetensors.torch import load_file, save_file

    split = load_split(name)

    def build(folder: Path) -> None:
        save_file(train_judge(split).state_dict(), folder / "judge.safetensors")

    folder = build_once(cache_directory() / f"digits-judge-{name}-{content_key(name)}", build)
    judge = _judge_network()
    judge.load_state_dict(load_file(folder / "judge.safetensors"))
    return judge.requires_grad_(False).eval()
