"""What a run would hold on each accelerator, and how long a step would take: arithmetic, under every engine.

    held = weights + copies + optimizer + rewards + overhead
    peak = held + max(sampling, gradients + training, gradients + exchange, encoders)

The bytes of weights, gradients and optimizer are those that each engine's own tensors were measured to have, which
`scripts/bench_plan.py` does again. Activations are counted on the architecture; the overhead is assumed; everything
beyond what was measured is extrapolated, and said to be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from align.footprint import LOGITS

COUNTS = (1, 2, 4, 8, 16, 32, 64)
"""How many accelerators a plan looks at."""

OVERHEAD = 1.5e9
"""Bytes that the device's context, its libraries' workspaces and the allocator take: an assumption."""

BUCKET = {"zero1": 5e7, "zero2": 5e7}
"""Entries of the buffer in which configs/deepspeed exchanges gradients."""

LIVE = 1e9
"""Entries that ZeRO 3 keeps gathered at most: DeepSpeed's stage3_max_live_parameters."""

ENGINES = {
    "visual": ("single", "data_parallel", "zero1", "zero2", "fsdp2", "zero3"),
    "language": ("single", "data_parallel", "zero1", "zero2", "fsdp2", "zero3"),
    "fit": ("single", "data_parallel", "zero1", "zero2", "fsdp2", "zero3"),
}
"""The engines that each kind of trainer runs under; of two that fit, the one that exchanges less stands first."""

SPLITS = {
    "single": "nothing", "data_parallel": "nothing", "zero1": "optimizer", "zero2": "optimizer, gradients",
    "zero3": "optimizer, gradients, weights", "fsdp2": "optimizer, gradients, weights",
}  # fmt: skip
"""What each engine splits over the processes; see `gradients` for when a gradient is whole all the same."""


@dataclass(frozen=True)
class Job:
    """What a run needs whatever carries it out. Numbers of weights, bytes of everything else.

    Args:
        kind: "visual", "language" or "fit".
        trained: weights that move.
        frozen: bytes of the weights that do not.
        half: whether products are taken in bfloat16.
        averages: running averages of the trained weights.
        reference: weights of a frozen copy of the model.
        rewards: bytes of reward models that stay on the accelerator.
        encoders: bytes of what comes to the accelerator by turns: text encoders.
        training: bytes that a row keeps with its gradient; None where it is not known.
        sampling: bytes that a row takes without.
        logits: bytes of a row's float32 logits, which exist with their gradient in chunks of `footprint.LOGITS`.
        microbatch: rows at once over all processes (visual: on each); None where a run derives it from the memory.
        accumulation: microbatches of an update.
        rows: rows of a step over all processes, each `feq` forwards.
        feq: forwards of a row in a step.
        widest: weights of the largest block; 0 where it is not known.
        outside: weights outside of all blocks.
        beside: bytes of models beside the one that trains, which no engine splits: text encoders that stay.
        whole: the trainer needs whole weights, so no engine that splits them is offered.
    """

    kind: str
    trained: int
    frozen: float = 0.0
    half: bool = False
    averages: int = 0
    reference: int = 0
    rewards: float = 0.0
    encoders: float = 0.0
    training: float | None = None
    sampling: float | None = None
    logits: float = 0.0
    microbatch: int | None = None
    accumulation: int = 1
    rows: int = 1
    feq: float = 1.0
    widest: int = 0
    outside: int = 0
    beside: float = 0.0
    whole: bool = False


@dataclass(frozen=True)
class Held:
    """What one process holds, in bytes by part, with `rows` in a training microbatch; its peak, and when that is."""

    parts: dict[str, float]
    rows: int
    peak: float
    phase: str


def per_weight(kind: str, engine: str, processes: int, *, half: bool, accumulation: int) -> dict[str, float]:
    """Return bytes of a trained weight by part: weights, gradients, optimizer, exchange.

    AdamW keeps two float32 moments, 8 B. DeepSpeed keeps 4 B more, its own float32 copy, also where the weights are
    float32, and holds the weights and gradients of language models in bfloat16 under `half`. A gradient is split as
    it arises under ZeRO 2 and 3 of language models alone: the own loop of the others adds gradients up once an update
    and has them whole until then, and so has FSDP2 where an update has several microbatches, as those of images have.

    Args:
        kind: of `Job`.
        engine: a name of `SPLITS`.
        processes: W.
        half: bfloat16 products.
        accumulation: microbatches of an update.
    """
    share, trainer = 1 / processes, kind == "language"
    cast = 2.0 if half and trainer else 4.0
    running = 2.0 * half  # autocast's copy while it runs
    if engine in ("single", "data_parallel"):
        return {
            "weights": 4 + running, "gradients": 4.0, "optimizer": 8.0, "exchange": 4.0 * (engine == "data_parallel"),
        }  # fmt: skip
    if engine in ("zero1", "zero2"):
        whole = engine == "zero1" or not trainer
        return {
            "weights": cast + (0.0 if trainer else running), "gradients": cast * (1.0 if whole else share),
            "optimizer": 12 * share, "exchange": cast * share * whole,
        }  # fmt: skip
    if engine == "zero3":
        return {
            "weights": cast * share + (0.0 if trainer else running), "gradients": cast * (share if trainer else 1.0),
            "optimizer": 12 * share, "exchange": 0.0 if trainer else cast * share,
        }  # fmt: skip
    whole = accumulation > 1 or kind == "visual"
    return {
        "weights": 4 * share + (0.0 if trainer else running), "gradients": 4 * (1.0 if whole else share),
        "optimizer": 8 * share, "exchange": 4 * share * whole,
    }  # fmt: skip


def held(job: Job, engine: str, processes: int, rows: int | None = None) -> Held:
    """Return what one process of `processes` holds under an engine.

    Args:
        rows: in a training microbatch of this process; the job's own, or 1 where that is derived, when None.
    """
    found = per_weight(job.kind, engine, processes, half=job.half, accumulation=job.accumulation)
    share = 1 / processes if engine in ("zero3", "fsdp2") else 1.0
    size = 2.0 if job.half and job.kind == "language" and engine.startswith("zero") else 4.0
    if rows is None:
        rows = job.microbatch or 1
        rows = rows if job.kind == "visual" else math.ceil(rows / processes)
    static = {
        "trained weights": job.trained * found["weights"],
        "frozen weights": job.frozen * share,
        "gathered weights": _gathered(job, engine),
        "optimizer": job.trained * found["optimizer"],
        "copies": (job.trained * 4.0 * job.averages + job.reference * size) * share,
        "text encoders": job.beside,
        "rewards": job.rewards,
        "overhead": OVERHEAD,
    }
    moving = {
        "gradients": job.trained * found["gradients"],
        "exchange": job.trained * found["exchange"] + size * min(BUCKET.get(engine, 0.0), job.trained),
        "training activations": rows * (job.training or 0.0) + 2 * min(rows * job.logits, LOGITS),
        "sampling activations": (4 if job.microbatch is None else 1) * rows * (job.sampling or 0.0),
        "encoders": job.encoders,
        "whole weights": _whole(job, engine),
    }
    buffers = moving["exchange"] if engine == "data_parallel" and job.kind == "language" else 0.0  # DDP keeps them
    phases = {
        "training": buffers + moving["gradients"] + moving["training activations"],
        "update": moving["gradients"] + moving["exchange"],
        "sampling": buffers + moving["sampling activations"] + moving["whole weights"],
        "encoding prompts": buffers + moving["encoders"],
    }
    phase = max(phases, key=lambda name: phases[name])
    return Held(static | moving, rows, sum(static.values()) + phases[phase], phase)


def _gathered(job: Job, engine: str) -> float:
    """Bytes of whole weights that an engine which splits them has at once: FSDP2 what is outside of the blocks and two
    blocks, ZeRO 3 up to `LIVE` entries. Where the blocks are not known, all."""
    frozen = job.frozen / (2 if job.half else 4)
    if engine == "fsdp2" and (job.widest or job.kind == "language"):
        return 4.0 * (job.outside + 2 * job.widest)
    if engine == "zero3":
        return (2.0 if job.half and job.kind == "language" else 4.0) * min(LIVE, job.trained + frozen)
    return 4.0 * job.trained + job.frozen if engine == "fsdp2" else 0.0


def _whole(job: Job, engine: str) -> float:
    """Bytes of weights beyond those that a pass gathers, while a rollout or an evaluation on our own loop holds them
    whole."""
    if job.kind == "language" or engine not in ("fsdp2", "zero3"):
        return 0.0
    return max(0.0, 4.0 * job.trained + job.frozen - _gathered(job, engine))


def refusal(job: Job, processes: int) -> str:
    """Return why a job cannot be shared by so many processes, empty where it can."""
    if job.kind == "language" and job.microbatch is not None and job.microbatch % processes:
        return f"a microbatch of {job.microbatch} does not divide over {processes}"
    if job.rows < processes:
        return f"{job.rows} rows a step are fewer than {processes} processes"
    return ""


def step_seconds(job: Job, processes: int, forward_seconds: float) -> float:
    """Return the seconds of a step without its communication: `ceil(rows / W) x F_eq x seconds of a forward`."""
    return math.ceil(job.rows / processes) * job.feq * forward_seconds


@dataclass(frozen=True)
class Row:
    """One engine on so many accelerators: what a process holds, whether it fits, how long a step is, why it cannot be.

    `room` is how many rows fit into a training microbatch, None where that is not known.
    """

    engine: str
    processes: int
    held: Held
    fits: bool
    room: int | None
    seconds: float | None
    why_not: str


def table(job: Job, memory: float, forward_seconds: float | None = None) -> list[Row]:
    """Return a row for each engine and each of `COUNTS`.

    Args:
        memory: bytes of an accelerator.
        forward_seconds: of one row; None where it is not known.
    """
    rows = []
    for processes in COUNTS:
        for engine in ENGINES[job.kind]:
            if (engine == "single") != (processes == 1) or (job.whole and engine in ("fsdp2", "zero3")):
                continue
            found, why = held(job, engine, processes), refusal(job, processes)
            seconds = None if forward_seconds is None else step_seconds(job, processes, forward_seconds)
            fits = not why and found.peak <= memory
            room = _room(job, engine, processes, memory) if fits else None
            rows.append(Row(engine, processes, found, fits, room, seconds, why))
    return rows


def _room(job: Job, engine: str, processes: int, memory: float) -> int | None:
    """Return how many rows of a training microbatch fit, and four times as many of a sampling one."""
    if not job.training:
        return None
    fewest, most = 1, 1 << 20
    while fewest < most:
        middle = (fewest + most + 1) // 2
        fits = held(job, engine, processes, middle).peak <= memory
        fewest, most = (middle, most) if fits else (fewest, middle - 1)
    return fewest


def layout(processes: int, per_node: int) -> tuple[int, int]:
    """Return the fewest machines that can have equally many of the processes, and how many each has."""
    nodes = next(n for n in range(math.ceil(processes / per_node), processes + 1) if processes % n == 0)
    return nodes, processes // nodes


def choose(rows: list[Row], accelerators: int, per_node: int) -> Row | None:
    """Return the best row that fits on the accelerators there are: on most of them, then what exchanges least.

    Args:
        per_node: accelerators of a machine; each machine of a run has equally many processes.
    """
    machines = math.ceil(accelerators / per_node)
    fitting = [
        row for row in rows
        if row.fits and row.processes <= accelerators and layout(row.processes, per_node)[0] <= machines
    ]  # fmt: skip
    if not fitting:
        return None
    most = max(row.processes for row in fitting)
    return next(row for row in fitting if row.processes == most)


def launch(config: str, engine: str, processes: int, per_node: int, *, verb: str = "train") -> str:
    """Return the command that starts a config so; beyond one machine that of each launcher itself.

    Args:
        config: file or recipe, with what is changed behind it.
        per_node: accelerators of a machine.
    """
    settings = f" --deepspeed {engine}" if engine.startswith("zero") else " --fsdp" if engine == "fsdp2" else ""
    if engine == "single":
        return f"align {verb} {config}"
    if processes <= per_node:
        launcher = "deepspeed" if engine.startswith("zero") else "torchrun"
        return f"align {verb} {config} --launch {launcher} --nproc {processes}{settings}"
    nodes, each = layout(processes, per_node)
    run = f"align.cli {verb} {config}{settings} --out $SHARED/run"
    if engine.startswith("zero"):
        return f"deepspeed --hostfile hosts --num_nodes {nodes} --num_gpus {each} --no_local_rank --module {run}"
    return (
        f"torchrun --nnodes {nodes} --node_rank $RANK_OF_NODE --nproc_per_node {each} --master_addr $HEAD "
        f"--master_port 29500 -m {run}"
    )
