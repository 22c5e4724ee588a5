"""`align <verb>`: the parser and the exit codes. What verbs do stands in align/commands/ and align/feedback/commands/.

Exit codes, `EXITS`: bad input is said in one sentence on stderr, a defect with its traceback.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from align.commands import (
    catalogue,
    check,
    configs,
    demo,
    doctor,
    export,
    feedback,
    fit,
    models,
    pareto,
    peering,
    plan,
    runs,
    score,
    selection,
    sparsity,
)  # fmt: skip
from align.errors import AlignError, ConfigError
from align.output import EXITS, INTERRUPTED, add_action, examples, run_verb, sentence

_EXTRAS = {
    "torch": "diffusion", "diffusers": "diffusion", "transformers": "diffusion", "peft": "diffusion",
    "sklearn": "diffusion", "datasets": "llm", "deepspeed": "llm", "open_clip": "rewards", "httpx": "rewards",
    "fastapi": "server", "uvicorn": "server", "pyarrow": "rewards", "accelerate": "llm",
}  # fmt: skip
_DISK_REFUSES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code.

    Args:
        argv: arguments without the program's name; those of the process when None.
    """
    from align.stops import interrupting

    arguments = list(sys.argv[1:] if argv is None else argv)
    with interrupting():
        return _run(arguments)


def _run(arguments: list[str]) -> int:
    options = argparse.Namespace()
    try:
        if not arguments:
            sys.stderr.write(_parser().format_help())
            return 2
        if not arguments[0].startswith("-"):
            from align.registry import require_known

            require_known(arguments[0], _VERBS, "verb")
        options = _parse(arguments)
        return run_verb(options)
    except _Exit as done:
        return done.code
    except AlignError as error:
        sys.stderr.write(f"align: {error}\n")
        return 2
    except KeyboardInterrupt:
        from align.launch import supervised

        sys.stderr.write("align: Interrupted.\n")
        return 0 if supervised() else INTERRUPTED  # a launcher takes any other code than 0 for a crash
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS:
            raise
        sys.stderr.write(f"align: This needs {package}. Run `pip install 'align[{_EXTRAS[package]}]'`.\n")
        return 2
    except OSError as error:
        if wrong := _cache_refuses(error) or _out_refuses(error, options):
            sys.stderr.write(f"align: {wrong}\n")
            return 2
        if error.errno not in _DISK_REFUSES:
            raise
        where = f" ({error.filename})" if error.filename else ""
        sys.stderr.write(f"align: The disk refused{where}: {error.strerror}. Free some space and start it again.\n")
        return 2


def _cache_refuses(error: OSError) -> ConfigError | None:
    """Return what to say of a cache that is no folder or not ours to write; None where the error is another's."""
    from align.doctor import cache_folder

    folder, variable = cache_folder()
    if not isinstance(error, (FileExistsError, NotADirectoryError, PermissionError)) or not (
        Path(str(error.filename)).is_relative_to(folder)
    ):
        return None
    said = f"{variable}={folder}" if variable else str(folder)
    return ConfigError(
        "Built models cannot be kept in the cache", where=said, why=f"{error.strerror} ({error.filename})",
        do="Set ALIGN_CACHE to a folder that you may write; `align doctor` looks at it",
    )  # fmt: skip


def _out_refuses(error: OSError, options: argparse.Namespace) -> ConfigError | None:
    """Return what to say of an --out that cannot be written; None where the error is another's."""
    out, named = getattr(options, "out", None), error.filename
    wrong = isinstance(error, (FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError))
    if not wrong or out is None or not isinstance(named, str) or not Path(named).is_relative_to(out):
        return None
    return ConfigError(
        "This cannot be written", where=f"--out {out}", why=f"{error.strerror} ({named})", do="Choose another --out"
    )


class _Exit(Exception):
    """argparse is done: help was shown, or the arguments were refused."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class _Parser(argparse.ArgumentParser):
    """An argument parser that refuses in one sentence and never guesses an abbreviated flag."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)

    def format_help(self) -> str:
        return f"{super().format_help()}\n{EXITS}\n"

    def error(self, message: str) -> NoReturn:
        what, advice = message[:1].upper() + message[1:], f"`{self.prog} --help` shows what it takes."
        if found := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            from align.registry import suggest

            options = [option.strip(" '") for option in found[2].split(",")]
            what, advice = f"{self.prog} does not know {found[1]!r}", sentence(suggest(found[1], options))
        sys.stderr.write(f"align: {what}. {advice}\n")
        raise _Exit(2)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        if message:
            sys.stderr.write(message)
        raise _Exit(status)


def _parse(arguments: list[str]) -> argparse.Namespace:
    """Parse, taking KEY=VALUE before and after flags, which argparse alone does not."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    for item in rest:
        if item.startswith("-"):
            flags = options.flags
            from align.registry import suggest

            flag, do = item.partition("=")[0], suggest(item, flags)
            if hasattr(options, "overrides"):
                do = f"{sentence(do)} A value of the config has no dashes: {flag.strip('-').replace('-', '_')}=VALUE"
            raise ConfigError(f"`align {options.verb}` has no flag {flag!r}", do=do)
        if not hasattr(options, "overrides"):
            raise ConfigError(
                f"`align {options.verb}` has no use for {item!r}", do=f"See `align {options.verb} --help`"
            )
        options.overrides = [*options.overrides, item]
    return options


_Adds = Callable[[argparse.ArgumentParser], None]

_VERBS: dict[str, tuple[str, Callable[[argparse.Namespace], int], _Adds, tuple[str, ...]]] = {
    "demo": (
        "go the whole way on the embedded digits, from people's thumbs to a receipt", demo.demo, demo.demo_arguments,
        ("align demo", "align demo --seed 1 --out runs/demo1", "align demo --users 400 steps=40 --dry-run"),
    ),
    "train": (
        "align a model, as a config says", runs.train, runs.train_arguments,
        ("align train digits/dance_grpo", "align train my.yaml steps=100 optimizer.lr=5e-4 --out runs/slow",
         "align train my.yaml --launch deepspeed --nproc 2", "align train digits/smoke --dry-run"),
    ),
    "resume": (
        "go on with an unfinished run", runs.resume, runs.resume_arguments, ("align resume runs/digits",),
    ),
    "sample": (
        "make images, or answers to prompts, with a model or a run", models.sample, models.sample_arguments,
        ('align sample runs/digits --prompt "a bold handwritten three" --count 8',
         "align sample digits --prompts prompts.txt --steps 50 --guidance 4 --out before",
         "align sample runs/digits --sampler dance_sde --eta 0.3 --seed 7",
         "align sample runs/kto --before --count 4 --out candidates.jsonl",
         'align sample my-model --prompt "What is a fox?" --chat --temperature 0'),
    ),
    "evaluate": (
        "measure a model or a run on held-out prompts or rows, or a reward on feedback", models.evaluate,
        models.evaluate_arguments,
        ("align evaluate runs/digits --samples 1000 --json result.json",
         "align evaluate digits --prompts prompts.txt --reward digits/legibility",
         "align evaluate runs/kto --data more_thumbs.jsonl --config rewards.yaml",
         "align evaluate runs/fit_thumbs --data more_thumbs.jsonl",
         "align evaluate --config rewards.yaml --data feedback.db",
         "align evaluate --benchmark rewardbench2 --scores scores.jsonl"),
    ),
    "export": (
        "write trained weights as diffusers, transformers, PEFT or ComfyUI load them, with a model card",
        export.export, export.export_arguments,
        ("align export runs/flux --to diffusers-lora --out my-lora",
         "align export runs/flux/checkpoints/step_000100 --to full --dtype bf16 --out my-flux",
         "align export runs/kto --to full --out my-llama"),
    ),
    "fit": (
        "fit a reward to what people said", fit.fit, fit.fit_arguments,
        ("align fit my_fit.yaml", "align fit fit/thumbs data.paths.0=thumbs.jsonl --out runs/thumbs",
         "align fit my_fit.yaml model.head=mlp --dry-run", "align fit my_fit.yaml --launch deepspeed --nproc 2"),
    ),
    "peering": (
        "fit a reward to ratings and one to rankings, select with both, judge both under both", peering.peering,
        peering.peering_arguments,
        ("align peering peering/simulated", "align peering my_peering.yaml --dry-run",
         "align peering peering/simulated world.density_in_rankings=0.8 --out runs/agree"),
    ),
    "score": (
        "score images or texts of files with rewards; resumes by itself", score.score, score.score_arguments,
        ("align score --reward hpsv2.1 --prompts prompts.txt --images made --out scores.parquet",
         "align score --reward aesthetic --reward jpeg --images made",
         "align score --config rewards.yaml --prompts completions.jsonl --out scores.csv",
         "align score --reward digits/legibility --prompts samples/samples.jsonl --dry-run"),
    ),
    "select": (
        "keep the best of several candidates by a reward; mine pairs and thumbs from them", selection.select,
        selection.select_arguments,
        ("align select candidates.jsonl --config rewards.yaml --pairs best-worst",
         "align select runs/kto --prompts prompts.txt --count 16 --reward my_module:reward --out best",
         "align select scores.parquet --by hpsv2.1 --judge aesthetic --share 0.25",
         "align select samples --reward digits/legibility --up-from 0.8 --down-to 0.4 --dry-run"),
    ),
    "check": (
        "say what a config or a prompt file will do, and what is wrong with it", check.check, check.check_arguments,
        ("align check digits/dance_grpo", "align check my.yaml group_size=8", "align check prompts.jsonl"),
    ),
    "plan": (
        "say what a run holds on 1 to 64 accelerators, what fits, what a step takes, and how to start it", plan.plan,
        plan.plan_arguments,
        ("align plan flux/hps_clip --gpus 8 --memory 80", "align plan my.yaml model.train=lora --gpus 1 --memory 24",
         "align plan digits/smoke --measure",
         "align plan kto/qwen2_5_7b_ultrafeedback --forward-seconds 0.05 --json -"),
    ),
    "report": (
        "write a run's report.html again", runs.report,
        runs.report_arguments, ("align report runs/digits",),
    ),
    "pareto": (
        "set RLUF runs side by side: what each traded for what", pareto.pareto, pareto.pareto_arguments,
        ("align pareto runs/conservative runs/moderate runs/aggressive",
         "align pareto runs/* --x helpfulness --y love --out arms.html"),
    ),
    "configs": (
        "list, show and copy the recipes", configs.configs, configs.configs_arguments,
        ("align configs", "align configs show digits/dance_grpo", "align configs copy digits/dance_grpo my.yaml"),
    ),
    "rewards": (
        "list, describe and serve the rewards", catalogue.rewards, catalogue.rewards_arguments,
        ("align rewards", "align rewards describe digits/legibility",
         "align rewards serve --reward hpsv2.1 --reward aesthetic --port 8765"),
    ),
    "feedback": (
        "collect what people say of outputs, audit it, convert it", feedback.feedback, feedback.feedback_arguments,
        ("align feedback serve task.yaml", "align feedback stats feedback.db"),
    ),
    "sparsity": (
        "measure which weights an update moved, beside what rounding alone would show", sparsity.needs_action,
        sparsity.arguments,
        ("align sparsity compare base tuned --json sparsity.json", "align sparsity overlap run-a run-b --base base",
         "align sparsity report base tuned --out sparsity.html"),
    ),
    "doctor": (
        "check this installation, and repair it", doctor.doctor, doctor.doctor_arguments,
        ("align doctor", "align doctor --fix"),
    ),
}  # fmt: skip


class _Version(argparse.Action):
    """Print the installed version; the metadata is read only when asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *rest: Any) -> None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            number = version("align")
        except PackageNotFoundError:
            number = "not installed"
        sys.stdout.write(f"align {number}\n")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="align",
        description="From a generative model and what people think of its outputs to an aligned model with a receipt.",
        epilog=examples("align configs", "align train digits/dance_grpo", "align check my.yaml"),
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    verbs = parser.add_subparsers(metavar="VERB", required=True, parser_class=_Parser, dest="verb")
    for name, (what, run, add_arguments, shown) in _VERBS.items():
        verb = add_action(verbs, name, what, *shown)
        add_arguments(verb)
        verb.set_defaults(run=run, flags=sorted(verb._option_string_actions))
    return parser


if __name__ == "__main__":
    sys.exit(main())
