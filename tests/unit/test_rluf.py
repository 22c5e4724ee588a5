"""RLUF end to end on a tiny model saved to disk: what is learnt from, resuming bit for bit, judges that fail, bounds."""

from __future__ import annotations

import json
import os
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from align.checks import check_config
from align.config import RewardConfig, load_config
from align.errors import ConfigError, DataError, GuardError, RewardError
from align.launch import World
from align.preferences import load_preferences
from align.types import Samples, Scores
from rewards.chats import completion_text
from rewards.suite import Judgement, Suite
from trainers import trainer_for
from trainers.language import LanguageRun
from trainers.language_generation import Answer
from trainers.language_model import load_language_model
from trainers.language_objective import HeldOut, Models, microbatch
from trainers.language_reference import Reference
from trainers.rluf import Group, RLUFObjective, answer_scores, plan_updates
from trainers.tiny_language import build_tiny, toy_thumbs

HERE = "tests.unit.test_rluf"


def texts(samples):
    return [completion_text(text) for text in samples.texts]


def letters(samples):
    """Share of an answer's characters that are ASCII letters: dense, so that a random model has something to learn."""
    return [sum(c.isascii() and c.isalpha() for c in text) / max(1, len(text)) for text in texts(samples)]


def even(samples):
    """1 for an even number of characters, else 0."""
    return [float(len(text) % 2 == 0) for text in texts(samples)]


def unlike(samples):
    """A frozen judge that likes the less what is trained for."""
    return [-value for value in letters(samples)]


def constant(samples):
    return [1.0] * len(samples)


def never(samples):
    return [0.0] * len(samples)


def no_answer(samples):
    """A judge that cannot be asked."""
    raise DataError("the judge is down")


def sometimes(samples):
    """Missing for texts with an odd number of characters."""
    return [1.0 if len(text) % 2 == 0 else None for text in texts(samples)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_tiny(tmp_path_factory.mktemp("models") / "tiny")


def config(model, *overrides):
    return load_config(
        {
            "trainer": "rluf", "name": "toy", "model": {"path": str(model), "train": "full"},
            "data": {"path": "toy", "heldout_fraction": 0.2, "max_length": 64}, "batch_size": 4, "microbatch": 2,
            "steps": 4, "optimizer": {"lr": 1e-3, "warmup": 0.0}, "checkpoint": {"every": 2},
            "rewards": {
                "love": {"name": f"{HERE}:letters", "transform": [{"affine": {"scale": 8}}]},
                "helpfulness": {"name": "toy/helpfulness"}, "safety": {"name": f"{HERE}:even", "role": "gate"},
            },
            "sampling": {"completions": 3, "max_new_tokens": 5},
            "evaluation": {"every": 2, "rows": 5, "prompts": 5, "max_new_tokens": 5},
        },
        overrides,
    )  # fmt: skip


def run(model, out, *overrides, **options):
    return trainer_for(config(model, *overrides), out=out, rows=toy_thumbs(30).split(0.2), **options)


def metrics(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "seconds" not in k and "memory" not in k} for row in rows]


def weights(out, step=4, name="model"):
    return load_file(out / "checkpoints" / f"step_{step:06d}" / f"{name}.safetensors")


def opened(model, *overrides):
    """An objective with its prompts, models, and a microbatch of two of them, outside of a Trainer."""
    settings = config(model, "batch_size=2", *overrides)
    objective = RLUFObjective(settings)
    made = LanguageRun(settings, objective, out=model.parent / "unused", rows=toy_thumbs(30).split(0.2), overwrite=True)
    policy = load_language_model(settings.model, seed=0)
    rows = [0, 1]
    batch = microbatch(made.tokens, np.array(rows), rows, rows, None, pad=made.tokenizer.pad_token_id)
    return objective, Models(policy, policy, Reference("copy", policy)), batch


# --- one microbatch ---------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["crpg", "crraft", "codpo"])
def test_a_small_step_makes_what_is_better_likelier(model, loss, monkeypatch):
    objective, models, batch = opened(model, f"objective.loss={loss}", "sampling.completions=6")
    seen = {}
    learn = objective._learn

    def spied(models, plan, sequences, *rest):
        seen.update(plan=plan, sequences=sequences)
        return learn(models, plan, sequences, *rest)

    monkeypatch.setattr(objective, "_learn", spied)
    found = objective.losses(models, batch, batch["totals"], World())
    assert found.rows.shape == (2,) and found.loss.item() == pytest.approx(found.rows.sum().item() / 2)
    plan, sequences = seen["plan"], seen["sequences"]
    assert plan.picked
    found.loss.backward()
    before, _ = objective._free_logps(models, sequences)
    with torch.no_grad():
        for p in models.plain.parameters():
            p -= 0.02 * p.grad
    after, _ = objective._free_logps(models, sequences)
    change = np.array([(after - before)[p * 7 + m] for p, m in plan.picked])
    if loss == "codpo":
        half = len(change) // 2
        assert (change[:half] - change[half:]).mean() > 0
    else:
        assert (plan.weight * change).sum() > 0


def test_completions_do_not_depend_on_their_batch_and_change_with_the_step(model):
    objective, models, batch = opened(model)
    rows = batch["index"].tolist()
    prompts = [objective.prompts[i] for i in rows]
    drawn = objective._draw(models, rows, prompts, World())
    alone = [a for i, p in zip(rows, prompts, strict=True) for a in objective._draw(models, [i], [p], World())]
    assert [a.text for a in drawn] == [a.text for a in alone] and len(drawn) == 2 * 4
    objective.step = 1
    later = objective._draw(models, rows, prompts, World())
    assert [a.text for a in later][3::4] == [a.text for a in drawn][3::4]  # baselines stay
    assert [a.text for a in later][0::4] != [a.text for a in drawn][0::4]


def test_a_microbatch_is_planned_from_the_numbers_as_worked_by_hand(model):
    """The oracle of the objectives, through the plan: rewards, judge, bound and log-ratios of one prompt."""
    reward, ratio = np.array([1.2, -0.3, 2.0, 0.4, 0.5]), np.array([[0.5, 0.2, 0.1, 3.0, 0.0]])
    said = Judgement(
        reward[:, None], reward[:, None], np.array([[1], [1], [0], [1], [1]], bool), np.zeros((5, 1), bool)
    )
    group = Group(said, ratio, np.full((1, 5), 20), np.ones((1, 5), bool))
    suite = Suite({"r": RewardConfig(name=f"{HERE}:constant"), "j": RewardConfig(name=f"{HERE}:even", role="gate")})
    plans = {
        loss: plan_updates(config(model, f"objective.loss={loss}", "objective.kl_max=1"), suite, group)
        for loss in ("crpg", "crraft", "codpo")
    }
    assert plans["crpg"].constrained[0] == pytest.approx([0.66818777, 0.31002552, 0, 0], abs=5e-9)
    assert 4 * plans["crpg"].weight == pytest.approx([0.42363445, 0.06547220, -0.24455332, -0.24455332], abs=5e-9)
    assert plans["crraft"].picked == [(0, 0)] and plans["crraft"].weight == pytest.approx([0.66818777], abs=5e-9)
    assert plans["codpo"].picked == [(0, 0), (0, 3)]


def test_gdpo_is_that_of_the_advantages_and_a_constant_reward_gives_0(model):
    values = np.array([(1, 0), (0, 1), (1, 1), (0, 0), (0, 0), (0, 1), (0, 1), (0, 0)], float)
    with_base = np.concatenate([np.append(values[:4], [[0.0, 0.0]], 0), np.append(values[4:], [[0.0, 0.0]], 0)])
    said = Judgement(with_base, with_base, np.ones((10, 0), bool), np.zeros((10, 0), bool))
    group = Group(said, np.zeros((2, 5)), np.full((2, 5), 4), np.ones((2, 5), bool))
    suite = Suite({name: RewardConfig(name=f"{HERE}:constant") for name in ("love", "helpfulness")})
    plan = plan_updates(config(model, "objective.aggregation=gdpo"), suite, group)
    # R_hat is affine in 0/1 rewards, so group z-scores are those of the rewards but for eps over another std.
    advantage = np.zeros((2, 4))
    for (p, m), weight in zip(plan.picked, plan.weight, strict=True):
        advantage[p, m] = 4 * weight
    assert advantage.ravel() == pytest.approx(
        [0, 0, 1.527391, -1.527391, -0.763695, 0.763695, 0.763695, -0.763695], abs=2e-3
    )


def test_without_a_valid_completion_crraft_learns_the_baseline_at_half_weight(model):
    said = Judgement(np.zeros((3, 1)), np.zeros((3, 1)), np.array([[0], [0], [1]], bool), np.zeros((3, 1), bool))
    group = Group(said, np.zeros((1, 3)), np.full((1, 3), 4), np.ones((1, 3), bool))
    suite = Suite({"r": RewardConfig(name=f"{HERE}:constant"), "j": RewardConfig(name=f"{HERE}:even", role="gate")})
    plan = plan_updates(config(model, "objective.loss=crraft"), suite, group)
    assert plan.picked == [(0, 2)] and plan.weight.tolist() == [0.5]
    assert plan_updates(config(model, "objective.loss=codpo"), suite, group).picked == []
    assert plan_updates(config(model), suite, group).picked == []


# --- runs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [(), ("objective.loss=crraft", "model.train=lora", "model.lora.rank=4"), ("objective.loss=codpo", "microbatch=4")],
    ids=["crpg", "crraft-lora", "codpo"],
)
def test_a_stopped_run_goes_on_bit_for_bit(model, tmp_path, overrides):
    from transformers import AutoModelForCausalLM

    run(model, tmp_path / "whole", *overrides).train()
    stopped = run(model, tmp_path / "run", *overrides)
    finish = stopped.objective.finish

    def interrupted(world):
        if stopped.objective.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return finish(world)

    stopped.objective.finish = interrupted
    assert stopped.train().status == "stopped"
    assert len(metrics(tmp_path / "run")) == 3
    assert run(model, tmp_path / "run", *overrides).train().status == "complete"
    name = "adapter_model" if "model.train=lora" in overrides else "model"
    whole, parts = (weights(tmp_path / d, name=name) for d in ("whole", "run"))
    assert all(torch.equal(value, parts[key]) for key, value in whole.items())
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "run")
    for log in ("generations.jsonl", "warnings.jsonl"):
        assert (tmp_path / "whole" / log).read_text() == (tmp_path / "run" / log).read_text()
    if name == "model":
        start, end = AutoModelForCausalLM.from_pretrained(model).state_dict(), whole
        assert any(not torch.equal(start[key], value) for key, value in end.items())


WATCHED = (
    "steps=24", "optimizer.lr=1e-2", "evaluation.every=6", "evaluation.prompts=24", "evaluation.rows=24",
    "data.heldout_fraction=0.5", f"heldout_rewards={{quality: {{name: '{HERE}:unlike'}}}}", "rewards.safety.name=length_band",
    "rewards.safety.args={low: 0, high: 99, unit: words}",
)  # fmt: skip


def watched(model, out, *overrides, **options):
    return trainer_for(config(model, *WATCHED, *overrides), out=out, rows=toy_thumbs(60).split(0.5), **options)


def test_a_hacked_run_stops_with_its_checkpoint_and_goes_on_only_when_told(model, tmp_path):
    """The judge dislikes just what the rewards like, so that the first rise is a fall of the judge."""
    result = watched(model, tmp_path / "run").train()
    said = json.loads((tmp_path / "run" / "run.json").read_text())
    seen = [json.loads(line) for line in (tmp_path / "run" / "evaluation.jsonl").read_text().splitlines()]
    assert result.status == result.summary["status"] == said["status"] == "hacked"
    stopped = result.summary["steps"]
    assert 6 <= stopped < 24 and [row["step"] for row in seen] == list(range(0, stopped + 1, 6))
    assert [row["monitor"]["hacked"] for row in seen] == [False] * (len(seen) - 1) + [True]
    judge = next(s for s in seen[-1]["monitor"]["signals"] if s["name"] == "judge")
    assert (
        judge["tripped"]
        and judge["value"] < 0.5
        and seen[-1]["heldout/quality"]["mean"] < seen[0]["heldout/quality"]["mean"]
    )
    warnings = [json.loads(line) for line in (tmp_path / "run" / "warnings.jsonl").read_text().splitlines()]
    assert [(w["step"], w["level"]) for w in warnings if w["code"] == "drift"] == [(stopped, "alarm")]
    assert weights(tmp_path / "run", stopped)
    with pytest.raises(ConfigError, match="The hack monitor stopped this run"):
        watched(model, tmp_path / "run").train()
    onward = watched(model, tmp_path / "run", "monitor.action=warn", f"steps={stopped + 1}", fork=True).train()
    assert onward.status == "complete" and onward.summary["steps"] == stopped + 1


def test_a_monitor_that_is_off_says_nothing(model, tmp_path):
    result = watched(model, tmp_path / "run", "monitor.action=off", "steps=6").train()
    assert result.status == "complete" and "monitor_after" not in result.summary
    assert "heldout/quality_after" in result.summary


def test_what_a_run_writes_down(model, tmp_path):
    result = run(model, tmp_path / "run", "steps=2", "checkpoint.every=0").train()
    first, last = (json.loads(x) for x in (tmp_path / "run" / "evaluation.jsonl").read_text().splitlines()[::1])
    assert first["gain/love"]["mean"] == 0 and first["win/love"]["mean"] == 0.5 and abs(first["kl"]["mean"]) < 1e-3
    assert first["constrained"]["mean"] == pytest.approx(0.5 * first["judge/all"]["mean"])
    rows = [json.loads(x) for x in (tmp_path / "run" / "generations.jsonl").read_text().splitlines()]
    for row in rows:
        text = row["completion"]
        assert row["scores"]["safety"] == float(len(text) % 2 == 0) == float(row["passed"])
    share = np.mean([r["passed"] for r in rows if r["step"] == 2])
    assert last["judge/all"]["mean"] == last["judge/safety"]["mean"] == pytest.approx(share)
    assert result.summary["reward/love_after"] == last["reward/love"]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["rewards"]["safety"]["role"] == "gate" and record["rewards"]["love"]["identity"]
    step = metrics(tmp_path / "run")[0]
    assert step["judge_errors"] == step["missing_rewards"] == 0 and step["valid"] <= step["judge/safety"] <= 1


def test_shown_rewards_are_those_before_transforms(model):
    suite = Suite({"love": RewardConfig(name=f"{HERE}:letters", transform=({"affine": {"scale": 8}},))})
    said = suite.judge(suite.score(Samples(prompts=["p"] * 2, texts=["ab1 ", "...."])))
    assert said.shown[:, 0].tolist() == [0.5, 0.0] and said.rewards[:, 0].tolist() == [4.0, 0.0]
    assert said.all_passed.tolist() == [True, True]  # without judges nothing is violated


def test_equal_rewards_move_nothing_and_are_no_defect(model, tmp_path):
    one = "{love: {name: 'tests.unit.test_rluf:constant'}}"
    run(model, tmp_path / "run", f"rewards={one}", "steps=2", "checkpoint.every=2").train()
    start, end = load_file(model / "model.safetensors"), weights(tmp_path / "run", 2)
    assert all(torch.equal(start[key], value) for key, value in end.items())
    assert metrics(tmp_path / "run")[0]["learnt_prompts"] == 0


@pytest.mark.parametrize("loss", ["crpg", "crraft", "codpo"])
def test_a_judge_that_always_fails_stops_the_run_and_is_named(model, tmp_path, loss):
    out = tmp_path / "run"
    failing = run(
        model, out, f"rewards.safety.name={HERE}:never", f"objective.loss={loss}", "objective.patience=7",
        "checkpoint.every=1",
    )  # fmt: skip
    with pytest.raises(
        GuardError, match=r"No completion was valid for 7 prompts in a row \(step 2\): safety passes 0%"
    ):
        failing.train()
    assert len(metrics(out)) == 1  # the first step's 4 prompts went by; the seventh prompt is in the second step
    assert json.loads((out / "run.json").read_text())["status"] == "failed"


def test_a_judge_without_an_answer_is_violated_and_counted_apart(model, tmp_path):
    failing = run(model, tmp_path / "run", f"rewards.safety.name={HERE}:no_answer", "objective.patience=7")
    with pytest.raises(GuardError, match=r"safety passes 0% and gives no answer for 100%"):
        failing.train()
    step = metrics(tmp_path / "run")[0]
    assert step["judge_errors"] == 4 * 3 and step["missing_rewards"] == 0 and step["judge/safety"] == 0


def test_the_count_of_prompts_without_a_valid_completion_survives_a_checkpoint(model):
    objective = RLUFObjective(config(model))
    objective.step, objective.barren = 5, 3
    again = RLUFObjective(config(model))
    again.restore(json.loads(json.dumps(objective.state())))
    assert (again.step, again.barren) == (5, 3)


def test_rewards_that_are_missing_too_often_stop_the_run(model, tmp_path):
    how = (f"rewards.love.name={HERE}:sometimes",)
    with pytest.raises(RewardError, match=r"love is missing for .*objective.max_fail_frac"):
        run(model, tmp_path / "run", *how).train()
    run(model, tmp_path / "other", *how, "objective.max_fail_frac=1", "steps=1").train()
    assert metrics(tmp_path / "other")[0]["missing_rewards"] > 0


def test_a_reference_that_is_another_model_is_refused(model):
    objective, models, batch = opened(model)
    with torch.no_grad():
        next(iter(models.reference.copy.parameters())).add_(0.1)
    with pytest.raises(GuardError, match="The policy is not the reference"):
        objective.losses(models, batch, batch["totals"], World())


def test_a_bound_of_the_log_ratio_makes_what_is_far_invalid(model):
    objective, models, batch = opened(model, "objective.kl_max=0.01")
    objective.step = 1
    with torch.no_grad():
        for p in models.plain.parameters():
            p.mul_(1.5)
    objective.losses(models, batch, batch["totals"], World())
    found = objective.finish(World())
    assert found["kl_exceeded"] > 0 and found["valid"] <= min(found["judge/all"], 1 - found["kl_exceeded"]) + 1e-9


def test_prompts_alone_will_do_and_the_rows_own_answer_may_be_the_baseline(model, tmp_path):
    path = tmp_path / "prompts.jsonl"
    asked = [{"prompt": f"Say: red {i}\nAnswer:"} for i in range(8)]
    asked += [{"prompt": [{"role": "user", "content": f"Say: blue {i}"}]} for i in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in asked))
    trainer_for(
        config(model, f"data.path={path}", "steps=1", "checkpoint.every=0", "evaluation.prompts=3"), out=tmp_path / "a"
    ).train()
    with pytest.raises(DataError, match="A row has no completion"):
        trainer_for(config(model, f"data.path={path}", "objective.baseline=row"), out=tmp_path / "b")
    objective, models, batch = opened(model, "objective.baseline=row")
    rows = batch["index"].tolist()
    base = objective._draw(models, rows, [objective.prompts[i] for i in rows], World())[3::4]
    ups = {row.prompt: row.completion for row in toy_thumbs(30).rows if row.label}
    assert [a.text for a in base] == [ups[objective.prompts[i].given] for i in rows]


def test_rows_that_cannot_be_asked_are_refused(model, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"a text {i}"}) + "\n" for i in range(8)))
    with pytest.raises(DataError, match=r"line 1\): this row has no prompt"):
        trainer_for(config(model, f"data.path={path}", "data.heldout_fraction=0"), out=tmp_path / "run")


def test_one_row_a_prompt_prefers_what_is_not_disliked():
    rows = load_preferences([
        {"prompt": "a", "completion": "bad", "label": False}, {"prompt": "a", "completion": "good", "label": True},
        {"prompt": "b", "completion": "only", "label": False},
    ])  # fmt: skip
    assert [row.completion for row in rows.one_a_prompt().rows] == ["good", "only"]


def test_answer_scores_of_worked_numbers():
    suite = Suite({"love": RewardConfig(name=f"{HERE}:constant"), "ok": RewardConfig(name=f"{HERE}:even", role="gate")})

    def scores(love, ok):
        values = np.array([love, ok], float).T
        return Scores(values, np.isfinite(values), ("love", "ok"), extras={"love": values[:, 0], "ok": values[:, 1]})

    found = answer_scores(
        suite, scores([1.0, 0.5, 2.0, 0.0], [1, 1, 0, np.nan]), scores([0.0, 0.5, 3.0, 0.0], [1, 1, 1, 1]),
        np.array([0.0, 9.0, 0.0, 0.0]), 5.0, np.array(list("abcd")),
    )  # fmt: skip
    assert found["reward/love"]["mean"] == 0.875 and found["gain/love"]["mean"] == 0.0
    assert found["win/love"]["mean"] == pytest.approx((1 + 0.5 + 0 + 0.5) / 4)
    assert found["judge/ok"]["mean"] == 0.5 and found["judge_errors"] == 1
    # The second is beyond the bound, the third fails its judge, the fourth's judge gave no answer.
    assert found["constrained"]["mean"] == pytest.approx(1 / (1 + np.exp(-1)) / 4)


# --- configuration ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "code"),
    [
        ("rewards.love.weight=-1", "negative_weight"), ("rewards={j: {name: length, role: gate}}", "no_reward"),
        ("rewards.love.transform=[{rank_in_group: {}}]", "group_transform"),
        ("rewards.love.transform=[{zscore: {over: batch}}]", "group_transform"), ("reference.mode=precomputed", "precomputed"),
        ("rewards.love.name=toy/lov", "unknown_reward"), ("sampling.top_p=0.9", "off_policy"),
        ("evaluation.prompts=0", "nothing_judged"), ("heldout_rewards={q: {name: toy/love, role: gate}}", "heldout_gate"),
        ("heldout_rewards={q: {name: toy/helpfulness}}", "heldout_is_trained"),
        ("heldout_rewards={q: {name: toy/love, weight: 0}}", "heldout_weight"),
        ("heldout_rewards={q: {name: toy/love, transform: [{zscore: {over: batch}}]}}", "group_transform"), ("rewards={love: {name: toy/love}}", "no_judge"),
    ],
)  # fmt: skip
def test_what_check_finds(model, override, code):
    found = {f.code for f in check_config(config(model, override), reward_names=["toy/love", "toy/helpfulness"])}
    assert code in found and code not in {
        f.code for f in check_config(config(model), reward_names=["toy/love", "toy/helpfulness"])
    }


def test_gdpo_is_for_crpg(model):
    both = ("objective.aggregation=gdpo", "objective.loss=codpo")
    assert "gdpo_needs_crpg" in {f.code for f in check_config(config(model, *both))}


def test_a_mistyped_key_of_a_named_reward_is_answered_with_the_right_one(model):
    with pytest.raises(ConfigError, match=r"Did you mean 'rewards.love.weight'\?"):
        config(model, "rewards.love.wieght=3")


def test_the_presets_differ_in_the_weight_of_love_alone():
    presets = {name: load_config(f"rluf/{name}") for name in ("conservative", "moderate", "aggressive")}
    love = [config.rewards["love"].weight / config.rewards["helpfulness"].weight for config in presets.values()]
    assert love == sorted(love) and len(set(love)) == 3
    judges = [{k: r for k, r in config.rewards.items() if r.role == "gate"} for config in presets.values()]
    assert judges[0] == judges[1] == judges[2] and {"safety", "farewell", "solicitation", "length"} == set(judges[0])
    assert len({json.dumps(config.objective.model_dump()) for config in presets.values()}) == 1
    assert all("our" in config.about for config in presets.values())


def test_what_the_rewards_of_training_say_is_what_the_monitor_watches(model):
    """R_hat, of which one half is the baseline's: a reward on a large scale does not drown the others."""
    both = ("heldout_rewards={q: {name: toy/love}}", "rewards={a: {name: toy/love}, b: {name: toy/helpfulness}}")
    objective = RLUFObjective(config(model, *both))
    prompts = [f"p{i}" for i in range(24)]
    before = Judgement(np.zeros((24, 2)), np.zeros((24, 2)), np.ones((24, 0), bool), np.zeros((24, 0), bool))
    now = np.stack([np.full(24, 2.0), np.where(np.arange(24) % 2, -20.0, 0.5)], 1)
    said = Judgement(now, now, before.passed, before.failed)
    answers = [Answer(np.array([1]), "one", True)] * 24
    heldout = HeldOut(1, [], answers, answers, None, World(), [])
    objective._scored = lambda *given: Scores(
        np.zeros((24, 1)), np.ones((24, 1), bool), ("q",), ("",) * 24, {"q": np.zeros(24)}
    )
    found = objective._watched(heldout, said, before, np.array(prompts))
    hat = 0.5 * (1 / (1 + np.exp(-now))).sum(1)
    assert hat.mean() > 0.5 and found["monitor"]["rise"] > 2
