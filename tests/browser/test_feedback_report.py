"""The feedback report in a real browser: it fits a desk, a phone and the dark, and neither style nor script is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from chromium import Chromium

from align.feedback.simulate import SimulationConfig, simulate
from align.feedback.store import Store
from align.reports.feedback import write_report

WORLD = SimulationConfig(
    users=60,
    shown_per_user=20,
    pairs_per_rater=80,
    ratings_per_rater=80,
    prompts=30,
    annoyed=1.2,
    constant=1,
    coordinated=2,
)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world, folder = simulate(WORLD), tmp_path_factory.mktemp("report")
    with Store.open(folder / "log.db") as store:
        store.add(items=world.items.values(), events=world.events)
    return write_report(folder / "log.db", draws=50)[0]


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "light"), (1280, "dark")])
def test_the_report_fits(chromium: Chromium, report: Path, tmp_path: Path, width: int, scheme: str):
    chromium.new_page()
    chromium.size(width, 900)
    chromium.scheme(scheme)
    chromium.open(report.as_uri())
    assert chromium.complaints() == []
    assert "Mend this before training on it" in chromium.text()
    assert chromium.run("document.documentElement.scrollWidth") <= width
    # Every label of every chart lies within its drawing.
    outside = chromium.run(
        "[...document.querySelectorAll('.dots svg')].flatMap(s => { const b = s.getBoundingClientRect();"
        " return [...s.querySelectorAll('text')].filter(t => { const r = t.getBoundingClientRect();"
        " return r.left < b.left - 2 || r.right > b.right + 2 || r.bottom > b.bottom + 2; }).map(t => t.textContent); })"
    )
    assert outside == []
    assert chromium.run("document.querySelectorAll('svg .cell').length") == 9
    chromium.screenshot(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 20_000
