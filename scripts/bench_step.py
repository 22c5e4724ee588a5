"""What a DanceGRPO iteration costs beside its model, and beside three other ways to run it.

    python scripts/bench_step.py --json bench.json [--recipe digits/dance_grpo] [--rounds 5]

model_share          bare denoiser forwards and backwards of the same shapes / a whole iteration (>= .85)
vs_batched_loop      our iteration / a straightforward batched loop on autograd               (<= 1.0)
vs_official_loop     our iteration / one (sample, step) at a time, as the released code does
rollout_vs_pipeline  a plain pipeline call / our rollout: same batch, steps and guidance      (>= .90)

Arms alternate within each round and the medians of the rounds' ratios are reported. Times are CUDA events on a GPU and
CPU time of the process otherwise, but for `iteration_parts`, wall-clock as a run counts its own. What guards cost is
measured by `bench_guards.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from measuring import cost, over_rounds

from align.config import load_config
from align.diffusion.rollout import initial_noise, sample
from align.diffusion.schedules import trained_subset
from align.ledger import trained_step_count
from align.run import describe_machine
from align.seeding import permutation
from trainers import DanceGRPO
from trainers.advantages import group_advantages


class Bench:
    """One trainer, and the same iteration done in the other ways on the same weights and batch."""

    def __init__(self, recipe: str | Mapping[str, Any], folder: str) -> None:
        self.config = load_config(recipe)
        self.trainer = DanceGRPO(self.config, out=folder)
        self.policy, self.table = self.trainer.policy, self.trainer.table_at(1)
        self.prompts = list(self.trainer.prompts.at(1, self.config.prompts_per_step, self.config.seed))
        self.flat = [p for p in self.prompts for _ in range(self.config.group_size)]
        self.policy.encodings.add([*self.prompts, ""])
        self.run = self.trainer.open_run()
        self.count = trained_step_count(
            self.config.sampler.solver_steps, self.config.trained_steps.fraction, self.config.trained_steps.rule
        )
        self.parts: dict[str, float] = {}
        self.guided = self.config.sampler.guidance == "both_branches"

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the block's seconds to `parts[name]`."""
        began = time.perf_counter()
        yield
        self.parts[name] = self.parts.get(name, 0.0) + time.perf_counter() - began

    def rollout(self) -> object:
        """Our rollout with log-probs, trajectories and decoded images."""
        c = self.config
        return sample(
            self.policy, self.prompts, group_size=c.group_size, table=self.table,
            key=(c.seed, 1), noise_scope=c.sampler.initial_noise,
            batch=self.trainer._batches(self.run)[0], reduction=c.objective.logprob_reduction,
        )  # fmt: skip

    def ours(self) -> None:
        """One iteration of the trainer, itemised."""
        with self.part("rollout"):
            rollout = self.rollout()
        self.move(rollout.decode_seconds, "rollout", "decode")
        with self.part("reward"):
            scores = self.trainer.rewards.score(rollout.samples)
            self.trainer._require_finite(rollout, 1)
            self.trainer.rewards.require_scored(scores, "step 1")
            composed = self.trainer.rewards.compose(scores, self.config.group_size)
            advantages = group_advantages(
                composed.scores, self.config.group_size, composed.weights, **self.config.advantage.model_dump()
            )
        with self.part("train"):
            stats = self.trainer.learn(self.run, rollout, advantages, 1)
        self.move(self.run._optimizer_seconds, "train", "optimizer")
        self.run._optimizer_seconds = 0.0
        with self.part("log"):
            self.run.log.metrics({"step": 0, **{n: stats.mean(n) for n in stats.sums}})

    def move(self, seconds: float, source: str, name: str) -> None:
        """Count seconds of the part `source` as a part of their own."""
        self.parts[source] -= seconds
        self.parts[name] = self.parts.get(name, 0.0) + seconds

    def bare_model(self) -> None:
        """The denoiser calls of an iteration, and nothing else: same count, shapes and gradients."""
        batch = len(self.flat)
        x = torch.randn(batch, *self.trainer.policy.latent_shape, device=self.policy.device)
        t = torch.full((batch,), 500.0, device=self.policy.device)
        cond = self.policy.encodings.stack(self.flat)
        if self.guided:
            x, t, cond = torch.cat([x, x]), torch.cat([t, t]), {k: torch.cat([v, v]) for k, v in cond.items()}
        with torch.no_grad():
            for _ in range(len(self.table)):
                self.policy.family.predict(x, t, cond)
        for _ in range(self.count):
            self.policy.family.predict(x, t, cond).sum().backward()
        self.run.engine.optimizer.zero_grad()

    def _plain_rollout(self, flat: list[str], noise: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        eta, sigmas = self.config.sampler.eta, self.sigmas
        x, path, logps = noise, [noise], []
        with torch.no_grad():
            for i, t in enumerate(self.timesteps):
                v = self._model(x, t.expand(len(flat)), flat)
                mean, std = self._sde(x, v, i, eta)
                x = mean + std * torch.randn_like(x) if sigmas[i + 1] > 0 else x - sigmas[i] * v
                logps.append(self._logp(x, mean, std))
                path.append(x)
        return path, logps

    def _model(self, x: torch.Tensor, t: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        cond = self.policy.encodings.stack(prompts)
        if not self.guided:
            return self.policy.family.predict(x, t, cond)
        none = self.policy.encodings.stack([""] * len(prompts))
        both = {k: torch.cat([none[k], cond[k]]) for k in cond}
        uncond, text = self.policy.family.predict(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return uncond + self.policy.guidance_scale * (text - uncond)

    def _sde(
        self, x: torch.Tensor, v: torch.Tensor, i: int | torch.Tensor, eta: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (-1, *[1] * (x.ndim - 1)) if torch.is_tensor(i) else ()
        s, n = self.sigmas[i].reshape(shape), self.sigmas[i + 1].reshape(shape)
        score = -(x - (1 - s) * (x - s * v)) / s**2
        return x - (s - n) * v + 0.5 * eta**2 * (s - n) * score, eta * (s - n).sqrt()

    @staticmethod
    def _logp(x: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
        return (-((x - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)).flatten(1).mean(1)

    def plain_loop(self, chunk: int | None) -> None:
        """A straightforward DanceGRPO iteration: `chunk` samples a forward (None: the whole minibatch)."""
        c = self.config
        scheduler = self.policy.family.pipeline.scheduler
        scheduler.set_timesteps(c.sampler.solver_steps, device=self.policy.device)
        self.sigmas, self.timesteps = scheduler.sigmas, scheduler.timesteps
        rows = range(len(self.flat))
        noise = initial_noise(self.trainer.policy.latent_shape, rows, c.group_size, c.sampler.initial_noise, 0, 1)
        noise = noise.to(self.policy.device)
        size = chunk or len(self.flat)
        parts = [
            self._plain_rollout(self.flat[i : i + size], noise[i : i + size]) for i in range(0, len(self.flat), size)
        ]
        path = torch.stack([torch.cat([p[0][s] for p in parts]) for s in range(len(self.table) + 1)], 1)
        logps = torch.stack([torch.cat([p[1][s] for p in parts]) for s in range(len(self.table))], 1)
        from align.diffusion.rollout import decode
        from align.types import Samples

        scores = self.trainer.rewards.score(Samples(prompts=self.flat, images=decode(self.policy, path[:, -1])))
        rewards = (
            torch.tensor(scores.values @ np.asarray(self.trainer.rewards.weights)).float().reshape(-1, c.group_size)
        )
        adv = (
            ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-8))
            .reshape(-1)
            .clamp(-5, 5)
            .to(path.device)
        )
        order = permutation(len(self.flat), 0, 1, "plain")
        for rows in np.array_split(order, c.updates_per_step):
            steps = torch.tensor([trained_subset(self.table.stochastic_steps, self.count, 0, int(r)) for r in rows])
            for start in range(0, len(rows), chunk or len(rows)):
                pick = torch.as_tensor(rows[start : start + (chunk or len(rows))])
                for j in range(self.count):
                    s = steps[start : start + len(pick), j]
                    x, x_next = path[pick, s], path[pick, s + 1]
                    v = self._model(x, self.timesteps[s], [self.flat[i] for i in pick.tolist()])
                    logp = self._logp(x_next, *self._sde(x, v, s, c.sampler.eta))
                    ratio = (logp - logps[pick, s]).exp()
                    clip = c.objective.clip_range
                    loss = torch.maximum(-adv[pick] * ratio, -adv[pick] * ratio.clamp(1 - clip, 1 + clip))
                    (loss.sum() / (len(rows) * self.count)).backward()
            torch.nn.utils.clip_grad_norm_(list(self.run.parameters.values()), 1.0)
            self.run.engine.optimizer.step()
            self.run.engine.optimizer.zero_grad()

    def pipeline_call(self) -> None:
        """A plain diffusers call: same batch, steps, guidance and decoding, prompts encoded beforehand."""
        pipe, cond = self.policy.family.pipeline, self.policy.encodings.stack(self.flat)
        none = self.policy.encodings.stack([""] * len(self.flat))
        pipe(
            prompt_embeds=cond["encoder_hidden_states"], pooled_prompt_embeds=cond["pooled_projections"],
            negative_prompt_embeds=none["encoder_hidden_states"],
            negative_pooled_prompt_embeds=none["pooled_projections"], num_inference_steps=len(self.table),
            guidance_scale=self.policy.guidance_scale if self.guided else 1.0,
            output_type="pt",
        )  # fmt: skip


def main() -> None:
    """Run the arms and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, help="file to write the figures to")
    parser.add_argument("--recipe", default="digits/dance_grpo", help="recipe name or config file")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of alternating arms; medians are reported")
    parser.add_argument(
        "--official-share", type=int, default=8, help="the step-by-step loop runs on 1/N of the batch, times N"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args.recipe, folder + "/run")
        for warm in (bench.ours, bench.bare_model, lambda: bench.plain_loop(None), bench.pipeline_call):
            warm()
        bench.parts.clear()
        rows: list[dict[str, float]] = []
        for _ in range(args.rounds):
            row = {"ours": cost(bench.ours), "bare_model": cost(bench.bare_model)}
            row["batched_loop"] = cost(lambda: bench.plain_loop(None))
            row["rollout"] = cost(bench.rollout)
            row["pipeline"] = cost(bench.pipeline_call)
            rows.append(row)
        iteration_parts = {k: v / args.rounds for k, v in bench.parts.items()}
        flat, prompts = bench.flat, bench.prompts
        bench.prompts = prompts[: max(1, len(prompts) // args.official_share)]
        bench.flat = flat[: len(bench.prompts) * bench.config.group_size]
        official = cost(lambda: bench.plain_loop(1)) * len(flat) / len(bench.flat)
    median = {k: statistics.median(r[k] for r in rows) for k in rows[0]}

    ratios = {
        "model_share": [r["bare_model"] / r["ours"] for r in rows],
        "vs_batched_loop": [r["ours"] / r["batched_loop"] for r in rows],
        "vs_official_loop": [r["ours"] / official for r in rows],
        "rollout_vs_pipeline": [r["pipeline"] / r["rollout"] for r in rows],
    }
    result = {
        **{key: value for name, values in ratios.items() for key, value in over_rounds(name, values).items()},
        "seconds": {**median, "official_loop": official},
        "iteration_parts": iteration_parts,
        "spread": {k: [min(r[k] for r in rows), max(r[k] for r in rows)] for k in rows[0]},
        "recipe": args.recipe,
        "rounds": args.rounds,
        **describe_machine(),
    }
    with open(args.json, "w", encoding="utf-8") as file:
        json.dump(result, file, indent=1)
    sys.stdout.write(json.dumps({k: v for k, v in result.items() if isinstance(v, float)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
