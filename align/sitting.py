"""One sitting of a run, whatever trains: stops that all processes agree on, run.json, and a bad step written down.

A stop is asked for by a signal (`align.stops`) or by the launcher. The step at hand is finished and saved, or, past the
grace time, abandoned; then the step before it is what is kept, and it is done again bit for bit when the run goes on.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align import checkpoint, launch, stops
from align.errors import AlignError, GuardError, RewardError
from align.launch import World
from align.tracking import RunLog, replace_text
from align.types import ImagePrompt

if TYPE_CHECKING:
    from align.config import RunConfig

MOST_TEXT, MOST_TILES = 2000, 8
"""Characters of a text, and tiles, that a bad step's file keeps."""


class Sitting:
    """What a run is asked, does and has seen, from entering to leaving.

    Args:
        directory: the run folder.
        config: of the run; its `checkpoint` says how long a stop waits.
        world: its processes.
        log: where the run is written down.
        abandon: keeps the last committed step when the one at hand is abandoned; all processes call it.
    """

    def __init__(
        self, directory: Path, config: RunConfig, world: World, log: RunLog, abandon: Callable[[], None]
    ) -> None:
        self.directory, self.config, self.world, self.log = directory, config, world, log
        self.stop = stops.Stop(config.checkpoint.grace_seconds)
        self.stopping, self.hacked, self.record = "", "", {}
        self.step, self.doing = 0, "start-up"
        self.seen: dict[str, Any] = {}
        self.tiles: list[dict[str, Any]] = []
        self._abandon = abandon

    def enter(self) -> None:
        """Heed signals from now on."""
        self.stop.__enter__()

    def begin(self, steps: int, engine: str, **about: Any) -> None:
        """Write down what run this is."""
        config, before = self.config, read_record(self.directory)
        data = [*before.get("data_files", ()), *(data_files(config) if self.world.leads else ())]
        self.record = {
            "trainer": config.trainer, "name": config.name, "seed": config.seed,
            "started": before.get("started") or _now(), "finished": None, "status": "running",
            "steps_planned": steps, "engine": engine, "processes": self.world.size,
            "data_files": [row for i, row in enumerate(data) if row not in data[:i]], **about,
        }  # fmt: skip
        self.log.write_run(self.record)

    def finish(self, status: str) -> None:
        """Record how the run ended: complete, hacked, stopped or failed."""
        if self.record:
            self.record.update(status=status, finished=_now())
            self.log.write_run(self.record)

    def leave(self, error: BaseException | None) -> bool:
        """Leave with what was raised, if anything; return whether that was a stop, which is done with.

        Raises:
            GuardError, RewardError: what was raised, with the name of the file that the step was written to.
        """
        try:
            if isinstance(error, stops.Stopped):
                self._give_up(error)
                return True
            if error is None:
                return False
            name = ""
            with contextlib.suppress(AlignError, OSError):  # on a full disk this fails too; `error` says why
                if isinstance(error, (GuardError, RewardError)) and self.step:
                    name = self._write_bad_step(error)
                self.finish("failed")
            if name:
                do = f"{error.do.rstrip('.')}; what was seen" if error.do else "What was seen"
                do += f" stands in {self.directory / name}"
                raise type(error)(error.what, where=error.where, why=error.why, do=do) from error
            return False
        finally:
            self.stop.__exit__(None, None, None)
            self.log.close()

    def _give_up(self, stop: stops.Stopped) -> None:
        if not stop.agreed:
            self.world.abandon()
        self.agree_to_stop()
        self.stopping = self.stopping or "another process"
        self.at("saving")
        self._abandon()
        self.finish("stopped")

    def agree_to_stop(self) -> str:
        """Return why all processes stop, if one was asked to: a signal's name, "launcher" or "monitor"."""
        asked = self.world.first([self.stop.asked or ("launcher" if launch.asked_to_stop() else "")])
        self.stopping = "monitor" if self.hacked else asked
        return self.stopping

    @property
    def asked(self) -> bool:
        """Whether this process was asked to stop; the others may not know yet."""
        return bool(self.stop.asked) or launch.asked_to_stop()

    def begin_step(self, step: int) -> None:
        """Go on to a step: nothing is seen of it yet."""
        self.step, self.seen, self.tiles = step, {}, []

    def at(self, doing: str) -> None:
        """Say what the run does from now on."""
        self.doing = f"step {self.step}, {doing}" if self.step else doing
        self.world.at(self.doing)

    def see(self, **facts: Any) -> None:
        """Keep what is known of the step in case it goes bad; a function is asked only then."""
        self.seen.update(facts)

    def see_tile(self, **facts: Any) -> None:
        """Keep what is known of a tile of the update at hand, tensors as they are."""
        self.tiles.append(facts)

    def _write_bad_step(self, error: AlignError) -> str:
        """Write what this process saw of the step, and return the name of the file, or of those of all processes."""
        saved = max((s for s in checkpoint.checkpoints(self.directory / "checkpoints") if s < self.step), default=0)
        bad = [tile for tile in self.tiles if not all(map(_is_finite, tile.values()))]
        document = {
            "step": self.step, "process": self.world.rank, "processes": self.world.size, "guard": error.what,
            "said": str(error), "doing": self.doing, "seed": self.config.seed,
            "reproduce": {
                "command": f"align resume {shlex.quote(str(self.directory))}", "from_step": saved,
                "why": f"all draws are functions of the seed: steps {saved + 1} to {self.step} are done again as they "
                "were, unless a reward or a model outside of the run has changed",
            },
            **self.seen,
            "tiles": {"of_the_update": len(self.tiles), "shown": (bad or self.tiles)[:MOST_TILES]},
        }  # fmt: skip
        name = f"bad_step_{self.step:06d}"
        file = f"{name}.json" if self.world.size == 1 else f"{name}_process_{self.world.rank}.json"
        text = json.dumps(readable(document), indent=1, ensure_ascii=False, allow_nan=False)
        replace_text(self.directory / file, text + "\n")
        return file if self.world.size == 1 else f"{name}_process_*.json"


def readable(value: Any) -> Any:
    """Return `value` as JSON that people read: "nan" and "inf" by name, long texts cut."""
    if callable(value):
        return readable(value())
    if isinstance(value, bool) or value is None or isinstance(value, int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, str):
        return value if len(value) <= MOST_TEXT else f"{value[:MOST_TEXT]} ... ({len(value)} characters)"
    if isinstance(value, ImagePrompt):
        return {"text": readable(str(value.text)), "image": str(value.image)}
    if isinstance(value, Mapping):
        return {str(key): readable(part) for key, part in value.items()}
    if hasattr(value, "tolist"):
        return readable((value.detach().cpu() if hasattr(value, "detach") else value).tolist())
    if isinstance(value, (list, tuple, range)):
        return [readable(part) for part in value]
    return str(value)


def _is_finite(value: Any) -> bool:
    return not hasattr(value, "isfinite") or bool(value.isfinite().all())


def data_files(config: Any) -> list[dict[str, str]]:
    """Return the files that a configuration learns from and is measured on, each with its sha256 as it stands."""
    from align.published import is_ours
    from align.weights import file_sha256

    found = []
    for name in ("prompts", "data", "split"):
        section = getattr(config, name, None)
        paths = [getattr(section, key, None) for key in ("path", "heldout_path")]
        for path in (Path(p).expanduser() for p in (*paths, *getattr(section, "paths", ())) if p and not is_ours(p)):
            files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
            found += [{"file": str(file), "sha256": file_sha256(file)} for file in files if file.is_file()]
    return found


def read_record(directory: Path) -> dict[str, Any]:
    """Return what run.json says; nothing where it is missing or unreadable, as it only describes the run."""
    try:
        record = json.loads((directory / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
