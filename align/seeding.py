"""Counter-based randomness: every draw is a pure function of what it is for.

`seed(run, step, prompt, member, "init")` does not depend on the device, the number of processes, the
batch size or what was drawn before, so a resumed or re-laid-out run draws the same numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def seed(*key: int | str) -> int:
    """Return a 63-bit seed for `key`: the first 8 bytes of BLAKE2b over its typed parts."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(*key: int | str) -> torch.Generator:
    """Return a CPU generator seeded by `key`."""
    import torch

    return torch.Generator().manual_seed(seed(*key))


def normal(shape: Sequence[int], *key: int | str) -> torch.Tensor:
    """Draw a standard normal float32 CPU tensor that depends on `shape` and `key` alone."""
    import torch

    return torch.randn(tuple(shape), generator=generator(*key), dtype=torch.float32)


def uniform(*key: int | str) -> float:
    """Draw a number in [0, 1) that depends on `key` alone."""
    return seed(*key) / 2**63


def permutation(count: int, *key: int | str) -> list[int]:
    """Return a uniformly random order of `range(count)` that depends on `count` and `key` alone."""
    import torch

    return torch.randperm(count, generator=generator(*key)).tolist()
