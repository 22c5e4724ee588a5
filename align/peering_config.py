"""Typed config of `align peering`: what was rated and ranked, what is fitted to each, and what is selected from."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from align.config import (
    CheckpointConfig,
    Float,
    Int,
    LocalPaths,
    MaybeLocalPath,
    OptimizerConfig,
    RunConfig,
    RunName,
    Section,
)
from align.errors import ConfigError
from align.fit_config import FitConfig, FitDataConfig, FitModelConfig, FitObjectiveConfig, FitSplitConfig, require_fit

__all__ = ["PeeringConfig"]

PROTOCOLS: dict[str, tuple[str, ...]] = {"ratings": ("rating",), "rankings": ("comparison", "ranking")}
"""What each of the two rewards is fitted to."""

SIMULATED = "simulated"


class PeeringDataConfig(Section):
    """The same outputs, rated and ranked."""

    paths: LocalPaths = Field(
        default=(SIMULATED,), min_length=1,
        description="Feedback stores (.db), or files that `align feedback import` reads; simulated is the world below.",
    )  # fmt: skip
    media: Literal["text", "image"] = Field(default="text", description="What the responses of files are.")
    folder: MaybeLocalPath = Field(
        default=None, description="Where paths of images begin; null is the folder of the file that names them."
    )
    key: str | None = Field(
        default=None, description="The signal of both protocols; null is any, where ratings are of one alone."
    )
    ratings_key: str | None = Field(
        default=None, description="The signal of the ratings, where it is not `key`; null is `key`."
    )
    heldout: Float = Field(
        default=0.3, gt=0, lt=1, description="Share of the prompts held out from both fits, for all that is reported."
    )


class PeeringWorldConfig(Section):
    """The simulated world: annotators who see the density of an answer more when rating than when ranking."""

    prompts: Int = Field(default=150, ge=10, description="Prompts whose answers are rated and ranked.")
    responses: Int = Field(default=5, ge=2, description="Answers of each.")
    raters: Int = Field(default=12, ge=1, description="Annotators; two see each prompt, and rate and rank all of it.")
    density_in_ratings: Float = Field(default=0.8, description="What density weighs beside accuracy in a rating.")
    density_in_rankings: Float = Field(default=-0.3, description="What it weighs in a comparison.")
    rating_noise: Float = Field(default=0.7, ge=0, description="Standard deviation of a rating's noise, in points.")
    first_place: Float = Field(default=0.5, description="What being shown first is worth in a comparison, in nats.")
    selected_prompts: Int = Field(default=120, ge=2, description="New prompts that are selected for.")
    candidates: Int = Field(default=17, ge=3, description="Candidates of each: the baseline and the n of best of n.")


class PeeringSelectionConfig(Section):
    """What is selected from, and who says which selection wins."""

    candidates: MaybeLocalPath = Field(
        default=None,
        description="A file of candidates, or a folder of `align sample`; null takes the outputs of held-out prompts.",
    )
    answers: LocalPaths = Field(
        default=(), description="More stores or files with answers about what was selected, besides data.paths."
    )
    baseline: str | None = Field(
        default=None, description="The policy whose output is played against; null draws one output of each prompt."
    )


class PeeringConfig(RunConfig):
    """Ratings against rankings: a reward of each, what each selects, and who wins under which protocol."""

    trainer: Literal["peering"] = Field(default="peering", description="What the config is for.")
    name: RunName = "peering"
    steps: Int = Field(default=300, ge=1, description="Optimizer updates of each fit.")
    batch_size: Int = Field(default=256, ge=1, description="Answers of an update.")
    data: PeeringDataConfig = Field(default=PeeringDataConfig(), description="The answers.")
    world: PeeringWorldConfig = Field(default=PeeringWorldConfig(), description="The simulated world, if it is asked.")
    model: FitModelConfig = Field(default=FitModelConfig(), description="The model of both rewards.")
    objective: FitObjectiveConfig = Field(default=FitObjectiveConfig(), description="The observation models.")
    optimizer: OptimizerConfig = Field(default=OptimizerConfig(lr=1e-2, weight_decay=0.0), description="The optimizer.")
    checkpoint: CheckpointConfig = Field(
        default=CheckpointConfig(every=100), description="The checkpoints of the fits."
    )
    selection: PeeringSelectionConfig = Field(default=PeeringSelectionConfig(), description="The candidates.")


def fit_config_of(config: PeeringConfig, name: str, paths: tuple[str, ...]) -> FitConfig:
    """Return the config of the reward that is fitted to one of the protocols; both hold the same prompts out."""
    data = config.data
    return FitConfig(
        name=name, seed=config.seed, steps=config.steps, batch_size=config.batch_size, model=config.model,
        data=FitDataConfig(
            paths=paths, media=data.media, folder=data.folder, key=data.key, ratings_key=data.ratings_key,
            protocols=PROTOCOLS.get(name),
        ),
        split=FitSplitConfig(by=("prompt",), heldout=data.heldout, calibration=0.0), objective=config.objective,
        calibration="none", optimizer=config.optimizer, checkpoint=config.checkpoint,
    )  # fmt: skip


def require_peering(config: PeeringConfig) -> None:
    """Refuse what a config says in one place and takes back in another.

    Raises:
        ConfigError: naming the key.
    """
    simulated = SIMULATED in config.data.paths
    if simulated and (len(config.data.paths) > 1 or config.data.media != "text"):
        raise ConfigError("The simulated world stands alone, and is of texts", where="data.paths")
    if simulated and (config.selection.candidates or config.selection.answers or config.selection.baseline):
        raise ConfigError(
            "The simulated world brings its own candidates and answers", where="selection", do="Leave the section out"
        )
    require_fit(fit_config_of(config, "ratings", config.data.paths))
