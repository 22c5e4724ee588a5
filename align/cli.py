"""`align <verb>`: with align/commands/ all of align/ that knows rewards/ and trainers/. A verb is one call in Python.

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
from typing import TYPE_CHECKING, Any, NoReturn

from align.commands import demo, export, fit, models, pareto, peering, plan, selection, sparsity
from align.errors import AlignError, ConfigError, DataError
from align.output import EXITS, HACKED, INTERRUPTED, examples
from align.output import add_dry_run as _add_dry_run
from align.output import add_json as _add_json
from align.output import add_out as _add_out
from align.output import add_seed as _add_seed
from align.output import dry as _dry
from align.output import give as _give
from align.output import positive as _positive
from align.output import table as _table
from align.output import whole as _whole
from align.output import word as _word

if TYPE_CHECKING:
    from align.config import DanceGRPOConfig

_ENDS = {"stopped": INTERRUPTED, "hacked": HACKED}
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
        if arguments and not arguments[0].startswith("-"):
            _known(arguments[0], _VERBS, "verb")
        options = _parse(arguments)
        code = options.run(options)
        sys.stdout.flush()
        return int(code)
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
        sentence, advice = message[:1].upper() + message[1:], f"`{self.prog} --help` shows what it takes."
        if found := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            from align.registry import suggest

            options = [option.strip(" '") for option in found[2].split(",")]
            sentence, advice = f"{self.prog} does not know {found[1]!r}", _sentence(suggest(found[1], options))
        sys.stderr.write(f"align: {sentence}. {advice}\n")
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
                do = f"{_sentence(do)} A value of the config has no dashes: {flag.strip('-').replace('-', '_')}=VALUE"
            raise ConfigError(f"`align {options.verb}` has no flag {flag!r}", do=do)
        if not hasattr(options, "overrides"):
            raise ConfigError(
                f"`align {options.verb}` has no use for {item!r}", do=f"See `align {options.verb} --help`"
            )
        options.overrides = [*options.overrides, item]
    return options


def _known(word: str, choices: Sequence[str] | dict[str, Any], kind: str) -> None:
    if word not in choices:
        from align.registry import suggest

        raise ConfigError(f"Unknown {kind} {word!r}", do=suggest(word, choices))


# --- verbs ------------------------------------------------------------------------------------------


def _train(options: argparse.Namespace) -> int:
    from align.checks import require_valid
    from align.config import load_config
    from align.launch import require_launcher
    from align.run import require_directory

    if (Path(options.config) / "config.yaml").is_file():
        raise ConfigError("This is a run", where=options.config, do=f"`align resume {options.config}` goes on with it")
    seed = [] if options.seed is None else [f"seed={options.seed}"]
    config = load_config(options.config, [*options.overrides, *seed])
    if config.trainer in ("fit", "peering"):
        what, verb = "fits a reward" if config.trainer == "fit" else "compares protocols", config.trainer
        raise ConfigError(f"This config {what}", where=options.config, do=f"Run `align {verb} {options.config}`")
    engine, out = _engine(options, config), options.out or Path("runs") / config.name
    switches = [name for name in ("overwrite", "fork") if getattr(options, name)]
    again = ["train", options.config, *options.overrides, *seed, "--out", str(out), *(f"--{s}" for s in switches)]
    if options.dry_run:
        return _would(options, config, again, {"out": str(out)}, f"would train into {out}")
    findings = require_valid(config)
    if options.launch:
        require_launcher(options.launch)
        require_directory(out, config, overwrite=options.overwrite, fork=options.fork)
        return _launch(options, again, out, config)
    for finding in findings if _leads() else ():
        if finding.level == "warning":
            sys.stderr.write(f"align: Warning: {finding.message}. {_sentence(finding.do)}\n")
    from trainers import trainer_for

    trainer = trainer_for(config, out=out, overwrite=options.overwrite, fork=options.fork, **engine)
    return _finished(options, trainer.train())


def _engine(options: argparse.Namespace, config: Any) -> dict[str, Any]:
    """Return what a trainer is told of the engine."""
    if not options.fsdp:
        return {"deepspeed": options.deepspeed}
    if not config.language:
        _require_split(config, "--fsdp", "FSDP2")
    return {"deepspeed": options.deepspeed, "fsdp": True}


def _require_split(config: Any, where: str, engine: str) -> None:
    """Refuse, before anything starts, a run on our own loop that needs whole weights, to an engine that splits them."""
    from align.engine import require_splitting

    require_splitting(config.trainer, where)
    if config.trainer == "fit":
        from rewards.fit import require_splittable
    else:
        from trainers.online import require_splittable
    require_splittable(config, engine)


def _would(options: argparse.Namespace, config: Any, again: list[str], more: dict[str, Any], what: str) -> int:
    """Resolve the config, its data and rewards and its launch, and say what a run would do."""
    from align.checks import describe_config
    from align.commands.dry import require_ready
    from align.launch import shown

    found = {**describe_config(config, require_ready(config)), **more}
    text = f"{_config_text(found)}\n{what}"
    if options.launch:
        found["command"] = shown(*_launched(options, again, config))
        text += f"\nby {found['command']}"
    return _give(options, found, text)


def _launched(options: argparse.Namespace, arguments: list[str], config: Any) -> tuple[list[str], dict[str, str]]:
    """Return the command that runs `align <arguments>` in several processes, and what it adds to the environment."""
    from align.engine import deepspeed_settings, read_settings, require_fsdp
    from align.launch import launch_command

    fsdp = "fsdp" in _engine(options, config)
    settings = options.deepspeed or ("zero2" if options.launch == "deepspeed" and not fsdp else None)
    if fsdp:
        require_fsdp(settings, options.nproc)
        arguments = [*arguments, "--fsdp"]
    if not config.language:  # all of this is refused before anything starts
        if options.launch == "accelerate":
            raise ConfigError("accelerate launches language models", where="--launch", do="Use --launch torchrun")
        if settings is not None and deepspeed_settings(settings)["zero_optimization"]["stage"] == 3:
            _require_split(config, f"--deepspeed {settings}", "ZeRO 3")
    else:
        from align.language_checks import require_divisible

        require_divisible(config, options.nproc)
        if settings is not None:
            read_settings(settings)
    if settings is not None:
        if options.launch == "torchrun":
            raise ConfigError("ZeRO needs DeepSpeed's launcher", where="--deepspeed", do="Add --launch deepspeed")
        arguments = [*arguments, "--deepspeed", settings]
    if options.json is not None:
        arguments = [*arguments, "--json", options.json]
    return launch_command(options.launch, options.nproc, arguments)


def _launch(options: argparse.Namespace, arguments: list[str], out: Path, config: Any) -> int:
    """Run `align <arguments>` in several processes, and say what happened to them."""
    from align.checkpoint import checkpoints
    from align.launch import run_launched, shown
    from align.sitting import read_record

    command, environment = _launched(options, arguments, config)
    sys.stderr.write(f"align: {shown(command, environment)}\n")
    before = read_record(out)
    code = run_launched(command, environment)
    record = read_record(out)
    if record != before and record.get("status") in _ENDS:
        return _ENDS[record["status"]]
    if code == 0 or (record != before and record.get("status") == "complete"):
        return 0
    if code == INTERRUPTED:
        sys.stderr.write("align: Stopped before it began; the same command starts again.\n")
        return INTERRUPTED
    saved = max(checkpoints(out / "checkpoints"), default=None)
    raise AlignError(
        "A process of the run ended early", where=f"{options.launch}, exit code {code}",
        why="what it said stands above",
        do="Nothing was saved yet; start again" if saved is None
        else f"The checkpoint of step {saved} is whole; the same command resumes from it",
    )  # fmt: skip


def _leads() -> bool:
    """Whether this process speaks for all that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def _resume(options: argparse.Namespace) -> int:
    config = _run_config(options.run_folder)
    engine = _engine(options, config)
    if options.dry_run:
        what = f"would resume {options.run_folder} up to step {config.steps}"
        again = ["resume", str(options.run_folder)]
        return _would(options, config, again, {"directory": str(options.run_folder)}, what)
    if config.trainer == "fit":
        return fit.fit_into(options, config, options.run_folder, ["resume", str(options.run_folder)], _launch)
    if config.trainer == "peering":
        return peering.peer_into(options, config, options.run_folder)
    if options.launch:
        return _launch(options, ["resume", str(options.run_folder)], options.run_folder, config)
    from trainers import trainer_for

    return _finished(options, trainer_for(config, out=options.run_folder, **engine).train())


def _fit(options: argparse.Namespace) -> int:
    return fit.fit(options, _launch)


def _finished(options: argparse.Namespace, result: Any) -> int:
    from align.launch import leave_world, supervised
    from align.reports.training import write_report

    # Who supervises a launch reads how it went in run.json; a launcher takes any other code than 0 for a crash.
    code = 0 if supervised() else _ENDS.get(result.status, 0)
    if not _leads():
        leave_world()  # waits for the process that still writes
        return code
    report = write_report(result.directory)
    found = {
        "directory": str(result.directory),
        "status": result.status,
        "report": str(report),
        "summary": result.summary,
    }
    moved = (result.summary.get("sparsity") or {}).get("sentence", "")
    _give(options, found, "\n".join(filter(None, (_ended(result), moved, f"report: {report}"))))
    leave_world()
    return code


def _ended(result: Any) -> str:
    """Return how a run ended, and what to do about it."""
    if result.status == "stopped":
        return f"stopped; `align resume {result.directory}` goes on"
    if result.status == "hacked":
        return (
            f"stopped by the hack monitor at step {result.summary['steps']}; the checkpoint of that step is kept\n"
            "look at the report; change the rewards, or go on past the alarm with monitor.action=warn --fork"
        )
    return str(result.status)


def _score(options: argparse.Namespace) -> int:
    from align.commands.dry import require_rewards
    from align.config import load_rewards
    from rewards.scoring import plan_scores, score_files

    rewards = [*(options.reward or ()), *(load_rewards(options.config) if options.config else ())]
    call = {"prompts": options.prompts, "images": options.images, "image_column": options.image_column}
    call |= {"completion_column": options.completion_column, "overwrite": options.overwrite}
    out = options.out or Path("scores.parquet")
    if options.dry_run:
        require_rewards(rewards)
        return _dry(options, "score", plan_scores(rewards, out, **call)[0])
    from align.reports.scores import write_contact_sheet

    found = score_files(rewards, out, **call, batch_size=options.batch_size, progress=True)
    found["page"] = str(write_contact_sheet(out))
    return _give(options, found, _scores_text(found))


def _check(options: argparse.Namespace) -> int:
    from align.checks import describe_config, describe_prompts
    from align.commands.dry import config_findings
    from align.config import load_config
    from align.offline_checks import describe_image_feedback, is_image_feedback_file
    from align.preferences import describe_preferences, is_preference_file
    from align.prompts import FORMATS

    source = Path(options.file)
    if is_image_feedback_file(source):
        found = describe_image_feedback(source)
        return _give(options, found, _image_feedback_text(found))
    _refuse_other_forms(source)
    if is_preference_file(source):
        found = describe_preferences(source)
        if options.tokenizer is not None:
            from align.preferences import load_preferences
            from trainers.data_check import describe_lengths
            from trainers.language_model import load_tokenizer

            tokenizer = load_tokenizer(options.tokenizer)
            found["lengths"] = describe_lengths(load_preferences(source), tokenizer, max_length=options.max_length)
        return _give(options, found, _preferences_text(found))
    if source.suffix.lower() in FORMATS:
        found = describe_prompts(source, image_column=options.image_column)
        return _give(options, found, _prompts_text(found))
    if source.is_dir():
        config = _run_config(source, options.overrides)
    else:
        config = load_config(options.file, options.overrides)
    found = describe_config(config, config_findings(config))
    _give(options, found, _config_text(found))
    return 0 if found["valid"] else 2


def _refuse_other_forms(source: Path) -> None:
    """Refuse a file of feedback that trainers do not read and `align feedback convert` does."""
    from align.feedback.exchange.layouts import detect
    from align.feedback.exchange.tables import Row, read_table

    ending, layout, first = source.suffix.lower(), "", None
    if ending not in (".csv", ".jsonl", ".parquet", ".json", ".tsv") or not source.is_file():
        return
    if ending == ".json" and not source.read_text(encoding="utf-8", errors="replace").lstrip().startswith("["):
        return  # a config, perhaps
    try:
        first = next(iter(read_table(source)), None)
        layout = detect(first) if isinstance(first, Row) else ""
    except DataError:
        pass  # what is wrong with the file is said by whoever reads it
    fields = getattr(first, "fields", {})
    known = len(fields) < 2 or {"prompt", "chosen", "completion", "messages", "text"} & set(fields)
    if {"label", "score"} & set(fields) and not {"completion", "chosen", "messages", "text", "image"} & set(fields):
        known = False  # feedback on answers whose column goes by another name
    convert = f"`align feedback convert {source.name} thumbs.jsonl --to unpaired`"
    if not known and not layout:
        raise DataError(
            "The columns are neither those of prompts nor of feedback", where=str(source),
            why=f"they are {', '.join(map(str, fields))}",
            do=f"Rename them, or run {convert[:-1]} --columns prompt=COLUMN,response=COLUMN,label=COLUMN`",
        )  # fmt: skip
    if ending in (".json", ".tsv") or not known or layout == "helpsteer":
        raise DataError(
            "Trainers do not read feedback in this form", where=str(source),
            why=f"it is {layout}" if layout else f"it is a {ending} file", do=f"Run {convert}, or --to pairs",
        )  # fmt: skip


def _report(options: argparse.Namespace) -> int:
    config = _run_config(options.run_folder)
    if options.dry_run:
        return _dry(options, "report", {"run": str(options.run_folder)})
    if config.trainer == "peering":
        from align.reports.peering import write_page as write_report
    else:
        from align.reports.training import write_report

    path = write_report(options.run_folder)
    return _give(options, {"report": str(path)}, str(path))


def _configs(options: argparse.Namespace) -> int:
    from align.recipes import copy_recipe, list_recipes, read_recipe

    if options.action == "show":
        text = read_recipe(options.name)
        return _give(options, {"name": options.name, "text": text}, text.rstrip("\n"))
    if options.action == "copy":
        if options.dry_run:
            read_recipe(options.name)
            return _dry(options, "copy", {"recipe": options.name, "to": str(options.destination)})
        path = copy_recipe(options.name, options.destination, overwrite=options.overwrite)
        return _give(options, {"file": str(path)}, f"wrote {path}; `align check {path}` says what it will do")
    if options.action == "from-trl":
        return _from_trl(options)
    recipes = [{"name": name, "about": about} for name, about in list_recipes()]
    return _give(options, recipes, _table([(recipe["name"], recipe["about"]) for recipe in recipes]))


def _from_trl(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from align.textfiles import parse_yaml, read_text
    from trainers.compat import as_yaml, from_trl

    given = parse_yaml(read_text(options.file), str(options.file)).value
    if not isinstance(given, dict):
        raise ConfigError("TRL's arguments are a list of `name: value` lines", where=str(options.file))
    ported = from_trl(given, trainer=options.trainer, processes=options.nproc)
    findings = [asdict(finding) for finding in ported.findings]
    return _give(options, {"config": ported.values, "findings": findings}, as_yaml(ported))


def _rewards(options: argparse.Namespace) -> int:
    import dataclasses

    from rewards import list_rewards

    if options.action == "serve":
        return _serve(options)
    cards = {card.name: dataclasses.asdict(card) for card in list_rewards()}
    if options.action == "describe":
        _known(options.name, cards, "reward")
        card = cards[options.name]
        return _give(options, card, _table([(key, _word(value)) for key, value in card.items()]))
    shown = ("name", "media", "range", "licence", "size")
    rows = [shown, *(tuple(card[key] for key in shown) for card in cards.values())]
    widths = [max(len(row[i]) for row in rows) for i in range(len(shown))]
    text = "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
    return _give(options, list(cards.values()), f"{text}\n\n`align rewards describe NAME` says what each of them is")


def _serve(options: argparse.Namespace) -> int:
    try:
        from rewards.serve import read_asked, require_asked, serve
    except ModuleNotFoundError as error:
        raise ConfigError("Serving needs more packages", why=str(error), do="pip install 'align[server]'") from error
    asked = [*((name, {}) for name in options.reward or ()), *(read_asked(options.config) if options.config else ())]
    require_asked(asked)
    if options.dry_run:
        return _dry(options, "serve", {"rewards": [name for name, _ in asked], "at": f"{options.host}:{options.port}"})

    def log(line: str) -> None:
        sys.stderr.write(f"align: {line}\n")

    def ready(where: dict[str, Any]) -> None:
        if options.host not in ("127.0.0.1", "::1", "localhost"):
            log("Warning: whoever reaches this address can use the server; there is no authentication.")
        _give(options, where, f"serving {', '.join(where['rewards'])} at {where['url']}", one_line=True)
        sys.stdout.flush()

    serve(asked, options.host, options.port, limit_mb=options.limit_mb, ready=ready, log=log)
    return 0


def _feedback(options: argparse.Namespace) -> int:
    raise ConfigError("`align feedback` needs an action", do="See `align feedback --help`")


def _feedback_report(options: argparse.Namespace) -> int:
    from align.feedback.store import Store
    from align.reports.feedback import page_of, write_report

    if options.dry_run:
        Store.open(options.store, create=False).close()
        return _dry(options, "report", {"store": str(options.store), "page": str(page_of(options.store, options.out))})
    path, found = write_report(
        options.store, options.out, quality=options.quality, outcome=options.outcome, draws=options.draws,
        seed=options.seed,
    )  # fmt: skip
    return _give(options, {"report": str(path), **found}, str(path))


def _feedback_annotate(options: argparse.Namespace) -> int:
    from align.feedback.commands.annotate import run

    return run(options, _local_judge)


def _feedback_match(options: argparse.Namespace) -> int:
    from align.feedback.commands.matching import run
    from trainers.prompt_matching import match_file

    return run(options, match_file)


def _local_judge(options: argparse.Namespace) -> tuple[Any, str]:
    """Return the judge of --model and its identity; only look at the folder with --dry-run."""
    try:
        from rewards.judge import LocalJudge, read_judge
        from rewards.placement import Placement
    except ModuleNotFoundError as error:
        raise ConfigError("A local model needs more packages", why=str(error)) from error
    if options.dry_run:
        Placement(dtype=options.dtype)
        if Path(options.model).expanduser().is_dir():  # anything else would be fetched
            read_judge(options.model)
        return None, ""
    judge = LocalJudge(options.model, dtype=options.dtype, max_new_tokens=options.max_new_tokens)
    return judge, judge.identity()


def _doctor(options: argparse.Namespace) -> int:
    from align.doctor import run_checks
    from align.torchvision_hook import fix

    mended = fix() if options.fix and not options.dry_run else []
    checks = run_checks()
    rows = []
    for check in checks:
        level = check.level.upper() if check.level == "fault" else check.level
        why = f": {check.why}" if check.why else ""
        rows.append((level, f"{check.name}: {check.found}{why}" + (f". {check.do}." if check.do else "")))
    _give(options, [{"level": check.level, **vars(check)} for check in checks], "\n".join([*mended, _table(rows)]))
    return 0 if all(check.ok for check in checks) else 2


def _sentence(text: str) -> str:
    return text if text.endswith(("?", ".", "!")) else text + "."


def _run_config(folder: Path, overrides: Sequence[str] = ()) -> DanceGRPOConfig:
    from align.config import load_config

    if not (folder / "config.yaml").is_file():
        absent = "it is a file" if folder.is_file() else "there is no such folder"
        raise ConfigError(
            "This is not a run folder", where=str(folder),
            why="it has no config.yaml" if folder.is_dir() else absent,
            do="Give a folder that `align train` made, such as runs/NAME",
        )  # fmt: skip
    return load_config(folder / "config.yaml", overrides)


# --- output -----------------------------------------------------------------------------------------


def _scores_text(found: dict[str, Any]) -> str:
    rows = [("scores", found["out"]), ("page", found["page"])]
    rows.append(("rows", f"{found['rows']}, {found['new_scores']} scores new, {found['seconds']:.3g} s"))
    if found["missing"]:
        rows.append(("missing", f"{found['missing']}, see the column error; the same command tries them again"))
    if found["truncated"]:
        rows.append(("cut short", f"{found['truncated']} prompts or texts are longer than the model reads"))
    for name, e in found["components"].items():
        spread = "no score" if not e["n"] else "{mean:.4g}, from {min:.4g} to {max:.4g}, n {n}".format(**e)
        rows.append((name, spread))
    return _table(rows)


def _prompts_text(found: dict[str, Any]) -> str:
    rows = [("prompts", f"{found['prompts']} in {found['source']}"), ("first", found["first"])]
    rows += [("longest", f"{found['longest']} characters"), ("metadata", _word(found["metadata"]) or "none")]
    if found["duplicates"]:
        rows.append(("warning", f"{found['duplicates']} prompts repeat an earlier one, up to case and spaces"))
    return _table(rows)


def _config_text(found: dict[str, Any]) -> str:
    if found["trainer"] in ("fit", "peering"):
        what = "a reward" if found["trainer"] == "fit" else "a reward of ratings and one of rankings, each"
        rows = [("run", f"{found['name']}: {what} fitted in {found['steps']} steps")]
    else:
        rows = _language_rows(found) if "ledger" not in found else _visual_rows(found)
    for finding in found["findings"]:
        advice = f" {_sentence(finding['do'])}" if finding["do"] else ""
        where = f" ({finding['key']})" if finding["key"] else ""
        rows.append((finding["level"], f"{finding['message']}{where}.{advice}"))
    return _table(rows)


def _language_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    length = f"{found['steps']} steps" if found["steps"] else f"{found['epochs']} epochs"
    unit, more = ("prompt", ", beside drawing completions") if found["trainer"] == "rluf" else ("row", "")
    return [
        ("run", f"{found['name']}: {found['trainer']}, {length}, {found['batch_size']} {unit}s an update"),
        ("batches", f"{found['accumulation']} microbatches of {found['microbatch']} {unit}s over all processes"),
        ("cost", f"{found['forwards']} forwards a {unit}, a backward pass counted as two{more}"),
    ]


def _preferences_text(found: dict[str, Any]) -> str:
    rows = [("rows", f"{found['rows']} in {found['source']}"), ("prompts", f"{found['prompts']} different ones")]
    rows += [("thumbs", f"{found['up']} up, {found['down']} down, {found['unlabelled']} without a label")]
    rows += [(name, str(found[name])) for name in ("pairs", "scored", "chats", "rows_with_images") if found[name]]
    if found["pairs"] or found["sorted_by_label"]:
        order = "pairs stand side by side" if found["pairs"] else "sorted by label"
        rows.append(("order", f"{order}, which is fine: every update mixes both classes"))
    if "lengths" in found:
        from trainers.data_check import lengths_text

        rows.append(("lengths", lengths_text(found["lengths"])))
    rows.append(("trains", _word(found["trainers"])))
    if found["unread_columns"]:
        rows.append(("unread", ", ".join(found["unread_columns"])))
    return _table([*rows, *(("warning", text) for text in found["warnings"])])


def _image_feedback_text(found: dict[str, Any]) -> str:
    rows = [("rows", f"{found['rows']} in {found['source']}"), ("prompts", str(found["prompts"]))]
    rows.append(("thumbs", f"{found['up']} up, {found['down']} down; {found['pairs']} pairs"))
    rows.append(("trains", f"trainer offline, objective.loss {_word(found['losses']) or 'none of them'}"))
    return _table(rows)


def _offline_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    ledger = found["ledger"]
    rows = "pairs" if found["loss"] == "dpo" else "thumbs"
    cost = "{train_forwards} x {k} + {free_forwards} of the reference".format(**ledger)
    return [
        ("run", f"{found['name']}: {found['loss']}, {found['steps']} updates of {found['batch_size']} {rows}"),
        ("cost", f"{ledger['feq_per_sample']} F_eq an image = {cost}"),
        ("trains", f"{ledger['trained_steps']} noise level{'s' * (ledger['trained_steps'] > 1)} of every row"),
    ]  # fmt: skip


def _visual_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    if found["trainer"] == "offline":
        return _offline_rows(found)
    ledger = found["ledger"]
    cost = "{feq_per_sample:g} F_eq a sample = {rollout_forwards} + {train_forwards:g} x {k:g}".format(**ledger)
    reverse = "clip_range" in found
    what = f"of {ledger['solver_steps']} solver steps" if reverse else "noise levels of every sample"
    rows = [
        ("run", f"{found['name']}: {found['steps']} steps of {ledger['samples_per_step']} samples"),
        ("updates", f"{ledger['updates_per_step']} of each rollout"),
        ("cost", cost + (f" + {ledger['free_forwards']:g}" if ledger["free_forwards"] else "")),
        ("trains", f"{ledger['trained_steps']} {what}"),
        *_memory_row(found["memory_gb"]),
    ]  # fmt: skip
    if reverse:
        unit = "per latent dimension" if found["logprob_reduction"] == "mean" else "in all"
        nats = found["clip_nats"]
        whole = "" if nats is None else f"; {nats:.3g} nats over {found['latent_dim']} dimensions"
        rows.append(("clip", f"{found['clip_range']:g} nats {unit}{whole}"))
    return rows


def _memory_row(memory: dict[int, float]) -> list[tuple[str, str]]:
    if not memory:
        return []
    one, eight = (f"{memory[n]:.3g} GB" for n in (1, 8))
    return [("memory", f"{one} of weights and optimizer; {eight} on each of 8 under zero2; activations on top")]


# --- arguments --------------------------------------------------------------------------------------

_Arguments = argparse.ArgumentParser


def _add_launch(parser: _Arguments) -> None:
    parser.add_argument(
        "--launch",
        metavar="LAUNCHER",
        help="start several processes with deepspeed, torchrun or (language models) accelerate; prints the command",
    )
    parser.add_argument("--nproc", type=_positive, default=2, metavar="N", help="how many processes (default: 2)")
    parser.add_argument(
        "--deepspeed",
        metavar="NAME",
        help="ZeRO: zero1, zero2, (language models, dance_grpo, fit) zero3 or a JSON file (--launch deepspeed: zero2)",
    )


def _add_fsdp(parser: _Arguments) -> None:
    parser.add_argument(
        "--fsdp",
        action="store_true",
        help="FSDP2: split weights, gradients and optimizer over the processes, by torch alone "
        "(language models, dance_grpo, fit)",
    )


def _add_overrides(parser: _Arguments) -> None:
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="change a value, e.g. sampler.eta=0.2 rewards.0.weight=2",
    )


def _train_arguments(parser: _Arguments) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or a recipe that `align configs list` shows")
    _add_overrides(parser)
    parser.add_argument("--overwrite", action="store_true", help="start again, replacing the run in the folder")
    parser.add_argument(
        "--fork", action="store_true", help="go on with the run in the folder under this, changed, configuration"
    )
    _add_launch(parser)
    _add_fsdp(parser)
    _add_out(parser, "the run folder (default: runs/NAME); an unfinished run there is resumed")
    _add_seed(parser)
    _add_dry_run(parser)
    _add_json(parser)


def _fit_arguments(parser: _Arguments) -> None:
    _add_launch(parser)
    _add_fsdp(parser)
    fit.fit_arguments(parser)


def _resume_arguments(parser: _Arguments) -> None:
    _add_launch(parser)
    _add_fsdp(parser)
    _report_arguments(parser)


def _report_arguments(parser: _Arguments) -> None:
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="a run folder")
    _add_dry_run(parser)
    _add_json(parser)


def _score_arguments(parser: _Arguments) -> None:
    parser.add_argument("--reward", action="append", metavar="NAME", help="a reward; may be given again")
    parser.add_argument("--config", metavar="FILE", help="a YAML file whose list `rewards` names more, with args")
    parser.add_argument(
        "--prompts", metavar="FILE", help="a txt, JSONL, CSV or Parquet file: a row an image, or completions"
    )
    parser.add_argument(
        "--images", metavar="DIR", help="the images, in the natural order of their names (2 before 10) unless named"
    )
    parser.add_argument(
        "--image-column", metavar="NAME", help="column of the prompt table that names them (default: image, if any)"
    )
    parser.add_argument(
        "--completion-column", default="completion", metavar="NAME",
        help="column of the texts, or lists of turns, that text rewards score (default: completion)",
    )  # fmt: skip
    parser.add_argument(
        "--batch-size", type=_positive, default=32, metavar="N", help="read, scored and kept at once (default: 32)"
    )
    parser.add_argument("--overwrite", action="store_true", help="start again, forgetting what was scored")
    _add_out(parser, "the table: Parquet, CSV or JSONL by its ending (default: scores.parquet), with PATH.html")
    _add_dry_run(parser)
    _add_json(parser)


def _check_arguments(parser: _Arguments) -> None:
    parser.add_argument("file", metavar="FILE", help="a config, a recipe's name, a run folder, or a prompt file")
    _add_overrides(parser)
    parser.add_argument(
        "--image-column", metavar="NAME", help="of a prompt file: the column of image paths, to be checked too"
    )
    parser.add_argument(
        "--tokenizer", metavar="FOLDER", help="of a file of thumbs or pairs: the model whose tokens are counted"
    )
    parser.add_argument(
        "--max-length", type=_positive, default=1024, metavar="N", help="with it: tokens of a row (default: 1024)"
    )
    _add_json(parser)


def _action(actions: Any, name: str, what: str, *shown: str) -> _Arguments:
    """Add an action of a verb."""
    return actions.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.", epilog=examples(*shown))


def _configs_arguments(parser: _Arguments) -> None:
    parser.set_defaults(action="list")
    _add_json(parser)
    actions = parser.add_subparsers(metavar="ACTION", parser_class=_Parser)
    listing = _action(actions, "list", "name and purpose of every recipe", "align configs list --json -")
    show = _action(actions, "show", "print a recipe", "align configs show digits/dance_grpo")
    copy = _action(actions, "copy", "copy a recipe to edit it", "align configs copy digits/dance_grpo mine.yaml")
    port = _action(
        actions, "from-trl", "print our config of the arguments of a TRL script", "align configs from-trl kto.yaml"
    )
    for parser_, action in ((listing, "list"), (show, "show"), (copy, "copy"), (port, "from-trl")):
        parser_.set_defaults(action=action)
        _add_json(parser_, argparse.SUPPRESS)
    for parser_ in (show, copy):
        parser_.add_argument("name", metavar="NAME", help="a recipe, e.g. digits/dance_grpo")
    port.add_argument("file", type=Path, metavar="FILE", help="a YAML file of TRL's arguments")
    port.add_argument("--trainer", metavar="NAME", help="kto, bco, dpo or sft (default: what the arguments say)")
    port.add_argument("--nproc", type=_positive, default=1, metavar="N", help="processes of TRL's launch (default: 1)")
    copy.add_argument("destination", type=Path, metavar="DEST", help="a file or a folder")
    copy.add_argument("--overwrite", action="store_true", help="replace the file")
    _add_dry_run(copy)


def _rewards_arguments(parser: _Arguments) -> None:
    parser.set_defaults(action="list")
    _add_json(parser)
    actions = parser.add_subparsers(metavar="ACTION", parser_class=_Parser)
    listing = _action(actions, "list", "name and definition of every reward", "align rewards list --json rewards.json")
    describe = _action(
        actions, "describe", "what one reward measures, its range, licence and needs",
        "align rewards describe digits/legibility",
    )  # fmt: skip
    describe.add_argument("name", metavar="NAME", help="a reward, e.g. digits/legibility")
    serve = _action(
        actions, "serve", "let other machines use rewards of this one",
        "align rewards serve --reward hpsv2.1 --reward aesthetic --port 8765",
    )  # fmt: skip
    serve.add_argument("--reward", action="append", metavar="NAME", help="a reward; may be given again")
    serve.add_argument(
        "--config", metavar="FILE", help="a YAML file whose list `rewards` names more, with args; a recipe will do"
    )
    serve.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on (default: 127.0.0.1)"
    )
    serve.add_argument(
        "--port", type=_whole, default=8765, metavar="N", help="port; 0 takes a free one (default: 8765)"
    )
    serve.add_argument(
        "--limit-mb", type=_positive, default=256, metavar="N", help="the largest request in MB (default: 256)"
    )
    _add_dry_run(serve)
    for parser_, action in ((listing, "list"), (describe, "describe"), (serve, "serve")):
        parser_.set_defaults(action=action)
        _add_json(parser_, argparse.SUPPRESS)


def _feedback_arguments(parser: _Arguments) -> None:
    from align.feedback.commands import add_commands

    actions = parser.add_subparsers(metavar="ACTION", required=True, parser_class=_Parser, dest="action")
    add_commands(actions)
    actions.choices["report"].set_defaults(run=_feedback_report)
    actions.choices["annotate"].set_defaults(run=_feedback_annotate)
    actions.choices["match-prompts"].set_defaults(run=_feedback_match)


def _doctor_arguments(parser: _Arguments) -> None:
    parser.description = (
        f"{parser.description}\nAll that is found is ok, advice (it slows a run or keeps a feature from working) or a "
        "FAULT.\nThe exit code is 2 with a FAULT, else 0: advice does not change it."
    )
    parser.add_argument("--fix", action="store_true", help="repair what can be repaired")
    _add_dry_run(parser)
    _add_json(parser)


_VERBS: dict[str, tuple[str, Callable[[argparse.Namespace], int], Callable[[_Arguments], None], tuple[str, ...]]] = {
    "demo": (
        "go the whole way on the embedded digits, from people's thumbs to a receipt", demo.demo, demo.demo_arguments,
        ("align demo", "align demo --seed 1 --out runs/demo1", "align demo --users 400 steps=40 --dry-run"),
    ),
    "train": (
        "align a model, as a config says", _train, _train_arguments,
        ("align train digits/dance_grpo", "align train my.yaml steps=100 optimizer.lr=5e-4 --out runs/slow",
         "align train my.yaml --launch deepspeed --nproc 2", "align train digits/smoke --dry-run"),
    ),
    "resume": (
        "go on with an unfinished run", _resume, _resume_arguments, ("align resume runs/digits",),
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
        "fit a reward to what people said", _fit, _fit_arguments,
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
        "score images or texts of files with rewards; resumes by itself", _score, _score_arguments,
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
        "say what a config or a prompt file will do, and what is wrong with it", _check, _check_arguments,
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
        "write a run's report.html again", _report,
        _report_arguments, ("align report runs/digits",),
    ),
    "pareto": (
        "set RLUF runs side by side: what each traded for what", pareto.pareto, pareto.pareto_arguments,
        ("align pareto runs/conservative runs/moderate runs/aggressive",
         "align pareto runs/* --x helpfulness --y love --out arms.html"),
    ),
    "configs": (
        "list, show and copy the recipes", _configs, _configs_arguments,
        ("align configs", "align configs show digits/dance_grpo", "align configs copy digits/dance_grpo my.yaml"),
    ),
    "rewards": (
        "list, describe and serve the rewards", _rewards, _rewards_arguments,
        ("align rewards", "align rewards describe digits/legibility",
         "align rewards serve --reward hpsv2.1 --reward aesthetic --port 8765"),
    ),
    "feedback": (
        "collect what people say of outputs, audit it, convert it", _feedback, _feedback_arguments,
        ("align feedback serve task.yaml", "align feedback stats feedback.db"),
    ),
    "sparsity": (
        "measure which weights an update moved, beside what rounding alone would show", sparsity.needs_action,
        sparsity.arguments,
        ("align sparsity compare base tuned --json sparsity.json", "align sparsity overlap run-a run-b --base base",
         "align sparsity report base tuned --out sparsity.html"),
    ),
    "doctor": (
        "check this installation, and repair it", _doctor, _doctor_arguments, ("align doctor", "align doctor --fix"),
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
        verb = _action(verbs, name, what, *shown)
        add_arguments(verb)
        verb.set_defaults(run=run, flags=sorted(verb._option_string_actions))
    return parser


if __name__ == "__main__":
    sys.exit(main())
