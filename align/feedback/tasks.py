"""The task file: what annotators are asked, about which outputs, in which order, by how many of them.

A task is one YAML file beside its data. `load_task` reads both and cuts the outputs into units, one unit being what
stands on one screen:

| kind       | a unit is                                                                             |
|------------|---------------------------------------------------------------------------------------|
| `rating`   | one output, rated on every dimension                                                  |
| `thumbs`   | one output, with a thumb and reactions                                                |
| `pairwise` | two outputs of one prompt: every pair once, or in both orders                         |
| `ranking`  | `k` outputs of one prompt; a prompt with more is cut into sets that cover all of them |
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, ValidationError

from align.errors import ConfigError
from align.feedback.events import Item
from align.registry import suggest
from align.seeding import seed as derive_seed
from align.textfiles import parse_yaml, read_text

CONTENT = ("response", "responses", "image", "images", "video", "videos")

Int = Annotated[int, Strict()]
Bool = Annotated[bool, Strict()]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._ -]*$", max_length=80)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class DimensionConfig(_Section):
    """One quality that is judged."""

    name: Name = Field(description="The key of its events.")
    question: str = Field(default="", description="What is asked; empty shows the name.")
    low: str = Field(default="", description="What the lowest value means.")
    high: str = Field(default="", description="What the highest value means.")


class ExampleConfig(_Section):
    """A worked example, shown with the instructions."""

    prompt: str = Field(description="What was asked for.")
    responses: tuple[str, ...] = Field(min_length=1, description="The outputs, as texts.")
    answer: str = Field(description="The right answer.")
    why: str = Field(default="", description="Why it is the right answer.")


class GoldConfig(_Section):
    """Units whose answer is known, shown to everyone among the others."""

    data: str = Field(min_length=1, description="A file like `data` with one more column, `answer`.")
    every: Int = Field(default=10, ge=1, description="One gold unit comes after this many others.")
    tolerance: Int = Field(default=1, ge=0, description="How far a rating may lie from the answer and still be right.")


def _named(value: Any) -> Any:
    """Let a list of names be a list of dimensions."""
    return [{"name": v} if isinstance(v, str) else v for v in value] if isinstance(value, (list, tuple)) else value


class TaskConfig(_Section):
    """Everything a task file can say."""

    name: Name = Field(description="Names the task in its events; answers belong to the task of this name.")
    kind: Literal["rating", "pairwise", "ranking", "thumbs"] = Field(description="What is asked about the outputs.")
    data: str = Field(min_length=1, description="JSONL, CSV or Parquet, relative to the task file.")
    columns: dict[str, str] = Field(default={}, description="Other names of columns, such as {prompt: instruction}.")
    question: str = Field(default="", description="What is asked above the outputs.")
    dimensions: Annotated[tuple[DimensionConfig, ...], BeforeValidator(_named)] = Field(
        default=(DimensionConfig(name="quality"),), min_length=1, max_length=12,
        description="What a rating judges; pairwise and ranking judge one.",
    )  # fmt: skip
    scale: tuple[Int, Int] = Field(default=(1, 7), description="Lowest and highest rating.")
    tie: Bool = Field(default=True, description="Offer a tie, or equal ranks.")
    both_bad: Bool = Field(default=False, description="Offer `both are bad` in a pairwise task.")
    k: Int = Field(default=4, ge=2, le=9, description="How many outputs are ranked at once.")
    reactions: tuple[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]*$")], ...] = Field(
        default=(), max_length=9, description="Reactions offered beside the thumbs."
    )
    ask_reason: Literal["no", "optional", "required"] = Field(default="no", description="Ask why.")
    ask_correction: Literal["no", "optional", "required"] = Field(
        default="no", description="Ask for a better response, where one text is shown."
    )
    both_orders: Bool = Field(default=False, description="Ask every pair twice, once in each order.")
    annotators_per_item: Int = Field(default=1, ge=1, description="How many distinct annotators answer each unit.")
    reservation_minutes: Int = Field(default=30, ge=1, description="How long a shown unit is kept for its annotator.")
    order: Literal["random", "file"] = Field(
        default="random", description="Order of units, and of outputs on a screen."
    )
    seed: Int = Field(default=0, ge=0, description="Seed of the random order.")
    instructions: str = Field(default="", description="What annotators should know: a little Markdown.")
    examples: tuple[ExampleConfig, ...] = Field(default=(), description="Worked examples.")
    gold: GoldConfig | None = Field(default=None, description="Units whose answer is known.")


ONLY_FOR = {
    "scale": ("rating",), "tie": ("pairwise", "ranking"), "both_bad": ("pairwise",), "k": ("ranking",),
    "reactions": ("thumbs",), "both_orders": ("pairwise",), "ask_correction": ("rating", "thumbs"),
}  # fmt: skip


@dataclass(frozen=True)
class Unit:
    """What stands on one screen.

    Args:
        id: hash of the task's name and the items in order.
        items: what is shown; in this order where `fixed`, else in a random one.
        fixed: whether the order of the items is part of the question.
        gold: the known answer, None where there is none.
    """

    id: str
    items: tuple[Item, ...]
    fixed: bool = False
    gold: Any = None


@dataclass(frozen=True)
class Task:
    """A task file with its data read.

    Args:
        config: the file.
        path: where it is.
        units: everything that is asked, in file order.
        gold: units with a known answer.
        media: file of each image and video by item id.
        duplicates: rows that repeated an earlier one and were left out.
    """

    config: TaskConfig
    path: Path
    units: tuple[Unit, ...]
    gold: tuple[Unit, ...] = ()
    media: Mapping[str, Path] = field(default_factory=dict)
    duplicates: int = 0

    @property
    def items(self) -> dict[str, Item]:
        """Every item by id."""
        return {item.id: item for unit in (*self.units, *self.gold) for item in unit.items}


def load_task(path: str | Path) -> Task:
    """Read a task file and its data.

    Raises:
        ConfigError: an unknown key (with the closest one), a wrong value, or an option of another kind of task.
        DataError: data that cannot be read, a row without prompt or output, a media file that is missing, lies
            outside the task's folder or is not what its ending says, a prompt with too few outputs.
    """
    path = Path(path)
    document = parse_yaml(read_text(path), str(path))
    if not isinstance(document.value, dict):
        raise ConfigError("A task file is a list of `key: value` lines", where=str(path), do="Start with `name:`")
    try:
        config = TaskConfig.model_validate(document.value)
    except ValidationError as error:
        raise _explain(error, document.lines, str(path)) from error
    _consistent(config, str(path))
    from align.feedback.task_data import read_gold, read_units

    media: dict[str, Path] = {}
    units, repeated = read_units(config, path, media)
    return Task(config, path, units, read_gold(config, path, media), media, repeated)


def describe_task(task: Task) -> dict[str, Any]:
    """Return what a task comes to: how many prompts, outputs, screens and answers."""
    config = task.config
    items = [item for unit in task.units for item in unit.items]
    return {
        "name": config.name,
        "kind": config.kind,
        "prompts": len({item.prompt_id for item in items}),
        "outputs": len({item.id for item in items}),
        "media": sorted({item.media for item in items}),
        "screens": len(task.units),
        "gold": len(task.gold),
        "answers_wanted": len(task.units) * config.annotators_per_item,
        "annotators_per_item": config.annotators_per_item,
        "order": config.order if config.order == "file" else f"random, seed {config.seed}",
        "duplicates_left_out": task.duplicates,
    }


def _consistent(config: TaskConfig, where: str) -> None:
    for name, kinds in ONLY_FOR.items():
        if name in config.model_fields_set and config.kind not in kinds:
            raise ConfigError(
                f"A {config.kind} task does not read {name!r}", where=where, why=f"it belongs to {' and '.join(kinds)}",
                do="Remove it, or change the kind",
            )  # fmt: skip
    if not config.scale[0] < config.scale[1]:
        raise ConfigError("A scale runs from low to high", where=where, why=f"scale is {list(config.scale)}")
    names = [dimension.name for dimension in config.dimensions]
    if len(set(names)) < len(names):
        raise ConfigError("Two dimensions have one name", where=where, why=", ".join(names), do="Rename one")
    if len(set(config.reactions)) < len(config.reactions):
        raise ConfigError("A reaction is listed twice", where=where, why=", ".join(config.reactions))
    if config.kind != "rating" and len(names) > 1:
        raise ConfigError(f"A {config.kind} task judges one dimension", where=where, why=f"there are {len(names)}")
    if unknown := next((name for name in config.columns if name not in ("prompt", "input", "policy", *CONTENT)), None):
        raise ConfigError(
            f"Unknown column {unknown!r}", where=f"{where}, columns",
            do=suggest(unknown, ("prompt", "input", "policy", *CONTENT)),
        )  # fmt: skip


def _explain(error: ValidationError, lines: Mapping[str, int], where: str) -> ConfigError:
    """One sentence for the first problem: line, key, what was found and what is expected, or the closest key."""
    problems = error.errors(include_url=False)
    # A mistyped key is also a missing one: name the mistake.
    first = next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])
    loc = [part for part in first["loc"] if not isinstance(part, str) or not part.startswith("function")]
    key = ".".join(map(str, loc))
    above = next((lines[k] for n in range(len(loc), 0, -1) if (k := ".".join(map(str, loc[:n]))) in lines), None)
    place = f"{where}:{above}" if above else where
    sections: dict[str, type[BaseModel]] = {
        "dimensions": DimensionConfig,
        "examples": ExampleConfig,
        "gold": GoldConfig,
    }
    known = sections.get(str(loc[0]), TaskConfig) if len(loc) > 1 else TaskConfig
    if first["type"] == "extra_forbidden":
        return ConfigError(f"Unknown key {key!r}", where=place, do=suggest(str(loc[-1]), known.model_fields))
    about = known.model_fields.get(str(loc[-1]))
    meaning = f"Meaning: {about.description}" if about and about.description else ""
    if first["type"] == "missing":
        return ConfigError(f"The key {key!r} is missing", where=place, do=meaning)
    why = f"found {first['input']!r}; {first['msg'][0].lower()}{first['msg'][1:]}"
    return ConfigError(f"The value of {key!r} is wrong", where=place, why=why, do=meaning)


def gold_right(config: TaskConfig, unit: Unit, answer: Mapping[str, Any]) -> bool:
    """Return whether an answer (value by key, as its events hold it) agrees with a gold unit's.

    A rating agrees within `gold.tolerance` on every dimension that has an answer, a ranking when it orders every two
    outputs alike (ties included), anything else when it is the same.
    """
    if config.kind == "rating":
        wanted = unit.gold if isinstance(unit.gold, dict) else {config.dimensions[0].name: unit.gold}
        limit = config.gold.tolerance if config.gold else 0
        return all(abs(answer.get(key, limit + value + 1) - value) <= limit for key, value in wanted.items())
    if config.kind == "thumbs":
        return answer.get("thumb") == unit.gold
    given = answer.get(config.dimensions[0].name)
    if config.kind == "pairwise" or not isinstance(given, (list, tuple)):
        return given == unit.gold
    pairs = itertools.combinations(range(len(unit.gold)), 2)
    return all(_sign(given[i] - given[j]) == _sign(unit.gold[i] - unit.gold[j]) for i, j in pairs)


def _sign(number: int) -> int:
    return (number > 0) - (number < 0)


def shuffled(count: int, *key: int | str) -> list[int]:
    """Return a uniformly random order of `range(count)` that depends on `count` and `key` alone; needs no torch."""
    draw = random.Random(derive_seed(*key)).random
    # Python promises that `random()` repeats in every version; of `shuffle` and `sample` it does not.
    places = [draw() for _ in range(count)]
    return sorted(range(count), key=places.__getitem__)


def read_tokens(path: str | Path) -> dict[str, str]:
    """Read a file of annotator tokens, one `name token` a line, into {token: name}; `#` begins a comment.

    Raises:
        ConfigError: a line of another form, a token of fewer than 16 characters or of two names, or an empty file.
    """
    found: dict[str, str] = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        where = f"{path}, line {number}"
        if len(words) != 2:
            raise ConfigError("A line of annotator tokens is a name and a token", where=where, do="Write `NAME TOKEN`")
        name, token = words
        if len(token) < 16:
            raise ConfigError(
                "An annotator token is too short to be secret",
                where=where,
                why=f"{len(token)} characters, at least 16 are needed",
            )
        if token in found or name in found.values():
            raise ConfigError("A name or token of an annotator is given twice", where=where, why=name)
        found[token] = name
    if not found:
        raise ConfigError("There is no annotator token", where=str(path), do="Write one `NAME TOKEN` a line")
    return found
