"""`align feedback annotate`: an AI annotator rates or ranks what a store holds."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import ConfigError
from align.output import add_dry_run, add_json, add_seed, give, number, positive, table, whole

if TYPE_CHECKING:
    from align.feedback.asking import Judge
    from align.feedback.events import FeedbackEvent

EXAMPLES = """examples:
  align feedback annotate feedback.db --task ranking --endpoint http://127.0.0.1:8000/v1 --model judge
  align feedback annotate feedback.db --task rating --endpoint https://api.example/v1 --model judge --scale 1-7
  align feedback annotate feedback.db --task ranking --endpoint http://127.0.0.1:8000/v1 --model judge --p-flip 0.25
  align feedback annotate feedback.db --task rating --model models/judge --dtype bf16"""
OF_ENDPOINTS = {"temperature": 0.0, "timeout": 60.0, "api_key_env": "ALIGN_JUDGE_KEY"}
OF_FOLDERS = {"dtype": "fp32", "max_new_tokens": 64}
TRIES = {"endpoint": 4, "folder": 1}


def add(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `annotate`."""
    parser = actions.add_parser(
        "annotate", help="let an AI annotator rate or rank what a store holds", epilog=EXAMPLES,
        description="Let an AI annotator rate or rank what a store holds. What it answered before is not asked again.",
    )  # fmt: skip
    parser.add_argument("store", type=Path, metavar="STORE", help="the store's file")
    parser.add_argument("--task", required=True, choices=("rating", "ranking"), help="what to ask")
    parser.add_argument("--endpoint", metavar="URL", help="base of an OpenAI-compatible API")
    parser.add_argument(
        "--model", required=True, metavar="MODEL",
        help="the model's name at the endpoint; without --endpoint a local model: its folder, or hub id",
    )  # fmt: skip
    parser.add_argument(
        "--name", default="", metavar="NAME",
        help="annotator to answer as (default: the model's name; of a local model with its identity)",
    )  # fmt: skip
    parser.add_argument("--key", default="quality", metavar="NAME", help="signal to answer (default: quality)")
    parser.add_argument("--scale", default="1-7", metavar="LOW-HIGH", help="of ratings (default: 1-7)")
    parser.add_argument("--criteria", default="", metavar="TEXT", help="what to judge by")
    parser.add_argument(
        "--pairs-each", dest="pairs", type=whole, default=0, metavar="N", help="pairs a prompt at most (default: all)"
    )
    parser.add_argument(
        "--p-flip", type=number, default=0.0, metavar="P", help="turn verdicts around with probability P"
    )
    parser.add_argument(
        "--api-key-env", metavar="NAME",
        help="environment variable that holds the key, where one is needed (default: ALIGN_JUDGE_KEY)",
    )  # fmt: skip
    parser.add_argument("--concurrency", type=positive, default=8, metavar="N", help="questions at once (default: 8)")
    parser.add_argument(
        "--tries", type=positive, metavar="N",
        help="attempts a question (default: 4; 1 for a local model, which would say the same again)",
    )  # fmt: skip
    parser.add_argument("--timeout", type=number, metavar="S", help="seconds for one request (default: 60)")
    parser.add_argument("--deadline", type=number, default=0.0, metavar="S", help="seconds in all (default: none)")
    parser.add_argument("--temperature", type=number, metavar="T", help="0 is greedy (default: 0)")
    parser.add_argument("--dtype", metavar="NAME", help="of a local model: fp32, bf16 or fp16 (default: fp32)")
    parser.add_argument(
        "--max-new-tokens", type=positive, metavar="N", help="longest reply of a local model (default: 64)"
    )
    add_seed(parser, 0)
    add_dry_run(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, local: Callable[[argparse.Namespace], tuple[Judge, str]] | None = None) -> int:
    """Ask, write the answers into the store, and say how many there are.

    Args:
        local: makes the judge of a local model, and its identity; checks only, with --dry-run. The command line gives
            it: this room knows no models.
    """
    from align.feedback.annotators import CRITERIA, Annotation, annotate, questions_of
    from align.feedback.asking import Patience
    from align.feedback.overview import plain
    from align.feedback.store import Store

    _settle_flags(options)
    scale = _scale(options.scale)
    with Store.open(options.store, create=False) as store:
        judge, identity = _endpoint(options) if options.endpoint is not None or local is None else local(options)
        name = f"{Path(options.model).expanduser().resolve().name}@{identity}" if identity else options.model
        annotation = Annotation(
            options.task, options.name or name, key=options.key, scale=scale, criteria=options.criteria or CRITERIA,
            pairs=options.pairs, p_flip=options.p_flip, seed=options.seed,
        )  # fmt: skip
        items = store.items()
        if options.dry_run:
            planned: dict[str, Any] = {"questions": len(questions_of(items, annotation)), "items": len(items)}
            return give(options, planned, f"would ask {planned['questions']} questions about {len(items)} items")
        patience = Patience(options.concurrency, options.tries, deadline=options.deadline)
        known = list(store.current(annotator=annotation.annotator))

        def keep(events: Sequence[FeedbackEvent]) -> None:
            now = time.time_ns() // 1_000_000
            store.add(events=[dataclasses.replace(event, ts=now) for event in events])

        found = annotate(items, known, judge, keep, annotation, patience=patience)
    who = {"annotator": annotation.annotator, **({"identity": identity} if identity else {})}
    found = plain({**who, "task": options.task, "key": options.key, **found})
    give(options, found, table([(key.replace("_", " "), _shown(value)) for key, value in found.items()]))
    if found["questions"] > found["resumed"] and not found["valid"]:
        why = found["commonest_failure"] or "the deadline passed before any question was asked"
        sys.stderr.write(f"align: No question got a valid answer: {why}.\n")
        return 2
    if found["coverage"] is not None and found["coverage"] < 0.9:
        sys.stderr.write("align: Warning: fewer than 90 % of the questions have an answer; the same command goes on.\n")
    return 0


def _settle_flags(options: argparse.Namespace) -> None:
    """Fill in what was not given, and refuse flags of the other kind of judge.

    Raises:
        ConfigError: a flag of endpoints for a local model, or the other way.
    """
    remote = options.endpoint is not None
    for name in OF_FOLDERS if remote else OF_ENDPOINTS:
        if getattr(options, name) is not None:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(
                f"{flag} is of a local model, and --endpoint asks another machine's" if remote
                else f"{flag} is of an endpoint, and there is none: --model is a local model",
                do=f"Leave {flag} out, or {'--endpoint' if remote else 'give --endpoint URL'}",
            )  # fmt: skip
    for name, value in {**OF_ENDPOINTS, **OF_FOLDERS, "tries": TRIES["endpoint" if remote else "folder"]}.items():
        if getattr(options, name) is None:
            setattr(options, name, value)


def _endpoint(options: argparse.Namespace) -> tuple[Any, str]:
    from align.feedback.asking import Endpoint

    if options.endpoint is None:
        raise ConfigError("There is nobody to ask", do="Give --endpoint URL")
    key = os.environ.get(options.api_key_env, "")
    return Endpoint(
        options.endpoint, options.model, key, temperature=options.temperature, timeout=options.timeout
    ), ""  # fmt: skip


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "–" if value is None else str(value)


def _scale(text: str) -> tuple[int, int]:
    low, mark, high = text.partition("-")
    if not mark or not low.isdecimal() or not high.isdecimal() or int(low) >= int(high):
        raise ConfigError("A scale is LOW-HIGH", where=f"--scale {text}", do="Write e.g. 1-7")
    return int(low), int(high)
