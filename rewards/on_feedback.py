"""Rewards on feedback: what they are worth on thumbs, comparisons, rankings and ratings, and what else they go by.

    thumbs        AUROC, average precision; as a probability Brier, debiased ECE with its interval, reliability curve
    comparisons   share of pairs that a reward orders as people did, ties calibrated
    rankings      the same over all pairs, and Kendall's tau-b
    ratings       Spearman, over everything and within prompts

A sample without a score is left out of a measure and counted, never taken for 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from align.errors import ConfigError, DataError
from align.feedback.events import Item
from align.fit_config import FitConfig
from align.seeding import uniform
from rewards.base import Reward, score_safely
from rewards.chats import completion_text
from rewards.evaluate import (
    auroc,
    average_precision,
    compare_under_protocols,
    cross_calibrated,
    kendall,
    mean_interval,
    pair_accuracy,
    probability_report,
    rank_correlation,
    signed_pairs,
)
from rewards.fit_data import FitData, Observation, load_data
from rewards.fit_split import split_rows
from rewards.fitted import Fitted, calibrated
from rewards.outputs import TEXTS, load_outputs, require_images
from rewards.probes import probe_brightness, probe_length, probe_prompts

AT_ONCE = 64
PROBED = 256
"""Outputs that probes are made on, whole prompts of them."""

Probability = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Scored:
    """What one component of a reward says of outputs.

    Args:
        value: by the output's id; what has no score is not there.
        reward, component: where the values come from.
        probability: makes the probability of a thumb up of values; None where the reward says none.
        missing: reasons of what has no score, with counts.
    """

    name: str
    value: Mapping[str, float]
    reward: Reward
    component: int = 0
    probability: Probability | None = None
    missing: Counter[str] = field(default_factory=Counter)


def score_outputs(
    reward: Reward, items: Mapping[str, Item], folders: Mapping[str, Path] | None = None, *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Scored]:  # fmt: skip
    """Return what each component of a reward says of outputs.

    Of a reward that `align fit` fitted the values are the latent score, with its calibration as the probability.

    Args:
        folders: where paths of images begin, by item.

    Raises:
        DataError: images that are not there.
    """
    probability: Probability | None = None
    if isinstance(reward, Fitted):
        reward, calibration = reward.latent(), reward.calibration
        probability = None if calibration is None else lambda values: calibrated(values, calibration)
    folders, names = folders or {}, list(items)
    require_images(list(items.values()), folders)  # what is missing is said before anything is scored
    value: list[dict[str, float]] = [{} for _ in reward.names]
    missing: list[Counter[str]] = [Counter() for _ in reward.names]
    for start in range(0, len(names), AT_ONCE):
        part = names[start : start + AT_ONCE]
        for ids, scores in _scores(reward, part, items, folders):
            for row, name in enumerate(ids):
                for k in range(len(reward.names)):
                    if scores is not None and scores.valid[row, k]:
                        value[k][name] = float(scores.values[row, k])
                    else:
                        missing[k]["an image that cannot be read" if scores is None else scores.errors[row]] += 1
        progress(min(start + AT_ONCE, len(names)), len(names))
    return [
        Scored(name, value[k], reward, k, probability if k == 0 else None, missing[k])
        for k, name in enumerate(reward.names)
    ]


def _scores(reward: Reward, ids: Sequence[str], items: Mapping[str, Item], folders: Mapping[str, Path]) -> Any:
    """Yield (ids, scores) of a part; None for scores where an image cannot be read."""
    try:
        samples = load_outputs([items[name] for name in ids], folders)
    except DataError:
        if len(ids) == 1:
            yield ids, None
            return
        for name in ids:
            yield from _scores(reward, [name], items, folders)
        return
    yield ids, score_safely(reward, samples)


def by_protocol(
    rows: Sequence[Observation], value: Mapping[str, float], probability: Probability | None = None
) -> dict[str, Any]:
    """Return measures of each protocol over the rows whose outputs all have a value, and how many have none.

    Args:
        probability: of a thumb up, from values; without it a probability is fitted across halves of the people or
            prompts, and `calibration` says so.
    """
    kept = [row for row in rows if all(np.isfinite(value.get(name, np.nan)) for name in row.items)]
    found: dict[str, Any] = {}
    for kind, measure in _MEASURES.items():
        mine = [row for row in kept if row.kind == kind]
        if mine:
            found[f"{kind}s"] = measure(mine, value, probability)
        left = sum(row.kind == kind for row in rows) - len(mine)
        if left:
            found.setdefault(f"{kind}s", {"n": 0})["without_score"] = left
    return found


def _thumbs(rows: Sequence[Observation], value: Mapping[str, float], probability: Probability | None) -> dict[str, Any]:
    score = np.array([value[row.items[0]] for row in rows])
    seen = np.array([float(row.value) for row in rows])
    cluster = [row.user or row.prompt for row in rows]
    if probability is not None:
        return {**probability_report(probability(score), seen, cluster), "calibration": "its own"}
    plain = {
        "n": len(seen), "base_rate": float(seen.mean()), "auroc": auroc(score, seen),
        "auprc": average_precision(score, seen),
    }  # fmt: skip
    try:
        said = cross_calibrated(score, seen, cluster)
    except DataError as error:
        return {**plain, "calibration": f"none: {error}"}
    # A slope below 0 would turn a score that goes the wrong way round: discrimination is that of the score itself.
    return {**probability_report(said, seen, cluster), **plain, "calibration": "fitted on the other half"}


def _compared(rows: Sequence[Observation], value: Mapping[str, float], probability: Any) -> dict[str, Any]:
    pairs = signed_pairs(rows)["rankings"]
    delta = np.array([value[a] - value[b] for a, b, _, _ in pairs])
    return asdict(pair_accuracy(delta, np.array([p[2] for p in pairs]), [p[3] for p in pairs]))


def _ranked(rows: Sequence[Observation], value: Mapping[str, float], probability: Any) -> dict[str, Any]:
    taus = [kendall([value[name] for name in row.items], row.value) for row in rows]
    mean, ci = mean_interval(taus, [row.prompt for row in rows])
    return {
        **_compared(rows, value, probability), "rankings": len(rows), "kendall": mean, "kendall_ci": list(ci),
    }  # fmt: skip


def _rated(rows: Sequence[Observation], value: Mapping[str, float], probability: Any) -> dict[str, Any]:
    score = np.array([value[row.items[0]] for row in rows])
    level = np.array([float(row.value[0]) for row in rows])
    return rank_correlation(score, level, [row.prompt for row in rows])


_MEASURES = {"thumb": _thumbs, "comparison": _compared, "ranking": _ranked, "rating": _rated}


def probes(scored: Scored, items: Mapping[str, Item], folders: Mapping[str, Path], rows: Sequence[Observation]) -> Any:
    """Return what else a reward goes by, over outputs of whole prompts drawn by a hash, `PROBED` of them or a few more.

    Length (of texts), brightness (of images), and prompts (whether another prompt would score the same).
    """
    found: dict[str, Any] = {}
    by_prompt: dict[str, list[str]] = {}
    for name, item in items.items():
        if name in scored.value:
            by_prompt.setdefault(item.prompt_id, []).append(name)
    chosen: list[str] = []
    for prompt in sorted(by_prompt, key=lambda p: uniform(0, "probe", p)):
        if len(chosen) >= PROBED:
            break
        chosen += by_prompt[prompt]
    if not chosen:
        return found
    samples = load_outputs([items[name] for name in chosen], folders)
    if samples.texts is not None:
        texts = [completion_text(text) for text in samples.texts]
        found["length"] = probe_length(np.array([scored.value[name] for name in chosen]), texts)
    else:
        found["brightness"] = probe_brightness(scored.reward, samples, component=scored.component)
    whole_chats = samples.texts is not None and not all(isinstance(text, str) for text in samples.texts)
    if len(set(samples.prompts)) > 1 and not whole_chats:  # a chat brings its own prompt
        place = {name: i for i, name in enumerate(chosen)}
        said = [pair for pairs in signed_pairs(rows).values() for pair in pairs]
        pairs = [(place[a], place[b], sign) for a, b, sign, _ in said if a in place and b in place]
        found["prompts"] = probe_prompts(scored.reward, samples, component=scored.component, pairs=pairs)
    return found


def feedback_for_fit(
    config: FitConfig, card: Mapping[str, Any], path: str | None = None, told: Mapping[str, Any] | None = None
) -> tuple[FitData, str]:
    """Return feedback that a fit has not seen, and which it is.

    Its own held-out rows where `path` is None or a file that it was trained on, the held-out part too of one that bears
    a training file's name and has changed since, as a store that people go on writing to; else all rows of `path`.
    Accounts that the fit left out as coordinated are left out here.

    Args:
        card: of the fit.
        told: keys of `data` to be changed for another file, such as `folder`.

    Raises:
        ConfigError: `told` without another file.
        DataError: data of the fit that changed since, or is gone.
    """
    known, other = card["data"]["hashes"], config.split.heldout_path
    every = config.data if "time" in config.split.by else config.data.model_copy(update={"protocols": None})
    config = config.model_copy(update={"data": every})
    if path is not None:
        data = load_data([path], config.data.model_copy(update={"paths": (path,), "folder": None, **(told or {})}))
        seen = set(data.hashes.values()) & {d for name, d in known.items() if other is None or name != Path(other).name}
        if (
            not seen
            and Path(path).name in {Path(name).name for name in config.data.paths}
            and "time" not in config.split.by
        ):
            return _heldout(data, config, card, "the held-out part of a file that changed since the fit")
        if not seen:
            return data, "all rows"
        if told:
            raise ConfigError(
                "These are the fit's own rows, read as the fit read them", where=", ".join(told), do="Leave them out"
            )
        if len(config.data.paths) > 1:
            data = load_data(config.data.paths, config.data)
    elif told:
        raise ConfigError(
            "A fit's own rows are read as the fit read them", where=", ".join(told), do="Give --data FILE"
        )
    elif other is not None:
        data = load_data([other], config.data)
    else:
        data = load_data(config.data.paths, config.data)
    changed = [name for name, digest in data.hashes.items() if digest not in known.values()]
    if changed:
        raise DataError(
            "The data of the fit changed since", where=", ".join(changed), why="its hash is not the one in the card",
            do="Give --data, with answers that the fit did not see",
        )  # fmt: skip
    if path is None and other is not None:
        return data, "the held-out file of the fit"
    return _heldout(data, config, card, "the rows that the fit held out")


def _heldout(data: FitData, config: FitConfig, card: Mapping[str, Any], part: str) -> tuple[FitData, str]:
    gone = {row["account"] for row in card.get("trimmed_users", ()) if config.users.trim == "auto"}
    parts, _ = split_rows(data.rows, config.split, config.seed)
    rows = [data.rows[i] for i in parts["heldout"]]
    data.rows = [row for row in rows if row.user not in gone]
    if left := len(rows) - len(data.rows):
        part += f", without {left} of accounts that it left out"
    return data, part


def evaluate_rewards(
    rewards: Sequence[Reward], data: FitData, *, progress: Callable[[int, int], None] = lambda done, total: None,
    probed: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Return what rewards are worth on feedback, and, of two or more, how they compare under both protocols.

    Args:
        data: of `rewards.fit_data.load_data`.
        probed: whether to look for what else they go by, which scores up to `PROBED` outputs several times more.

    Returns:
        data, rewards (a list, a component each), and under_both_protocols (None unless there are two rewards, and
        pairs of ratings and of rankings).

    Raises:
        ConfigError: two rewards of one name, or of other media than the data.
        DataError: nothing that a reward could be measured on.
    """
    named = {name for row in data.rows for name in row.items}
    items = {name: item for name, item in data.items.items() if name in named}
    kinds = {"text" if item.media in TEXTS else item.media for item in items.values()}
    for reward in rewards:
        if reward.card.media not in ("any", *kinds):
            raise ConfigError(
                f"The reward {reward.names[0]!r} scores {reward.card.media}s", why=f"the data is of {', '.join(kinds)}s"
            )
    columns: list[Scored] = []
    for reward in rewards:
        columns += score_outputs(reward, items, data.folders, progress=progress)
    names = Counter(scored.name for scored in columns)
    if twice := [name for name, n in names.items() if n > 1]:
        raise ConfigError(f"Two rewards are called {twice[0]!r}", do="Leave one out, or fit one under another `name`")
    found = []
    for scored in columns:
        if not scored.value:
            reason = next(iter(scored.missing), "no outputs")
            raise DataError(f"The reward {scored.name!r} scored nothing", why=reason)
        found.append({
            "name": scored.name, "definition": scored.reward.card.definition, "identity": scored.reward.identity(),
            "scored": len(scored.value), "missing": dict(scored.missing.most_common(8)),
            **by_protocol(data.rows, scored.value, scored.probability),
            "probes": probes(scored, items, data.folders, data.rows) if probed else {},
        })  # fmt: skip
    compared = None
    if len(columns) > 1 and all(signed_pairs(data.rows).values()):
        compared = compare_under_protocols({s.name: s.value for s in columns}, data.rows)
    return {
        "data": {
            "hashes": data.hashes, "observations": data.counts(), "outputs": len(items),
            "prompts": len({row.prompt for row in data.rows}), "people": len({r.user for r in data.rows} - {""}),
            "notes": {k: n for k, n in (data.notes + data.left_out).items() if n},
        },
        "rewards": found,
        "under_both_protocols": compared,
    }  # fmt: skip
