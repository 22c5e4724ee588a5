"""`align sample` and `align evaluate`, of images or of text, by what the source is."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from align.commands import rewards
from align.commands.dry import require_rewards, require_source
from align.errors import AlignError, ConfigError
from align.output import (
    add_dry_run,
    add_json,
    add_out,
    add_rewards,
    add_seed,
    dry,
    give,
    named_rewards,
    number,
    positive,
    share,
    table,
    word,
)

IMAGE_FLAGS = {
    "sampler": "sampler", "eta": "eta", "solver_steps": "steps", "guidance_scale": "guidance",
    "embedded_guidance": "embedded-guidance", "height": "height", "width": "width", "frames": "frames", "fps": "fps",
    "shift": "shift", "batch": "batch",
}  # fmt: skip
"""Arguments of the Python functions, which are keys of `sampler` but for a few, to their flags."""
TEXT_FLAGS = ("temperature", "top_p", "max_new_tokens", "chat", "base", "data", "trained_with")
SOURCES = "a run folder, a checkpoint folder, a model folder, a language recipe, digits, or tiny"
SHOWN = 12
"""Answers that the terminal shows; the file has them all."""


def sample(options: argparse.Namespace) -> int:
    """Make images, or have a language model answer prompts."""
    if options.prompt and options.prompts:
        raise ConfigError(
            "Prompts come from one place", why="both --prompt and --prompts are given", do="Give one of them"
        )
    prompts = options.prompt or options.prompts
    if _is_language(options):
        return _sample_text(options, prompts)
    with _naming_flags():
        call = {"count": options.count or 4, **_sampling(options), "out": str(options.out or _sampled(options))}
    if options.dry_run:
        require_source(options.source)
        return dry(options, "sample", {"source": options.source, "prompts": _prompts_plan(prompts), **call})
    from trainers import sample_images

    with _naming_flags():
        folder = sample_images(options.source, prompts, **call)
    with (folder / "samples.jsonl").open(encoding="utf-8") as file:
        row = json.loads(file.readline())
    how = {key: value for key, value in row.items() if key not in ("image", "video", "prompt", "member")}
    wrote = f"wrote samples.jsonl, what it names, and grid.png to {folder}"
    return give(options, {"directory": str(folder), **how}, f"{_rows_text(how)}\n{wrote}")


def _sampled(options: argparse.Namespace) -> Path:
    from trainers import find_source

    return find_source(options.source).sampled


def evaluate(options: argparse.Namespace) -> int:
    """Measure a model of images with rewards, a language model on held-out rows, or rewards on feedback."""
    if rewards.is_asked(options):
        return rewards.evaluate(options)
    named = named_rewards(options)
    call: dict[str, Any] = {"samples": options.samples, "rewards": named or None}
    language = _is_language(options)
    if language:
        call |= {name: getattr(options, name) for name in ("seed", "data", *_DRAWN)}
        call["config"] = options.trained_with
    else:
        with _naming_flags():
            call |= {"samples": options.samples or 256, **_sampling(options)}
    call["out"] = options.out
    if options.dry_run:
        require_source(options.source)
        require_rewards(named, "text" if language else "")
        plan = _rows_plan(options.data) if options.data else _prompts_plan(options.prompts, options.chat)
        if named:
            call["rewards"] = [reward.name for reward in named]
        return dry(options, "evaluate", {"source": options.source, "prompts": plan, **call})
    if not language:
        from trainers import evaluate as evaluate_images

        with _naming_flags():
            found = evaluate_images(options.source, options.prompts, **call)
        return give(options, found, _rows_text(found))
    from trainers import evaluate_language

    with _Bar() as bar:
        found = evaluate_language(options.source, options.prompts, **_given(call), progress=bar.show)
    return give(options, found, _rows_text(found))


def _sampling(options: argparse.Namespace) -> dict[str, Any]:
    """How images are to be made, as far as flags say it; refuse what cannot be."""
    from trainers import Sampling, find_source

    told = _given({"seed": options.seed, **{name: getattr(options, name) for name in IMAGE_FLAGS}})
    Sampling(**told).within(find_source(options.source).config)
    return told


@contextlib.contextmanager
def _naming_flags() -> Iterator[None]:
    """Have errors name the flag, where they would name the argument or the key of a config that it stands for."""
    try:
        yield
    except AlignError as error:
        parts = (error.where, error.why, error.do)
        where, why, do = (_flags(part) for part in parts)
        if error.where in IMAGE_FLAGS:
            where = f"--{IMAGE_FLAGS[error.where]}"
        do = re.sub(r"Set (it|--[\w-]+)(?: to|:) null", r"Leave \1 out", do)
        raise type(error)(error.what, where=where, why=why, do=do) from error


def _flags(text: str) -> str:
    flags = {**IMAGE_FLAGS, "kernel": "sampler"}
    return re.sub(r"sampler\.(\w+)", lambda found: f"--{flags.get(found[1], found[1])}", text)


_DRAWN = ("temperature", "top_p", "max_new_tokens", "chat")


def _sample_text(options: argparse.Namespace, prompts: Any) -> int:
    call = {"count": options.count or 1, "seed": options.seed, "base": options.base}
    call |= {name: getattr(options, name) for name in _DRAWN} | {"out": str(options.out or _sampled(options))}
    if options.dry_run:
        require_source(options.source)
        plan = _prompts_plan(prompts, options.chat)
        return dry(options, "sample", {"source": options.source, "prompts": plan, **call})
    from trainers import sample_completions

    with _Bar() as bar:
        rows = sample_completions(options.source, prompts, **_given(call), progress=bar.show)
    return give(options, rows, f"{_answers_text(rows)}\n\nwrote {len(rows)} answers to {call['out']}")


def _given(call: dict[str, Any]) -> dict[str, Any]:
    """Leave out what was not said, so that the function's own defaults hold."""
    return {key: value for key, value in call.items() if value is not None}


def _is_language(options: argparse.Namespace) -> bool:
    """Whether the source is a language model; refuse flags that are of no use to it."""
    from trainers import find_source

    language = find_source(options.source).language
    flags = IMAGE_FLAGS if language else {name: name.replace("_", "-") for name in TEXT_FLAGS}
    given = {name: getattr(options, name, None) for name in flags}
    wrong = next((flags[name] for name, value in given.items() if value is not None and value is not False), None)
    if wrong:
        flag, kind = f"--{wrong}", "a language model" if language else "no language model"
        raise ConfigError(f"{options.source} is {kind}", where=flag, do="Leave the flag out")
    return language


def _prompts_plan(prompts: Any, chat: bool = False) -> str:
    """What `prompts` stands for, the file read, so that a dry run refuses what the run would refuse."""
    if prompts is None:
        return "the run's held-out prompts"
    if chat or isinstance(prompts, str):
        from align.prompts import read_rows

        return f"{sum(1 for _ in read_rows(prompts))} from {prompts}" if isinstance(prompts, str) else str(len(prompts))
    from align.prompts import load_prompts

    loaded = load_prompts(prompts)
    return f"{len(loaded)} from {loaded.source}"


def _rows_plan(data: str) -> str:
    from align.preferences import load_preferences

    return f"those of {len(load_preferences(data))} rows from {data}"


class _Bar:
    """A bar on stderr, from the first thing that is done."""

    def __init__(self) -> None:
        self.bar: Any = None

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *ended: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def show(self, done: int, total: int) -> None:
        """Show that `done` of `total` answers are there."""
        if self.bar is None:
            from tqdm import tqdm

            self.bar = tqdm(
                total=total, unit=" answers", desc="answering", file=sys.stderr, dynamic_ncols=True, mininterval=0.5
            )
        self.bar.update(done - self.bar.n)


def _answers_text(rows: list[dict[str, Any]]) -> str:
    """Return answers as people read them, those to one prompt together."""
    from trainers.language_generation import as_text

    prompts: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        prompts.setdefault(as_text(row["prompt"]), []).append(row)
    lines: list[str] = []
    left = SHOWN
    for prompt, answers in prompts.items():
        if left <= 0:
            lines.append(f"\n... and {len(prompts) - sum(line.startswith('> ') for line in lines)} more prompts")
            break
        lines += ["", "> " + prompt.rstrip().replace("\n", "\n  ")]
        for row in answers:
            said = row["completion"] if isinstance(row["completion"], str) else row["completion"][0]["content"]
            cut = "" if row["ended"] else " [cut off]"
            lines.append(f"  {row['policy']}: {said.strip()}{cut}".replace("\n", "\n      "))
            left -= 1
    return "\n".join(_printable(line) for line in lines[1:])


def _printable(line: str) -> str:
    """Return text without characters that would steer a terminal."""
    return "".join(c if c == "\n" or c.isprintable() else "\ufffd" for c in line)


def _rows_text(found: dict[str, Any]) -> str:
    """Return results as rows of two columns; an estimate with its interval, rewards each on a row of its own."""
    rows: list[tuple[str, str]] = []
    for key, value in found.items():
        if key == "rewards":
            for name, estimate in value.items():
                whole = {"": estimate} if "mean" in estimate else estimate
                rows += [(f"{name} {when}".rstrip(), _estimate(e)) for when, e in whole.items()]
        elif key == "monitor":
            rows.append((key, value.get("message") or "nothing tripped"))
        elif isinstance(value, dict):
            rows.append((key, _estimate(value)))
        elif f"{key}_ci_low" in found:
            rows.append((key, f"{value:.4f}  [{found[f'{key}_ci_low']:.4f}, {found[f'{key}_ci_high']:.4f}]"))
        elif value is not None and "_ci_" not in key:
            rows.append((key, _short(value)))
    return table(rows)


def _estimate(value: dict[str, Any]) -> str:
    return "{mean:.4f}  [{ci_low:.4f}, {ci_high:.4f}]  n {n}".format(**value)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else word(value)


def _add_sampling(parser: argparse.ArgumentParser, source: str, nargs: str | None = None) -> None:
    parser.add_argument("source", metavar="SOURCE", nargs=nargs, help=source)
    parser.add_argument(
        "--prompts", metavar="FILE", help="a txt, JSONL, CSV or Parquet file (default: the run's held-out prompts)"
    )
    images = parser.add_argument_group(
        "images and videos (default: what the run evaluates with, or the pipeline's own)"
    )
    images.add_argument(
        "--sampler", metavar="NAME",
        help="ode (default), or a kernel: dance_sde, flow_sde, cps, precise, dance_precise; of diffusion models ddim",
    )  # fmt: skip
    images.add_argument("--eta", type=number, metavar="X", help="the noise it adds (default: the run's, of its kernel)")
    images.add_argument(
        "--steps", dest="solver_steps", type=positive, metavar="N", help="solver steps (default outside of a run: 20)"
    )
    images.add_argument(
        "--guidance", dest="guidance_scale", type=number, metavar="W", help="classifier-free guidance scale; 1 is none"
    )
    images.add_argument(
        "--embedded-guidance", type=number, metavar="W", help="the scale that a guidance-distilled model is told"
    )
    images.add_argument("--height", type=positive, metavar="N", help="in pixels")
    images.add_argument("--width", type=positive, metavar="N", help="in pixels")
    images.add_argument("--frames", type=positive, metavar="N", help="of a video")
    images.add_argument("--fps", type=number, metavar="X", help="frames a second of a video")
    images.add_argument("--shift", type=number, metavar="X", help="time shift of a flow's levels")
    images.add_argument("--batch", type=positive, metavar="N", help="made at once (default: what fits)")
    add_seed(parser)


def _add_text(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    texts = parser.add_argument_group("language models")
    texts.add_argument(
        "--temperature", type=number, metavar="T", help="0 is greedy (default: evaluation.temperature, else 1)"
    )
    texts.add_argument(
        "--top-p", type=share, metavar="P", help="draw from the likeliest tokens that add up to P (default: 1)"
    )
    texts.add_argument(
        "--max-new-tokens", type=positive, metavar="N",
        help="longest answer (default: evaluation.max_new_tokens, else 128)",
    )  # fmt: skip
    texts.add_argument("--chat", action="store_true", help="prompts of plain text are what a user says to the model")
    return texts


def sample_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `align sample`."""
    _add_sampling(parser, SOURCES)
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; may be given again")
    parser.add_argument(
        "--count", type=positive, metavar="N", help="images (default: 4) or answers (default: 1) of each prompt"
    )
    _add_text(parser).add_argument(
        "--before",
        dest="base",
        action="store_true",
        help="also let the model before training answer, under the same draws",
    )
    add_out(
        parser, "the folder of PNG files, grid.png and samples.jsonl (default: RUN/sampled of a run or its checkpoint, "
        "else ./samples), or the file of answers (default: RUN/completions.jsonl, else ./completions.jsonl)",
    )  # fmt: skip
    add_dry_run(parser)
    add_json(parser)


def evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `align evaluate`."""
    _add_sampling(parser, f"{SOURCES}; or a fit, whose reward is measured on feedback", "?")
    parser.add_argument(
        "--samples", type=positive, metavar="N",
        help="images in all (default: 256), or answers (default: 64 with rewards, else evaluation.prompts)",
    )  # fmt: skip
    add_rewards(
        parser,
        "a reward; may be given again (default: of images the held-out ones, of text none); without SOURCE, rewards "
        "are measured on feedback",
    )
    texts = _add_text(parser)
    texts.add_argument(
        "--data", metavar="FILE", help="rows to measure, of feedback for rewards (default: the run's held-out ones)"
    )
    texts.add_argument(
        "--trained-with", metavar="CONFIG", help="the config of a model that lies outside of its run folder"
    )
    rewards.add_arguments(parser)
    add_out(parser, "one JSON line a sample; of rewards, the page (default: evaluation.html)")
    add_dry_run(parser)
    add_json(parser)


def sample_candidates(options: argparse.Namespace, out: Path) -> Path:
    """Sample the candidates of `align select` into its folder, and return where they are.

    Answers go on where an earlier call stopped; images are made anew, unless the same call made them all.
    """
    prompts = options.prompts
    if _is_language(options):
        from trainers import sample_completions

        call = {"count": options.count or 8, "seed": options.seed} | {name: getattr(options, name) for name in _DRAWN}
        with _Bar() as bar:
            sample_completions(
                options.source, prompts, **_given(call), out=out / "candidates.jsonl", resume=True, progress=bar.show
            )
        return out / "candidates.jsonl"
    from align.tracking import replace_text
    from trainers import find_source, sample_images

    with _naming_flags():
        call = {"source": options.source, "prompts": prompts, "count": options.count or 8, **_sampling(options)}
        made, said = out / "samples" / "made.json", json.dumps([call, str(find_source(options.source).checkpoint)])
        if not made.is_file() or made.read_text(encoding="utf-8") != said or options.overwrite:
            made.unlink(missing_ok=True)
            sample_images(**call, out=out / "samples")
            replace_text(made, said)
    return out / "samples"


def plan_candidates(options: argparse.Namespace) -> str:
    """Refuse candidates that could not be sampled; return which prompts they would answer."""
    _is_language(options)
    require_source(options.source)
    return _prompts_plan(options.prompts, options.chat)


def candidate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `align select` that say what is sampled."""
    _add_sampling(
        parser, "candidates (JSONL, CSV or Parquet, or a folder of `align sample`), a table of scores, or a model"
    )
    parser.add_argument(
        "--count", type=positive, metavar="N", help="of a model: candidates of each prompt (default: 8)"
    )
    _add_text(parser)
