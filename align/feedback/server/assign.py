"""Who is shown what next: N distinct annotators for each unit, reservations, each annotator's own order, gold units.

Everything here lives in memory and is rebuilt from the store when the server starts, reservations excepted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from align.feedback.tasks import Task, Unit, shuffled


@dataclass(frozen=True)
class Shown:
    """One screen: a unit as it stands before one annotator.

    Args:
        unit: what is asked about.
        order: place in `unit.items` of each shown item, from the left.
        shown_ms: when, milliseconds since 1970.
        place: how many screens the annotator had seen before.
    """

    unit: Unit
    order: tuple[int, ...]
    shown_ms: int
    place: int


@dataclass
class Annotator:
    """What one annotator has done, in the order done, and what is before them now."""

    done: dict[str, bool | None] = field(default_factory=dict)
    skipped: set[str] = field(default_factory=set)
    open: Shown | None = None
    queue: list[int] | None = None
    cursor: int = 0
    done_full: int = 0
    again: str = ""


@dataclass(frozen=True)
class Progress:
    """How far an annotator is: screens answered, screens there are for them, set aside, and waiting for others."""

    done: int
    total: int
    skipped: int
    waiting: bool


class Assignments:
    """Hands out units. Not for several threads: the server calls it from its one event loop."""

    def __init__(self, task: Task, clock: Callable[[], float] = time.time) -> None:
        self.task, self._clock = task, clock
        self.units = {unit.id: unit for unit in (*task.units, *task.gold)}
        self._index = {unit.id: i for i, unit in enumerate(task.units)}
        self._by: list[set[str]] = [set() for _ in task.units]
        self._reserved: list[dict[str, float]] = [{} for _ in task.units]
        self._full = 0
        self.annotators: dict[str, Annotator] = {}

    @property
    def complete(self) -> int:
        """How many units have all the annotators they need."""
        return self._full

    def annotator(self, name: str) -> Annotator:
        """Return the state of an annotator, made when first asked for."""
        return self.annotators.setdefault(name, Annotator())

    def next(self, name: str) -> Shown | None:
        """Return what `name` is to be shown, reserving it: what is open, else a gold unit that is due, else the first
        unit of their order that still needs annotators. None when there is nothing."""
        state = self.annotator(name)
        if state.open is not None and not self._stale(name, state.open.unit.id):
            self._reserve(name, state.open.unit.id)
            return state.open
        unit = self._again(state) or self._gold(state) or self._first(name, state)
        state.open = None
        if unit is not None:
            self._reserve(name, unit.id)
            state.open = Shown(unit, self._order(name, unit), self.now_ms(), len(state.done) + len(state.skipped))
        return state.open

    def answered(self, name: str, unit_id: str, right: bool | None = None) -> None:
        """Note that `name` answered a unit; `right` says whether a gold unit was answered as it should be."""
        state = self.annotator(name)
        if unit_id not in state.done and (i := self._index.get(unit_id)) is not None:
            self._reserved[i].pop(name, None)
            self._by[i].add(name)
            wanted = self.task.config.annotators_per_item
            if len(self._by[i]) == wanted:
                self._full += 1
                for other in self._by[i]:
                    self.annotator(other).done_full += 1
            elif len(self._by[i]) > wanted:
                state.done_full += 1
        state.done.pop(unit_id, None)
        state.done[unit_id] = right
        state.skipped.discard(unit_id)
        if state.open is not None and state.open.unit.id == unit_id:
            state.open = None

    def taken_back(self, name: str, unit_id: str) -> None:
        """Note that `name` took the answer to a unit back; it is what they are shown next."""
        state = self.annotator(name)
        if unit_id not in state.done:
            return
        del state.done[unit_id]
        if (i := self._index.get(unit_id)) is not None:
            wanted = self.task.config.annotators_per_item
            if len(self._by[i]) == wanted:
                self._full -= 1
                for other in self._by[i]:
                    self.annotator(other).done_full -= 1
                for other_state in self.annotators.values():
                    other_state.cursor = 0
            elif len(self._by[i]) > wanted:
                state.done_full -= 1
            self._by[i].discard(name)
        self._release(name, state)
        state.again = unit_id

    def skip(self, name: str, unit_id: str) -> None:
        """Set a unit aside for `name`."""
        state = self.annotator(name)
        if unit_id in self.units and unit_id not in state.done:
            state.skipped.add(unit_id)
            if state.open is not None and state.open.unit.id == unit_id:
                self._release(name, state)

    def unskip(self, name: str) -> None:
        """Bring back everything that `name` has set aside."""
        state = self.annotator(name)
        state.skipped.clear()
        state.cursor = 0

    def progress(self, name: str) -> Progress:
        """Return how far `name` is; the total falls when others complete units first."""
        state = self.annotator(name)
        mine = sum(unit_id in self._index for unit_id in state.done) if self.task.gold else len(state.done)
        left = len(self._by) - self._full - (mine - state.done_full)
        aside = sum(self._wanted(self._index[unit_id]) for unit_id in state.skipped if unit_id in self._index)
        total = len(state.done) + left + (state.open is not None and state.open.unit.gold is not None)
        return Progress(len(state.done), total, aside, state.open is None and left > aside)

    def now_ms(self) -> int:
        """Return the time in milliseconds since 1970."""
        return int(self._clock() * 1000)

    def _stale(self, name: str, unit_id: str) -> bool:
        """Whether a unit that is open before `name` ran out of time and was given to enough others meanwhile."""
        i = self._index.get(unit_id)
        if i is None:
            return False
        late = self._reserved[i].get(name, 0) < self._clock()
        return late and not self._free(i, name)

    def _wanted(self, i: int) -> bool:
        return len(self._by[i]) < self.task.config.annotators_per_item

    def _free(self, i: int, name: str) -> bool:
        now = self._clock()
        holders = {other for other, until in self._reserved[i].items() if until >= now and other != name}
        return len(self._by[i] | holders) < self.task.config.annotators_per_item

    def _reserve(self, name: str, unit_id: str) -> None:
        if (i := self._index.get(unit_id)) is not None:
            self._reserved[i][name] = self._clock() + 60 * self.task.config.reservation_minutes

    def _release(self, name: str, state: Annotator) -> None:
        if state.open is not None and (i := self._index.get(state.open.unit.id)) is not None:
            self._reserved[i].pop(name, None)
        state.open = None

    def _again(self, state: Annotator) -> Unit | None:
        unit_id, state.again = state.again, ""
        return self.units.get(unit_id)

    def _gold(self, state: Annotator) -> Unit | None:
        if self.task.config.gold is None:
            return None
        seen = sum(unit_id not in self._index for unit_id in (*state.done, *state.skipped))
        others = len(state.done) + len(state.skipped) - seen
        if others < (seen + 1) * self.task.config.gold.every:
            return None
        left = (unit for unit in self.task.gold if unit.id not in state.done and unit.id not in state.skipped)
        return next(left, None)

    def _first(self, name: str, state: Annotator) -> Unit | None:
        firm = True
        if state.queue is None:
            count, seed = len(self.task.units), self.task.config.seed
            random = self.task.config.order == "random"
            state.queue = shuffled(count, "queue", seed, name) if random else list(range(count))
        for place in range(state.cursor, len(state.queue)):
            i = state.queue[place]
            unit = self.task.units[i]
            if unit.id in state.done or unit.id in state.skipped or not self._wanted(i):
                # What is done or full stays so (`taken_back` starts over), so the search need not return to it.
                state.cursor += firm
                continue
            if self._free(i, name):
                return unit
            firm = False
        return None

    def _order(self, name: str, unit: Unit) -> tuple[int, ...]:
        count, config = len(unit.items), self.task.config
        if unit.fixed or config.order == "file":
            return tuple(range(count))
        return tuple(shuffled(count, "display", config.seed, name, unit.id))
