"""A local model as judge: a causal language model that answers the questions of `align.feedback.annotators`.

Decoding is greedy: the same conversation gets the same reply. Calls from several threads go through the model
together, padded on the left behind the attention mask; that changes speed, and replies by no more than rounding.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from align.errors import ConfigError, DataError, ModelError, first_line
from align.hub import download_folder
from align.weights import file_sha256, weights_sha256
from rewards.chats import Turn, read_turns
from rewards.folders import load_whole, read_model_config
from rewards.placement import Placement
from rewards.tokens import load_tokenizer

CUT = "…"
_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
_GATHER = 0.01  # seconds in which calls that come at once find together
_UNLIMITED = 1 << 20  # a tokenizer without a limit states an astronomic one

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_Asked = tuple[list[int], Future[str]]


class LocalJudge:
    """A causal language model as a function from messages, or a prompt, to a reply.

    Args:
        path: local folder, or hub id. Weights are safetensors; code in the folder is never run.
        placement: see `Placement`.
        dtype: "fp32", or "bf16" / "fp16" for the weights.
        max_new_tokens: most tokens of a reply. One that did not end by then ends in "…", so that no half of a
            number is taken for a number.
        max_length: most tokens of a question; what the model reads, less the reply, when None. A longer one is an
            error: a judge that saw half of an answer judges another answer.

    Raises:
        ConfigError: a length that the model does not have, an unknown placement or dtype.
        ModelError: no such folder, no safetensors, no chat template, or weights of no causal language model.
    """

    def __init__(
        self, path: str | Path, placement: str = "resident", dtype: str = "fp32", max_new_tokens: int = 64,
        max_length: int | None = None,
    ) -> None:  # fmt: skip
        self.placement, self.dtype, self.max_new_tokens = Placement(placement, dtype), dtype, max_new_tokens
        self.folder, self.config, self.tokenizer = read_judge(path)
        self.max_length = self._limit(max_length)
        model, _ = load_whole(
            self.folder, self.config, "AutoModelForCausalLM", "a causal language model", _HALF.get(dtype, torch.float32)
        )
        self.model = self.placement.settle(model)
        added = self.tokenizer.added_tokens_decoder
        self._control = {i: token.content for i, token in added.items() if token.special}
        self._settle_generation()
        self._waiting: deque[_Asked] = deque()
        self._turn, self._most = threading.Lock(), 1 << 10

    def identity(self) -> str:
        """Return 16 hex digits over every file that the replies depend on, the lengths and the dtype."""
        kinds = (".json", ".txt", ".model", ".jinja")
        files = {f.name: file_sha256(f) for f in sorted(self.folder.iterdir()) if f.suffix in kinds and f.is_file()}
        own = [self.dtype, self.max_new_tokens, self.max_length, files, weights_sha256(self.folder)]
        return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:16]

    def __call__(self, messages: str | Sequence[Mapping[str, Any]]) -> str:
        """Return the reply to a conversation, or to a prompt; safe to call from several threads.

        Raises:
            DataError: see `encode`.
        """
        mine = self.encode(messages), Future[str]()
        reply = mine[1]
        self._waiting.append(mine)
        while not reply.done():
            with self._turn:  # whoever holds it serves all who wait
                if not reply.done():
                    self._serve(mine)
        return reply.result()

    def encode(self, messages: str | Sequence[Mapping[str, Any]]) -> list[int]:
        """Return the token ids of a conversation and of the beginning of an assistant's turn.

        Raises:
            DataError: a turn that is no turn, a chat that the template refuses, a text that holds one of the
                tokenizer's control tokens (it could end its turn and speak for the judge), or more tokens than fit.
        """
        turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else read_turns(messages)
        for token in self._control.values():
            if any(token in turn["content"] for turn in turns):
                raise DataError(f"The question holds {token}, which is one of the judge's own tokens")
        ids = list(self.tokenizer(self._text(turns), add_special_tokens=False)["input_ids"])
        if len(ids) > self.max_length:
            raise DataError(f"The question is {len(ids):,} tokens", why=f"the judge reads {self.max_length:,}")
        return ids

    def _text(self, turns: list[Turn]) -> str:
        """Apply the chat template; where it has no place for a system turn, that begins the user's first turn."""
        from jinja2 import TemplateError

        def apply(chat: list[Turn]) -> str:
            # enable_thinking: a template without that switch does not read it.
            return self.tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )

        folds = len(turns) > 1 and [turn["role"] for turn in turns[:2]] == ["system", "user"]
        try:
            text = apply(turns)
            if not folds or turns[0]["content"].strip() in text:
                return text
        except (TemplateError, ValueError, TypeError) as error:
            if not folds:
                raise DataError("The chat template refuses the conversation", why=str(error)) from error
        first = {"role": "user", "content": f"{turns[0]['content']}\n\n{turns[1]['content']}"}
        try:
            return apply([first, *turns[2:]])
        except (TemplateError, ValueError, TypeError) as error:
            raise DataError("The chat template refuses the conversation", why=str(error)) from error

    def _serve(self, mine: _Asked) -> None:
        """Answer `mine` and those who wait. What fails is the caller's own error; the others are asked again."""
        time.sleep(_GATHER)
        self._waiting.remove(mine)
        rows = [mine, *(self._waiting.popleft() for _ in range(min(self._most - 1, len(self._waiting))))]
        try:
            for (_, reply), text in zip(rows, self._generate([ids for ids, _ in rows]), strict=True):
                reply.set_result(text)
        except torch.OutOfMemoryError:
            if len(rows) == 1:
                raise
            self._most = len(rows) // 2
            self._waiting.append(mine)
        finally:
            self._waiting.extendleft(row for row in reversed(rows[1:]) if not row[1].done())

    def _generate(self, rows: Sequence[list[int]]) -> list[str]:
        longest = max(map(len, rows))
        fill = self.model.generation_config.pad_token_id
        batch = {
            "input_ids": [[fill] * (longest - len(ids)) + ids for ids in rows],
            "attention_mask": [[0] * (longest - len(ids)) + [1] * len(ids) for ids in rows],
        }
        # The weights have their precision: nothing here is left to autocast.
        with self.placement.active(self.model) as device, torch.no_grad(), torch.autocast(device.type, enabled=False):
            tensors = {key: torch.tensor(table, device=device) for key, table in batch.items()}
            made = self.model.generate(**tensors)[:, longest:].tolist()
        return [self._reply(ids) for ids in made]

    def _reply(self, ids: list[int]) -> str:
        stops = set(self.model.generation_config.eos_token_id)
        end = next((t for t, token in enumerate(ids) if token in stops), None)
        return self.tokenizer.decode(ids[:end]) + (CUT if end is None else "")

    def _limit(self, asked: int | None) -> int:
        config = self.config.get_text_config()
        own = min(getattr(config, "max_position_embeddings", None) or _UNLIMITED, self.tokenizer.model_max_length)
        most = min(own, _UNLIMITED) - self.max_new_tokens
        if self.max_new_tokens < 1 or most < 1:
            raise ConfigError(
                "A judge's reply does not fit", where=f"max_new_tokens {self.max_new_tokens}",
                why=f"the model reads {own:,} tokens, question and reply", do=f"Give 1 to {own - 1}",
            )  # fmt: skip
        if asked is not None and not 1 <= asked <= most:
            raise ConfigError(
                "The judge cannot read that many tokens", where=f"max_length {asked}", do=f"Give 1 to {most}"
            )
        return asked or most

    def _settle_generation(self) -> None:
        """Greedy, and a reply ends with the first control token, whichever end the model was taught."""
        from transformers import GenerationConfig

        stops = {self.tokenizer.eos_token_id, *self._control}
        found = [self.config.get_text_config().eos_token_id]
        if (self.folder / "generation_config.json").is_file():
            try:
                found.append(GenerationConfig.from_pretrained(self.folder).eos_token_id)
            except (OSError, ValueError, TypeError) as error:
                raise ModelError(
                    "A generation config cannot be read", where=str(self.folder), why=first_line(error)
                ) from error
        for ids in found:
            stops |= set(ids) if isinstance(ids, (list, tuple)) else {ids}
        stops.discard(None)
        if not stops:
            raise ModelError("The tokenizer has no end of text", where=str(self.folder), do="Add eos_token to it")
        pad = self.tokenizer.pad_token_id
        self.model.generation_config = GenerationConfig(
            do_sample=False, num_beams=1, max_new_tokens=self.max_new_tokens, eos_token_id=sorted(stops),
            pad_token_id=min(stops) if pad is None else pad,
        )  # fmt: skip


def read_judge(path: str | Path) -> tuple[Path, Any, Any]:
    """Return folder, configuration and tokenizer of a judge, without its weights.

    Raises:
        ModelError: no such folder, no safetensors, no causal language model, or no chat template.
    """
    here = Path(path).expanduser()
    folder = here if here.is_dir() else download_folder(str(path))
    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        raise ModelError(
            "This is no folder of a language model", where=str(folder),
            why="it holds an adapter alone" if adapter else "it has no config.json",
            do="Merge the adapter into its base model, and give that folder" if adapter
            else "Give a folder written by save_pretrained",
        )  # fmt: skip
    if not any((folder / f"model.safetensors{end}").is_file() for end in ("", ".index.json")):
        raise ModelError(
            "A judge's weights are safetensors", where=str(folder), why="there are none in the folder",
            do="Save the model again with save_pretrained",
        )  # fmt: skip
    config = read_model_config(folder, "a language model")
    for kind in config.architectures or ():
        if kind.endswith("Classification"):
            raise ModelError(
                "A classifier cannot answer", where=str(folder), why=f"it is a {kind}", do="Use it as a text reward"
            )
    if not any((folder / name).is_file() for name in _TOKENIZERS):  # transformers would make an empty one up
        raise ModelError("The folder has no tokenizer", where=str(folder), do="Save the model's tokenizer into it")
    tokenizer = load_tokenizer(str(folder))
    if not tokenizer.chat_template:
        raise ModelError(
            "The tokenizer has no chat template", where=str(folder), do="Give a model that was tuned to follow chats"
        )
    return folder, config, tokenizer
