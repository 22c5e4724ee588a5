"""`align sample` and `align evaluate` for language models, a call each."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from align.config import RewardConfig, load_config
from align.errors import ConfigError
from align.feedback.events import content_id
from align.groupstats import bootstrap_mean
from align.language_config import LanguageConfig
from align.launch import World
from align.loops import LANGUAGE
from align.preferences import load_preferences
from align.tracking import RunLog, read_jsonl, replace_text
from rewards.panel import Panel
from trainers.language import read_data, tokenise_rows
from trainers.language_generation import Answer, Decoding, Prompt, answer, as_completion, as_given, as_samples
from trainers.language_measures import LanguageEvaluation, answer_metrics
from trainers.language_objective import Objective
from trainers.language_source import (
    BEFORE,
    LanguageSource,
    asked_of,
    decoding_of,
    find_language,
    open_language,
    prompts_of,
)
from trainers.preference_data import Tokens
from trainers.sources import Source

Progress = Callable[[int, int], Any]
"""Told how many answers are done, and of how many."""


def sample_completions(
    source: str | Path,
    prompts: str | Path | Sequence[str] | None = None,
    *,
    count: int = 1,
    chat: bool = False,
    base: bool = False,
    seed: int | None = None,
    temperature: float | None = None,
    top_p: float = 1.0,
    max_new_tokens: int | None = None,
    batch: int = 16,
    out: str | Path | None = None,
    resume: bool = False,
    progress: Progress = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Have a language model answer prompts, write one JSON line an answer to `out`, and return them.

    A row has prompt, completion, policy ("before", "step 40", or the folder), step, model, member, seed, temperature,
    top_p, tokens and ended. An answer depends on the seed, the prompt and its number alone, not on the others.

    Args:
        source: see `find_source`.
        prompts: a txt, JSONL, CSV or Parquet file, or texts; a run's or recipe's held-out prompts when None.
        count: answers a prompt.
        chat: texts are what a user says, through the chat template, rather than a beginning to go on from.
        base: also have the model before training answer.
        seed, temperature, max_new_tokens: the run's own when None; without a run 0, 1 and 128.
        top_p: see `Decoding`.
        batch: answers at once.
        out: the file; when None, completions.jsonl in the folder of a run, else here.
        resume: keep answers in `<out>.journal.jsonl` as they come, and go on with those that an earlier call of the
            same model, prompts and draws left there.
        progress: told how far it has come.
    """
    found = find_language(source)
    out = found.sampled if out is None else out
    given = asked_of(found, prompts, chat)
    opened = open_language(found)
    asked = prompts_of(opened, given)
    how = decoding_of(opened, seed, temperature, top_p, max_new_tokens)
    before = opened.models.reference
    if base and before is None:
        raise ConfigError(
            "The model before training is not known", where=opened.name, do="Give a run, a checkpoint or adapters"
        )
    turns: list[Any] = [(opened.policy, opened.step, contextlib.nullcontext(opened.models.plain))]
    if base and before is not None and opened.step != 0:
        turns.insert(0, (BEFORE, 0, before.model()))
    total = len(turns) * len(asked) * count
    journal = Path(f"{out}.journal.jsonl")
    said_to = [(p.key, p.tokens.tolist()) for p in asked]
    call = content_id(_state(found), said_to, vars(how), count, base)
    rows = _kept(journal, call, count) if resume else []
    at_once = max(1, ANSWERS_KEPT_AT_ONCE // count) if resume else len(asked)
    for turn, (policy, step, held) in enumerate(turns):
        first = len(rows) // count - turn * len(asked)
        with held as model:
            for start in range(first, len(asked), at_once):
                part = asked[start : start + at_once]
                said = answer(
                    model, part, opened.tokenizer, how, count=count, batch=batch, half=opened.half,
                    progress=lambda n, done=len(rows): progress(done + n, total),
                )  # fmt: skip
                new = [_row(opened, part[i // count], a, how, policy, step, i % count) for i, a in enumerate(said)]
                if resume:
                    _append_lines(journal, new)
                rows += new
    write_lines(out, rows)
    return rows


ANSWERS_KEPT_AT_ONCE = 256
"""Answers between two writes of a journal."""


def _state(found: Source) -> list[tuple[str, int, int]]:
    """Return the files of a model as they are now, so that one that was trained on is known as another."""
    folder = found.folder
    files = sorted(folder.iterdir()) if folder is not None and folder.is_dir() else []
    return [(found.name, 0, 0), *((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file())]


def _kept(journal: Path, call: str, count: int) -> list[dict[str, Any]]:
    """Return the answers of an earlier call, those of whole prompts, and leave the journal holding just them."""
    rows = read_jsonl(journal)[0] if journal.is_file() else []
    rows = rows[1:] if rows and rows[0].get("call") == call else []
    rows = rows[: len(rows) // count * count]
    write_lines(journal, [{"call": call}, *rows])
    return rows


def _append_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Append one JSON object a line; when this returns they are on the disk."""
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        file.flush()
        os.fsync(file.fileno())


def _row(
    opened: LanguageSource, prompt: Prompt, said: Answer, how: Decoding, policy: str, step: int | None, member: int
) -> dict[str, Any]:
    return {
        "prompt": as_given(prompt.given), "completion": as_completion(prompt, said.text), "policy": policy,
        "step": step, "model": opened.name, "member": member, "seed": how.seed, "temperature": how.temperature,
        "top_p": how.top_p, "tokens": len(said.tokens), "ended": said.ended,
    }  # fmt: skip


def write_lines(path: str | Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write one JSON object a line, replacing the file as a whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


@dataclass
class _Subject:
    """What `LanguageEvaluation` asks of a run, of a model that is not being trained."""

    config: LanguageConfig
    objective: Objective
    tokenizer: Any
    heldout: Tokens | None
    directory: Path
    prompts: list[Prompt] = field(default_factory=list)
    world: World = field(default_factory=World)
    steps: int = 0


def evaluate_language(
    source: str | Path,
    prompts: str | Path | Sequence[str] | None = None,
    *,
    config: LanguageConfig | str | Path | None = None,
    data: str | Path | None = None,
    samples: int | None = None,
    chat: bool = False,
    rewards: Sequence[str | RewardConfig] | None = None,
    seed: int | None = None,
    temperature: float | None = None,
    top_p: float = 1.0,
    max_new_tokens: int | None = None,
    out: str | Path | None = None,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Measure a language model as its training does, on the same held-out rows; score its own answers with rewards.

    Args:
        source: see `find_source`.
        prompts: what to answer; held-out prompts when None.
        config: what a bare folder was trained with: a recipe, a file or a config.
        data: rows to measure in place of the held-out ones.
        samples: answers in all, one a prompt; 64 with rewards, else as many as the run draws.
        chat: see `sample_completions`.
        rewards: names of the registry; each is measured of the answers before and after training, and of their
            difference prompt by prompt.
        seed, temperature, top_p, max_new_tokens: see `sample_completions`.
        out: a JSON-lines file to write every answer and its scores to.
        progress: told how many answers are done.

    Returns:
        source, step, the metrics of evaluation.jsonl, z0 or delta of the checkpoint, and of each reward `before`,
        `after` and `gain`, with 95 % intervals by prompt.

    Raises:
        ConfigError: a bare folder without `config`, or nothing held out to measure.
    """
    began = time.perf_counter()
    known = find_language(source, load_config(config) if isinstance(config, (str, Path)) else config)
    settings = known.config
    if settings is None:
        raise ConfigError(
            "It is not known what this model was trained with", where=known.name, do="Name it with --trained-with"
        )
    alone = settings.trainer == "rluf"  # which needs prompts only
    heldout = load_preferences(data, prompts=alone) if data is not None else read_data(settings)[1]
    if heldout is None:
        raise ConfigError(
            "No rows are held out", where="data.heldout_fraction", do="Give rows with --data, or set data.heldout_path"
        )
    panel = Panel.build([RewardConfig(name=r) if isinstance(r, str) else r for r in rewards or ()])
    most = samples if samples is not None else 64 if panel else settings.evaluation.prompts
    given = asked_of(known, prompts, chat, most)[:samples] if most or prompts is not None else []
    opened, objective = open_language(known), objective_of(settings)
    asked = prompts_of(opened, given)
    tokens = tokenise_rows(settings, objective, opened.processor, heldout, training=False)
    with tempfile.TemporaryDirectory() as nowhere:
        subject = _Subject(settings, objective, opened.tokenizer, tokens, opened.run or Path(nowhere))
        evaluation = LanguageEvaluation(subject, opened.models, None, RunLog(nowhere, silent=True))
        found = {"n": len(asked) if objective.online else len(evaluation.rows), **evaluation.measure()}
        scored, rows = _own(opened, evaluation, asked, panel, progress,
                            decoding_of(opened, seed, temperature, top_p, max_new_tokens))  # fmt: skip
    if out is not None:
        write_lines(out, rows)
    return {
        "source": opened.name, "trainer": settings.trainer, "step": opened.step, **found, **scored,
        **_points(opened), "seconds": time.perf_counter() - began,
    }  # fmt: skip


def _points(opened: LanguageSource) -> dict[str, Any]:
    """Return what z0 or delta was in the step that made the checkpoint."""
    rows = read_jsonl(opened.run / "metrics.jsonl")[0] if opened.run is not None else []
    last = next((row for row in rows if row.get("step") == opened.step), {})
    return {key: value for key, value in last.items() if key.startswith(("z0", "delta"))}


def objective_of(config: LanguageConfig) -> Objective:
    """Return the objective of a configuration, of the file of its trainer."""
    home, name = f"trainers.{config.trainer}", f"{LANGUAGE[config.trainer].title}Objective"
    return getattr(importlib.import_module(home), name)(config)


def _own(
    opened: LanguageSource, evaluation: LanguageEvaluation, asked: Sequence[Prompt], panel: Panel, progress: Progress,
    how: Decoding,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:  # fmt: skip
    """Return the metrics of the model's own answers with their rewards before and after, and a row an answer."""
    if not asked:
        return {}, []
    evaluation.decoding = how
    total = len(asked) * (1 + bool(panel))
    after = evaluation.answers(asked, progress=lambda n: progress(n, total))
    found = answer_metrics(after, evaluation.answer_ratios(asked, after), [p.key for p in asked], how)
    found["prompts"] = len(asked)
    rows = [_row(opened, p, a, how, opened.policy, opened.step, 0) for p, a in zip(asked, after, strict=True)]
    if evaluation.run.objective.online:
        ratio = evaluation.answer_ratios(asked, after)
        found |= evaluation.judged(asked, after, ratio, rows, opened.step or 0)
    if not panel:
        return found, rows
    scores = {"after": _scored(panel, asked, after, rows)}
    before = evaluation.answers(asked, before=True, progress=lambda n: progress(len(asked) + n, total))
    if before:
        earlier = [_row(opened, p, a, how, BEFORE, 0, 0) for p, a in zip(asked, before, strict=True)]
        scores["before"] = _scored(panel, asked, before, earlier)
        scores["gain"] = {name: value - scores["before"][name] for name, value in scores["after"].items()}
        rows = [*earlier, *rows]
    clusters = np.array([p.key for p in asked])
    found["rewards"] = {
        name: {
            when: bootstrap_mean(scores[when][name], clusters).as_dict()
            for when in ("before", "after", "gain")
            if when in scores
        }
        for name in panel.names
    }
    return found, rows


def _scored(
    panel: Panel, asked: Sequence[Prompt], answers: Sequence[Answer], rows: Sequence[dict[str, Any]]
) -> dict[str, np.ndarray]:
    """Return the scores of answers by component, NaN where one is missing, and put them into the rows."""
    scores = panel.score(as_samples(asked, answers))
    found = {name: scores.column(name) for name in scores.names}
    for i, row in enumerate(rows):
        row.setdefault("scores", {}).update({n: float(v[i]) if np.isfinite(v[i]) else None for n, v in found.items()})
        if scores.errors and scores.errors[i]:
            row["error"] = scores.errors[i]
    return found
