"""The published figures of PandaLM's human-annotated test set come out of `align feedback`.

The data are not part of this project: `ALIGN_DATA` names a folder that holds them somewhere, or the tests skip.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from align.cli import main
from align.preferences import load_preferences, prompt_key

ROOT = os.environ.get("ALIGN_DATA", "")
pytestmark = pytest.mark.skipif(not ROOT, reason="set ALIGN_DATA to a folder with PandaLM's testset-v1.json")
RATERS = "annotator1,annotator2,annotator3"


def data(name: str) -> str:
    found = sorted(Path(ROOT).rglob(name))
    if not found:
        pytest.skip(f"ALIGN_DATA holds no {name}")
    return str(found[0])


def agreement(tmp_path: Path, *more: str) -> dict[str, Any]:
    out = tmp_path / "out.json"
    source = data("testset-v1.json")
    base = ["feedback", "agreement", source, "--raters", RATERS, "--categories", "0,1,2", "--json", str(out)]
    assert main([*base, *more]) == 0
    return json.loads(out.read_text())


def test_published_agreement(tmp_path: Path):
    found = agreement(tmp_path, "--draws", "200")
    values = {name: round(c["value"], 4) for name, c in found["coefficients"].items()}
    assert values == {
        "cohen:annotator1:annotator2": 0.8520,
        "cohen:annotator1:annotator3": 0.8789,
        "cohen:annotator2:annotator3": 0.8617,
        "fleiss": 0.8642,
        "krippendorff_nominal": 0.8642,
    }
    assert all(c["n_items"] == 999 and c["ci"][0] < c["value"] < c["ci"][1] for c in found["coefficients"].values())
    assert [c["n_raters"] for c in found["coefficients"].values()] == [3, 3, 2, 2, 2]
    assert found["majority"] == {"0": 105, "1": 422, "2": 472, "none": 0}


@pytest.mark.parametrize(
    ("judge", "column", "figures"),
    [
        ("gpt-3.5-turbo-testset-v1.json", "gpt_result", (0.7107, 0.5879, 0.5736, 0.5755)),
        ("pandalm-7b-testset-v1.json", "pandalm_result", (0.6677, 0.5738, 0.5750, 0.5743)),
    ],
)
def test_judge_report(tmp_path: Path, judge: str, column: str, figures: tuple[float, ...]):
    how = ["--judge-file", data(judge), "--judge-column", column, "--join", "idx", "--map", "Tie=0,garbage=0"]
    found = agreement(tmp_path, *how, "--draws", "0")["judge"]
    names = ("accuracy", "macro_precision", "macro_recall", "macro_f1")
    assert tuple(round(found[name], 4) for name in names) == figures and found["n"] == 999


def test_nearly_the_same_alpha_out_of_a_store(tmp_path: Path):
    store, out = str(tmp_path / "votes.db"), tmp_path / "out.json"
    answers = "|".join(RATERS.split(","))
    columns = f"prompt=instruction,input=input,response_a=response1,response_b=response2,preference={answers}"
    taken = ["feedback", "import", store, data("testset-v1.json"), "--columns", columns, "--identical", "skip"]
    assert main([*taken, "--duplicates", "all"]) == 0
    assert main(["feedback", "agreement", store, "--kind", "pairwise", "--json", str(out), "--draws", "0"]) == 0
    found = json.loads(out.read_text())
    rows = json.loads(Path(data("testset-v1.json")).read_text(encoding="utf-8"))
    # Models that answer alike make one pair; a rater's newest answer about it counts.
    pairs = {(r["instruction"], r["input"], frozenset((str(r["response1"]), str(r["response2"])))) for r in rows}
    assert found["n_raters"] == 3 and found["n_items"] == len(pairs) < 999
    assert abs(found["coefficients"]["krippendorff_nominal"]["value"] - 0.8642) < 0.03


def test_human_judgements_train_kto_and_bco(tmp_path, monkeypatch):
    """999 comparisons by three people: 2,669 of 2,997 answers take a side, of which two thumbs each come."""
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    thumbs, out = tmp_path / "thumbs.jsonl", tmp_path / "out.json"
    columns = f"prompt=instruction,input=input,response_a=response1,response_b=response2,preference={RATERS.replace(',', '|')}"
    how = ["--to", "unpaired", "--columns", columns, "--duplicates", "mean", "--json", str(out)]
    assert main(["feedback", "convert", data("testset-v1.json"), str(thumbs), *how]) == 0
    found = json.loads(out.read_text())
    assert (found["rows"], found["up"], found["down"]) == (4682, 2341, 2341)
    assert {k: found["losses"][k] for k in ("seen", "used", "no side taken", "an even split of up and down")} == {
        "seen": 2997, "used": 2669, "no side taken": 326, "an even split of up and down": 2,
    }  # fmt: skip

    rows = load_preferences(thumbs)
    assert len({prompt_key(row) for row in rows.rows}) == 162
    training, heldout = rows.split(0.1)
    assert not {prompt_key(row) for row in training.rows} & {prompt_key(row) for row in heldout.rows}
    changes = [
        f"data.path={thumbs}", "data.max_length=128", "data.max_prompt_length=64", "steps=4", "microbatch=8",
        "batch_size=16", "evaluation.every=0", "evaluation.rows=32", "checkpoint.every=4",
    ]  # fmt: skip
    for trainer in ("kto", "bco"):
        run = tmp_path / trainer
        assert main(["train", f"{trainer}/smoke", *changes, "--out", str(run)]) == 0
        about = json.loads((run / "run.json").read_text())
        kept = about["weights"] if trainer == "kto" else about["classes"]
        dropped = about["tokens"]["dropped"]  # some models answered nothing, and some prompts leave no room
        for side in ("up", "down"):
            lost = sum(count for reason, count in dropped.items() if reason.endswith(f", {side}"))
            assert kept[side] + lost == training.counts()[side] and lost < 60
        assert 0.9 * len(heldout) < about["tokens"]["heldout_rows"] <= len(heldout)
        logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in logged] == [1, 2, 3, 4]
        assert all(math.isfinite(row["loss"]) and 0.3 < row["share_up"] < 0.7 for row in logged)
