"""What `align select` mines is what `align check` accepts and the trainers learn from: texts and images, for real."""

from __future__ import annotations

import json

import pytest

from align.cli import main
from tests.people import write_rows

pytestmark = pytest.mark.slow
QUICK = ("steps=2", "evaluation.every=2", "checkpoint.every=2")


def words(samples):
    """How many words of the prompt the answer repeats."""
    return [float(len(set(p.split()) & set(t.split()))) for p, t in zip(samples.prompts, samples.texts, strict=True)]


@pytest.mark.parametrize(
    ("recipe", "file"), [("kto", "thumbs"), ("bco", "thumbs"), ("dpo", "pairs"), ("sft", "selected")]
)
def test_rows_of_texts_are_trained_on(tmp_path, recipe, file, capsys):
    rows = [
        {"prompt": f"Say: red bee {p}\nAnswer:", "completion": " " + " ".join([*["red", "bee", str(p)][:r], "cow"])}
        for p in range(12)
        for r in range(4)
    ]
    source, out = write_rows(tmp_path / "c.jsonl", rows), tmp_path / "best"
    call = ["select", str(source), "--reward", "tests.slow.test_selection_training:words", "--out", str(out)]
    assert main([*call, "--pairs", "best-worst", "--up-from", "2", "--down-to", "0"]) == 0
    assert main(["check", str(out / f"{file}.jsonl"), "--json", str(tmp_path / "check.json")]) == 0
    assert (
        json.loads((tmp_path / "check.json").read_text())["rows"] == {"thumbs": 36, "pairs": 24, "selected": 12}[file]
    )
    sizes = ("batch_size=4", "microbatch=4", "data.heldout_fraction=0.2", f"data.path={out / file}.jsonl")
    assert main(["train", f"{recipe}/smoke", *QUICK, *sizes, "--out", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "complete"


def test_rows_of_images_are_trained_on(tmp_path):
    write_rows(
        tmp_path / "p.jsonl", [{"prompt": f"a {w} handwritten three"} for w in ("bold", "thin", "plain", "small")]
    )
    config = tmp_path / "r.yaml"
    config.write_text(
        "rewards: [{name: digits/legibility}]\nheldout_rewards: [{name: digits/legibility, args: {split: evaluator}}]\n"
    )
    call = ["select", "digits", "--prompts", str(tmp_path / "p.jsonl"), "--count", "5", "--steps", "4", "--config",
            str(config), "--pairs", "best-worst", "--out", str(tmp_path / "best")]  # fmt: skip
    assert main([*call, "--json", str(tmp_path / "s.json")]) == 0
    found = json.loads((tmp_path / "s.json").read_text())
    assert "legibility (judge)" in found["curve"]["judges"], "the judge's component has the reward's name"
    middle = found["mean"]["score"]["candidates"]["mean"]
    made = (tmp_path / "best" / "samples" / "made.json").stat().st_mtime_ns
    assert main([*call, "--up-from", f"{middle:.6f}"]) == 0
    assert (tmp_path / "best" / "samples" / "made.json").stat().st_mtime_ns == made, "the images were there"
    for loss, file in (("kto", "thumbs"), ("dpo", "pairs")):
        data = tmp_path / "best" / f"{file}.jsonl"
        assert main(["check", str(data)]) == 0
        told = ("evaluation.samples=8", "evaluation.final_samples=8", "evaluation.solver_steps=2", "batch_size=2",
                "tracking.samples_every=2", "data.heldout_fraction=0.3", f"data.path={data}", f"objective.loss={loss}")  # fmt: skip
        assert main(["train", "digits/diffusion_kto", *QUICK, *told, "--out", str(tmp_path / loss)]) == 0
        assert json.loads((tmp_path / loss / "run.json").read_text())["status"] == "complete"
