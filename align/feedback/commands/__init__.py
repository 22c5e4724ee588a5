"""The sub-verbs of `align feedback`, one module for each part; nothing heavy is imported before one runs."""

from __future__ import annotations

import argparse
import importlib
import importlib.util

PARTS = ("store", "serve", "annotate", "analysis", "matching")


def add_commands(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add every sub-verb; each part's `add` gives its parsers `run`, a function of the options that returns the exit
    code."""
    for part in PARTS:
        # A part that is not built yet is not offered.
        if importlib.util.find_spec(f"{__name__}.{part}"):
            importlib.import_module(f"{__name__}.{part}").add(actions)
    for action in actions.choices.values():
        action.set_defaults(flags=sorted(action._option_string_actions))
