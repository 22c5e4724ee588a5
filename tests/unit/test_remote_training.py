"""A run whose reward is on another machine: the same result, and a server that dies loses nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from align import checkpoint
from align.config import load_config
from align.errors import RewardError
from rewards.serve import serving
from trainers import DanceGRPO

SERVED = [("digits/raw_ink", {}), ("digits/ink_band", {})]


def config(url, *overrides):
    remote = {"placement": "remote", "url": url, "retries": 0, "backoff_s": 0.01, "timeout_s": 20}
    remote["encoding"] = "float32"
    rewards = [{"name": name, "args": remote if url else {}} for name, _ in SERVED]
    base = {
        "extends": "digits/smoke", "model": {"path": "digits/random"}, "rewards": rewards, "batch": {"rollout": 5},
        "evaluation": {"every": 0, "samples": 8, "final_samples": 20}, "checkpoint": {"every": 100},
        "tracking": {"samples_every": 0},
    }  # fmt: skip
    return load_config(base, overrides)


def rows(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "time/", "memory")
    return [{k: v for k, v in line.items() if not any(t in k for t in timed)} for line in lines]


def server(port=0):
    names = [part for name, _ in SERVED for part in ("--reward", name)]
    command = [sys.executable, "-m", "align.cli", "rewards", "serve", *names, "--port", str(port), "--json", "-"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return process, json.loads(process.stdout.readline())["url"]


def kill_once(trainer, out, process, then):
    """Kill the server when the second step is scored, whichever thread comes first, and do `then` 2 s later."""
    score, killed = trainer.rewards.rewards[0].score, threading.Lock()

    def kill_in_step_2(samples):
        if (out / "metrics.jsonl").exists() and killed.acquire(blocking=False):
            process.kill()
            process.wait()
            threading.Timer(2.0, then).start()
        return score(samples)

    trainer.rewards.rewards[0].score = kill_in_step_2
    return killed


def test_a_remote_reward_trains_as_a_local_one_does(tmp_path):
    trained = {}
    with serving(SERVED) as url:
        for name, at in (("local", ""), ("remote", url)):
            run = DanceGRPO(config(at, "steps=2"), out=tmp_path / name)
            run.train()
            trained[name] = {n: p.detach().clone() for n, p in run.policy.trainable().items()}
    for name, value in trained["local"].items():
        assert torch.equal(value, trained["remote"][name]), name
    assert rows(tmp_path / "local") == rows(tmp_path / "remote")
    record = json.loads((tmp_path / "remote" / "run.json").read_text())
    local_record = json.loads((tmp_path / "local" / "run.json").read_text())
    assert [r["identity"] for r in record["rewards"]] == [r["identity"] for r in local_record["rewards"]]


@pytest.mark.timeout(200)
def test_a_server_killed_mid_run_pauses_it_and_loses_nothing(tmp_path):
    process, url = server()
    port = int(url.rpartition(":")[2].strip("/"))
    trainer = DanceGRPO(config(url, "steps=4"), out=tmp_path / "run")
    replaced = []
    killed = kill_once(trainer, tmp_path / "run", process, lambda: replaced.append(server(port)))
    try:
        assert trainer.train().status == "complete"
    finally:
        for left, _ in replaced:
            left.kill()
            left.wait()
    assert killed.locked() and replaced
    said = [json.loads(line)["message"] for line in (tmp_path / "run" / "warnings.jsonl").read_text().splitlines()]
    assert any("waits for a reward server" in m for m in said) and any("is back" in m for m in said)
    found = rows(tmp_path / "run")
    assert [row["step"] for row in found] == [1, 2, 3, 4] and all(row["valid_share"] == 1 for row in found)

    with serving(SERVED) as again:
        whole = DanceGRPO(config(again, "steps=4"), out=tmp_path / "whole")
        whole.train()
    for name, value in whole.policy.trainable().items():
        assert torch.equal(value, trainer.policy.trainable()[name]), name
    assert found == rows(tmp_path / "whole")


@pytest.mark.timeout(200)
def test_a_run_that_waits_for_its_server_can_be_stopped_and_resumed(tmp_path):
    process, url = server()
    port = int(url.rpartition(":")[2].strip("/"))
    trainer = DanceGRPO(config(url, "steps=3"), out=tmp_path / "run")
    kill_once(trainer, tmp_path / "run", process, lambda: os.kill(os.getpid(), signal.SIGTERM))
    began = time.monotonic()
    assert trainer.train().status == "stopped" and time.monotonic() - began < 60
    assert checkpoint.load_latest(tmp_path / "run" / "checkpoints").step == 1
    process, _ = server(port)
    try:
        assert DanceGRPO.resume(tmp_path / "run").train().status == "complete"
    finally:
        process.kill()
        process.wait()
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3]


def test_too_many_missing_scores_of_a_server_that_answers_stop_the_run(tmp_path):
    with serving(SERVED) as url:
        trainer = DanceGRPO(config(url, "steps=2"), out=tmp_path / "run")
        sample_images = trainer.policy.family.decode
        trainer.policy.family.decode = lambda latents: sample_images(latents) * float("nan")
        with pytest.raises(RewardError, match="missing for 16 of 16"):
            trainer.train()
