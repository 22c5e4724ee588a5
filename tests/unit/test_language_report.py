"""The page of a language model's run: its own words and numbers, the verdict by held-out rows, intervals that cover."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import trainers
from align.config import config_types, load_config
from align.language_config import LanguageConfig
from align.loops import LANGUAGE, LOOPS, REWARDS
from align.reports.glossary import LANGUAGE_TRAINERS, explain, writers
from align.reports.language import AUC, NATS, PAIRS, judge_language, language_outcome
from align.reports.runfiles import RunFiles, read_run
from align.reports.training import write_report
from tests.unit.test_report import Page
from trainers import trainer_for
from trainers.language_measures import auc, auc_interval, ratio_estimate
from trainers.language_verbs import objective_of

VISUAL = (
    "Held-out reward rose",
    "Diversity",
    "F_eq",
    "No verdict yet",
    "First ratio",
    "Samples trained",
    "Cost of a sample",
)
EVIL = '<script>alert("x")</script>'


JUDGED = {
    "rewards": {"love": {"name": "toy/love"}, "safety": {"name": "toy/safety", "role": "gate"}},
    "sampling": {"completions": 2, "max_new_tokens": 4},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short real run of each trainer, by its name."""
    folder = tmp_path_factory.mktemp("runs")
    for trainer in LANGUAGE_TRAINERS:
        config = load_config(
            {
                **(JUDGED if trainer == "rluf" else {}),
                "trainer": trainer, "name": trainer, "about": f"toy {EVIL}", "steps": 12, "batch_size": 32,
                "microbatch": 16, "model": {"path": "tiny", "train": "full"}, "optimizer": {"lr": 3e-3},
                "data": {"path": "toy", "heldout_fraction": 0.2}, "evaluation": {"every": 6, "rows": 80, "prompts": 5, "max_new_tokens": 6},
                "checkpoint": {"every": 0},
            }
        )  # fmt: skip
        trainer_for(config, out=folder / trainer).train()
    return folder


@pytest.fixture
def kto(runs: Path, tmp_path: Path) -> Path:
    """A copy of the kto run's files to break."""
    shutil.copytree(runs / "kto", tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    return tmp_path / "run"


def page_of(folder: Path) -> tuple[str, Page]:
    text = write_report(folder).read_text(encoding="utf-8")
    return text, Page(text)


def test_every_language_trainer_has_the_page():
    kinds = {name for name, kind in config_types().items() if issubclass(kind, LanguageConfig)}
    assert kinds == set(LANGUAGE_TRAINERS)


@pytest.mark.parametrize("name", LOOPS)
def test_the_parts_of_a_loop_are_where_its_line_says(name: str):
    kind = config_types()[name]
    assert kind.model_fields["trainer"].default == name and kind.language == (name in LANGUAGE)
    if name not in REWARDS:
        assert getattr(trainers, LOOPS[name].title).__module__ == f"trainers.{name}"
    if name in LANGUAGE:
        data = {"trainer": name, "model": {"path": "tiny"}, "data": {"path": "toy"}}
        made = objective_of(load_config(data | (JUDGED if name == "rluf" else {})))
        assert type(made).__module__ == f"trainers.{name}" and isinstance(made.paired, bool)


@pytest.mark.parametrize("trainer", LANGUAGE_TRAINERS)
def test_page_speaks_of_this_trainer(runs: Path, trainer: str):
    text, page = page_of(runs / trainer)
    files = read_run(runs / trainer)
    assert [words for words in VISUAL if words in page.text] == []
    verdict = "Improved" if trainer != "rluf" else ""  # which 12 steps of two completions need not reach
    assert re.search(f"<title>{trainer} – .*{verdict}.* – align</title>", text)
    for key, value in files.metrics[-1].items():
        assert explain(key, trainer).endswith(".") and f">{key}</td>" in text, key
        assert value is None or trainer in writers(key), key
    for key in files.evaluations[-1]:
        assert explain(key, trainer).endswith(".") and trainer in writers(key), key
    assert explain("loss", trainer) in page.text and explain("loss", trainer) != explain("loss")
    assert EVIL in page.text and "<script>alert" not in text and not re.search(r"https?://|url\(|@import", text)


def test_page_tells_the_outcome_in_numbers_of_the_files(runs: Path):
    last = read_run(runs / "kto").evaluations[-1]
    pairs, area = last["pair_accuracy"], last["auc"]
    said = page_of(runs / "kto")[1].text
    half = 50 * (pairs["ci_high"] - pairs["ci_low"])
    digits = 0 if half >= 10 else 1  # two digits of the half-width, in points
    assert f"Held-out pair accuracy rose from {50:.{digits}f} % to {100 * pairs['mean']:.{digits}f} %" in said
    low = f"{100 * pairs['ci_low'] - 50:+.{digits}f}"
    assert f"(+{100 * pairs['mean'] - 50:.{digits}f} points, 95 % CI {low} to " in said
    assert f"{pairs['n']} pairs), AUC went from 0.500 to {area:.3f}" in said
    assert f"95 % CI {last['auc_ci_low']:.3f} to {last['auc_ci_high']:.3f}; before: 0.500" in said


def test_supervised_page_compares_row_by_row(runs: Path):
    first, last = (read_run(runs / "sft").evaluations[i] for i in (0, -1))
    change = last["nats_change"]
    assert first["nats_change"]["mean"] == 0 and change["ci_high"] < 0
    assert change["mean"] == pytest.approx(last["nats_per_token"] - first["nats_per_token"])
    said = page_of(runs / "sft")[1].text
    assert f"Held-out nats per token fell from {first['nats_per_token']:.3f} to {last['nats_per_token']:.3f}" in said
    assert "AUC" not in said and "log-probs. Whether" not in said


@pytest.mark.parametrize(
    ("trainer", "own", "others"), [("kto", "z0", "delta"), ("bco", "delta", "z0"), ("dpo", "", "z0")]
)
def test_curves_are_those_the_trainer_has(runs: Path, trainer: str, own: str, others: str):
    page = page_of(runs / trainer)[1]
    drawn = [json.loads(a["data-chart"]) for _, a in page.tags if "data-chart" in a]
    series = {s["name"]: s["p"] for chart in drawn for s in chart["series"]}
    files = read_run(runs / trainer)
    assert {"held-out pair accuracy", "held-out rows", "thumbs up", "thumbs down", "margin", "nats a token"} <= set(
        series
    )
    assert [p[2] for p in series["held-out rows"]] == [row["auc"] for row in files.evaluations]
    assert [p[0] for p in series["held-out pair accuracy"]] == [0, 6, 12]
    assert [p[2] for p in series["gradient norm"]] == [row["grad_norm"] for row in files.metrics]
    assert others not in series and (not own or [p[2] for p in series[own]] == [row[own] for row in files.metrics])


def test_trainer_is_read_from_the_configuration_when_the_record_is_gone(kto: Path):
    (kto / "run.json").unlink()
    said = page_of(kto)[1].text
    assert "Held-out pair accuracy rose" in said and "run.json is missing" in said and "has no recorded end" in said


def test_run_killed_early_has_no_verdict(kto: Path):
    (kto / "summary.json").unlink()
    for name in ("evaluation", "metrics"):
        path = kto / f"{name}.jsonl"
        path.write_text(path.read_text().splitlines(keepends=True)[0] + '{"step": 9, "l')
    said = page_of(kto)[1].text
    assert "No verdict yet" in said and "could not be read" in said and "Reference point z0" in said


@pytest.mark.parametrize("value", [None, "x", [], {}, [1], True, -1, 1e300, [[1]], '"><script>'])
def test_a_value_of_the_wrong_kind_never_costs_the_page(kto: Path, value: object):
    record = json.loads((kto / "run.json").read_text())
    (kto / "run.json").write_text(json.dumps(dict.fromkeys(record, value) | {"trainer": "kto"}))
    (kto / "summary.json").write_text(json.dumps({"seconds": value}))
    for name in ("metrics", "evaluation"):
        row = json.loads((kto / f"{name}.jsonl").read_text().splitlines()[-1])
        with (kto / f"{name}.jsonl").open("a") as file:
            file.write(json.dumps({**dict.fromkeys(row, value), "step": 13}) + "\n")
    assert sum(tag == "script" for tag, _ in page_of(kto)[1].tags) == 1


def pairs(low: float, high: float, n: int = 100) -> dict[str, float | int]:
    return {"mean": (low + high) / 2, "ci_low": low, "ci_high": high, "n": n}


def rows_of(last: dict[str, object]) -> list[dict[str, object]]:
    tie = {"step": 0, "n": 200, "auc": pairs(0.5, 0.5), "pair_accuracy": pairs(0.5, 0.5), "nats_per_token": 2.0}
    return [tie, {"step": 60, "n": 200, **last}]


@pytest.mark.parametrize(
    ("trainer", "last", "headline", "kind"),
    [
        ("kto", {"pair_accuracy": pairs(0.6, 0.8), "auc": pairs(0.4, 0.6)}, PAIRS, "good"),
        ("kto", {"pair_accuracy": pairs(0.45, 0.7), "auc": pairs(0.6, 0.8)}, PAIRS, "flat"),
        ("kto", {"pair_accuracy": pairs(0.2, 0.4), "auc": pairs(0.6, 0.8)}, PAIRS, "bad"),
        ("kto", {"pair_accuracy": pairs(0.2, 0.4, 49), "auc": pairs(0.6, 0.8)}, AUC, "good"),
        ("dpo", {"pair_accuracy": pairs(0.2, 0.4, 49), "auc": pairs(0.6, 0.8)}, PAIRS, "bad"),
        ("bco", {"auc": pairs(0.49, 0.6)}, AUC, "flat"),
        ("bco", {"auc": 0.9}, AUC, "open"),
        ("bco", {}, AUC, "open"),
        ("sft", {"nats_per_token": 1.0, "nats_change": pairs(-1.1, -0.9)}, NATS, "good"),
        ("sft", {"nats_per_token": 3.0, "nats_change": pairs(0.9, 1.1)}, NATS, "bad"),
        ("sft", {"nats_per_token": 2.0, "nats_change": pairs(-0.1, 0.1)}, NATS, "flat"),
        ("sft", {"nats_per_token": 1.0}, NATS, "open"),
    ],
)
def test_verdict(trainer: str, last: dict[str, object], headline: object, kind: str):
    found = language_outcome(trainer, rows_of(last))
    files = RunFiles(Path("run"), record={"status": "complete"})
    assert (found.headline, judge_language(found, files, {"step": 60}).kind) == (headline, kind)


def caveats(last: dict[str, object], **held: object) -> str:
    files = RunFiles(Path("run"), **({"record": {"status": "complete"}} | held))
    found = language_outcome("kto", rows_of({"pair_accuracy": pairs(0.6, 0.8), **last}))
    return " | ".join(judge_language(found, files, {"step": 60}).caveats)


def test_caveats_say_what_speaks_against_the_verdict():
    quiet = caveats({"log_ratio/up": 0.5, "log_ratio/down": -1.0})
    assert quiet == (
        "This is how the model ranks given answers by their log-probs. Whether the answers it writes are better, "
        "only reading them tells."
    )
    assert "became less likely too, by 2.000 nats" in caveats({"log_ratio/up": -2.0, "log_ratio/down": -5.0})
    assert "Only 49 held-out pairs" in caveats({"pair_accuracy": pairs(0.6, 0.9, 49), "n": 98})
    stuck = [{"step": i, "z0_at_zero": float(i > 4)} for i in range(1, 13)]
    assert "z0 was 0 in 89 %" in caveats({}, metrics=stuck).replace("\u00a0", " ")
    assert "z0" not in caveats({}, metrics=[{"step": i, "z0_at_zero": float(i < 5)} for i in range(1, 13)])
    assert "by heart" in caveats({"auc": pairs(0.6, 0.8)}, metrics=[{"step": 1, "auc": 0.9}])
    assert "by heart" not in caveats({"auc": pairs(0.6, 0.8)}, metrics=[{"step": 1, "auc": 0.8}])
    raised = [{"step": 0, "level": "warning", "code": "w", "message": f"m{i}"} for i in range(5)]
    said = caveats({}, warnings=[*raised, {"step": 0, "level": "note", "code": "n", "message": "quiet"}])
    assert "m0 (step 0) | m1 (step 0) | m2 (step 0) | 2 more under" in said and "quiet" not in said
    alarm = [{"step": 60, "level": "alarm", "code": "a", "message": "loud"}]
    assert caveats({}, warnings=alarm).startswith("loud (step 60)")
    assert "set data.heldout_fraction" in caveats({}, record={"status": "complete", "tokens": {"heldout_rows": 0}})


def test_auc_interval_by_hand():
    """Positives 1, 3 against negatives 0, 2: AUC 3/4; influences (-.25, .25)/2 and (.25, -.25)/2 of single rows."""
    score, positive = np.array([1.0, 3.0, 0.0, 2.0]), np.array([True, True, False, False])
    assert auc(score, positive) == 0.75
    half = 1.96 * np.sqrt(4 / 3 * 4 * 0.125**2)
    assert auc_interval(score, positive, np.arange(4)) == pytest.approx((0.75 - half, 1.0))
    # One prompt holds rows 0 and 3 (both -.125), another 1 and 2 (both +.125).
    half = 1.96 * np.sqrt(2 * 2 * 0.25**2)
    assert auc_interval(score, positive, np.array([0, 1, 1, 0])) == pytest.approx((max(0, 0.75 - half), 1.0))
    assert np.isnan(auc_interval(score, np.ones(4, bool), np.arange(4))).all()


def test_auc_interval_covers_with_rows_of_a_prompt_alike():
    """Of 400 draws of 60 prompts with four correlated rows each, about 95 % cover the AUC of the population."""
    rng, hits = np.random.default_rng(0), 0
    clusters, positive = np.repeat(np.arange(60), 4), np.repeat(np.arange(60) % 2 == 0, 4)
    truth = 0.5 * (1 + math.erf(0.8 / math.sqrt(2 * 1.09) / math.sqrt(2)))
    for _ in range(400):
        score = np.repeat(rng.standard_normal(60), 4) + 0.3 * rng.standard_normal(240) + 0.8 * positive
        low, high = auc_interval(score, positive, clusters)
        hits += low <= truth <= high
    assert 0.92 <= hits / 400 <= 0.98


def test_ratio_estimate_by_hand():
    """Totals 2, 6 over counts 1, 3: the ratio is 2 in either row, so nothing varies."""
    alike = ratio_estimate(np.array([2.0, 6.0]), np.array([1.0, 3.0]), np.arange(2))
    assert alike == {"mean": 2.0, "ci_low": 2.0, "ci_high": 2.0, "n": 2}
    found = ratio_estimate(np.array([2.0, 2.0]), np.array([1.0, 3.0]), np.arange(2))
    assert found["mean"] == 1.0  # residuals 1 and -1, over 4: half-width 1.96 sqrt(2 (1/16 + 1/16))
    assert found["ci_high"] == pytest.approx(1 + 1.96 * 0.5)


def test_the_table_in_the_docs_is_that_of_the_code():
    from scripts.docs_tables import language_metrics

    page = (Path(__file__).parents[2] / "docs" / "llm_metrics.md").read_text(encoding="utf-8")
    assert [row for row in language_metrics() if row not in page] == []


def test_page_sets_what_the_model_says_beside_step_0(runs: Path, kto: Path):
    rows = read_run(runs / "kto").generations
    assert [(row["step"], row["index"]) for row in rows] == [(s, i) for s in (0, 6, 12) for i in range(5)]
    said = page_of(runs / "kto")[1].text
    changed = sum(a["completion"] != b["completion"] for a, b in zip(rows[:5], rows[10:], strict=True))
    mean = sum(row["log_ratio"] for row in rows[10:]) / 5
    assert f"At step 12, {changed} of 5 differ from step 0." in said and "1 more prompt" in said
    assert f"is {mean:+.2f} nats an answer".replace("-", "−") in said and "1 step between" in said
    shown = [{"step": s, "index": 0, "prompt": EVIL, "completion": f"{EVIL} {s}", "tokens": 3, "ended": s > 9,
              "log_ratio": -s} for s in (12, 0, *range(1, 12))]  # fmt: skip
    shown += [{"step": 0, "index": 1, "completion": [1]}, {"step": "x", "completion": "lost"}, {"step": 2}]
    chat = [{"role": "user", "content": "Who?"}, {"role": "tool", "content": [{"type": "text"}]}, "x"]
    shown.append({"step": 3, "index": 2, "prompt": chat, "completion": "I."})
    (kto / "generations.jsonl").write_text("\n".join(map(json.dumps, shown)) + '\n{"step": 5, "torn')
    text, page = page_of(kto)
    assert "<script>alert" not in text and f"{EVIL} 12" in page.text and "log-ratio −12.00" in page.text
    assert "10 steps between" in page.text and "lost" not in page.text and "1 line of generations.jsonl" in page.text
    assert "user Who?" in " ".join(page.text.split()) and "At step 12, 1 of 1 differ" in page.text
    (kto / "generations.jsonl").unlink()
    assert "What the model says" not in page_of(kto)[1].text
