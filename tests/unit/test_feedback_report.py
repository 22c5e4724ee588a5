"""The feedback page: the numbers of the statistics, everything escaped, nothing from elsewhere, and any store at all."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from align.cli import main
from align.errors import DataError
from align.feedback.events import FeedbackEvent, Item
from align.feedback.simulate import SimulationConfig, simulate
from align.feedback.store import Store
from align.reports.dots import Dot, dot_chart, matrix_chart, share_bar
from align.reports.feedback import write_report

WORLD = SimulationConfig(users=60, shown_per_user=20, pairs_per_rater=80, ratings_per_rater=80, prompts=30)


def store(path: Path, items: list[Item], events: list[FeedbackEvent]) -> Path:
    with Store.open(path) as opened:
        opened.add(items=items, events=events)
    return path


def page(path: Path, **options: str) -> tuple[str, dict]:
    out, found = write_report(path, draws=50, **options)
    return out.read_text(encoding="utf-8"), found


class Balanced(HTMLParser):
    """Fails on a tag that is closed but not open; collects addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br", "img", "path", "circle", "rect", "input"):
            self.open.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag


def whole(text: str) -> Balanced:
    parser = Balanced()
    parser.feed(text)
    parser.close()
    assert parser.open == [] and parser.addresses == []
    return parser


@pytest.fixture(scope="module")
def dirty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world = simulate(replace(WORLD, annoyed=1.5, constant=1, coordinated=2))
    return store(tmp_path_factory.mktemp("dirty") / "log.db", list(world.items.values()), world.events)


def test_a_page_of_a_troubled_log(dirty: Path):
    text, found = page(dirty)
    whole(text)
    assert "Mend this before training on it" in text and "constant-0" in text and "copy-0 and copy-1" in text
    for title in (
        "Who said what",
        "Do people agree?",
        "Do ratings and rankings say the same?",
        "Who wins",
        "silence",
        "abuse",
    ):
        assert title in text
    compared = found["consistency"]
    cells = [int(n.replace(",", "")) for n in re.findall(r'class="cellbig"[^>]*>\s*([\d,]+)<', text)]
    assert cells == [n for row in compared["matrix"] for n in row]
    assert f"{compared['flips']} of {compared['both_strict']}" in text


def test_a_quiet_log_is_not_called_troubled(tmp_path: Path):
    items = [
        Item(f"p{i}", "x" * (20 + (i * 7 + m) % 3), metadata={"model": f"m{m}"}) for i in range(60) for m in range(2)
    ]
    events = []
    for i in range(60):
        pair = tuple(item.id for item in (items[2 * i : 2 * i + 2] if i % 2 else items[2 * i : 2 * i + 2][::-1]))
        for name in ("ann", "bob"):
            said = "a" if i % 4 in (0, 1) else "b"
            events.append(FeedbackEvent("pairwise", pair, said, annotator=name, ts=1_000_000 * (i + 1)))
    _, found = page(store(tmp_path / "s.db", items, events))
    text, _ = page(tmp_path / "s.db")
    assert "Ready to convert and train on" in text and found["people"]["coordinated"] == []
    whole(text)


def test_an_empty_store_and_one_answer(tmp_path: Path):
    text, _ = page(store(tmp_path / "empty.db", [], []))
    assert "Nothing has been said yet" in text
    whole(text)
    item = Item("p", "x")
    text, _ = page(store(tmp_path / "one.db", [item], [FeedbackEvent("binary", (item.id,), True, key="thumb")]))
    assert "reactions and no exposures" in text and "Too early to tell" not in text
    whole(text)


EVIL = "<script>alert(1)</script>\"'&<img src=x onerror=alert(2)>"


def test_everything_people_wrote_is_escaped(tmp_path: Path):
    items = [Item(EVIL, f"{EVIL}{i}", metadata={"model": f"{EVIL}{i % 2}"}) for i in range(4)]
    events = []
    for name in (EVIL, f"{EVIL}2", "c"):
        events += [FeedbackEvent("ordinal", (i.id,), 2, scale=(1, 7), annotator=name, key=EVIL) for i in items]
        events += [FeedbackEvent("reaction", (i.id,), EVIL, annotator=name, key=EVIL, exposure="shown") for i in items]
        events += [FeedbackEvent("text", (i.id,), EVIL, annotator=name, session=str(n)) for n, i in enumerate(items)]
        for k, value in enumerate("ab"):
            pair = (items[k].id, items[k + 1].id)
            events.append(FeedbackEvent("pairwise", pair, value, annotator=name, key=EVIL, source="ai"))
    text, _ = page(store(tmp_path / "s.db", items, events))
    whole(text)
    assert "<script>alert" not in text and "<img src=x" not in text and "&lt;script&gt;" in text


def test_the_verb(dirty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out, found = tmp_path / "deep" / "page.html", tmp_path / "page.json"
    verb = ["feedback", "report", str(dirty), "--out", str(out), "--json", str(found), "--draws", "20"]
    assert main([*verb, "--dry-run"]) == 0 and not out.exists()
    assert main(verb) == 0
    assert out.read_text(encoding="utf-8").startswith("<!DOCTYPE html>") and json.loads(found.read_text())[
        "report"
    ] == str(out)
    assert main(["feedback", "report", str(tmp_path / "none.db")]) == 2
    assert main(["feedback", "report", str(dirty), "--outcome", "nothing"]) == 2
    assert "No rating or thumb has the key 'nothing'" in capsys.readouterr().err
    with pytest.raises(DataError):
        write_report(tmp_path / "none.db")


def test_charts_leave_out_what_is_missing():
    assert dot_chart([Dot("x", None), Dot("y", float("nan"))]) == "" and share_bar([("x", 0, 1)]) == ""
    chart = dot_chart([Dot("x", 0.25, 0.0, 0.5), Dot("y", 0.75)], low=0, high=1, share=True, reference=(0.5, "even"))
    places = [float(x) for x in re.findall(r'<circle[^>]* cx="([\d.]+)"', chart)]
    assert places[1] - places[0] == pytest.approx((520 - 66 - 170) / 2, abs=0.11) and chart.count("whisker") == 1
    assert matrix_chart([[0, 0], [0, 0]], "ab", "ab").count("<rect") == 4
