"""`align configs`: the recipes, listed, shown and copied; and what TRL's arguments are in ours."""

from __future__ import annotations

import argparse
from pathlib import Path

from align.errors import ConfigError
from align.output import add_action, add_dry_run, add_json, add_overwrite, dry, give, positive, table


def configs(options: argparse.Namespace) -> int:
    """List, show and copy recipes; port a TRL script's arguments."""
    from align.recipes import copy_recipe, list_recipes, read_recipe

    if options.action == "show":
        text = read_recipe(options.name)
        return give(options, {"name": options.name, "text": text}, text.rstrip("\n"))
    if options.action == "copy":
        if options.dry_run:
            read_recipe(options.name)
            return dry(options, "copy", {"recipe": options.name, "to": str(options.destination)})
        path = copy_recipe(options.name, options.destination, overwrite=options.overwrite)
        return give(options, {"file": str(path)}, f"wrote {path}; `align check {path}` says what it will do")
    if options.action == "from-trl":
        return _from_trl(options)
    recipes = [{"name": name, "about": about} for name, about in list_recipes()]
    return give(options, recipes, table([(recipe["name"], recipe["about"]) for recipe in recipes]))


def _from_trl(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from align.textfiles import parse_yaml, read_text
    from trainers.compat import as_yaml, from_trl

    given = parse_yaml(read_text(options.file), str(options.file)).value
    if not isinstance(given, dict):
        raise ConfigError("TRL's arguments are a list of `name: value` lines", where=str(options.file))
    ported = from_trl(given, trainer=options.trainer, processes=options.nproc)
    findings = [asdict(finding) for finding in ported.findings]
    return give(options, {"config": ported.values, "findings": findings}, as_yaml(ported))


def configs_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `align configs`."""
    parser.set_defaults(action="list")
    add_json(parser)
    actions = parser.add_subparsers(metavar="ACTION")
    listing = add_action(actions, "list", "name and purpose of every recipe", "align configs list --json -")
    show = add_action(actions, "show", "print a recipe", "align configs show digits/dance_grpo")
    copy = add_action(actions, "copy", "copy a recipe to edit it", "align configs copy digits/dance_grpo mine.yaml")
    port = add_action(
        actions, "from-trl", "print our config of the arguments of a TRL script", "align configs from-trl kto.yaml"
    )
    for parser_, action in ((listing, "list"), (show, "show"), (copy, "copy"), (port, "from-trl")):
        parser_.set_defaults(action=action)
        add_json(parser_, argparse.SUPPRESS)
    for parser_ in (show, copy):
        parser_.add_argument("name", metavar="NAME", help="a recipe, e.g. digits/dance_grpo")
    port.add_argument("file", type=Path, metavar="FILE", help="a YAML file of TRL's arguments")
    port.add_argument("--trainer", metavar="NAME", help="kto, bco, dpo or sft (default: what the arguments say)")
    port.add_argument("--nproc", type=positive, default=1, metavar="N", help="processes of TRL's launch (default: 1)")
    copy.add_argument("destination", type=Path, metavar="DEST", help="a file or a folder")
    add_overwrite(copy, "replace the file")
    add_dry_run(copy)
