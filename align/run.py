"""A run: a directory, the step it stands at, and the few lines every training loop shares.

with Run(config, directory, parameters) as run:
    for step in run.steps():            # resumes by itself
        ...
        run.backward(loss, weight=share)
        run.update(stats)               # guards, clip, optimizer
        run.commit(step, metrics)       # log, checkpoint, stop flag
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import resource
import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from align import checkpoint, guards
from align.config import DanceGRPOConfig, OptimizerConfig, diff_configs, load_config, save_config
from align.errors import ConfigError
from align.tracking import Progress, RunLog
from align.types import StepStats

if TYPE_CHECKING:
    import torch


def build_optimizer(parameters: Mapping[str, torch.nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Build AdamW over the trained parameters."""
    import torch

    return torch.optim.AdamW(
        list(parameters.values()),
        lr=config.lr,
        betas=tuple(config.betas),
        eps=config.eps,
        weight_decay=config.weight_decay,
    )


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


def require_directory(directory: Path, config: DanceGRPOConfig, *, overwrite: bool = False) -> None:
    """Refuse a folder that cannot become this run's own; write nothing.

    Raises:
        ConfigError: a non-empty folder that is not a run, or a run of another configuration.
    """
    if not directory.is_dir() or not any(directory.iterdir()):
        return
    if not (directory / "config.yaml").is_file():
        raise ConfigError("The folder is not empty and is not a run", where=str(directory), do="Choose another --out")
    if overwrite:
        return
    changed = diff_configs(load_config(directory / "config.yaml"), config)
    if changed:
        raise ConfigError(
            "This folder holds a run of another configuration",
            where=str(directory),
            why="; ".join(f"{key}: {old!r} there, {new!r} now" for key, old, new in changed[:6]),
            do="Use the same configuration to resume it, another --out, or --overwrite to start again",
        )


def claim_directory(directory: Path, config: DanceGRPOConfig, *, overwrite: bool = False) -> None:
    """Make `directory` this run's own, replacing an earlier run with `overwrite`, and keep the configuration there."""
    require_directory(directory, config, overwrite=overwrite)
    if overwrite and directory.is_dir():
        shutil.rmtree(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / "config.yaml").is_file():
        save_config(config, directory / "config.yaml")


class Run:
    """One training run in one directory.

    Args:
        config: the resolved configuration.
        directory: claimed by `claim_directory`.
        parameters: the trained weights by name; saved in every checkpoint and restored from the last.
        record: what `run.json` says besides: rewards, ledger, model.
    """

    def __init__(
        self,
        config: DanceGRPOConfig,
        directory: str | Path,
        parameters: Mapping[str, torch.nn.Parameter],
        record: Mapping[str, Any] | None = None,
    ) -> None:
        self.config, self.directory = config, Path(directory)
        self.parameters = dict(parameters)
        self.optimizer = build_optimizer(self.parameters, config.optimizer)
        self.log = RunLog(self.directory, tensorboard=config.tracking.tensorboard)
        self.stopping = ""
        self.counters: dict[str, float] = {}
        self.step = 0
        self._grad_norms: list[float] = []
        self._optimizer_seconds = 0.0
        self._handlers: dict[int, Any] = {}
        self._restore()
        self._started = time.perf_counter()
        self._elapsed = (self.counters.get("seconds", 0.0), self.counters.get("cpu_seconds", 0.0))
        self._mark = (self._started, time.process_time())
        existing = self.directory / "run.json"
        first = json.loads(existing.read_text(encoding="utf-8")).get("started") if existing.is_file() else None
        self.record = {
            "trainer": config.trainer,
            "name": config.name,
            "seed": config.seed,
            "started": first or _now(),
            "finished": None,
            "status": "running",
            "steps_planned": config.steps,
            **(record or {}),
            **describe_machine(),
        }
        self.log.write_run(self.record)

    def __enter__(self) -> Run:
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._handlers[number] = signal.signal(number, self._request_stop)
            except ValueError:  # only the main thread may set handlers
                break
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if kind is not None:
            self.finish("failed")
        self.log.close()

    def _request_stop(self, number: int, frame: FrameType | None) -> None:
        if self.stopping:
            raise KeyboardInterrupt
        self.stopping = signal.Signals(number).name

    def _restore(self) -> None:
        import torch

        found = checkpoint.load_latest(self.directory / "checkpoints")
        self.log.truncate_after(found.step if found else 0 if (self.directory / "metrics.jsonl").is_file() else -1)
        if found is None:
            return
        self.step, self.counters = found.step, dict(found.state["counters"])
        missing = set(self.parameters) ^ set(found.tensors["model"])
        if missing:
            raise ConfigError(
                "A checkpoint belongs to another model",
                where=str(self.directory),
                why=f"weights differ: {sorted(missing)[0]}",
            )
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(found.tensors["model"][name])
        checkpoint.unpack_optimizer(self.optimizer, found.tensors.get("optimizer", {}), found.state["optimizer"])
        torch.set_rng_state(found.tensors["rng"]["torch"])

    def steps(self) -> Iterator[int]:
        """Yield the steps still to do, counted from 1, until done or asked to stop."""
        self._mark = (time.perf_counter(), time.process_time())
        with Progress(self.config.steps, initial=self.step) as self._progress:
            while self.step < self.config.steps and not self.stopping:
                yield self.step + 1

    def backward(self, loss: torch.Tensor, *, weight: float) -> None:
        """Accumulate the gradient of `weight * loss`; the weights of one update add up to 1."""
        guards.require_finite(loss, "The loss", f"step {self.step + 1}")
        (loss * weight).backward()

    def update(self) -> float:
        """Check and clip the accumulated gradient, take the optimizer step, and return the gradient norm."""
        import torch

        began = time.perf_counter()
        parameters = list(self.parameters.values())
        norm = guards.gradient_norm(parameters, f"step {self.step + 1}")
        if self.config.optimizer.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.optimizer.max_grad_norm, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._grad_norms.append(float(norm))
        self._optimizer_seconds += time.perf_counter() - began
        return float(norm)

    def count(self, **amounts: float) -> None:
        """Add to the run's cumulative counters, which survive a resume."""
        for name, amount in amounts.items():
            self.counters[name] = self.counters.get(name, 0.0) + amount

    def commit(self, step: int, metrics: Mapping[str, float], stats: StepStats) -> None:
        """Log the step, and checkpoint when it is due, last, or a stop was asked for."""
        now, cpu = time.perf_counter(), time.process_time()
        row = {
            "step": step,
            "seconds": now - self._mark[0],
            "cpu_seconds": cpu - self._mark[1],
            "seconds_total": self.seconds(),
            "cpu_seconds_total": self.cpu_seconds(),
            "lr": self.optimizer.param_groups[0]["lr"],
            "grad_norm": sum(self._grad_norms) / max(1, len(self._grad_norms)),
            "updates": len(self._grad_norms),
            "first_ratio_error": stats.first_ratio_error,
            "time/optimizer": self._optimizer_seconds,
            "peak_memory_mb": peak_memory_mb(),
            **{name: stats.mean(name) for name in stats.sums},
            **{f"{name}_min": value for name, value in stats.minima.items()},
            **{f"{name}_max": value for name, value in stats.maxima.items()},
            **metrics,
        }
        if "time/train" in row:
            row["time/train"] -= self._optimizer_seconds
        self._grad_norms, self._optimizer_seconds = [], 0.0
        self._mark = (now, cpu)
        self.counters["seconds"], self.counters["cpu_seconds"] = row["seconds_total"], row["cpu_seconds_total"]
        self.step = step
        self.log.metrics(row)
        self._progress.update(row)
        every = self.config.checkpoint.every
        if self.stopping or step == self.config.steps or (every and step % every == 0):
            self.save()

    def save(self) -> Path:
        """Write the checkpoint of the current step."""
        import torch

        slots, optimizer = checkpoint.pack_optimizer(self.optimizer)
        return checkpoint.save(
            self.directory / "checkpoints",
            self.step,
            {"model": self.parameters, "optimizer": slots, "rng": {"torch": torch.get_rng_state()}},
            {"optimizer": optimizer, "counters": self.counters, "config": self.config.model_dump(mode="json")},
            keep=self.config.checkpoint.keep,
        )

    def seconds(self) -> float:
        """Return the wall-clock seconds of this run so far, over all its sittings."""
        return self._elapsed[0] + time.perf_counter() - self._started

    def cpu_seconds(self) -> float:
        """Return the CPU seconds of this run so far, over all its sittings, imports and set-up included."""
        return self._elapsed[1] + time.process_time()

    def finish(self, status: str) -> None:
        """Record how the run ended: complete, stopped or failed."""
        self.record.update(status=status, finished=_now())
        self.log.write_run(self.record)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
