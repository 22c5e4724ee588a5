"""The shapes in which feedback comes, each turned into rows of one vocabulary.

A layout is a function from a row of a file to rows with these fields; `events_of` in `reading` turns those into events.

| field                          | what it is                                                                       |
|--------------------------------|----------------------------------------------------------------------------------|
| prompt, input, media           | of the item                                                                      |
| response                       | one output; or response_a and response_b; or responses, a list                   |
| rating, label, reaction, text  | what was said about one output                                                   |
| preference                     | about two: a, b, tie or both_bad                                                 |
| ranks                          | about several, a list                                                            |
| model, policy                  | what made the response; or model_a and model_b, or policy_a and policy_b         |

and `ABOUT`, which an event has under the same names (`event_id` is its id). Other columns of rows about one output stay
with the item as metadata; those of comparisons are reported as left out.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from align.errors import DataError
from align.feedback.exchange.tables import Row, short
from align.feedback.exchange.values import is_missing
from align.registry import suggest

CONTENT = ("prompt", "input", "media", "response", "response_a", "response_b", "responses")
SAID = ("rating", "label", "reaction", "text", "preference", "ranks")
ABOUT = (
    "annotator", "key", "source", "session", "ts", "policy", "position", "latency_ms", "propensity", "exposure",
    "tie_origin", "reply", "scale", "event_id", "identifier",
)  # fmt: skip
# What made a response, which `winrate` compares; `policy` is of `ABOUT`, since the event keeps it too.
MADE_BY = ("model", "model_a", "model_b", "policy_a", "policy_b")
FIELDS = (*CONTENT, *SAID, *ABOUT, *MADE_BY)

# Marks a pair or list that stands in no order anyone saw: the items are then sorted by id, since "chosen first" would
# look like a preference for the first place.
UNORDERED = "_unordered"
# Marks a row of a tool in which a person was shown the item and left it unanswered.
SHOWN = "_shown"

_HELPSTEER = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")

_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bing": "assistant", "bard": "assistant", "model": "assistant", "system": "system", "observation": "tool",
    "tool": "tool", "function_call": "assistant",
}  # fmt: skip


def plain(row: Row) -> Iterator[Row]:
    """Our own field names, as the module's table has them; an `image` or `video` stands for a response that is none."""
    fields = dict(row.fields)
    shown = next((kind for kind in ("image", "video") if not is_missing(fields.get(kind))), None)
    if shown is None or any(name in fields for name in ("response", "response_a", "response_b", "responses")):
        yield row
        return
    fields["response"] = fields.pop(shown)
    fields.setdefault("media", shown)
    yield row.but(fields, response=shown)


def preference(row: Row) -> Iterator[Row]:
    """TRL's preference columns: chosen, rejected and prompt, or a prompt that both begin with."""
    fields = dict(row.fields)
    chosen, rejected = fields.pop("chosen", None), fields.pop("rejected", None)
    for name, value in (("chosen", chosen), ("rejected", rejected)):
        if value is None:
            raise row.wrong(name, "A preference lacks one of its two responses", do="Fill it in, or remove the row")
    if "prompt" not in fields or _in_both(fields["prompt"], chosen, rejected):
        fields["prompt"], chosen, rejected = _split_prompt(row, chosen, rejected)
    found = {**fields, "responses": [chosen, rejected], "preference": "a", UNORDERED: True}
    yield row.but(found, responses="rejected", preference="chosen")


def _in_both(prompt: Any, chosen: Any, rejected: Any) -> bool:
    """Whether two chats begin with the prompt, which stands beside them as text or turns."""
    if not (isinstance(chosen, list) and isinstance(rejected, list) and min(len(chosen), len(rejected)) > 1):
        return False
    if isinstance(prompt, list):
        return bool(prompt) and chosen[: len(prompt)] == prompt == rejected[: len(prompt)]
    first = [turn.get("content") if isinstance(turn, Mapping) else None for turn in chosen[:-1]]
    return isinstance(prompt, str) and chosen[0] == rejected[0] and prompt in first


def _split_prompt(row: Row, chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    if not isinstance(chosen, (str, list)) or type(chosen) is not type(rejected):
        raise row.wrong("chosen", "A preference without a prompt needs two texts or two chats", do="Add a prompt")
    shared = 0
    for one, other in zip(chosen, rejected, strict=False):
        if one != other:
            break
        shared += 1
    if isinstance(chosen, list):
        shared = min(shared, len(chosen) - 1, len(rejected) - 1)
    elif shared and chosen[shared - 1 : shared] == " ":
        shared -= 1
    if shared < 1:
        raise row.wrong("prompt", "A preference has no prompt", why="the two responses begin differently")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def helpsteer(row: Row) -> Iterator[Row]:
    """HelpSteer 1 and 2: prompt and response with five ratings from 0 to 4, of which helpfulness is taken; earlier
    turns of a prompt are marked `<extra_id_1>Assistant` and `<extra_id_1>User`."""
    fields = {name: value for name, value in row.fields.items() if name not in _HELPSTEER}
    turns = re.split(r"\n?<extra_id_1>(User|Assistant)\n", str(fields.get("prompt", "")))
    if len(turns) > 1:
        said = [("User", turns[0]), *zip(turns[1::2], turns[2::2], strict=True)]
        fields["prompt"] = [{"role": who.lower(), "content": text} for who, text in said if text]
    yield row.but({"scale": "0-4", **fields, "rating": row.fields["helpfulness"]}, rating="helpfulness")


def unpaired(row: Row) -> Iterator[Row]:
    """TRL's unpaired preference columns: prompt, completion and label."""
    fields = dict(row.fields)
    yield row.but({**fields, "response": fields.pop("completion", None)}, response="completion")


def ranking(row: Row) -> Iterator[Row]:
    """Several completions of a prompt with the rank of each: prompt, completions and ranks."""
    fields = dict(row.fields)
    found = {**fields, "responses": fields.pop("completions", None), UNORDERED: True}
    yield row.but(found, responses="completions")


def sharegpt(row: Row) -> Iterator[Row]:
    """ShareGPT conversations with a kto_tag or label, or with the chosen and the rejected next turn."""
    fields = dict(row.fields)
    turns = _turns(row, "conversations", fields.pop("conversations", None))
    if system := fields.pop("system", None):
        turns.insert(0, {"role": "system", "content": system})
    if "chosen" in fields and "rejected" in fields:
        pair = [_turns(row, name, [fields.pop(name)]) for name in ("chosen", "rejected")]
        rest = {"prompt": turns, "responses": pair, "preference": "a", UNORDERED: True}
        yield row.but({**fields, **rest}, prompt="conversations", responses="rejected", preference="chosen")
        return
    label = next((name for name in ("kto_tag", "label") if name in fields), "")
    if not label:
        raise row.wrong(
            "conversations", "A conversation has no feedback", do="It needs kto_tag, or chosen and rejected"
        )
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise row.wrong("conversations", "A conversation does not end in an answer", why=f"it has {len(turns)} turns")
    found = {**fields, "prompt": turns[:-1], "response": turns[-1:], "label": fields.pop(label)}
    yield row.but(found, prompt="conversations", response="conversations", label=label)


def _turns(row: Row, column: str, value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, (list, tuple)) or not value:
        raise row.wrong(column, "A conversation is not a list of turns", why=f"found {short(value)}")
    turns = []
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, Mapping):
            raise row.wrong(column, "A turn is not an object", why=f"turn {number} is {short(turn)}")
        who, said = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if not isinstance(who, str) or who not in _ROLES or said is None:
            raise row.wrong(
                column, "A turn is not from anyone known" if said is not None else "A turn says nothing",
                why=f"turn {number} is from {short(who)}", do=f"Known are {', '.join(sorted(_ROLES))}",
            )  # fmt: skip
        turns.append({"role": _ROLES[who], "content": said})
    return turns


def llama_factory(row: Row) -> Iterator[Row]:
    """LLaMA-Factory's alpaca rows: instruction, input, output and kto_tag, or chosen and rejected; system, history."""
    fields = dict(row.fields)
    prompt, given = fields.pop("instruction", None), fields.pop("input", None)
    system, history = fields.pop("system", None), fields.pop("history", None)
    if system or history:
        turns = [{"role": "system", "content": system}] if system else []
        for number, pair in enumerate(history or [], start=1):
            if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
                raise row.wrong(
                    "history", "A history holds pairs of question and answer", why=f"entry {number} is none"
                )
            turns += [{"role": role, "content": part} for role, part in zip(("user", "assistant"), pair, strict=True)]
        fields["prompt"] = [*turns, {"role": "user", "content": f"{prompt}\n{given}" if given else prompt}]
    else:
        fields["prompt"], fields["input"] = prompt, given
    if "chosen" in fields:
        yield from preference(row.but(fields, prompt="instruction"))
        return
    response = fields.pop("output", None)
    if isinstance(fields["prompt"], list):
        response = [{"role": "assistant", "content": response}]
    found = {**fields, "response": response, "label": fields.pop("kto_tag", None)}
    yield row.but(found, prompt="instruction", response="output", label="kto_tag")


def label_studio(row: Row) -> Iterator[Row]:
    """Label Studio's JSON export: a task's data with its annotations (rating, choices, pairwise, textarea)."""
    data, annotations = row.fields.get("data"), row.fields.get("annotations")
    if not isinstance(data, Mapping) or not isinstance(annotations, list):
        raise row.wrong(
            "annotations", "A task has no data or no list of annotations", do="Export as JSON, not JSON-MIN"
        )
    content = _content(row, data)
    names = {name: "data" if name in CONTENT else "annotations" for name in FIELDS}
    for annotation in annotations:
        if not isinstance(annotation, Mapping) or not isinstance(annotation.get("result", []), list):
            raise row.wrong(
                "annotations", "An annotation is not an object with results", why=f"found {short(annotation)}"
            )
        who = annotation.get("completed_by")
        fields = {**content, "annotator": who.get("id", who.get("email")) if isinstance(who, Mapping) else who}
        fields["ts"] = annotation.get("updated_at", annotation.get("created_at"))
        if isinstance(seconds := annotation.get("lead_time"), (int, float)):
            fields["latency_ms"] = round(seconds * 1000)
        results = [] if annotation.get("was_cancelled") else annotation.get("result", [])
        if not results:
            yield row.but({**fields, SHOWN: True}, **names)
        for number, result in enumerate(results):
            name = f"label-studio:{annotation['id']}:{result.get('id', number)}" if "id" in annotation else ""
            yield row.but({**fields, **_result(row, result), "identifier": name}, **names)


def _content(row: Row, data: Mapping[str, Any]) -> dict[str, Any]:
    names = {
        "prompt": ("prompt", "question", "instruction"), "input": ("input",), "media": ("media",),
        "response": ("response", "answer", "output", "image", "video"), "response_a": ("response_a", "response1",
        "answer1", "left"), "response_b": ("response_b", "response2", "answer2", "right"), "responses": ("responses",),
    }  # fmt: skip
    found = {field: data[name] for field, options in names.items() for name in options if name in data}
    if "prompt" not in found or not {"response", "response_a", "responses"} & set(found):
        raise row.wrong(
            "data", "A task's prompt or response has an unknown name", why=f"it has {', '.join(map(str, data))}",
            do="Map it, e.g. --columns prompt=data.question,response=data.reply",
        )  # fmt: skip
    return found


def _result(row: Row, result: Any) -> dict[str, Any]:
    kind, value = result.get("type"), result.get("value")
    if not isinstance(value, Mapping):
        raise row.wrong("annotations", "A result has no value", why=f"found {short(result)}")
    key = {"key": result.get("from_name", "quality")}
    if kind == "rating":
        return {**key, "rating": value.get("rating")}
    if kind == "pairwise":
        return {**key, "preference": value.get("selected")}
    if kind in ("choices", "textarea"):
        words = value.get("choices" if kind == "choices" else "text")
        words = [words] if isinstance(words, str) else words
        if not isinstance(words, list) or len(words) != 1:
            raise row.wrong("annotations", f"A result of type {kind} needs one value", why=f"found {short(words)}")
        return {**key, ("reaction" if kind == "choices" else "text"): words[0]}
    raise row.wrong(
        "annotations", f"Results of type {kind!r} have no meaning as feedback",
        do="Remove them from the export, or add --keep-going",
    )  # fmt: skip


def langfuse(row: Row) -> Iterator[Row]:
    """Langfuse: traces with their scores, or scores that carry the trace's input and output."""
    scores = row.fields.get("scores")
    if "scores" in row.fields and not isinstance(scores, list):
        raise row.wrong("scores", "The scores of a trace are not a list of objects", why=f"found {short(scores)}")
    trace = row.fields.get("trace")
    trace = row.fields if scores is not None else trace if isinstance(trace, Mapping) else row.fields
    content = {"prompt": _said(trace.get("input"), "user"), "response": _said(trace.get("output"), "assistant")}
    content |= {"policy": trace.get("version"), "session": trace.get("sessionId")}
    said = "scores" if scores is not None else "value"
    names = {"prompt": "input", "response": "output", **dict.fromkeys(("rating", "label", "reaction"), said)}
    if scores is not None and not scores:
        found = {**content, "annotator": trace.get("userId"), "ts": trace.get("timestamp"), SHOWN: True}
        yield row.but(found, **names)
    for score in [row.fields] if scores is None else scores:
        if not isinstance(score, Mapping):
            raise row.wrong("scores", "A score is not an object", why=f"found {short(score)}", do="Export full traces")
        yield row.but({**content, **_score(row, score, trace)}, **names)


def _score(row: Row, score: Mapping[str, Any], trace: Mapping[str, Any]) -> dict[str, Any]:
    kinds = {"NUMERIC": "rating", "BOOLEAN": "label", "CATEGORICAL": "reaction"}
    kind, source = score.get("dataType", "NUMERIC"), score.get("source", "API")
    if not isinstance(kind, str) or kind not in kinds:
        raise row.wrong(
            "dataType", "A score is of an unknown type", why=f"found {short(kind)}", do=suggest(str(kind), kinds)
        )
    said = score.get("value")
    if kind == "CATEGORICAL":
        said = score.get("stringValue", said)
    return {
        kinds[kind]: said, "key": score.get("name"), "reply": score.get("comment"), "ts": score.get("timestamp"),
        "annotator": score.get("authorUserId") or trace.get("userId"),
        "source": {"ANNOTATION": "human", "EVAL": "ai"}.get(str(source), "user"),
        "identifier": f"langfuse:{score['id']}" if not is_missing(score.get("id")) else None,
    }  # fmt: skip


def _said(value: Any, role: str) -> Any:
    """Return the text or chat within a trace's input or output, which tools wrap in several ways."""
    if isinstance(value, Mapping):
        if {"role", "content"} <= set(value):
            return [{"role": value["role"], "content": value["content"]}]
        inner = [value[name] for name in ("messages", "content", "text", "input", "output") if name in value]
        return _said(inner[0], role) if len(inner) == 1 else value
    return value


LAYOUTS: dict[str, tuple[Callable[[Row], Iterator[Row]], str]] = {
    "events": (plain, "what `align feedback export` writes, complete"),
    "plain": (plain, "prompt and response with rating, label, reaction, text, preference or ranks"),
    "preference": (preference, "TRL: prompt, chosen, rejected"),
    "unpaired": (unpaired, "TRL: prompt, completion, label"),
    "ranking": (ranking, "prompt, completions, ranks"),
    "helpsteer": (helpsteer, "HelpSteer: prompt and response with five ratings, of which helpfulness is taken"),
    "sharegpt": (sharegpt, "conversations with kto_tag, or chosen and rejected"),
    "llama-factory": (llama_factory, "instruction, input, output, kto_tag"),
    "label-studio": (label_studio, "JSON export: data and annotations"),
    "langfuse": (langfuse, "traces with scores, or scores with input and output"),
}

_SIGNS: tuple[tuple[str, set[str]], ...] = (
    ("events", {"kind", "items"}),
    ("events", {"kind", "items_json"}),
    ("label-studio", {"data", "annotations"}),
    ("langfuse", {"input", "output", "scores"}),
    ("langfuse", {"name", "value", "dataType"}),
    ("sharegpt", {"conversations"}),
    ("llama-factory", {"instruction", "output"}),
    ("llama-factory", {"instruction", "chosen", "rejected"}),
    ("preference", {"chosen", "rejected"}),
    ("helpsteer", {"prompt", "response", *_HELPSTEER}),
    ("ranking", {"completions", "ranks"}),
    ("unpaired", {"completion", "label"}),
    *(("plain", {name}) for name in SAID),
    ("plain", {"response", "exposure"}),
)


def detect(row: Row) -> str:
    """Return the layout whose fields a row has.

    Raises:
        DataError: none has.
    """
    for name, signs in _SIGNS:
        if signs <= set(row.fields):
            return name
    close = ((c, n) for n in map(str, row.fields) for c in difflib.get_close_matches(n, SAID, n=1, cutoff=0.6))
    meant = next((f"Rename {name!r} to {word!r}. Or map" for word, name in close), "Map")
    raise DataError(
        "The columns say nothing about feedback", where=f"{row.place}:{next(iter(row.fields), 1)}",
        why=f"they are {', '.join(map(str, row.fields))}",
        do=f"{meant} them, e.g. --columns prompt=question,response=answer,rating=stars; or, where a CSV file has no"
        " header, name all its columns in order, e.g. --columns prompt,response,rating",
    )  # fmt: skip
