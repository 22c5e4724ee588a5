"""Typed config of the trainer that learns image models from people's thumbs and pairs: Diffusion-KTO and -DPO."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from align.config import (
    CheckpointConfig,
    EvaluationConfig,
    Float,
    Int,
    LocalPath,
    MaybeLocalPath,
    ModelConfig,
    OptimizerConfig,
    RewardConfig,
    RunConfig,
    RunName,
    Section,
    SparsityConfig,
    TrackingConfig,
)
from align.language_config import ClassWeight

__all__ = [
    "ImageDataConfig",
    "OfflineBatchConfig",
    "OfflineConfig",
    "OfflineEvaluationConfig",
    "OfflineObjectiveConfig",
    "OfflineSamplerConfig",
]


class ImageDataConfig(Section):
    """Prompts and images with what people thought of them."""

    path: LocalPath = Field(
        min_length=1,
        description="A JSONL, CSV or Parquet file of thumbs or pairs, or `digits/thumbs` or `digits/pairs`.",
    )
    root: MaybeLocalPath = Field(
        default=None, description="Folder that image paths are relative to; null is that of the file."
    )
    heldout_fraction: Float = Field(
        default=0.1, ge=0, lt=1, description="Share of the prompts kept for evaluation, chosen by a hash of the text."
    )
    heldout_path: MaybeLocalPath = Field(
        default=None, description="A file of rows used for evaluation in place of heldout_fraction; null splits."
    )


class OfflineSamplerConfig(Section):
    """The levels that images are noised to, and the size they are learnt and evaluated at."""

    solver_steps: Int = Field(default=20, ge=1, description="Solver steps whose levels objective.levels: solver takes.")
    shift: Float | None = Field(
        default=None, gt=0, description="Time shift of the sigma table; null uses the pipeline's own scheduler."
    )
    embedded_guidance: Float | None = Field(
        default=None, ge=0, description="Guidance scale that a distilled model is told; null is its pipeline's own."
    )
    height: Int | None = Field(default=None, ge=1, description="Height in pixels; null is the model's native size.")
    width: Int | None = Field(default=None, ge=1, description="Width in pixels; null is the model's native size.")
    frames: Literal[1] | None = Field(
        default=None, description="1 with a model of videos from text, which then learns from single images."
    )


class OfflineObjectiveConfig(Section):
    """An objective on given images."""

    loss: Literal["kto", "dpo"] = Field(
        default="kto", description="Diffusion-KTO, which learns from thumbs, or Diffusion-DPO, which learns from pairs."
    )
    beta: Float | None = Field(
        default=None, gt=0,
        description="How strongly a change of the error counts; null is 5000 for diffusion models, 2000 for flows.",
    )  # fmt: skip
    utility: Literal["sigmoid", "loss_averse", "risk_seeking"] = Field(
        default="sigmoid", description="KTO's utility: a sigmoid, log sigmoid(x), or -log sigmoid(-x)."
    )
    weight_desirable: ClassWeight = Field(
        default=None, ge=0, description="Weight of thumbs up; auto (null) balances the classes, the larger keeping 1."
    )
    weight_undesirable: ClassWeight = Field(
        default=None, ge=0, description="Weight of thumbs down; auto (null) balances the classes, the larger keeping 1."
    )
    weight_ratio: Float = Field(
        default=1.0, gt=0, description="What auto makes of weighted thumbs up over weighted thumbs down."
    )
    draws: Int = Field(
        default=1, ge=1, description="Noises and levels that each row is trained at in an update, a level a stratum."
    )
    levels: Literal["solver", "fine"] = Field(
        default="fine", description="Levels that are drawn from: those of the solver, or 250 of the same schedule."
    )


class OfflineEvaluationConfig(EvaluationConfig):
    """Samples of held-out prompts, and what the model has learnt of held-out rows."""

    rows: Int = Field(default=512, ge=1, description="Held-out rows measured at most; the same ones every time.")
    draws: Int = Field(default=4, ge=1, description="Noises and levels that a held-out row is measured at.")


class OfflineBatchConfig(Section):
    """How work is cut up. Results do not depend on it; null is derived from the memory at hand."""

    tile: Int | None = Field(default=None, ge=1, description="Noised images at once with gradients; null is derived.")


class OfflineConfig(RunConfig):
    """A run that learns from thumbs or pairs of images. `batch_size` counts rows over all processes."""

    trainer: Literal["offline"] = Field(default="offline", description="The training loop.")
    name: RunName = "offline"
    steps: Int = Field(default=500, ge=1, description="Training steps, an update each.")
    batch_size: Int = Field(default=64, ge=1, description="Thumbs (dpo: pairs) of an update, over all processes.")
    model: ModelConfig = Field(description="The model to align.")
    data: ImageDataConfig = Field(description="The rows.")
    sampler: OfflineSamplerConfig = Field(default=OfflineSamplerConfig(), description="Levels and size.")
    objective: OfflineObjectiveConfig = Field(default=OfflineObjectiveConfig(), description="The objective.")
    heldout_rewards: tuple[RewardConfig, ...] = Field(
        default=(), description="Rewards that samples of held-out prompts are measured with; none is trained on."
    )
    optimizer: OptimizerConfig = Field(default=OptimizerConfig(lr=1e-4), description="The optimizer.")
    evaluation: OfflineEvaluationConfig = Field(default=OfflineEvaluationConfig(), description="The evaluation.")
    batch: OfflineBatchConfig = Field(default=OfflineBatchConfig(), description="The derived batch size.")
    checkpoint: CheckpointConfig = Field(default=CheckpointConfig(every=50), description="The checkpoints.")
    tracking: TrackingConfig = Field(default=TrackingConfig(), description="The tracking.")
    sparsity: SparsityConfig = Field(default=SparsityConfig(), description="Which weights move.")
