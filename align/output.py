"""What verbs share: their result as text or JSON, and the arguments that mean the same in every verb."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
from collections.abc import Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from align.errors import ConfigError

if TYPE_CHECKING:
    from align.config import RewardConfig

_stdout: ContextVar[TextIO | None] = ContextVar("stdout", default=None)
"""Where results go while a verb runs; None outside."""

INTERRUPTED, HACKED = 130, 3
"""Exit codes of what was asked to stop, and of a run that the hack monitor stopped."""

ENDS = {"stopped": INTERRUPTED, "hacked": HACKED}
"""Exit codes of runs by their status, where that is not 0."""

EXITS = (
    "exit codes:\n"
    "  0 done; 2 bad input, or a fault that was looked for and found;\n"
    "  3 stopped by the hack monitor; 130 interrupted; 1 a defect"
)
"""What the help of every verb ends with."""


def examples(*lines: str) -> str:
    """Return the end of a help text."""
    return "examples:\n" + "\n".join(f"  {line}" for line in lines)


def give(options: argparse.Namespace, found: Any, text: str, *, one_line: bool = False) -> int:
    """Write `text` to stdout, or the JSON of `found` to stdout (`--json`) or to a file besides the text."""
    if options.json is not None:
        document = json.dumps(found, indent=None if one_line else 2, default=str) + "\n"
        if options.json == "-":
            return write_result(document)
        path = Path(options.json)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(document, encoding="utf-8")
        except OSError as error:
            raise ConfigError("The JSON file cannot be written", where=str(path), why=error.strerror or "") from error
    return write_result(text + "\n")


def write_result(text: str) -> int:
    """Write to the stdout that the verb was started with."""
    stream = _stdout.get() or sys.stdout
    stream.write(text)
    stream.flush()
    return 0


def run_verb(options: argparse.Namespace) -> int:
    """Run a verb: its result alone goes to stdout, for a parser to read; what libraries print goes to stderr."""
    before = _stdout.set(sys.stdout)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return int(options.run(options))
    finally:
        _stdout.reset(before)


def dry(options: argparse.Namespace, verb: str, call: dict[str, Any]) -> int:
    """Say what a verb would do, and do nothing."""
    given = [(key, word(value)) for key, value in call.items() if value is not None]
    return give(options, call, f"would {verb}:\n{table(given)}")


def word(value: Any) -> str:
    """Return a value as people read it: a list with commas."""
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def sentence(text: str) -> str:
    """Return a text with an end."""
    return text if text.endswith(("?", ".", "!")) else text + "."


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Return rows of two columns, the first set to its widest."""
    width = max((len(left) for left, _ in rows), default=0)
    return "\n".join(f"{left:<{width}}  {right}".rstrip() for left, right in rows)


def add_action(actions: Any, name: str, what: str, *shown: str) -> argparse.ArgumentParser:
    """Add a verb, or an action of one, with its purpose and examples."""
    return actions.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.", epilog=examples(*shown))


def add_json(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Add `--json [FILE]`, which means the same in every verb."""
    parser.add_argument(
        "--json", nargs="?", const="-", type=_json_file, metavar="FILE", default=default,
        help="also write the result as JSON to FILE; alone, or with -, it writes JSON to stdout and no text",
    )  # fmt: skip


def _json_file(text: str) -> str:
    """Refuse a value of the configuration that was meant to stand by itself."""
    if "=" in text:
        raise argparse.ArgumentTypeError(f"{text} is no file; let {text} stand before --json")
    return text


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    """Add `--dry-run`."""
    parser.add_argument(
        "--dry-run", action="store_true", help="read and check everything, say what would be done, do nothing"
    )


def add_out(parser: argparse.ArgumentParser, what: str, *, required: bool = False) -> None:
    """Add `--out PATH`."""
    parser.add_argument("--out", type=Path, metavar="PATH", required=required, help=f"where to write {what}")


def add_config(parser: argparse.ArgumentParser, example: str) -> None:
    """Add `CONFIG` and `KEY=VALUE ...`."""
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or a recipe that `align configs list` shows")
    add_overrides(parser, example)


def add_rewards(parser: argparse.ArgumentParser, what: str = "a reward; may be given again") -> None:
    """Add `--reward NAME` and `--config FILE`, which `named_rewards` reads."""
    parser.add_argument("--reward", action="append", metavar="NAME", help=what)
    parser.add_argument(
        "--config", metavar="FILE", help="a YAML file whose list `rewards` names more, with args; a recipe will do"
    )


def named_rewards(options: argparse.Namespace) -> list[RewardConfig]:
    """Return the rewards that `--reward` and `--config` name, in this order.

    Raises:
        ConfigError: see `load_rewards`.
    """
    from align.config import RewardConfig, load_rewards

    named = [RewardConfig(name=name) for name in options.reward or ()]
    return [*named, *(load_rewards(options.config) if options.config else ())]


def add_overwrite(parser: argparse.ArgumentParser, what: str) -> None:
    """Add `--overwrite`."""
    parser.add_argument("--overwrite", action="store_true", help=what)


def add_batch_size(parser: argparse.ArgumentParser) -> None:
    """Add `--batch-size N`, of verbs that score."""
    parser.add_argument(
        "--batch-size", type=positive, default=32, metavar="N", help="read, scored and kept at once (default: 32)"
    )


def add_overrides(parser: argparse.ArgumentParser, example: str) -> None:
    """Add `KEY=VALUE ...`."""
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help=f"change a value, e.g. {example}")


def add_seed(parser: argparse.ArgumentParser, default: int | None = None) -> None:
    """Add `--seed N`."""
    shown = "the config's" if default is None else default
    parser.add_argument(
        "--seed", type=whole, default=default, metavar="N", help=f"seed of every random draw (default: {shown})"
    )


def words(text: str) -> list[str]:
    """Parse names with commas between."""
    return [word.strip() for word in text.split(",")] if text else []


def whole(text: str) -> int:
    """Parse a whole number from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def number(text: str) -> float:
    """Parse a finite number from 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0")
    return value


def finite(text: str) -> float:
    """Parse a finite number of either sign."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return value


def share(text: str) -> float:
    """Parse a number above 0, up to 1."""
    if not 0 < number(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0 and at most 1")
    return number(text)


def positive(text: str) -> int:
    """Parse a whole number from 1."""
    if whole(text) < 1:
        raise argparse.ArgumentTypeError("it must be 1 or more")
    return int(text)
