"""What a bad step leaves behind, for every kind of training: a file with the step, what it learnt from, and the scores.

Each run diverges by itself: a learning rate of 1e30 moves the weights so far in step 1 that nothing after it is finite.
"""

from __future__ import annotations

import json

import pytest

import tiny
from align.config import load_config
from align.errors import GuardError, RewardError
from rewards import embeddings, fit
from tests.people import thumbs, world
from tests.unit import test_forward, test_language, test_offline, test_rluf
from tests.unit.test_fit import store
from trainers.tiny_language import build_tiny

DIVERGES = ("optimizer.lr=1e30", "steps=3", "checkpoint.every=1")


def dance_grpo(root, out):
    return test_forward.run(tiny.sd3(root / "sd3"), out, *DIVERGES, "evaluation.every=0", trainer="dance_grpo").train


def forward(root, out):
    return test_forward.run(tiny.sd3(root / "sd3"), out, *DIVERGES, "evaluation.every=0").train


def offline(root, out):
    data = test_offline.data.__wrapped__(Places(root))
    return test_offline.trainer(tiny.sd3(root / "sd3"), data, out, *DIVERGES, "evaluation.every=0").train


class Places:
    """Folders as pytest's factory makes them."""

    def __init__(self, root):
        self.root = root

    def mktemp(self, name):
        (self.root / name).mkdir()
        return self.root / name


def language(trainer):
    def made(root, out):
        cache = () if trainer == "sft" else (f"reference.cache={root / 'cache'}",)
        small = ("evaluation.every=0", "evaluation.rows=4", *cache)
        return test_language.run(build_tiny(root / "tiny"), out, trainer, *DIVERGES, *small, pairs=20).train

    return made


def rluf(root, out):
    return test_rluf.run(build_tiny(root / "tiny"), out, *DIVERGES, "evaluation.every=0").train


def fitted(root, out):
    path = store(root, thumbs(*world(), users=10))
    return lambda: fit.fit_reward(load_config({"trainer": "fit", "data": {"paths": [path]}}, DIVERGES), out)


KINDS = {
    "dance_grpo": dance_grpo, "forward": forward, "offline": offline,
    **{trainer: language(trainer) for trainer in ("kto", "bco", "dpo", "sft")}, "rluf": rluf, "fit": fitted,
}  # fmt: skip


SAMPLES = {"prompt", "seed", "scores", "advantage"}
"""What is written of each thing that a step learns from."""
SEEN = {
    "dance_grpo": SAMPLES, "forward": SAMPLES, "offline": {"row", "prompt", "label", "images", "seed"},
    **{trainer: {"row", "prompt", "completion", "label"} for trainer in ("kto", "bco", "dpo", "sft")},
    "rluf": {"row", "prompt", "completion", "seed", "log_ratio", "scores"}, "fit": {"kind", "said", "by", "outputs"},
}  # fmt: skip


def written(out, error):
    """The only file of a bad step, which the error names."""
    (file,) = out.glob("bad_step_*")
    assert f"hat was seen stands in {file}" in str(error)
    return json.loads(file.read_text())


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.slow) if k in ("dance_grpo", "bco", "dpo", "sft") else k for k in KINDS]
)
def test_a_bad_step_is_written_down(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embeddings, "cache_directory", lambda: tmp_path / "cache")
    out = tmp_path / "run"
    with pytest.raises(GuardError) as told:
        KINDS[kind](tmp_path, out)()
    found = written(out, told.value)
    step = found["step"]
    assert f"(step {step})" in found["said"] and found["said"].startswith(found["guard"]) and found["guard"]
    assert (found["process"], found["processes"], found["seed"]) == (0, 1, 0)
    assert found["doing"].startswith(f"step {step}, ")
    assert found["reproduce"] == {**found["reproduce"], "command": f"align resume {out}", "from_step": step - 1}
    seen = found.get("samples") or found["rows"]
    assert seen and all(SEEN[kind] <= row.keys() for row in seen)
    for row in seen:
        assert all(isinstance(value, float) for value in row.get("scores", {"none": 0.0}).values())
    assert json.loads((out / "run.json").read_text())["status"] == "failed"


def test_scores_that_are_missing_are_written_as_such(tmp_path):
    """A reward that fails in step 2 of an RLUF run: the answers, and what it said of them."""
    trainer = test_rluf.run(build_tiny(tmp_path / "tiny"), tmp_path / "run", "evaluation.every=0")
    suite = trainer.objective.suite
    score = suite.score

    def failing(samples):
        found = score(samples)
        if trainer.objective.step == 1:
            found.values[:, 0], found.valid[:, 0] = float("nan"), False
        return found

    suite.score = failing
    with pytest.raises(RewardError, match="step 2") as told:
        trainer.train()
    found = written(tmp_path / "run", told.value)
    assert found["step"] == 2 and len(found["rows"]) == 2 * (3 + 1)
    assert [row["baseline"] for row in found["rows"]] == [False, False, False, True] * 2
    for row in found["rows"]:
        assert row["scores"]["love"] == "nan" and isinstance(row["scores"]["helpfulness"], float)
        assert row["seed"] == [0, "rluf", "baseline"] if row["baseline"] else [0, "rluf", "completions", 1]
