"""Processes: which one this is, what each holds, how they agree; and the commands that start several.

A run's results do not depend on how many processes it has. Every process knows the whole plan of a step
(prompts, advantages, which samples each update trains), holds the samples `World.share` gives it, and
meets the others only to exchange scores, to add up gradients and to agree on a verdict.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from align.errors import AlignError, ConfigError, first_line
from align.meetings import Meetings, gone, open_meetings, unmet
from align.registry import suggest
from align.stops import SIGNALS, Stopped, heard

if TYPE_CHECKING:
    import torch

LAUNCHERS = ("deepspeed", "torchrun", "accelerate")
_STOP_FILE, _PROCESS = "ALIGN_STOP_FILE", "process_"


@contextlib.contextmanager
def meeting() -> Iterator[None]:
    """Say what it means when processes cannot meet, in place of a socket's words.

    Raises:
        AlignError: torch.distributed failed, as it does when another process has died.
    """
    try:
        yield
    except RuntimeError as error:  # gloo raises nothing more specific
        if not unmet(error):
            raise
        raise gone(error) from error


@dataclass(frozen=True)
class World:
    """The processes of a run, as one of them sees them. Without arguments: alone.

    Args:
        rank: number of this process, from 0.
        size: how many there are.
        meetings: where they meet; of a process that is alone, None.
    """

    rank: int = 0
    size: int = 1
    meetings: Meetings | None = field(default=None, compare=False, repr=False)

    @property
    def leads(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Return this process's part of `count` rows: contiguous, sizes differ by one at most, earlier ranks first."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, by rank. Everyone must call it."""
        return [value] if self.meetings is None else self.meetings.gather(value)

    def led(self, work: Callable[[], Any]) -> None:
        """Have the leading process do `work` while all wait; see `each`."""
        self.each(work if self.leads else lambda: None)

    def each(self, work: Callable[[], Any]) -> None:
        """Have every process do `work`, and all fail when one does. Everyone must call it.

        Raises:
            AlignError: on every process, what `work` raised on the first that failed. What is no AlignError is raised
                where it arose, and the others say that it was.
        """
        heard: list[AlignError | None] = []

        def tell(kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
            if isinstance(error, KeyboardInterrupt):  # which `together` shares
                return False
            known = isinstance(error, AlignError)
            heard.extend(self.gather(error if known or error is None else self._failed(error)))
            return known

        with contextlib.ExitStack() as stack:
            stack.push(tell)
            work()
        if failure := next((error for error in heard if error is not None), None):
            raise failure

    def _failed(self, error: BaseException) -> AlignError:
        return AlignError(
            "Another process of the run failed", where=f"process {self.rank}",
            why=f"{type(error).__name__}, {first_line(error)}", do="What it said stands elsewhere",
        )  # fmt: skip

    def first(self, values: Sequence[str]) -> str:
        """Return the first text that is not empty, of those all processes bring: by rank, then in order."""
        return next((text for part in self.gather(list(values)) for text in part if text), "")

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` over all processes in place, and return it."""
        return tensor if self.meetings is None else self.meetings.add(tensor)

    @contextlib.contextmanager
    def attended(self) -> Iterator[None]:
        """Say in words what it means that another process failed within a pass through a model whose weights are split.

        Raises:
            AlignError: it is gone, or did not come.
        """
        try:
            yield
        except RuntimeError as error:
            if self.meetings is None or not unmet(error):
                raise
            raise self.meetings.failed(error) from error

    def wait(self) -> None:
        """Return when all processes have come here."""
        if self.meetings is not None:
            self.meetings.meet()

    def at(self, doing: str) -> None:
        """Say what this process does from now on, for whoever has to name it."""
        if self.meetings is not None:
            self.meetings.at(doing)

    def abandon(self) -> None:
        """Have all processes abandon what they do, at their next meeting. Returns when they have."""
        if self.meetings is not None:
            with contextlib.suppress(Stopped):
                self.meetings.meet(abandon=True)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Let what interrupts one process within the block interrupt all."""
        try:
            yield
        except KeyboardInterrupt as stop:
            if not (isinstance(stop, Stopped) and stop.agreed):
                self.abandon()
            raise


def join_world(seconds: float = 1800.0) -> World:
    """Return the world the launcher made, joining its process group; alone without a launcher.

    NCCL where there are GPUs, each process on its own, else gloo.

    Args:
        seconds: how long a process waits for the others.

    Raises:
        ConfigError: the launcher's environment is not whole.
        KeyboardInterrupt: this process was asked to stop meanwhile; the others hear of it where they meet next.
    """
    if supervised():  # which then can ask this process to stop
        with contextlib.suppress(OSError):  # it is gone already
            Path(os.environ[_STOP_FILE]).with_name(f"{_PROCESS}{os.getpid()}").touch()
        if asked_to_stop():  # before it could be told
            raise KeyboardInterrupt
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World()
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {size} but {missing[0]} is not set", where="environment",
            do="Start with `align train CONFIG --launch torchrun --nproc N`, or unset WORLD_SIZE",
        )  # fmt: skip
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", os.environ["RANK"])))
    asked: list[int] = []
    with heard(lambda number, frame: asked.append(number)), meeting():  # or the others would wait for one that left
        if not dist.is_initialized():
            limit = datetime.timedelta(seconds=seconds)
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=limit)
        found = open_meetings(seconds)
    world = World(found.rank, found.size, found)
    if asked:
        world.abandon()
        raise KeyboardInterrupt
    return world


def started_by() -> str | None:
    """Return the launcher that started this process, by what it leaves in the environment; None without one."""
    if "RANK" not in os.environ:
        return None
    marks = {"accelerate": "ACCELERATE_MIXED_PRECISION", "torchrun": "TORCHELASTIC_RUN_ID", "deepspeed": "LOCAL_SIZE"}
    return next((launcher for launcher, name in marks.items() if name in os.environ), None)


def leave_world() -> None:
    """Leave the process group, if this process is in one, when all have come so far: a launcher ends the others
    of a process that has ended with an exit code."""
    import torch.distributed as dist

    if dist.is_initialized():
        with meeting():
            dist.barrier()
        dist.destroy_process_group()


def require_launcher(launcher: str) -> None:
    """Refuse a launcher that is none.

    Raises:
        ConfigError: with the closest known one.
    """
    if launcher not in LAUNCHERS:
        raise ConfigError(f"Unknown launcher {launcher!r}", where="--launch", do=suggest(launcher, LAUNCHERS))


def launch_command(launcher: str, processes: int, arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return the command that runs `align <arguments>` in several processes of this machine, and what it adds
    to the environment.

    Raises:
        ConfigError: an unknown launcher, one that is not installed, or fewer processes than one.
    """
    require_launcher(launcher)
    if processes < 1:
        raise ConfigError("A launch needs at least one process", where=f"--nproc {processes}")
    import torch

    extra = {} if torch.cuda.is_available() else {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    if launcher == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        return [*command, "--master_port", str(_free_port()), "--module", "align.cli", *arguments], extra
    if launcher == "accelerate":
        if find_spec("accelerate") is None:
            raise ConfigError("accelerate is not installed", where="--launch accelerate", do="pip install 'align[llm]'")
        command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
        command += ["--main_process_port", str(_free_port())]
        if not torch.cuda.is_available() and processes > 1:
            command.append("--multi_gpu")  # or it starts one process; they talk over gloo
        return [*command, "--module", "align.cli", *arguments], extra
    found = shutil.which("deepspeed", path=os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]]))
    if found is None:
        raise ConfigError("DeepSpeed is not installed", where="--launch deepspeed", do="pip install deepspeed")
    if not torch.cuda.is_available():
        extra["DS_ACCELERATOR"] = "cpu"
    command = [found, "--num_accelerators", str(processes), "--no_local_rank", "--master_port", str(_free_port())]
    return [*command, "--module", "align.cli", *arguments], extra


def run_launched(command: Sequence[str], environment: Mapping[str, str], stdout: TextIO | None = None) -> int:
    """Run a launch command to its end and return its exit code.

    SIGTERM, SIGINT, SIGUSR1 or SIGHUP asks all its processes to stop, as SIGUSR1 does each of them: the launchers
    themselves would kill them after 30 s, or not pass it on. A second one ends them.

    Args:
        stdout: where what they all write to stdout goes; this process's own when None.

    Returns:
        the launcher's exit code; 130 where it is 0 and a stop was asked for.
    """
    with tempfile.TemporaryDirectory() as folder:
        stop = Path(folder) / "stop"
        started: list[subprocess.Popen[bytes]] = []

        def ask(number: int, frame: FrameType | None) -> None:
            for process in started if stop.exists() else ():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)
            stop.touch()
            for path in Path(folder).glob(f"{_PROCESS}*"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(path.name.removeprefix(_PROCESS)), signal.SIGUSR1)

        with heard(ask, (*SIGNALS, signal.SIGHUP)):  # before there is anything that a stop could leave behind
            handed = {**os.environ, **environment, _STOP_FILE: str(stop)}
            started.append(subprocess.Popen(command, env=handed, start_new_session=True, stdout=stdout))
            code = started[0].wait()
            return 130 if code == 0 and stop.exists() else code


def asked_to_stop() -> bool:
    """Whether `run_launched`, which started this process, was asked to stop."""
    return os.path.exists(os.environ.get(_STOP_FILE, ""))


def supervised() -> bool:
    """Whether `run_launched` started this process: how a run went it reads in run.json."""
    return _STOP_FILE in os.environ


def shown(command: Sequence[str], environment: dict[str, str]) -> str:
    """Return a command as one line for a shell."""
    return " ".join([*(f"{k}={shlex.quote(v)}" for k, v in environment.items()), shlex.join(command)])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
