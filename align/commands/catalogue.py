"""`align rewards`: the registry, listed, described, and served to other machines."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from align.errors import ConfigError
from align.output import (
    add_action,
    add_dry_run,
    add_json,
    add_rewards,
    dry,
    give,
    named_rewards,
    positive,
    table,
    whole,
    word,
)


def rewards(options: argparse.Namespace) -> int:
    """List, describe and serve rewards."""
    import dataclasses

    from align.registry import require_known
    from rewards import list_rewards
    from rewards.base import card_of

    if options.action == "serve":
        return _serve(options)
    cards = {card.name: dataclasses.asdict(card) for card in list_rewards()}
    if options.action == "describe":
        if ":" in options.name and options.name not in cards:
            cards[options.name] = dataclasses.asdict(card_of(options.name))
        require_known(options.name, cards, "reward")
        card = cards[options.name]
        return give(options, card, table([(key, word(value)) for key, value in card.items()]))
    shown = ("name", "media", "range", "licence", "size")
    rows = [shown, *(tuple(card[key] for key in shown) for card in cards.values())]
    widths = [max(len(row[i]) for row in rows) for i in range(len(shown))]
    text = "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
    return give(options, list(cards.values()), f"{text}\n\n`align rewards describe NAME` says what each of them is")


def _serve(options: argparse.Namespace) -> int:
    try:
        from rewards.serve import asked_of, require_asked, serve
    except ModuleNotFoundError as error:
        raise ConfigError("Serving needs more packages", why=str(error), do="pip install 'align[server]'") from error
    asked = asked_of(named_rewards(options))
    require_asked(asked)
    if options.dry_run:
        return dry(options, "serve", {"rewards": [name for name, _ in asked], "at": f"{options.host}:{options.port}"})

    def log(line: str) -> None:
        sys.stderr.write(f"align: {line}\n")

    def ready(where: dict[str, Any]) -> None:
        if options.host not in ("127.0.0.1", "::1", "localhost"):
            log("Warning: whoever reaches this address can use the server; there is no authentication.")
        give(options, where, f"serving {', '.join(where['rewards'])} at {where['url']}", one_line=True)

    serve(asked, options.host, options.port, limit_mb=options.limit_mb, ready=ready, log=log)
    return 0


def rewards_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `align rewards`."""
    parser.set_defaults(action="list")
    add_json(parser)
    actions = parser.add_subparsers(metavar="ACTION")
    listing = add_action(
        actions, "list", "name and definition of every reward", "align rewards list --json rewards.json"
    )
    describe = add_action(
        actions, "describe", "what one reward measures, its range, licence and needs",
        "align rewards describe digits/legibility",
    )  # fmt: skip
    describe.add_argument("name", metavar="NAME", help="a reward, e.g. digits/legibility")
    serve = add_action(
        actions, "serve", "let other machines use rewards of this one",
        "align rewards serve --reward hpsv2.1 --reward aesthetic --port 8765",
    )  # fmt: skip
    add_rewards(serve)
    serve.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on (default: 127.0.0.1)"
    )
    serve.add_argument("--port", type=whole, default=8765, metavar="N", help="port; 0 takes a free one (default: 8765)")
    serve.add_argument(
        "--limit-mb", type=positive, default=256, metavar="N", help="the largest request in MB (default: 256)"
    )
    add_dry_run(serve)
    for parser_, action in ((listing, "list"), (describe, "describe"), (serve, "serve")):
        parser_.set_defaults(action=action)
        add_json(parser_, argparse.SUPPRESS)
