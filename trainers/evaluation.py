"""Held-out evaluation: the same prompts and the same noise before, during and after training.

Noise is a function of (seed, prompt, member), so two evaluations are paired sample by sample, and the
change between them is estimated from differences, with whole prompts resampled in the bootstrap.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from align.config import ModelConfig, RewardConfig, VisualConfig
from align.diffusion.families import Size
from align.diffusion.kernels import StepTable, step_table
from align.diffusion.policy import Policy, resolve_model
from align.diffusion.rollout import as_samples, decode, initial_noise, solve
from align.errors import ConfigError
from align.groupstats import Estimate, bootstrap_mean
from align.image_feedback import distinct_prompts
from align.launch import World
from align.offline_config import OfflineConfig
from align.prompts import PromptSet, load_prompts, training_and_heldout
from align.types import Prompt, Samples, text_of
from rewards.meters import measure_pixels
from rewards.panel import Panel
from trainers.sources import find_source


def ode_table(policy: Policy, solver_steps: int, shift: float | None) -> StepTable:
    """Tabulate the deterministic sampler of `solver_steps` steps."""
    return step_table("ode", 0.0, policy.family.schedule(solver_steps, shift, policy.latent_shape))


def generate(
    policy: Policy,
    prompts: Sequence[Prompt],
    members: int,
    *,
    seed: int,
    solver_steps: int,
    shift: float | None = None,
    batch: int | None = None,
) -> Samples:
    """Sample `members` images or videos a prompt with the ODE, each from its own noise; member fastest.

    Args:
        batch: sampled at once; as many as 256 images of 64 x 64 latents are worth when None.
    """
    shape = policy.latent_shape
    batch = batch or max(1, min(256, (256 << 12) // math.prod(shape[1:])))
    table = ode_table(policy, solver_steps, shift)
    flat = [p for p in prompts for _ in range(members)]
    pixels = []
    for start in range(0, len(flat), batch):
        rows = range(start, min(start + batch, len(flat)))
        noise = torch.cat(
            [initial_noise(shape, [0], 1, "none", seed, "evaluation", str(flat[r]), r % members) for r in rows]
        )
        x0 = solve(policy, noise, [flat[r] for r in rows], table).x0
        pixels.append(decode(policy, x0))
    return as_samples(policy, torch.cat(pixels), flat)


def _variances(samples: Samples, prompts: Sequence[Prompt]) -> list[float]:
    """Pixel variance over the members of each prompt, averaged over pixels; diversity is the root of their mean."""
    pixels = samples.images if samples.videos is None else [video.frames for video in samples.videos]
    groups: dict[Prompt, list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(i)
    return [
        float(torch.stack([pixels[i] for i in rows]).double().var(0, unbiased=True).mean())
        for rows in groups.values()
        if len(rows) > 1
    ]


@dataclass(frozen=True)
class Measurement:
    """Scores of N evaluation samples, by name `[N]`, with the samples' prompts and members."""

    prompts: list[str]
    members: list[int]
    values: dict[str, np.ndarray]
    diversity: float
    seconds: float
    extras: dict[str, np.ndarray] = field(default_factory=dict)

    def column(self, name: str) -> np.ndarray:
        """Return a value or an extra by its name, `[N]`; empty when there is none."""
        return self.values.get(name, self.extras.get(name, np.empty(0)))

    def estimate(self, name: str) -> Estimate:
        """Return the mean of a value with an interval clustered by prompt."""
        return bootstrap_mean(self.values[name], np.asarray(self.prompts))

    def gain(self, base: Measurement, name: str) -> Estimate:
        """Return the paired difference `self - base` on the samples both have, clustered by prompt."""
        before = dict(zip(zip(base.prompts, base.members, strict=True), base.values[name], strict=True))
        keys = list(zip(self.prompts, self.members, strict=True))
        difference = np.array([v - before.get(k, np.nan) for k, v in zip(keys, self.values[name], strict=True)])
        return bootstrap_mean(difference, np.asarray(self.prompts))

    def rows(self) -> list[dict[str, Any]]:
        """Return one JSON-ready object a sample; a missing value is null."""
        columns = {**self.values, **self.extras}
        return [
            {"prompt": p, "member": m, **{n: (float(v[i]) if np.isfinite(v[i]) else None) for n, v in columns.items()}}
            for i, (p, m) in enumerate(zip(self.prompts, self.members, strict=True))
        ]


def measure(
    policy: Policy,
    prompts: Sequence[Prompt],
    members: int,
    panels: Mapping[str, Panel],
    *,
    world: World = World(),
    **sampler: Any,
) -> Measurement:
    """Generate `members` images a prompt and score them with every panel; each process takes its share of prompts.

    Values are named "<panel>" for the panel's weighted sum and "<panel>/<component>"; extras, such as
    the accuracy of a classifier reward, "<panel>/<extra>"; what `rewards.meters` sees, "meter/<name>".
    """
    began = time.perf_counter()
    own = [prompts[i] for i in world.share(len(prompts))]
    parts = [part for part in world.gather(_measure_share(policy, own, members, panels, sampler)) if part]

    def stacked(key: str) -> dict[str, np.ndarray]:
        return {name: np.concatenate([part[key][name] for part in parts]) for name in parts[0][key]}

    flat = [str(p) for p in prompts for _ in range(members)]
    variances = [v for part in parts for v in part["variances"]]
    return Measurement(
        prompts=flat,
        members=[i % members for i in range(len(flat))],
        values=stacked("values"),
        diversity=math.sqrt(sum(variances) / len(variances)) if variances else float("nan"),
        seconds=time.perf_counter() - began,
        extras=stacked("extras"),
    )


def _measure_share(
    policy: Policy, prompts: Sequence[Prompt], members: int, panels: Mapping[str, Panel], sampler: Mapping[str, Any]
) -> dict[str, Any]:
    """What one process measured; nothing where it has no prompt."""
    if not prompts:
        return {}
    samples = generate(policy, prompts, members, **sampler)
    values, extras = {}, {}
    for panel_name, panel in panels.items():
        scores = panel.score(samples)
        values[panel_name] = panel.total(scores, members)
        values.update({f"{panel_name}/{name}": scores.column(name) for name in scores.names})
        extras.update(
            {
                f"{panel_name}/{n}": np.asarray(v, dtype=float)
                for n, v in scores.extras.items()
                if np.shape(v) == (len(samples),)
            }
        )
    extras.update({f"meter/{name}": value for name, value in measure_pixels(samples).items()})
    flat = [p for p in prompts for _ in range(members)]
    return {"values": values, "extras": extras, "variances": _variances(samples, flat)}


def members_for(samples: int, prompts: int) -> int:
    """Return how many images a prompt make at least `samples` in all, and at least two."""
    return max(2, math.ceil(samples / prompts))


def resolve_prompts(config: VisualConfig | OfflineConfig) -> tuple[PromptSet, PromptSet]:
    """Return the training and the held-out prompts; the held-out split is the same for every run seed."""

    def digits() -> list[str]:
        from align.diffusion.digits import digit_prompts

        return digit_prompts()

    if isinstance(config, OfflineConfig):
        from trainers.offline_rows import resolve_rows

        sides = [load_prompts(distinct_prompts(rows.rows)) for rows in resolve_rows(config)]
        return sides[0], sides[1]
    return training_and_heldout(config.prompts, builtin={"digits": digits})


@dataclass(frozen=True)
class Source:
    """A model to sample or evaluate: its policy, the configuration it was trained with, and its name."""

    policy: Policy
    config: VisualConfig | OfflineConfig | None
    name: str


def open_source(source: str | Path, *, guidance_scale: float | None = None) -> Source:
    """Open a run folder (its last checkpoint), a checkpoint folder, a pipeline folder, or a built-in name.

    Raises:
        CheckpointError: a run without a checkpoint.
        ConfigError: a language model.
        ModelError: not a model.
    """
    from align import checkpoint

    found = find_source(source)
    if found.language:
        raise ConfigError(
            "A language model makes no images", where=str(source),
            do="Call sample_completions or evaluate_language of trainers",
        )  # fmt: skip
    if found.checkpoint is None:
        policy = Policy.load(resolve_model(str(source)), ModelConfig(path=str(source), train="full"), seed=0)
        return Source(policy.with_guidance(guidance_scale or 1.0), None, str(source))
    config, saved = found.config, checkpoint.load(found.checkpoint)
    policy = load_policy(config)
    delivered = saved.tensors.get("average") or saved.tensors["model"]
    with torch.no_grad():
        for name, parameter in policy.trainable().items():
            parameter.copy_(delivered[name])
    scale = guidance_scale if guidance_scale is not None else config.evaluation.guidance_scale
    return Source(policy.with_guidance(scale), config, f"{found.run} at step {saved.step}")


def load_policy(config: VisualConfig | OfflineConfig) -> Policy:
    """Load the model of a configuration, ready to train; what its sampler does not say is the policy's default."""
    said = config.sampler.model_dump()
    options = {name: said[name] for name in ("guidance", "guidance_scale", "embedded_guidance") if name in said}
    size = Size(**{name: said[name] for name in ("height", "width", "frames", "fps") if name in said})
    return Policy.load(resolve_model(config.model.path), config.model, seed=config.seed, size=size, **options)


def _prompts_for(source: Source, prompts: Any) -> list[Prompt]:
    if prompts is not None:
        single = isinstance(prompts, str) and not Path(prompts).suffix
        column = "image" if source.policy.family.takes_image else None
        if source.config is not None:
            column = source.config.prompts.image_column
        return list(load_prompts([prompts]).asked if single else load_prompts(prompts, image_column=column).asked)
    if source.config is None:
        raise ConfigError("Which prompts", where=source.name, do="Give a prompts file: a model folder brings none")
    return list(resolve_prompts(source.config)[1].asked)


def _sampler(source: Source, seed: int | None, solver_steps: int | None) -> dict[str, Any]:
    config = source.config
    return {
        "seed": seed if seed is not None else (config.seed if config else 0),
        "solver_steps": solver_steps or (config.evaluation.solver_steps if config else 20),
        "shift": config.sampler.shift if config else None,
    }


def evaluate(
    source: str | Path,
    prompts: Any = None,
    *,
    samples: int = 256,
    seed: int | None = None,
    guidance_scale: float | None = None,
    solver_steps: int | None = None,
    rewards: Sequence[str | RewardConfig] | None = None,
    out: str | Path | None = None,
) -> dict[str, Any]:
    """Measure a run, checkpoint or model folder on prompts it was not trained on, with the ODE sampler.

    Args:
        source: see `open_source`.
        prompts: a file, a list of texts or one text; a run's held-out prompts when None.
        samples: images in all, spread evenly over the prompts.
        rewards: names; a run's held-out rewards when None.
        out: a JSON-lines file to write every sample's scores to.

    Returns:
        the mean of every reward with its interval, diversity, and what was sampled how.
    """
    opened = open_source(source, guidance_scale=guidance_scale)
    names = _prompts_for(opened, prompts)
    chosen = [RewardConfig(name=r) if isinstance(r, str) else r for r in rewards or ()]
    if rewards is None and opened.config is not None:
        chosen = list(opened.config.heldout_rewards or getattr(opened.config, "rewards", ()))
    if not chosen:
        raise ConfigError("Which reward", where=opened.name, do="Name one with rewards=; `align rewards` lists them")
    sampler = _sampler(opened, seed, solver_steps)
    measured = measure(
        opened.policy, names, members_for(samples, len(names)), {"reward": Panel.build(chosen)}, **sampler
    )
    if out is not None:
        write_rows(Path(out), measured)
    return {
        "source": opened.name,
        "prompts": len(names),
        "samples": len(measured.prompts),
        "guidance_scale": opened.policy.guidance_scale,
        **{k: sampler[k] for k in ("seed", "solver_steps", "shift")},
        "sampler": "ode",
        "rewards": {name: measured.estimate(name).as_dict() for name in measured.values},
        **{
            name.removeprefix("reward/"): float(np.nanmean(v))
            for name, v in measured.extras.items()
            if np.isfinite(v).any()
        },
        "diversity": measured.diversity,
        "seconds": measured.seconds,
    }


def sample_images(
    source: str | Path,
    prompts: Any = None,
    *,
    count: int = 4,
    seed: int | None = None,
    guidance_scale: float | None = None,
    solver_steps: int | None = None,
    out: str | Path = "samples",
) -> Path:
    """Write `count` images or videos a prompt, `grid.png`, and `samples.jsonl` that says which is which.

    Images are PNG files, videos MP4 files, of which the grid shows frames.
    """
    from align.tracking import save_grid, save_image
    from align.videos import STRIP_WIDTH, save_video, still_images

    opened = open_source(source, guidance_scale=guidance_scale)
    names = _prompts_for(opened, prompts)
    sampler = _sampler(opened, seed, solver_steps)
    made = generate(opened.policy, names, count, **sampler)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "samples.jsonl").open("w", encoding="utf-8") as file:
        for i, prompt in enumerate(made.prompts):
            kind = "image" if made.videos is None else "video"
            name = f"{i // count:04d}_{i % count:02d}.{'png' if kind == 'image' else 'mp4'}"
            if made.videos is None:
                save_image(folder / name, made.images[i])
            else:
                save_video(folder / name, made.videos[i])
            file.write(json.dumps({kind: name, "prompt": prompt, "member": i % count, **sampler}) + "\n")
    longest = 256 if made.videos is None else STRIP_WIDTH
    labels = [text_of(name) for name in names]
    save_grid(folder / "grid.png", still_images(made), columns=count, labels=labels, longest=longest)
    return folder


def write_rows(path: Path, measured: Measurement) -> None:
    """Write one JSON object a sample, replacing the file as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".writing")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in measured.rows()), encoding="utf-8")
    temporary.replace(path)


def read_rows(path: Path) -> Measurement:
    """Read what `write_rows` wrote."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    columns = [key for key in rows[0] if key not in ("prompt", "member")]
    return Measurement(
        prompts=[row["prompt"] for row in rows],
        members=[row["member"] for row in rows],
        values={c: np.array([np.nan if row[c] is None else row[c] for row in rows], dtype=float) for c in columns},
        diversity=float("nan"),
        seconds=0.0,
    )
