"""`align evaluate` of rewards: on feedback, or on a benchmark's file of scores."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

from align.errors import ConfigError
from align.output import dry, give, named_rewards, table

OWN = ("images", "key", "reaction", "benchmark", "scores")
_TAKEN = {"source", "reward", "config", "data", "out", "dry_run", "json", "run", "flags", "verb", *OWN}
_FLAGS = {"solver_steps": "steps", "guidance_scale": "guidance"}


def is_asked(options: argparse.Namespace) -> bool:
    """Whether rewards are to be evaluated, rather than a model; refuse flags that are of no use to what is."""
    asked = options.source is None or options.benchmark is not None or options.scores is not None
    asked = asked or _is_fit(options.source)
    given = [name for name, value in vars(options).items() if value is not None and value is not False]
    wrong = next((n for n in given if (n not in _TAKEN if asked else n in OWN)), None)
    if wrong:
        what = "Rewards are evaluated, and not a model" if asked else f"{options.source} is a model, and no reward"
        raise ConfigError(what, where=f"--{_FLAGS.get(wrong, wrong).replace('_', '-')}", do="Leave the flag out")
    return bool(asked)


def evaluate(options: argparse.Namespace) -> int:
    """Say what rewards are worth: on feedback, or by a benchmark's rule; and write the page."""
    from align.feedback.overview import plain
    from align.reports.rewards import write_evaluation

    out = options.out or Path("evaluation.html")
    if options.benchmark is not None or options.scores is not None:
        found, text = _benchmark(options), _benchmark_text
        plan = {"benchmark": options.benchmark, "scores": options.scores}
    else:
        named = _named(options)
        data, part = _data(options, named)
        plan = {
            "rewards": [f"{reward.name} {reward.args.get('path', '')}".strip() for reward in named], "rows": part,
            **{f"{kind}s": n for kind, n in data.counts().items()},
        }  # fmt: skip
        if not options.dry_run:
            from rewards import get_reward
            from rewards.on_feedback import evaluate_rewards

            rewards = [get_reward(reward.name, **reward.args) for reward in named]
            found, text = evaluate_rewards(rewards, data), _feedback_text
            found["data"]["part"] = part
    if options.dry_run:
        return dry(options, "evaluate", {**plan, "out": str(out)})
    page = write_evaluation(found, out)
    return give(options, plain({**found, "page": str(page)}), f"{text(found)}\npage  {page}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that are of rewards alone."""
    group = parser.add_argument_group("rewards, on feedback or on a benchmark's scores")
    group.add_argument("--images", metavar="DIR", help="where paths of images begin (default: the folder of --data)")
    group.add_argument("--key", metavar="NAME", help="only this signal or dimension (default: the fit's own, or all)")
    group.add_argument("--reaction", metavar="NAME", help="the reaction that counts as a thumb up, such as love")
    group.add_argument("--benchmark", metavar="NAME", help="rewardbench or rewardbench2, from --scores")
    group.add_argument(
        "--scores", metavar="FILE", help="a benchmark's rows with their scores: JSONL, CSV, Parquet, JSON"
    )


def _is_fit(source: str) -> bool:
    from rewards.fitted import ARTEFACT

    path = Path(source)
    if (path / ARTEFACT).is_file() or (path / "reward" / ARTEFACT).is_file():
        return True
    if not (path / "config.yaml").is_file():
        return False
    from align.config import load_config

    return bool(load_config(path / "config.yaml").trainer == "fit")


def _named(options: argparse.Namespace) -> list[Any]:
    """Return the rewards to be evaluated as a configuration names them; refuse those that cannot be built."""
    from align.commands.dry import require_rewards
    from align.config import RewardConfig

    named = [] if options.source is None else [RewardConfig(name="fitted", args={"path": str(options.source)})]
    named += named_rewards(options)
    if not named:
        raise ConfigError(
            "Nothing is named to be evaluated", do="Give SOURCE, --reward NAME, --config FILE, or --benchmark NAME"
        )
    require_rewards(named)
    return named


def _data(options: argparse.Namespace, named: Sequence[Any]) -> tuple[Any, str]:
    """Return the feedback that rewards are measured on, and which rows of it that is."""
    from align.config import load_config
    from align.fit_config import FitDataConfig
    from rewards.fit_data import load_data
    from rewards.fitted import read_artefact
    from rewards.on_feedback import feedback_for_fit
    from rewards.scoring import media_of

    told = {"folder": options.images, "key": options.key, "reaction": options.reaction}
    told = {name: value for name, value in told.items() if value is not None}
    fits, away = [], ""
    for reward in named:
        if reward.name == "fitted" and reward.args.get("placement") == "remote":
            away = "what the fit held out is known where its artefact lies, on the machine that serves it"
        elif reward.name == "fitted":
            fits.append(read_artefact(reward.args["path"]))
    config = fits[0][0].parent / "config.yaml" if fits else None
    if config is not None and config.is_file():
        return feedback_for_fit(load_config(config), fits[0][1]["card"], options.data, told)
    if options.data is None:
        raise ConfigError(
            "Rewards are measured on feedback", why=away, do="Give --data FILE, or --benchmark NAME --scores FILE"
        )
    kinds = [str(artefact["media"]) for _, artefact in fits] + [media_of(reward) for reward in named]
    media = next((kind for kind in kinds if kind != "any"), "image" if options.images else "text")
    if media == "video":
        raise ConfigError("Feedback on videos is not evaluated yet", where=named[0].name)
    return load_data([options.data], FitDataConfig(paths=(options.data,), media=media, **told)), "all rows"


# --- as text ----------------------------------------------------------------------------------------


def _feedback_text(found: Mapping[str, Any]) -> str:
    data = found["data"]
    counts = ", ".join(f"{n:,} {kind}{'s' * (n != 1)}" for kind, n in data["observations"].items())
    rows = [
        ("data", f"{', '.join(data['hashes'])}: {data['part']}"),
        ("", f"{counts}; {data['outputs']:,} outputs of {data['prompts']:,} prompts, {data['people']:,} people"),
    ]
    for reward in found["rewards"]:
        rows += [("", ""), (reward["name"], shorten(reward["definition"], 100, placeholder=" ...")), *_measures(reward)]
        for reason, n in reward["missing"].items():
            sys.stderr.write(f"align: Warning: {n} outputs have no score of {reward['name']}: {reason}\n")
    if both := found["under_both_protocols"]:
        rows += [("", ""), ("under both protocols", "share of pairs that are ordered right, by what people did")]
        for name, protocols in both["table"].items():
            cells = [f"{p} {_share(m['without_ties'], m['ci'])}" for p, m in protocols.items()]
            rows.append((f"  {name}", "; ".join(cells)))
        for name, against in both["against"].items():
            if against:
                cells = [f"{p} {_signed(e)}" for p, e in against["difference"].items()]
                rows.append((f"  less {name}", f"{'; '.join(cells)}; interaction {_signed(against['interaction'])}"))
    return table(rows)


def _measures(reward: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    if (thumbs := reward.get("thumbs", {})).get("n"):
        said = f"{thumbs['n']:,}, {thumbs['base_rate']:.1%} up; AUROC {_n(thumbs['auroc'])}, AP {_n(thumbs['auprc'])}"
        rows.append(("  thumbs", said))
        if "brier" in thumbs:
            rows.append((
                "  as a probability",
                f"Brier {_n(thumbs['brier'])} (base rate {_n(thumbs['brier_of_base_rate'])}); debiased ECE "
                f"{_range(thumbs['debiased_ece'], thumbs['debiased_ece_ci'])}; calibration {thumbs['calibration']}",
            ))  # fmt: skip
        else:
            rows.append(("  as a probability", thumbs["calibration"]))
    for kind in ("comparisons", "rankings"):
        if (pairs := reward.get(kind, {})).get("n"):
            tau = f"; Kendall {_range(pairs['kendall'], pairs['kendall_ci'])}" if "kendall" in pairs else ""
            rows.append((
                f"  {kind}",
                f"{pairs['n']:,} pairs, {_share(pairs['without_ties'], pairs['ci'])} right; with {pairs['ties']:,} "
                f"ties {pairs['with_ties']:.1%}, differences to {pairs['threshold']:.3g} read as ties{tau}",
            ))  # fmt: skip
    if (rated := reward.get("ratings", {})).get("n"):
        within = _n(rated["spearman_within_prompts"])
        said = f"{rated['n']:,}, Spearman {_range(rated['spearman'], rated['spearman_ci'])}; within prompts {within}"
        rows.append(("  ratings", said))
    probes = reward["probes"]
    if length := probes.get("length"):
        rows.append(("  length", f"Spearman {_n(length['spearman'])} over {length['n']:,}"))
    if brightness := probes.get("brightness"):
        rows.append(("  brightness", ", ".join(f"{name} {value:+.2f} sd" for name, value in brightness.items())))
    if prompts := probes.get("prompts"):
        accuracy = ""
        if "accuracy_own" in prompts:
            accuracy = f"; pairs right {prompts['accuracy_own']:.1%}, then {prompts['accuracy_other']:.1%}"
        rows.append(
            ("  another prompt", f"changes {prompts['changed']:.0%} of scores, lowers {prompts['lose']:.0%}{accuracy}")
        )
    return rows


def _benchmark(options: argparse.Namespace) -> dict[str, Any]:
    from rewards.rewardbench import run_benchmark

    for name, flag in (("benchmark", "--benchmark NAME"), ("scores", "--scores FILE")):
        if getattr(options, name) is None:
            raise ConfigError(f"A benchmark needs {flag}", do="Give both --benchmark and --scores")
    for name, flag in (("source", "SOURCE"), ("reward", "--reward"), ("config", "--config"), ("data", "--data")):
        if getattr(options, name) is not None:
            raise ConfigError("A benchmark reads scores, and asks no reward", where=flag, do="Leave it out")
    return run_benchmark(options.benchmark, options.scores)


def _benchmark_text(found: Mapping[str, Any]) -> str:
    short = "not whole: " + ", ".join(f"{name} {n} of {m} rows" for name, (n, m) in found["incomplete"].items())
    rows = [
        (name, f"{s['score']:.4f}  [{s['ci'][0]:.4f}, {s['ci'][1]:.4f}]  n {s['n']}")
        for name, s in found["subsets"].items()
    ]
    rows += [("", ""), *((name, f"{score:.4f}") for name, score in found.get("sections", {}).items())]
    rows.append(("overall", "none: parts are missing" if found["overall"] is None else f"{found['overall']:.4f}"))
    return table(rows) + (f"\n{short}" if found["incomplete"] else "")


def _n(value: float) -> str:
    return f"{value:.3f}" if value == value else "none"


def _range(value: float, ci: Any) -> str:
    return f"{_n(value)} ({_n(ci[0])} to {_n(ci[1])})"


def _share(value: float, ci: Any) -> str:
    return f"{value:.1%} ({ci[0]:.1%} to {ci[1]:.1%})" if value == value else "none"


def _signed(estimate: Mapping[str, Any]) -> str:
    low, high = estimate["ci"]
    return f"{100 * estimate['mean']:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f})"
