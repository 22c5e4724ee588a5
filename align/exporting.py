"""What every export shares: its folder, written whole or not at all, and the record of what is in it.

The record is `export.json`. A model card that people read is made of it and of the run's files by
`align.reports.modelcard`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from align.checks import named_rewards
from align.errors import ConfigError
from align.registry import suggest
from align.weights import file_sha256

DTYPES = ("fp32", "bf16")
RECORD = "export.json"

Finish = Callable[[Path, Mapping[str, Any]], None]
"""Adds to the folder that is being written, of which the record tells."""


def require_choices(layouts: Iterable[str], *, to: str, out: str | Path, dtype: str) -> None:
    """Refuse an unknown layout or dtype, and a place that is taken.

    Raises:
        ConfigError: naming the flag.
    """
    for what, value, known, flag in (("layout", to, layouts, "--to"), ("dtype", dtype, DTYPES, "--dtype")):
        if value not in known:
            raise ConfigError(f"Unknown {what} {value!r}", where=flag, do=suggest(value, known))
    out = Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError("There is something there already", where=f"--out {out}", do="Choose another --out")


def write_whole(
    out: str | Path, write: Callable[[Path], dict[str, Any]], finish: Finish | None = None
) -> dict[str, Any]:
    """Have `write` fill a folder that takes its name `out` only when all is written, and return its record.

    Args:
        write: writes the weights and returns the record, to which the hashes of the files of weights are added.
        finish: writes what else the folder is to hold.

    Raises:
        ConfigError: the disk refused; nothing is left behind.
    """
    from safetensors import SafetensorError

    out = Path(out)
    writing = out.parent / f".{out.name}.writing"
    try:
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
        record = write(writing)
        written = sorted(path for path in writing.rglob("*.safetensors") if path.is_file())
        record["files"] = {path.relative_to(writing).as_posix(): file_sha256(path) for path in written}
        (writing / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        if finish is not None:
            finish(writing, record)
        writing.replace(out)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            "The export could not be written", where=f"--out {out}",
            why=f"{error.strerror} ({error.filename})" if getattr(error, "filename", None) else str(error),
            do="Free some space, or choose another --out",
        ) from error  # fmt: skip
    finally:
        shutil.rmtree(writing, ignore_errors=True)
    return record


def describe_export(
    config: Any, base: Mapping[str, Any], run: Mapping[str, Any], layers: int, **how: Any
) -> dict[str, Any]:  # fmt: skip
    """Return the record of an export: how it is written, and where it comes from.

    Args:
        config: of the run.
        base: what the model before training is, beside its name.
        run: its `folder`, the `step`, which `weights` are delivered and the `sha256` of their file.
        layers: that have adapters.
        how: `to`, `dtype` and `load`.
    """
    model = config.model
    lora = {"rank": model.lora.rank, "alpha": model.lora.alpha, "layers": layers}
    data = config.prompts if hasattr(config, "prompts") else config.data
    return {
        **how,
        "base": {"model": model.path, **base},
        "run": {"name": config.name, **run},
        "trained": {
            "trainer": config.trainer, "train": model.train, **(lora if model.train == "lora" else {}),
            "rewards": [reward.name for _, reward in named_rewards(getattr(config, "rewards", ()))],
            "data": data.path, "seed": config.seed,
        },
    }  # fmt: skip
