"""From sparse thumbs to a policy: users who like bold digits, whose taste is never shown to training.

    python scripts/taste.py --out FOLDER [--json FILE] [--seed N]

1. The embedded model draws digits; simulated users see some and say little. Each has an effect of their own, silence is
   not at random, and what they like, the ink, is hidden. Exposures and thumbs go into a feedback store.
2. `align fit fit/digits` fits a reward to that store.
3. `align train digits/taste` trains on that reward and on legibility, under the hack monitor.
4. Held-out samples of before and after, with the same noise, say what the hidden taste gained, in standard deviations
   of the images the users saw, and how much less often the held-out judge reads the asked digit, in points.

What is done is not done again. Exit code 1 where the taste did not rise, or legibility fell by more than a point.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from align.config import load_config
from align.feedback.events import Item
from align.feedback.simulate import SimulationConfig, simulate_reactions
from align.feedback.store import Store
from align.groupstats import Estimate, bootstrap_mean
from align.images import decode_image
from align.reports.training import write_report
from align.tracking import read_jsonl
from rewards.fit import fit_reward
from trainers import sample_images, trainer_for
from trainers.evaluation import read_rows, resolve_prompts

IMAGES_A_PROMPT = 40
USERS = {"users": 200, "shown_per_user": 40, "reaction_rate": 0.1, "annoyed": 0.5, "user_spread": 0.8}
MOST_POINTS = 1.0


def collect(folder: Path, model: str, prompts: Sequence[str], seed: int) -> dict[str, float]:
    """Have users look at samples of the model, and keep in a store what they see and say; return the taste's scale."""
    images, scale = folder / "images", folder / "taste.json"
    if scale.is_file():
        return json.loads(scale.read_text(encoding="utf-8"))
    sample_images(model, list(prompts), count=IMAGES_A_PROMPT, out=images, seed=seed)
    rows = read_jsonl(images / "samples.jsonl")[0]
    items = [Item(row["prompt"], f"images/{row['image']}", media="image") for row in rows]
    pixels = [np.asarray(decode_image((images / row["image"]).read_bytes())[0]) for row in rows]
    ink = np.array([image.mean() / 255 for image in pixels])
    mean, spread = float(ink.mean()), float(ink.std())
    taste = {item.id: (value - mean) / spread for item, value in zip(items, ink, strict=True)}
    by_prompt = [[item.id for item in items if item.prompt == prompt] for prompt in prompts]
    events, _ = simulate_reactions(by_prompt, taste, SimulationConfig(**USERS, seed=seed))
    (folder / "store.db").unlink(missing_ok=True)
    with Store.open(folder / "store.db") as store:
        store.add(items, events)
    kinds = [event.kind for event in events]
    found = {"mean": mean, "spread": spread, "shown": kinds.count("exposure"), "thumbs": kinds.count("binary")}
    scale.write_text(json.dumps(found), encoding="utf-8")
    return found


def measured(run: Path, scale: Mapping[str, float]) -> dict[str, Any]:
    """Return what the hidden taste and legibility came to on held-out samples, paired."""
    first, last = (read_rows(path) for path in sorted((run / "evaluations").glob("step_*.jsonl"))[-2:])
    prompts = np.asarray(last.prompts)

    def change(name: str, unit: float) -> Estimate:
        return bootstrap_mean((last.values[name] - last.before(first, name)) / unit, prompts)

    ink, read = "meter/brightness", "heldout/accuracy"
    return {
        "taste_gain": change(ink, scale["spread"]).as_dict(),
        "legibility_points": change(read, 0.01).as_dict(),
        "ink": [float(np.nanmean(side.values[ink])) for side in (first, last)],
        "accuracy": [float(np.nanmean(side.values[read])) for side in (first, last)],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, write the figures, and return 0 where they hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where everything goes")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="where the figures go (default: FOLDER/taste_found.json)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the samples, the users, the fit and the training")
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="changes to digits/taste")
    options = parser.parse_args(argv)
    folder, seed = options.out, f"seed={options.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    fitted = folder / "fit"
    config = load_config("digits/taste", [f"rewards.0.args.path={fitted}", seed, *options.overrides])
    scale = collect(folder, config.model.path, resolve_prompts(config)[0].asked, options.seed)
    paths = f"data.paths=[{folder / 'store.db'}]"
    card = fit_reward(load_config("fit/digits", [paths, seed]), fitted).card
    write_report(fitted)
    result = trainer_for(config, out=folder / "run").train()
    report = write_report(result.directory)
    found = {
        "seed": options.seed, **scale, "auroc": card["heldout"]["thumbs"]["auroc"], "status": result.status,
        **measured(result.directory, scale), "monitor": result.summary.get("monitor"),
        "cpu_seconds": time.process_time(), "report": str(report),
    }  # fmt: skip
    holds = found["taste_gain"]["ci_low"] > 0 and found["legibility_points"]["mean"] >= -MOST_POINTS
    text = json.dumps({**found, "holds": holds}, indent=1)
    (options.json or folder / "taste_found.json").write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(text + "\n")
    return 0 if holds else 1


if __name__ == "__main__":
    raise SystemExit(main())
