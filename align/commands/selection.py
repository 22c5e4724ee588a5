"""`align select`: the best of several candidates by a reward, and data mined from them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.commands.dry import require_rewards
from align.commands.models import candidate_arguments, plan_candidates, sample_candidates
from align.errors import ConfigError
from align.output import (
    add_batch_size,
    add_dry_run,
    add_json,
    add_out,
    add_overwrite,
    dry,
    finite,
    give,
    number,
    positive,
    share,
    table,
)  # fmt: skip

if TYPE_CHECKING:
    from align.config import PanelConfig

PAIRS = ("best-worst", "best-random", "all")


def select(options: argparse.Namespace) -> int:
    """Select from candidates, sampling and scoring them first where that is needed."""
    from align.config import load_panel
    from trainers.candidates import is_candidates, read_candidates
    from trainers.selection import Mining, Rule, panel_of
    from trainers.selection import select as run

    config: PanelConfig | None = load_panel(options.config) if options.config else None
    panel = panel_of(options.reward or (), options.judge or (), config)
    best = options.best if options.best or options.share or options.threshold is not None else 1
    rule = Rule(best, options.share, options.threshold, options.across_prompts)
    mining = Mining(options.pairs, options.margin, options.up_from, options.down_to)
    if options.down_to is not None and options.up_from is None:
        raise ConfigError("Thumbs down need thumbs up", where="--down-to", do="Give --up-from too")
    if options.margin and options.pairs is None:
        raise ConfigError("A margin is of pairs", where="--margin", do="Give --pairs too")
    if panel is not None and options.by:
        raise ConfigError("Rewards are told how to combine", where="--by", do="Set weight and combine in --config")
    out, ready = Path(options.out or "selection"), is_candidates(options.source)
    if not ready and panel is None:
        raise ConfigError("A model's candidates need a reward", where=options.source, do="Give --reward or --config")
    if panel is not None:
        _require_panel(options, panel, ready)
    if options.dry_run:
        return dry(options, "select", _plan(options, panel, rule, out, ready))
    source = Path(options.source) if ready else sample_candidates(options, out)
    candidates = read_candidates(source)
    found = run(
        candidates, out, panel=panel, by=options.by, judges=() if panel else options.judge or (), rule=rule,
        mining=mining, batch_size=options.batch_size, seed=options.seed or 0, overwrite=options.overwrite,
        progress=True,
    )  # fmt: skip
    if len(found["policies"]) > 1:
        sys.stderr.write(f"align: Warning: candidates of {', '.join(found['policies'])} are ranked together.\n")
    from align.reports.selection import write_page

    found["report"] = str(write_page(out))
    return give(options, found, _text(found, out))


def _require_panel(options: argparse.Namespace, panel: PanelConfig, ready: bool) -> None:
    """Refuse rewards that cannot be had, before a model draws what they would score."""
    from rewards.panel import Panel
    from trainers import find_source

    made = None if ready else "text" if find_source(options.source).language else ""
    parts = (panel.rewards, panel.heldout_rewards)
    require_rewards((reward for part in parts for reward in part), made)
    if made is not None and not options.dry_run:
        for part in parts:
            Panel.build(part, panel.combine)


def _plan(options: argparse.Namespace, panel: Any, rule: Any, out: Path, ready: bool) -> dict[str, Any]:
    plan: dict[str, Any] = {"source": options.source}
    if ready:
        from trainers.candidates import read_candidates

        found = read_candidates(options.source)
        plan |= {"candidates": f"{len(found.rows)} {'images' if found.images else 'texts'}"}
        plan |= {"prompts": max(found.groups()) + 1, "scores": list(found.scores) or None}
    else:
        plan |= {"prompts": plan_candidates(options), "count": options.count or 8}
    if panel is not None:
        plan |= {"rewards": [r.name for r in panel.rewards], "judges": [r.name for r in panel.heldout_rewards] or None}
    kept = {name: value for name, value in vars(rule).items() if value}
    return {**plan, **kept, "pairs": options.pairs, "up_from": options.up_from, "out": str(out)}


def select_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `align select`."""
    candidate_arguments(parser)
    parser.add_argument("--reward", action="append", metavar="NAME", help="a reward to rank by; may be given again")
    parser.add_argument(
        "--config", metavar="FILE", help="a YAML file or recipe whose rewards, combine and heldout_rewards are used"
    )
    parser.add_argument(
        "--judge", action="append", metavar="NAME",
        help="a reward, or a score of the table, that only looks on; may be given again",
    )  # fmt: skip
    parser.add_argument("--by", metavar="NAME", help="of a table of scores: the one to rank by")
    rule = parser.add_argument_group("what is kept (default: the best one of each prompt)")
    rule.add_argument("--best", type=positive, metavar="N", help="the N best of each prompt")
    rule.add_argument("--share", type=share, metavar="S", help="the best share of each prompt, one at least")
    rule.add_argument("--threshold", type=finite, metavar="T", help="scores from T up; of them the best, if asked for")
    rule.add_argument(
        "--across-prompts", action="store_true", help="with --share: of all candidates together, not of each prompt"
    )
    mined = parser.add_argument_group("what is mined besides")
    mined.add_argument("--pairs", choices=PAIRS, metavar="HOW", help=f"rows for dpo: {', '.join(PAIRS)}")
    mined.add_argument("--margin", type=number, default=0.0, metavar="M", help="of a pair: scores further apart than M")
    mined.add_argument(
        "--up-from", type=finite, metavar="X", help="rows for kto and bco: thumbs up for scores from X up"
    )
    mined.add_argument(
        "--down-to", type=finite, metavar="X", help="thumbs down up to X, none between (default: all that are not up)"
    )
    add_batch_size(parser)
    add_overwrite(parser, "start again, forgetting what was scored")
    add_out(parser, "the rows, the scores and the page: a folder (default: selection)")
    add_dry_run(parser)
    add_json(parser)


def _text(found: dict[str, Any], out: Path) -> str:
    mean = found["mean"]["score"]
    rows = [
        ("candidates", f"{found['candidates']} {found['kind']} of {found['prompts']} prompts, ranked by {found['by']}"),
        ("selected", f"{found['selected']}, of {found['prompts'] - found['prompts_with_none']} prompts"),
        ("score", f"{_estimate(mean['selected'])} selected, {_estimate(mean['candidates'])} of all"),
    ]
    for name, verdict in found["curve"]["judges"].items():
        judge = found["mean"][name]
        word = f"; falls beyond the best of {verdict['peak']}" if verdict["over_optimised"] else ""
        rows.append((name, f"{_estimate(judge['selected'])} selected, {_estimate(judge['candidates'])} of all{word}"))
    kl = found["kl"]
    rows.append(("KL", f"{'at most ' if kl['bound'] else 'about '}{kl['nats']:.3g} nats from the model"))
    if found["missing"]:
        rows.append(("missing", f"{found['missing']} scores: {'; '.join(found['errors'])}"))
    if found["prompts_whose_best_is_shared"]:
        rows.append(("ties", f"{found['prompts_whose_best_is_shared']} prompts; the first of the best is taken"))
    if pairs := found.get("pairs"):
        left = "".join(f"; left out {n} {why}" for why, n in pairs["left_out"].items())
        rows.append(("pairs", f"{pairs['n']}, median margin {pairs['margin_median']:.3g}{left}"))
    if thumbs := found.get("thumbs"):
        rows.append(("thumbs", f"{thumbs['up']} up, {thumbs['down']} down"))
    if removed := found.get("removed"):
        again = " and ".join({"pairs.jsonl": "--pairs", "thumbs.jsonl": "--up-from"}[name] for name in removed)
        rows.append(("removed", f"{', '.join(removed)} of an earlier selection; {again} mines such rows again"))
    rows += [("rows", ", ".join(str(out / name) for name in found["files"])), ("report", found["report"])]
    return table(rows)


def _estimate(value: dict[str, Any]) -> str:
    return "{mean:.4g} [{ci_low:.4g}, {ci_high:.4g}]".format(**value)
