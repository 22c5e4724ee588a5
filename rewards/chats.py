"""Chats: what a prompt and a completion are, whether given as text or as turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from align.errors import DataError
from align.types import Samples

Turn = dict[str, str]
_ROLES = ("system", "developer", "user", "assistant", "tool")


def as_turns(prompt: str, completion: str | Sequence[Mapping[str, Any]]) -> list[Turn]:
    """Return the whole conversation.

    A text, or a chat that begins with an assistant's turn, answers `prompt`; any other chat is the conversation.

    Raises:
        DataError: a turn without a known role or without text, naming it.
    """
    if isinstance(completion, str):
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    turns = read_turns(completion)
    return [{"role": "user", "content": prompt}, *turns] if turns[0]["role"] == "assistant" else turns


def read_turns(chat: Sequence[Mapping[str, Any]]) -> list[Turn]:
    """Return the turns of a chat, the parts of each joined to one text.

    Raises:
        DataError: no turn, or one without a known role or without text, naming it.
    """
    if not chat:
        raise DataError("The conversation is empty")
    return [_turn(turn, i) for i, turn in enumerate(chat)]


def _turn(turn: Any, i: int) -> Turn:
    if not isinstance(turn, Mapping) or turn.get("role") not in _ROLES:
        found = turn.get("role") if isinstance(turn, Mapping) else type(turn).__name__
        raise DataError(f"Turn {i} of the conversation has no known role", why=f"found {found!r}")
    content = turn.get("content")
    if content is None and turn.get("tool_calls"):
        content = ""
    if isinstance(content, (list, tuple)) and all(isinstance(p, Mapping) and "text" in p for p in content):
        content = "".join(str(part["text"]) for part in content)
    if not isinstance(content, str):
        raise DataError(f"Turn {i} of the conversation holds no text", why=f"found {type(content).__name__}")
    return {"role": str(turn["role"]), "content": content}


def split_turns(turns: Sequence[Turn]) -> tuple[list[Turn], list[Turn]]:
    """Return (prompt, completion) of a conversation: the completion is all that follows the last user turn."""
    users = [i for i, turn in enumerate(turns) if turn["role"] == "user"]
    cut = users[-1] + 1 if users else next((i for i, t in enumerate(turns) if t["role"] == "assistant"), len(turns))
    return list(turns[:cut]), list(turns[cut:])


def completion_text(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """Return what the model said: the text, or the assistant's turns after the last user turn, one a line.

    Raises:
        DataError: see `as_turns`.
    """
    if isinstance(completion, str):
        return completion
    answer = split_turns(as_turns("", completion))[1]
    return "\n".join(turn["content"] for turn in answer if turn["role"] == "assistant")


def require_texts(samples: Samples, name: str) -> Sequence[str | Sequence[Mapping[str, str]]]:
    """Return the completions of samples, for the reward `name`.

    Raises:
        DataError: samples of another kind.
    """
    if samples.texts is None:
        raise DataError(f"The reward {name!r} scores texts", why=f"it was given {samples.media}")
    return samples.texts
