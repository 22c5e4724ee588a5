"""Signals and time limits: what they interrupt, what they leave whole, and what a bad step's file says."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from align import guards, launch, stops
from align.config import load_config
from align.errors import GuardError
from align.launch import World
from align.sitting import MOST_TEXT, Sitting, readable
from align.stops import SIGNALS, Overdue, Stop, Stopped, cut, time_limit, whole
from align.tracking import RunLog
from align.types import Samples, Scores
from rewards.base import RewardCard, score_safely


def ask(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_each_signal_interrupts_a_cut_after_the_grace_time(number):
    with Stop(0.3) as stop, pytest.raises(Stopped), cut():
        began = time.monotonic()
        ask(number)
        time.sleep(20)
    assert stop.asked == signal.Signals(number).name and 0.3 <= time.monotonic() - began < 5


def test_what_is_whole_is_finished_and_then_the_cut_around_it_ends():
    done = []
    with Stop(0.0), pytest.raises(Stopped), cut():
        with whole():
            ask()
            time.sleep(0.5)
            done.append("whole")
        time.sleep(20)
    assert done == ["whole"]
    with Stop(0.0):  # outside of any block nothing is interrupted
        ask()
        time.sleep(0.5)


def test_a_stop_that_something_swallows_comes_again():
    with Stop(0.0), pytest.raises(Stopped), cut():
        ask()
        with contextlib.suppress(Stopped):
            time.sleep(20)
        time.sleep(20)


def test_a_person_who_repeats_interrupts_at_once_and_a_launcher_who_repeats_does_not():
    with Stop(60.0) as stop:
        ask(signal.SIGTERM)
        ask(signal.SIGTERM)
        ask(signal.SIGINT)
        assert stop.asked == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            ask(signal.SIGINT)


def test_handlers_and_a_timer_of_somebody_else_are_given_back():
    before = [signal.getsignal(number) for number in (*SIGNALS, signal.SIGALRM)]
    rang = []
    handler = signal.signal(signal.SIGALRM, lambda number, frame: rang.append(time.monotonic()))
    foreign = signal.setitimer(signal.ITIMER_REAL, 0.6)
    began = time.monotonic()
    try:
        with Stop(0.0), time_limit(30.0):
            ask()
        time.sleep(1.0)
    finally:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *foreign)
    assert len(rang) == 1 and 0.5 < rang[0] - began < 1.0
    assert [signal.getsignal(number) for number in (*SIGNALS, signal.SIGALRM)] == before


def test_limits_of_time_nest():
    with pytest.raises(Overdue, match=r"not done within 0\.3 s"), time_limit(30.0), time_limit(0.3):
        time.sleep(20)
    with time_limit(0.1):
        pass
    time.sleep(0.2)  # one that was kept does not ring later


class Hanging:
    """Takes its time."""

    names, card = ("a", "b"), RewardCard("test/hanging", "hangs", "0 to 1")

    def identity(self):
        return "hanging"

    def score(self, samples):
        time.sleep(20)
        return Scores(np.ones((len(samples), 2)), np.ones((len(samples), 2), bool), self.names)


def test_a_hung_reward_is_interrupted_named_and_its_scores_are_missing():
    began = time.monotonic()
    found = score_safely(Hanging(), Samples(["a cat", "a dog"], texts=["", ""]), 0.3)
    assert time.monotonic() - began < 5
    assert np.isnan(found.values).all() and not found.valid.any() and found.values.shape == (2, 2)
    assert set(found.errors) == {"test/hanging: not done within 0.3 s, a batch of 2, the first 'a cat'"}


def test_weights_that_are_not_finite_are_refused():
    good = [torch.ones(3), torch.full((2,), 1e10)]
    guards.require_weights(guards.weights_check(good), "step 1")
    for bad in (float("nan"), float("inf")):
        with pytest.raises(GuardError, match=r"The trained weights are not finite \(step 4\)"):
            guards.require_weights(guards.weights_check([*good, torch.tensor([0.0, bad])]), "step 4")


def test_what_was_seen_is_json_that_people_read():
    found = readable({
        "a": torch.tensor([1.0, float("nan")]), "b": float("-inf"), "c": lambda: (True, None), "d": "x" * (MOST_TEXT + 1),
        "e": range(2), "f": np.float32(0.5),
    })  # fmt: skip
    assert found["a"] == [1.0, "nan"] and found["b"] == "-inf" and found["c"] == [True, None] and found["e"] == [0, 1]
    assert found["d"].endswith(f"... ({MOST_TEXT + 1} characters)") and found["f"] == 0.5
    json.dumps(found, allow_nan=False)


def test_a_bad_step_is_written_and_the_error_names_the_file(tmp_path):
    config = load_config("digits/smoke")
    sitting = Sitting(tmp_path, config, World(), RunLog(tmp_path), lambda: None)
    sitting.enter()
    sitting.begin_step(3)
    sitting.at("training")
    sitting.see(samples=lambda: [{"prompt": "a cat", "seed": [0, 3, 0, 1], "scores": {"ink": float("nan")}}])
    for loss in (0.5, float("inf"), 0.25):
        sitting.see_tile(rows=[1], loss=torch.tensor(loss))
    with pytest.raises(GuardError, match=r"Lower it; what was seen stands in .*bad_step_000003\.json") as told:
        sitting.leave(GuardError("The loss is not finite", where="step 3", do="Lower it"))
    assert told.value.what == "The loss is not finite" and told.value.where == "step 3"
    found = json.loads((tmp_path / "bad_step_000003.json").read_text())
    assert (found["step"], found["process"], found["doing"]) == (3, 0, "step 3, training")
    assert found["samples"] == [{"prompt": "a cat", "seed": [0, 3, 0, 1], "scores": {"ink": "nan"}}]
    assert found["tiles"] == {"of_the_update": 3, "shown": [{"rows": [1], "loss": "inf"}]}
    assert stops.Stop.current is None


def test_a_stop_while_a_launch_begins_is_heard(monkeypatch):
    """The launcher's processes are asked, rather than left behind."""
    begin = subprocess.Popen

    def asked(*command, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return begin(*command, **options)

    monkeypatch.setattr(subprocess, "Popen", asked)
    look = f"import os, sys; sys.exit(not os.path.exists(os.environ[{launch._STOP_FILE!r}]))"
    with stops.interrupting():
        assert launch.run_launched([sys.executable, "-c", look], {}) == 130
