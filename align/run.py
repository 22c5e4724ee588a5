"""A run: a directory, the step it stands at, and the few lines every training loop shares.

with Run(config, directory, parameters) as run:
    for step in run.steps():            # resumes by itself
        ...
        run.backward(loss, weight=share)
        run.update()                    # exchange, guards, clip, optimizer
        run.update_average()
        run.commit(step, metrics)       # log, checkpoint, stop flag

Every process of a run does the same; the one of rank 0 writes.
"""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from align import checkpoint, guards, stops
from align.averaging import Average
from align.config import RunConfig, VisualConfig, anchored, diff_configs, load_config, save_config
from align.engine import Engine, ReplicaEngine
from align.errors import CheckpointError, ConfigError, GuardError
from align.launch import World
from align.sitting import Sitting
from align.tracking import Progress, RunLog
from align.types import StepStats

if TYPE_CHECKING:
    import torch


class Watch(Protocol):
    """Looks at the weights around an update, and adds to the log what it saw."""

    def before_update(self, step: int) -> None:
        """An update of this step is about to be taken."""

    def after_update(self, rate: float) -> None:
        """It was taken, at this learning rate."""

    def row(self) -> dict[str, float]:
        """Return what the step adds to the log."""


def peak_memory_mb() -> float:
    """Return the largest resident size of this process so far, in MB (GPU: of its allocator)."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def describe_machine() -> dict[str, dict[str, str]]:
    """Return the versions and the machine a run's numbers belong to."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    versions = {"python": platform.python_version()}
    for package in ("align", "torch", "diffusers", "transformers", "peft", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    machine = {
        "platform": platform.platform(),
        "device": device,
        "cpus": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
    }
    return {"versions": versions, "machine": machine}


def require_directory(
    directory: Path, config: VisualConfig, *, overwrite: bool = False, fork: bool = False
) -> list[tuple[str, Any, Any]]:
    """Refuse a folder that cannot become this run's own; write nothing.

    Returns:
        With `fork`, what differs from the configuration of the run that is there: (key, old, new).

    Raises:
        ConfigError: a non-empty folder that is not a run, or a run of another configuration.
    """
    if not directory.is_dir() or not any(directory.iterdir()):
        return []
    if not (directory / "config.yaml").is_file():
        raise ConfigError("The folder is not empty and is not a run", where=str(directory), do="Choose another --out")
    if overwrite:
        return []
    changed = diff_configs(anchored(load_config(directory / "config.yaml")), anchored(config), waits=False)
    if changed and not fork:
        alone = config.trainer in ("fit", "peering")
        forks = "" if alone else "--fork to go on with this one from its last checkpoint, "
        raise ConfigError(
            "This folder holds a run of another configuration",
            where=str(directory),
            why="; ".join(f"{key}: {old!r} there, {new!r} now" for key, old, new in changed[:6]),
            do=f"Use the same configuration to resume it, {forks}another --out, or --overwrite to start again",
        )
    return changed


def claim_directory(
    directory: Path, config: VisualConfig, *, overwrite: bool = False, fork: bool = False
) -> list[tuple[str, Any, Any]]:
    """Make `directory` this run's own and keep the configuration there.

    An earlier run is replaced with `overwrite`. With `fork` it goes on under the new configuration; the one it
    had is kept as `config.until_<step>.yaml`, and what differs is returned.
    """
    changed = require_directory(directory, config, overwrite=overwrite, fork=fork)
    if overwrite and directory.is_dir():
        shutil.rmtree(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            "The run folder cannot be made", where=str(directory), why=error.strerror or str(error),
            do="Choose another --out",
        ) from error  # fmt: skip
    path = directory / "config.yaml"
    if changed:
        last = max(checkpoint.checkpoints(directory / "checkpoints"), default=0)
        path.replace(directory / f"config.until_{last:06d}.yaml")
    if not path.is_file():
        fresh = path.with_suffix(".writing")
        save_config(anchored(config), fresh)
        fresh.replace(path)
    return changed


@contextlib.contextmanager
def claiming(
    directory: Path, config: VisualConfig, world: World, *, overwrite: bool = False, fork: bool = False
) -> Iterator[list[tuple[str, Any, Any]]]:
    """Claim the folder of a run after the body, which reads data and models; give what a fork changed, once known.

    A folder that cannot be claimed is refused before the body, and a body that fails leaves the folder as it was. The
    first process comes first: what it builds and caches, the others find.
    """
    changed: list[tuple[str, Any, Any]] = []
    world.led(lambda: require_directory(directory, config, overwrite=overwrite, fork=fork))
    if not world.leads:
        world.wait()
    with world.together():
        yield changed
    if world.leads:
        world.wait()
    world.led(lambda: changed.extend(claim_directory(directory, config, overwrite=overwrite, fork=fork)))


def require_not_hacked(state: Mapping[str, Any], step: int, config: RunConfig, directory: Path) -> None:
    """Refuse to go on, under the same configuration, from a checkpoint at which the hack monitor stopped its run."""
    if state.get("hacked") and anchored(load_config(state["config"])) == anchored(config):
        raise ConfigError(
            "The hack monitor stopped this run", where=f"{directory}, step {step}", why=state["hacked"],
            do="Look at its report; then go on from there with other rewards, or past the alarm with "
            f"`align train CONFIG monitor.action=warn --out {directory} --fork`",
        )  # fmt: skip


class Run:
    """One training run in one directory.

    Args:
        config: the resolved configuration.
        directory: claimed by `claiming`.
        parameters: the trained weights by name; saved in every checkpoint and restored from the last.
        record: what `run.json` says besides: rewards, ledger, model.
        world: the processes of the run.
        engine: carries the updates out; one that replicates the weights when None.
        changed: what a fork changed, to be noted in the log.
        kept: averages of the weights that are not delivered, and saved with them.
    """

    def __init__(
        self,
        config: VisualConfig,
        directory: str | Path,
        parameters: Mapping[str, torch.nn.Parameter],
        record: Mapping[str, Any] | None = None,
        *,
        world: World = World(),
        engine: Engine | None = None,
        changed: Sequence[tuple[str, Any, Any]] = (),
        kept: Mapping[str, Average] = {},
    ) -> None:
        self.config, self.directory, self.world = config, Path(directory), world
        self.parameters = dict(parameters)
        self.engine = engine or ReplicaEngine(self.parameters, config.optimizer, world)
        self._alone = not self.engine.lockstep
        decay = config.optimizer.ema_decay
        held = {name: piece.values for name, piece in self.engine.pieces().items()}
        self.average = None if decay is None else Average(held, decay)
        self.averages = {**kept, **({} if self.average is None else {"average": self.average})}
        self.log = RunLog(self.directory, tensorboard=config.tracking.tensorboard, silent=not world.leads)
        self.sitting = Sitting(self.directory, config, world, self.log, self._keep_committed)
        self._loss_check: torch.Tensor | None = None
        self._unmet = False
        self.counters: dict[str, float] = {}
        self.watch: Watch | None = None
        self.step = 0
        self._grad_norms: list[float] = []
        self._optimizer_seconds = 0.0
        self._moved = False
        self._restore()
        self._committed = self._beside()
        for key, old, new in changed:
            self.log.warn(self.step, "note", "fork", f"from here on {key} is {new!r}; it was {old!r}")
        self._started = time.perf_counter()
        self._elapsed = (self.counters.get("seconds", 0.0), self.counters.get("cpu_seconds", 0.0))
        self._mark = (self._started, time.process_time())
        self.sitting.begin(config.steps, self.engine.name, **(record or {}), **describe_machine())

    def __enter__(self) -> Run:
        self.sitting.enter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        return self.sitting.leave(error)

    def _beside(self) -> tuple[dict[str, float], torch.Tensor]:
        """What a checkpoint keeps beside weights and optimizer, as it is now."""
        import torch

        return dict(self.counters), torch.get_rng_state()

    def _keep_committed(self) -> None:
        """Save the last committed step where memory holds it and the disk does not. Every process must call it."""
        here = self.step in checkpoint.checkpoints(self.directory / "checkpoints")
        if self.step and not any(self.world.gather(here or self._moved)):
            self.save()

    def _restore(self) -> None:
        import torch

        found = checkpoint.load_latest(self.directory / "checkpoints")
        self.log.truncate_after(found.step if found else 0 if (self.directory / "metrics.jsonl").is_file() else -1)
        if found is None:
            return
        absent = [group for group in ("model", "optimizer", "rng") if group not in found.tensors]
        if absent or "counters" not in found.state or "torch" not in found.tensors["rng"]:
            raise CheckpointError(
                "A checkpoint is not one of a training run", where=str(self.directory / "checkpoints"),
                why=f"step {found.step} lacks {absent[0] if absent else 'its counters or random state'}",
                do="Remove that step's folder; the run then goes on from the one before",
            )  # fmt: skip
        require_not_hacked(found.state, found.step, self.config, self.directory)
        self.step, self.counters = found.step, dict(found.state["counters"])
        model, pieces = found.tensors["model"], self.engine.pieces()
        alien = sorted(set(self.parameters) ^ set(model)) or [
            name for name, piece in pieces.items() if piece.shape != checkpoint.shape_of(model, name)
        ]
        if alien:
            raise CheckpointError(
                "A checkpoint belongs to another model",
                where=str(self.directory),
                why=f"their weights differ, the first of them {alien[0]}",
                do="Give the configuration it was trained with, or another --out",
            )
        with torch.no_grad():
            for name, piece in pieces.items():
                piece.values.copy_(piece.of(model[name]))
        for group, average in self.averages.items():  # a fork may turn one on: it starts from the weights as they are
            values = found.tensors.get(group) or model
            for name, value in average.values.items():
                value.copy_(pieces[name].of(values[name]))
        self.engine.load_optimizer_state(found.tensors.get("optimizer", {}))
        torch.set_rng_state(found.tensors["rng"]["torch"])

    def steps(self) -> Iterator[int]:
        """Yield the steps still to do, counted from 1, until done or asked to stop."""
        self._mark = (time.perf_counter(), time.process_time())
        self.sitting.agree_to_stop()
        with Progress(self.config.steps, initial=self.step, silent=not self.world.leads) as self._progress:
            while self.step < self.config.steps and not self.sitting.stopping:  # `commit` agrees, saves when it stops
                self.sitting.begin_step(self.step + 1)
                yield self.step + 1

    def backward(self, loss: torch.Tensor, *, weight: float, last: bool = True) -> None:
        """Accumulate the gradient of `weight * loss`; the weights of one update add up to 1 over all processes.

        Args:
            last: of this update, on every process.
        """
        check = loss.detach() * 0.0
        self._unmet = self.engine.lockstep and not last
        self._loss_check = check if self._loss_check is None else self._loss_check + check
        self.engine.backward(loss * weight, last=last)

    def update(self, *, expect_gradient: bool = True) -> float:
        """Add up the gradient over processes, check and clip it, take the optimizer step, return its norm.

        Every process must call it, also one without a loss of its own.
        """
        import torch

        if self._unmet:  # or the others wait for these gradients, or nobody adds them up
            raise GuardError(
                "The gradients of an update have not met", where=f"step {self.step + 1}, process {self.world.rank}",
                why="no backward pass was its last one", do="Give last=True in the same pass on every process",
            )  # fmt: skip
        began = time.perf_counter()
        device = next(iter(self.parameters.values())).device
        check = torch.zeros((), device=device) if self._loss_check is None else self._loss_check.to(device).float()
        self._loss_check = None
        check = self.world.add(check)
        norm = self.engine.reduce()
        self.sitting.see(update=len(self._grad_norms) + 1, grad_norm=norm)
        guards.require_gradient(norm, check, f"step {self.step + 1}", expected=expect_gradient)
        self._moved = True
        if self.watch is not None:
            self.watch.before_update(self.step + 1)
        self.engine.step(norm)
        if self.watch is not None:
            self.watch.after_update(self.config.optimizer.lr)
        self._grad_norms.append(float(norm))
        self.sitting.tiles = []
        self._optimizer_seconds += time.perf_counter() - began
        return float(norm)

    @contextlib.contextmanager
    def cut(self) -> Iterator[None]:
        """Let a stop that is due abandon the block, which changes neither weights nor what is counted.

        Where a pass through the model needs the other processes, only when all meet.
        """
        if self._alone:
            with stops.cut():
                yield
        else:
            with stops.region("meetings"), self.world.attended():
                yield

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Have the weights whole in the model within the block, where a pass through it then needs no other process.

        Every process must call it.
        """
        with self.engine.gathered():
            before, self._alone = self._alone, True
            try:
                yield
            finally:
                self._alone = before

    def say(self, step: int, code: str, message: str) -> None:
        """Tell whoever watches, now, and keep it in the run's log."""
        self.log.warn(step, "note", code, message)
        self._progress.say(message)

    def alarm(self, step: int, code: str, message: str, *, stop: bool) -> None:
        """Say what is wrong and keep it in the log; with `stop`, the run ends after this step. Every process alike."""
        self.log.warn(step, "alarm", code, message)
        self._progress.say(f"step {step}: {message}")
        if stop:
            self.sitting.hacked = message

    @property
    def outcome(self) -> str:
        """How a run that measured its end has ended: complete, or hacked where the monitor stopped it."""
        return "hacked" if self.sitting.hacked else "complete"

    def update_average(self) -> None:
        """Take the weights into their running average, where there is one: once a step, after its updates."""
        self._moved = True
        if self.average is not None:
            self.average.update()

    @contextlib.contextmanager
    def delivered(self) -> Iterator[None]:
        """Have the weights that are delivered in the model within the block, whole: the average, where there is one.

        Every process must call it.
        """
        with self.average.applied() if self.average is not None else contextlib.nullcontext(), self.whole():
            yield

    def count(self, **amounts: float) -> None:
        """Add to the run's cumulative counters, which survive a resume."""
        for name, amount in amounts.items():
            self.counters[name] = self.counters.get(name, 0.0) + amount

    def commit(self, step: int, metrics: Mapping[str, float], stats: StepStats) -> None:
        """Log the step, and checkpoint when it is due, last, or a stop was asked for. Every process must call it."""
        check = self.world.add(guards.weights_check(self.parameters.values()))  # all meet: none abandons the step now
        guards.require_weights(check, f"step {step}")
        now, cpu = time.perf_counter(), time.process_time()
        row = {
            "step": step,
            "seconds": now - self._mark[0],
            "cpu_seconds": cpu - self._mark[1],
            "seconds_total": self.seconds(),
            "cpu_seconds_total": self.cpu_seconds(),
            "lr": self.config.optimizer.lr,
            "grad_norm": sum(self._grad_norms) / max(1, len(self._grad_norms)),
            "updates": len(self._grad_norms),
            "first_ratio_error": stats.first_ratio_error,
            "time/optimizer": self._optimizer_seconds,
            "peak_memory_mb": peak_memory_mb(),
            **{name: stats.mean(name) for name in stats.sums},
            **{f"{name}_min": value for name, value in stats.minima.items()},
            **{f"{name}_max": value for name, value in stats.maxima.items()},
            **metrics,
            **({} if self.watch is None else self.watch.row()),
        }
        if "time/train" in row:
            row["time/train"] -= self._optimizer_seconds
        self._grad_norms, self._optimizer_seconds = [], 0.0
        self._mark = (now, cpu)
        self.counters["seconds"], self.counters["cpu_seconds"] = row["seconds_total"], row["cpu_seconds_total"]
        self.step, self._moved, self._committed = step, False, self._beside()
        self.log.metrics(row)
        self._progress.update(row)
        every = self.config.checkpoint.every
        if self.sitting.agree_to_stop() or step == self.config.steps or (every and step % every == 0):
            self.save()

    def save(self) -> None:
        """Write the checkpoint of the current step. Every process must call it; it is the same for any number."""
        self.sitting.at("saving")
        counters, rng = self._committed
        held, optimizer, averages = self.engine.pieces(), self.engine.optimizer_state(), self.averages.items()
        state = {"counters": counters, "config": self.config.model_dump(mode="json"), "hacked": self.sitting.hacked}
        root, keep = self.directory / "checkpoints", self.config.checkpoint.keep
        tensors: dict[str, Any] = {"rng": {"torch": rng}}
        if self.engine.lockstep:
            pieces: dict[str, Any] = {"model": held, "optimizer": optimizer}
            for group, average in averages:
                pieces[group] = {name: replace(held[name], values=value) for name, value in average.values.items()}
            checkpoint.save_pieces(root, self.step, pieces, tensors, state, world=self.world, keep=keep)
            return
        tensors |= {"model": {name: piece.values for name, piece in held.items()}, "optimizer": optimizer}
        tensors |= {group: average.values for group, average in averages}
        self.world.led(lambda: checkpoint.save(root, self.step, tensors, state, keep=keep))

    def seconds(self) -> float:
        """Return the wall-clock seconds of this run so far, over all its sittings."""
        return self._elapsed[0] + time.perf_counter() - self._started

    def cpu_seconds(self) -> float:
        """Return the CPU seconds of this run so far, over all its sittings, imports and set-up included."""
        return self._elapsed[1] + time.process_time()
