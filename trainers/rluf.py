"""RLUF: a language model against several rewards, under hard judges and a bound on each completion's log-ratio.

    prompts -> k completions of the policy, one baseline -> rewards and judges -> which to learn from -> their log-probs

Where this differs from the papers (RLUF, arXiv 2505.14946; CGPO, arXiv 2409.20370)
1. RLUF published neither its optimiser's settings nor code. What stands here is CGPO's family of objectives; weights,
   bounds and presets are ours.
2. Several rewards are calibrated each by itself, then averaged by weight; or, with gdpo, the constrained reward of each
   is normalised in its group, added up by weight, and normalised over the microbatch of all processes.
3. The loss is the mean over the prompts of the optimizer batch, those that are skipped among them; of CRPG also over
   the completions of a prompt.
4. A completion whose reward is missing is left out. A judge that gives no answer counts as violated, and is counted.
5. The baseline is an answer of the model before training, drawn anew at every visit with the same noise, so that a
   resumed run draws the same.
6. One set of rewards, judges, bound and k for all prompts; a set for each kind of prompt is left for later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor

from align.config import load_config
from align.errors import DataError, GuardError
from align.groupstats import bootstrap_mean
from align.launch import World
from align.preferences import Completion, PreferenceSet
from align.rluf_config import RLUFConfig
from align.seeding import seed as derive_seed
from align.types import Scores, stack_scores
from rewards.compose import require_scored
from rewards.suite import Judgement, Suite
from trainers.advantages import group_advantages
from trainers.language import LanguageRun
from trainers.language_generation import Answer, Decoding, Prompt, answer, as_samples, read_prompts
from trainers.language_objective import HeldOut, Models, RowLosses, Totals
from trainers.language_trainer import REFERENCE_TOLERANCE
from trainers.monitor import Monitor, Verdict
from trainers.preference_data import Tokens, collate
from trainers.rluf_objectives import (
    NONE,
    calibrated_reward,
    codpo,
    codpo_choice,
    constrained_reward,
    crpg,
    crpg_advantages,
    crraft,
    crraft_choice,
    is_valid,
)


def RLUF(config: RLUFConfig | str | Path | Mapping[str, Any], **options: Any) -> LanguageRun:
    """Return an RLUF run, ready to `train()`.

    Args:
        config: an `RLUFConfig`, or a recipe name, a path or a mapping for `load_config`.
        options: see `LanguageRun`.
    """
    config = config if isinstance(config, RLUFConfig) else load_config(config, kind=RLUFConfig)
    return LanguageRun(config, RLUFObjective(config), **options)


@dataclass(frozen=True)
class Group:
    """What is known of the completions of P prompts: G of the policy and, last, the baseline, `[P, G + 1]` each.

    Args:
        said: rewards and judges, of B = P (G + 1) completions.
        log_ratio: nats a completion.
        tokens: tokens of a completion.
        ended: whether it came to an end.
    """

    said: Judgement
    log_ratio: np.ndarray
    tokens: np.ndarray
    ended: np.ndarray


@dataclass(frozen=True)
class Plan:
    """Which completions a microbatch learns from, over all processes.

    Args:
        calibrated: `[P, G, K]`, R_hat of each reward.
        reward: `[P, G]`, R_hat of all.
        constrained: `[P, G]`, R; NaN where unknown.
        valid: bool `[P, G]`.
        picked: (prompt, member) of each term; of codpo chosen ones, then rejected ones.
        weight: of each term: an advantage over G, or R.
    """

    calibrated: np.ndarray
    reward: np.ndarray
    constrained: np.ndarray
    valid: np.ndarray
    picked: list[tuple[int, int]]
    weight: np.ndarray


def plan_updates(config: RLUFConfig, suite: Suite, group: Group) -> Plan:
    """Decide what to learn from: a function of the numbers of all processes, the same on each of them."""
    objective = config.objective
    shape = group.log_ratio.shape
    rewards = torch.from_numpy(group.said.rewards.reshape(*shape, -1))
    every = is_valid(
        torch.from_numpy(group.said.all_passed.reshape(shape)), torch.from_numpy(group.log_ratio), objective.kl_max
    )
    valid, base_valid = every[:, :-1], every[:, -1]
    calibrated = calibrated_reward(rewards[:, :-1], rewards[:, -1:])
    reward = calibrated @ torch.from_numpy(suite.weights)
    constrained = constrained_reward(reward, valid)
    if objective.loss == "codpo":
        chosen, rejected = (part.tolist() for part in codpo_choice(reward, valid))
        pairs = [(p, c, r) for p, (c, r) in enumerate(zip(chosen, rejected, strict=True)) if c != NONE]
        picked = [(p, c) for p, c, _ in pairs] + [(p, r) for p, _, r in pairs]
        weight = np.ones(len(picked))
    elif objective.loss == "crraft":
        choice = crraft_choice(constrained, valid, base_valid)
        picked = [(p, m) for p, m in enumerate(choice.member.tolist()) if m != NONE]
        weight = choice.weight.numpy()[[p for p, _ in picked]]
    else:
        advantages = _advantages(objective.aggregation, suite, constrained, calibrated, valid)
        picked = [(int(p), int(m)) for p, m in np.argwhere(advantages != 0)]
        weight = advantages[advantages != 0] / advantages.shape[1]
    return Plan(calibrated.numpy(), reward.numpy(), constrained.numpy(), valid.numpy(), picked, weight)


def _advantages(aggregation: str, suite: Suite, constrained: Tensor, calibrated: Tensor, valid: Tensor) -> np.ndarray:
    if aggregation == "weighted_mean":
        return crpg_advantages(constrained).numpy()
    each = constrained_reward(calibrated, valid[..., None].expand_as(calibrated)).numpy()
    values = each.reshape(-1, each.shape[-1])
    scores = Scores(values, np.isfinite(values), suite.names)
    return group_advantages(scores, each.shape[1], tuple(suite.weights), mode="gdpo", clip=None).values


@dataclass
class _Sums:
    """What the microbatches of an optimizer step say, for its line in the log."""

    values: dict[str, list[np.ndarray]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, suite: Suite, group: Group, plan: Plan, kl_max: float) -> None:
        """Add a microbatch."""
        shape = group.log_ratio.shape
        own = np.zeros(shape, bool)
        own[:, :-1] = True
        rows, ratio = own.reshape(-1), group.log_ratio[:, :-1]
        for k, name in enumerate(suite.names):
            self._put(f"reward/{name}", group.said.shown[rows, k])
            self._put(f"calibrated/{name}", plan.calibrated[..., k])
        for j, name in enumerate(suite.judges):
            self._put(f"judge/{name}", group.said.passed[rows, j])
        self._put("judge/all", group.said.all_passed[rows])
        self._put("constrained", plan.constrained)
        self._put("valid", plan.valid)
        self._put("valid_prompts", plan.valid.any(1))
        self._put("kl_exceeded", ~(ratio <= kl_max))
        self._put("kl", ratio)
        self._put("answer_tokens", group.tokens[:, :-1])
        self._put("answers_ended", group.ended[:, :-1])
        learnt = {p for p, _ in plan.picked}
        self._put("learnt_prompts", np.array([p in learnt for p in range(shape[0])]))
        self._put("learnt_baseline", np.array([(p, shape[1] - 1) in plan.picked for p in range(shape[0])]))
        for name, count in (
            ("judge_errors", int(group.said.failed[rows].sum())),
            ("missing_rewards", int((~np.isfinite(group.said.rewards[rows])).any(1).sum())),
        ):
            self.counts[name] = self.counts.get(name, 0) + count

    def _put(self, name: str, values: np.ndarray) -> None:
        self.values.setdefault(name, []).append(np.asarray(values, dtype=np.float64).reshape(-1))

    def metrics(self) -> dict[str, float]:
        """Return the mean of every number over what is known of it, and counts."""
        found = {}
        for name, parts in self.values.items():
            values = np.concatenate(parts)
            known = values[np.isfinite(values)]
            found[name] = float(known.mean()) if len(known) else float("nan")
        return {**found, **{name: float(count) for name, count in self.counts.items()}}


class RLUFObjective:
    """Constrained objectives on completions of the model's own; see `trainers.language_objective.Online`.

    Args:
        config: of the run.
        suite: rewards and judges; those of the configuration when None.
    """

    paired = mismatched = labelled = oversample = soft = False
    referenced = online = True
    beta = 1.0

    def __init__(self, config: RLUFConfig, suite: Suite | None = None) -> None:
        self.config, self.suite = config, suite or Suite(config.rewards)
        self.step = self.barren = 0
        self._sums = _Sums()
        self._known: dict[str, Any] = {}
        self._baseline: Scores | None = None
        self._judges = Suite(config.heldout_rewards, "heldout_rewards") if config.heldout_rewards else None
        for asked in (self.suite, self._judges):
            if asked is not None:
                asked.require_media("text", config.model.path)
        self._monitor: Monitor | None = None
        self.verdict: Verdict | None = None

    # What a run asks of an objective

    def prepare(self, tokens: Tokens) -> dict[str, Any]:
        """Say what completions are judged by."""
        return {"rewards": self.suite.describe()}

    def ask(self, rows: PreferenceSet, tokens: Tokens, tokenizer: Any) -> None:
        """Take the training prompts."""
        self.tokenizer, self._places = tokenizer, tokens.place
        kept = rows.one_a_prompt().rows
        for row in kept:
            if row.images or not row.prompt:
                raise DataError(
                    "RLUF answers prompts of text alone", where=row.place,
                    why="this one has images" if row.images else "this row has no prompt", do="Leave the row out",
                )  # fmt: skip
        prompts = read_prompts(kept, tokenizer, self.config.data.max_prompt_length)
        self.prompts: list[Prompt] = []
        self.own: list[Answer] = []
        place = iter(zip(kept, prompts, strict=True))
        for i, given in enumerate(tokens.prompts):  # in order; rows that were dropped are passed over
            row, prompt = next(
                (r, p) for r, p in place if r.place == tokens.place[i] and np.array_equal(p.tokens, given)
            )
            self.prompts.append(prompt)
            self.own.append(Answer(tokens.completions[i], _said(row), True))

    def losses(self, models: Models, batch: Mapping[str, Any], totals: Totals, world: World) -> RowLosses:
        """Draw completions of the prompts of a microbatch, judge them, and return the losses of what is learnt from."""
        rows, members = [int(i) for i in batch["index"]], self.config.sampling.completions + 1
        prompts = [self.prompts[i] for i in rows]
        self._known = {}
        answers = self._draw(models, rows, prompts, world)
        self._known = {"rows": rows, "answers": answers}
        asked = [prompt for prompt in prompts for _ in range(members)]
        sequences = [(p.tokens, a.tokens) for p, a in zip(asked, answers, strict=True)]
        logp, reference = self._free_logps(models, sequences)
        self._known["log_ratio"] = logp - reference
        self._require_reference(logp - reference, answers, world)
        self._known["scores"] = said = self.suite.score(as_samples(asked, answers))
        scores = stack_scores(world.gather(said))
        require_scored(
            _rewards_of(scores, self.suite), missing="mask", max_fail_frac=self.config.objective.max_fail_frac,
            where=f"step {self.step + 1}", key="objective.max_fail_frac",
        )  # fmt: skip
        parts = world.gather((logp - reference, [len(a.tokens) for a in answers], [a.ended for a in answers]))
        ratio, tokens, ended = (np.concatenate(part).reshape(-1, members) for part in zip(*parts, strict=True))
        group = Group(self.suite.judge(scores), ratio, tokens, ended)
        plan = plan_updates(self.config, self.suite, group)
        self._require_valid(plan, group)
        self._sums.add(self.suite, group, plan, self.config.objective.kl_max)
        return self._learn(models, plan, sequences, reference, world.share(len(ratio)), totals)

    def seen(self) -> list[dict[str, Any]]:
        """Return this process's completions of the microbatch at hand, as far as they are known, for people to read."""
        known, k, found = self._known, self.config.sampling.completions, []
        for i, given in enumerate(known.get("answers", ())):
            r, m = known["rows"][i // (k + 1)], i % (k + 1)
            draw = ["baseline"] if m == k else ["completions", self.step]
            row = {
                "row": self._places[r], "prompt": self.prompts[r].given, "completion": given.text,
                "baseline": m == k, "seed": [self.config.seed, "rluf", *draw],
            }  # fmt: skip
            if "log_ratio" in known:
                row["log_ratio"] = float(known["log_ratio"][i])
            if "scores" in known:
                scores = known["scores"]
                row["scores"] = dict(zip(scores.names, scores.values[i].tolist(), strict=True))
                row |= {"error": scores.errors[i]} if scores.errors[i] else {}
            found.append(row)
        return found

    def finish(self, world: World) -> dict[str, float]:
        """Go on to the next step, and return what the completions of this one were like."""
        found, self._sums = self._sums.metrics(), _Sums()
        self.step += 1
        return found

    def state(self) -> dict[str, Any]:
        """Return the step, which names the draws, and how many prompts went by without a valid completion."""
        return {"step": self.step, "barren": self.barren}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Set what `state` returned."""
        self.step, self.barren = int(state["step"]), int(state["barren"])

    # One microbatch

    def _draw(self, models: Models, rows: Sequence[int], prompts: Sequence[Prompt], world: World) -> list[Answer]:
        """Return k completions of the policy and, last, the baseline of each prompt."""
        sampling, config = self.config.sampling, self.config
        how: dict[str, Any] = {
            "batch": sampling.batch, "half": config.model.dtype == "bf16", "synced": world.size > 1,
        }  # fmt: skip

        def decoding(*key: int | str) -> Decoding:
            return Decoding(
                sampling.max_new_tokens, sampling.temperature, sampling.top_p, derive_seed(config.seed, "rluf", *key)
            )

        k = sampling.completions
        own = answer(models.plain, prompts, self.tokenizer, decoding("completions", self.step), count=k, **how)
        if config.objective.baseline == "row":
            base = [self.own[i] for i in rows]
        else:
            with models.before().model() as before:
                base = answer(before, prompts, self.tokenizer, decoding("baseline"), **how)
        return [a for p in range(len(prompts)) for a in (*own[p * k : (p + 1) * k], base[p])]

    def _free_logps(
        self, models: Models, sequences: Sequence[tuple[np.ndarray, np.ndarray]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the log-probs of completions under policy and reference, without gradient."""
        size, pad = self.config.sampling.batch, self.tokenizer.pad_token_id
        device = next(models.plain.parameters()).device
        found: tuple[list[float], list[float]] = ([], [])
        for start in range(0, len(sequences), size):
            batch = send_to_device(collate(sequences[start : start + size], pad), device)
            for values, score in zip(found, (models.free_logps, models.reference_logps), strict=True):
                values.extend(score(batch).per_row().double().tolist())
        return np.array(found[0]), np.array(found[1])

    def _learn(
        self, models: Models, plan: Plan, sequences: Sequence[Any], reference: np.ndarray, share: range, totals: Totals
    ) -> RowLosses:
        """Return the losses of this process's terms; without any it runs a completion of weight 0, as all must run."""
        members = self.config.sampling.completions + 1
        places = [i for i, (p, _) in enumerate(plan.picked) if p in share]
        picked = [plan.picked[i] for i in places] or [(share.start, 0)]
        rows = [(p - share.start) * members + m for p, m in picked]
        device = next(models.plain.parameters()).device
        batch = send_to_device(collate([sequences[i] for i in rows], self.tokenizer.pad_token_id), device)
        logp = models.logps(batch).per_row()
        weight = torch.tensor(plan.weight[places] if places else [0.0], dtype=torch.float32, device=device)
        prompt = torch.tensor([p - share.start for p, _ in picked], device=device)
        if self.config.objective.loss == "codpo" and places:
            half = len(rows) // 2
            before = torch.tensor(reference[rows], dtype=torch.float32, device=device)
            length = torch.tensor([len(sequences[i][1]) for i in rows[:half]], device=device)
            terms = codpo(
                logp[:half], logp[half:], before[:half], before[half:], length, beta=self.config.objective.beta,
                sft_weight=self.config.objective.sft_weight,
            ).loss  # fmt: skip
            prompt = prompt[:half]
        else:
            terms = {"crpg": crpg, "crraft": crraft}.get(self.config.objective.loss, crpg)(logp, weight).loss
        losses = torch.zeros(len(share), device=device).index_add(0, prompt, terms)
        return RowLosses(losses.sum() / totals.rows, losses, {}, batch["attention_mask"])

    # Guards

    def _require_reference(self, log_ratio: np.ndarray, answers: Sequence[Answer], world: World) -> None:
        """Before the first update the policy is the reference, so every log-ratio is 0 up to rounding."""
        if self.step:
            return
        each = np.abs(log_ratio) / np.array([max(1, len(a.tokens)) for a in answers])
        worst, allowed = max(world.gather(float(each.max()))), REFERENCE_TOLERANCE[self.config.model.dtype]
        if not worst <= allowed:
            raise GuardError(
                "The policy is not the reference before the first update", where="step 1",
                why=f"a log-ratio of {worst:.2g} nats a token, where rounding leaves {allowed:.0e}",
                do="Look for dropout, another precision, or a reference that is another model",
            )  # fmt: skip

    def _require_valid(self, plan: Plan, group: Group) -> None:
        """Stop a run that learns from nothing: no valid completion for `objective.patience` prompts in a row."""
        patience = self.config.objective.patience
        for some in plan.valid.any(1):
            self.barren = 0 if some else self.barren + 1
            if self.barren >= patience:
                break
        else:
            return
        own = np.tile(np.arange(group.log_ratio.shape[1]) < group.log_ratio.shape[1] - 1, len(group.log_ratio))
        shares = [
            f"{name} passes {group.said.passed[own, j].mean():.0%}"
            + (f" and gives no answer for {failed:.0%}" if (failed := group.said.failed[own, j].mean()) else "")
            for j, name in enumerate(self.suite.judges)
        ]
        within = (group.log_ratio[:, :-1] <= self.config.objective.kl_max).mean()
        raise GuardError(
            f"No completion was valid for {patience} prompts in a row", where=f"step {self.step + 1}",
            why="; ".join([*shares, f"{within:.0%} of the last completions are within objective.kl_max"]),
            do="Nothing was trained on this step. Look at that judge, or raise objective.kl_max or objective.patience",
        )  # fmt: skip

    # Evaluation

    def heldout(self, answers: HeldOut) -> dict[str, Any]:
        """Return rewards, judges and R of answers to held-out prompts, beside those of the model before training.

        Scores and verdicts are put into the rows of generations.jsonl.
        """
        scores = self._scored(answers.prompts, answers.answers, answers.world)
        if self._baseline is None and answers.before:
            self._baseline = self._scored(answers.prompts, answers.before, answers.world)
        before, said = self._baseline, self.suite.judge(scores)
        for row, values, passed in zip(answers.rows, scores.values, said.all_passed, strict=True):
            named = zip(scores.names, values, strict=True)
            row["scores"] = {name: float(v) if np.isfinite(v) else None for name, v in named}
            row["passed"] = bool(passed)
        clusters = np.array([prompt.key for prompt in answers.prompts])
        found = answer_scores(self.suite, scores, before, answers.log_ratio, self.config.objective.kl_max, clusters)
        return {**found, **self._watched(answers, said, None if before is None else self.suite.judge(before), clusters)}

    def _watched(
        self, answers: HeldOut, said: Judgement, before: Judgement | None, clusters: np.ndarray
    ) -> dict[str, Any]:
        """Return what frozen judges say of answers, and the monitor's verdict, which is kept too."""
        judge, found = None, {}
        if self._judges is not None:
            judged = self._judges.judge(self._scored(answers.prompts, answers.answers, answers.world, self._judges))
            judge = judged.rewards @ self._judges.weights
            for k, name in enumerate(self._judges.names):
                known = np.isfinite(judged.shown[:, k])
                if known.any():
                    found[f"heldout/{name}"] = bootstrap_mean(judged.shown[known, k], clusters[known]).as_dict()
        if before is None or self.config.monitor.action == "off":
            return found
        if self._monitor is None:
            first = None
            if self._judges is not None:
                kept = self._scored(answers.prompts, answers.before, answers.world, self._judges)
                first = self._judges.judge(kept).rewards @ self._judges.weights
            self._monitor = Monitor(
                self.config.monitor, clusters.tolist(), np.full(len(clusters), 0.5), first,
                [given.text for given in answers.before],
            )  # fmt: skip
        calibrated = calibrated_reward(torch.from_numpy(said.rewards), torch.from_numpy(before.rewards))
        self.verdict = self._monitor.observe(
            answers.step, calibrated.numpy() @ self.suite.weights, judge, [given.text for given in answers.answers]
        )  # what is trained on: R_hat, of which the baseline has one half
        return {**found, "monitor": self.verdict.as_dict()}

    def _scored(
        self, prompts: Sequence[Prompt], answers: Sequence[Answer], world: World, suite: Suite | None = None
    ) -> Scores:
        """Score answers, each process its share."""
        mine = world.share(len(prompts))
        part = (suite or self.suite).score(as_samples(prompts[mine.start : mine.stop], answers[mine.start : mine.stop]))
        return stack_scores(world.gather(part))


def answer_scores(
    suite: Suite, scores: Scores, before: Scores | None, log_ratio: np.ndarray | None, kl_max: float,
    clusters: np.ndarray,
) -> dict[str, Any]:  # fmt: skip
    """Return what an evaluation says of answers, every mean with a 95 % interval by prompts.

    Args:
        suite: rewards and judges.
        scores: of the model's answers.
        before: of the answers of the model before training to the same prompts, the baseline.
        log_ratio: of the answers, `[P]`.
        kl_max: largest of a valid answer.
        clusters: prompt of each answer.

    Returns:
        `reward/NAME`; `gain/NAME`, the change answer by answer; `win/NAME`, the share above the baseline's, ties
        half; `judge/NAME` and `judge/all`, the share that passes; `judge_errors`; `constrained`, the mean of R.
    """
    said, found = suite.judge(scores), {}
    base = None if before is None else suite.judge(before)

    def mean(name: str, values: np.ndarray) -> None:
        known = np.isfinite(values)
        if known.any():
            found[name] = bootstrap_mean(values[known], clusters[known]).as_dict()

    for k, name in enumerate(suite.names):
        mean(f"reward/{name}", said.shown[:, k])
        if base is not None:
            gain = said.shown[:, k] - base.shown[:, k]
            mean(f"gain/{name}", gain)
            mean(f"win/{name}", np.where(np.isfinite(gain), (gain > 0) + 0.5 * (gain == 0), np.nan))
    for j, name in enumerate(suite.judges):
        mean(f"judge/{name}", said.passed[:, j].astype(float))
    mean("judge/all", said.all_passed.astype(float))
    found["judge_errors"] = float(said.failed.sum())
    if base is not None and log_ratio is not None:
        calibrated = calibrated_reward(torch.from_numpy(said.rewards), torch.from_numpy(base.rewards))
        reward = calibrated @ torch.from_numpy(suite.weights)
        valid = is_valid(torch.from_numpy(said.all_passed), torch.from_numpy(log_ratio), kl_max)
        mean("constrained", constrained_reward(reward, valid).numpy())
    return found


def _rewards_of(scores: Scores, suite: Suite) -> Scores:
    """Return the columns of the rewards: a judge without an answer is counted, and stops nothing by itself."""
    count = len(suite.names)
    return Scores(scores.values[:, :count], scores.valid[:, :count], suite.names, scores.errors)


def _said(row: Completion) -> str:
    """Return the text of a row's completion."""
    if isinstance(row.completion, str):
        return row.completion
    return "\n".join(str(message.get("content") or "") for message in row.completion)
