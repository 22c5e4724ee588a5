"""The page of a comparison of two checkpoints: what moved, what rounding alone would show, and how to read it.

Beside the page lie the same numbers as Markdown, and as JSON lines: a summary, then a row a tensor.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align.errors import ConfigError
from align.reports.page import brief, count, percent, render
from align.reports.sparsity_charts import bars, heat_map, spectrum_chart, tolerance_chart
from align.sparsity.compare import BLIND, compare, layer_of
from align.sparsity.formats import FORMATS
from align.sparsity.masks import overlap
from align.sparsity.masters import masters_as_text
from align.sparsity.ranks import rank
from align.sparsity.structure import structure_as_text

NEAR = 0.01
"""Share of all weights, beyond sampling error, within which a figure is said to be what rounding leaves."""
MOST_ROWS = 40


def write_report(
    base: str | Path,
    tuned: str | Path,
    path: str | Path,
    *,
    others: Sequence[str | Path] = (),
    rank_level: str | None = None,
) -> dict[str, Any]:
    """Compare two checkpoints and write the page, Markdown and JSON lines.

    Args:
        path: the page, ending in .html; the other files take its name.
        others: further runs from `base`, for the overlap of what they moved.
        rank_level: how much is said of ranks and spectra, see `align.sparsity.ranks.rank`; nothing by default.

    Returns:
        `files` by kind, and the `result` of the comparison, with `overlap` where there are others, and `rank`.

    Raises:
        ModelError: a side that cannot be read, or different models.
        ConfigError: a place that cannot be written.
    """
    path = Path(path)
    if path.suffix != ".html":
        raise ConfigError("A page is a .html file", where=str(path), do=f"Give --out {path}.html")
    result = compare(base, tuned, structure=True).as_dict()
    if others:
        result["overlap"] = overlap(base, [tuned, *others])
    rows, spectra = result["per_tensor"], {}
    summary = {key: value for key, value in result.items() if key != "per_tensor"}
    if rank_level is not None:
        result["rank"] = rank(base, tuned, level=rank_level)
        spectra = {row["name"]: {"spectrum": row} for row in result["rank"]["matrices"]}
        summary["rank"] = {key: value for key, value in result["rank"].items() if key != "matrices"}
    lines = [
        json.dumps(row, default=str) for row in (summary, *({**row, **spectra.get(row["name"], {})} for row in rows))
    ]
    texts = {
        "page": render("sparsity.html", page_of(result)),
        "markdown": markdown(result),
        "rows": "\n".join(lines) + "\n",
    }
    files = {"page": path, "markdown": path.with_suffix(".md"), "rows": path.with_suffix(".jsonl")}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for kind, text in texts.items():
            temporary = files[kind].with_name(files[kind].name + ".writing")
            temporary.write_text(text, encoding="utf-8", errors="replace")
            os.replace(temporary, files[kind])
    except OSError as error:
        raise ConfigError("The report cannot be written", where=str(path), why=error.strerror or "") from error
    return {"files": files, "result": result}


def page_of(result: dict[str, Any]) -> dict[str, Any]:
    """Return what the page's template shows."""
    verdict, reading = read_plainly(result)
    shown = sorted(result["per_tensor"], key=lambda row: -row["norm"])[:MOST_ROWS]
    return {
        "r": result, "name": Path(result["tuned"]).name or result["tuned"], "verdict": verdict, "reading": reading,
        "heat": heat_map(_cells(result)), "curve": tolerance_chart(result), "ulp": bars(result["ulp_histogram"]),
        "tensors": shown, "hidden": len(result["per_tensor"]) - len(shown),
        "unmatched": [(key.replace("_", " "), _names(value)) for key, value in result["keys"].items() if value],
        "overlap": result.get("overlap"), "rank": rank_of_page(result),
        "coarse": FORMATS[result["dtype"]].bits == 16,
        "heads": [(role, heat_map(cells)) for role, cells in _head_cells(result).items()],
    }  # fmt: skip


def read_plainly(result: dict[str, Any]) -> tuple[str, list[str]]:
    """Return the headline in words, and the sentences below it."""
    seen, expected = result["bit_identical"], result["expected_bit_identical_if_dense"]
    damaged = result["nan"]["tuned"] - result["nan"]["base"] + result["infinite"]
    if damaged > 0:
        nan, infinite = count(result["nan"]["tuned"]), count(result["infinite"])
        return "The tuned model is not finite", [
            f"{nan} of its weights are NaN, and {infinite} changed from or to infinity. All norms leave them out, so "
            "what a dense update would show says nothing here."
        ]
    if seen == 1:
        return "The two are bit-identical", [
            "Nothing was trained, or nothing was large enough for the format to store."
        ]
    low, high = sorted((expected, result["expected_bit_identical_if_dense_unaligned"]))
    near = NEAR + 3 * math.sqrt(seen * (1 - seen) / result["parameters"])
    if seen > high + near:
        words = "More weights stand still than rounding explains"
        so = "The change sits on fewer weights than that of a dense Gaussian update would"
    elif seen < low - near:
        words = "Fewer weights stand still than rounding would leave"
        so = "The change is spread more evenly over small steps than that of a Gaussian update"
    else:
        words = "Rounding alone is enough to explain the share that stands still"
        so = "Nothing here shows that the update was sparse"
        still = result["untouched"]["parameters"] / result["parameters"]
        if still > NEAR:
            words = "Whole tensors stand still; rounding is enough to explain the rest"
            so = f"{percent(still)} of the weights lie in tensors that did not change at all, and the rest looks dense"
    reading = [
        f"A dense update of this norm, rounded, would leave {percent(low)} to {percent(high)} bit-identical; "
        f"{percent(seen)} are. {so}.",
        "The null is an update N(0, s²) of every weight, with s chosen per tensor so that its visible norm equals the "
        "observed one. The expected figure assumes a start on values of the format; from a finer master it would be "
        f"{percent(result['expected_bit_identical_if_dense_unaligned'])}.",
    ]
    blind = next((row for row in result["tolerance_curve"] if row["blind"] > BLIND), None)
    if blind and FORMATS[result["dtype"]].bits == 16:
        reading.append(
            f"From a tolerance of {brief(blind['tolerance'], 2)} up, more than {percent(BLIND, 0)} of the weights are "
            "spaced so closely that a step between neighbours passes as equal: shares there say little."
        )
    norms = result["modules"].get("norm")
    if norms and norms["density"] < result["density"] / 4 and result["dtype"] == "BF16":
        reading.append(
            "Norm weights near 1 are spaced 0.004 to 0.008 apart in bf16, so they look untouched whatever training did."
        )
    return words, reading


def rank_of_page(result: dict[str, Any]) -> dict[str, Any] | None:
    """Return what the page says of ranks: rows by how far they stand above the edge, and a chart of some of them."""
    if "rank" not in result:
        return None
    rows = [{**row, "over_edge": over_edge(row)} for row in result["rank"]["matrices"]]
    ordered = sorted(rows, key=lambda row: -(row["over_edge"] or 0.0))
    said = [f"{count(n)} {status}" for status, n in result["rank"]["summary"]["status"].items() if n]
    return {
        "rows": ordered[:MOST_ROWS], "hidden": max(0, len(ordered) - MOST_ROWS), "said": ", ".join(said),
        "full": any("nss" in row for row in rows), "chart": spectrum_chart(ordered), **result["rank"],
    }  # fmt: skip


def over_edge(row: dict[str, Any]) -> float | None:
    """Return the largest singular value over the noise edge."""
    return (
        row["singular_values"][0][1] / row["noise_edge"] if row.get("singular_values") and row["noise_edge"] else None
    )


def _rank_lines(result: dict[str, Any]) -> list[str]:
    ranks = rank_of_page(result)
    if ranks is None:
        return []
    lines = [
        "", f"Rank of the update: {ranks['said']}.", "",
        "| matrix | above the noise edge | certificate | stable rank | energy in 1 / 8 / 64 | s1 over edge |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in ranks["rows"]:
        above = "below precision floor" if row["status"].startswith("below") else brief(row.get("above_edge"))
        energy = " / ".join(percent(row.get("top_energy", {}).get(k), 0) for k in ("1", "8", "64"))
        cells = (row["name"], above if "singular_values" in row else row["status"], row.get("certificate", "–"))
        lines.append(
            f"| {' | '.join(cells)} | {brief(row.get('stable_rank'), 3)} | {energy} | {brief(row['over_edge'], 3)} |"
        )
    return [*lines, "", *(f"- {note}" for note in ranks["notes"])]


def _names(value: Any) -> str:
    shown = [
        f"{k}: {v}" if isinstance(value, dict) else str(k)
        for k, v in (value.items() if isinstance(value, dict) else ((v, 0) for v in value))
    ]
    return ", ".join(shown[:6]) + (f" and {len(shown) - 6} more" if len(shown) > 6 else "")


def _cells(result: dict[str, Any]) -> dict[str, dict[str, tuple[float, str]]]:
    """Return density by layer and by module within a layer, with a line that says what it is."""
    cells: dict[str, dict[str, tuple[float, str]]] = {}
    for row in result["per_tensor"]:
        layer, module = layer_of(row["name"])
        dense = percent(1 - row["expected_bit_identical_if_dense"])
        say = f"{row['name']}: {percent(row['density'])} changed; {dense} if a dense update of its norm were rounded"
        cells.setdefault(layer, {})[module] = (row["density"], say)
    return cells


def _head_cells(result: dict[str, Any]) -> dict[str, dict[str, dict[str, tuple[float, str]]]]:
    """Return by role, layer and attention head the density, with a line that says what it is."""
    found: dict[str, dict[str, dict[str, tuple[float, str]]]] = {}
    for row in result["per_tensor"]:
        heads = row.get("structure", {}).get("heads")
        if heads:
            rows = zip(heads["density"], heads["expected"], strict=True)
            found.setdefault(heads["role"], {})[layer_of(row["name"])[0]] = {
                str(i): (seen, f"{row['name']}, head {i}: {percent(seen)} changed; {percent(due)} given its magnitudes")
                for i, (seen, due) in enumerate(rows)
            }
    return found


def markdown(result: dict[str, Any]) -> str:
    """Return the comparison as Markdown."""
    words, reading = read_plainly(result)
    head = (
        "| | parameters | bit-identical | if dense | <= 1e-5 | norm | sign flips |",
        "|---|---|---|---|---|---|---|",
    )

    def row(name: str, s: dict[str, Any]) -> str:
        shares = (percent(s[k], 2) for k in ("bit_identical", "expected_bit_identical_if_dense", "sparsity_1e-5"))
        cells = [name, count(s["parameters"]), *shares, brief(s["norm"]), percent(s["sign_flips"], 3)]
        return f"| {' | '.join(cells)} |"

    def tolerance(t: dict[str, Any]) -> str:
        return f"| {brief(t['tolerance'], 3)} | {percent(t['within'], 2)} | {percent(t['blind'], 2)} |"

    floor, expected = result["precision_floor"], percent(result["expected_bit_identical_if_dense"], 2)
    lines = [
        f"# {result['tuned']} against {result['base']}", "", f"**{words}.** {reading[0]}", "",
        f"{percent(result['bit_identical'], 2)} of weights are bit-identical in {result['dtype']} (precision floor "
        f"{'none' if floor is None else f'{brief(floor, 2)} times the norm'}; expected {expected} if a dense update of "
        "the same norm were rounded).", "", *head, row("all", result),
        *(row(name, s) for name, s in result["modules"].items()), "",
        "| steps between codes | entries |", "|---|---|",
        *(f"| {steps} | {count(n)} |" for steps, n in result["ulp_histogram"].items()), "",
        "| tolerance | within | too fine to tell |", "|---|---|---|",
        *(tolerance(t) for t in result["tolerance_curve"] if t["within"] < 1), "",
        *(f"- {line}" for line in ([masters_as_text(result["masters"])] if result["masters"] else [])),
        *(f"- {line}" for line in (structure_as_text(result["structure"]) if result["structure"] else [])),
        *(f"- {note}" for note in (*reading[1:], *result["notes"])),
    ]  # fmt: skip
    lines += _rank_lines(result)
    for pair in (result.get("overlap") or {}).get("pairs", ()):
        null = pair["nulls"]["by_magnitude"]
        seen, chance = (" / ".join(percent(v) for v in part["one_sided"]) for part in (pair, null))
        chance += f", z {brief(null['z'], 3)}"
        lines += ["", f"Overlap of {pair['first']} and {pair['second']}: {seen}; by chance given magnitudes {chance}."]
    return "\n".join(lines).replace("\u00a0", " ") + "\n"
