"""One directory is one step: written whole or not at all, verified before it is read.

    checkpoints/step_000010/
      <group>.safetensors   tensors, one file a group (model, optimizer, ...)
      <group>.<rank>.safetensors   the same where no process has whole tensors: of each, the piece of that process
      state.json            everything that is not a tensor
      manifest.json         sha256 and size of every other file; written last

A checkpoint is written under a temporary name, every file is flushed to disk, the manifest is written
last, and only then the directory is renamed. A kill at any moment leaves either the whole checkpoint or
a temporary directory that nothing reads and the next save removes. A step that is written again is set
aside until the new one stands, and comes back if it never does.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import AlignError, CheckpointError, ConfigError, first_line

if TYPE_CHECKING:
    from torch import Tensor

    from align.launch import World

_NAME = re.compile(r"step_(\d{6,})")


@dataclass(frozen=True)
class Checkpoint:
    """What a verified checkpoint holds: the step, tensors by group and name, and the JSON state."""

    step: int
    tensors: dict[str, Mapping[str, Tensor]]
    state: dict[str, Any]


@dataclass(frozen=True)
class Piece:
    """What a process holds of a tensor of this shape: its values from `first` on, counted row by row.

    Args:
        alike: every process holds the same, of which the first one's is saved.
    """

    values: Tensor
    first: int
    shape: tuple[int, ...]
    alike: bool = False

    def of(self, whole: Tensor) -> Tensor:
        """Return the same piece of another tensor of this shape."""
        return whole.reshape(-1)[self.first : self.first + self.values.numel()].view_as(self.values)


class _Joined(Mapping[str, "Tensor"]):
    """Tensors that lie in pieces over files; one is put together when it is asked for."""

    def __init__(self, files: list[Path]) -> None:
        self._pieces: dict[str, list[tuple[Path, int]]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in files:
            for name, (first, *shape) in pieces_in(path).items():
                self._pieces.setdefault(name, []).append((path, first))
                self.shapes[name] = tuple(shape)

    def __getitem__(self, name: str) -> Tensor:
        import torch
        from safetensors import safe_open

        parts, at = [], 0
        for path, first in sorted(self._pieces[name], key=lambda piece: piece[1]):
            with safe_open(path, "pt") as file:
                part = file.get_tensor(name)
            if first != at:
                raise _not_whole(path, name)
            parts, at = [*parts, part], at + part.numel()
        if at != math.prod(self.shapes[name]):
            raise _not_whole(path, name)
        return torch.cat(parts).view(self.shapes[name])

    def __contains__(self, name: object) -> bool:
        return name in self._pieces

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)


def shape_of(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """Return the shape of one of a checkpoint's tensors, without putting it together."""
    return tensors.shapes[name] if isinstance(tensors, _Joined) else tuple(tensors[name].shape)


def _not_whole(path: Path, name: str) -> CheckpointError:
    return CheckpointError(
        "The pieces of a tensor leave gaps or overlap", where=f"{path}, {name}",
        do="Remove this checkpoint; the run then goes on from the one before",
    )  # fmt: skip


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkpoints(root: str | Path) -> dict[int, Path]:
    """Return the checkpoints under `root` by step, oldest first."""
    found = {}
    for path in Path(root).iterdir() if Path(root).is_dir() else ():
        if (match := _NAME.fullmatch(path.name)) and path.is_dir():
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def save(
    root: str | Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep: int = 2
) -> Path:
    """Write the checkpoint of `step` and remove all but the newest `keep`.

    Raises:
        CheckpointError: too little space, or the disk refused; earlier checkpoints are untouched.
    """
    root = Path(root)
    final, temporary = _places(root, step)
    with _or_refused(final, temporary):
        _begin(final, temporary, sum(t.nbytes for named in tensors.values() for t in named.values()))
        for group, named in tensors.items():
            _write(temporary / f"{group}.safetensors", named)
        _seal(temporary, final, step, state)
    _rotate(root, keep)
    return final


def save_pieces(
    root: str | Path,
    step: int,
    pieces: Mapping[str, Mapping[str, Piece]],
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    *,
    world: World,
    keep: int = 2,
) -> None:
    """Write the checkpoint of `step` together; see `save`. Every process must call it.

    Each process writes its pieces. When all have, the first one writes the rest, the manifest last.

    Args:
        pieces: of this process, by group and name; those of all make up whole tensors.
        tensors: what every process has whole.

    Raises:
        CheckpointError: on all processes, what one met with; see `align.launch.World.each`.
    """
    root = Path(root)
    final, temporary = _places(root, step)
    own = sum(piece.values.nbytes for named in pieces.values() for piece in named.values())
    needed = sum(world.gather(own)) + sum(t.nbytes for named in tensors.values() for t in named.values())

    def begin() -> None:
        with _or_refused(final, temporary):
            _begin(final, temporary, needed)

    def finish() -> None:
        with _or_refused(final, temporary):
            for group, named in tensors.items():
                _write(temporary / f"{group}.safetensors", named)
            _seal(temporary, final, step, state)
        _rotate(root, keep)

    def write() -> None:
        with _or_refused(final, None):
            for group, named in pieces.items():
                mine = {n: p for n, p in named.items() if _is_kept(p, world)}
                placed = {name: [piece.first, *piece.shape] for name, piece in mine.items()}
                held = {name: piece.values.reshape(-1) for name, piece in mine.items()}
                _write(temporary / f"{group}.{world.rank:05d}.safetensors", held, {"pieces": json.dumps(placed)})

    world.led(begin)
    try:
        world.each(write)
    except AlignError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    world.led(finish)


def _is_kept(piece: Piece, world: World) -> bool:
    """Whether this process saves a piece: the first one what all hold alike, and tensors without a value."""
    whole = piece.alike or math.prod(piece.shape) == 0
    return world.leads if whole else piece.values.numel() > 0


def _places(root: Path, step: int) -> tuple[Path, Path]:
    """Return where the checkpoint of a step goes, and where it is until it is whole."""
    return root / f"step_{step:06d}", root / f".writing_step_{step:06d}"


@contextlib.contextmanager
def _or_refused(final: Path, temporary: Path | None) -> Iterator[None]:
    """Remove what was written so far when the disk refuses, and say so; None where others write there still."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # of a device that fails torch raises the second
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            "A checkpoint could not be written", where=str(final),
            why=getattr(error, "strerror", None) or first_line(error),
            do="Earlier checkpoints are intact; free some space and resume",
        ) from error  # fmt: skip


def _begin(final: Path, temporary: Path, needed: int) -> None:
    """Make the folder of a checkpoint that takes `needed` bytes, and remove what unfinished ones left."""
    root = final.parent
    root.mkdir(parents=True, exist_ok=True)
    _bring_back(root)
    for leftover in root.glob(".*_step_*"):
        shutil.rmtree(leftover)
    _require_space(final, needed)
    temporary.mkdir()


def _write(path: Path, named: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    from safetensors.torch import save_file

    save_file({n: t.detach().to("cpu").contiguous() for n, t in named.items()}, path, metadata)


def _require_space(final: Path, needed: int) -> None:
    """Refuse to begin what the disk has no room for."""
    if needed > (free := shutil.disk_usage(final.parent).free):
        raise CheckpointError(
            "The disk has no room for a checkpoint", where=str(final),
            why=f"it takes {needed / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are free",
            do="Earlier checkpoints are intact; free some space and resume",
        )  # fmt: skip


def publish(root: str | Path, step: int, folder: str | Path, state: Mapping[str, Any], keep: int = 2) -> Path:
    """Make a folder that something else wrote, subfolders and all, the checkpoint of `step`; see `save`.

    Args:
        folder: on the same disk as `root`, as it is moved.

    Raises:
        CheckpointError: the disk refused; earlier checkpoints are untouched.
    """
    root, folder = Path(root), Path(folder)
    final, _ = _places(root, step)
    with _or_refused(final, folder):
        _bring_back(root)
        _seal(folder, final, step, state)
    _rotate(root, keep)
    return final


def _seal(temporary: Path, final: Path, step: int, state: Mapping[str, Any]) -> None:
    """Write the state and, last, the manifest; flush all to disk; and put the folder in its place."""
    (temporary / "state.json").write_text(json.dumps(dict(state), sort_keys=True), encoding="utf-8")
    files = {name: {"sha256": _sha256(temporary / name), "bytes": (temporary / name).stat().st_size}
             for name in _files(temporary)}  # fmt: skip
    manifest = {"format": 1, "step": step, "files": files}
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in temporary.rglob("*"):
        _sync(path)
    _sync(temporary)
    if final.exists():
        final.rename(final.parent / f".replaced_step_{step:06d}")
    temporary.rename(final)
    _sync(final.parent)


def _files(folder: Path) -> list[str]:
    """Return the name of everything in a folder that is no folder itself, links to folders among them."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_symlink() or not p.is_dir())


def _rotate(root: Path, keep: int) -> None:
    for old in list(checkpoints(root).values())[: -max(keep, 1)]:
        doomed = old.rename(root / f".removed_{old.name}")
        shutil.rmtree(doomed)
    for leftover in (*root.glob(".replaced_step_*"), *root.glob(".removed_step_*")):  # a kill left the latter
        shutil.rmtree(leftover)


def _bring_back(root: Path) -> None:
    """Restore a checkpoint that was set aside for a new one which was never finished."""
    for aside in root.glob(".replaced_step_*"):
        final = root / aside.name.removeprefix(".replaced_")
        if not final.exists():
            with contextlib.suppress(FileNotFoundError):  # another process of the run was first
                aside.rename(final)


def verify(path: str | Path) -> dict[str, Any]:
    """Check every file of a checkpoint against its manifest and return the manifest.

    Raises:
        CheckpointError: naming the file that is missing, foreign, truncated or changed.
    """
    path = Path(path)
    steps = {p.name: step for step, p in checkpoints(path.parent).items()}
    previous = [name for name, step in steps.items() if step < steps.get(path.name, 0)]
    advice = f"Remove {path}; the run then goes on from " + (previous[-1] if previous else "its beginning")

    def refuse(what: str, file: str, why: str = "") -> CheckpointError:
        return CheckpointError(what, where=str(path / file), why=why, do=advice)

    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        files = {name: (int(f["bytes"]), str(f["sha256"])) for name, f in manifest["files"].items()}
        step = int(manifest["step"])
    except FileNotFoundError as error:
        raise refuse(
            "This is not a whole checkpoint", "manifest.json", "the manifest, which is written last, is missing"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise refuse("A checkpoint's manifest cannot be read", "manifest.json", str(error)) from error
    if path.name != f"step_{step:06d}":
        raise refuse("A checkpoint was renamed", "manifest.json", f"it was written as step {step}")
    present = set(_files(path)) - {"manifest.json"}
    for name in sorted(present ^ set(files)):
        raise refuse("A checkpoint has a foreign file" if name in present else "A checkpoint lost a file", name)
    for name, (expected, sha256) in files.items():
        if (path / name).is_symlink() or not (path / name).is_file():
            raise refuse("A checkpoint file is no plain file", name, "a link may lead elsewhere once it was looked at")
        if (size := (path / name).stat().st_size) != expected:
            raise refuse("A checkpoint file has the wrong size", name, f"{size} bytes instead of {expected}")
        if _sha256(path / name) != sha256:
            raise refuse("A checkpoint file is corrupt", name, "its sha256 differs from the manifest")
    if (layout := manifest.get("format")) != 1:
        raise refuse("A checkpoint's manifest is of another version", "manifest.json", f"format {layout!r}, not 1")
    return manifest


def load(path: str | Path, only: str | None = None) -> Checkpoint:
    """Verify and read one checkpoint; with `only`, no other group of tensors than that.

    A tensor that lies in pieces is put together when it is asked for, whatever the number of processes that wrote it.
    """
    from safetensors.torch import load_file

    path = Path(path)
    manifest = verify(path)
    groups: dict[str, Mapping[str, Tensor]] = {}
    for group in sorted({p.name.partition(".")[0] for p in path.glob("*.safetensors")}):
        if only in (None, group):
            files = files_of(path, group)
            groups[group] = _Joined(files) if in_pieces(files) else load_file(files[0])
    return Checkpoint(manifest["step"], groups, json.loads((path / "state.json").read_text(encoding="utf-8")))


def latest(root: str | Path) -> Path | None:
    """Return the checkpoint with the highest step number, None where there is none."""
    _bring_back(Path(root))
    found = checkpoints(root)
    return found[max(found)] if found else None


def delivered_group(path: str | Path) -> str:
    """Return the group of a checkpoint that is delivered: the running average where there is one, else the weights."""
    return "average" if files_of(path, "average") else "model"


def files_of(path: str | Path, group: str) -> list[Path]:
    """Return the files of a group of tensors in a checkpoint: one, or one a process with its pieces."""
    return sorted(Path(path).glob(f"{group}.*safetensors"))


def in_pieces(files: Sequence[Path]) -> bool:
    """Whether files of `files_of` hold pieces of tensors."""
    return bool(re.fullmatch(r"[a-z_]+\.\d{5,}", files[0].stem)) and (files[0].parent / "manifest.json").is_file()


def pieces_in(path: Path) -> dict[str, list[int]]:
    """Return where the pieces in a file belong: by name, the first value's place and the shape of the whole tensor."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return dict(json.loads((file.metadata() or {}).get("pieces", "{}")))


def find_run(source: str | Path) -> tuple[Path, Path] | None:
    """Return the run folder and the checkpoint that `source` names, itself either; None where it is no run's.

    Raises:
        CheckpointError: a run without a checkpoint.
    """
    path = Path(source)
    if path.parent.name == "checkpoints" and (path.parent.parent / "config.yaml").is_file():
        return path.parent.parent, path
    if not (path / "run.json").is_file():
        return None
    found = latest(path / "checkpoints")
    if found is None:
        raise CheckpointError(
            "The run has no checkpoint yet", where=str(path), do="Let it reach checkpoint.every steps"
        )
    return path, found


def name_runs(folder: Path) -> str:
    """Return advice that names the runs within a folder, five at most; empty where there are none."""
    runs = sorted(str(found.parent) for found in folder.glob("*/config.yaml") if (found.parent / "run.json").is_file())
    more = f", or {len(runs) - 5} more" if len(runs) > 5 else ""
    return f"Give a run in it: {', '.join(runs[:5])}{more}" if runs else ""


def not_a_run(folder: str | Path, why: str) -> ConfigError:
    """Return the refusal of what was given for a run folder; it names the runs within, where there are some."""
    path = Path(folder)
    if not path.is_dir():
        why = "it is a file" if path.is_file() else "there is no such folder"
    advice = name_runs(path) or "Give a folder that `align train` made, such as runs/NAME"
    return ConfigError("This is not a run folder", where=str(folder), why=why, do=advice)


def load_latest(root: str | Path) -> Checkpoint | None:
    """Read the checkpoint with the highest step number, None where there is none."""
    found = latest(root)
    return load(found) if found else None
