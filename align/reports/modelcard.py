"""The card of an exported model, and of a sparse delta: a README.md with the front matter that model hubs read.

Made of the export's record and of the files of its run, and of nothing else: what they do not say is said to be
missing. Text that others wrote (paths, names, prompts) is set as code or escaped, so that it is shown and never acts.
Prompts, rows and answers of the run are not copied: they may be people's.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from align.checks import named_rewards
from align.config import load_config
from align.published import is_builtin, is_embedded, is_hub_name, is_ours, licence_of
from align.reports.markdown import code, front_matter, made_by, plain
from align.reports.page import open_sheet
from align.reports.runfiles import RunFiles, read_run
from align.reports.training import verdict_of
from align.tracking import replace_text
from align.weights import file_sha256
from rewards.base import list_rewards

CARD, CONFIG, PICTURE = "README.md", "align_config.yaml", "before_after.png"
GRID = (4, 4)
"""Rows and columns of each half of the picture."""

FOLDER = 'folder = "."  # of this card'

HUB_LICENCES = ("apache-2.0", "mit", "cc-by-4.0", "creativeml-openrail-m", "openrail++", "openrail", "llama3.1")
"""Licences that have a name of their own on the hub; all others are `other` there, with a name beside."""


def write_card(folder: Path, record: Mapping[str, Any]) -> None:
    """Write README.md, the run's configuration and, of images, a picture into the folder of an export.

    Args:
        folder: holds the exported weights.
        record: of the export, see `align.exporting.describe_export`.

    Raises:
        ConfigError: a run folder that cannot be read.
    """
    run = Path(record["run"]["folder"])
    files = replace(read_run(run), generations=[])
    shutil.copyfile(run / "config.yaml", folder / CONFIG)
    steps = _picture(run, record["run"]["step"], folder / PICTURE)
    replace_text(folder / CARD, model_card(record, files, steps))


def model_card(record: Mapping[str, Any], files: RunFiles, picture: tuple[int, int] | None) -> str:
    """Return the text of the card.

    Args:
        record: of the export.
        files: of its run.
        picture: the two steps that stand side by side in `before_after.png`, if there is one.
    """
    config = load_config(files.directory / "config.yaml")
    name, step = record["run"]["name"], record["run"]["step"]
    said = "\n".join(
        [
            _front(record) + f"# {plain(name)}, step {step}", "", _opening(record), "",
            "## Use", "", *_use(record, config), "",
            "## What changed", "", *_changed(record, files, picture), "",
            "## What it was made of", "", *_made(record, files, config), "",
            "## What is not known", "", *_limits(record, files),
        ]
    )  # fmt: skip
    return said + "\n"


def write_delta_card(path: Path, base: str, tuned: str, found: Mapping[str, Any]) -> Path:
    """Write the card of a sparse delta beside it, as PATH.md, and return where it is.

    Args:
        path: of the delta.
        base, tuned: as they were given.
        found: what `align.sparsity.delta.write_delta` returned.
    """
    licence = licence_of(base, base)
    front = front_matter({**_front_licence(licence), "tags": ["align", "sparse-delta"]})
    apply = f"apply_delta({Path(base).resolve().name!r}, {path.name!r}, out='applied')"
    size = f"{found['bytes'] / 1e6:,.1f} MB, {found['ratio']:.1f} times smaller than all weights"
    said = [
        f"{front}# {plain(Path(tuned).resolve().name)}, as a delta", "",
        f"What turns {code(base)} into {code(tuned)}, bit for bit: {found['changed']:,} weights that changed, in "
        f"{size}. It is no model by itself.", "",
        "## Use", "", "```python", "from align.sparsity.delta import apply_delta", "", apply, "```", "",
        "It needs align and the base model. Another base is refused, and so is a tensor that comes out with another "
        f"hash. {code(f'align sparsity apply BASE {path.name} --out applied')} does the same.", "",
        "## What it was made of", "",
        f"- Base: {code(base)}. Tuned: {code(tuned)}. The file holds the sha256 of every tensor of both.",
        f"- Licence of the base model: {_licence(licence)}.",
        f"- File: {code(path.name)}, sha256 {code(file_sha256(path))}, compressed by {code(found['codec'])}.", "",
        "## What is not known", "",
        "- How the tuned model was trained, on what, and whether it is better: a delta knows weights alone.",
        "- What rounding alone would have left unchanged: `align sparsity report` says it of the two models.",
        "- Whether the licence and terms of the base allow to share this: they hold for it.",
    ]  # fmt: skip
    card = path.with_name(f"{path.name}.md")
    replace_text(card, "\n".join(said) + "\n")
    return card


def _front_licence(said: Mapping[str, str]) -> dict[str, Any]:
    licence = said.get("licence", "")
    known = licence in HUB_LICENCES or licence == "other"
    found = {"license": licence if known else "other" if licence else "unknown"}
    if licence and licence not in HUB_LICENCES:
        found["license_name"] = said.get("name", licence)
    return {**found, "license_link": said["link"]} if "link" in said else found


def _front(record: Mapping[str, Any]) -> str:
    """Return the YAML front matter; what is not known is left out."""
    base, trained, lora = record["base"], record["trained"], record["trained"]["train"] == "lora"
    found = _front_licence(base["licence"])
    if is_hub_name(base["model"]):
        found["base_model"] = base["model"]
        found["base_model_relation"] = "adapter" if lora and record["to"] != "full" else "finetune"
    if library := _library(record):
        found["library_name"] = library
    found["pipeline_tag"] = _task(base)
    tags = ["align", trained["trainer"], *(["lora"] if lora and record["to"] != "full" else []), record["to"]]
    found["tags"] = list(dict.fromkeys(tags))
    return front_matter(found)


def _library(record: Mapping[str, Any]) -> str:
    if record["to"] == "full":
        return "transformers" if record["base"]["makes"] == "text" else "diffusers"
    return {"peft": "peft", "diffusers-lora": "diffusers"}.get(record["to"], "")


def _task(base: Mapping[str, Any]) -> str:
    if base["makes"] == "text":
        return "image-text-to-text" if base["takes_image"] else "text-generation"
    return f"image-to-{base['makes']}" if base["takes_image"] else f"text-to-{base['makes']}"


def _opening(record: Mapping[str, Any]) -> str:
    base, trained = record["base"], record["trained"]
    what = "A whole model" if record["to"] == "full" else "LoRA adapters"
    merged = ", adapters merged into it" if record["to"] == "full" and trained["train"] == "lora" else ""
    return (
        f"{what}{merged}, trained from {code(_named(base['model']))} with {code(trained['trainer'])} of align. "
        f"The layout is {code(record['to'])}, the weights are {record['dtype']}."
    )


def _named(path: str) -> str:
    """Return what a file or folder is called; where it lies is this machine's."""
    return Path(path).name if Path(path).is_absolute() else path


# --- how it is loaded -------------------------------------------------------------------------------


def _use(record: Mapping[str, Any], config: Any) -> list[str]:
    if record["to"] == "comfyui":
        return [f"{record['load'][0].upper()}{record['load'][1:]}. {plain(record['note'])}."]
    lines = _text_snippet(record) if record["base"]["makes"] == "text" else _media_snippet(record, config)
    return [*_needs(record), "```python", *lines, "```"]


def _needs(record: Mapping[str, Any]) -> list[str]:
    """Say of adapters of an embedded model that nobody but align has what they belong to."""
    model = record["base"]["model"]
    if record["to"] == "full" or not is_embedded(model):
        return []
    extra = "llm" if record["base"]["makes"] == "text" else "diffusion"
    install, whole = code(f"pip install 'align[{extra}]'"), code("align export RUN --to full --out FOLDER")
    return [
        f"These are adapters of {code(model)}, which nobody can download: align builds it, on first use. So these "
        f"lines need align: {install}. What {whole} writes loads without it.", "",
    ]  # fmt: skip


def _base(model: str) -> tuple[list[str], str]:
    """Return imports, and the expression of the base model: a name of ours stands for a folder that is built."""
    if model == "tiny":
        return ["from trainers.tiny_language import tiny_model"], "tiny_model()"
    if is_builtin(model):
        return ["from align.diffusion.policy import resolve_model"], f"resolve_model({model!r})"
    return [], repr(model)


def _media_snippet(record: Mapping[str, Any], config: Any) -> list[str]:
    base, pipeline, to = record["base"], record["base"]["pipeline"], record["to"]
    imports, name = _base(base["model"])
    absent = "".join(f", {part}=None" for part in base["absent"])
    first = ["import torch", f"from diffusers import {pipeline}"]
    video = base["makes"] == "video"
    first += ["from diffusers.utils import load_image"] if base["takes_image"] else []
    first += ["from diffusers.utils import export_to_video"] if video else []
    first += ["from peft import PeftModel"] if to == "peft" else []
    lines = [*first, *(imports if to != "full" else []), "", FOLDER]
    kind = "bfloat16" if record["dtype"] == "bf16" else "float32"
    where = "folder" if to == "full" else "base"
    lines += [] if to == "full" else [f"base = {name}"]
    lines += [f"pipeline = {pipeline}.from_pretrained({where}, dtype=torch.{kind}{absent})"]
    if to == "diffusers-lora":
        lines += ['pipeline.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors")']
    elif to == "peft":
        part = f"pipeline.{base['component']}"
        lines += [f"{part} = PeftModel.from_pretrained({part}, folder).get_base_model()"]
    sampler, scale = config.sampler, config.evaluation.guidance_scale
    how: dict[str, Any] = {
        "num_inference_steps": config.evaluation.solver_steps, base["guidance"]: scale, "height": sampler.height,
        "width": sampler.width, "num_frames": sampler.frames,
    }  # fmt: skip
    if base["guidance"] != "guidance_scale":
        how |= {"guidance_scale": sampler.embedded_guidance, "negative_prompt": '""' if scale > 1 else None}
    given = "".join(f", {key}={value}" for key, value in how.items() if value is not None)
    image = 'image=load_image("first_frame.png"), ' if base["takes_image"] else ""
    lines += [_example(record)]
    lines += [f"made = pipeline({image}prompt=prompt{given}, generator=torch.Generator().manual_seed(0))"]
    fps = getattr(sampler, "fps", None) or base["fps"]
    save = f'export_to_video(made.frames[0], "made.mp4", fps={fps:g})' if video else 'made.images[0].save("made.png")'
    return [*lines, save]


def _example(record: Mapping[str, Any]) -> str:
    """Return a prompt: the first of the run where the prompts are ours; those of others are not told, and replaced."""
    if is_builtin(record["base"]["model"]) or is_ours(record["trained"]["data"]):
        from align.diffusion.digits_data import digit_prompts

        return f'prompt = "{digit_prompts()[0]}"'
    return 'prompt = "a cat"  # or what you would ask for: the prompts of the run are not told here'


def _text_snippet(record: Mapping[str, Any]) -> list[str]:
    peft, sees = record["to"] == "peft", record["base"]["takes_image"]
    kind = f"dtype=torch.{'bfloat16' if record['dtype'] == 'bf16' else 'float32'}"
    reader = "AutoProcessor" if sees else "AutoTokenizer"
    model = "AutoModelForImageTextToText" if sees else "AutoModelForCausalLM"
    needed, base = _base(record["base"]["model"]) if peft else ([], "folder")
    if peft and not sees and not needed:
        imports = ["from peft import AutoPeftModelForCausalLM", f"from transformers import {reader}"]
        load = [f"model = AutoPeftModelForCausalLM.from_pretrained(folder, {kind})"]
    else:
        imports = [*(["from peft import PeftModel"] if peft else []), *needed]
        imports += [f"from transformers import {model}, {reader}"]
        load = [f"model = {model}.from_pretrained({base}, {kind})"]
        load += ["model = PeftModel.from_pretrained(model, folder)"] if peft else []
    return [
        "import torch", *imports, "", FOLDER, *load, f"reader = {reader}.from_pretrained(folder)",
        'inputs = reader(text="Once upon a time", return_tensors="pt")',
        "answer = model.generate(**inputs, max_new_tokens=32)",
        "print(reader.decode(answer[0], skip_special_tokens=True))",
    ]  # fmt: skip


# --- what changed -----------------------------------------------------------------------------------


def _changed(record: Mapping[str, Any], files: RunFiles, picture: tuple[int, int] | None) -> list[str]:
    step, found = record["run"]["step"], verdict_of(files)
    lines = [f"**{plain(found.title)}.** {plain(found.sentence)}"]
    measured = max((row["step"] for row in files.evaluations), default=None)
    if measured is not None and measured != step:
        lines += ["", f"The last evaluation is of step {measured}; these are the weights of step {step}."]
    lines += ["", *(f"- {plain(caveat)}" for caveat in found.caveats)] if found.caveats else []
    if picture is not None:
        before, after = picture
        lines += [
            "", f"![Step {before} at the left, step {after} at the right]({PICTURE})", "",
            f"The same prompts and noises at step {before} (left) and step {after} (right); none was picked.",
        ]  # fmt: skip
    moved = files.summary.get("sparsity") if isinstance(files.summary.get("sparsity"), dict) else {}
    lines += ["", f"Weights: {plain((moved.get('sentence') or 'Which of them moved was not measured').rstrip('.'))}."]
    last = files.summary.get("steps")
    lines += [f"That is of step {last}."] if moved and isinstance(last, int) and last != step else []
    return [*lines, "", plain(found.cost)] if found.cost else lines


def _picture(run: Path, step: int, path: Path) -> tuple[int, int] | None:
    """Write the first contact sheet beside the last up to `step`, and return their steps; None of fewer than two."""
    from PIL import Image

    found = {int(match[1]): p for p in (run / "samples").glob("step_*.png")
             if (match := re.fullmatch(r"step_(\d+)\.png", p.name))}  # fmt: skip
    steps = sorted(s for s in found if s <= step)
    ends = [open_sheet(found[s]) for s in (steps[:1] + steps[-1:] if len(steps) > 1 else ())]
    if not ends or None in ends:
        return None
    halves = [_cut(image, geometry) for image, geometry in ends]
    gap, height = 12, max(half.height for half in halves)
    whole = Image.new("RGB", (sum(half.width for half in halves) + gap, height), "white")
    whole.paste(halves[0], (0, 0))
    whole.paste(halves[1], (halves[0].width + gap, 0))
    whole.thumbnail((1200, 1200))
    whole.save(path)
    return steps[0], steps[-1]


def _cut(image: Any, geometry: Mapping[str, int]) -> Any:
    """Return the first rows and columns of a contact sheet."""
    rows, columns = (geometry.get(key) or 1 for key in ("rows", "columns"))
    width, height = image.width * min(columns, GRID[1]) // columns, image.height * min(rows, GRID[0]) // rows
    return image.crop((0, 0, width, height))


# --- what it was made of ----------------------------------------------------------------------------


def _made(record: Mapping[str, Any], files: RunFiles, config: Any) -> list[str]:
    base, run, trained = record["base"], record["run"], record["trained"]
    scale = ""
    if "rank" in trained:
        scale = f", rank {trained['rank']}, alpha {trained['alpha']:g}, on {trained['layers']} layers"
    kind = f", a {base['pipeline']}, of which {code(base['component'])} was trained" if "pipeline" in base else ""
    loss = getattr(getattr(config, "objective", None), "loss", None)
    objective = f", objective {code(loss)}" if loss else ""
    return [
        f"- Base model: {code(_named(base['model']))}{kind}; sha256 of its weights {code(base['sha256'])}.",
        f"- Licence of the base model: {_licence(base['licence'])}.",
        f"- Training: {code(trained['trainer'])}{objective}, {trained['train']}{scale}; step {run['step']} of "
        f"{files.record.get('steps_planned', 'an unknown number')}, seed {trained['seed']}, "
        f"engine {code(files.record.get('engine', 'not recorded'))}, "
        f"processes {files.record.get('processes', 'not recorded')}.",
        *(_language(files, config) if base["makes"] == "text" else ()),
        f"- Weights delivered: {run['weights']}; sha256 in the run {code(run['sha256'])}.",
        *made_by(files, CONFIG),
        f"- {code(f'align train {CONFIG}')} repeats the run where models, data and rewards lie at the same paths.",
        *_rewards_of(config, files, "rewards", "Rewards it was trained on"),
        *_rewards_of(config, files, "heldout_rewards", "Rewards that only measured it"),
        "", "Data:", "", *_data(trained, files), "", "Files:", "",
        *(f"- {code(name)}, sha256 {code(digest)}" for name, digest in record["files"].items()),
    ]  # fmt: skip


def _language(files: RunFiles, config: Any) -> list[str]:
    """Return what a run on texts recorded of its size, its rows and its learning rate."""
    model, rows = (found if isinstance(found := files.record.get(key), dict) else {} for key in ("model", "tokens"))
    trained = f"{model['trained_parameters']:,} of {model['parameters']:,}" if model.get("parameters") else ""
    rate, counts = config.optimizer, ""
    if {"rows", "up", "down", "heldout_rows"} <= rows.keys():
        sides = {"kto": ("up", "down"), "bco": ("up", "down"), "dpo": ("chosen", "rejected")}.get(config.trainer)
        labels = f" ({rows['up']:,} {sides[0]}, {rows['down']:,} {sides[1]})" if sides else ""
        left = ", ".join(f"{n:,} {plain(why)}" for why, n in (rows.get("dropped") or {}).items())
        counts = f"{rows['rows']:,} trained on{labels}, {rows['heldout_rows']:,} held out; left out: {left or 'none'}"
    return [
        f"- Trained parameters: {trained or 'not recorded'}.",
        f"- Rows: {counts or 'not recorded'}.",
        f"- Learning rate: {rate.lr:g} at its highest, schedule {rate.schedule}, over the first {rate.warmup:.0%} of "
        "steps rising from 0.",
    ]


def _licence(found: Mapping[str, str]) -> str:
    if not found:
        return "unknown: neither a README.md beside its weights nor align says it"
    link = f" ({code(found['link'])})" if "link" in found else ""
    named = f", {code(found['name'])}" if "name" in found else ""
    return f"{code(found['licence'])}{named}{link}, says {plain(found['said_by'])}"


def _rewards_of(config: Any, files: RunFiles, part: str, title: str) -> list[str]:
    """Return a list of rewards under its title; nothing for a trainer that takes none."""
    if not hasattr(config, part):
        return []
    return ["", f"{title}:", "", *_rewards(getattr(config, part), files.record.get(part))]


def _rewards(rewards: Any, recorded: Any) -> list[str]:
    """Return a line for each reward: what it is, of which licence, from which files."""
    cards = {card.name: card for card in list_rewards()}
    seen = dict(named_rewards(recorded)) if isinstance(recorded, (list, dict)) else {}
    lines = []
    for key, reward in named_rewards(rewards):
        card, row = cards.get(reward.name), seen.get(key) if isinstance(seen.get(key), dict) else {}
        line = f"- {code(reward.name)}" + (f" as {code(key)}" if isinstance(key, str) else "")
        line += f", weight {reward.weight:g}, {reward.role}"
        line += f", with {code(json.dumps(reward.args))}" if reward.args else ""
        line += f": {plain(card.definition if card else row.get('definition') or 'not described')}."
        line += f" Licence: {plain(card.licence) if card else 'not stated'}."
        weights = [f"{code(w.repo)} {code(w.file)}" for w in card.weights] if card else []
        line += f" Its weights: {'; '.join(weights)}." if weights else ""
        line += f" Source: {plain(card.source)}." if card and card.source else ""
        line += f" Identity {code(row['identity'])}." if row.get("identity") else ""
        lines.append(line + _fitted_to(reward))
    return lines or ["- none"]


def _fitted_to(reward: Any) -> str:
    """Return what a reward of `align fit` was fitted to."""
    if reward.name != "fitted":
        return ""
    from align.errors import ModelError
    from rewards.fitted import read_artefact

    try:
        hashes = read_artefact(str(reward.args.get("path", "")))[1]["card"]["data"]["hashes"]
    except (ModelError, KeyError, TypeError):
        return " What it was fitted to is no longer on this machine."
    return " Fitted to " + ", ".join(f"{code(name)}, sha256 {code(digest)}" for name, digest in hashes.items()) + "."


def _data(trained: Mapping[str, Any], files: RunFiles) -> list[str]:
    rows = [r for r in files.record.get("data_files") or () if isinstance(r, dict) and {"file", "sha256"} <= r.keys()]
    if not rows:
        why = "built into align" if is_ours(trained["data"]) else "its sha256 was not recorded"
        return [f"- {code(_named(trained['data']))}: {why}"]
    names = [row["file"] for row in rows]
    changed = " (it changed between sittings of the run)"
    return [
        f"- {code(_named(row['file']))}, sha256 {code(row['sha256'])}{changed if names.count(row['file']) > 1 else ''}"
        for row in rows
    ]


# --- what is not known ------------------------------------------------------------------------------


def _limits(record: Mapping[str, Any], files: RunFiles) -> Iterable[str]:
    base = record["base"]
    lines = [
        "Everything measured is on held-out prompts or rows of the data above. Other prompts, other people and other "
        "settings were not looked at.",
        "What the base model does wrong, this model may do too.",
        "The licences and terms of the base model, the rewards and the data hold for it; nobody checked that they go "
        "together.",
    ]
    if not base["licence"]:
        lines.append("The licence of the base model is unknown here: find it before you share this.")
    if not is_hub_name(base["model"]):
        lines.append("The base model is named by a folder or a name of align's, so no hub knows it as this one's base.")
    if base["makes"] != "text" and record["to"] != "comfyui":
        lines.append(
            "The lines under Use sample with the pipeline's own scheduler. The run measured with an ODE solver and "
            "a time shift of its own, so images of the same seed differ."
        )
    lines.append(f"{code(CONFIG)} holds whole paths, and arguments as they were given: read it before you share it.")
    if files.record.get("data_files"):
        lines.append("Hashes are of the data files themselves, not of images or other files that they name.")
        lines.append("Hubs are told no data sets: the data are files, which they do not know.")
    lines += [plain(note) for note in files.notes]
    lines.append("The run's `report.html` has all measurements, curves and warnings; it is not copied here.")
    return [f"- {line}" for line in lines]
