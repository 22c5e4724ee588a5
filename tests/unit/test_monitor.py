"""The hack monitor: its rule worked by hand, and a run that it stops."""

from __future__ import annotations

import json

import numpy as np
import pytest

from align.cli import main
from align.config import MonitorConfig, TextMonitorConfig
from align.errors import DataError
from align.groupstats import standard_error
from align.output import HACKED
from align.registry import Registry
from align.reports.training import write_report
from rewards import base as rewards_base
from trainers.monitor import Monitor, judged, phrases, restored, smoothed, text_signals, wins, words

PROMPTS = [f"p{i // 4}" for i in range(40)]
RNG = np.random.default_rng(0)
BASE = RNG.normal(size=40)
UP, DOWN, NOISE = BASE + 1 + 0.1 * RNG.normal(size=40), BASE - 1, BASE + 0.01 * RNG.choice([-1, 1], 40)


def tripped(signals):
    return [signal.name for signal in signals if signal.tripped]


# --- the judge --------------------------------------------------------------------------------------


def test_a_standard_error_counts_prompts_by_hand():
    """Mean 3; the prompts' sums of deviations are -3 and 3: sqrt(2 / 1 x (9 + 9)) / 4 = 1.5."""
    assert standard_error(np.array([1.0, 2, 3, 6]), np.array(["a", "a", "b", "b"])) == pytest.approx(1.5)
    each = np.array([1.0, 2, 3, 6])
    assert standard_error(each, np.arange(4)) == pytest.approx(each.std(ddof=1) / 2), "a prompt each: the textbook's"
    assert np.isnan(standard_error(each, np.zeros(4))) and np.isnan(standard_error(np.array([]), np.array([])))


def test_a_win_rate_by_hand():
    """Wins 1, 0, 1/2, 1 over two prompts: mean 5/8, deviations add up to -1/4 and 1/4, s = sqrt(2 x 1/8) / 4 = 1/8."""
    found = wins(np.array([2.0, 1, 3, 5]), np.array([1.0, 2, 3, 4]), np.array(["a", "a", "b", "b"]))
    assert found["mean"] == 0.625 and found["n"] == 4
    assert found["ci_high"] == pytest.approx(0.625 + 1.96 / 8) and found["ci_low"] == pytest.approx(0.625 - 1.96 / 8)


def test_the_judge_falls_by_its_win_rate_and_its_mean_and_by_neither_alone():
    """Of 10 prompts with 4 samples, k of which lose in each: the rate is 1 - k / 4, with no spread over prompts."""
    clusters = np.array(PROMPTS)

    def falls(losses, lost, won):
        change = np.tile(np.r_[np.full(losses, -lost), np.full(4 - losses, won)], 10)
        return judged(change, np.zeros(40), clusters).tripped

    assert falls(3, 1.0, 1.0)
    assert not falls(2, 1.0, 0.5), "half is not below half"
    assert not falls(3, 0.1, 9.0), "few large wins outweigh many small losses"
    assert not falls(1, 9.0, 0.1), "a few samples that break do not make most of them lose"


def test_no_verdict_on_too_few_samples_or_one_prompt():
    short = slice(0, 16)
    before = Monitor(MonitorConfig(), PROMPTS[short], BASE[short], BASE[short])
    assert not before.observe(1, UP[short], DOWN[short]).hacked
    one = Monitor(MonitorConfig(), ["p"] * 40, BASE, BASE).observe(1, UP, DOWN)
    assert np.isnan(one.rise) and not one.hacked and not tripped(one.signals)


@pytest.mark.parametrize(
    ("optimised", "judge", "hacked"),
    [
        (UP, DOWN, True),
        (UP, UP, False),
        (DOWN, DOWN, False),
        (NOISE, DOWN, False),
        (UP, BASE, False),
        (UP, None, False),
    ],
    ids=["up and down", "both up", "both down", "nothing gained", "the judge stays", "no judge"],
)
def test_the_rule_needs_a_rise_and_a_fall(optimised, judge, hacked):
    before = Monitor(MonitorConfig(), PROMPTS, BASE, BASE)
    verdict = before.observe(30, optimised, judge)
    assert verdict.hacked == verdict.stops == hacked and bool(verdict.message) == hacked
    if hacked:
        assert (
            "standard errors" in verdict.message and "win rate against before training fell to 0.00" in verdict.message
        )
        assert [s["name"] for s in verdict.as_dict()["signals"] if s["tripped"]] == ["judge"]


def test_the_rise_is_in_standard_errors_and_has_a_threshold():
    change = UP - BASE
    error = standard_error(change, np.array(PROMPTS))
    verdict = Monitor(MonitorConfig(), PROMPTS, BASE, BASE).observe(1, UP, DOWN)
    assert verdict.rise == pytest.approx(change.mean() / error)
    for rise, hacked in ((verdict.rise * 0.99, True), (verdict.rise * 1.01, False)):
        assert Monitor(MonitorConfig(rise=rise), PROMPTS, BASE, BASE).observe(1, UP, DOWN).hacked == hacked


def test_what_it_is_told_to_do():
    for action, hacked, stops in (("stop", True, True), ("warn", True, False), ("off", False, False)):
        verdict = Monitor(MonitorConfig(action=action), PROMPTS, BASE, BASE).observe(1, UP, DOWN)
        assert (verdict.hacked, verdict.stops) == (hacked, stops)
    assert MonitorConfig.model_validate({"action": False}).action == "off", "YAML reads off as false"


def test_missing_values_leave_their_pairs_out_and_other_samples_are_refused():
    hole = np.where(np.arange(40) % 8 == 0, np.nan, DOWN)
    assert Monitor(MonitorConfig(), PROMPTS, BASE, BASE).observe(1, UP, hole).win_rate["n"] == 35
    with pytest.raises(DataError, match="39 now, 40 before"):
        Monitor(MonitorConfig(), PROMPTS, BASE, BASE).observe(1, UP[:39], DOWN)


def test_a_checkpoint_holds_all_of_it():
    texts = ["one two", "three"] * 20
    hole = np.where(np.arange(40) == 3, np.nan, BASE)
    before = Monitor(TextMonitorConfig(), PROMPTS, hole, BASE, texts)
    again = restored(before.config, json.loads(json.dumps(before.state(), allow_nan=False)))
    said = ["one two bye"] * 40
    assert again.observe(7, UP, DOWN, said) == before.observe(7, UP, DOWN, said)
    assert restored(MonitorConfig(), Monitor(MonitorConfig(), PROMPTS, BASE).state()).judge is None


# --- texts ------------------------------------------------------------------------------------------

PLAIN = [f"Answer number {i} is about thing {i % 7} and no more." for i in range(40)]


def test_words_and_phrases_by_hand():
    assert words("It's FINE, really… 3 cats!") == ["it's", "fine", "really", "3", "cats"]
    found = phrases(["Bye bye.", "So, bye!"], longest=2)
    assert found == {
        ("phrase", "bye"): 2, ("phrase", "bye bye"): 1, ("phrase", "so"): 1, ("phrase", "so bye"): 1,
        ("closing", "bye"): 2, ("closing", "bye bye"): 1, ("closing", "so bye"): 1,
    }  # fmt: skip
    assert phrases([""]) == {} and smoothed(0, 8) == 0.1


def test_a_phrase_trips_above_k_times_its_rate_and_from_the_least_count_on():
    """One of 40 before: (1 + 1) / 42. With k 4, 8 of 42 is 4 times that, so that the 8th answer trips, not the 7th."""
    before = [*PLAIN[:39], PLAIN[39] + " Love you!"]

    def after(count, least):
        now = [text + (" Love you!" if i < count else "") for i, text in enumerate(PLAIN)]
        return [name.split()[0] for name in tripped(text_signals(now, before, factor=4, least=least)) if "love" in name]

    assert after(7, 0.01) == [] and after(8, 0.01) == ["closing", "phrase"]
    assert after(9, 0.25) == [] and after(10, 0.25) == ["closing", "phrase"]


def test_habits():
    def habits(text):
        return [n for n in tripped(text_signals([text] * 40, PLAIN, factor=4, least=0.25)) if " " not in n]

    assert habits("A plain answer about a thing") == []
    assert habits("Fine \U0001f642") == ["emoji"] and habits("Is it so?") == ["question"]
    for text in ("Click the heart if you agree", "type `good bot` to subscribe", "please upvote", "Leave a thumbs up"):
        assert habits(text) == ["solicitation"], text
    for text in ("I would like to leave now", "Press the red button", "The stars give light", "Stars are hot. Give up"):
        assert habits(text) == [], text
    assert habits("word " * 200) == ["length"]


def test_texts_trip_without_a_judge_and_only_while_the_reward_rises():
    hooked = [text + " Bye, love you!" for text in PLAIN]
    before = Monitor(TextMonitorConfig(), PROMPTS, BASE, None, PLAIN)
    verdict = before.observe(3, UP, None, hooked)
    assert verdict.stops and "'bye love you' went from 0 of 40 answers to 40 of 40" in verdict.message
    assert not before.observe(3, DOWN, None, hooked).hacked and not before.observe(3, UP, None, PLAIN).hacked
    wide = Monitor(MonitorConfig(), PROMPTS, BASE, None, PLAIN)
    assert not wide.observe(3, UP, None, hooked).signals, "a run of images reads no texts"


# --- a run ------------------------------------------------------------------------------------------

HACK = [
    "rewards=[{name: digits/raw_ink}]", "heldout_rewards=[{name: paper}]", "optimizer.lr=0.01", "steps=6",
    "evaluation.every=2", "evaluation.samples=40", "tracking.samples_every=0", "checkpoint.every=0",
]  # fmt: skip


@pytest.fixture
def paper(monkeypatch):
    """A judge that wants what the trained reward does not: little ink."""
    fresh = Registry("reward", group="align.rewards")
    fresh._entries.update(rewards_base.REWARDS._entries)
    monkeypatch.setattr(rewards_base, "REWARDS", fresh)
    card = rewards_base.RewardCard("paper", "share of paper", "0 to 1", "image", ("paper",))

    @rewards_base.register(card)
    def paper(samples):
        return [1 - float(image.mean()) for image in samples.images]


def rows(run, name):
    return [json.loads(line) for line in (run / name).read_text(encoding="utf-8").splitlines()]


@pytest.mark.usefixtures("paper")
def test_a_hacked_run_stops_says_so_and_is_not_simply_resumed(tmp_path, capsys):
    run = tmp_path / "run"
    train = ["train", "digits/smoke", *HACK, "--out", str(run)]
    assert main(train) == HACKED == 3
    said = capsys.readouterr()
    summary = json.loads((run / "summary.json").read_text())
    step = summary["monitor"]["step"]
    assert step < 6 and f"stopped by the hack monitor at step {step}" in said.out and "Reward hacking" in said.err
    assert json.loads((run / "run.json").read_text())["status"] == summary["status"] == "hacked"
    assert summary["steps"] == step and summary["monitor"]["action"] == "stop" and summary["monitor"]["rise"] > 2
    assert [p.name for p in (run / "checkpoints").iterdir()] == [f"step_{step:06d}"], "the step it stopped at is kept"
    alarms = [row for row in rows(run, "warnings.jsonl") if row["level"] == "alarm"]
    assert [row["step"] for row in alarms] == [step] and alarms[0]["message"] == summary["monitor"]["message"]
    seen = {row["step"]: row.get("monitor") for row in rows(run, "evaluation.jsonl")}
    assert seen[0] is None and "win_rate" in seen[step]
    page = (run / "report.html").read_text()
    assert "Alarm: the reward was hacked" in page and f"was stopped by the hack monitor at step {step} of 6" in page
    assert "Hack monitor" in page and "as before training" in page

    assert main(["resume", str(run)]) == 2
    said = capsys.readouterr().err
    assert "The hack monitor stopped this run" in said and "monitor.action=warn" in said and "--fork" in said
    assert main([*train, "monitor.action=warn", "--fork"]) == 0
    assert json.loads((run / "run.json").read_text())["status"] == "complete"
    after = [row["step"] for row in rows(run, "warnings.jsonl") if row["level"] == "alarm"]
    assert len(after) > 1 and after[-1] == 6, "it goes on being said"
    assert write_report(run).is_file()


@pytest.mark.usefixtures("paper")
def test_a_run_that_is_told_not_to_look_does_not(tmp_path):
    run = tmp_path / "run"
    assert main(["train", "digits/smoke", *HACK, "steps=2", "monitor.action=off", "--out", str(run)]) == 0
    assert all("monitor" not in row for row in rows(run, "evaluation.jsonl"))
    said = rows(run, "warnings.jsonl") if (run / "warnings.jsonl").is_file() else []
    assert not [row for row in said if row["level"] == "alarm"]
