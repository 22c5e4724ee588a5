"""What people said, packed, and its loss given the latent reward of the outputs that they spoke of.

    thumb        sigmoid(s f + c + b_u)      c the base rate, b_u a person's own effect, N(0, tau^2); scored at b_u = 0
    rating       P(y > k) = sigmoid(s f - theta_k)
    comparison   sigmoid(f_a - f_b), with ties by Rao and Kupper or Davidson
    ranking      Plackett and Luce

The scale s is 1 for the first protocol that is there, comparisons before thumbs before ratings, and fitted for others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from align.errors import DataError
from align.fit_config import FitConfig
from align.launch import World
from rewards import fit_losses, plove
from rewards.fit_data import Observation
from rewards.fit_latent import Latent


@dataclass(frozen=True)
class Packed:
    """Observations as arrays: the kind of each row, the places of its outputs (-1 none), and what was said.

    Args:
        said_N: thumb, level of a rating, or share of a comparison; NaN for rankings and silence.
        rank_NM: ranks of rankings, 0 none.
        margin_N: of a comparison, signed for the first.
        user_N: index of who said it, -1 where unknown or not in training.
    """

    kind_N: np.ndarray
    item_NM: Tensor
    said_N: Tensor
    rank_NM: Tensor
    margin_N: Tensor
    weight_N: Tensor
    user_N: Tensor

    def __len__(self) -> int:
        return len(self.kind_N)

    def to(self, device: torch.device) -> Packed:
        """Return the same rows with their tensors on a device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)

    def thumbs_of_people(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return which rows `[N]` are thumbs of people known in training, and of those the person and the thumb."""
        rows = (self.kind_N == "thumb") & (self.user_N.numpy() >= 0)
        return rows, self.user_N.numpy()[rows], self.said_N.numpy()[rows].astype(np.float64)


def pack(rows: Sequence[Observation], places: Mapping[str, int], users: Mapping[str, int], config: FitConfig) -> Packed:
    """Return observations as arrays; with the loss pick, a comparison weighs one over the pairs of its prompt."""
    widest = max([2, *(len(row.items) for row in rows)])
    item = torch.full((len(rows), widest), -1)
    rank = torch.zeros(len(rows), widest, dtype=torch.long)
    said = np.full(len(rows), np.nan)
    margin, weight = np.zeros(len(rows)), np.array([row.weight for row in rows], dtype=np.float64)
    pairs: dict[str, int] = {}
    for row in rows:
        pairs[row.prompt] = pairs.get(row.prompt, 0) + (row.kind == "comparison")
    for i, row in enumerate(rows):
        item[i, : len(row.items)] = torch.tensor([places[name] for name in row.items])
        if row.kind == "ranking":
            rank[i, : len(row.items)] = torch.tensor(row.value)
        elif row.kind != "silence":
            said[i] = row.value[0] if row.kind == "rating" else row.value
        if row.kind == "comparison":
            asked = config.objective.margin if row.margin is None else row.margin
            margin[i] = asked * np.sign(row.value - 0.5)
            if config.objective.comparisons == "pick":
                weight[i] /= pairs[row.prompt]
    user = torch.tensor([users.get(row.user, -1) for row in rows])
    kind = np.array([row.kind for row in rows], dtype=object)
    columns = (torch.from_numpy(column).float() for column in (said, margin, weight))
    said_N, margin_N, weight_N = columns
    return Packed(kind, item, said_N, rank, margin_N, weight_N, user)


class Answers(nn.Module):
    """The observation models' own parameters, and the loss of rows given the latent reward of their outputs.

    Args:
        train: the training rows.
        levels: of ratings, 0 where there are none.
        share: of the negatives that were kept.
        effects: start and variance of people's effects; None fits none.
    """

    def __init__(
        self, config: FitConfig, train: Packed, levels: int, share: float, effects: tuple[np.ndarray, float] | None
    ) -> None:
        super().__init__()
        self.objective, self.shift, self.levels = config.objective, -math.log(share), levels
        kinds = set(train.kind_N)
        compared = bool(kinds & {"comparison", "ranking"})
        thumbs = bool(kinds & {"thumb", "silence"})
        if thumbs:
            rate = base_rate(train, share) if "thumb" in kinds else 0.5
            rate = self.objective.prior or rate if "silence" in kinds else rate
            clean = (rate - self.objective.rho_down) / (1 - self.objective.rho_up - self.objective.rho_down)
            clean = min(max(clean, 1e-3), 1 - 1e-3)
            self.thumb_bias = _number(math.log(clean / (1 - clean)))
            if compared:
                self.thumb_log_scale = _number(0.0)
            if self.objective.mistakes == "fitted":
                start = torch.tensor([self.objective.rho_up, self.objective.rho_down]).clamp(0.02, 0.48)
                self.mistakes = nn.Parameter(torch.logit(2 * start))
        if levels:
            model = self.objective.ratings
            ordinal, middle = model == "ordinal", 0.5 if model == "squared" else 0.0
            spread = torch.logit(torch.arange(1, levels) / levels)
            gaps = spread.diff()
            self.rating_first = _number(float(spread[0]) if ordinal else middle)
            if ordinal:
                self.rating_gaps = nn.Parameter(torch.log(torch.expm1(gaps)))
            if compared or thumbs or model == "squared":
                self.rating_log_scale = _number(-1.0 if model == "squared" else 0.0)
        if "comparison" in kinds and self.objective.comparisons in ("rao_kupper", "davidson"):
            self.tie = _number(0.0)
        self.variance = None if effects is None else effects[1]
        self.rows = max(1, len(train))
        if effects is not None:
            self.effect = nn.Parameter(torch.from_numpy(effects[0]).float())

    def thumb_scale(self) -> Tensor:
        """Return s of thumbs, 1 where no comparisons set the unit."""
        return self.thumb_log_scale.exp() if hasattr(self, "thumb_log_scale") else torch.ones(())

    def rating_scale(self) -> Tensor:
        """Return s of ratings, 1 where they are alone."""
        return self.rating_log_scale.exp() if hasattr(self, "rating_log_scale") else torch.ones(())

    def thumb_logit(self, latent: Tensor, user: Tensor | None = None) -> Tensor:
        """Return the logit of a thumb up; with `user`, of those people, an unknown one at 0."""
        logit = self.thumb_scale() * latent + self.thumb_bias
        if user is None or self.variance is None:
            return logit
        return logit + torch.where(user >= 0, self.effect[user.clamp(min=0)], torch.zeros_like(latent))

    def mistake_rates(self) -> tuple[Tensor | float, Tensor | float]:
        """Return rho_up and rho_down, as given or as fitted so far."""
        if not hasattr(self, "mistakes"):
            return self.objective.rho_up, self.objective.rho_down
        up, down = plove.mistake_rates(self.mistakes)
        return up, down

    def thresholds(self) -> Tensor:
        """Return the thresholds of ratings, rising."""
        return fit_losses.ordered(self.rating_first, self.rating_gaps)

    def losses(self, kind: str, rows: Packed, pick: Tensor, latent_NM: Tensor) -> Tensor:
        """Return one loss a row, of rows of one kind; `latent_NM` is 0 where there is no output.

        Raises:
            DataError: a kind without a loss.
        """
        first, said = latent_NM[:, 0], rows.said_N[pick]
        objective = self.objective
        if kind == "thumb":
            logit = self.thumb_logit(first, rows.user_N[pick])
            return plove.forward_corrected(logit, said, *self.mistake_rates(), self.shift)
        if kind == "rating":
            score = self.rating_scale() * first
            if objective.ratings == "ordinal":
                return fit_losses.ordinal(score, said, self.thresholds())
            error = fit_losses.squared if objective.ratings == "squared" else fit_losses.sigmoid_squared
            return error(score + self.rating_first, said / (self.levels - 1))
        if kind == "ranking":
            return fit_losses.plackett_luce(latent_NM, rows.rank_NM[pick])
        if kind != "comparison":
            raise DataError(
                f"No loss is known for what people said of kind {kind!r}", do="Give Answers.losses a branch for it"
            )
        second = latent_NM[:, 1]
        delta = first - second
        if objective.comparisons == "bradley_terry":
            loss = fit_losses.bradley_terry(delta, said, rows.margin_N[pick])
        elif objective.comparisons == "pick":
            loss = fit_losses.pick(delta, said)
        else:
            tie = F.softplus(self.tie) + 1e-4 if objective.comparisons == "rao_kupper" else self.tie
            loss = fit_losses.COMPARISONS[objective.comparisons](delta, (said - 0.5).sign(), tie)
        return loss + fit_losses.centre(first, second, objective.centre) if objective.centre else loss

    def unlabelled(self, logits: Mapping[str, Tensor]) -> Tensor:
        """Return the nnPU objective of a batch's logits by class: up, silent, and down where there are any."""
        up, silent, down = (logits[name] for name in ("up", "silent", "down"))
        prior = float(self.objective.prior or 0.5)
        if not len(silent) or not len(up):
            rest = [plove.logistic_loss(up), plove.logistic_loss(-down), 0.0 * silent]
            return torch.cat(rest).mean()
        if len(down):
            return plove.pnu(up, silent, down, prior)[1]
        return plove.nnpu(up, silent, prior, loss=plove.logistic_loss)[1]

    def penalty(self) -> Tensor:
        """Return minus the log-prior of people's effects and of mistakes, a share of it a row of N.

        `(sum b_u^2 / (2 tau^2) - log Beta(rho)) / N`
        """
        total = torch.zeros(())
        if self.variance is not None:
            total = total + self.effect.square().sum() / (2 * float(self.variance or 1))
        if hasattr(self, "mistakes"):
            total = total + plove.mistake_prior(plove.mistake_rates(self.mistakes))
        return total / self.rows


def _number(value: float) -> nn.Parameter:
    """A parameter of one number: DeepSpeed sends weights as bytes, which it cannot do with a tensor of no axis."""
    return nn.Parameter(torch.tensor([value]))


def base_rate(rows: Packed, share: float) -> float:
    """Return the share of thumbs that are up among all, negatives that were not drawn included."""
    thumbs = torch.from_numpy((rows.kind_N == "thumb").astype(bool))
    up = float((rows.weight_N * rows.said_N.nan_to_num())[thumbs].sum())
    down = float((rows.weight_N * (1 - rows.said_N.nan_to_num()))[thumbs].sum()) / share
    return up / max(up + down, 1e-9)


def batch_loss(
    answers: Answers, latent: Latent, rows: Packed, chosen: Sequence[int], world: World = World()
) -> tuple[Tensor, dict[str, float]]:
    """Return the loss of some rows, every one weighing the same whatever its kind, and the mean loss of each kind.

    Of several processes each works out its part of the rows. Their losses add up to that of the batch.
    """
    everything = rows.kind_N[list(chosen)]
    mine = [chosen[i] for i in world.share(len(chosen))]
    picked = torch.tensor(mine)
    items = rows.item_NM[picked]
    unique, place = items.clamp(min=0).unique(return_inverse=True)
    values = latent.of(unique.tolist())[place] * (items >= 0)
    kinds = rows.kind_N[mine]
    total, weight = values.new_zeros(()), rows.weight_N[list(chosen)].sum()
    pu = "silence" in set(rows.kind_N)
    sums: dict[str, Tensor] = {}
    for kind in dict.fromkeys(everything):
        if pu and kind in ("thumb", "silence"):
            continue
        where = torch.from_numpy(np.flatnonzero(kinds == kind))
        loss = answers.losses(kind, rows, picked[where], values[where])
        sums[kind] = loss.detach().sum()
        total = total + (loss * rows.weight_N[picked[where]]).sum()
    summed = world.add(torch.stack(list(sums.values()))) if sums else ()
    stats = {f"loss/{kind}": float(s) / int((everything == kind).sum()) for kind, s in zip(sums, summed, strict=True)}
    if pu:
        named: dict[str, Tensor] = {}
        for name, mask in (
            ("up", (kinds == "thumb") & (rows.said_N[picked].cpu().numpy() > 0.5)),
            ("down", (kinds == "thumb") & (rows.said_N[picked].cpu().numpy() <= 0.5)),
            ("silent", kinds == "silence"),
        ):
            where = torch.from_numpy(np.flatnonzero(mask))
            named[name] = answers.thumb_logit(values[where, 0], rows.user_N[picked[where]])
        if count := sum(len(part) for part in named.values()):
            risk = answers.unlabelled(named)
            stats["loss/unlabelled"] = float(risk.detach())
            total = total + risk * count
    loss = total / weight.clamp(min=1e-9)
    if world.leads and (answers.variance is not None or hasattr(answers, "mistakes")):
        loss = loss + answers.penalty()
    if world.leads and latent.penalty is not None:
        loss = loss + latent.penalty()
    return loss, stats


def starting_effects(train: Packed, users: int, share: float) -> tuple[np.ndarray, float]:
    """Return where people's effects start, and their variance under a model that knows nothing of the outputs."""
    _, user, seen = train.thumbs_of_people()
    weight = np.where(seen > 0.5, 1.0, 1 / share)
    count = np.bincount(user, weights=weight, minlength=users)
    rate = np.bincount(user, weights=weight * seen, minlength=users) / np.maximum(count, 1e-9)
    base = min(max(float((weight * seen).sum() / weight.sum()), 1e-3), 1 - 1e-3)
    start = np.where(count > 0, plove.start_effects(count, rate, base), 0.0)
    _, variance = plove.fit_effects(np.full(len(seen), math.log(base / (1 - base))), seen, user, weight)
    return start, variance
