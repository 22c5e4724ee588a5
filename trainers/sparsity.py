"""Which weights a run moves: measures while it goes on, the receipt at its end, and masks that it keeps to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch.nn import Parameter

from align import checkpoint
from align.config import OptimizerConfig, SparsityConfig
from align.errors import ConfigError
from align.sparsity import FORMS
from align.sparsity.callback import Tracker, Travelled
from align.sparsity.receipt import write_receipt
from align.sparsity.sources import Source
from align.sparsity.subnetwork import SubnetworkAdamW, read_places
from align.tracking import RunLog


def require_maskable(mask: str | None, *, adapted: bool, deepspeed: Any, fsdp: bool = False) -> None:
    """Refuse a mask where it cannot be kept to.

    Raises:
        ConfigError: adapters, which move every weight of a layer; DeepSpeed, which keeps weights in flat pieces; or
            FSDP2, under which no process has a whole weight.
    """
    if mask is None:
        return
    if adapted:
        raise ConfigError(
            "A mask needs full training", where="sparsity.mask", why="an adapter moves every weight of its layer",
            do="Set model.train: full",
        )  # fmt: skip
    if fsdp:
        raise ConfigError(
            "A mask does not go with FSDP2", where="sparsity.mask, --fsdp", why="no process holds a whole weight",
            do="Train without --fsdp",
        )  # fmt: skip
    if deepspeed is not None:
        raise ConfigError(
            "A mask does not go with ZeRO", where="sparsity.mask, --deepspeed",
            why="its optimizer works on flat pieces of all weights together", do="Train without --deepspeed",
        )  # fmt: skip


def masked_optimizer(
    parameters: Mapping[str, Parameter], config: OptimizerConfig, mask: str, deepspeed: Any = None
) -> SubnetworkAdamW:
    """Return AdamW on what a mask file names of the trained weights.

    Raises:
        ConfigError: a mask of another model, or training that a mask does not go with.
    """
    require_maskable(mask, adapted=any(".lora_A." in name for name in parameters), deepspeed=deepspeed)
    places = read_places(mask, parameters)
    return SubnetworkAdamW(
        parameters.values(), places.values(), lr=config.lr, betas=tuple(config.betas), eps=config.eps,
        weight_decay=config.weight_decay,
    )  # fmt: skip


def open_tracker(
    config: SparsityConfig, base: Callable[[], str | Path], current: Callable[[], Source], log: RunLog, step: int
) -> Tracker | None:
    """Return what measures while training runs, None where it is not asked to.

    Args:
        base: finds the folder of the model before training.
        current: returns the model as it stands.
        step: where training stands, whose log is behind it.
    """
    if not config.every:
        return None
    behind = Travelled(row for row in log.read_metrics() if row["step"] <= step)
    form = FORMS[config.dtype] if config.dtype else ""
    tracker = Tracker(base, current, every=config.every, form=form, travelled=behind, whole=config.mask is None)
    if tracker.why:
        log.warn(step, "warning", "sparsity", f"what moved since the beginning cannot be measured: {tracker.why}")
    return tracker


def end_with_receipt(
    directory: Path, base: Callable[[], str | Path], rows: Iterable[Mapping[str, Any]], *, config: Any, log: RunLog
) -> dict[str, Any]:
    """Write the receipt of a finished run from its last checkpoint; see `align.sparsity.receipt.write_receipt`.

    Args:
        directory: the run folder.
        base: finds the folder of the model before training.
        rows: the log of its steps.
        config: of the run.
    """
    found = write_receipt(
        directory, base, checkpoint.latest(directory / "checkpoints") or directory, travelled=Travelled(rows),
        adapted=config.model.train == "lora", mask=config.sparsity.mask,
    )  # fmt: skip
    if found["status"] == "unknown":
        log.warn(0, "warning", "sparsity", found["sentence"])
    return found
