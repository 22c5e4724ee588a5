"""Typed config of RLUF on language models: several rewards and hard judges, against a baseline completion."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from align.config import Float, Int, RewardConfig, RunName, Section, TextMonitorConfig
from align.language_config import (
    LanguageConfig,
    LanguageEvaluationConfig,
    LanguageOptimizerConfig,
    PreferenceDataConfig,
    ReferenceConfig,
)

__all__ = ["RLUFConfig", "RLUFObjectiveConfig", "SamplingConfig"]

Label = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")]


class RLUFObjectiveConfig(Section):
    """The constrained objective: calibrated rewards under hard judges and a bound on the log-ratio."""

    loss: Literal["crpg", "crraft", "codpo"] = Field(
        default="crpg",
        description="Policy gradient, imitation of the best valid completion, or DPO of the best against a violating.",
    )
    aggregation: Literal["weighted_mean", "gdpo"] = Field(
        default="weighted_mean",
        description="Average calibrated rewards by weight; or (crpg) normalise each in its group, add, and once more.",
    )
    baseline: Literal["reference", "row"] = Field(
        default="reference",
        description="What rewards are calibrated against: an answer of the model before training, or the row's own.",
    )
    kl_max: Float = Field(
        default=20.0, gt=0, description="Largest log-ratio to the model before training, in nats a completion."
    )
    beta: Float = Field(default=0.1, gt=0, description="Inverse temperature of codpo.")
    sft_weight: Float = Field(
        default=0.05, ge=0, description="Weight of the chosen completion's log-prob a token in codpo, lambda."
    )
    patience: Int = Field(
        default=256, ge=1, description="The run stops after so many prompts in a row without a valid completion."
    )
    max_fail_frac: Float = Field(
        default=0.1, ge=0, le=1, description="The run stops when a larger share of a reward than this is missing."
    )


class SamplingConfig(Section):
    """Completions that the model is trained on, drawn from itself."""

    completions: Int = Field(default=4, ge=2, description="Completions of each prompt, k.")
    max_new_tokens: Int = Field(default=128, ge=1, description="Longest completion, in tokens.")
    temperature: Float = Field(default=1.0, gt=0, description="Of completions and baselines; 1 is on-policy.")
    top_p: Float = Field(
        default=1.0, gt=0, le=1, description="Smallest set of tokens whose probabilities add up to so much; 1 is all."
    )
    batch: Int = Field(
        default=16, ge=1,
        description="Completions drawn at once; results depend on it only near the end of the model's window, where "
        "answers of a batch are cut together.",
    )  # fmt: skip


class RLUFConfig(LanguageConfig):
    """An RLUF run. `batch_size` and `microbatch` count prompts over all processes."""

    trainer: Literal["rluf"] = Field(default="rluf", description="The training loop.")
    name: RunName = "rluf"
    rewards: dict[Label, RewardConfig] = Field(
        min_length=1,
        description="Rewards by a name of yours, such as love; one with role gate is a judge, which passes above 0.",
    )
    heldout_rewards: dict[Label, RewardConfig] = Field(
        default={},
        description="Frozen judges by a name of yours, asked about answers to held-out prompts and never trained on; "
        "the hack monitor holds the run against their weighted sum.",
    )
    monitor: TextMonitorConfig = Field(default=TextMonitorConfig(), description="The hack monitor.")
    objective: RLUFObjectiveConfig = Field(default=RLUFObjectiveConfig(), description="The objective.")
    sampling: SamplingConfig = Field(default=SamplingConfig(), description="The sampling.")
    reference: ReferenceConfig = Field(default=ReferenceConfig(), description="The reference model.")
    optimizer: LanguageOptimizerConfig = Field(
        default=LanguageOptimizerConfig(schedule="constant"), description="The optimizer."
    )
    data: PreferenceDataConfig = Field(description="The data; rows may be prompts alone.")
    evaluation: LanguageEvaluationConfig = Field(
        default=LanguageEvaluationConfig(prompts=64), description="The evaluation."
    )

    @property
    def prompts_alone(self) -> bool:
        """Whether rows may be prompts alone, as the baseline is an answer of the model before training."""
        return self.objective.baseline == "reference"
