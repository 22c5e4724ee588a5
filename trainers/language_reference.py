"""The model before training, which the objectives compare with: run live, or its log-probs kept on disk."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from align.diffusion.digits_data import cache_directory
from align.errors import ModelError
from align.launch import World
from trainers.language_logps import Batch, TokenLogps, completion_logps, with_completion_logps
from trainers.language_model import resolve_language_model
from trainers.preference_data import Tokens


class Reference:
    """Log-probs under the model before training, without gradient.

    Args:
        mode: "lora_off" switches the adapters off, "copy" keeps a frozen copy, "precomputed" has none: see `LogpCache`.
        model: the model in training, not yet wrapped.
        copy: the copy of mode "copy", where it is made already and stands on its device; made of `model` when None.
        half: matrix products in bfloat16, as the Trainer has the policy's: it wraps the policy alone.
    """

    def __init__(self, mode: str, model: nn.Module, copy: nn.Module | None = None, *, half: bool = False) -> None:
        self.mode, self._model, self.half = mode, model, half
        self.copy, self._placed = copy, copy is not None
        if mode == "copy" and copy is None:
            self.copy = frozen_copy(model)

    @property
    def live(self) -> bool:
        """Whether the model before training can still be run once the policy has moved."""
        return self.copy is not None or hasattr(self._model, "disable_adapter")

    @contextlib.contextmanager
    def model(self) -> Iterator[nn.Module]:
        """Have the reference model within the block."""
        if self.copy is not None:
            if not self._placed:
                self.copy.to(next(self._model.parameters()).device)
            yield self.copy
        elif hasattr(self._model, "disable_adapter"):
            with self._model.disable_adapter():
                yield self._model
        else:
            yield self._model

    def logps(self, batch: Batch) -> TokenLogps:
        """Return the reference's log-probs."""
        device = batch["input_ids"].device
        half = torch.autocast(device.type, torch.bfloat16) if self.half else contextlib.nullcontext()
        with torch.no_grad(), half, self.model() as model:
            return completion_logps(model, batch)


def frozen_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model without adapters that does not train."""
    taught = model.__dict__.pop("forward", None)  # it holds on to the original's layers
    try:
        made = copy.deepcopy(model)
    finally:
        if taught is not None:
            model.forward = taught
    return with_completion_logps(made.requires_grad_(False).eval())


def reference_mode(mode: str, train: str) -> str:
    """Return what `auto` means: adapters off where there are adapters, else a copy.

    Raises:
        ModelError: adapters to be switched off of a model that has none.
    """
    if mode == "auto":
        return "lora_off" if train == "lora" else "copy"
    if mode == "lora_off" and train != "lora":
        raise ModelError("There are no adapters to switch off", where="reference.mode", do="Use copy or precomputed")
    return mode


class LogpCache:
    """Reference log-probs on disk, by what they are of: the model's files, and the tokens of prompt and completion.

    A folder per model holds shards of a few thousand rows, each written whole, so that an interrupted computation
    goes on where it stopped, and runs of any objective share what they have in common.

    Args:
        folder: where caches live; `reference/` in align's cache when None.
        model: folder of the model's files, or a hub name.
        dtype: precision of its matrix products.
    """

    SHARD = 2048

    def __init__(self, folder: str | Path | None, model: str, dtype: str) -> None:
        root = Path(folder) if folder is not None else cache_directory() / "reference"
        self.folder = root / model_digest(model, dtype)
        self.known: dict[bytes, float] = {}
        self.computed = 0

    def read(self) -> None:
        """Read every shard there is."""
        from safetensors.numpy import load_file

        for shard in sorted(self.folder.glob("*.safetensors")):
            found = load_file(shard)
            self.known.update(zip((key.tobytes() for key in found["key"]), found["logp"].tolist(), strict=True))

    def fill(
        self, tokens: Tokens, wanted: Sequence[tuple[int, int]], score: Callable[[Batch], Tensor], *, world: World,
        pad: int, batch: int = 16,
    ) -> None:  # fmt: skip
        """Compute what is missing, each process its share, and have all of it known to every process.

        Every process calls `score` as often as any other, which a sharded model needs.

        Args:
            tokens: the rows.
            wanted: (row of the prompt, row of the completion).
            score: log-probs `[B]` of a batch.
            world: the processes.
            pad: token id of padding.
            batch: rows at once, of like length.
        """
        self.read()
        keys = {tokens.digest(*pair): pair for pair in wanted}
        unknown = [(key, pair) for key, pair in sorted(keys.items()) if key not in self.known]
        missing = world.gather(unknown)[0]  # one list: another run may have written between two processes' reads
        mine = [missing[i] for i in world.share(len(missing))]
        for start in range(0, len(mine), self.SHARD):
            shard = sorted(mine[start : start + self.SHARD], key=lambda item: self._length(tokens, item[1]))
            values: list[float] = []
            for i in range(0, len(shard), batch):
                rows = tokens.batch([pair for _, pair in shard[i : i + batch]], pad)
                values += score(rows).double().tolist()
            self._write([key for key, _ in shard], values)
        most = -(-len(missing) // world.size)  # rows of the process that has most
        for _ in range(-(-most // batch) + (-len(mine) // batch)):
            score(tokens.batch([missing[0][1]], pad))
        self.computed += len(missing)
        world.wait()
        self.read()

    @staticmethod
    def _length(tokens: Tokens, pair: tuple[int, int]) -> int:
        return len(tokens.prompts[pair[0]]) + len(tokens.completions[pair[1]])

    def _write(self, keys: Sequence[bytes], values: Sequence[float]) -> None:
        from safetensors.numpy import save_file

        self.folder.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(b"".join(keys)).hexdigest()[:24]
        with tempfile.TemporaryDirectory(prefix=".writing_", dir=self.folder) as temporary:
            path = Path(temporary) / "shard.safetensors"
            table = np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(len(keys), 16).copy()
            save_file({"key": table, "logp": np.array(values, dtype=np.float64)}, path)
            path.replace(self.folder / f"{name}.safetensors")

    def lookup(self, tokens: Tokens, pairs: Sequence[tuple[int, int]]) -> Tensor:
        """Return the log-probs of (row of the prompt, row of the completion) pairs, float32 `[B]`."""
        return torch.tensor([self.known[tokens.digest(*pair)] for pair in pairs], dtype=torch.float32)


def model_digest(model: str, dtype: str) -> str:
    """Return 24 hex digits that name a model by its files' content, and the precision it runs at.

    A model of the hub is named by the files of the revision that is here, or by its name before it is.
    """
    from huggingface_hub import try_to_load_from_cache

    folder = Path(resolve_language_model(model))
    if not folder.is_dir():
        cached = try_to_load_from_cache(model, "config.json")
        folder = Path(cached).parent if isinstance(cached, str) else folder
    digest = hashlib.sha256(json.dumps([dtype, "" if folder.is_dir() else model]).encode())
    weights = (".safetensors", ".bin")
    files = [f for f in folder.iterdir() if f.name == "config.json" or f.suffix in weights] if folder.is_dir() else []
    for file in sorted(files):
        with file.open("rb") as handle:
            digest.update(file.name.encode() + hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()[:24]
