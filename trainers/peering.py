"""Ratings against rankings, end to end: a reward of each protocol, what each selects, and who wins under which.

    the same outputs, rated and ranked --> how far the two agree            consistency, ties and flips apart
                                       --> a reward fitted to each          the same model, split and steps
                                       --> both measured on both protocols  pairs of prompts held out from both
    candidates --> the best of n by each reward, and one at random          against one baseline output a prompt
               --> win rates under ratings and under rankings               n, wins, ties, losses, intervals

Where this differs from the paper (Bansal, Dang, Grover 2024, "Peering Through Preferences", arXiv 2308.15812):
1. The rewards are linear on frozen embeddings by default, not a 7B classifier; any backbone of `align fit` will do.
2. The baseline is one of the model's own outputs, drawn or named, and kept out of the candidates; theirs was another
   model's.
3. Ties of rankings are part of the likelihood; the paper left them out. Ratings are ordinal; theirs were squared errors
   of a sigmoid (objective.ratings: sigmoid).
4. A policy that selects at random is played too: what it wins is what selecting wins for nothing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from align.config import anchored
from align.errors import DataError
from align.feedback.bias import spearman
from align.feedback.consistency import consistency
from align.feedback.events import FeedbackEvent, Item
from align.feedback.overview import plain
from align.feedback.protocol_world import ProtocolWorld
from align.feedback.protocols import PairRow, to_pairs
from align.feedback.store import Store
from align.feedback.views import joined_of, model_of, of_key, one_rating, signed_pairs, text_of
from align.feedback.winrate import both_protocols
from align.groupstats import bootstrap_mean
from align.peering_config import PROTOCOLS, SIMULATED, PeeringConfig, fit_config_of, require_peering
from align.run import claim_directory
from align.scoretable import read_scores
from align.seeding import uniform
from align.tracking import replace_text
from rewards.base import get_reward
from rewards.evaluate import pair_accuracy
from rewards.fit import fit_reward
from rewards.fit_data import load_data, read_said
from rewards.fit_split import split_rows
from rewards.outputs import require_images, sample_of
from rewards.scoring import score_sources
from rewards.sources import Source
from trainers.best_of import best_first, curve
from trainers.candidates import read_candidates

RANDOM = "random"


@dataclass
class Outputs:
    """Outputs by id, where images are, and what people said of them."""

    items: dict[str, Item] = field(default_factory=dict)
    folders: dict[str, Path] = field(default_factory=dict)
    events: list[FeedbackEvent] = field(default_factory=list)


Asked = Callable[[str, str], tuple[float | None, float | None]]
"""Two outputs to how the first did, 1 a win, .5 a tie, 0 a loss: by their ratings, and by a comparison."""


@dataclass(frozen=True)
class PeeringResult:
    """What a run left: its folder, how it ended, and what it found."""

    directory: Path
    status: str
    found: dict[str, Any]


def peer(
    config: PeeringConfig, out: str | Path | None = None, *, overwrite: bool = False, progress: bool = False
) -> PeeringResult:
    """Run all of it into a folder, going on with what an earlier call of the same configuration left there.

    The folder then holds ratings/ and rankings/ (runs of `align fit`), their scores of the candidates, picks.jsonl
    (what was selected, as data of an annotation task) and peering.json.

    Raises:
        ConfigError: a config that contradicts itself, or a folder that is another run's.
        DataError: no ratings, no rankings, or nothing to select from on held-out prompts.
    """
    require_peering(config)
    config = anchored(config)
    directory = Path(out) if out is not None else Path("runs") / config.name
    claim_directory(directory, config, overwrite=overwrite)
    world = _simulated(config, directory) if config.data.paths == (SIMULATED,) else None
    paths = (str(directory / "feedback.db"),) if world else config.data.paths
    train, heldout = split_prompts(config, paths)
    rewards = {}
    for name in PROTOCOLS:
        fitted = fit_reward(fit_config_of(config, name, paths), directory / name)
        if fitted.status == "stopped":
            return PeeringResult(directory, "stopped", {})
        rewards[name] = get_reward("fitted", path=str(directory / name), output="score")
    said = read_outputs(paths, config)
    found: dict[str, Any] = {"name": config.name, "simulated": world is not None, "seed": config.seed}
    joined = joined_of(said.events, said.items, key=config.data.key, ratings_key=config.data.ratings_key)
    found["consistency"] = consistency(joined, seed=config.seed)

    def score(outputs: Outputs, names: Sequence[str], where: str) -> dict[str, np.ndarray]:
        sources = [_source(outputs, name) for name in names]
        told = {}
        for kind, reward in rewards.items():
            table = directory / f"{where}_{kind}.jsonl"
            score_sources([reward], sources, table, batch_size=256, progress=progress)
            rows = read_scores(table)
            told[kind] = np.array([np.nan if r[reward.names[0]] is None else r[reward.names[0]] for r in rows])
        return told

    found["accuracy"] = _accuracy(said, heldout, config, lambda names: score(said, names, "heldout"))
    pool = _pool(config, said, train, heldout, world)
    names = list(pool.items)
    scores = score(pool, names, "candidates")
    picks = pick(pool, scores, config)
    more = read_outputs(config.selection.answers, config).events if config.selection.answers else []
    ask = _ask_world(world) if world else ask_events([*said.events, *more], config.data.key, config.data.ratings_key)
    found["selection"] = play(picks, ask)
    found["selection"] |= _what_was_picked(pool, picks, scores, world)
    write_picks(directory / "picks.jsonl", pool, picks)
    replace_text(directory / "peering.json", json.dumps(plain(found), indent=1, ensure_ascii=False) + "\n")
    return PeeringResult(directory, "complete", plain(found))


# --- data and fits ----------------------------------------------------------------------------------


def _simulated(config: PeeringConfig, directory: Path) -> ProtocolWorld:
    """Draw the world, and write its store as if it were anybody's; drawn again, it is the same."""
    told = config.world
    world = ProtocolWorld(
        density_in_ratings=told.density_in_ratings, density_in_rankings=told.density_in_rankings, raters=told.raters,
        rating_noise=told.rating_noise, first_place=told.first_place, seed=config.seed,
    )  # fmt: skip
    items = world.answers(told.prompts, told.responses)
    events = world.events(items)
    path = directory / "feedback.db"
    if not path.is_file():
        writing = directory / "writing.db"
        writing.unlink(missing_ok=True)
        with Store.open(writing) as store:
            store.add(items, events)
        writing.replace(path)
    return world


def split_prompts(config: PeeringConfig, paths: Sequence[str]) -> tuple[set[str], set[str]]:
    """Return the prompts that the rewards were fitted on, and those held out from both: a prompt's part is its hash's.

    Raises:
        DataError: one of the two protocols is not there, ratings are of several keys, or an image is missing.
    """
    fit = fit_config_of(config, "both", tuple(paths))
    loaded = load_data(paths, fit.data)
    kinds = loaded.counts()
    for name, protocols in PROTOCOLS.items():
        if not any(kinds.get(kind) for kind in protocols):
            raise DataError(
                f"There are no {name}", where=", ".join(paths), why=", ".join(f"{n} {k}s" for k, n in kinds.items()),
                do="Rate and rank the same outputs, see `align feedback serve`",
            )  # fmt: skip
    data = config.data
    one_rating(
        read_outputs(paths, config).events, data.key if data.ratings_key is None else data.ratings_key,
        do="Choose one with data.key, or with data.ratings_key where rankings have another",
    )  # fmt: skip
    require_images([loaded.items[name] for row in loaded.rows for name in row.items], loaded.folders)
    parts, _ = split_rows(loaded.rows, fit.split, config.seed)
    train, heldout = ({loaded.rows[i].prompt for i in parts[part]} for part in ("train", "heldout"))
    return train, heldout


def read_outputs(paths: Iterable[str], config: PeeringConfig) -> Outputs:
    """Read the outputs and the events of stores and files."""
    found = Outputs()
    for name in paths:
        items, events, _ = read_said(Path(name), config.data.media)
        found.items |= items
        found.folders |= dict.fromkeys(items, Path(config.data.folder) if config.data.folder else Path(name).parent)
        found.events += events
    return found


def _source(outputs: Outputs, name: str) -> Source:
    item = outputs.items[name]
    prompt, response = sample_of(item)
    if item.media == "image":
        return Source(prompt, outputs.folders[name] / str(response))
    return Source(prompt, None, response)


# --- both rewards under both protocols --------------------------------------------------------------


def _accuracy(
    said: Outputs, heldout: set[str], config: PeeringConfig, score: Callable[[Sequence[str]], Mapping[str, np.ndarray]]
) -> dict[str, Any]:
    """Return how often each reward agrees with each protocol, on pairs of held-out prompts."""
    rows: dict[str, list[PairRow]] = {}
    for protocol, kinds in (("ratings", ("ordinal",)), ("rankings", ("pairwise", "ranking"))):
        asked = config.data.key, config.data.ratings_key
        events = [e for e in said.events if e.kind in kinds and of_key(e, *asked)]
        pairs = to_pairs(events, said.items, ties="keep", duplicates="last").rows
        rows[protocol] = [p for p in pairs if said.items[p.chosen].prompt_id in heldout]
    names = sorted({name for part in rows.values() for pair in part for name in (pair.chosen, pair.rejected)})
    place = {name: i for i, name in enumerate(names)}
    found: dict[str, Any] = {}
    for reward, values in score(names).items():
        for protocol, pairs in rows.items():
            if not pairs:
                raise DataError(
                    f"No {protocol} are of held-out prompts", why=f"{len(heldout)} prompts are held out",
                    do="Raise data.heldout, or collect more",
                )  # fmt: skip
            delta = np.array([values[place[p.chosen]] - values[place[p.rejected]] for p in pairs])
            there = np.isfinite(delta)
            told = np.array([0 if p.tie else 1 for p in pairs])[there]
            clusters = np.array([said.items[p.chosen].prompt_id for p in pairs])[there]
            right = asdict(pair_accuracy(delta[there], told, clusters, seed=config.seed))
            found.setdefault(reward, {})[protocol] = {**right, "missing": int((~there).sum())}
    return found


# --- best of n --------------------------------------------------------------------------------------


def _pool(
    config: PeeringConfig, said: Outputs, train: set[str], heldout: set[str], world: ProtocolWorld | None
) -> Outputs:
    """Return the candidates: the world's new ones, a file's, or the outputs of held-out prompts."""
    if world is not None:
        told = config.world
        items = world.answers(told.selected_prompts, told.candidates, first=told.prompts)
        return Outputs({item.id: item for item in items})
    if config.selection.candidates is None:
        return Outputs({n: i for n, i in said.items.items() if i.prompt_id in heldout}, said.folders)
    found = Outputs()
    read = read_candidates(config.selection.candidates)
    base = Path(read.source).parent
    left = 0
    for row in read.rows:
        media = "image" if read.images else "text"
        response = str(row.output.relative_to(base)) if read.images else row.output
        item = Item(row.prompt, response, media=media, metadata={"policy": str(row.fields.get("policy", ""))})
        left += item.prompt_id in train
        if item.prompt_id not in train:
            found.items[item.id], found.folders[item.id] = item, base
    if not found.items:
        raise DataError(
            "No candidate is left", where=read.source, why=f"{left} are of prompts that the rewards were fitted on",
            do="Sample other prompts, or those that are held out",
        )  # fmt: skip
    return found


def pick(pool: Outputs, scores: Mapping[str, np.ndarray], config: PeeringConfig) -> dict[str, dict[str, str]]:
    """Return for each prompt its baseline, and the best of the other candidates by each reward and at random.

    Raises:
        DataError: no prompt with a baseline and two candidates.
    """
    groups: dict[str, list[int]] = {}
    names = list(pool.items)
    for i, name in enumerate(names):
        groups.setdefault(pool.items[name].prompt_id, []).append(i)
    found: dict[str, dict[str, str]] = {}
    wanted = config.selection.baseline
    for prompt, members in groups.items():
        ours = [i for i in members if wanted is None or model_of(pool.items[names[i]]) == wanted]
        if not ours or len(members) < 3:
            continue
        baseline = ours[int(uniform(config.seed, "baseline", prompt) * len(ours))]
        rest = np.array([i for i in members if i != baseline])
        best = {kind: best_first(values[rest]) for kind, values in scores.items()}
        if any(not len(order) for order in best.values()):
            continue
        chosen = {kind: names[rest[order[0]]] for kind, order in best.items()}
        chosen[RANDOM] = names[rest[int(uniform(config.seed, RANDOM, prompt) * len(rest))]]
        found[prompt] = {"baseline": names[baseline], **chosen}
    if not found:
        raise DataError(
            "There is nothing to select from", where=config.selection.candidates or "held-out prompts",
            why=f"none of {len(groups)} prompts has a baseline and two more candidates",
            do="Sample more candidates of each prompt, or check selection.baseline",
        )  # fmt: skip
    return found


def _ask_world(world: ProtocolWorld) -> Asked:
    """One simulated annotator rates both outputs, another compares them in both orders."""

    def ask(a: str, b: str) -> tuple[float | None, float | None]:
        rater = int(world.rng.integers(len(world.severity)))
        rated = float(np.sign(world.rate(a, rater) - world.rate(b, rater)) + 1) / 2
        return rated, {"a": 1.0, "tie": 0.5, "b": 0.0}[world.compare(a, b)]

    return ask


def ask_events(events: Iterable[FeedbackEvent], key: str | None, ratings_key: str | None = None) -> Asked:
    """Look answers up: mean ratings of the two outputs, and the mean of what comparisons of the two said."""
    rated: dict[str, list[float]] = {}
    compared: dict[tuple[str, str], list[float]] = {}
    for event in events:
        if not of_key(event, key, ratings_key):
            continue
        if event.kind == "ordinal":
            rated.setdefault(event.items[0], []).append(float(event.value))
        for a, b, sign in signed_pairs(event):
            compared.setdefault((a, b), []).append((sign + 1) / 2)
            compared.setdefault((b, a), []).append((1 - sign) / 2)

    def ask(a: str, b: str) -> tuple[float | None, float | None]:
        by_rating = None
        if a in rated and b in rated:
            by_rating = float(np.sign(np.mean(rated[a]) - np.mean(rated[b])) + 1) / 2
        return by_rating, float(np.mean(compared[a, b])) if (a, b) in compared else None

    return ask


def play(picks: Mapping[str, Mapping[str, str]], ask: Asked) -> dict[str, Any]:
    """Return what each selection wins against the baseline, by ratings and by rankings, and what beyond a random one.

    `beyond_random` is paired: the difference to the random selection on the prompts that have both, so that a baseline
    which happens to be weak or strong counts for neither.
    """
    games = {
        who: _wins(((p, chosen[who], chosen["baseline"]) for p, chosen in picks.items()), ask)
        for who in (*PROTOCOLS, RANDOM)
    }
    table = {who: {**both_protocols(*won), "beyond_random": _beyond(won, games[RANDOM])} for who, won in games.items()}
    del table[RANDOM]["beyond_random"]
    differ = _wins(((p, c["ratings"], c["rankings"]) for p, c in picks.items() if c["ratings"] != c["rankings"]), ask)
    against = both_protocols(*differ)
    return {"prompts": len(picks), "against_baseline": table, "ratings_against_rankings": against}


Wins = tuple[dict[str, float], dict[str, float]]


def _wins(games: Iterable[tuple[str, str, str]], ask: Asked) -> Wins:
    by_rating, by_ranking = {}, {}
    for prompt, ours, theirs in games:
        rated, ranked = ask(ours, theirs)
        if rated is not None:
            by_rating[prompt] = rated
        if ranked is not None:
            by_ranking[prompt] = ranked
    return by_rating, by_ranking


def _beyond(won: Wins, random: Wins) -> dict[str, Any]:
    found = {}
    for protocol, ours, theirs in zip(PROTOCOLS, won, random, strict=True):
        shared = sorted(ours.keys() & theirs.keys())
        found[protocol] = bootstrap_mean(np.array([ours[p] - theirs[p] for p in shared])).as_dict()
    return found


def _what_was_picked(
    pool: Outputs, picks: Mapping[str, Mapping[str, str]], scores: Mapping[str, np.ndarray], world: ProtocolWorld | None
) -> dict[str, Any]:
    """Return sizes, overlap and lengths of what was picked, expected rewards over n, and of a world the truth."""
    names = list(pool.items)
    known: dict[str, int] = {}
    group = [known.setdefault(item.prompt_id, len(known)) for item in pool.items.values()]
    sizes = np.bincount(group)
    found: dict[str, Any] = {
        "candidates": len(names), "of_each": [int(sizes.min()), int(sizes.max())],
        "overlap": float(np.mean([c["ratings"] == c["rankings"] for c in picks.values()])),
        "curves": {
            kind: curve(values, group, {other: scores[other] for other in scores if other != kind})
            for kind, values in scores.items()
        },
    }  # fmt: skip
    who = ("baseline", RANDOM, *PROTOCOLS)
    if all(item.media == "text" for item in pool.items.values()):
        words = {w: [len(text_of(pool.items[c[w]]).split()) for c in picks.values()] for w in who}
        found["words"] = {w: bootstrap_mean(np.array(n, dtype=float)).as_dict() for w, n in words.items()}
    if world is not None:
        tastes = world.tastes(names)
        found["recovery"] = {
            kind: {taste: spearman(values, truth) for taste, truth in tastes.items()} for kind, values in scores.items()
        }
        found["truth"] = {
            w: {
                taste: bootstrap_mean(world.tastes([c[w] for c in picks.values()])[taste]).as_dict() for taste in tastes
            }
            for w in who
        }
    return found


def write_picks(path: Path, pool: Outputs, picks: Mapping[str, Mapping[str, str]]) -> None:
    """Write what was selected as data of an annotation task: a row an output, an output once a prompt.

    Images are copied beside it under the paths they have, so that their ids stay what they were.
    """
    rows, folder = [], path.parent.resolve()
    for chosen in picks.values():
        by_output: dict[str, list[str]] = {}
        for who, name in chosen.items():
            by_output.setdefault(name, []).append(who)
        for name, pickers in by_output.items():
            item = pool.items[name]
            output = "image" if item.media == "image" else "response"
            copy = (folder / item.response).resolve() if output == "image" else folder
            if copy != folder and copy.is_relative_to(folder):
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(pool.folders[name] / item.response, copy)
            rows.append({"prompt": item.prompt, output: item.response, "picked_by": ", ".join(pickers)})
    replace_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
