"""Typed configs of the language-model trainers: kto, bco, dpo and sft share every section but the objective."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from align.config import (
    Bool,
    CheckpointConfig,
    Float,
    Int,
    LocalPath,
    LoraConfig,
    MaybeLocalPath,
    RunConfig,
    RunName,
    Section,
    SparsityConfig,
)

__all__ = [
    "BCOConfig", "BCOObjectiveConfig", "DPOConfig", "DPOObjectiveConfig", "KTOConfig", "KTOObjectiveConfig",
    "LanguageConfig", "LanguageEvaluationConfig", "LanguageModelConfig", "LanguageOptimizerConfig",
    "LanguageTrackingConfig", "PreferenceDataConfig", "ReferenceConfig", "SFTConfig",
]  # fmt: skip


def _auto(value: Any) -> Any:
    """Let the word auto be null, which derives a value."""
    return None if value == "auto" else value


ClassWeight = Annotated[Float | None, BeforeValidator(_auto)]


class LanguageModelConfig(Section):
    """The language model to align and which of its weights move."""

    path: LocalPath = Field(
        min_length=1, description="A folder written by save_pretrained, a hub name, or `tiny` for the embedded model."
    )
    train: Literal["lora", "full"] = Field(default="lora", description="Train LoRA adapters, or every weight.")
    lora: LoraConfig = Field(
        default=LoraConfig(), description="The adapters, read when train is lora; targets null is every linear layer."
    )
    train_vision: Bool = Field(
        default=False, description="Of a vision-language model, train the vision tower and its projector too."
    )
    dtype: Literal["fp32", "bf16"] = Field(
        default="fp32", description="Precision of matrix products; trained weights and log-probs stay fp32."
    )
    gradient_checkpointing: Bool = Field(
        default=False, description="Recompute activations in the backward pass: less memory, one more forward."
    )
    chat_template: MaybeLocalPath = Field(
        default=None, description="A file with a chat template that replaces the tokenizer's; null keeps its own."
    )


class PreferenceDataConfig(Section):
    """Rows in the forms TRL documents, and how they become tokens."""

    path: LocalPath = Field(
        min_length=1, description="A JSONL, CSV or Parquet file, a datasets folder, or `toy` for the embedded thumbs."
    )
    heldout_fraction: Float = Field(
        default=0.1, ge=0, lt=1, description="Share of the prompts kept for evaluation, chosen by a hash of the text."
    )
    heldout_path: MaybeLocalPath = Field(
        default=None, description="A file of rows used for evaluation in place of heldout_fraction; null splits."
    )
    max_length: Int = Field(default=1024, ge=2, description="Longest prompt and completion, in tokens; its end is cut.")
    max_prompt_length: Int | None = Field(
        default=None, ge=1, description="Longest prompt, in tokens; its beginning is cut; null leaves prompts whole."
    )
    score_threshold: Float | None = Field(
        default=None, description="Rows with a score and no label are desirable from this score on; null refuses them."
    )
    allow_one_class: Bool = Field(
        default=False, description="Train although every row has the same label; refused otherwise."
    )
    workers: Int = Field(default=1, ge=1, description="Processes that tokenise; rows are the same for any number.")


class ReferenceConfig(Section):
    """The model before training, which the objective compares with."""

    mode: Literal["auto", "lora_off", "copy", "precomputed"] = Field(
        default="auto",
        description="Adapters switched off, a frozen copy, or log-probs computed once; auto takes the first possible.",
    )
    cache: str | None = Field(
        default=None, description="Folder of precomputed log-probs, by content; null is reference/ in align's cache."
    )


class LanguageOptimizerConfig(Section):
    """AdamW and its learning-rate schedule."""

    lr: Float = Field(default=1e-6, gt=0, description="Peak learning rate.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="linear", description="Learning rate after the warm-up: constant, or down to 0."
    )
    warmup: Float = Field(default=0.1, ge=0, lt=1, description="Share of the steps over which the rate rises from 0.")
    betas: tuple[Float, Float] = Field(default=(0.9, 0.999), description="Decay rates of AdamW's two moment estimates.")
    weight_decay: Float = Field(default=0.0, ge=0, description="Decoupled weight decay, multiplied by the rate.")
    eps: Float = Field(default=1e-8, gt=0, description="Added to AdamW's denominator.")
    max_grad_norm: Float | None = Field(
        default=1.0, gt=0, description="Largest gradient norm of an update; null does not clip."
    )


class LanguageEvaluationConfig(Section):
    """Evaluation on held-out rows."""

    every: Int = Field(default=50, ge=0, description="Steps between evaluations; 0 evaluates only before and after.")
    rows: Int = Field(default=512, ge=1, description="Held-out rows measured at most; the same ones every time.")
    prompts: Int = Field(
        default=8, ge=0, description="Held-out prompts that the model answers at each evaluation; 0 is none."
    )
    max_new_tokens: Int = Field(default=128, ge=1, description="Longest of these answers, in tokens.")
    temperature: Float = Field(
        default=1.0, ge=0, description="Of these answers; at 1 they also estimate the KL divergence, 0 is greedy."
    )


class LanguageTrackingConfig(Section):
    """What is logged besides metrics.jsonl."""

    tensorboard: Bool = Field(default=False, description="Mirror the metrics to TensorBoard files in the run folder.")


class KTOObjectiveConfig(Section):
    """Kahneman-Tversky optimisation."""

    loss: Literal["kto", "apo_zero_unpaired"] = Field(
        default="kto", description="KTO, or KTO with its reference point at 0, which needs no second forward."
    )
    beta: Float = Field(default=0.1, gt=0, description="Inverse temperature: higher stays nearer the reference model.")
    z0: Literal["batch", "ema", "zero"] = Field(
        default="batch",
        description="Reference point: of the microbatch, a running mean of it (allows microbatch 1), or 0.",
    )
    z0_decay: Float = Field(default=0.99, gt=0, lt=1, description="Decay per update of the running mean, with z0 ema.")
    weight_desirable: ClassWeight = Field(
        default=None, ge=0, description="Weight of thumbs up; auto (null) balances the classes, the larger keeping 1."
    )
    weight_undesirable: ClassWeight = Field(
        default=None, ge=0, description="Weight of thumbs down; auto (null) balances the classes, the larger keeping 1."
    )
    weight_ratio: Float = Field(
        default=1.0, gt=0, description="What auto makes of weighted thumbs up over weighted thumbs down; 1 to 1.5."
    )
    humanline: tuple[Float, Float] | None = Field(
        default=None, description="Clamp of each token's log-ratio in nats, such as [-1, 1.5]; null is none."
    )


class BCOObjectiveConfig(Section):
    """Binary classifier optimisation."""

    beta: Float = Field(default=0.1, gt=0, description="Inverse temperature: higher stays nearer the reference model.")
    delta: Literal["ema_balanced", "cumulative_pooled", "zero"] = Field(
        default="ema_balanced",
        description="Reward shift: midpoint of two running class means, the mean of all rewards (TRL), or 0.",
    )
    delta_decay: Float = Field(default=0.99, gt=0, lt=1, description="Decay per update of the two class means.")
    balance: Literal["class_mean", "pooled", "oversample"] = Field(
        default="class_mean",
        description="Add two class means (the paper), average all rows, or repeat rows of the smaller class.",
    )
    soft_labels: Bool = Field(
        default=False, description="Take scores from 0 to 1 as soft labels instead of refusing rows without a label."
    )


class DPOObjectiveConfig(Section):
    """Direct preference optimisation."""

    beta: Float = Field(default=0.1, gt=0, description="Inverse temperature: higher stays nearer the reference model.")
    label_smoothing: Float = Field(
        default=0.0, ge=0, lt=0.5, description="Share of the pairs believed to be labelled the wrong way round."
    )


class LanguageConfig(RunConfig):
    """What kto, bco, dpo and sft share. `batch_size` and `microbatch` count rows over all processes."""

    language = True

    epochs: Int = Field(default=1, ge=1, description="Passes over the data, each in an order of its own.")
    steps: Int | None = Field(default=None, ge=1, description="Updates; null is as many as the epochs hold.")
    batch_size: Int = Field(default=32, ge=1, description="Rows (dpo: pairs) of an update, over all processes.")
    microbatch: Int = Field(
        default=8, ge=1,
        description="Rows (dpo: pairs) at once, over all processes: they share a class mix and KTO's z0.",
    )  # fmt: skip
    model: LanguageModelConfig = Field(description="The model to align.")
    data: PreferenceDataConfig = Field(description="The data.")
    optimizer: LanguageOptimizerConfig = Field(default=LanguageOptimizerConfig(), description="The optimizer.")
    evaluation: LanguageEvaluationConfig = Field(default=LanguageEvaluationConfig(), description="The evaluation.")
    checkpoint: CheckpointConfig = Field(default=CheckpointConfig(every=100), description="The checkpoints.")
    tracking: LanguageTrackingConfig = Field(default=LanguageTrackingConfig(), description="The tracking.")
    sparsity: SparsityConfig = Field(default=SparsityConfig(), description="Which weights move.")


class KTOConfig(LanguageConfig):
    """A KTO run on thumbs."""

    trainer: Literal["kto"] = Field(default="kto", description="The training loop.")
    name: RunName = "kto"
    objective: KTOObjectiveConfig = Field(default=KTOObjectiveConfig(), description="The objective.")
    reference: ReferenceConfig = Field(default=ReferenceConfig(), description="The reference model.")


class BCOConfig(LanguageConfig):
    """A BCO run on thumbs or scores."""

    trainer: Literal["bco"] = Field(default="bco", description="The training loop.")
    name: RunName = "bco"
    optimizer: LanguageOptimizerConfig = Field(default=LanguageOptimizerConfig(lr=5e-7), description="The optimizer.")
    objective: BCOObjectiveConfig = Field(default=BCOObjectiveConfig(), description="The objective.")
    reference: ReferenceConfig = Field(default=ReferenceConfig(), description="The reference model.")


class DPOConfig(LanguageConfig):
    """A DPO run on pairs."""

    trainer: Literal["dpo"] = Field(default="dpo", description="The training loop.")
    name: RunName = "dpo"
    objective: DPOObjectiveConfig = Field(default=DPOObjectiveConfig(), description="The objective.")
    reference: ReferenceConfig = Field(default=ReferenceConfig(), description="The reference model.")


class SFTConfig(LanguageConfig):
    """Supervised fine-tuning on completions; of rows with thumbs, on those that are up."""

    trainer: Literal["sft"] = Field(default="sft", description="The training loop.")
    name: RunName = "sft"
    optimizer: LanguageOptimizerConfig = Field(default=LanguageOptimizerConfig(lr=1e-5), description="The optimizer.")
