"""Held-out evaluation: the same prompts and the same noise before, during and after training.

Noise is a function of (seed, prompt, member), so two evaluations are paired sample by sample, and the
change between them is estimated from differences, with whole prompts resampled in the bootstrap.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from align.config import ModelConfig, RewardConfig, VisualConfig
from align.diffusion.families import Size
from align.diffusion.kernels import KERNELS, step_table
from align.diffusion.policy import Policy, resolve_model
from align.diffusion.rollout import as_samples, decode, initial_noise, solve
from align.errors import ConfigError, KernelError
from align.groupstats import Estimate, bootstrap_mean
from align.image_feedback import distinct_prompts
from align.launch import World
from align.offline_config import OfflineConfig
from align.prompts import PromptSet, load_prompts, training_and_heldout
from align.registry import suggest
from align.seeding import normal
from align.tracking import counting
from align.types import Prompt, Samples, text_of
from rewards.meters import measure_pixels
from rewards.panel import Panel
from trainers.sources import NAME_PROMPTS, find_source


def generate(
    policy: Policy,
    prompts: Sequence[Prompt],
    members: int,
    *,
    seed: int,
    solver_steps: int,
    shift: float | None = None,
    sampler: str = "ode",
    eta: float = 0.0,
    batch: int | None = None,
    tell: Callable[[int, int], None] | None = None,
) -> Samples:
    """Sample `members` images or videos a prompt, each from its own noise; member fastest.

    Args:
        sampler, eta: the kernel, one of `align.diffusion.kernels.KERNELS`. All noise is a function of the seed, the
            prompt and the member.
        batch: sampled at once; as many as 256 images of 64 x 64 latents are worth when None.
        tell: called with (done, total) after each batch.
    """
    shape = policy.latent_shape
    batch = batch or max(1, min(256, (256 << 12) // math.prod(shape[1:])))
    table = step_table(sampler, eta, policy.family.schedule(solver_steps, shift, shape))
    flat = [p for p in prompts for _ in range(members)]
    pixels = []
    for start in range(0, len(flat), batch):
        rows = range(start, min(start + batch, len(flat)))
        keys = [(seed, "evaluation", str(flat[r]), r % members) for r in rows]

        def fresh(step: int, keys: list[tuple[int | str, ...]] = keys) -> torch.Tensor:
            return torch.stack([normal(shape, *key, step, "sde") for key in keys])

        noise = torch.cat([initial_noise(shape, [0], 1, "none", *key) for key in keys])
        pixels.append(decode(policy, solve(policy, noise, [flat[r] for r in rows], table, fresh=fresh).x0))
        if tell is not None:
            tell(rows.stop, len(flat))
    return as_samples(policy, torch.cat(pixels), flat)


def size_of(samples: Samples) -> dict[str, float]:
    """Return what was made: height, width, and of videos frames and frames a second."""
    if samples.videos is None:
        return dict(zip(("height", "width"), samples.images.shape[-2:], strict=True))
    frames, _, height, width = samples.videos[0].frames.shape
    return {"height": height, "width": width, "frames": frames, "fps": samples.videos[0].fps}


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
    """Scores of N evaluation samples, by name `[N]`, with the samples' prompts and members, and their size."""

    prompts: list[str]
    members: list[int]
    values: dict[str, np.ndarray]
    diversity: float
    seconds: float
    extras: dict[str, np.ndarray] = field(default_factory=dict)
    size: dict[str, float] = field(default_factory=dict)

    def column(self, name: str) -> np.ndarray:
        """Return a value or an extra by its name, `[N]`; empty when there is none."""
        return self.values.get(name, self.extras.get(name, np.empty(0)))

    def estimate(self, name: str) -> Estimate:
        """Return the mean of a value with an interval clustered by prompt."""
        return bootstrap_mean(self.values[name], np.asarray(self.prompts))

    def before(self, base: Measurement, name: str) -> np.ndarray:
        """Return what `base` has of these samples, `[N]`; NaN where it has them not."""
        found = dict(zip(zip(base.prompts, base.members, strict=True), base.values[name], strict=True))
        return np.array([found.get(key, np.nan) for key in zip(self.prompts, self.members, strict=True)])

    def gain(self, base: Measurement, name: str) -> Estimate:
        """Return the paired difference `self - base` on the samples both have, clustered by prompt."""
        return bootstrap_mean(self.values[name] - self.before(base, name), np.asarray(self.prompts))

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
        size=parts[0]["size"],
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
    return {"values": values, "extras": extras, "variances": _variances(samples, flat), "size": size_of(samples)}


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
class Sampling:
    """How samples are made. What is None is the run's own, of its `evaluation` first; outside of a run the pipeline's.

    Args:
        sampler: "ode", or another of `align.diffusion.kernels.KERNELS`.
        eta: the noise it adds; may be None where the sampler is the run's kernel.
        solver_steps: 20 outside of a run.
        guidance_scale: of classifier-free guidance; 1 is none.
        embedded_guidance: the scale that a guidance-distilled denoiser is told.
        height, width, frames, fps: what to make.
        seed: 0 outside of a run.
        shift: time shift of a flow's levels.
        batch: samples made at once; derived when None.

    Raises:
        KernelError: an unknown sampler.
        ConfigError: a number that is out of range.
    """

    sampler: str = "ode"
    eta: float | None = None
    solver_steps: int | None = None
    guidance_scale: float | None = None
    embedded_guidance: float | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    fps: float | None = None
    seed: int | None = None
    shift: float | None = None
    batch: int | None = None

    def __post_init__(self) -> None:
        if self.sampler not in KERNELS:
            raise KernelError(f"Unknown sampler {self.sampler!r}", where="sampler", do=suggest(self.sampler, KERNELS))
        for name, value in dataclasses.asdict(self).items():
            low = 0 if name in ("eta", "guidance_scale", "embedded_guidance", "seed") else None
            if isinstance(value, (int, float)) and not (value > 0 or value == low):
                raise ConfigError(
                    "A number is out of range", where=name, why=f"it is {value:g}",
                    do="Give 0 or more" if low == 0 else "Give more than 0",
                )  # fmt: skip
        if self.sampler == "ode" and self.eta:
            raise ConfigError("The ode sampler adds no noise", where="eta", do="Choose another sampler")

    def within(self, config: VisualConfig | None) -> dict[str, Any]:
        """Return what `generate` is told beside the batch.

        Raises:
            ConfigError: a stochastic sampler without its eta, where the run trained with another.
        """
        eta = 0.0 if self.sampler == "ode" else self.eta
        if eta is None:
            if config is None or config.sampler.kernel != self.sampler:
                raise ConfigError(
                    "How much noise does the sampler add", where="eta",
                    why=f"{self.sampler} is not what this model was trained with", do="Give a number, such as 0.3",
                )  # fmt: skip
            eta = config.sampler.eta
        return {
            "seed": self.seed if self.seed is not None else (config.seed if config else 0),
            "sampler": self.sampler,
            "eta": eta,
            "solver_steps": self.solver_steps or (config.evaluation.solver_steps if config else 20),
            "shift": self.shift if self.shift is not None else (config.sampler.shift if config else None),
        }


@dataclass(frozen=True)
class Source:
    """A model to sample or evaluate: its policy, the configuration it was trained with, and its name."""

    policy: Policy
    config: VisualConfig | OfflineConfig | None
    name: str


def open_source(source: str | Path, sampling: Sampling = Sampling()) -> Source:
    """Open a run folder (its last checkpoint), a checkpoint folder, a pipeline folder, or a built-in name.

    Raises:
        CheckpointError: a run without a checkpoint.
        ConfigError: a language model.
        ModelError: not a model, or one that cannot make what `sampling` says.
    """
    from align import checkpoint

    found = find_source(source)
    if found.language:
        raise ConfigError(
            "A language model makes no images", where=str(source),
            do="Call sample_completions or evaluate_language of trainers",
        )  # fmt: skip
    told = {name: getattr(sampling, name) for name in ("height", "width", "frames", "fps", "embedded_guidance")}
    scale = sampling.guidance_scale
    if found.checkpoint is None:
        embedded = told.pop("embedded_guidance")
        policy = Policy.load(
            resolve_model(str(source)), ModelConfig(path=str(source), train="full"), seed=0, size=Size(**told),
            embedded_guidance=embedded,
        )  # fmt: skip
        return Source(policy.with_guidance(1.0 if scale is None else scale), None, str(source))
    group = checkpoint.delivered_group(found.checkpoint)
    saved = checkpoint.load(found.checkpoint, only=group)
    asked = {name: value for name, value in told.items() if value is not None}
    config = found.config.model_copy(update={"sampler": found.config.sampler.model_copy(update=asked)})
    policy = load_policy(config)
    with torch.no_grad():
        for name, parameter in policy.trainable().items():
            parameter.copy_(saved.tensors[group][name])
    scale = config.evaluation.guidance_scale if scale is None else scale
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
        raise ConfigError("A model by itself brings no prompts", where=source.name, do=NAME_PROMPTS)
    return list(resolve_prompts(source.config)[1].asked)


def _told(policy: Policy) -> dict[str, float | None]:
    return {"guidance_scale": policy.guidance_scale, "embedded_guidance": policy.embedded_guidance}


def evaluate(
    source: str | Path,
    prompts: Any = None,
    *,
    samples: int = 256,
    rewards: Sequence[str | RewardConfig] | None = None,
    out: str | Path | None = None,
    **sampling: Any,
) -> dict[str, Any]:
    """Measure a run, checkpoint or model folder on prompts it was not trained on.

    Args:
        source: see `open_source`.
        prompts: a file, a list of texts or one text; a run's held-out prompts when None.
        samples: images in all, spread evenly over the prompts.
        rewards: names; a run's held-out rewards when None.
        out: a JSON-lines file to write every sample's scores to.
        sampling: fields of `Sampling`: `sampler`, `eta`, `solver_steps`, `guidance_scale`, `seed`, `height`, ...

    Returns:
        the mean of every reward with its interval, diversity, and what was sampled how.
    """
    asked = Sampling(**sampling)
    opened = open_source(source, asked)
    how = asked.within(opened.config)
    names = _prompts_for(opened, prompts)
    chosen = [RewardConfig(name=r) if isinstance(r, str) else r for r in rewards or ()]
    if rewards is None and opened.config is not None:
        chosen = list(opened.config.heldout_rewards or getattr(opened.config, "rewards", ()))
    if not chosen:
        raise ConfigError("Which reward", where=opened.name, do="Name one with rewards=; `align rewards` lists them")
    members, panels = members_for(samples, len(names)), {"reward": Panel.build(chosen)}
    measured = measure(opened.policy, names, members, panels, batch=asked.batch, tell=counting("evaluated"), **how)
    if out is not None:
        write_rows(Path(out), measured)
    return {
        "source": opened.name,
        "prompts": len(names),
        "samples": len(measured.prompts),
        **how,
        **_told(opened.policy),
        **measured.size,
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
    source: str | Path, prompts: Any = None, *, count: int = 4, out: str | Path | None = None, **sampling: Any
) -> Path:
    """Write `count` images or videos a prompt, `grid.png`, and `samples.jsonl` that says which is which, and how made.

    Images are PNG files, videos MP4 files, of which the grid shows frames. `sampling` are fields of `Sampling`. They go
    to `out`: when None, to `sampled` in the folder of a run, else to `samples` here.
    """
    from align.tracking import save_grid, save_image
    from align.videos import STRIP_WIDTH, save_video, still_images

    asked = Sampling(**sampling)
    opened = open_source(source, asked)
    how = asked.within(opened.config)
    names = _prompts_for(opened, prompts)
    made = generate(opened.policy, names, count, batch=asked.batch, tell=counting("sampled"), **how)
    how |= {**_told(opened.policy), **size_of(made)}
    folder = find_source(source).sampled if out is None else Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "samples.jsonl").open("w", encoding="utf-8") as file:
        for i, prompt in enumerate(made.prompts):
            kind = "image" if made.videos is None else "video"
            name = f"{i // count:04d}_{i % count:02d}.{'png' if kind == 'image' else 'mp4'}"
            if made.videos is None:
                save_image(folder / name, made.images[i])
            else:
                save_video(folder / name, made.videos[i])
            file.write(json.dumps({kind: name, "prompt": prompt, "member": i % count, **how}) + "\n")
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
