"""Typed config of `align fit`: what people said, what is fitted to it, and what is held out."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from align.config import (
    Bool,
    CheckpointConfig,
    Float,
    Int,
    LocalPaths,
    LoraConfig,
    MaybeLocalPath,
    OptimizerConfig,
    RunConfig,
    RunName,
    Section,
)

__all__ = ["FitConfig"]


class FitDataConfig(Section):
    """What people said."""

    paths: LocalPaths = Field(
        min_length=1,
        description="Feedback stores (.db), or files that `align feedback import` reads; their answers are joined.",
    )
    media: Literal["text", "image"] = Field(default="text", description="What the responses of files are.")
    folder: MaybeLocalPath = Field(
        default=None, description="Where paths of images begin; null is the folder of the file that names them."
    )
    key: str | None = Field(
        default=None, description="The signal to fit, such as love or quality; null is all of them."
    )
    ratings_key: str | None = Field(
        default=None, description="The signal of the ratings, where it is not `key`; null is `key`."
    )
    protocols: tuple[Literal["thumb", "rating", "comparison", "ranking"], ...] | None = Field(
        default=None, min_length=1, description="What kinds of answers are fitted to; null is all of them."
    )
    reaction: str = Field(
        default="",
        description="The reaction that counts as a thumb up, such as love; thumbs are then left out, unless `key` is"
        " theirs alone. Empty is none.",
    )
    silence: Literal["ignore", "negative", "unlabelled"] = Field(
        default="ignore",
        description="What was shown without an answer: left out, a negative, or positive in an unknown part (nnPU).",
    )
    negative_share: Float = Field(
        default=1.0, gt=0, le=1, description="Share of the negatives that is trained on; undone in the probability."
    )
    most_of_user: Int | None = Field(
        default=None, ge=1, description="Most answers of one person that are trained on, drawn by a hash; null is all."
    )


class FitSplitConfig(Section):
    """What is held out: whole prompts, people or times, never single rows."""

    by: tuple[Literal["prompt", "user", "time"], ...] = Field(
        default=("prompt",), min_length=1,
        description="What training and held-out rows do not share; with several, rows that fall between are dropped.",
    )  # fmt: skip
    heldout: Float = Field(default=0.2, gt=0, lt=1, description="Share held out for the report.")
    calibration: Float = Field(default=0.2, ge=0, lt=1, description="Share held out for the calibration.")
    heldout_path: MaybeLocalPath = Field(
        default=None, description="A file or store to report on in place of `heldout`; refused where it leaks."
    )


class FitModelConfig(Section):
    """What reads the outputs, and what is trained on top of it."""

    backbone: Literal["words", "hidden", "pixels", "digits", "clip", "classifier"] = Field(
        default="words",
        description="Frozen embeddings (hashed words, a model's mean hidden state, pixels, the digits judge's features,"
        " CLIP's towers), or a transformers sequence classifier that is trained itself.",
    )
    path: MaybeLocalPath = Field(
        default=None, description="Folder or hub id of hidden and classifier, weights of clip."
    )
    architecture: str = Field(default="ViT-H-14", description="open_clip's name of clip's towers.")
    size: Int = Field(default=16, ge=1, description="Pixels of a side that the backbone pixels sees.")
    unfreeze_image: Int = Field(
        default=0, ge=0,
        description="Last blocks of clip's image tower that are trained too, with the norm and projection after them.",
    )  # fmt: skip
    unfreeze_text: Int = Field(default=0, ge=0, description="The same of its prompt tower.")
    head: Literal["linear", "mlp", "cos"] = Field(
        default="linear", description="On frozen embeddings; cos is the cosine of clip's two, each through a matrix."
    )
    ridge: Float = Field(
        default=0.1, ge=0,
        description="Weight of half the head's squared weights in the loss: more for many features and few answers.",
    )  # fmt: skip
    width: Int = Field(default=64, ge=1, description="Hidden units of the head mlp.")
    template: Literal["chat", "plain", "pair", "completion"] = Field(
        default="plain", description="How a conversation is put to the classifier."
    )
    max_length: Int | None = Field(default=None, ge=2, description="Most tokens of it; null is the model's own limit.")
    train: Literal["lora", "full"] = Field(default="lora", description="Which weights of the classifier move.")
    lora: LoraConfig = Field(default=LoraConfig(), description="Its adapters, merged into the weights at the end.")


class FitObjectiveConfig(Section):
    """How what people said depends on the one latent reward."""

    comparisons: Literal["bradley_terry", "pick", "rao_kupper", "davidson"] = Field(
        default="bradley_terry", description="Of two; the last two have a probability of a tie of their own."
    )
    margin: Float = Field(
        default=0.0, ge=0, description="Bradley-Terry's margin of a preference, where its row does not say one."
    )
    centre: Float = Field(default=0.0, ge=0, description="Weight of the square of the sum of a pair's rewards.")
    ratings: Literal["ordinal", "squared", "sigmoid"] = Field(
        default="ordinal",
        description="Cumulative logit with fitted thresholds, or squared error of the rating in 0..1, of the reward or"
        " of its sigmoid.",
    )
    prior: Float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Share of positives among what is unlabelled; needed by silence unlabelled.",
    )
    rho_up: Float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of those who like an output that are seen not to (forward correction).",
    )
    rho_down: Float = Field(
        default=0.0, ge=0, lt=1, description="Share of those who do not like an output that are seen to."
    )
    mistakes: Literal["given", "fitted"] = Field(
        default="given",
        description="Whether rho_up and rho_down are known, or fitted with the reward, starting from what is given.",
    )


class FitUsersConfig(Section):
    """People: their own base rates, and who is left out."""

    effects: Bool = Field(
        default=False,
        description="Fit an effect a person on thumbs, shrunk to 0 by its fitted variance; outputs are scored at 0."
        " Other answers have none.",
    )
    trim: Annotated[Float, Field(ge=0, lt=0.5)] | Literal["auto"] = Field(
        default=0.0,
        description="Who is left out: auto lists accounts that act together and say nothing of the outputs; a number is"
        " the share of people whose thumbs a model of the others finds least likely.",
    )
    false_discovery: Float = Field(
        default=0.1, gt=0, lt=1,
        description="With trim auto, the largest expected share of wrongly listed accounts (Benjamini-Hochberg).",
    )  # fmt: skip


class FitTrackingConfig(Section):
    """What is logged besides metrics.jsonl."""

    tensorboard: Bool = Field(default=False, description="Mirror the metrics to TensorBoard files in the run folder.")


class FitConfig(RunConfig):
    """A reward fitted to what people said: one latent, whatever the protocols."""

    trainer: Literal["fit"] = Field(default="fit", description="What the config is for.")
    name: RunName = Field(
        default="fit", description="Name of the run, of its folder in runs/, and of the reward's scores."
    )
    steps: Int = Field(default=300, ge=1, description="Optimizer updates.")
    batch_size: Int = Field(default=256, ge=1, description="Answers of an update.")
    data: FitDataConfig = Field(description="What people said.")
    split: FitSplitConfig = Field(default=FitSplitConfig(), description="What is held out.")
    model: FitModelConfig = Field(default=FitModelConfig(), description="The model.")
    objective: FitObjectiveConfig = Field(default=FitObjectiveConfig(), description="The observation models.")
    users: FitUsersConfig = Field(default=FitUsersConfig(), description="People.")
    calibration: Literal["temperature", "isotonic", "none"] = Field(
        default="temperature", description="What makes a probability of the reward, on rows held out for it."
    )
    optimizer: OptimizerConfig = Field(default=OptimizerConfig(lr=1e-2, weight_decay=0.0), description="The optimizer.")
    checkpoint: CheckpointConfig = Field(default=CheckpointConfig(every=100), description="The checkpoints.")
    tracking: FitTrackingConfig = Field(default=FitTrackingConfig(), description="The tracking.")


def require_fit(config: FitConfig) -> None:
    """Refuse what a config says in one place and takes back in another.

    Raises:
        ConfigError: naming the key.
    """
    from align.errors import ConfigError

    model, objective, split = config.model, config.objective, config.split
    if model.backbone in ("hidden", "classifier", "clip") and model.path is None:
        raise ConfigError(f"The backbone {model.backbone} needs its weights", where="model.path", do="Name a folder")
    if model.head == "cos" and model.backbone != "clip":
        raise ConfigError(
            "The head cos is of two embeddings", where="model.head", do="Use backbone clip, or head linear"
        )
    if (model.unfreeze_image or model.unfreeze_text) and model.backbone != "clip":
        raise ConfigError(
            f"The backbone {model.backbone} has no towers of blocks", where="model.unfreeze_image",
            do="Use backbone clip, or leave unfreeze_image and unfreeze_text out",
        )  # fmt: skip
    texts = model.backbone in ("words", "hidden", "classifier")
    if texts != (config.data.media == "text"):
        raise ConfigError(
            f"The backbone {model.backbone} reads {'texts' if texts else 'images'}", where="data.media",
            do=f"Set data.media: {'text' if texts else 'image'}, or choose another backbone",
        )  # fmt: skip
    if config.data.silence == "unlabelled" and objective.prior is None:
        raise ConfigError(
            "Learning from silence needs the share of positives in it", where="objective.prior",
            do="Give it, and fit with several to see what depends on it",
        )  # fmt: skip
    if config.data.silence == "unlabelled" and (
        config.data.negative_share < 1 or objective.rho_up or objective.rho_down or objective.mistakes == "fitted"
    ):
        raise ConfigError(
            "Silence that is unlabelled has no negatives to subsample or correct", where="data.silence",
            do="Use silence: negative, or leave negative_share, rho_up, rho_down and mistakes out",
        )  # fmt: skip
    if config.users.effects and config.data.protocols is not None and "thumb" not in config.data.protocols:
        raise ConfigError(
            "Effects of people are of thumbs", where="users.effects",
            why=f"data.protocols takes {' and '.join(config.data.protocols)} alone", do="Set users.effects: false",
        )  # fmt: skip
    if objective.rho_up + objective.rho_down >= 1:
        raise ConfigError("Rates of mistakes are below 1 together", where="objective.rho_up")
    if split.heldout + split.calibration >= 1:
        raise ConfigError("Nothing is left to train on", where="split", why="heldout and calibration add up to 1")
    if config.calibration != "none" and split.calibration == 0:
        raise ConfigError(
            "A calibration needs rows of its own", where="split.calibration", do="Set it above 0, or calibration: none"
        )
