"""Configs: typed values, refused mistakes, overrides, origins, the round trip, and the findings of `check_config`."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from align.checks import check_config, require_valid
from align.config import DanceGRPOConfig, anchored, config_origins, diff_configs, load_config, save_config
from align.config_errors import described_keys
from align.errors import ConfigError
from align.ledger import clip_nats, feq_ledger, trained_step_count
from align.published import latent_dim
from align.recipes import copy_recipe, list_recipes, read_recipe
from align.run import claim_directory, require_directory
from align.textfiles import dump_value, parse_yaml
from align.visual_checks import advantage_bound

BASE = {
    "model": {"path": "digits"},
    "prompts": {"path": "digits"},
    "rewards": [{"name": "digits/legibility"}, {"name": "digits/ink_band"}],
}

WAN = "model.path=Wan-AI/Wan2.1-T2V-1.3B-Diffusers"


def refused(source, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides)
    return str(caught.value)


def codes(*overrides: str) -> dict[str, str]:
    return {finding.code: finding.level for finding in check_config(load_config(BASE, overrides))}


# --- values -----------------------------------------------------------------------------------------


def test_numbers_and_words_mean_what_people_mean():
    text = "lr: 1e-5\nbig: 1E+3\nhalf: .5\nint: 12\nneg: -3\nguidance: off\nanswer: no\nyes: yes\nflag: true\nnone: null\nq: '1e-5'\nt: 12:30\n"
    assert parse_yaml(text, "x").value == {
        "lr": 1e-5, "big": 1000.0, "half": 0.5, "int": 12, "neg": -3, "guidance": "off", "answer": "no", "yes": "yes",
        "flag": True, "none": None, "q": "1e-5", "t": "12:30",
    }  # fmt: skip


def test_floats_take_integers_and_the_text_of_an_exponent():
    config = load_config({**BASE, "optimizer": {"lr": "1e-5", "eps": "2.5E-9"}, "sampler": {"eta": 1}})
    assert (config.optimizer.lr, config.optimizer.eps, config.sampler.eta) == (1e-5, 2.5e-9, 1.0)
    assert load_config(BASE, ["optimizer.lr=1e-5"]).optimizer.lr == 1e-5


def test_off_survives_a_yaml_1_1_reader():
    assert yaml.safe_load("guidance: off") == {"guidance": False}
    assert load_config({**BASE, "sampler": yaml.safe_load("guidance: off")}).sampler.guidance == "off"
    assert load_config(BASE, ["sampler.guidance=off"]).sampler.guidance == "off"


@pytest.mark.parametrize(
    ("override", "found", "expected"),
    [
        ("steps=1.5", "1.5 (a number)", "a whole number"),
        ("steps=true", "True (true or false)", "a whole number"),
        ("steps='12'", "'12' (text)", "a whole number"),
        ("steps=0", "0 (a number)", "a number >= 1"),
        ("steps=", "nothing", "a whole number"),
        ("optimizer.lr=true", "True (true or false)", "a number"),
        ("optimizer.lr=high", "'high' (text)", "a number"),
        ("optimizer.lr=.inf", "inf (a number)", "a finite number"),
        ("optimizer.lr=-1", "-1 (a number)", "a number > 0"),
        ("optimizer.betas=[0.9]", "[0.9]", "2 numbers"),
        ("sampler.kernel=dance", "'dance' (text)", "one of 'ode', 'dance_sde'"),
        ("sampler=3", "3 (a number)", "key: value pairs"),
        ("sampler.guidance=true", "True (true or false)", "one of 'off', 'both_branches'"),
        ("model.gradient_checkpointing=yes", "'yes' (text)", "true or false"),
        ("rewards=[]", "an empty list", "at least 1 item"),
        ("name=a/b", "'a/b' (text)", "letters, digits"),
        ("model.path=7", "7 (a number)", "text"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_found_and_expected(override: str, found: str, expected: str):
    message = refused(BASE, override)
    key = override.partition("=")[0]
    assert f"'{key}'" in message and "command line" in message
    assert f"found {found}" in message and f"expected {expected}" in message


def test_a_wrong_value_names_file_and_line(tmp_path: Path):
    path = tmp_path / "x.yaml"
    path.write_text("model: {path: digits}\nprompts: {path: digits}\nrewards: [{name: a}]\nsampler:\n  eta: high\n")
    assert f"'sampler.eta' is wrong ({path}:5)" in refused(path)


@pytest.mark.parametrize(
    ("key", "closest"),
    [
        ("stepz", "'steps'"), ("sampler.etta", "'sampler.eta'"), ("eta", "'sampler.eta'"), ("lr", "'optimizer.lr'"),
        ("sampler.clip_range", "'objective.clip_range'"), ("rewards.1.wieght", "'rewards.1.weight'"),
        ("model.lora.rnak", "'model.lora.rank'"),
    ],
)  # fmt: skip
def test_an_unknown_key_gets_the_closest_one(key: str, closest: str):
    message = refused(BASE, f"{key}=1")
    assert f"Unknown key '{key}' (command line)" in message and f"Did you mean {closest}?" in message


def test_an_unknown_key_names_file_and_line(tmp_path: Path):
    path = tmp_path / "x.yaml"
    path.write_text("model: {path: digits}\nprompts: {path: digits}\nrewards:\n  - name: a\n    wait: 1\n")
    message = refused(path)
    assert f"({path}:5)" in message and "rewards.0.weight" in message


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"modle": {"path": "digits"}}, "Unknown key 'modle' (Python). Did you mean 'model'?"),
        ({"model": {"pth": "digits"}}, "Unknown key 'model.pth' (Python). Did you mean 'model.path'?"),
    ],
)
def test_a_mistyped_key_that_is_needed_is_named_as_it_was_written(given: dict, sentence: str):
    assert sentence in refused({"prompts": {"path": "digits"}, "rewards": [{"name": "a"}], **given})


def test_missing_and_several_problems_are_counted():
    message = refused({"model": {"path": "digits"}, "prompts": {}})
    assert "'prompts.path' is missing" in message and "1 more" in message


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"steps: 1\nsteps: 2\n", "'steps' is given twice (FILE:2): first on line 1"),
        (b"a: {b: 1, b: 2}\n", "'a.b' is given twice (FILE:1)"),
        (b"steps: [1\nname: x\n", "not YAML (FILE:2)"),
        (b"steps: \xff\n", "not UTF-8 text (FILE, line 1): byte 0xff at offset 7"),
        (b"- steps\n", "found a list"),
        (b"just words\n", "found 'just words' (text)"),
        (b"", "A config is empty (FILE)"),
        (b"a: &x {b: *x}\n", "contains itself (FILE:1)"),
        (b"a: 1\n---\nb: 2\n", "not YAML (FILE:2)"),
        (b"[1, 2]: 3\n", "key must be text (FILE:1)"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, content: bytes, sentence: str):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    assert sentence in refused(path).replace(str(path), "FILE")


def test_sources_that_are_not_there(tmp_path: Path):
    assert "no such file (nope.yaml)" in refused("nope.yaml")
    assert "Did you mean 'digits/dance_grpo'?" in refused("digits/dance_gpro")
    assert "this is a folder" in refused(tmp_path)


@pytest.mark.parametrize("override", ["steps", "=1", ".steps=1", "a..b=1", ""])
def test_an_override_that_is_none(override: str):
    assert "An override is key=value" in refused(BASE, override)


def test_overrides_reach_lists_sections_and_arguments():
    config = load_config(
        BASE,
        [
            "rewards.1.weight=2",
            "rewards.0.args.split=evaluator",
            "optimizer={lr: 1e-2}",
            "about=a = b",
            "optimizer.eps=1e-6",
        ],
    )
    assert (config.rewards[1].weight, config.rewards[0].args) == (2.0, {"split": "evaluator"})
    assert (config.optimizer.lr, config.optimizer.eps, config.about) == (1e-2, 1e-6, "a = b")
    assert BASE["rewards"][1] == {"name": "digits/ink_band"}, "the given mapping is left alone"
    assert "rewards has 2 items" in refused(BASE, "rewards.2.weight=1")
    assert "rewards has 2 items" in refused(BASE, "rewards.x=1")
    assert "steps is a single value" in refused({**BASE, "steps": 3}, "steps.more=1")


def test_configs_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        load_config(BASE).steps = 3


# --- origins and the round trip ---------------------------------------------------------------------


def test_every_leaf_knows_where_it_came_from(tmp_path: Path):
    path = tmp_path / "x.yaml"
    path.write_text(read_recipe("digits/dance_grpo"))
    lines = path.read_text().splitlines()
    origins = config_origins(
        load_config(path, ["sampler.shift=3", "heldout_rewards.0.weight=2", "optimizer={lr: 1e-2}"])
    )
    eta = next(i for i, line in enumerate(lines, 1) if "eta:" in line)
    assert origins["sampler.eta"] == f"{path}:{eta}"
    assert origins["sampler.shift"] == origins["heldout_rewards.0.weight"] == origins["optimizer.lr"] == "command line"
    assert origins["optimizer.eps"] == origins["model.lora.targets"] == origins["heldout_rewards.1.weight"] == "default"
    assert re.fullmatch(rf"{re.escape(str(path))}:\d+", origins["heldout_rewards.1.args.split"])
    recipe = config_origins(load_config("digits/dance_grpo"))
    assert recipe["sampler.eta"] == f"configs/digits/dance_grpo.yaml:{eta}"
    python = config_origins(load_config(BASE))
    assert python["model.path"] == "Python" and python["steps"] == "default"


@pytest.mark.parametrize("recipe", [name for name, _ in list_recipes() if not name.startswith("presets/")])
def test_a_saved_config_loads_again_with_its_origins(recipe: str, tmp_path: Path):
    config = load_config(recipe, ["seed=7", "about='a: #b, \"c\" \\ é 🙂'", "optimizer.eps=1e-12"])
    path = tmp_path / "config.yaml"
    save_config(config, path)
    again = load_config(path)
    assert again == config and config_origins(again) == config_origins(config)
    assert yaml.safe_load(path.read_text(encoding="utf-8")) == config.model_dump(mode="json"), "YAML 1.1 reads the same"
    save_config(again, tmp_path / "twice.yaml")
    assert (tmp_path / "twice.yaml").read_text() == path.read_text()


def test_a_saved_config_edited_by_hand_does_not_keep_stale_origins(tmp_path: Path):
    path = tmp_path / "config.yaml"
    save_config(load_config(BASE), path)
    path.write_text(path.read_text().replace("seed: 0 ", "seed: 7 "))
    again = load_config(path)
    assert again.seed == 7 and config_origins(again)["seed"].startswith(f"{path}:")


def test_equality_ignores_origins_and_diff_shows_values():
    a, b = load_config(BASE), load_config(BASE, ["steps=300"])
    assert a == b and config_origins(a) != config_origins(b)
    c = load_config(BASE, ["optimizer.lr=1e-2", "rewards.1.args.split=x"])
    assert a != c and a != "config"
    assert diff_configs(a, c) == [
        ("rewards.1.args", {}, None), ("optimizer.lr", 3e-4, 1e-2), ("rewards.1.args.split", None, "x")
    ]  # fmt: skip


def test_a_run_keeps_whole_paths_and_goes_on_from_relative_ones(tmp_path: Path, monkeypatch):
    for name in ("my model", "judge", "owner/name", "tiny", "toy", "digits", "simulated"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    given = load_config(BASE, [
        "model.path=my model", "prompts.path=digits", "rewards.0.args={path: judge, split: judge}",
        "prompts.heldout_path=absent.txt", "sparsity.mask=owner/name",
    ])  # fmt: skip
    claim_directory(tmp_path / "run", given)
    kept = load_config(tmp_path / "run" / "config.yaml")
    assert (kept.model.path, kept.sparsity.mask) == (str(tmp_path / "my model"), str(tmp_path / "owner/name"))
    assert kept.rewards[0].args == {"path": str(tmp_path / "judge"), "split": "judge"}
    assert (kept.prompts.path, kept.prompts.heldout_path) == ("digits", "absent.txt")
    assert config_origins(kept) == config_origins(given)
    assert require_directory(tmp_path / "run", given) == require_directory(tmp_path / "run", kept) == []
    save_config(given, tmp_path / "run" / "config.yaml")  # as runs were that kept what they were given
    assert require_directory(tmp_path / "run", given) == require_directory(tmp_path / "run", kept) == []
    words = {"trainer": "kto", "model": {"path": "tiny"}, "data": {"path": "toy", "heldout_path": "my model"}}
    assert anchored(load_config(words)).data.model_dump().items() >= {
        "path": "toy", "heldout_path": str(tmp_path / "my model")}.items()  # fmt: skip
    assert anchored(load_config(words)).model.path == "tiny"
    assert anchored(load_config({"trainer": "fit", "data": {"paths": ["owner/name", "b"]}})).data.paths == (
        str(tmp_path / "owner/name"), "b")  # fmt: skip
    assert anchored(load_config({"trainer": "peering"})).data.paths == ("simulated",)


def test_how_long_is_waited_changes_no_run_and_an_argument_of_that_name_does():
    waits = ["checkpoint.grace_seconds=7", "checkpoint.hung_after_seconds=7", "rewards.0.hung_after_seconds=7"]
    own = "rewards.1.args.hung_after_seconds"
    a, b = load_config(BASE), load_config(BASE, [*waits, f"{own}=7"])
    assert {key for key, _, _ in diff_configs(a, b)} == {"rewards.1.args", own, *(w.partition("=")[0] for w in waits)}
    assert {key for key, _, _ in diff_configs(a, b, waits=False)} == {"rewards.1.args", own}


_plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        _plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=6
    )
)
def test_what_is_dumped_is_read_back(value):
    assert parse_yaml(f"x: {dump_value(value)}  # note", "here").value == {"x": value}


# --- recipes ----------------------------------------------------------------------------------------


def test_recipes_load_pass_their_checks_and_say_what_they_are_for(tmp_path: Path):
    recipes = dict(list_recipes())
    assert {"digits/dance_grpo", "digits/demo", "digits/smoke", "digits/hacked", "digits/full"} <= set(recipes)
    for name, about in recipes.items():
        preset = name.startswith("presets/")
        rest = {"model": {"path": "folder"}, "prompts": {"path": "p.txt"}, "rewards": [{"name": "a"}, {"name": "b"}]}
        config = load_config({"extends": name, **rest} if preset else name)
        assert config.about == ("" if preset else about), "what a preset says of itself is not said of what extends it"
        assert about and about.startswith("To extend") == preset
        require_valid(config)
        assert copy_recipe(name, tmp_path / "copies" / name / "x.yaml").read_text() == read_recipe(name)
    with pytest.raises(ConfigError, match="exists already"):
        copy_recipe("digits/smoke", tmp_path / "copies" / "digits/smoke/x.yaml")
    assert copy_recipe("digits/smoke", tmp_path).name == "smoke.yaml"


def test_presets_are_what_the_facts_say():
    rest = {"model": {"path": "folder"}, "prompts": {"path": "p.txt"}, "rewards": [{"name": "a"}]}
    repo = load_config({"extends": "presets/repo_stable_diffusion", **rest})
    ledger = feq_ledger(repo)
    assert (ledger["trained_steps"], ledger["solver_steps"], ledger["samples_per_step"]) == (49, 50, 512)
    assert (repo.sampler.kernel, repo.sampler.eta, repo.sampler.guidance_scale, repo.seed) == ("ddim", 1.0, 5.0, 42)
    assert config_origins(repo)["sampler.eta"].startswith("configs/presets/repo_stable_diffusion.yaml:")
    assert config_origins(repo)["model.path"] == "Python" and repo.model.train == "full"
    paper = load_config({"extends": "presets/paper_stable_diffusion", **rest})
    assert feq_ledger(paper)["trained_steps"] == 30 and paper.updates_per_step == 1 and paper.sampler.shift is None
    assert config_origins(paper)["optimizer.lr"].startswith("configs/presets/paper.yaml:")
    flux = load_config({"extends": "presets/paper", **rest})
    assert feq_ledger(flux)["trained_steps"] == 15 and flux.updates_per_step == 4 and flux.group_size == 12


def test_a_config_that_extends_says_only_what_differs(tmp_path: Path):
    (tmp_path / "base.yaml").write_text(json.dumps({**BASE, "sampler": {"eta": 0.1, "solver_steps": 9}}))
    mine = tmp_path / "mine.yaml"
    mine.write_text("extends: base.yaml\nsampler: {eta: 0.2}\nrewards: [{name: only}]\n")
    config = load_config(mine, ["sampler.solver_steps=7"])
    assert (config.sampler.eta, config.sampler.solver_steps) == (0.2, 7)
    assert [reward.name for reward in config.rewards] == ["only"]
    origins = config_origins(config)
    assert origins["sampler.eta"] == f"{mine}:2" and origins["sampler.solver_steps"] == "command line"
    assert origins["model.path"].startswith(str(tmp_path / "base.yaml")) and origins["rewards.0.name"] == f"{mine}:3"
    assert not [key for key in origins if key.startswith("rewards.1")]
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    assert config_origins(load_config(tmp_path / "saved.yaml")) == origins


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: mine.yaml\n", "extends itself"),
        ("extends: 3\n", "extends one other"),
        ("# nothing yet\n", "A config is empty.*mine.yaml"),
        ("extends: presets/papers\n", "presets/paper"),
    ],
)
def test_a_bad_beginning_is_refused(tmp_path: Path, text: str, message: str):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "mine.yaml")


def test_the_demo_trains_as_the_recommended_recipe_does():
    differing = {key for key, _, _ in diff_configs(load_config("digits/dance_grpo"), load_config("digits/demo"))}
    parts = {key.partition(".")[0] for key in differing}
    assert parts == {"about", "name", "steps", "rewards", "heldout_rewards", "evaluation"}


def test_every_field_is_described_in_one_sentence():
    for key, description in described_keys(DanceGRPOConfig):
        assert description.endswith(".") and description.count(". ") == 0, key


# --- counts, cost and findings ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "paper", "repo"),
    [(16, 10, 9), (20, 12, 11), (12, 8, 6), (25, 15, 14), (50, 30, 29), (5, 3, 2), (1, 0, 0)],
)
def test_trained_step_counts_of_the_paper_and_of_its_code(steps: int, paper: int, repo: int):
    assert trained_step_count(steps, 0.6, "paper") == paper
    assert trained_step_count(steps, 0.6, "repo") == repo


def test_the_last_step_is_never_trained():
    assert trained_step_count(10, 1.0, "paper") == trained_step_count(10, 1.0, "repo") == 9
    assert trained_step_count(10, 0.0, "paper") == 0
    with pytest.raises(ConfigError, match="Unknown rule"):
        trained_step_count(10, 0.5, "half")


@pytest.mark.parametrize(
    ("overrides", "feq"),
    [
        (["model.train=full", "sampler.solver_steps=25"], 25 + 15 * 3),  # the paper, 70 in the published table
        (["model.train=full", "model.gradient_checkpointing=true", "trained_steps.rule=repo"], 16 + 9 * 4),  # repo: 52
        (["sampler.solver_steps=25"], 25 + 15 * 2),
        (["sampler.guidance=both_branches", "sampler.guidance_scale=5"], 2 * 16 + 2 * 10 * 2),
        (["sampler.guidance=uncond_detached", "sampler.guidance_scale=5"], 2 * 16 + 10 * (2 + 1)),
        (["objective.kl_weight=0.1"], 16 + 10 * (2 + 1)),
        (["group_size=24", "advantage.best_of=8"], 16 + 10 * 2 / 3),
        (  # Flow-GRPO on SD3.5, 10 steps with guidance and a KL: 74 in the published table
            [
                "sampler.guidance=both_branches",
                "sampler.guidance_scale=4.5",
                "objective.kl_weight=0.04",
                "sampler.solver_steps=10",
                "trained_steps={fraction: 1, rule: repo}",
            ],
            20 + 18 + 18 * 2,
        ),
    ],
)
def test_the_ledger_gives_the_published_costs(overrides: list[str], feq: int):
    assert feq_ledger(load_config(BASE, overrides))["feq_per_sample"] == pytest.approx(feq)


def test_clip_in_nats_of_flux_at_720(tmp_path: Path):
    for part, text in (
        ("vae", '{"_class_name": "AutoencoderKL", "latent_channels": 16, "block_out_channels": [1, 2, 3, 4]}'),
        ("transformer", "{}"),
    ):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(text)
    config = load_config(BASE, [f"model.path={tmp_path}", "sampler.height=720", "sampler.width=720"])
    assert latent_dim(config) == 129_600
    assert clip_nats(config, 129_600) == pytest.approx(12.96)
    assert clip_nats(load_config(BASE, ["objective.logprob_reduction=sum"]), 129_600) == 1e-4
    assert clip_nats(load_config(BASE, ["objective.clip_unit=nats", "objective.clip_range=2"]), 129_600) == 2
    assert [clip_nats(load_config(BASE, [f"objective.loss={loss}"]), 256) for loss in ("guard", "dppo")] == [None] * 2
    assert latent_dim(load_config(BASE)) == 256 and latent_dim(load_config(BASE, ["model.path=elsewhere"])) is None


@pytest.mark.parametrize(
    ("overrides", "code", "level"),
    [
        (["sampler.kernel=ode"], "no_density", "error"),
        (["sampler.eta=0"], "no_density", "error"),
        (["trained_steps.fraction=0"], "empty_subset", "error"),
        (["sampler.solver_steps=1"], "empty_subset", "error"),
        (["trained_steps={fraction: 0.05, rule: repo}"], "empty_subset", "error"),
        (["group_size=1"], "group_size", "error"),
        (["prompts_per_step=16", "group_size=8", "updates_per_step=3"], "uneven_updates", "error"),
        (["sampler.guidance_scale=5"], "guidance_unused", "error"),
        (["heldout_rewards=[{name: digits/ink_band}]"], "heldout_is_trained", "error"),
        (["rewards=[{name: a}, {name: a, weight: 2}]"], "reward_twice", "error"),
        (["rewards=[{name: a, weight: 0}]"], "zero_weights", "error"),
        (["combine.mode=gate"], "gate", "error"),
        (["rewards=[{name: a}, {name: b, role: gate}]"], "gate", "error"),
        (["combine.gate_floor=-1"], "gate_floor", "note"),
        (["sampler.guidance=both_branches", "sampler.guidance_scale=5"], "guidance_updates", "warning"),
        (["sampler.guidance=both_branches"], "guidance_idle", "warning"),
        (["sampler.guidance=uncond_detached", "sampler.guidance_scale=5"], "guidance_updates", "warning"),
        (["group_size=8", "advantage.best_of=9"], "best_of", "error"),
        (["advantage.recentre=true"], "recentre", "note"),
        (["model.train=full", "objective.kl_weight=0.1"], "reference_copy", "note"),
        (["prompts_per_step=15", "model.path=sd3"], "few_prompts", "warning"),
        (["sampler.eta=0.4"], "eta_high", "warning"),
        (["model.train=full", "optimizer.lr=1e-6"], "lr_low", "warning"),
        (["rewards=[{name: a}]"], "single_reward", "warning"),
        (["rewards=[{name: a, transform: [{rank_in_group: {}}]}]"], "relative_reward", "warning"),
        (["rewards.0.transform=[{rank_in_group: {}}]"], "relative_reward", "note"),
        (["prompts.heldout_fraction=0"], "no_heldout_prompts", "warning"),
        (["sampler.shift=3"], "shift_mismatch", "warning"),
        (["rewards=[{name: a}]", "advantage.clip=5"], "advantage_clip", "note"),
        (["evaluation.guidance_scale=2"], "guidance_mismatch", "note"),
        (["advantage.scope=group_mean"], "unscaled", "warning"),
        (["objective.loss=dppo", "objective.clip_range=1e-5"], "loss_bound", "error"),
        (["objective.loss=dppo", "objective.clip_range_high=1e-3"], "loss_bound", "error"),
        (["objective.loss=dppo", "objective.clip_unit=nats"], "loss_bound", "error"),
        (["objective.loss=guard", "objective.dppo_threshold=1e-5"], "loss_bound", "error"),
        (["objective.loss=guard_delta", "objective.clip_unit=nats"], "guard_nats", "error"),
        (["objective.kl_form=gaussian"], "kl_form", "note"),
        ([WAN, "sampler.initial_noise=none"], "video_noise", "warning"),
    ],
)
def test_each_finding_is_found_and_leaves_when_its_cause_does(overrides: list[str], code: str, level: str):
    assert codes(*overrides).get(code) == level
    assert code not in codes()


@pytest.mark.parametrize(
    "overrides",
    [
        [WAN], [WAN, "sampler.initial_noise=none", "sampler.frames=1"], ["sampler.initial_noise=none"],
        ["model.path=black-forest-labs/FLUX.1-dev", "sampler.initial_noise=none"],
    ],
)  # fmt: skip
def test_only_videos_are_asked_to_share_their_noise(overrides: list[str]):
    assert "video_noise" not in codes(*overrides)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [  # 12 members, ddof 1: 11 / sqrt(12) = 3.18 for each score
        (["rewards=[{name: a}]"], "never binds where each reward gives one score: a group of 12 bounds .* by 3.18"),
        (["rewards=[{name: a, components: {x: 1}}]"], "never binds: a group of 12 bounds the advantage by 3.18"),
        (["rewards=[{name: a, components: {x: 1, y: 1}}]"], ""),  # 6.35
        (["rewards=[{name: a, components: {x: 1, y: -1}, weight: 0.7}]"], "by 4.45"),
        (["rewards=[{name: a, weight: 3}, {name: b, weight: 3}]", "combine.mode=weighted_sum"], "never binds: .* 3.18"),
        (["combine.mode=gdpo"], ""),  # a z-score over the batch
        (["rewards=[{name: a}]", "advantage.scope=group_mean"], ""),
        (["rewards=[{name: a}]", "trainer=forward"], ""),  # nft divides by it
    ],
)
def test_a_clip_is_called_idle_only_where_it_is(overrides: list[str], told: str):
    found = [f.message for f in check_config(load_config(BASE, overrides)) if f.code == "advantage_clip"]
    assert bool(found) == bool(told) and all(re.search(told, message) for message in found)


def test_a_sound_config_has_no_errors_and_one_note():
    assert codes() == {"off_policy": "note", "steps_mismatch": "note", "no_judge": "note"}
    assert codes("updates_per_step=1", "evaluation.solver_steps=16") == {"no_judge": "note"}


def test_an_error_is_raised_with_key_origin_and_advice():
    with pytest.raises(ConfigError, match=r"group_size, command line.*Set group_size to 2 or more"):
        require_valid(load_config(BASE, ["group_size=1"]))


def test_unknown_rewards_and_missing_files_are_findings(tmp_path: Path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("a cat\nA  cat\n\n")
    config = load_config(BASE, [f"prompts.path={prompts}", "model.path=nowhere"])
    found = {
        f.code: f for f in check_config(config, reward_names=["digits/legibility", "digits/ink_bands"], files=True)
    }
    assert found["unknown_reward"].key == "rewards.1.name" and "digits/ink_bands" in found["unknown_reward"].do
    assert "line 3" in found["prompts"].message and found["model"].level == "error"
    prompts.write_text("a cat\nA  cat\n")
    assert "1 of 2" in {f.code: f for f in check_config(config, files=True)}["duplicate_prompts"].message


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 40), st.integers(0, 1))
def test_the_advantage_bound_is_reached_by_one_winner(size: int, ddof: int):
    rewards = [1.0] + [0.0] * (size - 1)
    mean = sum(rewards) / size
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (size - ddof))
    assert (1 - mean) / std == pytest.approx(advantage_bound(size, ddof))
