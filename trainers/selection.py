"""Best of N, rejection sampling, and data mined from what was selected: the default use of a reward of people's taste.

N candidates of a prompt, scored by a reward r, the highest kept. Nothing is trained. What a larger N would bring, and
what a judge that does not rank makes of it, is read from the candidates at hand.

    reward of the best of n   E[max of n] = sum_i C(i-1, n-1) / C(N, n) r_(i),   r_(1) <= ... <= r_(N)
    a judge's of the same     E[j of the best of n] = sum_i C(i-1, n-1) / C(N, n) j_[i],   [i] in the order of r
    distance to the model     KL(best of n || model) <= log n - (n - 1) / n
    rejection sampling        KL(accepted || model) = -log P(accept)

Both sums run over all subsets of n of the N candidates, so they are unbiased and use every candidate.

Where this differs from the papers:
1. The KL of best of n is stated as the upper bound that it is (Beirami et al. 2024); for outputs of which no two are
   alike it is an equality.
2. Equal scores are broken by the place in the file, the first one wins, and prompts whose best is shared are counted.

Sources: Stiennon et al. (arXiv 2009.01325), best of n and its KL; Nakano et al. (arXiv 2112.09332), the estimator;
Gao, Schulman, Hilton (arXiv 2210.10760), a gold reward beside the proxy; Beirami et al. (arXiv 2401.01879), the bound.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from align.config import PanelConfig, RewardConfig
from align.errors import ConfigError, DataError, RewardError
from align.feedback.overview import plain
from align.groupstats import bootstrap_mean
from align.registry import suggest
from align.scoretable import Row, read_scores
from align.seeding import uniform
from align.tracking import replace_text
from align.types import Scores
from rewards.compose import allowed_missing, worst_missing
from rewards.panel import Panel
from rewards.scoring import score_sources
from trainers.advantages import group_advantages
from trainers.candidates import Candidate, Candidates

PAIRS = ("best-worst", "best-random", "all")
COVERED = 0.9
"""Share of the prompts that must have n candidates for the curve to reach n."""


# --- order statistics -------------------------------------------------------------------------------


@cache
def best_of_weights(count: int, n: int) -> np.ndarray:
    """Return the chance of each of `count` candidates, the lowest score first, to be the best of n of them, `[count]`.

    `w_i = C(i-1, n-1) / C(count, n)`: candidate i is the best of the subsets that it makes with lower ones.

    Raises:
        ConfigError: n outside of 1..count.
    """
    if not 1 <= n <= count:
        raise ConfigError("The best of n needs n candidates", why=f"n {n}, {count} candidates")
    weights = np.zeros(count)
    weights[-1] = n / count
    for i in range(count - 1, n - 1, -1):  # C(i-1, n-1) = C(i, n-1) (i - n + 1) / i
        weights[i - 1] = weights[i] * (i - n + 1) / i
    weights.flags.writeable = False
    return weights


def expected_best(score_N: np.ndarray, n: int, of_N: np.ndarray | None = None) -> float:
    """Return the mean, over all n of the N candidates, of the best one's score; or of what `of_N` says of that one.

    Equal scores: the first candidate is the better one.
    """
    score = np.asarray(score_N, dtype=np.float64)
    values = score if of_N is None else np.asarray(of_N, dtype=np.float64)
    return float(best_of_weights(len(score), n) @ values[best_first(score)[::-1]])


def kl_bound(n: int) -> float:
    """Return the upper bound `log n - (n - 1) / n` of the KL divergence of the best of n from the model, in nats."""
    return math.log(n) - (n - 1) / n


def best_first(score_N: np.ndarray) -> np.ndarray:
    """Return places from the highest score to the lowest, the first of equal ones first; missing ones are left out."""
    score = np.asarray(score_N, dtype=np.float64)
    there = np.flatnonzero(np.isfinite(score))
    return there[np.argsort(-score[there], kind="stable")]


# --- one number a candidate -------------------------------------------------------------------------


def combined(panel: Panel, scores: Scores, group_B: Sequence[int]) -> np.ndarray:
    """Return one number a candidate `[B]`, NaN where a component is missing, from the scores of whole prompts.

    One component, or combine.mode weighted_sum, min or gate: what `Panel.total` says, in the reward's units. Several
    under sum_of_advantages or gdpo: the weighted sum of each component's z-score within the prompt, as in training.
    Prompts may have any number of candidates: short ones are filled up with missing ones, which no statistic sees.
    """
    groups = _members(group_B)
    widest = max(map(len, groups))
    places = np.full((len(groups), widest), -1)
    for g, members in enumerate(groups):
        places[g, : len(members)] = members
    flat = places.reshape(-1)
    values, valid = scores.values[flat].copy(), scores.valid[flat] & (flat >= 0)[:, None]
    values[flat < 0] = np.nan
    padded = Scores(values, valid, scores.names)
    mode = panel.combined.mode
    if len(panel.names) > 1 and mode in ("sum_of_advantages", "gdpo"):
        ready = panel.transformed(padded, widest)
        whole = ready.valid.all(1)
        total = np.zeros(len(flat))
        if widest > 1:
            total = group_advantages(ready, widest, panel.weights, mode=mode, clip=None).values.reshape(-1)
        total = np.where(whole, total, np.nan)
    else:
        total = panel.total(padded, widest)
    found = np.full(len(scores), np.nan)
    found[flat[flat >= 0]] = total[flat >= 0]
    return found


def _members(group_B: Sequence[int]) -> list[np.ndarray]:
    """Return the places of each prompt's candidates, in file order."""
    group = np.asarray(group_B)
    order = np.argsort(group, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(group[order])) + 1)


# --- what is selected -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """Which candidates are kept: those from the threshold up, and of them the best.

    Args:
        best: most of each prompt.
        share: most of each prompt as a share of its scored candidates, one at least; with `across`, of all candidates.
        threshold: least score; None is none.
        across: rank all candidates together. Only for scores that mean the same for every prompt.
    """

    best: int | None = None
    share: float | None = None
    threshold: float | None = None
    across: bool = False

    def __post_init__(self) -> None:
        if self.best is not None and self.share is not None:
            raise ConfigError("The best of a prompt are a number or a share", do="Give best or share")
        if self.across and self.share is None:
            raise ConfigError("Ranking across prompts is of a share", do="Give share too")

    def keep(self, score_B: np.ndarray, group_B: Sequence[int]) -> np.ndarray:
        """Return which candidates are kept, bool `[B]`; a missing score is not."""
        score = np.asarray(score_B, dtype=np.float64)
        kept = np.zeros(len(score), bool)
        for members in [np.arange(len(score))] if self.across else _members(group_B):
            order = members[best_first(score[members])]
            most = len(order)
            if self.best is not None:
                most = self.best
            elif self.share is not None:
                most = max(1, math.floor(self.share * len(order) + 1e-9))
            kept[order[:most]] = True
        return kept & (score >= self.threshold) if self.threshold is not None else kept


def mine_pairs(
    score_B: np.ndarray, group_B: Sequence[int], content_B: Sequence[str], how: str = "best-worst", *,
    margin: float = 0.0, seed: int = 0,
) -> tuple[list[tuple[int, int, float]], Counter[str]]:  # fmt: skip
    """Return (chosen, rejected, margin) by place, margins above `margin`, and how many pairs were left out and why.

    Args:
        how: "best-worst", "best-random" (one other of the prompt, drawn by a hash) or "all" pairs of a prompt.
        content_B: what is the same content makes no pair, nor what is empty, "", which trainers on pairs refuse.

    Raises:
        ConfigError: an unknown way.
    """
    if how not in PAIRS:
        raise ConfigError(f"There is no way {how!r} to make pairs", do=suggest(how, PAIRS))
    score = np.asarray(score_B, dtype=np.float64)
    found: list[tuple[int, int, float]] = []
    left: Counter[str] = Counter()
    for g, members in enumerate(_members(group_B)):
        order = [int(i) for i in members[best_first(score[members])]]
        if len(order) < 2:
            left["prompts with fewer than two scores"] += 1
            continue
        if how == "all":
            pairs: Iterable[tuple[int, int]] = combinations(order, 2)
        elif how == "best-worst":
            pairs = [(order[0], next(i for i in order if score[i] == score[order[-1]]))]
        else:
            pairs = [(order[0], order[1 + int(uniform(seed, "pair", g) * (len(order) - 1))])]
        for chosen, rejected in pairs:
            gap = float(score[chosen] - score[rejected])
            if gap <= max(margin, 0.0):
                left["ties" if gap == 0 else "margins too small"] += 1
            elif content_B[chosen] == content_B[rejected]:
                left["two of the same content"] += 1
            elif not (content_B[chosen] and content_B[rejected]):
                left["with an empty answer"] += 1
            else:
                found.append((chosen, rejected, gap))
    return found, left


def label(score_B: np.ndarray, up_from: float, down_to: float | None = None) -> np.ndarray:
    """Return 1 for scores from `up_from`, 0 for those up to `down_to` (below `up_from` when None), else NaN, `[B]`.

    Raises:
        ConfigError: bounds that cross.
    """
    if down_to is not None and not down_to < up_from:
        raise ConfigError("Thumbs down end below thumbs up", why=f"down to {down_to:g}, up from {up_from:g}")
    score = np.asarray(score_B, dtype=np.float64)
    down = score < up_from if down_to is None else score <= down_to
    return np.where(score >= up_from, 1.0, np.where(down, 0.0, np.nan))


# --- what n buys ------------------------------------------------------------------------------------


def curve(
    score_B: np.ndarray, group_B: Sequence[int], judges: Mapping[str, np.ndarray] = {}, *, seed: int = 0
) -> dict[str, Any]:  # fmt: skip
    """Return the expected score of the best of n, n from 1 up, and each judge's of the same candidates.

    The same prompts stand behind every n: those that have as many candidates as the last n asks for, which at least
    `COVERED` of them do. Candidates that anyone's score is missing of are left out.

    Returns:
        n_max, prompts and prompts_left_out, points (n, kl_bound, reward and judges with 95 % intervals by prompt), and
        for each judge its gain from 1 to n_max, the n at which it is highest, its change from there to n_max, and
        `over_optimised`: that change's interval lies below 0.
    """
    columns = {"reward": np.asarray(score_B, dtype=np.float64), **judges}
    there = np.isfinite(np.stack(list(columns.values()))).all(0)
    groups = [members[there[members]] for members in _members(group_B)]
    sizes = np.array([len(members) for members in groups])
    scored = np.sort(sizes[sizes > 0])
    if not len(scored):
        return {"n_max": 0, "prompts": 0, "prompts_left_out": len(groups), "points": [], "judges": {}}
    n_max = int(scored[math.floor((1 - COVERED) * len(scored) + 1e-9)])
    used = [members for members in groups if len(members) >= n_max]
    steps = list(range(1, n_max + 1)) if n_max <= 16 else sorted({2**i for i in range(n_max.bit_length())} | {n_max})
    values = {
        name: np.array([[expected_best(columns["reward"][m], n, column[m]) for m in used] for n in steps])
        for name, column in columns.items()
    }
    points = []
    for i, n in enumerate(steps):
        told = {name: bootstrap_mean(v[i], seed=seed).as_dict() for name, v in values.items()}
        reward = told.pop("reward")
        points.append({"n": n, "kl_bound": kl_bound(n), "reward": reward, "judges": told})
    found: dict[str, Any] = {"n_max": n_max, "prompts": len(used), "prompts_left_out": len(groups) - len(used)}
    verdicts = {}
    for name in judges:
        mean = values[name].mean(1)
        peak = int(mean.argmax())
        after = bootstrap_mean(values[name][-1] - values[name][peak], seed=seed)
        verdicts[name] = {
            "gain": bootstrap_mean(values[name][-1] - values[name][0], seed=seed).as_dict(), "peak": steps[peak],
            "after_peak": after.as_dict(), "over_optimised": bool(peak < len(steps) - 1 and after.ci_high < 0),
        }  # fmt: skip
    return {**found, "points": points, "judges": verdicts}


# --- the verb ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mining:
    """What is written besides the selected rows.

    Args:
        pairs: one of `PAIRS`; None writes none.
        margin: least difference of the scores of a pair, which must be larger.
        up_from, down_to: of thumbs, see `label`; None writes none.
    """

    pairs: str | None = None
    margin: float = 0.0
    up_from: float | None = None
    down_to: float | None = None


def select(
    candidates: Candidates, out: str | Path = "selection", *, panel: PanelConfig | None = None, by: str | None = None,
    judges: Sequence[str] = (), rule: Rule = Rule(best=1), mining: Mining = Mining(), batch_size: int = 32,
    seed: int = 0, overwrite: bool = False, progress: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Score candidates, keep the best, mine pairs and thumbs, and say what best of n is worth.

    Scores go to `<out>/scores.jsonl` with a journal beside it, so that the same call goes on where it was stopped; the
    other files are replaced as a whole: selected.jsonl (prompt, completion or image, score: rows for sft), pairs.jsonl
    (prompt, chosen, rejected, margin: dpo), thumbs.jsonl (prompt, completion or image, label, score: kto and bco),
    selection.json.

    Args:
        panel: rewards, judges and how rewards combine; None takes the scores that the candidates come with.
        by: of those, the component to rank by; needed where there are several.
        judges: of those, components that only look on. With a panel its heldout_rewards do.

    Returns:
        what selection.json holds: counts, what was selected, mined and left out, the curve, files.

    Raises:
        ConfigError: nothing to rank by.
        DataError: thumbs that are all of one kind.
        RewardError: more scores missing than combine.max_fail_frac.
    """
    out = Path(out)
    if panel is not None:
        score, told, about = _scores_of_panel(candidates, panel, out, batch_size, overwrite, progress)
    else:
        score, told, about = _scores_of_table(candidates, by, judges)
    group, messages = candidates.groups(), about.pop("messages")
    kept = rule.keep(score, group)
    if not kept.any():
        raise DataError(
            "Nothing was selected", where=candidates.source,
            why=f"of {int(np.isfinite(score).sum())} scores the highest is {np.nanmax(score):.4g}",
            do="Lower the threshold",
        )  # fmt: skip
    found: dict[str, Any] = {
        "source": candidates.source, "kind": "images" if candidates.images else "texts", **about,
        "candidates": len(score), "prompts": max(group) + 1, "missing": int((~np.isfinite(score)).sum()),
        "errors": [m for m, _ in Counter(filter(None, messages)).most_common(3)],
        "policies": candidates.policies, **_selected(score, group, kept, told, rule, seed),
    }  # fmt: skip
    files = {"selected.jsonl": [_chosen(candidates.rows[i], score[i], out) for i in np.flatnonzero(kept)]}
    if mining.pairs is not None:
        files["pairs.jsonl"], found["pairs"] = _pair_rows(candidates, score, group, mining, seed, out)
    if mining.up_from is not None:
        files["thumbs.jsonl"], found["thumbs"] = _thumb_rows(candidates, score, mining, out)
    found["curve"] = curve(score, group, told, seed=seed)
    out.mkdir(parents=True, exist_ok=True)
    for stale in {"pairs.jsonl", "thumbs.jsonl"} - files.keys():
        (out / stale).unlink(missing_ok=True)  # of an earlier selection
    for name, rows in files.items():
        replace_text(out / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    found["files"] = {name: len(rows) for name, rows in files.items()}
    found["examples"] = _examples(candidates, score, told, group)
    replace_text(out / "selection.json", json.dumps(plain(found), indent=1, ensure_ascii=False) + "\n")
    return plain(found)


def _scores_of_panel(
    candidates: Candidates, config: PanelConfig, out: Path, batch_size: int, overwrite: bool, progress: bool
) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, Any]]:
    """Score with the rewards and the judges, each into a table of its own: the two may name components alike."""
    sources = [row.source() for row in candidates.rows]
    tables: dict[str, tuple[Panel, Scores]] = {}
    for name, part in (("scores", config.rewards), ("judges", config.heldout_rewards)):
        if not part:
            continue
        panel = Panel.build(part, config.combine)
        told = score_sources(
            panel.rewards, sources, out / f"{name}.jsonl", batch_size=batch_size, overwrite=overwrite, progress=progress
        )
        tables[name] = panel, _table_scores(panel, read_scores(told["out"]))
    panel, scores = tables["scores"]
    for name, (_, found) in tables.items():
        _require_scored(found, config, str(out / f"{name}.jsonl"))
    score = combined(panel, scores, candidates.groups())
    judged = {}
    if "judges" in tables:
        seen = tables["judges"][1]
        judged = {f"{n} (judge)" if n in panel.names else n: seen.column(n) for n in seen.names}
    several = len(panel.names) > 1 and config.combine.mode in ("sum_of_advantages", "gdpo")
    about = {
        "by": " + ".join(f"{w:g} {n}" if w != 1 else n for n, w in zip(panel.names, panel.weights, strict=True)),
        "unit": "weighted z-scores within a prompt" if several else "units of the reward",
        "rewards": panel.describe(), "judged_by": tables["judges"][0].describe() if judged else [],
        "messages": list(scores.errors),
    }  # fmt: skip
    return score, judged, about


def _table_scores(panel: Panel, rows: Sequence[Row]) -> Scores:
    """Return the panel's components of the rows of a table of scores."""
    values = np.array([[np.nan if row[n] is None else row[n] for n in panel.names] for row in rows], dtype=np.float64)
    return Scores(values, np.isfinite(values), panel.names, tuple(str(row.get("error") or "") for row in rows))


def _require_scored(scores: Scores, config: PanelConfig, where: str) -> None:
    worst, share = worst_missing(scores)
    allowed = allowed_missing(config.combine.missing, config.combine.max_fail_frac)
    if share > allowed:
        messages = list(dict.fromkeys(filter(None, scores.errors)))[:3]
        raise RewardError(
            "Too many candidates could not be scored", where=where,
            why=f"{scores.names[worst]} is missing for {int((~scores.valid[:, worst]).sum())} of {len(scores)}, "
            f"{allowed:.0%} may be; {' | '.join(messages) or 'no message was given'}",
            do="Mend the reward and start again, what was scored is kept; or raise combine.max_fail_frac",
        )  # fmt: skip


def _scores_of_table(
    candidates: Candidates, by: str | None, judges: Sequence[str]
) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, Any]]:
    names = tuple(candidates.scores)
    if not names:
        raise ConfigError(
            "There is nothing to rank the candidates by", where=candidates.source, why="no scores stand beside them",
            do="Name a reward with --reward or --config, or give a table that `align score` wrote",
        )  # fmt: skip
    ranked = [name for name in names if name not in judges]
    if by is None and len(ranked) != 1:
        raise ConfigError(
            "Which score are the candidates ranked by", where=candidates.source, why=f"it has {', '.join(names)}",
            do="Name one with --by",
        )  # fmt: skip
    for name in (by, *judges):
        if name is not None and name not in names:
            raise ConfigError(f"The table has no score {name!r}", where=candidates.source, do=suggest(name, names))
    columns = {n: np.array([np.nan if v is None else v for v in candidates.scores[n]]) for n in names}
    chosen = by if by is not None else ranked[0]
    if not np.isfinite(columns[chosen]).any():
        raise RewardError("Not one candidate has a score", where=candidates.source, why=chosen)
    about = {"by": chosen, "unit": "units of the reward", "rewards": [], "judged_by": [], "messages": candidates.errors}
    return columns[chosen], {name: columns[name] for name in judges}, about


def _selected(
    score: np.ndarray, group: Sequence[int], kept: np.ndarray, told: Mapping[str, np.ndarray], rule: Rule, seed: int
) -> dict[str, Any]:
    """Return how many were kept of how many prompts, ties, the scores of what was kept, the distance to the model."""
    groups = _members(group)
    scored = [members[np.isfinite(score[members])] for members in groups]
    some = [members for members in scored if len(members)]
    ties = sum(int((score[m] == score[m].max()).sum() > 1) for m in some)
    accepted = np.array([kept[m].mean() for m in some])
    clusters = np.asarray(group)
    every = np.isfinite(score)
    columns = {"score": score, **told}
    if rule.best == 1 and rule.threshold is None:
        kl = {"bound": True, "nats": float(np.mean([kl_bound(len(m)) for m in some]))}
    else:
        kl = {"bound": False, "nats": float(np.mean(-np.log(accepted[accepted > 0])))}
    return {
        "selected": int(kept.sum()), "prompts_with_none": int((np.array([kept[m].any() for m in groups]) == 0).sum()),
        "prompts_without_scores": len(groups) - len(some), "prompts_whose_best_is_shared": ties,
        "acceptance": float(kept[every].mean()), "kl": kl,
        "mean": {
            name: {
                "candidates": bootstrap_mean(np.where(every, v, np.nan), clusters, seed=seed).as_dict(),
                "selected": bootstrap_mean(np.where(kept, v, np.nan), clusters, seed=seed).as_dict(),
            }
            for name, v in columns.items()
        },
    }  # fmt: skip


def _chosen(row: Candidate, score: float, out: Path) -> dict[str, Any]:
    return {"prompt": row.prompt, _field(row): row.given(out), "score": float(score), **row.carried()}


def _field(row: Candidate) -> str:
    return "image" if isinstance(row.output, Path) else "completion"


def _pair_rows(
    candidates: Candidates, score: np.ndarray, group: Sequence[int], mining: Mining, seed: int, out: Path
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    rows = candidates.rows
    pairs, left = mine_pairs(
        score, group, [row.content for row in rows], str(mining.pairs), margin=mining.margin, seed=seed
    )
    if not pairs:
        raise DataError(
            "No pair was found", where=candidates.source, why=", ".join(f"{n} {why}" for why, n in left.items()),
            do="Lower the margin, or sample more candidates of each prompt",
        )  # fmt: skip
    margins = [margin for *_, margin in pairs]
    about = {
        "how": mining.pairs, "least_margin": mining.margin, "n": len(pairs),
        "prompts": len({group[i] for i, *_ in pairs}), "left_out": dict(left),
        "margin_mean": float(np.mean(margins)), "margin_median": float(np.median(margins)),
    }  # fmt: skip
    return [
        {"prompt": rows[i].prompt, "chosen": rows[i].given(out), "rejected": rows[j].given(out), "margin": margin,
         **rows[i].carried()}
        for i, j, margin in pairs
    ], about  # fmt: skip


def _thumb_rows(
    candidates: Candidates, score: np.ndarray, mining: Mining, out: Path
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    said = label(score, float(mining.up_from or 0.0), mining.down_to)
    up, down = int((said == 1).sum()), int((said == 0).sum())
    if not (up and down):
        low, middle, high = np.nanquantile(score, (0.1, 0.5, 0.9))
        raise DataError(
            f"There is no thumb {'down' if up else 'up'}", where=candidates.source,
            why=f"{up} up and {down} down; nine in ten scores lie from {low:.4g} up, half above {middle:.4g}, "
            f"one in ten above {high:.4g}",
            do="Move the bounds; kto and bco learn from the difference",
        )  # fmt: skip
    about = {
        "up_from": mining.up_from, "down_to": mining.down_to, "up": up, "down": down,
        "between": int((np.isnan(said) & np.isfinite(score)).sum()),
    }  # fmt: skip
    return [
        {"prompt": row.prompt, _field(row): row.given(out), "label": bool(said[i]), "score": float(score[i]),
         **row.carried()}
        for i, row in enumerate(candidates.rows) if np.isfinite(said[i])
    ], about  # fmt: skip


def _examples(
    candidates: Candidates, score: np.ndarray, told: Mapping[str, np.ndarray], group: Sequence[int], count: int = 6
) -> list[dict[str, Any]]:
    """Return the best and the worst of a few prompts, those with the widest spread of scores, for the page."""
    found = []
    for members in _members(group):
        order = members[best_first(score[members])]
        if len(order) > 1 and score[order[0]] > score[order[-1]]:
            found.append((float(score[order[0]] - score[order[-1]]), int(order[0]), int(order[-1])))

    def shown(i: int) -> dict[str, Any]:
        row = candidates.rows[i]
        output = str(row.output) if not isinstance(row.output, list) else row.output[-1].get("content")
        return {"output": output, "score": float(score[i]), "judges": {n: float(v[i]) for n, v in told.items()}}

    return [
        {"prompt": candidates.rows[i].source().prompt, "best": shown(i), "worst": shown(j)}
        for _, i, j in sorted(found, reverse=True)[:count]
    ]


def panel_of(rewards: Sequence[str], judges: Sequence[str], config: PanelConfig | None) -> PanelConfig | None:
    """Return the panel of names and of a configuration together; None where neither names a reward."""
    named = [RewardConfig(name=name) for name in rewards]
    if not named and config is None:
        return None
    given = config or PanelConfig(rewards=tuple(named))
    return PanelConfig(
        rewards=(*named, *(config.rewards if config else ())), combine=given.combine,
        heldout_rewards=(*(RewardConfig(name=name) for name in judges), *given.heldout_rewards),
    )  # fmt: skip
