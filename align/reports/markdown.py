"""Markdown of cards: text that others wrote is shown and never acts; what every card says of a run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from align.reports.runfiles import RunFiles
from align.weights import file_sha256


def code(value: Any) -> str:
    """Return text as a Markdown code span, which shows it as it is whatever it holds."""
    text = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in str(value)) or " "
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def plain(value: Any) -> str:
    """Return text with everything that Markdown or HTML would act upon escaped, on one line."""
    text = " ".join(str(value).split())
    return re.sub(r"([\\`*_\[\]<>|~#&])", r"\\\1", text)


def front_matter(values: Mapping[str, Any]) -> str:
    """Return the YAML that opens a card, between its two lines."""
    import yaml

    return f"---\n{yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)}---\n\n"


def made_by(files: RunFiles, name: str = "config.yaml") -> list[str]:
    """Return the lines on a run's configuration, versions and machine.

    Args:
        name: of the copy of the configuration that the card points at.
    """
    config = files.directory / "config.yaml"
    values = re.match(r"# align config, resolved; values (\w+)\n", config.read_text(encoding="utf-8"))
    try:
        ours = version("align")
    except PackageNotFoundError:
        ours = "(not installed)"
    return [
        f"- Configuration: {code(name)}, values {code(values[1] if values else 'not recorded')}, sha256 "
        f"{code(file_sha256(config))}.",
        f"- Versions: {_pairs(files.record.get('versions'))}; made on {_pairs(files.record.get('machine'))}; this card "
        f"by align {plain(ours)}.",
    ]


def _pairs(found: Any) -> str:
    return ", ".join(f"{plain(k)} {plain(v)}" for k, v in found.items()) if isinstance(found, dict) else "not recorded"
