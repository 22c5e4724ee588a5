"""Typed configs: unknown keys refused, YAML plus key=value, and where each value came from."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, Strict, ValidationError

from align.config_errors import explain, found_text
from align.config_sources import leaves, override, read_values, resolved_yaml
from align.errors import ConfigError
from align.loops import LOOPS
from align.published import is_embedded, is_ours
from align.registry import suggest
from align.textfiles import parse_scalar

__all__ = [
    "AdvantageConfig", "BatchConfig", "CheckpointConfig", "CombineConfig", "DanceGRPOConfig", "EvaluationConfig",
    "LoraConfig", "ModelConfig", "MonitorConfig", "ObjectiveConfig", "OptimizerConfig", "PromptsConfig", "RewardConfig",
    "RunConfig", "SamplerConfig", "Section", "SparsityConfig", "TextMonitorConfig", "TrackingConfig",
    "TrainedStepsConfig", "VisualConfig", "anchored", "config_origins", "config_types", "diff_configs", "load_config",
    "save_config",
]  # fmt: skip


def _number(value: Any) -> Any:
    """Let the text "1e-5", which YAML 1.1 readers make of a bare 1e-5, be the number it looks like."""
    parsed = parse_scalar(value.strip()) if isinstance(value, str) else value
    return parsed if isinstance(parsed, float) else value


def _word(value: Any) -> Any:
    """Let False, which YAML 1.1 readers make of a bare `off`, be the word it was."""
    return "off" if value is False else value


Int = Annotated[int, Strict()]
Float = Annotated[float, BeforeValidator(_number), Strict(), Field(allow_inf_nan=False)]
Bool = Annotated[bool, Strict()]
_WAITS = "how long is waited, which changes no run"
Wait = Annotated[Float, _WAITS]
_HERE = "a file or folder where there is one of this name, else a name of ours or of the hub"
LocalPath = Annotated[str, _HERE]
LocalPaths = Annotated[tuple[str, ...], _HERE]
MaybeLocalPath = Annotated[str | None, _HERE]
_PATH_ARGS = ("path", "head")
RunName = Annotated[
    str,
    Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of the run and of its folder in runs/."),
]


class Section(BaseModel):
    """A part of a config: unknown keys are refused, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class RunConfig(Section):
    """A whole config of one training loop; it knows where each value came from."""

    language: ClassVar[bool] = False
    """Whether it trains a language model on rows of text."""
    about: str = Field(default="", description="One line on what the recipe is for, shown by `align configs list`.")
    trainer: str = Field(description="The training loop.")
    name: RunName
    seed: Int = Field(default=0, ge=0, lt=2**63, description="Seed from which every random draw of the run is derived.")
    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        """Two configs are equal when their values are, wherever those came from."""
        return type(other) is type(self) and self.model_dump() == other.model_dump()

    __hash__ = None


class LoraConfig(Section):
    """Low-rank adapters `W + (alpha / rank) B A` on the denoiser's linear layers."""

    rank: Int = Field(default=16, ge=1, description="Rank of each adapter.")
    alpha: Float = Field(default=32.0, gt=0, description="Scale of each adapter, which multiplies B A by alpha / rank.")
    targets: tuple[str, ...] | None = Field(
        default=None, description="Endings of the names of the layers to adapt; null takes the model family's own list."
    )


class ModelConfig(Section):
    """The model to align and which of its weights move."""

    path: LocalPath = Field(
        min_length=1,
        description="A diffusers pipeline folder, `owner/name` of one on the hub, or `digits` for the embedded model.",
    )
    family: str | None = Field(
        default=None,
        description="Pipeline class that overrides model_index.json, such as StableDiffusion3Pipeline; null reads it.",
    )
    train: Literal["lora", "full"] = Field(
        default="lora", description="Train LoRA adapters, or every weight of the denoiser."
    )
    lora: LoraConfig = Field(default=LoraConfig(), description="The adapters, read when train is lora.")
    dtype: Literal["fp32", "bf16"] = Field(
        default="fp32", description="Precision of the denoiser's matrix products; weights and latents stay fp32."
    )
    gradient_checkpointing: Bool = Field(
        default=False,
        description="Recompute activations in the backward pass: less memory, one more forward a trained step.",
    )
    offload: Bool = Field(
        default=True, description="Keep text encoders and VAE off the accelerator except while they run."
    )


class PromptsConfig(Section):
    """What the model is asked for while training and at evaluation."""

    path: LocalPath = Field(
        min_length=1, description="A txt, JSONL, CSV or Parquet file, or `digits` for the embedded prompts."
    )
    prompt_column: str = Field(default="prompt", min_length=1, description="Column of the prompt text in a table.")
    image_column: str | None = Field(
        default=None, description="Column of an image path, relative to the file; null reads none."
    )
    heldout_fraction: Float = Field(
        default=0.2, ge=0, lt=1, description="Share of the prompts kept for evaluation, chosen by a hash of the text."
    )
    heldout_path: MaybeLocalPath = Field(
        default=None,
        description="A prompt file used for evaluation in place of heldout_fraction; null splits the file.",
    )


class SamplerConfig(Section):
    """How rollouts are sampled: replay uses the same kernel on the same trajectory."""

    kernel: Literal["ode", "dance_sde", "flow_sde", "cps", "precise", "dance_precise", "ddim"] = Field(
        default="dance_sde", description="Transition kernel of a solver step: ddim for diffusion, the others for flows."
    )
    eta: Float = Field(default=0.3, ge=0, description="Amount of noise the kernel injects, without unit; 0 is the ODE.")
    solver_steps: Int = Field(default=16, ge=1, description="Solver steps of a rollout.")
    shift: Float | None = Field(
        default=None, gt=0, description="Time shift of the sigma table; null uses the pipeline's own scheduler."
    )
    guidance_scale: Float = Field(
        default=1.0, ge=0, description="Scale of classifier-free guidance in rollouts; 1 is none."
    )
    guidance: Annotated[Literal["off", "both_branches", "uncond_detached"], BeforeValidator(_word)] = Field(
        default="off",
        description="Sample without guidance, or with it and gradients through both branches or the prompted one only.",
    )
    plain_solver: Literal["euler", "dpm2m"] = Field(
        default="euler", description="Solver of the steps that are not stochastic: Euler, or DPM-Solver++ (2M)."
    )
    steps_after_window: Float | None = Field(
        default=None, gt=0, le=1, description="Share of the solver steps after the window that is kept; null is all."
    )
    initial_noise: Literal["group", "rank", "none"] = Field(
        default="group",
        description="What shares one initial noise: the members of a group, all prompts of a rank, or nothing.",
    )
    embedded_guidance: Float | None = Field(
        default=None, ge=0, description="Guidance scale that a distilled model is told; null is its pipeline's own."
    )
    height: Int | None = Field(default=None, ge=1, description="Height in pixels; null is the model's native size.")
    width: Int | None = Field(default=None, ge=1, description="Width in pixels; null is the model's native size.")
    frames: Int | None = Field(default=None, ge=1, description="Frames of a video; null is the model's native length.")
    fps: Float | None = Field(default=None, gt=0, description="Frames a second of a video; null is the model's own.")


class TrainedStepsConfig(Section):
    """Which solver steps are trained: a random subset of its own for each sample, or a window that moves."""

    fraction: Float = Field(default=0.6, ge=0, le=1, description="Share of the solver steps that is trained.")
    rule: Literal["paper", "repo"] = Field(
        default="paper",
        description="Count of trained steps: ceil(fraction T) (paper) or floor(fraction (T - 1)) (repo).",
    )
    window: Int | None = Field(
        default=None, ge=1,
        description="Neighbouring steps that alone are stochastic and trained, the same in all samples; null is none.",
    )  # fmt: skip
    move: Literal["progressive", "random", "fixed", "exp_decay"] = Field(
        default="progressive", description="How the window moves over training; exp_decay hurries through later steps."
    )
    move_every: Int = Field(default=25, ge=1, description="Training steps that the window stays at one place.")
    stride: Int = Field(default=1, ge=1, description="Solver steps that the window moves on at once.")
    first: Int = Field(default=0, ge=0, description="Solver step that the window starts at, the noisiest being 0.")


class ObjectiveConfig(Section):
    """The policy-gradient objective."""

    loss: Literal["clip", "guard", "guard_delta", "dppo"] = Field(
        default="clip",
        description="GRPO's clipped ratio; GRPO-Guard's, also divided by the step's length; Flow-DPPO's KL bound.",
    )
    dppo_threshold: Float = Field(
        default=1e-6, gt=0, description="Largest KL of a step, per latent entry, that loss dppo leaves alone."
    )

    clip_range: Float = Field(
        default=1e-4,
        gt=0,
        description="Ratios are clipped to 1 +- clip_range; with loss clip and a mean log-prob, nats per dimension.",
    )
    clip_range_high: Float | None = Field(
        default=None, gt=0, description="How far ratios may rise, when that differs from how far they may fall."
    )
    clip_unit: Literal["ratio", "nats"] = Field(
        default="ratio",
        description="Clip ranges bound the ratio as it is, or with loss clip the whole latent's log-prob in nats.",
    )
    clip_share_target: Float | None = Field(
        default=None, gt=0, lt=1,
        description="Adapt the clip ranges from step to step until this share of terms is clipped; null keeps them.",
    )  # fmt: skip
    kl_weight: Float = Field(
        default=0.0, ge=0, description="Weight of the distance to the model before training; 0 is none."
    )
    kl_form: Literal["velocity", "gaussian"] = Field(
        default="velocity",
        description="Distance: mean square of the change of the model's output, or the KL of the sampling step.",
    )
    logprob_reduction: Literal["mean", "sum"] = Field(
        default="mean",
        description="Reduce the log-prob over latent dimensions by mean (DanceGRPO) or by sum (a true density).",
    )


class AdvantageConfig(Section):
    """How rewards become advantages: `(r - mean) / (std + eps)`, summed over rewards by weight, clipped once."""

    ddof: Int = Field(default=1, ge=0, le=1, description="Delta degrees of freedom of the standard deviation.")
    eps: Float = Field(default=1e-4, ge=0, description="Added to the standard deviation, in reward units.")
    scope: Literal["group", "group_mean", "global_std", "global"] = Field(
        default="group",
        description="Centre and scale per group, centre alone, centre per group and scale over all, or both over all.",
    )
    clip: Float | None = Field(
        default=5.0, gt=0, description="Largest absolute advantage, in stds unless scope is group_mean; null is none."
    )
    best_of: Int | None = Field(
        default=None, ge=2, description="Train on this many of each group, its best and worst halves; null is all."
    )
    recentre: Bool = Field(
        default=False, description="Subtract the mean advantage of what best_of keeps, so that a group adds up to 0."
    )


class RewardConfig(Section):
    """One reward by its registered name."""

    name: str = Field(min_length=1, description="Registered name, as `align rewards list` shows it.")
    weight: Float = Field(default=1.0, description="Weight of its normalised advantage in the sum.")
    args: Annotated[dict[str, Any], _HERE] = Field(default={}, description="Arguments of the reward's factory.")
    components: dict[str, Float] | None = Field(
        default=None, description="Which components are used, and the weight of each beside `weight`; null is all."
    )
    role: Literal["utility", "gate"] = Field(
        default="utility", description="A utility is maximised; a gate, in combine.mode gate, only opens or closes."
    )
    transform: tuple[dict[str, Any], ...] = Field(
        default=(), description="Transforms of its scores, in order, such as [{clip: [-3, 3]}, {sigmoid: {}}]."
    )
    hung_after_seconds: Wait = Field(
        default=600.0, gt=0,
        description="Seconds that it may take for a batch on this machine; then it is interrupted, and the batch's "
        "scores are missing.",
    )  # fmt: skip


class CombineConfig(Section):
    """How several rewards become one advantage, and what a missing score means."""

    mode: Literal["sum_of_advantages", "gdpo", "weighted_sum", "gate", "min"] = Field(
        default="sum_of_advantages",
        description="Sum normalised advantages (gdpo: then a batch z-score), or combine rewards and normalise once.",
    )
    missing: Literal["mask", "raise", "fill"] = Field(
        default="mask",
        description="A missing score is left out, stops the run, or counts as the mean of its group; it is never 0.",
    )
    max_fail_frac: Float = Field(
        default=0.1, ge=0, le=1, description="The run stops when a larger share of a reward than this is missing."
    )
    gate_floor: Float | None = Field(
        default=None, description="Reward of a sample whose gate is closed; null is the least of its group."
    )


class OptimizerConfig(Section):
    """The optimizer of the trained weights."""

    name: Literal["adamw"] = Field(default="adamw", description="Optimizer.")
    lr: Float = Field(default=3e-4, gt=0, description="Learning rate, constant over the run.")
    betas: tuple[Float, Float] = Field(default=(0.9, 0.999), description="Decay rates of AdamW's two moment estimates.")
    weight_decay: Float = Field(
        default=1e-4, ge=0, description="Decoupled weight decay of each update, multiplied by lr."
    )
    eps: Float = Field(default=1e-8, gt=0, description="Added to AdamW's denominator.")
    max_grad_norm: Float | None = Field(
        default=1.0, gt=0, description="Largest gradient norm of an update; null does not clip."
    )
    ema_decay: Float | None = Field(
        default=None, gt=0, lt=1,
        description="Deliver a running average of the weights with this decay a training step; null the last weights.",
    )  # fmt: skip


class EvaluationConfig(Section):
    """Evaluation on held-out prompts with the ODE sampler and the held-out rewards."""

    every: Int = Field(default=10, ge=0, description="Steps between evaluations; 0 evaluates only before and after.")
    samples: Int = Field(default=256, ge=1, description="Samples of each evaluation while training.")
    solver_steps: Int = Field(default=20, ge=1, description="ODE solver steps of a sample.")
    guidance_scale: Float = Field(
        default=1.0, ge=0, description="Scale of classifier-free guidance at evaluation; 1 is none."
    )
    final_samples: Int = Field(default=2000, ge=1, description="Samples of the evaluations before and after training.")


class BatchConfig(Section):
    """How work is cut up. Results do not depend on it; null is derived from the memory at hand."""

    rollout: Int | None = Field(default=None, ge=1, description="Samples sampled at once; null is derived.")
    tile: Int | None = Field(
        default=None, ge=1, description="(Sample, solver step) pairs replayed at once; null is derived."
    )


class CheckpointConfig(Section):
    """When full training state is written."""

    every: Int = Field(default=10, ge=0, description="Steps between checkpoints; 0 writes only the last.")
    keep: Int = Field(default=2, ge=1, description="Checkpoints kept, newest first.")
    grace_seconds: Wait = Field(
        default=10.0, ge=0,
        description="Seconds that the step at hand may go on after a stop is asked for; then it is abandoned, and the "
        "step before it saved.",
    )  # fmt: skip
    hung_after_seconds: Wait = Field(
        default=1800.0, gt=0,
        description="Seconds that processes wait for one of them; then it is named, and the run ends.",
    )  # fmt: skip


class TrackingConfig(Section):
    """What is logged besides metrics.jsonl."""

    samples_every: Int = Field(
        default=10, ge=0, description="Steps between sample grids; 0 draws only the first and the last."
    )
    tensorboard: Bool = Field(default=False, description="Mirror the metrics to TensorBoard files in the run folder.")


class SparsityConfig(Section):
    """Which weights move: measured while training, or limited to a mask."""

    every: Int = Field(
        default=0, ge=0, description="Steps between measures of which weights moved; 0 measures after training alone."
    )
    dtype: Literal["fp32", "bf16", "fp16"] | None = Field(
        default=None, description="Format that weights are measured in while training; null is that of the files."
    )
    mask: MaybeLocalPath = Field(
        default=None, description="A mask file of `align sparsity`: only the weights it names train; null trains all."
    )


class MonitorConfig(Section):
    """The hack monitor, which compares held-out samples at each evaluation with those before training."""

    action: Annotated[Literal["stop", "warn", "off"], BeforeValidator(_word)] = Field(
        default="stop",
        description="When the optimised reward rises and the frozen judge falls: stop the run, say so and go on, "
        "or do not look.",
    )
    rise: Float = Field(
        default=2.0, ge=0, description="Standard errors by which the optimised reward must have risen for a verdict."
    )


class TextMonitorConfig(MonitorConfig):
    """The hack monitor of a language model, which reads its answers besides."""

    factor: Float = Field(
        default=4.0, gt=1,
        description="A phrase or a habit trips when answers have it so many times as often as before training.",
    )  # fmt: skip
    least: Float = Field(
        default=0.3, gt=0, le=1, description="Share of the answers, and five of them, that must have it to trip."
    )


class VisualConfig(RunConfig):
    """What the online visual trainers share.

    `prompts_per_step` and `group_size` are the user's; batches are derived from them.
    """

    steps: Int = Field(default=300, ge=1, description="Training steps: a rollout, its rewards and its updates.")
    prompts_per_step: Int = Field(default=32, ge=1, description="Prompts of a rollout, over all processes.")
    group_size: Int = Field(default=12, ge=1, description="Samples of each prompt, compared with one another.")
    updates_per_step: Int = Field(
        default=2, ge=1, description="Optimizer updates of a rollout, on disjoint parts of it."
    )
    model: ModelConfig = Field(description="The model to align.")
    prompts: PromptsConfig = Field(description="The prompts.")
    sampler: SamplerConfig = Field(default=SamplerConfig(), description="The rollout sampler.")
    advantage: AdvantageConfig = Field(default=AdvantageConfig(), description="The advantages.")
    rewards: tuple[RewardConfig, ...] = Field(min_length=1, description="The rewards that are trained on.")
    combine: CombineConfig = Field(default=CombineConfig(), description="The combination of the rewards.")
    heldout_rewards: tuple[RewardConfig, ...] = Field(default=(), description="Rewards that are only ever evaluated.")
    optimizer: OptimizerConfig = Field(default=OptimizerConfig(), description="The optimizer.")
    evaluation: EvaluationConfig = Field(default=EvaluationConfig(), description="The evaluation.")
    batch: BatchConfig = Field(default=BatchConfig(), description="The derived batch sizes.")
    monitor: MonitorConfig = Field(default=MonitorConfig(), description="The hack monitor.")
    checkpoint: CheckpointConfig = Field(default=CheckpointConfig(), description="The checkpoints.")
    tracking: TrackingConfig = Field(default=TrackingConfig(), description="The tracking.")
    sparsity: SparsityConfig = Field(default=SparsityConfig(), description="Which weights move.")


class DanceGRPOConfig(VisualConfig):
    """A DanceGRPO run, or one of its successors that train the sampler's own steps."""

    trainer: Literal["dance_grpo"] = Field(default="dance_grpo", description="The training loop.")
    name: RunName = "dance_grpo"
    trained_steps: TrainedStepsConfig = Field(default=TrainedStepsConfig(), description="The trained solver steps.")
    objective: ObjectiveConfig = Field(default=ObjectiveConfig(), description="The objective.")


def config_types() -> dict[str, type[RunConfig]]:
    """Return the config of every training loop, by the value of its `trainer` key."""
    return {name: getattr(import_module(loop.config), f"{loop.title}Config") for name, loop in LOOPS.items()}


def load_config(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), *, kind: type[RunConfig] | None = None
) -> Any:
    """Return the validated config of a YAML file, a shipped recipe ("digits/dance_grpo") or a mapping.

    Its `trainer` key, dance_grpo without one, decides its type; see `config_types`.

    A config may begin with `extends: NAME`, another recipe or a file beside it, and then says only what differs:
    sections are merged key by key, everything else, lists included, is replaced.

    Args:
        source: path, recipe name or nested mapping.
        overrides: "dotted.key=value" items, applied last; values are YAML, list items are numbered
            from 0 ("rewards.0.weight=2").
        kind: the type it has to be; any when None.

    Raises:
        ConfigError: no such file or recipe, not YAML, an unknown key, a wrong type or value, another trainer.
    """
    value, origins, where = read_values(source)
    for setting in overrides:
        override(value, origins, setting)
    model = _model(value, origins, where, kind)
    try:
        config = model.model_validate(value)
    except ValidationError as error:
        raise explain(error, origins, where, model) from error
    for key, _ in leaves(config):
        config._origins[key] = origins.get(key, "default")
    return config


class _RewardsConfig(Section):
    """The `rewards` of a configuration, whatever else it says."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    rewards: tuple[RewardConfig, ...] = Field(min_length=1, description="The rewards.")


def load_rewards(source: str | Path | Mapping[str, Any]) -> tuple[RewardConfig, ...]:
    """Return the `rewards` section of a YAML file, a recipe or a mapping, which need not be a whole config.

    Raises:
        ConfigError: no such file or recipe, not YAML, no `rewards`, or an item that is not right.
    """
    return _rewards_of(source, _RewardsConfig).rewards


class PanelConfig(_RewardsConfig):
    """What a configuration says of rewards, whatever else it says."""

    heldout_rewards: tuple[RewardConfig, ...] = Field(default=(), description="The judges.")
    combine: CombineConfig = Field(default=CombineConfig(), description="How the rewards become one.")


def load_panel(source: str | Path | Mapping[str, Any]) -> PanelConfig:
    """Return `rewards`, `heldout_rewards` and `combine` of a YAML file, a recipe or a mapping; see `load_rewards`."""
    return _rewards_of(source, PanelConfig)


_S = TypeVar("_S", bound=Section)
_R = TypeVar("_R", bound=_RewardsConfig)


def _rewards_of(source: str | Path | Mapping[str, Any], kind: type[_R]) -> _R:
    value, origins, where = read_values(source)
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise explain(error, origins, where, kind) from error


def _model(
    value: Mapping[str, Any], origins: Mapping[str, str], where: str, kind: type[RunConfig] | None
) -> type[RunConfig]:
    """Return the config type that `trainer` names."""
    kinds = config_types()
    name = value.get("trainer", "dance_grpo" if kind is None else kind.model_fields["trainer"].default)
    place = origins.get("trainer") or where or "config"
    if not isinstance(name, str) or name not in kinds:
        raise ConfigError(
            "The value of 'trainer' is wrong", where=place,
            why=f"found {found_text(name)}, expected one of {', '.join(map(repr, kinds))}",
            do=suggest(name, kinds) if isinstance(name, str) else "Meaning: the training loop",
        )  # fmt: skip
    if kind is not None and not issubclass(kinds[name], kind):
        raise ConfigError(
            f"This is a config of the trainer {name!r}",
            where=place,
            do="`align train` starts the trainer a config names",
        )
    return kinds[name]


def config_origins(config: RunConfig) -> dict[str, str]:
    """Return, for each leaf by dotted key, "default", "FILE:LINE", "command line" or "Python"."""
    return {key: config._origins.get(key, "Python") for key, _ in leaves(config)}


def save_config(config: RunConfig, path: str | Path) -> None:
    """Write `config` as YAML that loads again, a comment on each line saying where the value came from."""
    text = resolved_yaml(config.model_dump(mode="json"), config_origins(config))
    Path(path).write_text(text, encoding="utf-8")


def anchored(config: _S) -> _S:
    """Return a config with its files and folders that are here named from the root, so that it holds in any folder."""
    found: dict[str, Any] = {}
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if _HERE in field.metadata:
            found[name] = _anchored(value)
        elif isinstance(value, Section):
            found[name] = anchored(value)
        elif isinstance(value, tuple):
            found[name] = tuple(anchored(part) if isinstance(part, Section) else part for part in value)
    return config.model_copy(update=found)


def _anchored(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _anchored(v) if k in _PATH_ARGS or isinstance(v, dict) else v for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple(map(_anchored, value))
    if not isinstance(value, str) or not value or is_embedded(value) or is_ours(value) or not Path(value).exists():
        return value
    return os.path.abspath(value)


def diff_configs(a: RunConfig, b: RunConfig, *, waits: bool = True) -> list[tuple[str, Any, Any]]:
    """Return (dotted key, value in `a`, value in `b`) of every leaf that differs; None where there is none.

    Args:
        waits: also tell of what says how long is waited, which changes no run.
    """
    without = "" if waits else _WAITS
    left, right = dict(leaves(a, without=without)), dict(leaves(b, without=without))
    keys = list(left) + [key for key in right if key not in left]
    return [(key, left.get(key), right.get(key)) for key in keys if left.get(key) != right.get(key)]
