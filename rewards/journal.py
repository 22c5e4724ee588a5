"""What has been scored so far: an append-only file beside the table of scores, which a kill cannot tear.

Each line is one sample scored by one reward, found again by what was scored (prompt, bytes of the image or text,
metadata) and by the reward's identity, so that a changed image or reward is scored anew and nothing else is.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from align.errors import ConfigError
from align.tracking import read_jsonl

_FIRST = b'{"journal": "scores"'


@dataclass(frozen=True)
class Scored:
    """One sample scored by one reward: K values, None where missing, and why."""

    key: str
    identity: str
    values: tuple[float | None, ...]
    error: str = ""
    truncated: bool = False

    @property
    def complete(self) -> bool:
        """Whether no component is missing."""
        return None not in self.values


class Journal:
    """The file, held by one process at a time.

    Args:
        path: of the file, which may hold what an earlier sitting scored.
        fresh: forget what is there.

    Raises:
        ConfigError: another process holds it, it cannot be written, or it is some other file.
    """

    def __init__(self, path: Path, *, fresh: bool = False) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
        except OSError as error:
            raise ConfigError("A journal cannot be written", where=str(path), why=error.strerror or "") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise ConfigError("Another process is scoring into this table", where=str(path)) from error
        if fresh:
            self._file.truncate(0)
        self.added = 0
        self._described: set[str] = set()
        self.scored = {(entry.key, entry.identity): entry for entry in self._read()}
        self._end_torn_line()

    def _read(self) -> Iterable[Scored]:
        start = os.pread(self._file.fileno(), len(_FIRST), 0)
        if start != _FIRST[: len(start)]:
            raise ConfigError("This is not the journal of a table of scores", where=str(self.path), do="Remove it")
        for row in read_jsonl(self.path)[0]:  # a torn line is none
            if isinstance(row.get("reward"), dict):
                self._described.add(row["reward"].get("identity"))
            elif isinstance(row.get("values"), list):
                values, error = tuple(row["values"]), str(row.get("error", ""))
                yield Scored(str(row["key"]), str(row["identity"]), values, error, row.get("truncated") is True)

    def _end_torn_line(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        if size and os.pread(self._file.fileno(), 1, size - 1) != b"\n":
            self._file.write(b"\n")

    def find(self, key: str, identity: str) -> Scored | None:
        """Return what is known of a sample under a reward."""
        return self.scored.get((key, identity))

    def describe(self, rewards: Iterable[dict[str, Any]]) -> None:
        """Note what the rewards are, for who reads the file."""
        new = [reward for reward in rewards if reward["identity"] not in self._described]
        self._write([{"journal": "scores", "reward": reward} for reward in new])

    def append(self, entries: Iterable[Scored]) -> None:
        """Keep what was scored; when this returns it is on the disk."""
        entries = list(entries)
        self._write([asdict(entry) for entry in entries])
        self.added += len(entries)
        self.scored.update({(entry.key, entry.identity): entry for entry in entries})

    def _write(self, rows: list[dict[str, Any]]) -> None:
        self._file.write("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Journal:
        """Return the journal."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file, and let others have it."""
        self._file.close()
