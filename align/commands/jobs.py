"""What a configured run holds and computes, for `align plan`: counted on its architecture, or timed here."""

from __future__ import annotations

import functools
import re
import statistics
import time
from pathlib import Path
from typing import Any

from align.errors import ConfigError
from align.footprint import Footprint
from align.plan import Job

ROWS = 8
"""Rows of a forward that is timed, at most: one alone leaves a processor idle."""


def describe_job(config: Any) -> tuple[Job, dict[str, Any]]:
    """Return what a run needs, and what is said of its model.

    Raises:
        ConfigError: a model whose size nothing tells, or a run that one process does in seconds.
    """
    if config.language:
        return _language(config)
    if config.trainer == "fit":
        return _fit(config)
    if config.trainer == "peering":
        raise ConfigError("Peering runs in one process", where="trainer", do="Plan the fits that it is made of")
    return _visual(config)


def _visual(config: Any) -> tuple[Job, dict[str, Any]]:
    from align.diffusion.footprint import ENCODERS, architecture, blocks
    from align.diffusion.policy import resolve_model
    from align.ledger import feq_ledger
    from align.offline_checks import offline_ledger
    from align.published import denoiser_size, is_builtin, latent_shape, published

    model, local = config.model, not published(config.model)
    if is_builtin(model.path):
        model = model.model_copy(update={"path": str(resolve_model(model.path))})
        config = config.model_copy(update={"model": model})
    size = denoiser_size(model)
    if size is None:
        raise _unknown(model.path, "its folder has no weights")
    known, shape, made = published(model), latent_shape(config), architecture(model)
    family = known.family if known else _pipeline_class(model.path)
    half, full, offline = model.dtype == "bf16", model.train == "full", config.trainer == "offline"
    width = 2.0 if half else 4.0
    foot = Footprint(0.0, 0.0)
    if made is not None and shape is not None:
        sides = getattr(config.sampler, "guidance", "off")
        foot = _denoiser_footprint(
            made[0], repr(sorted(made[1].items())), shape, half, None if full else model.lora.rank,
            _targets(family, model), model.gradient_checkpointing, 2 if sides == "both_branches" else 1, model.path,
            model.family,
        )  # fmt: skip
    ledger = offline_ledger(config) if offline else feq_ledger(config)
    encoders = width * ENCODERS.get(family, 0.0) if known else width * _other_weights(Path(model.path))
    widest, outside = blocks(*made) if made is not None else (0, 0)
    lagging = config.trainer == "forward" and getattr(config.objective, "old_policy", "step") != "step"
    job = Job(
        "visual", trained=size[0] if full else size[1] * model.lora.rank,
        frozen=0.0 if full else size[0] * width, beside=0.0 if model.offload else encoders, widest=widest,
        outside=outside, whole=_needs_whole(config), half=half,
        averages=int(config.optimizer.ema_decay is not None) + int(lagging),
        reference=size[0] if full and (offline or config.objective.kl_weight) else 0,
        rewards=sum(map(reward_bytes, (*getattr(config, "rewards", ()), *config.heldout_rewards))),
        encoders=encoders if model.offload else 0.0, training=foot.training or None, sampling=foot.sampling or None,
        microbatch=config.batch.tile, rows=int(ledger["samples_per_step"]), feq=float(ledger["feq_per_sample"]),
    )  # fmt: skip
    return job, _about(
        config, size[0], job, local,
        sizes="from the headers of its files" if local else "as published",
        activations=f"counted on {made[0]}" if job.training and made else "unknown",
    )  # fmt: skip


def _needs_whole(config: Any) -> bool:
    """Whether a run on images cannot go on where no process has whole weights."""
    from align.engine import require_splitting
    from trainers.online import require_splittable

    try:
        require_splitting(config.trainer, "engine")
        require_splittable(config, "FSDP2")
    except ConfigError:
        return True
    return False


@functools.lru_cache(maxsize=32)
def _denoiser_footprint(
    kind: str, digest: str, shape: tuple[int, ...], half: bool, rank: int | None, targets: tuple[str, ...],
    checkpointing: bool, branches: int, path: str, family: str | None,
) -> Footprint:  # fmt: skip
    """Count once what plans of several variants ask for; `digest` stands for the architecture at `path`."""
    from align.config import ModelConfig
    from align.diffusion.footprint import architecture, denoiser_footprint

    made = architecture(ModelConfig(path=path, family=family))
    try:
        return denoiser_footprint(
            kind, made[1] if made else {}, shape, half=half, rank=rank, targets=targets, checkpointing=checkpointing,
            branches=branches,
        )  # fmt: skip
    except (AttributeError, TypeError, KeyError):  # a denoiser of another's package, or whose inputs are not known here
        return Footprint(0.0, 0.0)


def _pipeline_class(folder: str) -> str:
    from align.diffusion.families import read_index

    return read_index(Path(folder))[0]


def _targets(family: str, model: Any) -> tuple[str, ...]:
    from align.diffusion.families import FAMILIES

    return tuple(model.lora.targets or FAMILIES.get(family).lora_targets)


def _other_weights(folder: Path) -> float:
    """Return the weights of a folder's text encoders, by their files' size at 4 bytes each."""
    return sum(f.stat().st_size for f in folder.glob("*encoder*/*.safetensors")) / 4.0


def _language(config: Any) -> tuple[Job, dict[str, Any]]:
    from align.footprint import language_footprint, language_size, read_config
    from align.language_checks import describe_language_config
    from trainers.language_model import resolve_language_model
    from trainers.language_reference import reference_mode

    model = config.model
    folder = resolve_language_model(model.path)
    made = read_config(folder)
    if made is None:
        raise _unknown(model.path, "there is no config.json of it here")
    half, full = model.dtype == "bf16", model.train == "full"
    size = language_size(made, None if full else model.lora.targets)
    many = {"dpo": 2, "rluf": config.sampling.completions if config.trainer == "rluf" else 1}.get(config.trainer, 1)
    tokens = config.data.max_length
    foot = language_footprint(
        made, tokens=tokens, half=half, rank=None if full else model.lora.rank,
        checkpointing=model.gradient_checkpointing,
    )  # fmt: skip
    mode = reference_mode(config.reference.mode, model.train) if hasattr(config, "reference") else "none"
    rewards = (getattr(config, part, {}).values() for part in ("rewards", "heldout_rewards"))
    job = Job(
        "language", trained=size.parameters if full else size.adapted * model.lora.rank,
        frozen=0.0 if full else size.parameters * (2.0 if half else 4.0), half=half,
        reference=size.parameters if mode == "copy" else 0,
        rewards=sum(reward_bytes(reward) for part in rewards for reward in part),
        training=many * foot.training, sampling=many * foot.sampling,
        logits=4.0 * many * tokens * size.vocabulary, microbatch=config.microbatch,
        accumulation=config.batch_size // config.microbatch, rows=config.batch_size,
        feq=float(describe_language_config(config, [])["forwards"]), widest=size.widest,
        outside=max(0, size.parameters - size.depth * size.widest),
    )  # fmt: skip
    return job, _about(
        config, size.parameters, job, Path(folder).is_dir(), sizes="counted on its configuration",
        activations=f"counted on {type(made).__name__} at {tokens} tokens a row",
    )  # fmt: skip


def _fit(config: Any) -> tuple[Job, dict[str, Any]]:
    from align.footprint import language_footprint, language_size, read_config

    model = config.model
    if model.backbone != "classifier":
        raise ConfigError(
            "A head on frozen embeddings needs no plan", where=f"model.backbone {model.backbone}",
            why="one process fits it in seconds", do="Run `align fit`, or set model.backbone: classifier",
        )  # fmt: skip
    made = read_config(model.path)
    if made is None:
        raise _unknown(model.path, "there is no config.json of it here")
    full, tokens = model.train == "full", model.max_length or 512
    size = language_size(made, None if full else model.lora.targets)
    foot = language_footprint(
        made, tokens=tokens, half=False, rank=None if full else model.lora.rank, checkpointing=False
    )
    job = Job(
        "fit", trained=size.parameters if full else size.adapted * model.lora.rank,
        frozen=0.0 if full else size.parameters * 4.0, training=foot.training, sampling=foot.sampling,
        microbatch=config.batch_size, rows=config.batch_size, feq=3.0,
        widest=size.widest, outside=max(0, size.parameters - size.depth * size.widest),
    )  # fmt: skip
    return job, _about(
        config, size.parameters, job, Path(model.path).is_dir(), sizes="counted on its configuration",
        activations=f"counted on {type(made).__name__} at {tokens} tokens a row",
    )  # fmt: skip


def _unknown(path: str, why: str) -> ConfigError:
    return ConfigError(
        f"Nothing tells how large {path!r} is", where="model.path", why=why,
        do="Give a folder with its config.json and weights, or a published model's name",
    )  # fmt: skip


def _about(config: Any, parameters: int, job: Job, local: bool, *, sizes: str, activations: str) -> dict[str, Any]:
    return {
        "model": config.model.path, "train": config.model.train, "dtype": getattr(config.model, "dtype", "fp32"),
        "parameters": parameters, "trained": job.trained, "local": local, "sizes_are": sizes,
        "activations_are": activations,
    }  # fmt: skip


def reward_bytes(reward: Any) -> float:
    """Return the bytes that a reward keeps on the accelerator: float32, by its card, where it stays there."""
    from rewards import list_rewards

    if reward.args.get("placement", "resident") != "resident":
        return 0.0
    name = reward.args.get("reward", reward.name) if reward.name == "frames" else reward.name
    size = next((card.size for card in list_rewards() if card.name == name), "")
    found = re.match(r"([\d.]+) ([kMB]) weights", size)
    return 4.0 * float(found[1]) * {"k": 1e3, "M": 1e6, "B": 1e9}[found[2]] if found else 0.0


def measure_forward(config: Any) -> float:
    """Return the seconds of a forward of a configuration's model for one row: of several together, the median of three.

    It is loaded, and runs where it would train: on the accelerator, or on this CPU.
    """
    import torch

    if config.trainer == "fit":
        raise ConfigError("A classifier's forward is not timed here", where="--measure", do="Give --forward-seconds")
    if hasattr(config.model, "chat_template"):
        from trainers.language_model import load_language_model

        model = load_language_model(config.model, seed=0)
        model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        rows = min(config.microbatch, ROWS)
        ids = torch.zeros(rows, config.data.max_length, dtype=torch.long, device=next(model.parameters()).device)
        work = functools.partial(model, input_ids=ids, attention_mask=torch.ones_like(ids), logp_labels=ids)
        return _median_seconds(work) / rows
    from trainers.evaluation import load_policy

    policy = load_policy(config).with_guidance(1.0)
    rows = min(config.batch.tile or ROWS, ROWS)
    x = torch.zeros(rows, *policy.latent_shape, device=policy.device)
    times = torch.full((rows,), 500.0, device=policy.device)
    return _median_seconds(functools.partial(policy.velocity, x, times, [""] * rows)) / rows


def _median_seconds(work: Any) -> float:
    import torch

    seconds = []
    with torch.no_grad():
        for _ in range(4):  # the first one warms up
            began = time.perf_counter()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])
