"""What docs/walks.md calls planned is what `align plan` says today, number by number."""

from __future__ import annotations

import re

import pytest

from align.commands.plan import make_plan
from align.config import load_config
from align.ledger import feq_ledger
from tests.docs.blocks import ROOT, page_blocks
from tests.docs.running import _shell

PAGE = ROOT / "docs" / "walks.md"


def gb(plan: dict, engine: str, processes: int) -> str:
    (row,) = [row for row in plan["engines"] if (row["engine"], row["processes"]) == (engine, processes)]
    return f"{row['peak_gb']:.3g}"


def part(plan: dict, name: str, engine: str = "data_parallel") -> str:
    row = next(row for row in plan["engines"] if row["engine"] == engine)
    return f"{row['parts_gb'][name]:.3g} GB"


def millions(count: float) -> str:
    return f"{count / 1e6:.3g}"


def diffusion(source: str, plan: dict, cost: str) -> list[str]:
    """The phrases that all walks of images and videos share."""
    config = load_config(source)
    ledger, total = feq_ledger(config), millions(config.steps * plan["feq_a_step"])
    said = cost.format(*(f"{ledger[key]:g}" for key in ("feq_per_sample", "rollout_forwards", "train_forwards", "k")))
    return [
        f"{config.steps} steps of {ledger['samples_per_step']} ",
        said,
        f"in all {total} million|{total} million in all",
    ]


def sd(source: str, plan: dict) -> list[str]:
    cost = "{} F_eq = {} forwards of the rollout (%d steps, twice for guidance) and {} trained ones at {},"
    return [*diffusion(source, plan, cost % load_config(source).sampler.solver_steps),
            f"{gb(plan, 'data_parallel', 8)} GB at the peak on each of 8",
            f"{gb(plan, 'single', 1)} GB on one", f"watching take {part(plan, 'rewards')}"]  # fmt: skip


def flux(source: str, plan: dict) -> list[str]:
    assert gb(plan, "single", 1) == gb(plan, "data_parallel", 8)
    return [*diffusion(source, plan, "{} F_eq a sample = {} + {} trained at {};"),
            f"{gb(plan, 'single', 1)} GB at the peak, on one as on each of 8",
            f"{part(plan, 'frozen weights')} are frozen", f"{part(plan, 'encoders')} text encoders"]  # fmt: skip


def hunyuan(source: str, plan: dict) -> list[str]:
    config, one = load_config(source), make_plan(source, ["batch.tile=1"])
    return [*diffusion(source, plan, "{} F_eq a video = {} + {} x {};"),
            f"videos of {config.sampler.frames} frames, of which the best and worst {config.advantage.best_of // 2} of "
            f"{config.group_size} are", f"{gb(plan, 'single', 1)} GB at the peak with three rows",
            f"{gb(one, 'single', 1)} with one", f"rewards take {part(plan, 'rewards')}"]  # fmt: skip


def llama(source: str, plan: dict) -> list[str]:
    kto, config = make_plan("kto/llama3_1_8b_helpsteer2"), load_config(source)
    eight, four = ({e: gb(plan, e, n) for e in ("zero1", "zero2", "zero3")} for n in (8, 4))
    return [f"{plan['feq_a_row']:g} F_eq under BCO", f"{kto['feq_a_row']:g} under KTO", f"{config.batch_size} rows",
            f"{config.data.max_length:,} tokens", f"{eight['zero1']} GB under ZeRO 1, {eight['zero2']} under ZeRO 2, "
            f"{eight['zero3']} under ZeRO 3; on 4 it is {four['zero2']} and {four['zero3']} under ZeRO 2 and 3",
            "the peak on each of 8"]  # fmt: skip


WALKS = {
    "SD 1.4, HPS": ("stable_diffusion/hps", sd),
    "FLUX, HPS and CLIP": ("flux/hps_clip_lora", flux),
    "HunyuanVideo, VideoAlign": ("hunyuan_videoalign.yaml", hunyuan),
    "Llama 3.1 8B, BCO and KTO": ("bco/llama3_1_8b_helpsteer2", llama),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(WALKS))
def test_what_is_planned_is_what_the_plan_says(name, tmp_path, monkeypatch):
    """Every number of "Cost, planned" is in a phrase made of the plan, and so are the cells of the table."""
    monkeypatch.chdir(tmp_path)
    for block in page_blocks(PAGE):
        if "hunyuan_videoalign.yaml <<" in block.text:
            _shell(block, block.text)
    for path in ("prompts.txt", "helpsteer2.jsonl"):
        (tmp_path / path).write_text('{"prompt": "a", "completion": "b", "label": true}\n' * 2)
    source, phrases = WALKS[name]
    plan = make_plan(source)
    text = PAGE.read_text()
    anchor, trains, where, feq = re.search(
        rf"^\| \[{name}\]\(#(.*)\) \| (.*) \| (.*) \| (.*) \| .* \|$", text, re.M
    ).groups()
    section = next(
        s for s in text.split("\n## ") if anchor == re.sub(r"[^\w ]", "", s.split("\n")[0].lower()).replace(" ", "-")
    )
    rest = " ".join(re.search(r"\*\*Cost, planned\.\*\*(.*?)\*\*Claimed", section, re.S)[1].split())
    for phrase in phrases(source, plan):
        found = re.search("|".join(map(re.escape, phrase.split("|"))), rest)
        assert found, (phrase, rest)
        rest = rest[: found.start()] + "#" + rest[found.end() :]
    assert not re.findall(r"\d[\d.,]*\d|\d", rest), rest

    size = f"{plan['trained'] / 1e9:.3g} B" if plan["trained"] > 1e9 else f"{millions(plan['trained'])} M"
    assert size in trains and ("adapters" in trains) == (plan["train"] == "lora")
    least, memory = re.match(r"(\d+) of (\d+) GB, or 8", where).groups()
    fits = {row["processes"] for row in plan["engines"] if row["peak_gb"] <= int(memory)}
    assert min(fits) == int(least) and 8 in fits
    rows = [plan["feq_a_step"]] + ([make_plan("kto/llama3_1_8b_helpsteer2")["feq_a_step"]] if "BCO" in name else [])
    assert feq == " and ".join(f"{f:,.0f}" for f in rows)
