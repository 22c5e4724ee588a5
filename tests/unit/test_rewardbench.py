"""RewardBench 1 and 2 from files: values worked by hand, parity with another implementation, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from align.cli import main
from align.errors import ConfigError, DataError
from rewards import rewardbench as rb
from tests.people import write_rows


def v1(subset: str, chosen: float, rejected: float, **more) -> dict:
    return {"subset": subset, "scores_chosen": chosen, "scores_rejected": rejected, **more}


def v2(name: str, subset: str, scores: list, correct: int = 1) -> dict:
    return {"id": name, "subset": subset, "num_correct": correct, "scores": scores}


REF, TIED = ([0.9], [0.3]), ([1.0, 0.8], [0.2, 0.1])


def test_ties_are_the_facts_and_worked_by_hand():
    found = rb.ties_score([(REF, TIED)])
    assert found["score"] == pytest.approx(1.0 + 0.01 * math.tanh(2), abs=1e-12)
    assert found["score"] == pytest.approx(1.00964, abs=1e-5)
    # Gaps .1 and .6, spread .2: told apart, but by less than right from right where the least gap counts.
    ref = ([0.4], [0.3])
    assert rb.ties_score([(ref, TIED)])["score"] == pytest.approx(0.3 + 0.3 + 0.2 + 0 + 0.01 * math.tanh(0.1 / 0.2 - 1))
    # A wrong answer above the lowest right one: only the reference prompt counts.
    assert rb.ties_score([(REF, ([1.0, 0.1], [0.2]))])["score"] == pytest.approx(0.3 + 0.01 * math.tanh(-0.1 / 0.9 - 1))
    equal = rb.ties_score([(REF, ([1.0, 1.0], [0.2]))])  # no spread: the limit
    assert equal["score"] == pytest.approx(1.01)
    nothing = rb.ties_score([(([0.5], [0.5]), ([0.5, 0.5], [0.5]))])  # all the same: 0 / 0 counts 0
    assert nothing["score"] == 0 and nothing["parts"]["margin"] == 0
    two = rb.ties_score([(REF, TIED), (([0.5], [0.5]), ([0.5, 0.5], [0.5]))])
    assert two["score"] == pytest.approx((1 + 0.01 * math.tanh(2)) / 2) and two["ci"] == [
        0,
        pytest.approx(1.00964, abs=1e-5),
    ]


def test_sections_of_version_1_are_worked_by_hand(tmp_path):
    rows = [v1("math-prm", 1, 0), v1("hep-cpp", 0, 1), v1("hep-go", 2, 1), v1("hep-go", 1, 1)]
    found = rb.rewardbench(write_rows(tmp_path / "s.jsonl", rows))
    # Weights 984, 164 and 164 over 1, 0 and .5: equal scores are wrong.
    assert found["sections"] == {"Reasoning": pytest.approx((984 + 82) / (984 + 328))}
    assert found["overall"] is None and found["subsets"]["hep-go"]["score"] == 0.5
    assert found["incomplete"]["math-prm"] == [1, 447] and found["incomplete"]["alpacaeval-easy"] == [0, 100]
    rows += [v1("alpacaeval-easy", 1, 0), v1("llmbar-natural", 1, 0), v1("donotanswer", 0, 1)]
    found = rb.rewardbench(write_rows(tmp_path / "s.jsonl", rows))
    assert found["overall"] == pytest.approx((1 + 1 + 0 + 1066 / 1312) / 4)


def test_the_published_sizes_are_whole():
    assert sum(rb.ROWS.values()) == 2985 and sum(rb.SUBSETS.values()) == 1865
    assert sum(rb.SECTIONS["Reasoning"].values()) == 2 * 984 and [len(s) for s in rb.SECTIONS.values()] == [5, 6, 5, 7]


def test_version_2_gives_part_of_a_point_for_a_shared_maximum(tmp_path):
    rows = [
        v2("1", "Factuality", [3, 1, 2, 0]), v2("2", "Factuality", [3, 3, 2, 3]), v2("3", "Factuality", [1, 2, 0, 0]),
        v2("4", "Precise IF", [2, 2, 1, 1]), v2("5", "Math", [1, 1, 1, 1]), v2("6", "Safety", [1, 0, 0, 0]),
        v2("7", "focus", [0, 1, 0, 0]), v2("ref:0", "Ties", [0.9, 0.3]), v2("tied:0", "Ties", [1, 0.8, 0.2, 0.1], 2),
    ]  # fmt: skip
    found = rb.rewardbench2(write_rows(tmp_path / "s.jsonl", rows))
    scores = {name: s["score"] for name, s in found["subsets"].items()}
    ties = 1 + 0.01 * math.tanh(2)
    assert scores == pytest.approx(
        {"Factuality": 4 / 9, "Precise IF": 0.5, "Math": 0.25, "Safety": 1, "Focus": 0, "Ties": ties}
    )
    assert found["overall"] == pytest.approx((4 / 9 + 0.5 + 0.25 + 1 + 0 + ties) / 6)
    assert found["incomplete"]["Ties"] == [2, 102]
    part = rb.rewardbench2(write_rows(tmp_path / "p.jsonl", rows[:3]))
    assert part["overall"] is None and list(part["subsets"]) == ["Factuality"]


# --- parity -----------------------------------------------------------------------------------------


def again_1(rows: list[dict]) -> float:
    """Section scores by repeating every subset's accuracy as often as it weighs, in plain Python."""
    sections = []
    for section in rb.SECTIONS.values():
        drawn = []
        for subset, weight in section.items():
            mine = [int(r["scores_chosen"] > r["scores_rejected"]) for r in rows if r["subset"] == subset]
            drawn += [sum(mine) / len(mine)] * weight
        sections.append(sum(drawn) / len(drawn))
    return sum(sections) / 4


def again_2(rows: list[dict]) -> float:
    """Version 2 by statistics over the whole subset, term by term."""
    totals = []
    for subset in ("Factuality", "Precise IF", "Math", "Safety", "Focus"):
        points = []
        for row in (r for r in rows if r["subset"] == subset):
            winners = [i for i, s in enumerate(row["scores"]) if s == max(row["scores"])]
            points.append(1 / len(winners) if 0 in winners else 0)
        totals.append(sum(points) / len(points))
    ties = {
        r["id"]: (r["scores"][: r["num_correct"]], r["scores"][r["num_correct"] :])
        for r in rows
        if r["subset"] == "Ties"
    }
    gap = {name: min(good) - max(bad) for name, (good, bad) in ties.items()}
    numbers = [name[5:] for name in ties if name.startswith("tied:")]
    spread = np.array([max(ties[f"tied:{n}"][0]) - min(ties[f"tied:{n}"][0]) for n in numbers])
    least = np.array([min(gap[f"tied:{n}"], gap[f"ref:{n}"]) for n in numbers])
    with np.errstate(all="ignore"):
        margin = np.nan_to_num(np.tanh(least / spread - 1), nan=0.0)
    totals.append(
        0.3 * np.mean([gap[f"tied:{n}"] > 0 for n in numbers]) + 0.3 * np.mean([gap[f"ref:{n}"] > 0 for n in numbers])
        + 0.2 * np.mean([gap[f"tied:{n}"] > s for n, s in zip(numbers, spread, strict=True)])
        + 0.2 * np.mean(least > spread) + 0.01 * np.mean(margin)
    )  # fmt: skip
    return float(np.mean(totals))


def test_parity_with_another_implementation(tmp_path):
    rng = np.random.default_rng(0)
    rows = [
        v1(subset, *(float(x) for x in rng.integers(0, 5, 2)), id=i)
        for subset in rb.ROWS
        for i in range(int(rng.integers(3, 12)))
    ]
    assert rb.rewardbench(write_rows(tmp_path / "one.jsonl", rows))["overall"] == pytest.approx(
        again_1(rows), abs=1e-12
    )
    two = [
        v2(f"{subset}{i}", subset, rng.integers(0, 4, 4).tolist()) for subset in list(rb.SUBSETS)[:5] for i in range(15)
    ]
    for n in range(40):
        right = int(rng.integers(2, 4))
        scores = rng.integers(0, 3, right + 2) + np.array([2] * right + [0] * 2)
        two.append(v2(f"ref:{n}", "Ties", rng.integers(0, 6, 3).tolist()))
        two.append(v2(f"tied:{n}", "Ties", scores.tolist(), right))
    found = rb.rewardbench2(write_rows(tmp_path / "two.jsonl", two))
    assert found["overall"] == pytest.approx(again_2(two), abs=1e-12)
    assert all(0 < part < 1 for name, part in found["subsets"]["Ties"]["parts"].items() if name != "margin")


def test_other_formats_give_the_same(tmp_path):
    rows = [v2("1", "Math", [3, 1, 2, 0]), v2("2", "Math", [1, 1, 2, 0])]
    expected = rb.rewardbench2(write_rows(tmp_path / "s.jsonl", rows))
    (tmp_path / "s.csv").write_text('id,subset,num_correct,scores\n1,Math,1,"[3, 1, 2, 0]"\n2,Math,1,"[1,1,2,0]"\n')
    # What RewardBench's own scripts write: columns, some of them a model's name, scores as lists of one number.
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    columns |= {"scores": [[[s] for s in row["scores"]] for row in rows], "model": "m", "text": ["a", "b"]}
    (tmp_path / "s.json").write_text(json.dumps(columns))
    for name in ("s.csv", "s.json"):
        assert rb.rewardbench2(tmp_path / name) == expected


# --- refused ----------------------------------------------------------------------------------------

GOOD_1, GOOD_2 = v1("hep-go", 1, 0, id=1), v2("1", "Math", [3, 1, 2, 0])


@pytest.mark.parametrize(
    ("run", "row", "column", "said"),
    [
        (rb.rewardbench, {**GOOD_1, "subset": "hep-goo"}, "subset", "Did you mean 'hep-go'"),
        (rb.rewardbench, {**GOOD_1, "subset": None}, "subset", "empty"),
        (rb.rewardbench, {**GOOD_1, "id": 2, "scores_chosen": float("nan")}, "scores_chosen", "no number"),
        (rb.rewardbench, {**GOOD_1, "id": 2, "scores_chosen": "high"}, "scores_chosen", "no number"),
        (rb.rewardbench, {**GOOD_1, "id": 2, "scores_rejected": [1, 2]}, "scores_rejected", "no number"),
        (rb.rewardbench, {**GOOD_1, "id": 2, "scores_rejected": True}, "scores_rejected", "no number"),
        (rb.rewardbench, {"subset": "hep-go", "id": 2, "scores_chosen": 1}, "scores_rejected", "missing"),
        (rb.rewardbench, GOOD_1, "id", "there twice"),
        (rb.rewardbench2, GOOD_2, "id", "there twice"),
        (rb.rewardbench2, {**GOOD_2, "id": ""}, "id", "empty"),
        (rb.rewardbench2, {**GOOD_2, "id": "2", "scores": [1, 2]}, "scores", "four answers"),
        (rb.rewardbench2, {**GOOD_2, "id": "2", "num_correct": 2}, "scores", "four answers"),
        (rb.rewardbench2, {**GOOD_2, "id": "2", "num_correct": 4}, "num_correct", "No answer is incorrect"),
        (rb.rewardbench2, {**GOOD_2, "id": "2", "num_correct": 0.5}, "num_correct", "whole number"),
        (rb.rewardbench2, {**GOOD_2, "id": "2", "scores": "3"}, "scores", "are a list"),
        (rb.rewardbench2, {**GOOD_2, "id": "2", "scores": [1, None, 0, 0]}, "scores", "no number"),
        (rb.rewardbench2, v2("tied:1", "Ties", [1, 2, 0], 2), "id", "no ref:1"),
        (rb.rewardbench2, v2("ref:1", "Ties", [1, 0]), "id", "no tied:1"),
        (rb.rewardbench2, v2("tied:1", "Ties", [1, 0]), "num_correct", "two correct"),
        (rb.rewardbench2, v2("7", "Ties", [1, 0]), "id", "ref:N or tied:N"),
    ],
)  # fmt: skip
def test_what_is_malformed_is_refused_with_file_row_and_column(tmp_path, run, row, column, said):
    good = GOOD_1 if run is rb.rewardbench else GOOD_2
    path = write_rows(tmp_path / "scores.jsonl", [good, row])
    with pytest.raises(DataError, match=said) as refused:
        run(path)
    assert f"scores.jsonl:2:{column}" in str(refused.value)


def test_files_that_are_none_are_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.jsonl").write_text("{\n")
    (tmp_path / "odd.json").write_text(json.dumps({"subset": ["Math", "Math"], "id": ["1"]}))
    for name, said in (("empty.jsonl", "no rows"), ("bad.jsonl", "bad.jsonl:1"), ("odd.json", "differ in length"),
                       ("none.jsonl", "no such file"), ("x.txt", "unknown format")):  # fmt: skip
        with pytest.raises(DataError, match=said):
            rb.rewardbench2(tmp_path / name)
    with pytest.raises(ConfigError, match="Did you mean 'rewardbench'"):
        rb.run_benchmark("rewardbench1", Path("x"))


def test_the_verb_shows_and_writes_it(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(
        tmp_path / "scores.jsonl",
        [GOOD_2, v2("ref:0", "Ties", [0.9, 0.3]), v2("tied:0", "Ties", [1, 0.8, 0.2, 0.1], 2)],
    )
    call = ["evaluate", "--benchmark", "rewardbench2", "--scores", "scores.jsonl"]
    assert main([*call, "--dry-run"]) == 0 and not (tmp_path / "evaluation.html").exists()
    assert main([*call, "--json", "found.json"]) == 0
    out = capsys.readouterr().out
    assert "Math" in out and "1 of 183 rows" in out
    assert json.loads(Path("found.json").read_text())["subsets"]["Ties"]["score"] == pytest.approx(1.00964, abs=1e-5)
    assert "preferred" in Path("evaluation.html").read_text()
    for wrong, said in ((call[:3], "--scores"), (["evaluate", "--scores", "scores.jsonl"], "--benchmark"),
                        (["evaluate", "digits", *call[1:]], "SOURCE"), ([*call, "--steps", "3"], "--steps")):  # fmt: skip
        assert main(wrong) == 2 and said in capsys.readouterr().err
