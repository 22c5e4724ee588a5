"""Selecting from candidates: scored, the best kept, pairs and thumbs mined, in files that the trainers read.

The order statistics and what they say of best of n are in `trainers.best_of`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from align.config import PanelConfig, RewardConfig
from align.errors import ConfigError, DataError, RewardError
from align.feedback.overview import plain
from align.groupstats import bootstrap_mean
from align.registry import suggest
from align.scoretable import Row, read_scores
from align.tracking import replace_text
from align.types import Scores
from rewards.compose import allowed_missing, worst_missing
from rewards.panel import Panel
from rewards.scoring import score_sources
from trainers.best_of import Rule, best_first, combined, curve, kl_bound, label, mine_pairs, prompt_members
from trainers.candidates import Candidate, Candidates


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
    selection.json. Pairs and thumbs of an earlier selection that this one does not mine are removed, and said to be.

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
    stale = [name for name in ("pairs.jsonl", "thumbs.jsonl") if name not in files and (out / name).is_file()]
    for name in stale:
        (out / name).unlink()
    found |= {"removed": stale} if stale else {}
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
    groups = prompt_members(group)
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
    for members in prompt_members(group):
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
