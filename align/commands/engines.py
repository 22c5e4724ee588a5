"""Processes and engines of a run: what cannot be, the command that starts them, and how they ended."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from align.errors import AlignError, ConfigError
from align.output import ENDS, INTERRUPTED, positive, write_result


def require_engine(options: argparse.Namespace, config: Any) -> str | None:
    """Refuse processes and an engine that a run cannot have, before anything starts.

    Returns:
        the DeepSpeed settings of the run, by name or file; None without.

    Raises:
        ConfigError: a launcher, settings or a number of processes that do not go together, or not with the config.
    """
    from align.launch import require_launcher

    if options.launch:
        require_launcher(options.launch)
    asked = {"--launch": options.launch, "--deepspeed": options.deepspeed, "--fsdp": options.fsdp}
    if config.trainer == "peering" and (flag := next((flag for flag, given in asked.items() if given), None)):
        raise ConfigError("Protocols are compared in one process", where=flag, do="Leave it out")
    settings = options.deepspeed
    if settings is None and options.launch == "deepspeed" and not options.fsdp:
        settings = "zero2"
    _refused(options, config, settings)
    if options.launch == "torchrun" and settings is not None:
        raise ConfigError("ZeRO needs DeepSpeed's launcher", where="--deepspeed", do="Add --launch deepspeed")
    return settings


def _refused(options: argparse.Namespace, config: Any, settings: str | None) -> None:
    """Refuse what the trainer of a config refuses as it starts."""
    from align import engine

    launching = options.nproc if options.launch else None
    processes = launching or int(os.environ.get("WORLD_SIZE", "1"))
    if config.language:
        from align.language_checks import require_divisible
        from trainers.language_engine import require_settings

        require_divisible(config, processes)
        if options.fsdp:
            engine.require_fsdp(settings, processes)
        require_settings(settings, config, processes, launching=launching is not None)
        return
    if options.launch == "accelerate":
        raise ConfigError("accelerate launches language models", where="--launch", do="Use --launch torchrun")
    split = engine.require_engine(config.trainer, settings, fsdp=options.fsdp, launching=launching)
    if config.trainer == "fit":
        from rewards.fit import require_launchable, require_splittable

        if processes > 1 or settings is not None:
            require_launchable(config, processes)
    else:
        from trainers.online import require_splittable
    if split is not None:
        require_splittable(config, split)


def launched(
    options: argparse.Namespace, again: Sequence[str], settings: str | None
) -> tuple[list[str], dict[str, str]]:
    """Return the command that runs `align <again>` under the engine that is asked for, and what it adds to the
    environment: in several processes with a launcher, else alone.

    Args:
        settings: of `require_engine`.
    """
    from align.launch import launch_command

    flags = {"--deepspeed": settings, "--json": options.json}
    arguments = [*again, *(["--fsdp"] if options.fsdp else [])]
    arguments += [word for flag, value in flags.items() if value is not None for word in (flag, value)]
    if options.launch:
        return launch_command(options.launch, options.nproc, arguments)
    return ["align", *arguments], {}


def launch(options: argparse.Namespace, again: Sequence[str], settings: str | None, out: Path) -> int:
    """Run `align <again>` in several processes, and say what happened to them.

    Args:
        out: the run folder.
    """
    from align.checkpoint import checkpoints
    from align.launch import run_launched, shown
    from align.sitting import read_record

    before = read_record(out)
    with tempfile.TemporaryDirectory() as folder:
        piped, result = options.json == "-", Path(folder) / "result.json"
        if piped:  # launchers write to stdout, too, so the document comes by a file
            options = argparse.Namespace(**{**vars(options), "json": str(result)})
        command, environment = launched(options, again, settings)
        sys.stderr.write(f"align: {shown(command, environment)}\n")
        code = run_launched(command, environment, sys.stderr if piped else None)
        if piped and result.is_file():
            write_result(result.read_text(encoding="utf-8"))
    record = read_record(out)
    if record != before and record.get("status") in ENDS:
        return ENDS[record["status"]]
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


def leads() -> bool:
    """Whether this process speaks for all that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def end(result: Any, speak: Callable[[], object]) -> int:
    """Have the process that leads say what came of a run, leave the launch when all have, and return the exit code.

    Args:
        result: its `status` is that of run.json.
        speak: writes the page and says where it is.
    """
    from align.launch import leave_world, supervised

    if leads():
        speak()
    leave_world()  # waits for the process that still writes
    # Who supervises a launch reads how it went in run.json; a launcher takes any other code than 0 for a crash.
    return 0 if supervised() else ENDS.get(result.status, 0)


def goes_on(directory: Path) -> str:
    """Return what takes a stopped run up again: under several processes or DeepSpeed, what started it."""
    from align.sitting import read_record

    if read_record(directory).get("engine") in (None, "single"):
        return f"`align resume {shlex.quote(str(directory))}` goes on"
    return "the same command goes on, or `align resume` with the same --launch, --nproc, --deepspeed and --fsdp"


def how_it_ended(result: Any) -> str:
    """Return how a run ended, and what to do about it."""
    if result.status == "stopped":
        return f"stopped; {goes_on(result.directory)}"
    if result.status == "hacked":
        return (
            f"stopped by the hack monitor at step {result.summary['steps']}; the checkpoint of that step is kept\n"
            "look at the report; change the rewards, or go on past the alarm with monitor.action=warn --fork"
        )
    return str(result.status)


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say in how many processes a run trains, and under which engine."""
    parser.add_argument(
        "--launch",
        metavar="LAUNCHER",
        help="start several processes with deepspeed, torchrun or (language models) accelerate; prints the command",
    )
    parser.add_argument("--nproc", type=positive, default=2, metavar="N", help="how many processes (default: 2)")
    parser.add_argument(
        "--deepspeed",
        metavar="NAME",
        help="ZeRO: zero1, zero2, (language models, dance_grpo, fit) zero3 or a JSON file (--launch deepspeed: zero2)",
    )
    parser.add_argument(
        "--fsdp",
        action="store_true",
        help="FSDP2: split weights, gradients and optimizer over the processes, by torch alone "
        "(language models, dance_grpo, fit)",
    )
