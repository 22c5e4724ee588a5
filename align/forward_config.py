"""Typed config of the trainers that learn from clean samples: DiffusionNFT, AWM, DGPO, and supervised training."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from align.config import Float, Int, MaybeLocalPath, RunName, SamplerConfig, Section, VisualConfig

__all__ = ["ForwardConfig", "ForwardObjectiveConfig"]


class ForwardObjectiveConfig(Section):
    """An objective on noised samples; it needs no trajectory and no stochastic sampler."""

    loss: Literal["nft", "awm", "dgpo", "supervised"] = Field(
        default="nft",
        description="DiffusionNFT, advantage-weighted matching, direct group preference optimisation; or none by "
        "rewards: the pretraining loss on given images.",
    )
    images: MaybeLocalPath = Field(
        default=None,
        description="With supervised, a file of thumbs or pairs, or `digits/thumbs`: its liked images are learnt.",
    )
    draws: Int = Field(default=4, ge=1, description="Noise levels that each sample is trained at, one in each stratum.")
    levels: Literal["solver", "fine"] = Field(
        default="solver", description="Levels that are drawn from: those of the solver, or 250 of the same schedule."
    )
    kl_weight: Float = Field(
        default=1e-4, ge=0, description="Weight of the mean square of the change of the model's output; 0 is none."
    )
    old_policy: Literal["step", "ramp", "late"] = Field(
        default="ramp",
        description="The policy that samples: that of each step, or an average that lags more, from the start or late.",
    )
    nft_beta: Float = Field(default=1.0, gt=0, description="How far NFT's two implicit policies are from the old one.")
    nft_feedback: Literal["advantage", "sign", "positive", "negative", "label"] = Field(
        default="advantage",
        description="What makes NFT's optimality: advantages, their sign, those of one sign, or rewards from 0 to 1.",
    )
    awm_weight: Literal["one", "t", "t2", "huber", "ghuber"] = Field(
        default="one", description="Weight of AWM's error: 1, t, t^2, t over its root, or over its power 3/4."
    )
    awm_clip: Float = Field(default=1e-3, gt=0, lt=1, description="AWM's ratios are clipped to 1 +- this.")
    dgpo_beta: Float = Field(default=50.0, gt=0, description="Sharpness of DGPO's weight of a group.")


class ForwardConfig(VisualConfig):
    """A run that learns from clean samples and their rewards."""

    trainer: Literal["forward"] = Field(default="forward", description="The training loop.")
    name: RunName = "forward"
    updates_per_step: Int = Field(
        default=1, ge=1, description="Optimizer updates of a rollout, on disjoint parts of it."
    )
    sampler: SamplerConfig = Field(
        default=SamplerConfig(kernel="ode", eta=0.0, solver_steps=10, initial_noise="none"),
        description="The rollout sampler.",
    )
    objective: ForwardObjectiveConfig = Field(default=ForwardObjectiveConfig(), description="The objective.")
