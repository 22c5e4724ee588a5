"""What `sample` and `evaluate` are given of language models, opened: the model, and the prompts it answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from align import checkpoint
from align.errors import ConfigError, DataError, ModelError
from align.language_config import LanguageConfig, LanguageModelConfig
from align.preferences import Completion, parse_row
from align.prompts import read_rows
from trainers.language import read_data
from trainers.language_generation import Decoding, Prompt, as_given, choose_prompts, read_prompts
from trainers.language_images import has_images
from trainers.language_model import load_language_model, load_processor
from trainers.language_objective import Models
from trainers.language_reference import Reference
from trainers.sources import NAME_PROMPTS, Source, find_source

BEFORE = "before"
"""What rows of answers call the model before training."""


@dataclass(frozen=True)
class LanguageSource:
    """A language model that was opened.

    Args:
        models: policy and, where it is known, the model before training.
        processor: its tokenizer, or processor of images and text, with the chat template the run had.
        config: of the run or recipe; None for a bare folder.
        step: of the checkpoint; 0 for a recipe, None for a bare folder.
        run: the run folder, None outside of one.
    """

    models: Models
    processor: Any
    config: LanguageConfig | None
    step: int | None
    run: Path | None
    name: str

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return self.processor.tokenizer if has_images(self.processor) else self.processor

    @property
    def policy(self) -> str:
        """What rows of its answers call the model."""
        return self.name if self.step is None else f"step {self.step}" if self.step else BEFORE

    @property
    def half(self) -> bool:
        """Whether matrix products are in bfloat16."""
        return self.config is not None and self.config.model.dtype == "bf16"


def find_language(source: str | Path, config: LanguageConfig | None = None) -> Source:
    """Find a language model.

    Args:
        source: see `find_source`.
        config: what a bare folder was trained with.

    Raises:
        ConfigError: a model that makes images.
    """
    found = find_source(source)
    if not found.language:
        raise ConfigError("A model of images completes no text", where=found.name, do="Give a language model")
    return found if found.config is not None else replace(found, config=config)


def open_language(found: Source) -> LanguageSource:
    """Open a run folder (its last checkpoint), a checkpoint folder, a recipe, or a folder of transformers or PEFT.

    Args:
        found: of `find_source`; a bare folder may be given the config it was trained with.

    Raises:
        CheckpointError: a run without a checkpoint, or one whose files have changed.
        ConfigError: a model that makes images.
        ModelError: not a language model.
    """
    config, folder = found.config, found.folder
    step = 0 if folder is None else None
    if found.checkpoint is not None:
        step = int(checkpoint.verify(found.checkpoint)["step"])
    policy, before = _load(folder, config)
    path, template = (config.model.path, config.model.chat_template) if config is not None else (found.name, None)
    if config is None and folder is not None and (folder / "adapter_config.json").is_file():
        path = str(folder) if (folder / "tokenizer_config.json").is_file() else _base_of(folder)
    return LanguageSource(
        Models(policy, policy, before), load_processor(path, template), config, step, found.run, found.name
    )


def _load(folder: Path | None, config: LanguageConfig | None) -> tuple[nn.Module, Reference | None]:
    """Return the policy in `folder`, or the untrained one, and the model before training where there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    adapters = folder is not None and (folder / "adapter_config.json").is_file()
    if config is not None:
        settings = config.model
    else:
        settings = LanguageModelConfig(path=_base_of(folder) if adapters else str(folder), train="full")
    if adapters:
        plain = settings.model_copy(update={"train": "full"})
        policy = load_language_model(settings if settings.train == "lora" else plain, seed=0)
        policy = _with_saved_adapters(policy, folder)
        return policy.to(device).eval(), Reference("lora_off", policy)
    if folder is None or config is None:  # nothing has been trained, or it is not known what it was trained from
        policy = load_language_model(settings.model_copy(update={"train": "full"}), seed=0).to(device).eval()
        return policy, None if config is None else _standing(policy)
    policy = load_language_model(settings.model_copy(update={"path": str(folder)}), seed=0).to(device).eval()
    before = load_language_model(settings, seed=0).to(device)
    return policy, _standing(before)


def _standing(model: nn.Module) -> Reference:
    """Return a model that stands by itself as a reference."""
    reference = Reference("precomputed", model)
    reference.copy = model.requires_grad_(False).eval()
    return reference


def _with_saved_adapters(model: nn.Module, folder: Path) -> nn.Module:
    """Put the adapters of a PEFT folder onto a model, into those it has or as new ones."""
    from peft import PeftModel, set_peft_model_state_dict

    from align.weights import load_tensors, require_inert

    require_inert(folder)
    if not hasattr(model, "disable_adapter"):
        return PeftModel.from_pretrained(model, folder)
    unknown = set_peft_model_state_dict(model, load_tensors(folder / "adapter_model.safetensors")).unexpected_keys
    if unknown:
        raise ModelError("Saved adapters fit no layer of the model", where=str(folder), why=unknown[0])
    return model


def _base_of(folder: Path | None) -> str:
    """Return the model that the adapters of a PEFT folder were trained on."""
    path = Path(str(folder)) / "adapter_config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError("Adapters do not say which model they are of", where=str(path), why=str(error)) from error
    return str(found)


def decoding_of(
    opened: LanguageSource, seed: int | None, temperature: float | None, top_p: float, longest: int | None
) -> Decoding:
    """Return how answers are drawn: as asked for, else as the run does, else with seed 0 at temperature 1."""
    config, plain = opened.config, Decoding()
    own = plain if config is None else replace(
        plain, seed=config.seed, temperature=config.evaluation.temperature,
        max_new_tokens=config.evaluation.max_new_tokens,
    )  # fmt: skip
    return Decoding(
        max_new_tokens=own.max_new_tokens if longest is None else longest,
        temperature=own.temperature if temperature is None else temperature,
        top_p=top_p,
        seed=own.seed if seed is None else seed,
    )


def load_asked(prompts: str | Path | Sequence[str], chat: bool = False) -> list[Completion]:
    """Return the prompts of a file, or texts, as rows without an answer; each prompt once, in file order.

    A prompt is text, or a chat as a list of messages, of which the last is not the assistant's.

    Raises:
        DataError: a row without a prompt, or a chat that has been answered; each names file and row.
    """
    if isinstance(prompts, (str, Path)):
        given = [(f"{prompts}, {place}", row) for place, row in read_rows(prompts)]
    else:
        given = [(f"prompt {i}", {"prompt": text}) for i, text in enumerate(prompts, start=1)]
    found: dict[Any, Completion] = {}
    for place, fields in given:
        row = _asked(fields, place, chat)
        found.setdefault(json.dumps(as_given(row.prompt)), row)
    if not found:
        raise DataError("There is no prompt", where=str(prompts), why="it is empty")
    return list(found.values())


def _asked(fields: Any, place: str, chat: bool) -> Completion:
    if not isinstance(fields, Mapping) or not fields.get("prompt"):
        raise DataError("A row has no prompt", where=place, do="Give it a field 'prompt': text or a list of messages")
    wanted = {k: fields[k] for k in ("prompt", "tools", "chat_template_kwargs") if k in fields}
    row = parse_row({**wanted, "completion": ""}, place)[0]
    if not isinstance(row.prompt, str) and row.prompt[-1]["role"] == "assistant":
        raise DataError("A chat to answer ends with the assistant", where=f"{place}, field 'prompt'")
    return replace(row, completion=({"role": "assistant", "content": ""},)) if chat else row


def asked_of(
    found: Source, prompts: str | Path | Sequence[str] | None, chat: bool, most: int | None = None
) -> list[Completion]:
    """Return rows with the prompts asked for, or with `most` of a run's held-out ones.

    Raises:
        ConfigError: neither are there.
    """
    if prompts is not None:
        return load_asked(prompts, chat)
    config = found.config
    if config is None:
        raise ConfigError("A model by itself brings no prompts", where=found.name, do=NAME_PROMPTS)
    rows = choose_prompts(read_data(config)[1], config.evaluation.prompts if most is None else most, config.seed)
    if not rows:
        raise ConfigError(
            "There is no held-out prompt of text to answer", where=found.name,
            do="Give a prompts file, hold rows out, or set evaluation.prompts above 0",
        )  # fmt: skip
    return rows


def prompts_of(opened: LanguageSource, rows: Sequence[Completion]) -> list[Prompt]:
    """Return the prompts of rows as the model reads them, cut as in its training."""
    return read_prompts(rows, opened.tokenizer, opened.config.data.max_prompt_length if opened.config else None)
