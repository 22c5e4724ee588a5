"""Underlying distribution matching: weights that make the prompts of thumbs down look like those of thumbs up.

Thumbs arrive on different prompts: people complain about some things and praise others. A classifier of the label from
the prompt alone gives the density ratio; its odds, clamped, weigh the rows that are down. It is fitted once, every row
gets a weight, and the weights are a column (`udm_weight`) of the data.

Where this differs from the paper (BCO, arXiv 2404.04656 v1; v2 repeats the smaller class instead)
1. Weights are worked out once for all rows, not from an embedding in every step.
2. Prompts are drawn without replacement, and the fit is the same for any order of the rows that are drawn.
3. The share of clamped weights, the effective sample size and the classifier's AUC are reported, the AUC also on
   prompts that the classifier was not fitted on: near .5 both classes have the same prompts, and nothing to match.
4. Without a model prompts are bags of hashed words. With one they are its mean hidden states at unit length; the
   example in TRL also normalises these over their dimensions and keeps the first 512.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from align.errors import ConfigError, DataError
from align.feedback.exchange.tables import write_table
from align.preferences import Completion, PreferenceSet, parse_row, prompt_key
from align.prompts import read_rows
from align.seeding import permutation
from trainers.language_measures import auc
from trainers.preference import effective_sample_size, udm_weights
from trainers.prompt_embedding import WORDS, embed_with_model, embed_words

COLUMN = "udm_weight"
FOLDS = 5


@dataclass(frozen=True)
class Matching:
    """Weights `[N]`, 1 for rows that are up; the classifier; and what they are worth.

    Args:
        weights: of every row.
        coefficients, intercept: of the classifier, numbers that JSON holds.
        auc: of the classifier on all rows, those it was fitted on among them.
        auc_heldout: of classifiers of the drawn rows in `FOLDS` parts, on the part each was not fitted on; NaN where
            the parts leave a class out.
        effective_rows: rows down that would weigh as unevenly as little: `(sum w)^2 / sum w^2`.
        clamped: share of the rows down whose weight met a bound.
    """

    weights: np.ndarray
    coefficients: np.ndarray
    intercept: float
    auc: float
    auc_heldout: float
    effective_rows: float
    clamped: float

    def describe(self) -> dict[str, Any]:
        """Return the classifier and the figures as JSON."""
        return {
            "auc": self.auc, "auc_heldout": self.auc_heldout, "effective_rows": self.effective_rows,
            "clamped": self.clamped, "intercept": self.intercept, "coefficients": self.coefficients.tolist(),
        }  # fmt: skip


def fit_balanced_logistic(features: Tensor, label: Tensor, *, strength: float = 1.0) -> tuple[Tensor, float]:
    """Return coefficients and intercept of a logistic regression with balanced classes.

        minimise  |w|^2 / 2 + C sum_i (N / (2 n_class(i))) BCE(w x_i + b, y_i)

    Args:
        features: `[N, D]`.
        label: `[N]`, 0 or 1, both present.
        strength: C, the inverse of the regularisation.
    """
    x, y = features.double(), label.double()
    up = y.sum()
    weight = strength * torch.where(y > 0.5, len(y) / (2 * up), len(y) / (2 * (len(y) - up)))
    w = torch.zeros(x.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [w], max_iter=1000, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        fit = functional.binary_cross_entropy_with_logits(x @ w[:-1] + w[-1], y, weight=weight, reduction="sum")
        loss = fit + w[:-1].square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    return w.detach()[:-1], float(w.detach()[-1])


def match_prompts(
    features: np.ndarray,
    desirable: np.ndarray,
    *,
    sample: int = 1024,
    low: float = 0.5,
    high: float = 10.0,
    seed: int = 0,
    prompt: np.ndarray | None = None,
) -> Matching:
    """Return the weights of N rows from features of their prompts.

    Args:
        features: `[N, D]` floats, such as the embeddings of a sentence model.
        desirable: bool `[N]`.
        sample: prompts of each class that the classifier is fitted on at most.
        low, high: bounds of the weights.
        seed: of the draw.
        prompt: int `[N]`, the same number for rows of one prompt, which stay together in `auc_heldout`; each row has
            its own when None.

    Raises:
        DataError: features that are not finite, or one class only.
    """
    features, desirable = np.asarray(features, dtype=np.float64), np.asarray(desirable, dtype=bool)
    if features.ndim != 2 or len(features) != len(desirable) or not np.isfinite(features).all():
        raise DataError("Prompt features are finite numbers [N, D], a row each", why=f"got {features.shape}")
    sides = [np.flatnonzero(desirable), np.flatnonzero(~desirable)]
    if not all(map(len, sides)):
        raise DataError("Matching needs rows of both classes", why=f"{len(sides[0])} up and {len(sides[1])} down")
    drawn = np.concatenate([
        side[sorted(permutation(len(side), "prompt matching", seed, i)[:sample])] for i, side in enumerate(sides)
    ])  # fmt: skip
    prompt = np.arange(len(features)) if prompt is None else np.asarray(prompt)
    w, b = fit_balanced_logistic(torch.from_numpy(features[drawn]), torch.from_numpy(desirable[drawn]))
    probability = torch.sigmoid(torch.from_numpy(features) @ w + b)
    found = udm_weights(probability, low, high)
    weights = np.where(desirable, 1.0, found.numpy())
    down = found[torch.from_numpy(~desirable)]
    return Matching(
        weights, w.numpy(), b, auc(probability.numpy(), desirable),
        _heldout_auc(features[drawn], desirable[drawn], prompt[drawn], seed), effective_sample_size(down),
        float(((down <= low) | (down >= high)).double().mean()),
    )  # fmt: skip


def _heldout_auc(features: np.ndarray, desirable: np.ndarray, prompt: np.ndarray, seed: int) -> float:
    """Return the AUC of logits each of which comes from a fit without the row's prompt."""
    names, index = np.unique(prompt, return_inverse=True)
    part = np.empty(len(names), dtype=int)
    part[permutation(len(names), "prompt matching folds", seed)] = np.arange(len(names)) % FOLDS
    fold, logit = part[index], np.empty(len(features))
    for k in range(FOLDS):
        inside, outside = fold == k, fold != k
        if not 0 < desirable[outside].sum() < outside.sum():
            return float("nan")
        w, b = fit_balanced_logistic(torch.from_numpy(features[outside]), torch.from_numpy(desirable[outside]))
        logit[inside] = features[inside] @ w.numpy() + b
    return auc(logit, desirable)


# Files


def match_file(
    source: str | Path,
    out: str | Path,
    *,
    model: str | Path | None = None,
    sample: int = 1024,
    low: float = 0.5,
    high: float = 10.0,
    score_threshold: float | None = None,
    seed: int = 0,
    overwrite: bool = False,
    only_check: bool = False,
) -> dict[str, Any]:
    """Write the rows of a file with the column `udm_weight`, and a receipt beside it; return the receipt.

    Every other column stays as it is. A row that is up has weight 1; a pair has the weight of its rejected side.

    Args:
        source: JSONL, CSV or Parquet, in the forms of `align.preferences`.
        out: of the same format.
        model: folder of a transformers model whose mean hidden states embed the prompts; bags of words when None.
        sample, low, high, seed: see `match_prompts`.
        score_threshold: see `PreferenceSet.require_labels`.
        overwrite: replace `out`.
        only_check: read and check the file, and return its counts; write nothing.

    Raises:
        DataError: rows that cannot be read, have no label or prompt, or are of one class; another format; `out` exists.
        ModelError: `model` is no folder of a transformers model.
    """
    source, out = Path(source), Path(out)
    table, completions, owners = _read(source, out, score_threshold, overwrite)
    if not 0 < low <= 1 <= high < float("inf"):
        raise ConfigError("The bounds of the weights lie on both sides of 1", why=f"got {low:g} and {high:g}")
    numbers: dict[str, int] = {}
    prompt = np.array([numbers.setdefault(prompt_key(row), len(numbers)) for row in completions])
    desirable = np.array([bool(row.label) for row in completions])
    counts = {
        "file": str(out), "source": str(source), "rows": len(table), "up": int(desirable.sum()),
        "down": int((~desirable).sum()), "prompts": len(numbers),
        "fitted_on": {"up": min(sample, int(desirable.sum())), "down": min(sample, int((~desirable).sum()))},
        "embedding": f"words, {WORDS} dimensions" if model is None else str(model), "seed": seed, "low": low,
        "high": high,
    }  # fmt: skip
    if only_check:
        return counts
    _, first = np.unique(prompt, return_index=True)
    texts = [_as_text(completions[i].prompt) for i in first]
    unit = embed_words(texts) if model is None else embed_with_model(texts, model)
    features, centre, scale = _standardised(unit, prompt)
    found = match_prompts(features, desirable, sample=sample, low=low, high=high, seed=seed, prompt=prompt)
    weights = np.ones(len(table))
    weights[owners] = found.weights  # of a pair the rejected side, which comes second
    down = found.weights[~desirable]
    receipt = {**counts, "mean_weight": float(down.mean()), **found.describe()}
    # The classifier as it stands in the receipt takes embeddings of unit length: p = sigmoid(w . x + b).
    receipt["coefficients"] = (found.coefficients / scale).tolist()
    receipt["intercept"] = found.intercept - float(centre @ found.coefficients) / scale
    table.write(weights, out, overwrite)
    beside = out.with_name(f"{out.name}.matching.json")
    beside.write_text(json.dumps(receipt, indent=1) + "\n", encoding="utf-8")
    return {**receipt, "receipt": str(beside)}


def _read(
    source: Path, out: Path, score_threshold: float | None, overwrite: bool
) -> tuple[_Table, Sequence[Completion], np.ndarray]:
    """Return the table of a file, its labelled completions and the row each stands in."""
    if source.is_dir():
        raise DataError(
            "Matching takes a file, and this is a folder", where=str(source),
            do="Write it as one, e.g. with Dataset.to_parquet",
        )  # fmt: skip
    if out.suffix.lower() != source.suffix.lower():
        raise DataError(
            "Matching adds a column to a file and keeps its format", where=str(out),
            why=f"{source.name} is {source.suffix}", do=f"Name a {source.suffix} file",
        )  # fmt: skip
    if out.exists() and not overwrite:
        raise DataError("There is a file already", where=str(out), do="Name another, or add --overwrite")
    table = _Table.read(source)
    made: list[Completion] = []
    owners: list[int] = []
    for i, (place, row) in enumerate(table.rows):
        plain = {k: v for k, v in row.items() if k != COLUMN} if isinstance(row, Mapping) else row
        found = parse_row(plain, f"{source}, {place}", i)
        made += found
        owners += [i] * len(found)
    if not made:
        raise DataError("There is no row", where=str(source), why="it is empty")
    rows = PreferenceSet(tuple(made), str(source)).require_labels(threshold=score_threshold).require_both_classes()
    for row in rows.rows:
        if not row.prompt:
            raise DataError(
                "A row has no prompt to match", where=f"{row.place}, field 'prompt'",
                do="Give every row its prompt, or train without matching",
            )  # fmt: skip
    return table, rows.rows, np.array(owners)


@dataclass(frozen=True)
class _Table:
    """A file's rows with their places; of Parquet also the table, whose types writing keeps."""

    rows: list[tuple[str, Any]]
    arrow: Any = None

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def read(cls, path: Path) -> _Table:
        rows = list(read_rows(path))
        if path.suffix.lower() != ".parquet":
            return cls(rows)
        from pyarrow import parquet

        return cls(rows, parquet.read_table(path))

    def write(self, weights: np.ndarray, path: Path, overwrite: bool) -> None:
        values = weights.tolist()
        if self.arrow is None:
            write_table(
                path, ({**row, COLUMN: w} for (_, row), w in zip(self.rows, values, strict=True)), overwrite=overwrite
            )
            return
        import pyarrow
        from pyarrow import parquet

        table = self.arrow.drop_columns([COLUMN]) if COLUMN in self.arrow.column_names else self.arrow
        partial = path.with_name(f".{path.name}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            parquet.write_table(table.append_column(COLUMN, pyarrow.array(values)), partial)
            partial.replace(path)
        except OSError as error:
            raise DataError("A file cannot be written", where=str(path), why=error.strerror or str(error)) from error


def _standardised(unit: np.ndarray, prompt: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Return the rows' features less their mean and over their mean length, with both: the classifier's penalty then
    weighs the same whether embeddings fill the sphere or a narrow cone of it."""
    rows = unit[prompt]
    centre = rows.mean(0)
    scale = float(np.sqrt(np.square(rows - centre).sum(1).mean())) or 1.0
    return (rows - centre) / scale, centre, scale


def _as_text(prompt: Any) -> str:
    """Return a prompt as text: of a chat what each message says, parts that are no text left out."""
    if isinstance(prompt, str):
        return prompt
    said = [message.get("content") or "" for message in prompt]
    parts = [[{"text": content}] if isinstance(content, str) else content for content in said]
    return "\n".join(str(part["text"]) for content in parts for part in content if part.get("text"))
