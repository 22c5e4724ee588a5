"""Every fenced block of README.md and docs/ is run, or held to what it claims; docs/extending.md says how one is marked.

`slow` runs what stands there, `soak` also what takes its time. Without either, what takes long is a dry run.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil

import pytest
import torch
from safetensors.torch import save_file

from align.cli import _VERBS, _parser
from rewards import REWARDS
from tests.docs.blocks import LANGUAGES, PAGES, ROOT, Block, Wrong, page_blocks, read_blocks
from tests.docs.prepared import prepare
from tests.docs.running import LAUNCHERS, Session, call, require_launch, statements

NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
MODELS = "models", "my-model", "my-reward-model", "my-adapters"


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("docs") / "prepared")


@pytest.fixture
def here(prepared, tmp_path, monkeypatch):
    """A copy of the prepared folder to stand in; what a page registers goes with it."""
    known, place = dict(REWARDS._entries), tmp_path / "here"
    shutil.copytree(prepared, place)
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(place)
    yield place
    REWARDS._entries.clear()
    REWARDS._entries.update(known)


def read_page(page, here, **how):
    """Go through a page from its top to its end."""
    own = here / "pages" / (ROOT / page).stem
    if own.is_dir():
        shutil.copytree(own, here, dirs_exist_ok=True)
    session, section = Session(**how), 0
    headings = [n for n, line in enumerate((ROOT / page).read_text().splitlines(), 1) if line.startswith("## ")]
    for block in page_blocks(ROOT / page):
        if page == "docs/walks.md" and section != (section := sum(n < block.line for n in headings)):
            empty(here)
        session.run(block)


def empty(here):
    """Leave what a walk cannot make in seconds: models, and runs on them."""
    for path in here.iterdir():
        if path.name not in ("models", "my-model", "runs"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize("page", NAMES)
def test_every_block_of_a_page_resolves(page, here):
    read_page(page, here, dry=True)


@pytest.mark.slow
@pytest.mark.parametrize("page", NAMES)
def test_every_block_of_a_page_runs_as_it_is_written(page, here):
    read_page(page, here)


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("page", NAMES)
def test_what_takes_its_time_runs_as_it_is_written(page, here):
    read_page(page, here, patient=True)


@pytest.mark.slow
def test_launchers_take_their_flags():
    lines = [
        (block, shlex.split(line, comments=True))
        for page in PAGES for block in page_blocks(page) if block.language == "bash" and not block.text.startswith("#!")
        for line in statements(block.text) if line.split()[0] in LAUNCHERS
    ]  # fmt: skip
    assert {words[0] for _, words in lines} == LAUNCHERS
    for block, words in lines:
        require_launch(block, words)
    with pytest.raises(SystemExit):
        require_launch(lines[0][0], [lines[0][1][0], "--no_such_flag", *lines[0][1][1:]])


# --- nothing is left out


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_no_command_stands_outside_of_a_block(page):
    text = page.read_text(encoding="utf-8")
    blocks = page_blocks(page)
    assert len(re.findall(r"^\s*(?:```|~~~)", text, re.M)) == 2 * len(blocks)
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M).splitlines()
    assert [line for line in outside if re.match(r"(?: {4}|\$ ?|> ?)*(?:align|python|pip|make) \S", line)] == []
    assert {block.language for block in blocks} <= LANGUAGES


def anchors(page):
    """Return what links may end on: headings in small letters, without punctuation, spaces as hyphens, repeats numbered."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ (.*)$", text, re.M):
        name = re.sub(r"[^\w\- ]", "", re.sub(r"\]\([^)]*\)", "", heading).lower()).strip().replace(" ", "-")
        found[name] = found.get(name, -1) + 1
    return set(found) | {f"{name}-{i}" for name, most in found.items() for i in range(1, most + 1)}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page):
    prose = re.sub(r"^```.*?^```$|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if not target.startswith(("http://", "https://")):
            path, _, anchor = target.partition("#")
            led = (page.parent / path).resolve() if path else page
            assert led.exists(), target
            assert not anchor or anchor in anchors(led), target


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_verbs_that_prose_names_exist(page):
    said = re.findall(r"(?<!`)`align ([a-z][a-z-]*)(?: ([a-z][a-z-]*))?", page.read_text(encoding="utf-8"))
    known = leaves(_parser())
    for verb, action in said:
        assert verb in _VERBS, verb
        if verb in ("feedback", "sparsity") and action:
            assert f"{verb} {action}" in known, action


@pytest.mark.parametrize(("text", "why"), [
    ("```\nalign check my.yaml\n```\n", "and not ''"),
    ("```sh\nalign check my.yaml\n```\n", "and not 'sh'"),
    ("```bash needs: luck\nalign demo\n```\n", "and not luck"),
    ("```bash slow\nalign demo\n```\n", "and not 'slow'"),
    ("```yaml needs: gpu\nseed: 1\n```\n", "has no 'needs'"),
    ("```bash\nalign demo\n", "does not end"),
    ("- see\n      ```bash\n      align demo\n      ```\n", "beginning of its line"),
])  # fmt: skip
def test_a_fence_that_says_nothing_is_refused(text, why):
    with pytest.raises(Wrong, match=re.escape(why)):
        list(read_blocks(text, "page.md"))


def test_what_a_fence_says():
    text = "a\n```bash needs: weights, gpu\nalign demo\n```\n~~~yaml over: digits/nft file: a/b.yaml\nseed: 1\n~~~\n"
    assert list(read_blocks(text, "p.md")) == [
        Block("p.md", 2, "bash", "align demo\n", ("weights", "gpu")),
        Block("p.md", 5, "yaml", "seed: 1\n", (), "digits/nft", "a/b.yaml"),
    ]


def test_statements_of_a_block():
    text = "# first\nalign a \\\n  b   # more\n\ncat > f <<'END'\n# kept\nEND\nmkdir x && cd x\n"
    assert statements(text) == ["align a    b   # more", "cat > f <<'END'\n# kept\nEND\n", "mkdir x && cd x"]


# --- what is wrong is found


@pytest.mark.parametrize(("language", "text", "why"), [
    ("bash", "align train my.yaml --outt runs/x", "no flag '--outt'"),
    ("bash", "align trane my.yaml", "Unknown verb 'trane'"),
    ("bash", "align check nothing.yaml", "exit code 2"),
    ("bash", "align train my.yaml sampler.etta=0.2", "etta"),
    ("bash", "align train my.yaml prompts.path=nothing.txt", "no such file"),
    ("bash", "align train my.yaml rewards.0.name=hpsv9", "Unknown reward 'hpsv9'"),
    ("bash", "align train my.yaml \\\n  rewards.0.args.weightz=1", "no argument 'weightz'"),
    ("bash", "echo a > b && align check nothing.txt", "exit code 2"),
    ("bash", "wget align", "nobody runs 'wget'"),
    ("bash", "make dmeo", "dmeo"),
    ("bash", "pip install 'align[moon]'", "installs nothing"),
    ("bash", "python scripts/bench_guards.py --pears 40", "pears"),
    ("bash", "python scripts/no_such.py", "there is no"),
    ("bash", "python -m pytest tests/no_such.py", "there is no"),
    ("bash", "torchrun --nproc_per_node 8 scripts/train.py nothing.yaml", "exit code 2"),
    ("bash", "torchrun --nproc_per_node 8 train.py my.yaml", "starts nothing"),
    ("bash", "#!/bin/bash\nsrun bash -c \"torchrun -m align.cli train nothing.yaml\"", "exit code 2"),
    ("bash", "cat nothing", "nothing"),
    ("python", "from align import nothing", "ImportError"),
    ("python", "from align import load_config\nload_config('a', overides=[])", "TypeError"),
    ("python", "import align.config\nalign.config.nothing()", "AttributeError"),
    ("python", "x = (", "SyntaxError"),
    ("yaml", "extends: digits/smoke\nsampler: {etta: 1}", "etta"),
    ("yaml", "rewards: [{name: hpsv9}]", "hpsv9"),
    ("json", "{a}", "JSONDecodeError"),
    ("ini", "[options.entry_points]\nalign.reward =\n  a = b:C", "nobody reads"),
    ("html", "<script src=/static/align-feedback.js></script><script>feedback.applaud(1)</script>", "no applaud"),
])  # fmt: skip
def test_a_block_that_is_wrong_fails(language, text, why, here):
    with pytest.raises(Wrong, match=re.escape(why)):
        Session(dry=True).run(
            Block("p.md", 1, language, text + "\n", ("gpu",) if language in ("bash", "python") else ())
        )


def test_a_block_without_a_marker_is_run(here):
    Session().run(Block("p.md", 1, "bash", "echo 'a red fox' > made.txt && align check made.txt\n"))
    assert (here / "made.txt").read_text() == "a red fox\n"
    with pytest.raises(Wrong, match="ZeroDivisionError|division"):
        Session().run(Block("p.md", 1, "python", "1 / 0\n"))
    Session().run(Block("p.md", 1, "python", "1 / 0\n", ("weights",)))


# --- dry runs


def leaves(parser, name="") -> dict[str, argparse.ArgumentParser]:
    """Return the parser of every verb, `feedback serve` one of them."""
    subs = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    found = {} if subs else {name: parser}
    for sub in subs:
        for word, inner in sub.choices.items():
            found |= leaves(inner, f"{name} {word}".strip())
    return found


def test_every_verb_that_trains_or_loads_weights_has_a_dry_run():
    without = {name for name, parser in leaves(_parser()).items() if "--dry-run" not in parser._option_string_actions}
    assert without == {
        "check",
        "configs list",
        "configs show",
        "configs from-trl",
        "rewards list",
        "rewards describe",
        "feedback export",
        "feedback convert",
        "feedback stats",
        "feedback agreement",
        "feedback consistency",
        "feedback winrate",
        "feedback audit",
    }  # fmt: skip  (all read, and two of them write rows)


DRY = """\
train mine.yaml --out runs/new
train my_kto.yaml --launch torchrun --nproc 2 --out runs/new
train my_images.yaml data.path=thumbs.parquet data.root=task_folder
resume runs/flux
resume runs/kto
fit my_fit.yaml --out runs/new
peering peering/simulated
sample runs/flux --prompts prompts.txt
sample my-model --prompt a --chat
evaluate models/flux --prompts prompts.txt --reward pickscore --height 16 --width 16
evaluate runs/kto --data more_thumbs.jsonl --config rewards.yaml
evaluate runs/fit_thumbs
evaluate --reward pickscore --data images.db --images task_folder
export runs/flux --to diffusers-lora --out lora
score --reward hpsv2.1 --prompts prompts.txt --images made
select models/flux --prompts prompts.txt --reward hpsv2.1
select completions.jsonl --config rewards.yaml
rewards serve --reward hpsv3
plan mine.yaml --measure
feedback annotate feedback.db --task rating --model my-model
feedback match-prompts thumbs.jsonl --out matched.jsonl --model my-model
"""


def test_dry_runs_stop_before_weights_are_loaded(here):
    weights = [path for name in MODELS for path in (here / name).rglob("*.safetensors")]
    assert len(weights) > 10
    for path in weights:
        save_file({"of_another_model": torch.zeros(1)}, path)
    for line in DRY.splitlines():
        code, out, err = call([*line.split(), "--dry-run"])
        assert code == 0, f"{line}\n{out}{err}"
    assert (
        not (here / "runs" / "new").exists() and not (here / "lora").exists() and not (here / "matched.jsonl").exists()
    )


@pytest.mark.parametrize(("words", "why"), [
    ("train my_kto.yaml data.path=nothing.jsonl", "no such data file"),
    ("train my_kto.yaml --launch torchrun --nproc 7", "does not divide"),
    ("train mine.yaml model.path=nothing/at/all", "no diffusers pipeline folder"),
    ("train mine.yaml --deepspeed zero2", "needs a launcher"),
    ("train my_kto.yaml --out runs/flux", "another configuration"),
    ("resume nothing", "not a run folder"),
    ("fit my_fit.yaml data.paths.0=nothing.db", "no such feedback"),
    ("fit my_fit.yaml --launch torchrun", "one process"),
    ("sample nothing", "no such run, model"),
    ("sample runs/nothing", "no such run, model"),
    ("evaluate runs/flux --reward hpsv9", "Unknown reward"),
    ("evaluate runs/kto --data nothing.jsonl", "no such data file"),
    ("evaluate --reward pickscore --data nothing.jsonl", "no such"),
    ("score --reward hpsv9 --prompts prompts.txt --images made", "Unknown reward"),
    ("select models/flux --prompts nothing.txt --reward jpeg", "no such file"),
    ("select models/flux --prompts prompts.txt --reward hpsv9", "Unknown reward"),
    ("rewards serve", "nothing to serve"),
    ("rewards serve --reward hpsv9", "Unknown reward"),
    ("plan mine.yaml group_size=1", "group"),
    ("feedback report nothing.db", "no such feedback store"),
])  # fmt: skip
def test_dry_runs_refuse_what_the_run_would_refuse(words, why, here):
    code, _, err = call([*words.split(), "--dry-run"])
    assert code == 2 and why in err, err
