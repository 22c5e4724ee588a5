"""A sequence classifier from a transformers folder, and how a conversation is put to it.

A logit is a function of its own conversation: it is what the folder's own model says of that conversation alone,
whatever it is batched with. Rows are padded on the right, behind the attention mask, with a token that the model
does not pool.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align.errors import ConfigError, DataError, ModelError
from align.hub import download_folder
from align.registry import suggest
from align.types import Samples
from align.weights import file_sha256, weights_sha256
from rewards.base import RewardCard, identity_of
from rewards.chats import as_turns, completion_text, require_texts
from rewards.folders import load_whole, read_model_config
from rewards.placement import Placement
from rewards.tokens import load_tokenizer

TEMPLATES = ("chat", "plain", "pair", "completion")
Encoded = dict[str, list[int]]
_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
_UNLIMITED = 1 << 20  # a tokenizer without a limit states an astronomic one
_NO_PAD = -1  # no token: the model pools the last one
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "longformer")


class Classifier:
    """A sequence classifier.

    Args:
        path: local folder, or hub id. Weights are safetensors, or a torch file that holds tensors and nothing else;
            code in the folder is never run.
        template: "chat" applies the tokenizer's own chat template; "plain" joins the turns by newlines; "pair" gives
            the last turn as the second sentence of a pair; "completion" gives the completion alone.
        max_length: most tokens, the model's own limit when None. Of a longer conversation the end is kept: that is
            where the completion is.
        placement, batch_size: see `Placement`.
        dtype: "fp32", or "bf16" / "fp16" for the weights of the body; the head is float32 and computes so.
        labels: how many outputs it must have, any number when None.

    Raises:
        ConfigError: an unknown template, "chat" without a chat template, or a max_length beyond the model's.
        ModelError: no such folder, a model that needs its own code, weights that are no trained classifier's.
    """

    def __init__(
        self, path: str, template: str = "chat", max_length: int | None = None, placement: str = "resident",
        dtype: str = "fp32", batch_size: int | None = None, labels: int | None = None,
    ) -> None:  # fmt: skip
        if template not in TEMPLATES:
            raise ConfigError(f"Unknown template {template!r} of a text reward", do=suggest(str(template), TEMPLATES))
        self.template, self.dtype, self.placement = template, dtype, Placement(placement, dtype, batch_size)
        here = Path(path).expanduser()
        self.folder = here if here.is_dir() else download_folder(str(path))
        self.config = read_model_config(self.folder, "a transformers classifier")
        self.tokenizer = load_tokenizer(str(self.folder))
        if labels is not None and self.config.num_labels != labels:
            raise ModelError(
                f"A classifier with {labels} output{'s' * (labels > 1)} is needed", where=str(path),
                why=f"this one has {self.config.num_labels}",
            )  # fmt: skip
        if template == "chat" and not self.tokenizer.chat_template:
            raise ConfigError(
                "The tokenizer has no chat template", where=str(path),
                do="Say how the model was trained to be asked: template: plain, pair or completion",
            )  # fmt: skip
        self.tokenizer.truncation_side = "left"
        self.max_length = _limit(self.config, self.tokenizer, max_length)
        self.model = self.placement.settle(_loaded(self.folder, self.config, _HALF.get(dtype)))
        self.pad = _padding(self.model.config, self.tokenizer)

    def identity(self, card: RewardCard, arguments: dict[str, Any]) -> str:
        """Return a hash over every file that the logits depend on, the template, length, dtype and `arguments`."""
        kinds = (".json", ".txt", ".model", ".jinja")
        files = {f.name: file_sha256(f) for f in sorted(self.folder.iterdir()) if f.suffix in kinds and f.is_file()}
        own = {"template": self.template, "max_length": self.max_length, "dtype": self.dtype}
        return identity_of(card, {**own, **arguments, "files": files, "weights": weights_sha256(self.folder)})

    def logits(self, samples: Samples, name: str) -> tuple[np.ndarray, list[str], list[bool | None]]:
        """Return float64 logits `[B, labels]`, what is wrong with each sample, and whether its beginning was cut."""
        texts = require_texts(samples, name)
        encoded: dict[int, Encoded] = {}
        wrong: list[str] = [""] * len(samples)
        truncated: list[bool | None] = [None] * len(samples)
        for i, (prompt, completion) in enumerate(zip(samples.prompts, texts, strict=True)):
            try:
                encoded[i], truncated[i] = self.encode(prompt, completion)
            except DataError as error:
                wrong[i] = f"{name}: {error}"
        values = np.full((len(samples), self.config.num_labels), np.nan)
        # The head is float32: nothing here is left to autocast.
        with self.placement.active(self.model) as device, torch.no_grad(), torch.autocast(device.type, enabled=False):
            for rows in self._batches(encoded, device):
                values[rows] = self.forward([encoded[i] for i in rows], device).double().cpu().numpy()
        for i in encoded:
            if not np.isfinite(values[i]).all():
                wrong[i] = f"{name}: the model returned a value that is not a number"
        return values, wrong, truncated

    def encode(self, prompt: str, completion: Any) -> tuple[Encoded, bool]:
        """Return the token ids of a conversation, and whether its beginning was cut off.

        Raises:
            DataError: a turn that is no turn, a chat that the template refuses, or nothing to read.
        """
        turns = as_turns(prompt, completion)
        if self.template == "chat":
            ids = self.tokenizer(self._chat(turns), add_special_tokens=False)["input_ids"]
            kept = ids[-self.max_length :]
            if len(kept) < len(ids) and ids[0] == self.tokenizer.bos_token_id:
                kept[0] = ids[0]
            whole, truncated = {"input_ids": kept}, len(kept) < len(ids)
        else:
            contents = [turn["content"] for turn in turns]
            parts = {
                "plain": ["\n".join(contents)],
                "pair": ["\n".join(contents[:-1]), contents[-1]],
                "completion": [completion_text(completion)],
            }[self.template]
            whole = self.tokenizer(*parts)
            truncated = len(whole["input_ids"]) > self.max_length
            if truncated:
                whole = self.tokenizer(*parts, truncation=True, max_length=self.max_length)
        if not whole["input_ids"]:
            raise DataError("The conversation is empty")
        segments = getattr(self.config, "type_vocab_size", 0) > 1
        keys = [key for key in whole if key == "input_ids" or (key == "token_type_ids" and segments)]
        return {key: list(whole[key]) for key in keys}, truncated

    def _chat(self, turns: list[dict[str, str]]) -> str:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(turns, tokenize=False)
        except (TemplateError, ValueError, TypeError) as error:
            raise DataError("The chat template refuses the conversation", why=str(error)) from error

    def forward(self, rows: Sequence[Encoded], device: torch.device) -> Tensor:
        """Return float32 logits `[b, labels]`."""
        longest = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": self.pad, "token_type_ids": self.tokenizer.pad_token_type_id}
        batch = {key: [row[key] + [fill[key]] * (longest - len(row[key])) for row in rows] for key in rows[0]}
        batch["attention_mask"] = [[int(t < len(row["input_ids"])) for t in range(longest)] for row in rows]
        return self.model(**{key: torch.tensor(table, device=device) for key, table in batch.items()}).logits.float()

    def _batches(self, encoded: dict[int, Encoded], device: torch.device) -> Iterator[list[int]]:
        """Yield the rows that go together: alike in length, so that little is padded, the longest first."""
        length = {i: len(row["input_ids"]) for i, row in encoded.items()}
        left = sorted(encoded, key=lambda i: (-length[i], i))
        while left:
            first = left[0]
            forward = functools.partial(self.forward, device=device)
            size = self.placement.rows(
                str(length[first].bit_length()),
                forward_one=functools.partial(forward, [encoded[first]]),
                forward_two=functools.partial(forward, [encoded[first]] * 2),
                modules=[self.model],
            )
            if self.pad == _NO_PAD:
                size = min(size, sum(length[i] == length[first] for i in left))
            yield left[:size]
            left = left[size:]


def _limit(config: Any, tokenizer: Any, asked: int | None) -> int:
    own = min(getattr(config, "max_position_embeddings", None) or _UNLIMITED, _UNLIMITED)
    if config.model_type in _OFFSET_POSITIONS:  # their first position is the one after the padding's
        own -= (config.pad_token_id or 0) + 1
    own = min(own, tokenizer.model_max_length)
    if asked is not None and not 2 <= asked <= own:
        raise ConfigError("The model cannot read that many tokens", where=f"max_length {asked}", do=f"Give 2 to {own}")
    return asked or own


def _loaded(folder: Path, config: Any, half: torch.dtype | None) -> Any:
    """Return the model with every weight from the folder; a head that would be made up is an error."""
    model, state = load_whole(
        folder, config, "AutoModelForSequenceClassification", "a trained classifier", half or torch.float32
    )
    for name, head in model.named_children() if half is not None else ():
        if name != model.base_model_prefix:
            for key, weight in head.named_parameters():
                weight.data = state.get(f"{name}.{key}", weight.data).float()
            head.register_forward_pre_hook(lambda module, args: tuple(a.float() for a in args))
    return model


def _padding(config: Any, tokenizer: Any) -> int:
    """Settle what fills a row: what the model itself reads as padding, else the tokenizer's own pad token.

    A causal model pools the last token that is not its padding, so it must know it. Where the tokenizer has none, or
    only the end of text, nothing is padded and the last token is pooled: only rows of one length go together.
    """
    config, own = config.get_text_config(), tokenizer.pad_token_id
    if config.pad_token_id is None:
        config.pad_token_id = _NO_PAD if own is None or own == tokenizer.eos_token_id else own
    return int(config.pad_token_id)
