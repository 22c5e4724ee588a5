"""What is measured of a language model: of each update, and on held-out rows before, during and after training."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import send_to_device

from align.groupstats import bootstrap_mean
from align.tracking import RunLog

if TYPE_CHECKING:
    from trainers.language import LanguageRun, Models
    from trainers.language_model import LogpCache

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


def pair_differences(value: np.ndarray, pair: np.ndarray, desirable: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return chosen minus rejected of every pair that has both, and the pairs' numbers."""
    chosen = {int(p): v for p, v, up in zip(pair, value, desirable, strict=True) if p >= 0 and up}
    rejected = {int(p): v for p, v, up in zip(pair, value, desirable, strict=True) if p >= 0 and not up}
    both = sorted(set(chosen) & set(rejected))
    return np.array([chosen[p] - rejected[p] for p in both]), np.array(both)


class LanguageEvaluation:
    """Measures held-out rows.

    Args:
        run: the run.
        models: policy and reference.
        cache: reference log-probs that were computed before.
        log: where evaluations are written.
    """

    BATCH = 16

    def __init__(self, run: LanguageRun, models: Models, cache: LogpCache | None, log: RunLog) -> None:
        self.run, self.models, self.cache, self.log = run, models, cache, log
        self.rows = list(range(min(run.config.evaluation.rows, len(run.heldout)))) if run.heldout is not None else []
        self._reference: np.ndarray | None = None
        self.found: dict[int, dict[str, Any]] = {}

    def before(self, step: int) -> None:
        """Measure the model before training, unless the run goes on."""
        if step == 0:
            self._evaluate(0)

    def during(self, step: int) -> None:
        """Measure when it is due."""
        every = self.run.config.evaluation.every
        if every and step % every == 0 and step < self.run.steps:
            self._evaluate(step)

    def after(self, step: int) -> dict[str, Any]:
        """Measure the trained model and return the run's summary."""
        final = self._evaluate(step)
        from align.tracking import read_jsonl

        rows = read_jsonl(self.run.directory / "evaluation.jsonl")[0]
        first = next((row for row in rows if row["step"] == 0), {})
        keys = [key for key in final if key not in ("step", "seconds", "n")]
        return {
            "name": self.run.config.name, "steps": step, "heldout_rows": len(self.rows),
            **{f"{key}_before": first.get(key) for key in keys}, **{f"{key}_after": final[key] for key in keys},
        }  # fmt: skip

    def _evaluate(self, step: int) -> dict[str, Any]:
        if not self.rows:
            return {}
        began = time.perf_counter()
        row = {
            "step": step,
            "n": len(self.rows),
            **self.measure(first=step == 0),
            "seconds": time.perf_counter() - began,
        }
        self.log.evaluation(row)
        self.found[step] = row
        return row

    def measure(self, *, first: bool = False) -> dict[str, Any]:
        """Return the metrics of the held-out rows under the policy. Every process must call it.

        Args:
            first: the model is the one before training, with which later measures of a supervised run compare.
        """
        tokens, rows = self.run.heldout, self.rows
        logp = self._logps(self.models.free_logps)
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

    def _reference_logps(self) -> np.ndarray:
        if self._reference is None:
            if self.cache is not None:
                pairs = [(i, i) for i in self.rows]
                self._reference = self.cache.lookup(self.run.heldout, pairs).double().numpy()
            else:
                self._reference = self._logps(self.models.reference_logps)
        return self._reference

    def _logps(self, score: Any) -> np.ndarray:
        """Log-probs of the held-out rows; every process runs as many batches as any other."""
        tokens, world = self.run.heldout, self.run.world
        length = tokens.length
        order = sorted(self.rows, key=lambda i: int(length[i]))
        batches = [order[i : i + self.BATCH] for i in range(0, len(order), self.BATCH)]
        batches += [order[:1]] * (-len(batches) % world.size)
        device = next(self.models.plain.parameters()).device
        training = self.models.plain.training
        self.models.plain.eval()
        mine: dict[int, float] = {}
        for rows in batches[world.rank :: world.size]:
            batch = tokens.batch([(i, i) for i in rows], self.run.tokenizer.pad_token_id)
            half = torch.autocast(device.type, torch.bfloat16, enabled=self.run.config.model.dtype == "bf16")
            with torch.no_grad(), half:
                values = score(send_to_device(batch, device)).per_row().double().tolist()
            mine.update(zip(rows, values, strict=True))
        self.models.plain.train(training)
        found = {i: value for part in world.gather(mine) for i, value in part.items()}
        return np.array([found[i] for i in self.rows])
