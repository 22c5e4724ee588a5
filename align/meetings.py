"""Where the processes of a run meet: that all have come, whether they abandon what is at hand, and who is missing.

Every exchange of `align.launch.World` begins with a meeting: one number, added up over the CPU. A process that abandons
its step says so at its next meeting, whichever one the others are at, so all abandon together. On the way each writes
on a board how many meetings it came to and what it does, so that one that does not come can be named.
"""

from __future__ import annotations

import contextlib
import datetime
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from align import stops
from align.errors import AlignError, first_line

if TYPE_CHECKING:
    import torch

GOES_ON = "The last checkpoint is whole: `align resume` goes on from it"
BOARD_SECONDS = 5.0
"""How long the board is asked: it may be a process that hangs which keeps it."""


def gone(error: RuntimeError, missing: str = "") -> AlignError:
    """Return what it means that processes could not meet, in place of a socket's words."""
    return AlignError(
        "Another process of the run is gone", where=missing, why=first_line(error),
        do=f"{GOES_ON}; what that process said stands elsewhere",
    )  # fmt: skip


def unmet(error: RuntimeError) -> bool:
    """Whether an error says that processes could not meet within a pass through the model, and not that this failed."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


class Meetings:
    """The meetings of one process.

    Args:
        rank, size: which process it is, of how many.
        store: the board, a store of torch.distributed.
        group: of all processes, over the CPU.
        seconds: a process that has not come after these is missing.
    """

    def __init__(self, rank: int, size: int, store: Any, group: Any, seconds: float) -> None:
        import torch

        self.rank, self.size, self.store, self.group, self.seconds = rank, size, store, group, seconds
        self.count, self.doing = 0, "start-up"
        self._flag = torch.zeros(1)
        self._write()

    def at(self, doing: str) -> None:
        """Write on the board what this process does from now on."""
        self.doing = doing
        with contextlib.suppress(RuntimeError):  # whoever keeps the board is gone: the next meeting says so
            self._write()

    def meet(self, *, abandon: bool = False) -> None:
        """Return when all processes have come.

        Raises:
            Stopped: one of them abandons what is at hand.
            AlignError: one of them is gone, or missing.
        """
        import torch.distributed as dist

        abandon = abandon or stops.due()
        with self.attended():
            self.count += 1
            self._write()
            self._flag.fill_(float(abandon))
            dist.all_reduce(self._flag, group=self.group)
        if self._flag.item():
            raise stops.Stopped(agreed=True)

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, by rank."""
        import torch.distributed as dist

        self.meet()
        found: list[Any] = [None] * self.size
        with self.attended():
            dist.all_gather_object(found, value, group=self.group)
        return found

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` over all processes in place, and return it."""
        import torch.distributed as dist

        self.meet()
        with self.attended():
            dist.all_reduce(tensor)
        return tensor

    @contextlib.contextmanager
    def attended(self) -> Iterator[None]:
        """Let no stop interrupt an exchange, and say in words what it means that it failed."""
        with stops.whole():
            try:
                yield
            except RuntimeError as error:  # gloo raises nothing more specific
                raise self.failed(error) from error

    def _write(self) -> None:
        self.store.set(str(self.rank), f"{self.count} {self.doing}")

    def failed(self, error: RuntimeError) -> AlignError:
        """Return what it means that an exchange failed: which process is gone, or does not come."""
        seen = self._read()
        late = [r for r in range(self.size) if r != self.rank and (r not in seen or seen[r][0] < self.count)]
        missing = "; ".join(
            f"process {r}, " + (f"last seen in {seen[r][1]}" if r in seen else "which does not answer") for r in late
        )
        reason = first_line(error)
        if "timed out" not in reason.lower() and "timeout" not in reason.lower():
            return gone(error, missing)
        return AlignError(
            "A process of the run does not come", where=missing,
            why=f"the others have waited {self.seconds:g} s for it in {self.doing}",
            do=f"Look at what it does, end it, and start again. {GOES_ON}; checkpoint.hung_after_seconds says how long "
            "is waited",
        )  # fmt: skip

    def _read(self) -> dict[int, tuple[int, str]]:
        """Return the meetings and the doings of every process, as far as the board answers."""
        found: dict[int, tuple[int, str]] = {}

        def read() -> None:
            with contextlib.suppress(RuntimeError):
                for rank in range(self.size):
                    count, _, doing = self.store.get(str(rank)).decode().partition(" ")
                    found[rank] = (int(count), doing)

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        reader.join(BOARD_SECONDS)
        return dict(found)


def open_meetings(seconds: float) -> Meetings:
    """Open the meetings of the process group that this process is in."""
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    limit = datetime.timedelta(seconds=seconds)
    store = dist.PrefixStore("align/board", next(iter(rendezvous("env://")))[0])
    store.set_timeout(datetime.timedelta(seconds=BOARD_SECONDS))
    group = dist.new_group(backend="gloo", timeout=limit)
    found = Meetings(dist.get_rank(), dist.get_world_size(), store, group, seconds)
    found.meet()  # the process that keeps the board may end as soon as all have come to it
    return found
