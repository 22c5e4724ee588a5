"""The command line: exit codes, one sentence for each mistake, JSON, dry runs, and a fast `--help`."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from align.cli import _VERBS, _out_refuses, _parser, main
from align.commands.engines import goes_on
from align.errors import ConfigError
from align.output import EXITS, give, run_verb

ROOT = Path(__file__).parents[2]
# The fastest honest measure on a busy machine is the best of a few attempts.


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


def process(*arguments: str, path: Path | None = None, **options) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, filter(None, (path, ROOT))))}
    environment.pop("PYTHONUNBUFFERED", None)  # output that is still in a buffer is part of what is tested
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=environment,
        # a job in the background ignores the interrupt, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def verbs(parser: argparse.ArgumentParser, path: tuple[str, ...] = ()) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Walk every verb and action with its parser."""
    yield " ".join(("align", *path)), parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, found in action.choices.items():
                yield from verbs(found, (*path, name))


def test_what_libraries_print_does_not_stand_among_the_json(capsys: pytest.CaptureFixture[str]):
    def noisy(options: argparse.Namespace) -> int:
        sys.stdout.write("[WARNING] a library says so\n")
        return give(options, {"done": True}, "done")

    assert run_verb(argparse.Namespace(run=noisy, json="-")) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"done": True} and err == "[WARNING] a library says so\n"


SURFACE = dict(verbs(_parser()))
ACTS = {name: parser for name, parser in SURFACE.items() if name not in ("align", "align feedback", "align sparsity")}
"""Those that do something by themselves."""


def test_no_flag_takes_what_is_no_number():
    taken = [(name, a.dest) for name, parser in SURFACE.items() for a in parser._actions if a.type is float]
    assert taken == [], "float takes nan and inf; align.output has number, share and finite"


def flags_of(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {name: action for action in parser._actions for name in action.option_strings if name.startswith("--")}


@pytest.mark.parametrize("verb", SURFACE)
def test_every_verb_has_help_with_examples_and_exit_codes(verb: str):
    text = SURFACE[verb].format_help()
    assert f"usage: {verb}" in text and f"examples:\n  {verb if verb != 'align' else 'align configs'}" in text
    assert f"\n{EXITS}\n" in text and text.rstrip().endswith(EXITS)
    assert SURFACE[verb].description and all(
        action.help for action in SURFACE[verb]._actions if action.metavar not in ("VERB", "ACTION")
    )


def test_the_examples_in_every_help_parse():
    for verb, parser in SURFACE.items():
        for line in parser.epilog.splitlines()[1:]:
            example = shlex.split(line)
            options, rest = SURFACE["align"].parse_known_args(example[1:])
            assert example[0] == "align" and options.verb == example[1], (verb, line)
            assert all("=" in word and not word.startswith("-") for word in rest), (verb, line)


def test_every_verb_that_acts_gives_json():
    assert [verb for verb, parser in ACTS.items() if "--json" not in flags_of(parser)] == []
    assert len(ACTS) > 40, "all were seen"


MEANINGS = {
    "--chat": "chat|what a user says", "--columns": "names of all columns", "--config": "YAML file",
    "--count": "of each prompt", "--down-to": "thumbs down .*to X", "--dtype": "fp32",
    "--duplicates": "contradict each other", "--host": "^address to listen on", "--image-column": "column",
    "--images": "images", "--key": "signal|this key", "--kind": "^only this kind", "--level": "full|bits",
    "--mask": "mask", "--max-new-tokens": "^longest", "--model": "model", "--nproc": "processes",
    "--base": "start|model that", "--out": "^where to write", "--overwrite": "start again|begin anew|replace",
    "--port": "^port; 0 takes a free one", "--prompts": "^a txt, JSONL, CSV or Parquet file",
    "--rankings": "^with the columns", "--ratings": "^with the columns", "--reward": "^a reward",
    "--scale": "^of ratings", "--seed": "^seed of every random draw", "--temperature": "^0 is greedy",
    "--to": "^layout to write", "--up-from": "thumbs up for .* from X up",
}  # fmt: skip
"""What the help of a flag says in all verbs, where its other words differ."""


def test_one_flag_means_one_thing():
    """The same words, or the words of `MEANINGS`; and the same kind of value everywhere."""
    uses: dict[str, list[tuple[str, argparse.Action]]] = {}
    for verb, parser in SURFACE.items():
        for name, action in flags_of(parser).items():
            uses.setdefault(name, []).append((verb, action))
    for name, found in uses.items():
        helps = {action.help for _, action in found}
        kinds = {(type(a), a.type, a.metavar, a.nargs) for _, a in found if a.help != argparse.SUPPRESS}
        assert len(kinds) == 1, (name, [(verb, a.type, a.metavar) for verb, a in found])
        if len(helps) > 1:
            assert MEANINGS.get(name), (name, helps)
            assert all(re.search(MEANINGS[name], text) for text in helps), (name, helps)
    assert set(MEANINGS) <= set(uses)


def test_the_walk_sees_a_flag_of_two_meanings():
    """What the tests above are made of can fail: two verbs, one flag, two kinds of value."""
    parser = argparse.ArgumentParser(prog="align")
    actions = parser.add_subparsers()
    actions.add_parser("a").add_argument("--images", type=int, help="how many images")
    actions.add_parser("b").add_argument("--images", metavar="DIR", help="where images are")
    kinds = {flags_of(found)["--images"].type for verb, found in verbs(parser) if verb != "align"}
    assert kinds == {int, None}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["trian"], "Unknown verb 'trian'. Did you mean 'train'?"),
        (["train"], "required: CONFIG"),
        (["train", "nope.yaml"], "There is no such file (nope.yaml)"),
        (["train", "digits/dance"], "Did you mean 'digits/dance_grpo'?"),
        (["train", "digits/smoke", "stepz=3"], "Unknown key 'stepz' (command line). Did you mean 'steps'?"),
        (["train", "digits/smoke", "steps=many"], "found 'many' (text), expected a whole number"),
        (["train", "digits/smoke", "group_size=1"], "nothing to be compared with"),
        (["train", "digits/smoke", "sampler.kernel=ode"], "no log-prob to train on"),
        (["train", "digits/smoke", "sampler.eta=0"], "no log-prob to train on"),
        (["train", "digits/smoke", "trained_steps.fraction=0"], "No solver step is trained"),
        (["train", "digits/smoke", "--sed", "3"], "has no flag '--sed'. Did you mean '--seed'?"),
        (["train", "digits/smoke", "--group-size", "8"], "has no dashes: group_size=VALUE."),
        (["train", "digits/smoke", "--seed", "x"], "'x' is not a whole number"),
        (["sample", "digits", "--count", "0"], "must be 1 or more"),
        (["resume", "nowhere"], "This is not a run folder (nowhere): there is no such folder"),
        (["resume", __file__], f"This is not a run folder ({__file__}): it is a file."),
        (
            ["sample", "runs/nowhere", "--prompt", "a", "--dry-run"],
            "There is no such run, model or recipe (runs/nowhere)",
        ),
        (["report", "nowhere"], "This is not a run folder"),
        (["configs", "show", "digits/smok"], "Did you mean 'digits/smoke'?"),
        (["configs", "lst"], "align configs does not know 'lst'. Did you mean 'list'?"),
        (["configs", "zzz"], "Choose one of: copy, from-trl, list, show."),
        (["check", "nope.txt"], "There is no such file (nope.txt)"),
        (["doctor", "x"], "has no use for 'x'"),
    ],
)
def test_bad_input_is_one_sentence_on_stderr_and_code_2(capsys, arguments: list[str], sentence: str):
    code, out, err = run(capsys, *arguments)
    assert code == 2 and out == ""
    assert sentence in err and err.startswith("align: ") and err.count("\n") == 1


def test_places_that_cannot_be_written_or_trained_from_are_said(capsys, tmp_path: Path):
    (tmp_path / "config.yaml").write_text("steps: 3\n")
    code, _, err = run(capsys, "train", str(tmp_path))
    assert code == 2 and f"This is a run ({tmp_path}). `align resume {tmp_path}` goes on with it" in err
    options = _parser().parse_args(["sample", "digits", "--out", str(tmp_path)])
    named, other = (FileExistsError(17, "File exists", str(path)) for path in (tmp_path / "x", tmp_path.parent))
    assert f"(--out {tmp_path}): File exists ({tmp_path / 'x'}). Choose another --out" in str(
        _out_refuses(named, options)
    )
    assert _out_refuses(other, options) is None and _out_refuses(OSError(5, "x", str(tmp_path)), options) is None


def test_a_full_stop_is_not_said_twice():
    assert str(ConfigError("a", where="b", why="No such thing.", do="Go on")) == "a (b): No such thing. Go on."


def test_bad_prompt_files_are_refused_by_check(capsys, tmp_path: Path):
    path = tmp_path / "p.txt"
    path.write_text("a cat\n\na dog\n")
    assert f"A line is empty ({path}, line 2)" in run(capsys, "check", str(path))[2]
    path.write_bytes(b"a caf\xe9\n")
    code, _, err = run(capsys, "check", str(path))
    assert code == 2 and "not UTF-8 text" in err and "offset 5" in err
    path.write_text("a cat\nA cat\n")
    code, out, _ = run(capsys, "check", str(path))
    assert code == 0 and "2 in" in out and "1 prompts repeat" in out


def test_without_a_verb_the_verbs_are_shown(capsys):
    code, out, err = run(capsys)
    assert code == 2 and out == ""
    assert all(f"\n    {verb}" in err for verb in ("train", "demo", "check"))


def test_check_says_cost_updates_and_findings(capsys):
    code, out, _ = run(
        capsys, "check", "digits/dance_grpo", "rewards=[{name: digits/legibility}]", "heldout_rewards=[]"
    )
    assert code == 0
    assert (
        "22 F_eq a sample = 10 + 6 x 2" in out and "updates   2 of each rollout" in out and "will be exploited" in out
    )
    assert "measures  2 x 2000 samples, 5 x 256 on the way, 20 F_eq each = 0.5 of training's" in out
    assert "clip      0.0001 nats" in out and "of 10 solver steps" in out
    out = run(capsys, "check", "digits/dance_grpo", "objective.loss=dppo")[1]
    assert "\nclip " not in out and "of 10 solver steps" in out
    code, out, _ = run(capsys, "check", "digits/dance_grpo", "group_size=1", "rewards.0.name=digits/legible")
    assert code == 2 and "nothing to be compared with" in out and "'digits/legible'" in out


def test_json_goes_to_a_file_or_to_stdout(capsys, tmp_path: Path):
    for alone in (("configs", "--json", "-"), ("configs", "--json"), ("configs", "list", "--json")):
        code, out, _ = run(capsys, *alone)
        assert code == 0 and {"digits/demo"} <= {recipe["name"] for recipe in json.loads(out)}
    code, out, _ = run(capsys, "train", "digits/smoke", "--json", "--dry-run")
    assert code == 0 and json.loads(out)["out"] == "runs/smoke"
    code, _, err = run(capsys, "train", "digits/smoke", "--dry-run", "--json", "steps=3")
    assert code == 2 and "steps=3 is no file" in err
    path = tmp_path / "deep" / "x.json"
    code, out, _ = run(capsys, "train", "digits/smoke", "--dry-run", "--seed", "5", "--json", str(path))
    found = json.loads(path.read_text())
    assert code == 0 and "would train into runs/smoke" in out and found["ledger"]["solver_steps"] == 4
    (tmp_path / "file").write_text("")
    code, _, err = run(capsys, "configs", "list", "--json", str(tmp_path / "file" / "x.json"))
    assert code == 2 and "cannot be written" in err


def test_overrides_may_follow_flags_and_seed_is_one(capsys):
    code, out, _ = run(capsys, "train", "digits/smoke", "steps=7", "--dry-run", "group_size=8", "steps=9")
    assert code == 0 and "9 steps of 32 samples" in out


def test_dry_runs_change_nothing(capsys, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments in (
        ["train", "digits/smoke"], ["sample", "digits", "--prompt", "a cat"], ["evaluate", "digits"],
        ["configs", "copy", "digits/smoke", "x.yaml"],
    ):  # fmt: skip
        code, out, _ = run(capsys, *arguments, "--dry-run")
        assert code == 0 and "would" in out
    assert list(tmp_path.iterdir()) == []


def test_recipes_are_listed_shown_and_copied(capsys, tmp_path: Path):
    assert "digits/hacked" in run(capsys, "configs")[1]
    shown = run(capsys, "configs", "show", "digits/smoke")[1]
    copied = tmp_path / "mine.yaml"
    assert run(capsys, "configs", "copy", "digits/smoke", str(copied))[0] == 0
    assert copied.read_text() == shown
    code, _, err = run(capsys, "configs", "copy", "digits/smoke", str(copied))
    assert code == 2 and "exists already" in err
    assert run(capsys, "configs", "copy", "digits/full", str(copied), "--overwrite")[0] == 0
    assert run(capsys, "train", str(copied), "--dry-run")[0] == 0


def test_a_copied_recipe_is_checked_from_its_file(capsys, tmp_path):
    mine = tmp_path / "mine.yaml"
    assert run(capsys, "configs", "copy", "digits/smoke", str(mine))[0] == 0
    assert run(capsys, "check", str(mine))[0] == 0
    code, out, _ = run(capsys, "check", str(mine), "steps=7", "rewards.0.args.splt=reward")
    assert code == 2 and "7 steps" in out and "Did you mean 'split'?" in out and "?." not in out
    code, out, _ = run(capsys, "check", str(mine), "heldout_rewards.0.role=gate")
    assert code == 2 and "nothing to close" in out


def test_a_missing_package_is_named_with_its_extra(tmp_path):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n")
    child = process("-m", "align.cli", "train", "digits/smoke", "--out", str(tmp_path / "run"), path=tmp_path)
    said = child.communicate(timeout=60)[1]
    assert child.returncode == 2 and "This needs torch. Run `pip install 'align[diffusion]'`" in said
    assert "Traceback" not in said


def test_flags_of_images_are_refused_for_text_and_the_other_way_round(capsys, tmp_path):
    for arguments, said in (
        (["sample", "tiny", "--steps", "3"], "tiny is a language model (--steps)"),
        (["evaluate", "kto/smoke", "--guidance", "2"], "kto/smoke is a language model (--guidance)"),
        (["sample", "nope"], "There is no such run, model or recipe (nope)"),
        (["evaluate", "nope", "--data", "rows.jsonl"], "There is no such run, model or recipe (nope)"),
        (["select", "nope", "--reward", "no_farewell"], "There is no such run, model or recipe (nope)"),
        (["sample", "digits", "--temperature", "0.5"], "digits is no language model (--temperature)"),
        (["evaluate", "digits", "--trained-with", "kto/smoke"], "digits is no language model (--trained-with)"),
        (["sample", "tiny", "--top-p", "0"], "'0' is not above 0 and at most 1"),
    ):
        code, _, err = run(capsys, *arguments)
        assert code == 2 and said in err, err


def test_rewards_are_listed_and_described(capsys):
    listed = run(capsys, "rewards")[1]
    assert "digits/ink_band" in listed and "986 M weights" in listed and "unstated (weights)" in listed
    code, out, _ = run(capsys, "rewards", "describe", "digits/ink_band", "--json", "-")
    assert code == 0 and json.loads(out)["definition"]
    code, _, err = run(capsys, "rewards", "describe", "digits/ink_bnd")
    assert code == 2 and "Did you mean 'digits/ink_band'?" in err


# --- as a process -----------------------------------------------------------------------------------


def test_help_is_light():
    heavy = "import sys, align.cli; align.cli.main(['--help']); align.cli.main(['configs']); "
    child = process(
        "-c", heavy + "print(sorted({'torch', 'pydantic', 'numpy', 'diffusers', 'pandas'} & set(sys.modules)))"
    )
    assert child.communicate(timeout=30)[0].splitlines()[-1] == "[]"


def test_an_interrupt_ends_with_130(tmp_path: Path):
    pipe = tmp_path / "prompts.txt"
    os.mkfifo(pipe)
    child = process("-m", "align.cli", "check", str(pipe))
    writer, deadline = None, time.monotonic() + 30
    while writer is None:  # succeeds once the child has opened the file
        assert child.poll() is None and time.monotonic() < deadline
        with contextlib.suppress(OSError):
            writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        time.sleep(0.01)
    waited = 0
    while waited < 30 and time.monotonic() < deadline:  # until it sleeps, as what it reads never comes
        state = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0]
        waited = waited + 1 if state == "S" else 0
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=30)
    os.close(writer)
    assert child.returncode == 130 and err == "align: Interrupted.\n"


def test_a_defect_shows_its_traceback_and_ends_with_1(tmp_path: Path):
    (tmp_path / "rewards").mkdir()
    (tmp_path / "rewards" / "__init__.py").write_text("raise RuntimeError('a defect')\n")
    child = process("-m", "align.cli", "rewards", path=tmp_path, cwd=tmp_path)
    _, err = child.communicate(timeout=30)
    assert child.returncode == 1 and "Traceback" in err and "a defect" in err


def test_bad_input_has_no_traceback():
    child = process("-m", "align.cli", "train", "digits/smoke", "group_size=1")
    _, err = child.communicate(timeout=30)
    assert child.returncode == 2 and "Traceback" not in err and err.startswith("align: ")


def test_a_closed_pipe_is_no_error():
    child = process("-m", "align.cli", "configs", "show", "digits/dance_grpo")
    child.stdout.close()
    err = child.stderr.read()
    assert child.wait(timeout=30) == 0 and err == ""


# --- the documentation ------------------------------------------------------------------------------


def test_docs_name_every_verb_flag_and_config_field():
    from align.config import DanceGRPOConfig
    from align.config_errors import described_keys

    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    for verb in _VERBS:
        assert f"`align {verb}" in text
    for key, description in described_keys(DanceGRPOConfig):
        if f"`{key}" not in text:
            assert any(other.startswith(f"{key}.") for other, _ in described_keys(DanceGRPOConfig)), key
        elif f"\n| `{key}` |" in text:
            assert f"| {description} |" in text, key


def test_stable_names_can_be_imported():
    import importlib
    import re

    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    found = re.findall(r"^from (\S+) import (.+)$", text, flags=re.MULTILINE)
    assert len(found) > 8
    for module, names in found:
        for name in names.split(", "):
            assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


@pytest.mark.parametrize(
    ("engine", "said"),
    [("single", "`align resume '{0}'` goes on"), ("data_parallel", "the same command"), ("deepspeed_zero1", "--nproc")],
)
def test_a_stopped_run_says_a_command_that_goes_on(tmp_path: Path, engine: str, said: str):
    folder = tmp_path / "my run"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"engine": engine}))
    assert said.format(folder) in goes_on(folder)
