"""The pictures of the pages on pillars are drawn by what they show."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]


def _words(picture: Path) -> list[str]:
    return [text for text in ElementTree.parse(picture).getroot().itertext() if text.strip()]


def test_the_picture_of_raters_names_who_is_flagged_and_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")  # it imports its neighbours as a script does
    pillar_pictures = import_module("pillar_pictures")
    monkeypatch.setattr(
        "sys.argv", ["pillar_pictures.py", "feedback", "--out", str(tmp_path), "--cache", str(tmp_path / "runs")]
    )
    pillar_pictures.main()
    flagged = {word.partition(":")[0] for word in _words(tmp_path / "healthy_feedback.svg") if ": " in word}
    assert {name for name in flagged if name[-1].isdigit()} == {"constant-0", "copy-0", "copy-1"}
