"""What a run writes down: metrics.jsonl always, TensorBoard as a mirror, sample grids, and the line a terminal shows.

Every file is readable at every moment: a line is on disk before the next step begins, a document is
replaced as a whole, and a line torn by a crash is dropped when the run goes on.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TextIO

from align.errors import ConfigError, DataError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL.Image import Image

Level = Literal["note", "warning", "alarm"]

LOGS = ("metrics.jsonl", "evaluation.jsonl", "generations.jsonl", "warnings.jsonl")
"""Files of a run folder that grow by a line with a step."""


class RunLog:
    """The files of one run folder that grow with the run.

    Args:
        directory: the run folder; made when missing.
        tensorboard: mirror the numbers of `metrics` and `evaluation` to `directory/tensorboard`.
        silent: write nothing; for the processes of a run that do not lead it.

    Raises:
        ConfigError: TensorBoard was asked for and is not installed.
    """

    def __init__(self, directory: str | Path, *, tensorboard: bool = False, silent: bool = False) -> None:
        self.directory, self.silent = Path(directory), silent
        self.directory.mkdir(parents=True, exist_ok=True)
        self._writer_type = _tensorboard_writer() if tensorboard and not silent else None
        self._writer: Any = None

    def metrics(self, row: Mapping[str, Any]) -> None:
        """Append one flat object to metrics.jsonl; NaN and infinity become null.

        Raises:
            DataError: no "step", or a value that is not a number, text or null.
        """
        for key, value in row.items():
            if isinstance(value, (Mapping, list, tuple)):
                raise DataError("A metrics row is flat", where=key, why=f"found a {type(value).__name__}")
        self._append("metrics.jsonl", row)
        self._mirror(row)

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """Append one held-out evaluation to evaluation.jsonl, in place of an earlier one at the same step.

        A run that was killed before its first checkpoint, or after its last, measures that step again.
        """
        self._forget("evaluation.jsonl", lambda earlier: earlier.get("step") == row.get("step"))
        self._append("evaluation.jsonl", row)
        self._mirror(row, "evaluation/")

    def generations(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append what a language model says at a step to generations.jsonl, in place of what stands there of it."""
        self._forget("generations.jsonl", lambda earlier: earlier.get("step") == step)
        for row in rows:
            self._append("generations.jsonl", {"step": step, **row})

    def warn(self, step: int, level: Level, code: str, message: str) -> None:
        """Append what a person should know to warnings.jsonl, once; `code` is a short fixed word such as "drift"."""
        row = {"step": step, "level": level, "code": code, "message": message}
        path = self.directory / "warnings.jsonl"
        if not path.is_file() or row not in read_jsonl(path)[0]:
            self._append("warnings.jsonl", row)

    def write_run(self, record: Mapping[str, Any]) -> None:
        """Replace run.json as a whole."""
        if self.silent:
            return
        text = json.dumps(_clean(record, "run.json"), indent=1, allow_nan=False, ensure_ascii=False)
        replace_text(self.directory / "run.json", text + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the rows of metrics.jsonl."""
        return read_jsonl(self.directory / "metrics.jsonl")[0]

    def truncate_after(self, step: int) -> None:
        """Forget everything logged after `step`, so that the steps a resumed run repeats stand once.

        A last line that a crash tore in half is dropped with them. Each file is replaced as a whole.

        Raises:
            DataError: a line that is not an object with a step, anywhere but at the end.
        """
        for name in () if self.silent else LOGS:
            path = self.directory / name
            if not path.is_file():
                continue
            text = path.read_text(encoding="utf-8", errors="replace")
            lines, kept = text.removesuffix("\n").split("\n"), []
            for number, line in enumerate(lines, start=1):
                row = _parse(line)
                if row is None or not isinstance(row.get("step"), int):
                    if number == len(lines):
                        break
                    raise DataError(
                        "A line of the run's log cannot be read",
                        where=f"{path}, line {number}",
                        why="it is not a JSON object with a step",
                        do="Mend or remove that line, then resume",
                    )
                if row["step"] <= step:
                    kept.append(line + "\n")
            if "".join(kept) != text:
                replace_text(path, "".join(kept))

    def _forget(self, name: str, outdated: Callable[[dict[str, Any]], bool]) -> None:
        """Drop the rows of a log that are outdated; the file is replaced as a whole."""
        path = self.directory / name
        if self.silent or not path.is_file():
            return
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        kept = [line for line in lines if (row := _parse(line)) is None or not outdated(row)]
        if len(kept) < len(lines):
            replace_text(path, "".join(kept))

    def close(self) -> None:
        """Flush the mirror, when there is one."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        if not isinstance(row.get("step"), int):
            raise DataError("A logged row needs its step", where=name, why=f"found {row.get('step')!r}")
        if self.silent:
            return
        line = json.dumps(_clean(row, name), allow_nan=False, ensure_ascii=False) + "\n"
        with _writing(self.directory / name), (self.directory / name).open("a+b") as file:
            _drop_torn_tail(file)
            file.write(line.encode("utf-8", errors="replace"))
            file.flush()
            os.fsync(file.fileno())

    def _mirror(self, row: Mapping[str, Any], prefix: str = "") -> None:
        if self._writer_type is None:
            return
        step = int(row["step"])
        if self._writer is None:
            self._writer = self._writer_type(log_dir=str(self.directory / "tensorboard"), purge_step=step)
        for key, value in _numbers(row, prefix):
            if key.rpartition("/")[2] != "step":
                self._writer.add_scalar(key, value, step)
        self._writer.flush()


def read_jsonl(path: str | Path) -> tuple[list[dict[str, Any]], int]:
    """Return the objects of a JSON-lines file and how many lines could not be read; ([], 0) when there is no file."""
    path = Path(path)
    if not path.is_file():
        return [], 0
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if line.strip()]
    rows = [row for row in map(_parse, lines) if row is not None]
    return rows, len(lines) - len(rows)


def _parse(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _drop_torn_tail(file: Any) -> None:
    """Make an append safe after a crash: end the last line when it is whole, else cut it off."""
    size = file.seek(0, os.SEEK_END)
    if not size or (file.seek(-1, os.SEEK_END), file.read(1))[1] == b"\n":
        return
    file.seek(0)
    before, newline, tail = file.read().rpartition(b"\n")
    if _parse(tail.decode("utf-8", errors="replace")) is not None:
        file.write(b"\n")
    else:
        file.truncate(len(before) + len(newline))


def _clean(value: Any, where: str) -> Any:
    """Return `value` as JSON-ready data: 0-d arrays and tensors as numbers, what is not finite as None."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _clean(part, f"{where}: {key}") for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(part, where) for part in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        return _clean(value.item(), where)
    raise DataError("A value cannot be logged", where=where, why=f"a {type(value).__name__} is no number or text")


def _numbers(row: Mapping[str, Any], prefix: str) -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for key, value in _clean(row, "tensorboard").items():
        if isinstance(value, dict):
            found += _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)):
            found.append((prefix + key, float(value)))
    return found


def replace_text(path: Path, text: str) -> None:
    """Write `text` beside `path`, flush it to disk, and put it in place in one move."""
    temporary = path.with_name(path.name + ".writing")
    with _writing(path):
        with temporary.open("w", encoding="utf-8", errors="replace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            "A file of the run could not be written", where=str(path), why=error.strerror or str(error),
            do="Earlier checkpoints are intact; free some space and resume",
        ) from error  # fmt: skip


def _tensorboard_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as missing:
        raise ConfigError(
            "TensorBoard is not installed",
            where="tracking.tensorboard",
            do="Run `pip install tensorboard`, or set tracking.tensorboard=false; metrics.jsonl is written either way",
        ) from missing
    return SummaryWriter


# Sample grids


def save_image(path: str | Path, image: torch.Tensor | np.ndarray) -> None:
    """Write one image `[C, H, W]` in [0, 1] as a PNG file."""
    _save_png(Path(path), _to_pil(image))


def save_grid(
    path: str | Path,
    images: torch.Tensor | np.ndarray,
    *,
    columns: int,
    scale: int | None = None,
    labels: Sequence[str] | None = None,
    longest: int = 256,
) -> None:
    """Write a contact sheet of `images` `[B, C, H, W]` in [0, 1], filled row by row.

    The PNG carries its own geometry as text under the key "align.grid", so that a report can cut the
    labels off and set them in type.

    Args:
        path: the PNG file, replaced as a whole.
        columns: images in a row.
        scale: whole-number enlargement without smoothing; None brings small images to 64 pixels or
            more and reduces large ones to `longest`.
        labels: one text a row, set at its left.

    Raises:
        DataError: images that are not 1- or 3-channel, or another number of labels than of rows.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    if len(getattr(images, "shape", ())) != 4 or not len(images) or columns < 1:
        raise DataError("A grid needs images [B, C, H, W] and a column or more", where=str(path))
    tiles = [_resize(_to_pil(image), scale, longest) for image in images]
    rows, gap, (width, height) = math.ceil(len(tiles) / columns), 2, tiles[0].size
    if labels is not None and len(labels) != rows:
        raise DataError("A grid needs one label a row", where=str(path), why=f"{len(labels)} labels, {rows} rows")
    left = 150 if labels else 0
    size = (left + columns * (width + gap) + gap, rows * (height + gap) + gap)
    sheet = Image.new("RGB", size, "white")
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (left + gap + i % columns * (width + gap), gap + i // columns * (height + gap)))
    for row, label in enumerate(labels or ()):
        _label(sheet, label, (8, gap + row * (height + gap)), (left - 16, height))
    info = PngInfo()
    info.add_text("align.grid", json.dumps({"left": left, "columns": columns, "rows": rows, "count": len(tiles)}))
    _save_png(Path(path), sheet, info)


def _to_pil(image: torch.Tensor | np.ndarray) -> Image:
    import numpy as np
    from PIL import Image

    array = np.asarray(image.detach().float().cpu() if hasattr(image, "detach") else image, dtype=np.float32)
    if array.ndim != 3 or array.shape[0] not in (1, 3):
        raise DataError("An image is [C, H, W] with 1 or 3 channels", why=f"got {array.shape}")
    pixels = (np.nan_to_num(array).clip(0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(np.broadcast_to(pixels, (3, *pixels.shape[1:])).transpose(1, 2, 0).copy())


def _resize(image: Image, scale: int | None, most: int) -> Image:
    from PIL import Image as pil

    longest = max(image.size)
    factor = scale or max(1, math.ceil(64 / longest))
    if factor > 1:
        return image.resize((image.width * factor, image.height * factor), pil.Resampling.NEAREST)
    if scale is None and longest > most:
        image = image.copy()
        image.thumbnail((most, most), pil.Resampling.LANCZOS)
    return image


def _label(sheet: Image, text: str, at: tuple[int, int], box: tuple[int, int]) -> None:
    """Set `text` in the box of `box` pixels at `at`, wrapped, centred in height, cut with an ellipsis."""
    from PIL import ImageDraw, ImageFont

    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if draw.textlength(joined, font) <= box[0] or not lines[-1]:
            lines[-1] = joined
        else:
            lines.append(word)
    room = max(1, box[1] // 15)
    if len(lines) > room:
        lines = [*lines[: room - 1], lines[room - 1] + " ..."]
    for i, line in enumerate(lines):
        while line and draw.textlength(line, font) > box[0] + 6:
            line = line[:-1]
        draw.text((at[0], at[1] + (box[1] - 15 * len(lines)) // 2 + 15 * i), line, fill="#333", font=font)


def _save_png(path: Path, image: Image, info: Any = None) -> None:
    temporary = path.with_name(path.name + ".writing")
    image.save(temporary, format="PNG", pnginfo=info)
    temporary.replace(path)


# The progress line

PLAIN_SECONDS = 10.0
"""Between lines on what is no terminal, such as a log file."""


class Progress:
    """Say where a run stands: one line that renews itself on a terminal; elsewhere, lines of the first and the last
    step, and of others `PLAIN_SECONDS` apart.

        step 12/60  reward -0.412 ±0.050  valid 100%  ratio-1 0.0e+00  clip 3.1%  F_eq 3.9k  2.1 s/step  ETA 1m42s

    Args:
        total: steps of the whole run.
        initial: steps already done when this sitting began.
        stream: where to write, stderr when None.
        silent: write nothing.
    """

    def __init__(self, total: int, *, initial: int = 0, stream: TextIO | None = None, silent: bool = False) -> None:
        self.total, self.initial, self.silent = total, initial, silent
        self.stream = sys.stderr if stream is None else stream
        self._live = self.stream.isatty()
        self._open = False
        self._began = time.perf_counter()
        self._written = -math.inf

    def __enter__(self) -> Self:
        self._began = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._open:
            self.stream.write("\n")
            self.stream.flush()
            self._open = False

    def say(self, message: str) -> None:
        """Write a line of its own, above the one that renews itself."""
        if not self.silent:
            self.stream.write(("\r\x1b[K" if self._live else "") + message + "\n")
            self.stream.flush()

    def update(self, row: Mapping[str, Any]) -> None:
        """Show the metrics of a finished step; what a row does not hold is left out."""
        step, now = int(row["step"]), time.perf_counter()
        if self.silent or not (self._live or step == self.total or now - self._written >= PLAIN_SECONDS):
            return
        self._written = now
        seconds = (now - self._began) / max(1, step - self.initial)
        line = progress_line(row, self.total, seconds)
        if self._live:
            line = line[: max(20, shutil.get_terminal_size().columns - 1)]
            self.stream.write(f"\r{line}\x1b[K")
        else:
            self.stream.write(line + "\n")
        self._open = self._live
        self.stream.flush()


def counting(what: str, *, stream: TextIO | None = None, silent: bool = False) -> Callable[[int, int], None]:
    """Return what is told (done, total) of work beside the steps, and says so with an ETA: nothing of what takes less
    than `PLAIN_SECONDS`, then a line that often, renewed in place on a terminal."""
    out = sys.stderr if stream is None else stream
    began = written = time.perf_counter()
    shown = False

    def tell(done: int, total: int) -> None:
        nonlocal written, shown
        now, live = time.perf_counter(), out.isatty()
        if done >= total:
            out.write("\r\x1b[K" if shown and live else "")
        elif not silent and now - written >= PLAIN_SECONDS:
            written, shown = now, True
            line = f"{what}  {done:,} of {total:,}  ETA {short_time((now - began) / done * (total - done))}"
            out.write(f"\r{line}\x1b[K" if live else line + "\n")
        out.flush()

    return tell


def progress_line(row: Mapping[str, Any], total: int, seconds_per_step: float) -> str:
    """Return the progress line of a metrics row; its ETA is the steps left times `seconds_per_step`."""

    def number(name: str) -> float | None:
        value = row.get(name)
        return float(value) if value is not None and math.isfinite(value) else None

    parts = [f"step {row['step']}/{total}"]
    reward, low, high = number("reward"), number("reward_ci_low"), number("reward_ci_high")
    if reward is not None:
        parts.append(f"reward {reward:.3f}" + ("" if low is None or high is None else f" ±{(high - low) / 2:.3f}"))
    shown = {"loss": "loss", "rewards/margin": "margin", "auc": "AUC", "z0": "z0", "delta": "delta"}
    for name, label in shown.items():
        if reward is None and (value := number(name)) is not None:
            parts.append(f"{label} {value:.3f}")
    if (share := number("valid_share")) is not None:
        parts.append(f"valid {share:.0%}")
    if (error := number("first_ratio_error")) is not None:
        parts.append(f"ratio-1 {error:.1e}")
    sides = [s for s in (number("clip_share_low"), number("clip_share_high")) if s is not None]
    if sides:
        parts.append(f"clip {sum(sides):.1%}")
    if (feq := number("feq_total")) is not None:
        parts.append(f"F_eq {short_number(feq)}")
    parts += [f"{seconds_per_step:.3g} s/step", f"ETA {short_time((total - row['step']) * seconds_per_step)}"]
    return "  ".join(parts)


def short_number(value: float) -> str:
    """Return a count in at most three digits: 950, 3.9k, 212k, 1.2M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            scaled = value / size
            return f"{scaled:.1f}{unit}" if abs(scaled) < 9.95 else f"{scaled:.0f}{unit}"
    return f"{value:.0f}"


def short_time(seconds: float) -> str:
    """Return a duration as 42s, 1m42s, 2h05m or 3d04h."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"
