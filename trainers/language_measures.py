"""What is measured of a language model: of each update, and on held-out rows before, during and after training."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from accelerate.utils import send_to_device

from align.groupstats import bootstrap_mean
from align.language_config import LanguageConfig
from align.launch import World
from align.seeding import permutation
from align.tracking import RunLog, read_jsonl
from trainers.language_generation import Answer, Decoding, Prompt, answer, as_given
from trainers.language_objective import HeldOut
from trainers.preference_data import Tokens, collate

if TYPE_CHECKING:
    from trainers.language_objective import Models, Objective
    from trainers.language_reference import LogpCache

FIRST_LOGPS = "evaluations/before.json"
"""Of a supervised run's folder: the log-prob of each held-out row before training, for changes on the same rows."""


def auc(score: np.ndarray, positive: np.ndarray) -> float:
    """Return the chance that a positive row scores above a negative one, ties counting half; NaN with one class.

    Source: Mann and Whitney (1947): (rank sum of positives - n_p (n_p + 1) / 2) / (n_p n_n).
    """
    count = int(positive.sum())
    if not 0 < count < len(score):
        return float("nan")
    _, inverse, times = np.unique(score, return_inverse=True, return_counts=True)
    rank = (np.cumsum(times) - (times - 1) / 2)[inverse]
    return float((rank[positive].sum() - count * (count + 1) / 2) / (count * (len(score) - count)))


def auc_interval(score: np.ndarray, positive: np.ndarray, clusters: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of the AUC when rows of one cluster (a prompt) go together; NaN with one class.

    A positive row's share of negatives below it and a negative row's share of positives above it, less the AUC and
    over their class's count, add up over clusters to the influences that `clustered_half_width` takes.
    Source: DeLong et al. (1988); clusters as Obuchowski (1997).
    """
    value = auc(score, positive)
    if not np.isfinite(value):
        return float("nan"), float("nan")
    part = np.empty(len(score))
    for own, sign in ((positive, 1), (~positive, -1)):
        other = np.sort(sign * score[~own])
        mine = sign * score[own]
        below = (np.searchsorted(other, mine, "left") + np.searchsorted(other, mine, "right")) / 2
        part[own] = (below / len(other) - value) / own.sum()
    half = clustered_half_width(part, clusters)
    return max(0.0, value - half), min(1.0, value + half)


def clustered_half_width(influence: np.ndarray, clusters: np.ndarray) -> float:
    """Return 1.96 sqrt(I / (I - 1) sum over I clusters of (their summed influence)^2); NaN with one cluster."""
    _, index = np.unique(clusters, return_inverse=True)
    sums = np.bincount(index, weights=influence)
    return 1.96 * math.sqrt(len(sums) / (len(sums) - 1) * float((sums**2).sum())) if len(sums) > 1 else float("nan")


def ratio_estimate(total: np.ndarray, count: np.ndarray, clusters: np.ndarray) -> dict[str, float | int]:
    """Return sum total / sum count with the 95 % interval of a linearised ratio whose rows go together by cluster."""
    mean = float(total.sum() / count.sum())
    half = clustered_half_width((total - mean * count) / count.sum(), clusters)
    return {"mean": mean, "ci_low": mean - half, "ci_high": mean + half, "n": len(total)}


def class_metrics(reward: np.ndarray, log_ratio: np.ndarray, desirable: np.ndarray) -> dict[str, float]:
    """Return mean rewards and log-ratios of each class, their margin, AUC, and the mean log-ratio of all rows."""

    def mean(values: np.ndarray) -> float:
        return float(values.mean()) if len(values) else float("nan")

    up, down = mean(reward[desirable]), mean(reward[~desirable])
    return {
        "rewards/up": up, "rewards/down": down, "rewards/margin": up - down, "auc": auc(log_ratio, desirable),
        "log_ratio/up": mean(log_ratio[desirable]), "log_ratio/down": mean(log_ratio[~desirable]),
        "share_up": float(desirable.mean()) if len(desirable) else float("nan"),
    }  # fmt: skip


def update_metrics(measures: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return the metrics of an update from its per-row measures, gathered over microbatches and processes."""
    found = {}
    if "log_ratio" in measures:
        found = class_metrics(measures["reward"], measures["log_ratio"], measures["desirable"] > 0.5)
    plain = [n for n in measures if n not in ("log_ratio", "reward", "desirable")]
    return {**found, **{name: float(measures[name].mean()) for name in plain}}


def one_class_share(parts: Sequence[Sequence[Mapping[str, np.ndarray]]]) -> dict[str, float]:
    """Return the share of an update's microbatches whose rows, over all processes, are of one class.

    Args:
        parts: of each process, what its microbatches measured, in order.
    """
    if not parts or not parts[0] or "desirable" not in parts[0][0]:
        return {}
    classes = [np.concatenate([row["desirable"] for row in rows]) > 0.5 for rows in zip(*parts, strict=True)]
    return {"one_class_share": sum(len(np.unique(found)) < 2 for found in classes) / len(classes)}


def pair_differences(value: np.ndarray, pair: np.ndarray, desirable: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return chosen minus rejected of every pair that has both, and the pairs' numbers."""
    chosen = {int(p): v for p, v, up in zip(pair, value, desirable, strict=True) if p >= 0 and up}
    rejected = {int(p): v for p, v, up in zip(pair, value, desirable, strict=True) if p >= 0 and not up}
    both = sorted(set(chosen) & set(rejected))
    return np.array([chosen[p] - rejected[p] for p in both]), np.array(both)


def measured_rows(tokens: Tokens, most: int) -> list[int]:
    """Return at most `most` rows, in order, drawn from all of them whatever their order; a pair's rows go together."""
    units = np.where(tokens.pair >= 0, tokens.pair, -1 - np.arange(len(tokens)))
    _, unit = np.unique(units, return_inverse=True)
    place = np.argsort(permutation(int(unit.max()) + 1, "evaluation rows"))[unit]
    return sorted(np.argsort(place, kind="stable")[:most].tolist())


class Measured(Protocol):
    """What an evaluation asks of a run: its settings, its held-out rows and prompts as tokens, its processes."""

    config: LanguageConfig
    objective: Objective
    tokenizer: Any
    heldout: Tokens | None
    prompts: list[Prompt]
    world: World
    directory: Path

    @property
    def steps(self) -> int:
        """How many steps it has."""


class LanguageEvaluation:
    """Measures held-out rows, and has the model answer held-out prompts.

    Args:
        run: the run.
        models: policy and reference.
        cache: reference log-probs that were computed before.
        log: where evaluations are written.
    """

    BATCH = 16

    def __init__(self, run: Measured, models: Models, cache: LogpCache | None, log: RunLog) -> None:
        self.run, self.models, self.cache, self.log = run, models, cache, log
        self.rows = measured_rows(run.heldout, run.config.evaluation.rows) if run.heldout is not None else []
        settings = run.config.evaluation
        self.decoding = Decoding(settings.max_new_tokens, settings.temperature, seed=run.config.seed)
        self._reference: np.ndarray | None = None
        self._before: list[Answer] | None = None
        self.found: dict[int, dict[str, Any]] = {}

    def before(self, step: int) -> None:
        """Measure the model before training; of a run that goes on, what a stop left unmeasured."""
        if step and self._is_due(step) and step not in {row.get("step") for row in self._rows()}:
            self._evaluate(step)
        if step == 0:
            self._evaluate(0)
            if self.run.prompts and self.models.reference is not None and not self.models.reference.live:
                message = "kl is not measured: with reference.mode precomputed the model before training is gone"
                self.log.warn(0, "note", "no_kl", message)

    def during(self, step: int) -> None:
        """Measure when it is due."""
        if self._is_due(step):
            self._evaluate(step)

    def _is_due(self, step: int) -> bool:
        every = self.run.config.evaluation.every
        return bool(every) and step % every == 0 and step < self.run.steps

    def _rows(self) -> list[dict[str, Any]]:
        return read_jsonl(self.run.directory / "evaluation.jsonl")[0]

    def after(self, step: int) -> dict[str, Any]:
        """Measure the trained model and return the run's summary."""
        final = self.found.get(step) or self._evaluate(step)
        first = next((row for row in self._rows() if row["step"] == 0), {})
        keys = [key for key in final if key not in ("step", "seconds", "n", "monitor")]
        return {
            "name": self.run.config.name, "steps": step, "heldout_rows": len(self.rows),
            **{f"{key}_before": first.get(key) for key in keys}, **{f"{key}_after": final[key] for key in keys},
        }  # fmt: skip

    def _evaluate(self, step: int) -> dict[str, Any]:
        if not self.rows:
            return {}
        began = time.perf_counter()
        count = len(self.run.prompts) if self.run.objective.online else len(self.rows)
        found = {"step": step, "n": count, **self.measure(first=step == 0)}
        if self.run.prompts:
            answers = self.answers(self.run.prompts)
            ratio = self.answer_ratios(self.run.prompts, answers)
            rows = self._written(answers, ratio)
            found |= answer_metrics(answers, ratio, [p.key for p in self.run.prompts], self.decoding)
            if self.run.objective.online:
                found |= self.judged(self.run.prompts, answers, ratio, rows, step)
            self.log.generations(step, rows)
        row = {**found, "seconds": time.perf_counter() - began}
        self.log.evaluation(row)
        self.found[step] = row
        return row

    def answers(
        self, prompts: Sequence[Prompt], *, before: bool = False, progress: Callable[[int], Any] = lambda done: None
    ) -> list[Answer]:
        """Return the policy's answer to each prompt, or that of the model before training. Every process must call it.

        All processes draw all answers, which is as quick as one and keeps ZeRO 3 in step.
        """
        run, models = self.run, self.models
        how: dict[str, Any] = {
            "half": run.config.model.dtype == "bf16", "synced": run.world.size > 1, "progress": progress
        }  # fmt: skip
        if not before:
            return answer(models.plain, prompts, run.tokenizer, self.decoding, **how)
        if models.reference is None or not models.reference.live:
            return []
        with models.reference.model() as model:
            return answer(model, prompts, run.tokenizer, self.decoding, **how)

    def judged(
        self, prompts: Sequence[Prompt], answers: Sequence[Answer], ratio: np.ndarray | None,
        rows: list[dict[str, Any]], step: int,
    ) -> dict[str, Any]:  # fmt: skip
        """Return what an online objective says of answers beside those of the model before training. All together."""
        if self._before is None:  # the same at every evaluation
            self._before = self.answers(prompts, before=True)
        objective: Any = self.run.objective
        return objective.heldout(HeldOut(step, prompts, answers, self._before, ratio, self.run.world, rows))

    def answer_ratios(self, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> np.ndarray | None:
        """Return the log-ratio of each answer to the model before training, where that is at hand. All together."""
        if self.models.reference is None or not self.models.reference.live:
            return None
        sequences = [(prompt.tokens, said.tokens) for prompt, said in zip(prompts, answers, strict=True)]
        lengths, pad = [sum(map(len, pair)) for pair in sequences], self.run.tokenizer.pad_token_id

        def batch_of(places: Sequence[int]) -> Any:
            return collate([sequences[i] for i in places], pad)

        policy, before = (
            self._logps(score, lengths, batch_of) for score in (self.models.free_logps, self.models.reference_logps)
        )
        return policy - before

    def _written(self, answers: Sequence[Answer], ratio: np.ndarray | None) -> list[dict[str, Any]]:
        """Return the rows of generations.jsonl of a step."""
        return [
            {
                "index": i, "prompt": as_given(prompt.given), "completion": said.text, "tokens": len(said.tokens),
                "ended": said.ended, "log_ratio": None if ratio is None else float(ratio[i]),
                "seed": self.decoding.seed, "temperature": self.decoding.temperature,
            }
            for i, (prompt, said) in enumerate(zip(self.run.prompts, answers, strict=True))
        ]  # fmt: skip

    def measure(self, *, first: bool = False) -> dict[str, Any]:
        """Return the metrics of the held-out rows under the policy. Every process must call it.

        Args:
            first: the model is the one before training, with which later measures of a supervised run compare.
        """
        if self.run.objective.online:
            return {}  # it is judged by answers of its own, not by log-probs of given ones
        tokens, rows = self.run.heldout, self.rows
        logp = self._heldout_logps(self.models.free_logps)
        count = np.array([len(tokens.completions[i]) for i in rows], dtype=float)
        if not self.run.objective.referenced:
            if first and self.run.world.leads:
                path = self.run.directory / FIRST_LOGPS
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(logp.tolist()), encoding="utf-8")
            return self._supervised(logp, count, tokens.prompt[rows])
        ratio, desirable = logp - self._reference_logps(), tokens.desirable[rows]
        beta = self.run.objective.beta
        found: dict[str, Any] = class_metrics(beta * ratio, ratio, desirable)
        found["auc_ci_low"], found["auc_ci_high"] = auc_interval(ratio, desirable, tokens.prompt[rows])
        difference, pairs = pair_differences(ratio, tokens.pair[rows], desirable)
        if len(pairs):
            right = (difference > 0) + 0.5 * (difference == 0)
            found["pair_accuracy"] = bootstrap_mean(right, pairs).as_dict()
        found["log_ratio_per_token"] = float((ratio / count).mean())
        return found

    def _supervised(self, logp: np.ndarray, count: np.ndarray, prompt: np.ndarray) -> dict[str, Any]:
        """Return the nats a token, and their change since before training where that was written down."""
        nats = -float(logp.sum() / count.sum())
        found: dict[str, Any] = {"nats_per_token": nats, "perplexity": math.exp(min(nats, 700.0))}
        first = self._first_logps()
        if first is not None:
            found["nats_change"] = ratio_estimate(first - logp, count, prompt)
        return found

    def _first_logps(self) -> np.ndarray | None:
        """Return the held-out log-probs before training, from the run folder."""
        try:
            found = json.loads((self.run.directory / FIRST_LOGPS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return np.array(found) if isinstance(found, list) and len(found) == len(self.rows) else None

    def _heldout_logps(self, score: Any) -> np.ndarray:
        tokens, rows, pad = self.run.heldout, self.rows, self.run.tokenizer.pad_token_id
        lengths = [int(tokens.length[i]) for i in rows]
        return self._logps(score, lengths, lambda places: tokens.batch([(rows[i], rows[i]) for i in places], pad))

    def _reference_logps(self) -> np.ndarray:
        if self._reference is None:
            if self.cache is not None:
                pairs = [(i, i) for i in self.rows]
                self._reference = self.cache.lookup(self.run.heldout, pairs).double().numpy()
            else:
                self._reference = self._heldout_logps(self.models.reference_logps)
        return self._reference

    def _logps(self, score: Any, lengths: Sequence[int], batch_of: Callable[[Sequence[int]], Any]) -> np.ndarray:
        """Log-probs of sequences of some lengths, which `batch_of` their places puts together.

        Every process runs as many batches as any other.
        """
        world = self.run.world
        order = sorted(range(len(lengths)), key=lambda i: lengths[i])
        batches = [order[i : i + self.BATCH] for i in range(0, len(order), self.BATCH)]
        batches += [order[:1]] * (-len(batches) % world.size)
        device = next(self.models.plain.parameters()).device
        training = self.models.plain.training
        self.models.plain.eval()
        mine: dict[int, float] = {}
        for rows in batches[world.rank :: world.size]:
            batch = batch_of(rows)
            half = torch.autocast(device.type, torch.bfloat16, enabled=self.run.config.model.dtype == "bf16")
            with torch.no_grad(), half:
                values = score(send_to_device(batch, device)).per_row().double().tolist()
            mine.update(zip(rows, values, strict=True))
        self.models.plain.train(training)
        found = {i: value for part in world.gather(mine) for i, value in part.items()}
        return np.array([found[i] for i in range(len(lengths))])


def answer_metrics(
    answers: Sequence[Answer], ratio: np.ndarray | None, clusters: Sequence[str], decoding: Decoding
) -> dict[str, Any]:
    """Return how long a model's own answers are, how many ended, and how far they are from the model before training.

    `kl = E_{y ~ pi}[log pi(y | x) - log pi_ref(y | x)]`, in nats an answer, cut off where answers are, estimated by
    the mean log-ratio of answers drawn from the policy itself: at temperature 1 and from all tokens alone.
    """
    found: dict[str, Any] = {
        "answer_tokens": float(np.mean([len(said.tokens) for said in answers])),
        "answers_ended": float(np.mean([said.ended for said in answers])),
    }
    if ratio is not None and decoding.temperature == 1 and decoding.top_p == 1:
        found["kl"] = bootstrap_mean(ratio, np.array(clusters)).as_dict()
    return found
