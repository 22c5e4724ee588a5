"""`align feedback annotate`: an AI annotator rates or ranks what a store holds."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from align.errors import ConfigError
from align.output import add_dry_run, add_json, give, positive, table, whole

EXAMPLES = """examples:
  align feedback annotate feedback.db --task ranking --endpoint http://127.0.0.1:8000/v1 --model judge
  align feedback annotate feedback.db --task rating --endpoint https://api.example/v1 --model judge --scale 1-7
  align feedback annotate feedback.db --task ranking --endpoint http://127.0.0.1:8000/v1 --model judge --p-flip 0.25"""


def add(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `annotate`."""
    parser = actions.add_parser(
        "annotate", help="let an AI annotator rate or rank what a store holds", epilog=EXAMPLES,
        description="Let an AI annotator rate or rank what a store holds. What it answered before is not asked again.",
    )  # fmt: skip
    parser.add_argument("store", type=Path, metavar="STORE", help="the store's file")
    parser.add_argument("--task", required=True, choices=("rating", "ranking"), help="what to ask")
    parser.add_argument("--endpoint", required=True, metavar="URL", help="base of an OpenAI-compatible API")
    parser.add_argument("--model", required=True, metavar="NAME", help="the model's name there")
    parser.add_argument("--name", default="", metavar="NAME", help="annotator to answer as (default: the model's name)")
    parser.add_argument("--key", default="quality", metavar="NAME", help="signal to answer (default: quality)")
    parser.add_argument("--scale", default="1-7", metavar="LOW-HIGH", help="of ratings (default: 1-7)")
    parser.add_argument("--criteria", default="", metavar="TEXT", help="what to judge by")
    parser.add_argument("--pairs", type=whole, default=0, metavar="N", help="pairs a prompt at most (default: all)")
    parser.add_argument(
        "--p-flip", type=float, default=0.0, metavar="P", help="turn verdicts around with probability P"
    )
    parser.add_argument(
        "--api-key-env", default="ALIGN_JUDGE_KEY", metavar="NAME",
        help="environment variable that holds the key, where one is needed (default: ALIGN_JUDGE_KEY)",
    )  # fmt: skip
    parser.add_argument("--concurrency", type=positive, default=8, metavar="N", help="questions at once (default: 8)")
    parser.add_argument("--tries", type=positive, default=4, metavar="N", help="attempts a question (default: 4)")
    parser.add_argument(
        "--timeout", type=float, default=60.0, metavar="S", help="seconds for one request (default: 60)"
    )
    parser.add_argument("--deadline", type=float, default=0.0, metavar="S", help="seconds in all (default: none)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="of sampling (default: 0)")
    parser.add_argument("--seed", type=whole, default=0, metavar="N", help="of pairs and of noise (default: 0)")
    add_dry_run(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Ask, write the answers into the store, and say how many there are."""
    from align.feedback.annotators import CRITERIA, Annotation, annotate, questions_of
    from align.feedback.asking import Endpoint, Patience
    from align.feedback.overview import plain
    from align.feedback.store import Store

    annotation = Annotation(
        options.task, options.name or options.model, key=options.key, scale=_scale(options.scale),
        criteria=options.criteria or CRITERIA, pairs=options.pairs, p_flip=options.p_flip, seed=options.seed,
    )  # fmt: skip
    endpoint = Endpoint(
        options.endpoint, options.model, os.environ.get(options.api_key_env, ""), temperature=options.temperature,
        timeout=options.timeout,
    )  # fmt: skip
    patience = Patience(options.concurrency, options.tries, deadline=options.deadline)
    with Store.open(options.store, create=False) as store:
        items = store.items()
        if options.dry_run:
            planned: dict[str, Any] = {"questions": len(questions_of(items, annotation)), "items": len(items)}
            return give(options, planned, f"would ask {planned['questions']} questions about {len(items)} items")
        known = list(store.current(annotator=annotation.annotator))
        found = annotate(items, known, endpoint, lambda events: store.add(events=events), annotation, patience=patience)
    found = plain({"annotator": annotation.annotator, "task": options.task, "key": options.key, **found})
    give(options, found, table([(key.replace("_", " "), _shown(value)) for key, value in found.items()]))
    if found["questions"] > found["resumed"] and not found["valid"]:
        why = found["commonest_failure"] or "the deadline passed before any question was asked"
        sys.stderr.write(f"align: No question got a valid answer: {why}.\n")
        return 2
    if found["coverage"] is not None and found["coverage"] < 0.9:
        sys.stderr.write("align: Warning: fewer than 90 % of the questions have an answer; the same command goes on.\n")
    return 0


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "–" if value is None else str(value)


def _scale(text: str) -> tuple[int, int]:
    low, mark, high = text.partition("-")
    if not mark or not low.isdecimal() or not high.isdecimal() or int(low) >= int(high):
        raise ConfigError("A scale is LOW-HIGH", where=f"--scale {text}", do="Write e.g. 1-7")
    return int(low), int(high)
