"""`align demo`: the whole loop on the embedded digits, from what people say to a receipt.

People who like bold digits, which is written down nowhere, meet what the model draws, through the real page and the
real endpoint. Everything after that sees their answers alone. Each chapter is one command on data of one's own, and
prints it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import ConfigError
from align.output import (
    HACKED,
    add_dry_run,
    add_json,
    add_out,
    add_overrides,
    add_overwrite,
    add_seed,
    dry,
    give,
    positive,
)

if TYPE_CHECKING:
    import numpy as np

    from align.config import VisualConfig
    from align.feedback.events import Item

RATERS, RATED_PROMPTS, RANKED_AT_ONCE = 6, 10, 4
SHOWN = 12
"""Images on the page that people liked most and least."""
JUDGED = 3
"""Images of each held-out prompt, before and after, that people judge."""
REACTIONS = {"shown_per_user": 40, "reaction_rate": 0.1, "annoyed": 0.5, "user_spread": 0.8}
_QUESTION = "How do you like it?"


@dataclass(frozen=True)
class Taste:
    """What the simulated people like, in standard deviations of the ink of the images that were drawn first."""

    mean: float
    spread: float

    def of(self, image: bytes) -> float:
        """Return how much one image pleases."""
        return (ink(image) - self.mean) / self.spread


def ink(image: bytes) -> float:
    """Return the mean brightness of an image file, in [0, 1]."""
    import numpy as np

    from align.errors import DataError
    from align.images import decode_image

    pixels, problem = decode_image(image)
    if pixels is None:
        raise DataError("An image cannot be read", why=problem)
    return float(np.asarray(pixels).mean()) / 255


class Demo:
    """The chapters in order; each leaves its files and what it found in `story.json`, and is not told again.

    Args:
        folder: where everything goes.
        seed: of all draws.
        users, images: how many people thumb, and how many images of each prompt are drawn for them.
        overrides: changes to `digits/demo`.
        say: is told what happens.
    """

    def __init__(
        self, folder: Path, *, seed: int, users: int, images: int, overrides: Sequence[str],
        say: Callable[[str], object],
    ) -> None:  # fmt: skip
        from align.config import load_config
        from trainers.evaluation import resolve_prompts

        self.folder, self.seed, self.users, self.images, self.say = folder, seed, users, images, say
        place = folder.absolute()  # so that what configs name is found from wherever the run is gone on with
        paths = [f"rewards.0.args.path={place / 'reward'}", f"heldout_rewards.0.args.path={place / 'jury'}"]
        self.config: VisualConfig = load_config("digits/demo", [*paths, f"seed={seed}", *overrides])
        self.asked, self.heldout = (list(side.asked) for side in resolve_prompts(self.config))
        self.found: dict[str, Any] = {"asked": {"seed": seed, "users": users, "images": images, "set": [*overrides]}}
        self.found["chapters"] = 0

    def tell(self) -> dict[str, Any]:
        """Go through all chapters, and return what `summary.json` says."""
        began = time.monotonic()
        chapters = (
            ("people look, and say little", self.collect), ("what the answers are worth", self.audit),
            ("a reward from thumbs", self.fit), ("training", self.train),
            ("people judge before and after", self.judge), ("what moved", self.sparsity),
        )  # fmt: skip
        story = self.folder / "story.json"
        if story.is_file():
            self.found |= json.loads(story.read_text(encoding="utf-8"))
        for i, (title, chapter) in enumerate(chapters, start=1):
            self.say(f"{i}/{len(chapters)} {title}")
            if i > self.found["chapters"]:
                self.found |= {**chapter(), "chapters": i}
                _write(story, self.found)
        from align.reports.demo import write_index
        from align.run import peak_memory_mb

        summary = json.loads((self.folder / "run" / "summary.json").read_text(encoding="utf-8"))
        summary |= {
            **{key: self.found[key] for key in ("taste_gain", "legibility_points", "win_rate", "reward_vs_taste")},
            "cpu_seconds": time.process_time(), "seconds": time.monotonic() - began, "peak_memory_mb": peak_memory_mb(),
        }  # fmt: skip
        _write(self.folder / "summary.json", summary)
        write_index(self.folder)
        return summary

    def collect(self) -> dict[str, Any]:
        """Draw images, let people thumb, rate and rank some of them, and let a jury of other people thumb."""
        import numpy as np

        from align.feedback.events import Item

        drawn = self._draw(self.config.model.path, self.asked, self.images, "drawn", self.seed)
        items = [Item(row["prompt"], row["image"], media="image", metadata={"policy": "base"}) for row in drawn]
        inks = np.array([ink((self.folder / row["image"]).read_bytes()) for row in drawn])
        taste = Taste(float(inks.mean()), float(inks.std()))
        liked = {item.id: (value - taste.mean) / taste.spread for item, value in zip(items, inks, strict=True)}
        some = [row for row in drawn if row["prompt"] in self.asked[:RATED_PROMPTS] and row["member"] < 4]
        people, jury = self.folder / "feedback.db", self.folder / "jury.db"
        for file in (*self.folder.glob("feedback.db*"), *self.folder.glob("jury.db*")):
            file.unlink()
        rate = self._task("rate", "rating", some, annotators_per_item=3)
        rank = self._task("rank", "ranking", some, annotators_per_item=2, k=RANKED_AT_ONCE)
        self.say("  align feedback serve rate.yaml --store feedback.db      (and rank.yaml)")
        rng = np.random.default_rng(self.seed)
        shown, thumbs = self._thumbs(rate, people, items, liked, seed=self.seed)
        self._visit(rate, people, taste, rng)
        self._visit(rank, people, taste, rng)
        self._thumbs(rate, jury, items, liked, seed=self.seed + 1)
        return {
            "taste": {"mean": taste.mean, "spread": taste.spread}, "shown": shown, "thumbs": thumbs,
            **_said(people, items),
        }  # fmt: skip

    def audit(self) -> dict[str, Any]:
        """Say what the answers are worth, and how far ratings and rankings agree."""
        from align.reports.feedback import write_report

        self.say("  align feedback report feedback.db")
        _, found = write_report(self.folder / "feedback.db", self.folder / "feedback.html", draws=500, seed=self.seed)
        return {"consistency": found["consistency"]}

    def fit(self) -> dict[str, Any]:
        """Fit the reward to people's thumbs, and another to those of the jury, which is never trained on."""
        import numpy as np
        from scipy.stats import spearmanr

        from align.config import load_config
        from align.feedback.store import Store
        from align.reports.training import write_report
        from rewards import get_reward
        from rewards.fit import fit_reward
        from rewards.on_feedback import score_outputs

        said = {}
        for name, store in (("reward", "feedback.db"), ("jury", "jury.db")):
            self.say(f"  align fit fit/digits data.paths=[{store}] data.protocols=[thumb] --out {name}")
            given = [f"data.paths=[{self.folder.absolute() / store}]", "data.protocols=[thumb]", f"name={name}"]
            fitted = fit_reward(load_config("fit/digits", [*given, f"seed={self.seed}"]), self.folder / name)
            _go_on(fitted.status)
            write_report(self.folder / name)
            said[f"{name}_auroc"] = fitted.card["heldout"]["thumbs"]["auroc"]
        with Store.open(self.folder / "feedback.db") as store:
            items = store.items()
        scored = score_outputs(
            get_reward("fitted", path=self.folder / "reward"), items, dict.fromkeys(items, self.folder)
        )
        values = np.array([scored[0].value[name] for name in items])
        taste = self._taste()
        pleased = np.array([taste.of((self.folder / str(item.response)).read_bytes()) for item in items.values()])
        chosen = np.random.default_rng(self.seed).permutation(len(items))[:150]
        points = [[float(pleased[i]), float(values[i])] for i in chosen]
        return {**said, "points": points, "reward_vs_taste": float(spearmanr(pleased, values).statistic)}

    def train(self) -> dict[str, Any]:
        """Train on the reward and on legibility, while the jury and another judge of legibility watch."""
        from align.reports.training import write_report
        from trainers import trainer_for

        self.say("  align train digits/demo rewards.0.args.path=reward heldout_rewards.0.args.path=jury --out run")
        result = trainer_for(self.config, out=self.folder / "run").train()
        _go_on(result.status)
        write_report(result.directory)
        return {"status": result.status, **self._measured()}

    def judge(self) -> dict[str, Any]:
        """Let people rate and compare images of before and after, of the same prompts and noise."""
        import numpy as np

        from align.feedback.overview import plain
        from align.feedback.store import Store
        from align.feedback.views import wins_of
        from align.feedback.winrate import both_protocols

        for file in self.folder.glob("judged.db*"):
            file.unlink()
        asked, seed = self.heldout, self.seed + 1_000_000
        rows = self._draw(self.config.model.path, asked, JUDGED, "before", seed)
        rows += self._draw(self.folder / "run", asked, JUDGED, "after", seed)
        store, rng = self.folder / "judged.db", np.random.default_rng(seed)
        self.say("  align sample run; align feedback serve ...; align feedback winrate judged.db")
        for name, kind in (("judge_rate", "rating"), ("judge_pairs", "pairwise")):
            self._visit(self._task(name, kind, rows), store, self._taste(), rng)
        with Store.open(store) as opened:
            rated, ranked, _ = wins_of(opened.current(), opened.items(), "after", "before")
        return {"win_rate": plain(both_protocols(rated, ranked)), "judged_prompts": len(asked)}

    def sparsity(self) -> dict[str, Any]:
        """Measure which weights moved, beside what rounding alone would show."""
        self.say("  align sparsity compare MODEL run")
        return {"sparsity": json.loads((self.folder / "run" / "sparsity.json").read_text(encoding="utf-8"))}

    def _draw(self, source: Any, prompts: Sequence[str], count: int, name: str, seed: int) -> list[dict[str, Any]]:
        from align.tracking import read_jsonl
        from trainers import sample_images

        self.say(f"  align sample {source} --count {count} --out {name}")
        folder = sample_images(source, list(prompts), count=count, out=self.folder / name, seed=seed)
        policy = "base" if name == "drawn" else name
        rows = read_jsonl(folder / "samples.jsonl")[0]
        return [
            {"prompt": row["prompt"], "image": f"{name}/{row['image']}", "member": row["member"], "policy": policy}
            for row in rows
        ]

    def _task(self, name: str, kind: str, rows: Sequence[Mapping[str, Any]], **more: Any) -> Path:
        file = self.folder / f"{name}.yaml"
        lines = [json.dumps({key: row[key] for key in ("prompt", "image", "policy")}) for row in rows]
        (self.folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        _write(file, {"name": name, "kind": kind, "data": f"{name}.jsonl", "question": _QUESTION, **more})
        return file

    def _taste(self) -> Taste:
        return Taste(**self.found["taste"])

    def _thumbs(
        self, task: Path, store: Path, items: Sequence[Item], liked: Mapping[str, float], *, seed: int
    ) -> tuple[int, int]:
        """Have users see images and say what they think of few; return how many were shown, and thumbs."""
        from align.feedback.crowd import post_events, served
        from align.feedback.simulate import SimulationConfig, simulate_reactions

        prompts = dict.fromkeys(item.prompt for item in items)
        by_prompt = [[item.id for item in items if item.prompt == prompt] for prompt in prompts]
        world = SimulationConfig(users=self.users, seed=seed, **REACTIONS)
        events = sorted(simulate_reactions(by_prompt, liked, world)[0], key=lambda event: event.ts)
        known = {item.id: item for item in items}
        with served(task, store) as address:
            kinds = [event.kind for event in post_events(address, store, known, events, "base")]
        return kinds.count("exposure"), kinds.count("binary")

    def _visit(self, task: Path, store: Path, taste: Taste, rng: np.random.Generator) -> None:
        """Have raters answer everything that a task asks, by what they see."""
        from align.feedback.crowd import Visitor, served
        from align.feedback.tasks import load_task

        kind = load_task(task).config.kind
        severity = rng.normal(0, 0.4, RATERS)
        with served(task, store) as address, contextlib.ExitStack() as people:
            visitors = [Visitor(address, f"rater {i}") for i in range(RATERS)]
            for visitor in visitors:
                people.callback(visitor.leave)
            busy = list(enumerate(visitors))
            while busy:
                for who in list(busy):
                    seen = [taste.of(who[1].look(item)) for item in who[1].screen()]
                    if seen:
                        who[1].answer(**_answer(kind, seen, float(severity[who[0]]), rng))
                    else:
                        busy.remove(who)

    def _measured(self) -> dict[str, Any]:
        """Return what the hidden taste and legibility came to on held-out samples with the same noise, paired."""
        import numpy as np

        from align.groupstats import bootstrap_mean
        from trainers.evaluation import read_rows

        files = sorted((self.folder / "run" / "evaluations").glob("step_*.jsonl"))
        first, last = read_rows(files[0]), read_rows(files[-1])
        prompts = np.asarray(last.prompts)

        def change(name: str, unit: float) -> dict[str, Any]:
            return bootstrap_mean((last.values[name] - last.before(first, name)) / unit, prompts).as_dict()

        return {
            "taste_gain": change("meter/brightness", self.found["taste"]["spread"]),
            "legibility_points": change("heldout/accuracy", 0.01),
        }


def _go_on(status: str) -> None:
    """End here where what was asked to stop has stopped, so that the chapter is told whole the next time."""
    if status == "stopped":
        raise KeyboardInterrupt


def _said(store: Path, items: Sequence[Item]) -> dict[str, Any]:
    """Return how many thumbs were up, and the images that got more of one kind than of the other, the most first."""
    from align.feedback.store import Store

    votes = dict.fromkeys((item.id for item in items), 0)
    with Store.open(store) as opened:
        thumbs = [event for event in opened.current() if event.kind == "binary"]
    for event in thumbs:
        votes[event.items[0]] += 1 if event.value else -1
    ranked = sorted(items, key=lambda item: votes[item.id])
    return {
        "up": sum(event.value is True for event in thumbs),
        "least_liked": [item.response for item in ranked[:SHOWN]],
        "most_liked": [item.response for item in ranked[: -SHOWN - 1 : -1]],
    }


def _answer(kind: str, seen: Sequence[float], severity: float, rng: np.random.Generator) -> dict[str, str]:
    """Return the fields of one answer, by how much each image pleases: a rating, a choice (Davidson), or ranks."""
    import numpy as np

    if kind == "rating":
        return {"d0": str(int(np.clip(round(4 + 1.3 * seen[0] + severity + rng.normal(0, 0.65)), 1, 7)))}
    if kind == "pairwise":
        gap = 2 * (seen[0] - seen[1])
        odds = np.array([np.exp(gap / 2), 0.6, np.exp(-gap / 2)])
        return {"choice": ("a", "tie", "b")[rng.choice(3, p=odds / odds.sum())]}
    worth = 2 * np.array(seen) + rng.gumbel(size=len(seen))
    return {f"r{i}": str(1 + int((worth > value).sum())) for i, value in enumerate(worth)}


def _write(path: Path, document: Mapping[str, Any]) -> None:
    from align.tracking import replace_text

    replace_text(path, json.dumps(document, indent=1, default=str) + "\n")


def _require_folder(folder: Path, asked: Mapping[str, Any], *, overwrite: bool) -> bool:
    """Refuse a folder that is not empty and does not hold this very demo; return whether it is to be replaced.

    Another demo, or a run, is replaced where that is asked for.
    """
    marker = folder / "demo.json"
    if overwrite and (marker.is_file() or (folder / "run.json").is_file()):
        return True
    if marker.is_file() and json.loads(marker.read_text(encoding="utf-8")) != asked:
        raise ConfigError(
            "This folder holds another demo", where=str(folder), do="Add --overwrite, or choose another --out"
        )
    if not marker.is_file() and folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(
            "The folder is not empty and holds no demo", where=str(folder), do="Remove it, or choose another --out"
        )
    return False


def demo(options: argparse.Namespace) -> int:
    """Tell the whole story, or say what it would be."""
    folder = options.out or Path("runs/demo")
    call = {"seed": options.seed or 0, "users": options.users, "images": options.images, "set": options.overrides}
    told = Demo(
        folder, seed=call["seed"], users=options.users, images=options.images, overrides=options.overrides,
        say=lambda text: sys.stderr.write(f"{text}\n"),
    )  # fmt: skip
    replaced = _require_folder(folder, call, overwrite=options.overwrite)
    if options.dry_run:
        return dry(options, "align the embedded digits with people's thumbs", {**call, "out": str(folder)})
    if replaced:
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "demo.json", call)
    summary = told.tell()
    gain, wins = summary["taste_gain"], summary["win_rate"]
    lines = (
        f"what people like: {gain['mean']:+.2f} [{gain['ci_low']:+.2f}, {gain['ci_high']:+.2f}] standard deviations, "
        "which training never saw",
        f"win rate: {wins['ratings']['rate']:.0%} by ratings, {wins['rankings']['rate']:.0%} by comparisons",
        f"legibility: {summary['legibility_points']['mean']:+.1f} points",
        f"page: {folder / 'report.html'}",
    )
    give(options, summary, "\n".join(lines))
    return HACKED if summary["status"] == "hacked" else 0


def demo_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `align demo`."""
    add_out(parser, "everything (default: runs/demo)")
    add_seed(parser)
    parser.add_argument("--users", type=positive, default=200, metavar="N", help="people who thumb (default: 200)")
    parser.add_argument(
        "--each",
        dest="images",
        type=positive,
        default=40,
        metavar="N",
        help="images of each prompt for them (default: 40)",
    )
    add_overwrite(parser, "begin anew what stands in the folder")
    add_overrides(parser, "steps=40; the recipe is digits/demo")
    add_dry_run(parser)
    add_json(parser)
