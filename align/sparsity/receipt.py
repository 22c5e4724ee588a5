"""The receipt of a training run: which weights it moved, beside what rounding alone would show.

The delivered weights against those that training started from, in the format these are stored in, and in the other one
of float32 and bfloat16: what rounding hides, or makes, is always beside the number. Adapters are compared as the
weights they merge into, rounded once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from align.errors import AlignError
from align.sparsity.callback import Travelled, predictions
from align.sparsity.compare import Comparison, compare

RECEIPT = "sparsity.json"


def write_receipt(
    directory: Path, base: Callable[[], str | Path], weights: Path, *, travelled: Travelled, adapted: bool,
    mask: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure which weights a run moved, write `sparsity.json` into its folder, and return what a summary says of it.

    Args:
        directory: the run folder.
        base: finds the weights before training; where it cannot, the receipt says why.
        weights: those that are delivered.
        travelled: the learning rates of its updates.
        adapted: whether adapters were trained.
        mask: the file that training was kept to, if any.

    Returns:
        `status`, "measured" or "unknown", `sentence`, and the headline's shares, or `why` there are none.
    """
    found: dict[str, Any]
    try:
        found = {**measured(base(), weights, travelled, adapted=adapted, mask=mask), "mask": mask}
    except (AlignError, OSError) as error:
        found = {"status": "unknown", "why": str(error), "sentence": f"Which weights moved is unknown: {error}"}
    path = directory / RECEIPT
    temporary = path.with_name(path.name + ".writing")
    temporary.write_text(json.dumps(found, default=str), encoding="utf-8")
    os.replace(temporary, path)
    first = found.get("views", [{}])[0]
    shares = ("dtype", "bit_identical", "expected_bit_identical_if_dense", "norm", "relative_norm")
    return {k: found[k] for k in ("status", "why", "sentence") if k in found} | {
        k: first[k] for k in shares if k in first
    }


def measured(
    base: str | Path, weights: Path, travelled: Travelled, *, adapted: bool, mask: str | None = None
) -> dict[str, Any]:
    """Return the receipt: two views of one comparison, and what the learning rates alone would have shown.

    Raises:
        ModelError: a base that cannot be read, or one whose weights have other names.
    """
    stored = compare(base, weights)
    first = stored.as_dict()
    other = compare(base, weights, form="BF16" if first["dtype"] in ("F32", "F64") else "F32")
    second = other.as_dict()
    del second["per_tensor"]
    steps = {"updates": travelled.updates, "path": travelled.path, "spread": travelled.spread}
    found = {
        "status": "measured", "base": str(base), "weights": str(weights), "views": [first, second], "steps": steps,
        "trained": "adapters" if adapted else "weights",
    }  # fmt: skip
    if not adapted and mask is None and travelled.updates:  # of all weights
        rate = travelled.path / travelled.updates
        found["predicted"] = [_predicted(view, travelled, rate) for view in (stored, other)]
    return {**found, "sentence": sentence(first, second, adapted)}


def _predicted(found: Comparison, travelled: Travelled, rate: float) -> dict[str, float]:
    return {name.partition("_")[2]: v for name, v in predictions(found.tensors, travelled, rate).items()}


def sentence(first: Mapping[str, Any], second: Mapping[str, Any], adapted: bool) -> str:
    """Return the headline of a receipt: each share beside the one that rounding would have left."""

    seen, dense = (100 * first[key] for key in ("bit_identical", "expected_bit_identical_if_dense"))
    rounded = second["compared_in"] == "BF16"  # of a base that is stored finer
    key = "expected_bit_identical_if_dense" + ("_unaligned" if rounded else "")
    merged = ", adapters merged" if adapted else ""
    return (
        f"{seen:.2f} % of the weights are bit-identical to the base's in {first['dtype']}, as it is stored{merged} "
        f"({dense:.2f} % if a dense update of that norm were rounded), {100 * second['bit_identical']:.2f} % in "
        f"{second['compared_in']} ({100 * second[key]:.2f} %); the norm of the change is "
        f"{100 * (first['relative_norm'] or 0):.3g} % of the base's{_still(first)}"
    )


def _still(view: Mapping[str, Any]) -> str:
    """Say how much lies in tensors that did not move at all, which the null leaves as they are too."""
    share = view["untouched"]["parameters"] / max(view["parameters"], 1)
    return f"; {100 * share:.1f} % lie in tensors that did not move, under either count" if share > 0.01 else ""
