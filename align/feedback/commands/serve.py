"""`align feedback serve`: the annotation page."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from align.output import add_dry_run, add_json, give, table, whole

EXAMPLES = """examples:
  align feedback serve task.yaml --dry-run
  align feedback serve task.yaml --store feedback.db --port 8000
  align feedback serve task.yaml --host 0.0.0.0 --annotator-tokens tokens.txt
  align feedback serve task.yaml --product-origin https://app.example"""


def add(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `serve`."""
    parser = actions.add_parser(
        "serve", help="open the annotation page of a task", epilog=EXAMPLES,
        description="Serve the annotation page of a task until interrupted. Answers are acknowledged once on disk.",
    )  # fmt: skip
    parser.add_argument("task", type=Path, metavar="TASK", help="the task file, YAML")
    parser.add_argument(
        "--store",
        type=Path,
        default=Path("feedback.db"),
        metavar="FILE",
        help="where answers go (default: feedback.db)",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS",
        help="address to listen on (default: 127.0.0.1); any but loopback needs --annotator-tokens",
    )  # fmt: skip
    parser.add_argument(
        "--port", type=whole, default=8000, metavar="N", help="port; 0 takes a free one (default: 8000)"
    )
    parser.add_argument(
        "--annotator-tokens",
        type=Path,
        metavar="FILE",
        help="who may annotate: `NAME TOKEN` a line, tokens of 16 characters or more",
    )
    parser.add_argument(
        "--public-name",
        action="append",
        default=[],
        metavar="NAME",
        help="a host name under which people reach this server; may be given again",
    )
    parser.add_argument(
        "--product-origin", action="append", default=[], metavar="ORIGIN",
        help="a site such as https://app.example whose pages may post to /feedback; may be given again",
    )  # fmt: skip
    add_dry_run(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Serve, or say what would be served."""
    from align.feedback.server.run import plan, serve

    planned = plan(
        options.task, options.store, host=options.host, port=options.port, annotator_tokens=options.annotator_tokens,
        public_names=options.public_name, product_origins=options.product_origin,
    )  # fmt: skip
    if options.dry_run:
        described = planned.describe()
        rows = [
            (key.replace("_", " "), ", ".join(map(str, v)) if isinstance(v, list) else str(v))
            for key, v in described.items()
        ]
        return give(options, described, f"would serve:\n{table(rows)}")

    def ready(found: dict[str, object]) -> None:
        opening = f"{found['name']}: {found['screens']} screens\nopen {found['url']}"
        give(options, found, f"{opening}\nanswers go to {found['store']}; ctrl-c stops")

    done = serve(planned, ready)
    sys.stderr.write(f"align: {done['complete']} of {done['screens']} screens are complete.\n")
    for name, counts in done["annotators"].items():
        gold = f", {counts['gold_right']} of {counts['gold']} gold answers right" if counts["gold"] else ""
        sys.stderr.write(f"align: {name}: {counts['answered']} answered{gold}.\n")
    return 0
