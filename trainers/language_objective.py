"""Between the trainers and `transformers.Trainer`: a microbatch's tensors, the models that see it, its losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from align.errors import ConfigError
from align.launch import World
from align.preferences import PreferenceSet
from trainers.language_generation import Answer, Prompt
from trainers.language_logps import TokenLogps, completion_logps
from trainers.language_reference import LogpCache, Reference
from trainers.monitor import Verdict
from trainers.preference_data import Tokens


@dataclass(frozen=True)
class Totals:
    """What an optimizer batch holds over accumulation and processes: rows, of each class, and completion tokens."""

    rows: int
    up: int
    down: int
    tokens: int


@dataclass(frozen=True)
class RowLosses:
    """Losses of this process's rows of a microbatch.

    Args:
        loss: the part of the global batch's loss that these rows are: its sum over all processes and microbatches
            is the loss.
        rows: `[B]`, each row's own loss, to name what is not finite.
        measures: per-row values `[B]` by name, for the log.
        mask: attention mask of what was trained on, where that is not the microbatch's own rows.
    """

    loss: Tensor
    rows: Tensor
    measures: Mapping[str, Tensor]
    mask: Tensor | None = None


@dataclass
class Models:
    """The policy, wrapped as it trains and not, and the reference."""

    policy: nn.Module
    plain: nn.Module
    reference: Reference | None

    def logps(self, batch: Mapping[str, Tensor]) -> TokenLogps:
        """Log-probs under the policy, with gradient."""
        return completion_logps(self.policy, batch)

    def free_logps(self, batch: Mapping[str, Tensor]) -> TokenLogps:
        """Log-probs under the policy, without gradient."""
        with torch.no_grad():
            return completion_logps(self.plain, batch)

    def reference_logps(self, batch: Mapping[str, Tensor]) -> TokenLogps:
        """Log-probs under the model before training."""
        return self.before().logps(batch)

    def before(self) -> Reference:
        """Return the reference.

        Raises:
            ConfigError: the run has none.
        """
        if self.reference is None:
            raise ConfigError("This run has no reference model", where="reference")
        return self.reference


class Objective(Protocol):
    """What one trainer file adds to this one: `<title>Objective(config)`, see `align.loops`.

    `paired` rows are read in pairs, `mismatched` asks for each prompt with another's completion, `labelled` needs a
    thumb a row, `soft` takes scores for labels, `referenced` compares with the model before training, `oversample`
    evens the classes out, `online` draws the completions it learns from (see `Online`). `beta` makes rewards of
    log-ratios.
    """

    paired: bool
    mismatched: bool
    labelled: bool
    referenced: bool
    oversample: bool
    soft: bool
    online: bool
    beta: float

    def prepare(self, tokens: Tokens) -> dict[str, Any]:
        """Look at the training rows once; return what the run's record should say of it."""

    def losses(self, models: Models, batch: Mapping[str, Any], totals: Totals, world: World) -> RowLosses:
        """Return the losses of a microbatch."""

    def finish(self, world: World) -> dict[str, float]:
        """Bring running state up to date after an optimizer step, all processes together; return metrics."""

    def state(self) -> dict[str, Any]:
        """Return the running state as JSON."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Set what `state` returned."""


class Online(Objective, Protocol):
    """What an objective adds that learns from completions of the model's own, and not from those of the data.

    Attributes:
        verdict: of the hack monitor on the last evaluation; None before one, and where it is off.
    """

    verdict: Verdict | None

    def ask(self, rows: PreferenceSet, tokens: Tokens, tokenizer: Any) -> None:
        """Take the training prompts: `rows`, of which `tokens` are what is left."""

    def seen(self) -> list[dict[str, Any]]:
        """Return this process's completions of the microbatch at hand, as far as they are known, for people to read."""

    def heldout(self, answers: HeldOut) -> dict[str, Any]:
        """Return what an evaluation says of the model's answers to held-out prompts. All processes together."""


@dataclass
class HeldOut:
    """The model's answers to held-out prompts at one evaluation.

    Args:
        step: the training step.
        prompts: what was asked.
        answers: of the model in training, one a prompt.
        before: of the model before training, drawn with the same noise; empty where it is gone.
        log_ratio: of `answers` to the model before training, `[P]`; None where it is gone.
        world: the processes.
        rows: what generations.jsonl is to hold of each answer, for the objective to add to.
    """

    step: int
    prompts: Sequence[Prompt]
    answers: Sequence[Answer]
    before: Sequence[Answer]
    log_ratio: np.ndarray | None
    world: World
    rows: list[dict[str, Any]]


def microbatch(
    tokens: Tokens,
    every: np.ndarray,
    rows: Sequence[int],
    partners: Sequence[int],
    cache: LogpCache | None,
    *,
    pad: int,
    paired: bool = False,
    mismatched: bool = False,
) -> dict[str, Any]:
    """Return the tensors of some rows of a microbatch.

    Args:
        tokens: all rows.
        every: the rows of the whole microbatch, over all processes, for `totals`.
        rows: this process's; `paired` rejected rows follow the chosen ones.
        partners: rows whose completions go with the prompts of `rows`, when `mismatched`.
        cache: reference log-probs, if they were computed before.
        pad: token id of padding.

    Returns:
        `sequences`, a batch of `collate`: the rows, then the mismatched pairs; `count` of the former; `label`,
        `weight`, `index` `[B]`; `reference` `[B or 2 B]` with a cache; `totals`.
    """
    own = [*rows, *(r + 1 for r in rows)] if paired else list(rows)
    pairs = [(i, i) for i in own] + (list(zip(rows, partners, strict=True)) if mismatched else [])
    everyone = np.concatenate([every, every + 1]) if paired else every
    up = tokens.desirable[everyone]
    found: dict[str, Any] = {
        "sequences": tokens.batch(pairs, pad),
        "count": len(own),
        "label": torch.tensor(tokens.label[own], dtype=torch.float32),
        "weight": torch.tensor(tokens.weight[own], dtype=torch.float32),
        "index": torch.tensor(own),
        "totals": Totals(
            len(every), int(up.sum()), int((~up).sum()), sum(len(tokens.completions[i]) for i in everyone)
        ),
    }  # fmt: skip
    if cache is not None:
        found["reference"] = cache.lookup(tokens, pairs)
    return found


def part(batch: Mapping[str, Any], start: int, stop: int | None) -> dict[str, Any]:
    """Return some rows of a batch of `collate`, without columns that are padding in all of them."""
    mask = batch["attention_mask"][start:stop]
    width = int(mask.sum(1).max()) if len(mask) else 0
    rows = {name: value[start:stop] for name, value in batch.items()}
    return {name: value[:, :width] if torch.is_tensor(value) else value for name, value in rows.items()}


def log_ratios(
    models: Models, batch: Mapping[str, Any], clamp: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the log-ratios to the reference of a microbatch's rows `[B]`, of its mismatched pairs, and log-probs.

    The reference sees rows and mismatched pairs in one call. Only the rows' log-ratios carry a gradient.

    Args:
        models: policy and reference.
        batch: of `microbatch`.
        clamp: applied to each token's log-ratio; needs a live reference.

    Returns:
        log-ratios, those of the mismatched pairs or None without any, and the policy's log-probs, detached.
    """
    sequences, count = batch["sequences"], batch["count"]
    total = len(sequences["input_ids"])
    live = None if "reference" in batch else models.reference_logps(sequences)
    reference = batch["reference"] if live is None else live.per_row()
    mismatched = None
    if total > count:
        free = models.free_logps(part(sequences, count, None))
        mismatched = free.per_row() - reference[count:]
        if clamp is not None and live is not None:
            mismatched = free.per_row(clamp(free.values - live.values[-len(free.values) :]))
    own = models.logps(part(sequences, 0, count))
    if live is None:
        ratio = own.per_row() - reference[:count]
    else:
        difference = own.values - live.values[: len(own.values)]
        ratio = own.per_row(difference if clamp is None else clamp(difference))
    return ratio, mismatched, own.per_row(own.values.detach())


def add_totals(parts: Sequence[Totals]) -> Totals:
    """Add up the microbatches of an optimizer step."""
    return Totals(*(sum(getattr(p, name) for p in parts) for name in ("rows", "up", "down", "tokens")))
