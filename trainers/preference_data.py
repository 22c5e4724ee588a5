"""From rows to microbatches: tokens that do not depend on the machine, a plan all processes share, tensors.

The plan of an epoch is made for the *global* microbatch and is a function of (seed, epoch) and the rows, so that R
processes of B rows train on what one process of R B rows would. Within it

    every microbatch has its share of both classes, give or take one row;
    microbatches are cut from windows sorted by length, so that little is padding;
    each row knows the row whose completion it lends its prompt to (KTO's mismatched pairs), a permutation of the
    microbatch with as few rows as possible lent a completion of their own prompt.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align.errors import DataError, first_line
from align.image_rows import text_parts
from align.preferences import Completion, PreferenceSet, prompt_key
from align.seeding import permutation
from trainers.language_images import Pictures, has_images, image_inputs, image_tokens

WINDOW = 32  # microbatches sorted by length together
CHUNK = 512  # rows a worker tokenises at once


@dataclass(frozen=True)
class Tokens:
    """Tokenised rows: N prompts and completions, and what the objectives need of each.

    Args:
        prompts, completions: token ids of each row, int64 arrays.
        label: float `[N]`, 1 up, 0 down, or a soft label; NaN for none.
        pair: int `[N]`, -1 for none.
        weight: float `[N]`.
        prompt: int `[N]`, the same number for rows of one prompt.
        place: where each row stands, for messages.
        dropped: how many rows were left out, by reason and class, such as "no completion left, up".
        truncated: share of the kept rows whose end was cut, by class.
        longest: tokens of a prompt and a completion at most.
        pictures: images of the rows, None where the model reads text alone.
    """

    prompts: list[np.ndarray]
    completions: list[np.ndarray]
    label: np.ndarray
    pair: np.ndarray
    weight: np.ndarray
    prompt: np.ndarray
    place: list[str]
    dropped: dict[str, int]
    truncated: dict[str, float]
    longest: int
    pictures: Pictures | None = None

    def __len__(self) -> int:
        return len(self.completions)

    @property
    def length(self) -> np.ndarray:
        """Tokens of each row, `[N]`."""
        return np.array([len(p) + len(c) for p, c in zip(self.prompts, self.completions, strict=True)], dtype=np.int64)

    @property
    def desirable(self) -> np.ndarray:
        """Whether each row is a thumb up, `[N]`."""
        return self.label > 0.5

    def sequence(self, prompt: int, completion: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the prompt of one row and the completion of another, cut to the longest sequence."""
        tokens = self.prompts[prompt]
        return tokens, self.completions[completion][: max(1, self.longest - len(tokens))]

    def digest(self, prompt: int, completion: int) -> bytes:
        """Return 16 bytes that name a `sequence`."""
        parts = self.sequence(prompt, completion)
        text = b"|".join(part.astype("<i8").tobytes() for part in parts)
        if self.pictures is not None:
            text += self.pictures.digest(prompt)
        return hashlib.blake2b(text, digest_size=16).digest()

    def batch(self, pairs: Sequence[tuple[int, int]], pad: int) -> dict[str, Any]:
        """Return the batch of `collate` of some (row of the prompt, row of the completion), images read from disk."""
        found = collate([self.sequence(*pair) for pair in pairs], pad)
        return found if self.pictures is None else self.pictures.added(found, [prompt for prompt, _ in pairs])


def tokenise(
    rows: PreferenceSet,
    tokenizer: Any,
    *,
    max_length: int,
    max_prompt_length: int | None = None,
    workers: int = 1,
    reload: Callable[[], Any] | None = None,
    soft: bool = False,
) -> Tokens:
    """Tokenise prompts and completions apart, so that a completion's tokens do not depend on its prompt's.

    Text gets the tokenizer's own beginning and an end-of-sequence token; a chat what its template writes. Prompts
    are cut at their beginning, the whole at its end. A row of which no completion is left is dropped and counted;
    with it the other of its pair. So is a row with images whose prompt is too long: images are never cut. The result
    is the same, bit for bit, for any number of `workers`.

    Args:
        rows: labelled or not.
        tokenizer: of transformers, fast or slow; or the processor of a vision-language model.
        max_length, max_prompt_length: in tokens.
        workers: processes.
        reload: makes the tokenizer in a worker; needed for more than one.
        soft: take scores as labels.

    Raises:
        DataError: a chat that the template refuses, an image that cannot be read, or no row is left.
    """
    parts = [rows.rows[i : i + CHUNK] for i in range(0, len(rows), CHUNK)]
    found: list[tuple[list[int], list[int]]] = []
    if workers == 1 or len(parts) == 1:
        for part in parts:
            found += encode(part, tokenizer)
    else:
        with ProcessPoolExecutor(
            min(workers, len(parts)), get_context("spawn"), initializer=_start_worker, initargs=(reload,)
        ) as pool:
            for part_found in pool.map(_encode_in_worker, parts):
                found += part_found
    return _collect(rows, found, max_length, max_prompt_length, soft, tokenizer)


_WORKER: dict[str, Any] = {}


def _start_worker(reload: Callable[[], Any]) -> None:
    _WORKER["tokenizer"] = reload()


def _encode_in_worker(rows: Sequence[Completion]) -> list[tuple[list[int], list[int]]]:
    return encode(rows, _WORKER["tokenizer"])


def encode(rows: Sequence[Completion], tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """Return the (prompt, completion) token ids of each row, whole, images expanded.

    Raises:
        DataError: a chat that the template refuses, or images that the model or its processor does.
    """
    texts = [_as_text(row, tokenizer) for row in rows]
    processor, tokenizer = tokenizer, tokenizer.tokenizer if has_images(tokenizer) else tokenizer
    end = tokenizer.eos_token_id
    prompts: list[list[int]] = []
    for row, (prompt, _) in zip(rows, texts, strict=True):  # a template writes its own beginning of sequence
        if row.images and prompt:
            prompts.append(image_inputs(row.images, prompt, processor, row.place)["input_ids"][0].tolist())
            continue
        prompts.append(tokenizer(prompt, add_special_tokens=isinstance(row.prompt, str))["input_ids"] if prompt else [])
    completions = list(tokenizer([c for _, c in texts], add_special_tokens=False)["input_ids"])
    result = []
    for row, prompt, completion in zip(rows, prompts, completions, strict=True):
        if isinstance(row.prompt, str) and prompt and prompt[-1] == end:
            prompt = prompt[:-1]
        if isinstance(row.completion, str) and completion and completion[-1] != end and end is not None:
            completion = [*completion, end]
        if not prompt and completion:  # the first token has nothing to be predicted from
            start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else end
            prompt, completion = ([start], completion) if start is not None else (completion[:1], completion[1:])
        result.append((list(prompt), list(completion)))
    if has_images(processor):
        _require_text(rows, result, image_tokens(processor))
    return result


def _require_text(rows: Sequence[Completion], found: Sequence[tuple[list[int], list[int]]], tokens: set[int]) -> None:
    """Refuse text that spells the token of an image where there is none."""
    for row, (prompt, completion) in zip(rows, found, strict=True):
        if not tokens.isdisjoint(completion if row.images else [*prompt, *completion]):
            raise DataError(
                "A text holds the model's token for an image", where=row.place,
                why="found it in a completion or in a prompt without images", do="Take it out of the text",
            )  # fmt: skip


def _as_text(row: Completion, tokenizer: Any) -> tuple[str, str]:
    sees = has_images(tokenizer)
    if row.images and not sees:
        raise DataError(
            "A row has images, and the model reads text alone", where=row.place, do="Set model.path to a model of both"
        )
    if isinstance(row.prompt, str) and isinstance(row.completion, str):
        return row.prompt, row.completion
    prompt, completion = _messages(row.prompt, "user"), _messages(row.completion, "assistant")
    if not completion:
        return "", ""
    if sees:
        prompt, completion = ([{**m, "content": text_parts(m)} for m in part] for part in (prompt, completion))
    options = {**(dict(row.template) if row.template else {}), "tokenize": False}
    if row.tools:
        options["tools"] = [dict(tool) for tool in row.tools]
    import jinja2

    try:
        before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **options) if prompt else ""
        whole = tokenizer.apply_chat_template([*prompt, *completion], **options)
        if not whole.startswith(before):  # a template that opens a turn otherwise than it writes a finished one
            before = tokenizer.apply_chat_template(prompt, **options)
    except (jinja2.TemplateError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            "A chat does not fit the model's chat template", where=row.place, why=first_line(error),
            do="Check the roles and their order, or set model.chat_template",
        ) from error  # fmt: skip
    if not whole.startswith(before):
        raise DataError(
            "The chat template writes a prompt differently once it is answered", where=row.place,
            why="so it is not clear where the completion begins", do="Set model.chat_template to one that does not",
        )  # fmt: skip
    return before, whole[len(before) :]


def _messages(part: Any, role: str) -> list[dict[str, Any]]:
    if isinstance(part, str):
        return [{"role": role, "content": part}] if part else []
    return [dict(message) for message in part]


def _collect(
    rows: PreferenceSet,
    found: Sequence[tuple[list[int], list[int]]],
    longest: int,
    longest_prompt: int | None,
    soft: bool,
    processor: Any,
) -> Tokens:
    kept, cut, dropped = [], [], Counter()
    bad_pairs = set()
    for row, (prompt, completion) in zip(rows.rows, found, strict=True):
        long = bool(longest_prompt and len(prompt) > longest_prompt)
        prompt = prompt[-longest_prompt:] if longest_prompt else prompt
        room = max(0, longest - len(prompt))
        if not completion or room == 0 or (long and row.images):
            side = {True: "up", False: "down", None: "unlabelled"}[row.label]
            reason = "images would be cut" if completion and row.images else "no completion left"
            dropped[f"{reason if completion else 'empty completion'}, {side}"] += 1
            bad_pairs.add(row.pair)
            continue
        kept.append((row, prompt, completion[:room]))
        cut.append(len(completion) > room)
    partners = bad_pairs - {-1}
    if partners:
        lost = [row.pair in partners for row, _, _ in kept]
        dropped.update({"other of a dropped pair": sum(lost)} if any(lost) else {})
        kept = [item for item, gone in zip(kept, lost, strict=True) if not gone]
        cut = [item for item, gone in zip(cut, lost, strict=True) if not gone]
    if not kept:
        raise DataError(
            "No row is left", where=rows.source,
            why="; ".join(f"{k}: {v}" for k, v in dropped.items()) or "it is empty",
            do=f"Raise data.max_length, which is {longest}, or set data.max_prompt_length",
        )  # fmt: skip
    numbers: dict[str, int] = {}
    prompt = [numbers.setdefault(prompt_key(row), len(numbers)) for row, _, _ in kept]
    values = [_target(row, soft) for row, _, _ in kept]
    label, truncated = np.array(values, dtype=np.float64), np.array(cut)
    classes = {"up": label > 0.5, "down": label <= 0.5}
    return Tokens(
        prompts=[np.array(p, dtype=np.int64) for _, p, _ in kept],
        completions=[np.array(c, dtype=np.int64) for _, _, c in kept],
        label=label,
        pair=np.array([row.pair for row, _, _ in kept], dtype=np.int64),
        weight=np.array([row.weight for row, _, _ in kept], dtype=np.float64),
        prompt=np.array(prompt, dtype=np.int64),
        place=[row.place for row, _, _ in kept],
        dropped=dict(dropped),
        truncated={name: float(truncated[mask].mean()) for name, mask in classes.items() if mask.any()},
        longest=longest,
        pictures=_pictures([row for row, _, _ in kept], processor),
    )


def _pictures(rows: Sequence[Completion], processor: Any) -> Pictures | None:
    if not has_images(processor):
        return None
    texts = [_as_text(row, processor)[0] if row.images else "" for row in rows]
    return Pictures([row.images for row in rows], texts, [row.place for row in rows], processor)


def _target(row: Completion, soft: bool) -> float:
    if soft and row.score is not None:
        return row.score
    return float("nan") if row.label is None else float(row.label)


@dataclass(frozen=True)
class Plan:
    """The M microbatches of an epoch, G units each: rows, or the chosen rows of pairs.

    Args:
        rows: int `[M, G]`.
        partners: int `[M, G]`, the row whose completion goes with each row's prompt in KTO's second pass.
        left_out: units that fill no optimizer batch in this epoch.
        same_prompt: partners that share the row's prompt, where a microbatch left no choice.
        single_class: share of the microbatches that hold one class only.
    """

    rows: np.ndarray
    partners: np.ndarray
    left_out: int = 0
    same_prompt: int = 0
    single_class: float = 0.0


def plan_epoch(
    tokens: Tokens,
    *,
    microbatch: int,
    batch_size: int,
    seed: int,
    epoch: int,
    paired: bool = False,
    oversample: bool = False,
    fixed: bool = False,
) -> Plan:
    """Plan one epoch: a function of its arguments alone.

    Args:
        tokens: the rows.
        microbatch: G, rows at once over all processes.
        batch_size: rows of an optimizer step, a multiple of G; what fills none is left out of this epoch.
        seed, epoch: of every draw.
        paired: units are pairs.
        oversample: repeat rows of the smaller class until both are equal.
        fixed: keep the composition of epoch 0, what it leaves out included, and reshuffle only the order of its
            microbatches, as log-probs of mismatched pairs that were computed once require.

    Raises:
        DataError: fewer rows than an optimizer batch.
    """
    draw = 0 if fixed else epoch
    classes, length = _units(tokens, paired)
    if oversample:
        classes = _oversampled(classes, seed, draw)
    total = sum(map(len, classes))
    batches = total // batch_size
    if batches == 0:
        raise DataError(
            "There are fewer rows than one update takes", why=f"{total} rows, batch_size {batch_size}",
            do="Lower batch_size and microbatch, or add rows",
        )  # fmt: skip
    count = batches * batch_size // microbatch
    rows = stratify(classes, length, count, microbatch, seed, draw)
    partners = _partners(rows, tokens.prompt, seed, draw)
    if fixed and epoch:
        order = permutation(count, seed, epoch, "fixed microbatches")
        rows, partners = rows[order], partners[order]
    up = tokens.desirable[rows].sum(1)
    return Plan(
        rows, partners, total - batches * batch_size,
        int((tokens.prompt[rows] == tokens.prompt[partners]).sum()), float(((up == 0) | (up == microbatch)).mean()),
    )  # fmt: skip


def _units(tokens: Tokens, paired: bool) -> tuple[list[np.ndarray], np.ndarray]:
    """Return the units of each class, and the length of every row or of the longer one of its pair."""
    length = tokens.length
    if paired:
        chosen = np.flatnonzero((tokens.pair >= 0) & tokens.desirable)
        longer = length.copy()
        longer[chosen] = np.maximum(length[chosen], length[chosen + 1])
        return [chosen], longer
    groups = [np.flatnonzero(tokens.desirable), np.flatnonzero(~tokens.desirable)]
    return [group for group in groups if len(group)], length


def _oversampled(classes: list[np.ndarray], seed: int, epoch: int) -> list[np.ndarray]:
    most = max(map(len, classes))
    result = []
    for c, group in enumerate(classes):
        whole, rest = divmod(most, len(group))
        extra = group[permutation(len(group), seed, epoch, c, "oversample")[:rest]]
        result.append(np.concatenate([*[group] * whole, extra]))
    return result


def stratify(classes: list[np.ndarray], length: np.ndarray, count: int, size: int, seed: int, epoch: int) -> np.ndarray:
    """Deal rows to `count` microbatches of `size`: an even share of each class, rows of like length together.

    Args:
        classes: row numbers of one class or two; together at least `count size`.
        length: of every row.

    Returns:
        int `[count, size]`, a function of the arguments alone.
    """
    total = sum(map(len, classes))
    quotas = [len(classes[0]) * count * size // total]  # what is left out comes from both classes alike
    if len(classes) > 1:
        quotas[0] = min(max(quotas[0], count * size - len(classes[1])), len(classes[0]))
    quotas += [count * size - quotas[0]] if len(classes) > 1 else []
    shuffled = []
    for c, (group, quota) in enumerate(zip(classes, quotas, strict=True)):
        shuffled.append(group[permutation(len(group), seed, epoch, c, "rows")][:quota])
    edges = np.arange(count + 1)
    first = edges * quotas[0] // count
    cuts = [first] + ([edges * size - first] if len(classes) > 1 else [])
    made = []
    for start in range(0, count, WINDOW):
        stop = min(start + WINDOW, count)
        window = []
        for group, cut in zip(shuffled, cuts, strict=True):
            part = group[cut[start] : cut[stop]]
            window.append(part[np.argsort(length[part], kind="stable")])
        for m in range(start, stop):
            rows = np.concatenate([
                part[cut[m] - cut[start] : cut[m + 1] - cut[start]] for part, cut in zip(window, cuts, strict=True)
            ])  # fmt: skip
            made.append(rows[permutation(size, seed, epoch, m, "within")])
    return np.stack(made)[permutation(count, seed, epoch, "microbatches")]


def _partners(rows: np.ndarray, prompt: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Return a permutation of each microbatch (of several together, where they hold one row) that avoids one prompt.

    Rows stand sorted by prompt, the commonest prompt first; each takes the completion as many rows on as the
    commonest prompt has. That meets its own prompt only where a prompt has more than half of the rows.
    """
    count, size = rows.shape
    together = rows if size > 1 else rows.reshape(1, -1)
    found = np.empty_like(together)
    for m, group in enumerate(together):
        drawn = np.array(permutation(len(group), seed, epoch, m, "partners"))
        times = Counter(prompt[group].tolist())
        order = sorted(drawn.tolist(), key=lambda i: (-times[prompt[group[i]]], prompt[group[i]]))
        shift = max(times.values())
        found[m, order] = group[[order[(i + shift) % len(order)] for i in range(len(order))]]
    return found.reshape(count, size)


def collate(sequences: Iterable[tuple[np.ndarray, np.ndarray]], pad: int) -> dict[str, Tensor]:
    """Return `input_ids`, `attention_mask` and `labels` `[B, T]`, padded on the right.

    Labels are -100 outside completions.
    """
    pairs = list(sequences)
    width = max(len(p) + len(c) for p, c in pairs)
    ids = torch.full((len(pairs), width), pad)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for i, (prompt, completion) in enumerate(pairs):
        start, stop = len(prompt), len(prompt) + len(completion)
        ids[i, :start], ids[i, start:stop] = torch.from_numpy(prompt), torch.from_numpy(completion)
        labels[i, start:stop], mask[i, :stop] = ids[i, start:stop], 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
