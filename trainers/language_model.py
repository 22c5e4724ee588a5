"""Language models of a configuration: tokenizer or processor, weights, adapters, dropout off."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from align.errors import ModelError, first_line
from align.language_config import LanguageModelConfig
from align.weights import require_inert, require_whole
from trainers.language_images import has_images
from trainers.language_logps import sees, with_completion_logps
from trainers.tiny_language import tiny_model


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' own bars off the terminal: a run shows one line of its own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def resolve_language_model(path: str) -> str:
    """Return the folder of a model that goes by a name of ours, else `path`."""
    if path != "tiny":
        return path
    with quiet():
        return str(tiny_model())


def weights_folder(path: str) -> Path:
    """Return the folder that a model's weights were read from: of a hub name that of its snapshot on this machine.

    Raises:
        ModelError: there is none.
    """
    from transformers.utils import cached_file

    folder = Path(resolve_language_model(path))
    if folder.is_dir():
        return folder
    try:
        return Path(cached_file(path, "config.json", local_files_only=True)).parent
    except (OSError, ValueError) as error:
        raise ModelError(
            "The weights before training are no longer on this machine", where=path, why=first_line(error)
        ) from error


def load_tokenizer(path: str, chat_template: str | None = None) -> Any:
    """Load the tokenizer of a model folder; padding falls back to the end-of-sequence token.

    Raises:
        ModelError: not a tokenizer, or one without an end of sequence.
    """
    from transformers import AutoTokenizer

    folder = resolve_language_model(path)
    require_inert(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if chat_template is not None:
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            "A tokenizer cannot be loaded", where=chat_template or path, why=first_line(error),
            do="Give a folder written by save_pretrained, or `tiny`",
        ) from error  # fmt: skip
    if tokenizer.eos_token_id is None:
        raise ModelError("A tokenizer has no end-of-sequence token", where=path, do="Add eos_token to its config")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def takes_images(path: str) -> bool:
    """Return whether the configuration in a model folder is that of a vision-language model."""
    from transformers import PretrainedConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    found, _ = PretrainedConfig.get_config_dict(resolve_language_model(path))
    return "vision_config" in found and found.get("model_type") in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def over_positions(longest: int, path: str) -> str:
    """Return what is wrong with rows of so many tokens for the model in a folder; empty where nothing is.

    Learnt positions end where the model's do, and rotary ones were never trained beyond.
    """
    from transformers import PretrainedConfig

    found, _ = PretrainedConfig.get_config_dict(resolve_language_model(path))
    text = found.get("text_config") or found
    positions = text.get("max_position_embeddings") or text.get("n_positions")
    if positions is None or longest <= positions:
        return ""
    return f"The longest row has {longest} tokens, and the model was made for {positions}"


def load_processor(path: str, chat_template: str | None = None) -> Any:
    """Load what makes a model's inputs: its tokenizer, or of a vision-language model the processor around it.

    Raises:
        ModelError: see `load_tokenizer`; or a vision-language model without an image processor.
    """
    from transformers import AutoProcessor

    tokenizer = load_tokenizer(path, chat_template)
    try:
        if not takes_images(path):
            return tokenizer
        processor = AutoProcessor.from_pretrained(resolve_language_model(path), trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            "A processor cannot be loaded", where=path, why=first_line(error),
            do="Give a folder with a processor's files; `pip install torchvision` if that is missing",
        ) from error  # fmt: skip
    if not has_images(processor):
        raise ModelError("A vision-language model comes without an image processor", where=path)
    processor.tokenizer = tokenizer
    processor.chat_template = tokenizer.chat_template if chat_template else processor.chat_template
    return processor


def load_language_model(config: LanguageModelConfig, *, seed: int) -> nn.Module:
    """Load the model of a configuration, ready to train: adapters on, dropout off, `logp_labels` understood.

    Trained weights are float32. The frozen ones of a LoRA run take `dtype`. Of a vision-language model only
    the language model trains, unless `train_vision`.

    Raises:
        ModelError: not a language model, adapters without one, or adapters that fit no layer of it.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    folder, lora = resolve_language_model(config.path), config.train == "lora"
    half = lora and config.dtype == "bf16"
    require_whole(folder)
    require_inert(folder)
    try:
        with quiet():
            kind = AutoModelForImageTextToText if takes_images(config.path) else AutoModelForCausalLM
            model = kind.from_pretrained(
                folder, dtype=torch.bfloat16 if half else torch.float32, trust_remote_code=False
            )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            "A language model cannot be loaded", where=config.path, why=first_line(error),
            do="Give a folder written by save_pretrained, or `tiny`",
        ) from error  # fmt: skip
    model.config.use_cache = False
    without_dropout(model)
    if not config.train_vision and sees(model):
        model.requires_grad_(False)
        for part in filter(None, (model.get_decoder(), model.get_output_embeddings())):
            part.requires_grad_(True)
    if lora:
        model = _with_adapters(model, config, seed)
    if config.gradient_checkpointing and lora:
        model.enable_input_require_grads()
    return with_completion_logps(model)


def _with_adapters(model: nn.Module, config: LanguageModelConfig, seed: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    targets: list[str] | str = list(config.lora.targets) if config.lora.targets else "all-linear"
    if not config.train_vision and sees(model):
        targets = _language_targets(model, config.lora.targets)
    partitioned = hasattr(next(model.parameters()), "ds_id")  # ZeRO 3 keeps float32 masters, and wants one dtype
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return get_peft_model(
                model,
                LoraConfig(
                    r=config.lora.rank,
                    lora_alpha=config.lora.alpha,
                    lora_dropout=0.0,
                    target_modules=targets,
                    task_type="CAUSAL_LM",
                ),
                autocast_adapter_dtype=not partitioned,
            )
        except ValueError as error:
            raise ModelError(
                "The adapters fit no layer of the model", where="model.lora.targets", why=first_line(error)
            ) from error


def _language_targets(model: Any, names: Sequence[str] | None) -> str:
    """Return a pattern of the layers of a vision-language model's decoder, all linear ones when not named."""
    decoder = model.get_decoder()
    inside = next(name for name, module in model.named_modules() if module is decoder)
    names = names or sorted({n.split(".")[-1] for n, m in decoder.named_modules() if isinstance(m, nn.Linear)})
    return rf"{re.escape(inside)}\.(.*\.)?({'|'.join(map(re.escape, names))})"


def without_dropout(model: nn.Module) -> None:
    """Switch every dropout of a model off, also those that are numbers of its attention layers."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "attn_dropout", "dropout", "hidden_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
