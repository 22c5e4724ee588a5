"""Answers that a language model gives by itself: drawn without gradient, and the same in whatever batch they are drawn.

A token is the largest of `logits / temperature + g`, g a standard Gumbel draw of its own that depends on (seed, prompt,
answer, place) alone: a draw from the softmax, so two models that are alike say the same, and no generator's state is
read or moved. Temperature 0 takes the likeliest token. Source: Gumbel-max, Gumbel (1954).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from align.errors import DataError
from align.preferences import Completion, PreferenceSet, Text, prompt_key
from align.seeding import generator, permutation
from align.types import Samples
from trainers.language_model import quiet
from trainers.preference_data import encode

_ANY = "x"  # encode wants a completion, on which a prompt's tokens do not depend


@dataclass(frozen=True)
class Decoding:
    """How answers are drawn.

    Args:
        max_new_tokens: longest answer, in tokens.
        temperature: what logits are divided by; 0 takes the likeliest token.
        top_p: smallest set of tokens, likeliest first, whose probabilities add up to so much.
        seed: of every draw.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Prompt:
    """A prompt as it was given, as the model reads it, and what its draws are named after."""

    given: Text
    tokens: np.ndarray
    key: str


@dataclass(frozen=True)
class Answer:
    """What a model said: its tokens, an end-of-turn token among them, its text, and whether it came to an end."""

    tokens: np.ndarray
    text: str
    ended: bool


def read_prompts(rows: Sequence[Completion], tokenizer: Any, longest: int | None = None) -> list[Prompt]:
    """Return the prompts of rows as training has them, each cut at its beginning to `longest` tokens.

    Where the completion is a chat, a prompt of text is what the user said; else text is left as it is.

    Raises:
        DataError: a chat that the template refuses.
    """
    chats = [not (isinstance(row.prompt, str) and isinstance(row.completion, str)) for row in rows]
    asked = [
        replace(row, completion=({"role": "assistant", "content": _ANY},) if chat else _ANY)
        for row, chat in zip(rows, chats, strict=True)
    ]
    found = []
    for row, chat, (tokens, _) in zip(rows, chats, encode(asked, tokenizer) if asked else (), strict=True):
        said = ({"role": "user", "content": row.prompt},) if chat and isinstance(row.prompt, str) else row.prompt
        found.append(Prompt(said, np.array(tokens[-longest:] if longest else tokens, dtype=np.int64), prompt_key(row)))
    return found


def choose_prompts(rows: PreferenceSet | None, count: int, seed: int) -> list[Completion]:
    """Return a row each of `count` distinct prompts without images, a function of the rows and the seed, or of all."""
    first: dict[str, Completion] = {}
    for row in rows.rows if rows is not None and count else ():
        if row.prompt and not row.images:
            first.setdefault(prompt_key(row), row)
    distinct = list(first.values())
    return [distinct[i] for i in sorted(permutation(len(distinct), "generations", seed)[:count])]


def answer(
    model: nn.Module,
    prompts: Sequence[Prompt],
    tokenizer: Any,
    decoding: Decoding,
    *,
    count: int = 1,
    batch: int = 16,
    half: bool = False,
    synced: bool = False,
    progress: Callable[[int], Any] = lambda done: None,
) -> list[Answer]:
    """Return `count` answers a prompt, those of a prompt together.

    The model is in evaluation mode meanwhile, and its own sampling defaults (a repetition penalty, top-k) are not used.

    Args:
        model: of transformers, with or without adapters, as it trains or not.
        batch: answers drawn at once.
        half: matrix products in bfloat16.
        synced: every process gives the same answers together, as ZeRO 3 needs.
        progress: told how many answers are done.

    Raises:
        DataError: a prompt that leaves the model no room for a token.
    """
    wanted = [(prompt, member) for prompt in prompts for member in range(count)]
    order = sorted(range(len(wanted)), key=lambda i: len(wanted[i][0].tokens))
    found: dict[int, Answer] = {}
    model = getattr(model, "module", model)  # of DeepSpeed's engine
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    ends = end_tokens(inner, tokenizer)
    training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        with _plain(inner), torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=half):
            for start in range(0, len(order), batch):
                part = order[start : start + batch]
                rows = [wanted[i] for i in part]
                drawn = _draw(model, rows, tokenizer, decoding, ends, _room(inner, rows, decoding), synced)
                found.update(zip(part, (_read(ids, tokenizer, ends) for ids in drawn), strict=True))
                progress(len(found))
    finally:
        model.train(training)
    return [found[i] for i in range(len(wanted))]


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end an answer: the tokenizer's, the model's own, and what its chat template ends a turn
    with."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = {tokenizer.eos_token_id, *(own if isinstance(own, (list, tuple)) else [own])}
    if tokenizer.chat_template:
        import jinja2

        chat = [{"role": "user", "content": _ANY}, {"role": "assistant", "content": "\u2603"}]
        with contextlib.suppress(jinja2.TemplateError, ValueError, KeyError, TypeError):  # then it has no chats
            rest = tokenizer.apply_chat_template(chat, tokenize=False).rpartition("\u2603")[2]
            after = tokenizer(rest, add_special_tokens=False)["input_ids"][:1]
            known = tokenizer.added_tokens_decoder
            found |= {token for token in after if token in known and known[token].special}
    return sorted(token for token in found if token is not None)


def _room(model: Any, rows: Sequence[tuple[Prompt, int]], decoding: Decoding) -> int:
    """Return how many tokens an answer may have here: those asked for, or what the model's window leaves."""
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(len(prompt.tokens) for prompt, _ in rows)
    room = decoding.max_new_tokens if window is None else min(decoding.max_new_tokens, window - longest)
    if room < 1:
        raise DataError(
            "A prompt leaves no room for an answer", why=f"it has {longest} tokens, and the model reads {window}",
            do="Shorten it",
        )  # fmt: skip
    return room


def _draw(
    model: Any, rows: Sequence[tuple[Prompt, int]], tokenizer: Any, decoding: Decoding, ends: list[int], room: int,
    synced: bool,
) -> list[list[int]]:  # fmt: skip
    """Return the new tokens of a batch that is padded on the left."""
    from transformers import GenerationConfig

    width = max(len(prompt.tokens) for prompt, _ in rows)
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for i, (prompt, _) in enumerate(rows):
        ids[i, width - len(prompt.tokens) :] = torch.from_numpy(prompt.tokens)
        mask[i, width - len(prompt.tokens) :] = 1
    device = next(model.parameters()).device
    how = GenerationConfig(
        do_sample=False, max_new_tokens=room, eos_token_id=ends or None, pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )  # fmt: skip
    noise = [_Gumbel(rows, decoding)] if decoding.temperature > 0 else []
    with quiet():
        found = model.generate(
            input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=how, logits_processor=noise,
            synced_gpus=synced,
        )  # fmt: skip
    return found[:, width:].tolist()


class _Gumbel:
    """Adds its own noise to the logits of each row, so that the largest is a draw."""

    def __init__(self, rows: Sequence[tuple[Prompt, int]], decoding: Decoding) -> None:
        from transformers import TopPLogitsWarper

        self.temperature = decoding.temperature
        self.cut = TopPLogitsWarper(decoding.top_p) if decoding.top_p < 1 else None
        self.draws = [generator("answer", decoding.seed, prompt.key, member) for prompt, member in rows]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.float() / self.temperature
        if self.cut is not None:
            scores = self.cut(input_ids, scores)
        noise = torch.stack([torch.empty(scores.shape[1]).exponential_(generator=draw) for draw in self.draws])
        return scores - noise.log().to(scores.device)


def _read(ids: list[int], tokenizer: Any, ends: Sequence[int]) -> Answer:
    """Return the answer in new tokens that go on with padding once it has ended."""
    stop = next((i for i, token in enumerate(ids) if token in ends), None)
    kept = ids if stop is None else ids[: stop + 1]
    said = kept if stop is None else kept[:-1]
    text = tokenizer.decode(said, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Answer(np.array(kept, dtype=np.int64), text, stop is not None)


@contextlib.contextmanager
def _plain(model: Any) -> Iterator[None]:
    """Have a model's own forward, whose arguments `generate` looks at, and no sampling defaults, within the block."""
    from transformers import GenerationConfig

    taught, defaults = model.__dict__.pop("forward", None), model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = defaults
        if taught is not None:
            model.forward = taught


def as_samples(prompts: Sequence[Prompt], answers: Sequence[Answer]) -> Samples:
    """Return answers to prompts as rewards take them: text, or the chat with the answer as its last turn."""
    chats = [
        a.text if isinstance(p.given, str) else [*as_given(p.given), {"role": "assistant", "content": a.text}]
        for p, a in zip(prompts, answers, strict=True)
    ]
    return Samples(prompts=[as_text(p.given) for p in prompts], texts=chats)


def as_given(prompt: Text) -> str | list[dict[str, Any]]:
    """Return a prompt as JSON holds it: text, or a list of messages."""
    return prompt if isinstance(prompt, str) else [dict(message) for message in prompt]


def as_completion(prompt: Prompt, text: str) -> str | list[dict[str, Any]]:
    """Return an answer in the form of its prompt: text, or the assistant's message."""
    return [{"role": "assistant", "content": text}] if not isinstance(prompt.given, str) else text


def as_text(prompt: Text) -> str:
    """Return a prompt as people read it: a chat as lines of "role: content"."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{m['role']}: {_content(m.get('content'))}" for m in prompt)


def _content(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
