"""Language models as the objectives see them: log-probs of completions, and the model before training.

Log-probs are worked out at completion tokens alone: hidden states are picked before the output layer, and its logits
exist for a chunk of tokens at a time. `model(..., logp_labels=labels)` returns them from any wrapped model.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from align.diffusion.digits_data import cache_directory
from align.errors import ModelError, first_line
from align.language_config import LanguageModelConfig
from align.launch import World
from align.weights import require_inert
from trainers.language_images import has_images, model_inputs
from trainers.preference_data import Tokens
from trainers.tiny_language import tiny_model

LOGIT_BYTES = 256 << 20
"""Logits of so many bytes at most exist at once, in float32, before chunks are recomputed in the backward pass."""

CPU_BYTES = 32 << 20
"""The same on a CPU where no gradient is needed: larger temporary memory would be mapped anew every time."""

Batch = Mapping[str, Any]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' own bars off the terminal: a run shows one line of its own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def resolve_language_model(path: str) -> str:
    """Return the folder of a model that goes by a name of ours, else `path`."""
    if path != "tiny":
        return path
    with quiet():
        return str(tiny_model())


def weights_folder(path: str) -> Path:
    """Return the folder that a model's weights were read from: of a hub name that of its snapshot on this machine.

    Raises:
        ModelError: there is none.
    """
    from transformers.utils import cached_file

    folder = Path(resolve_language_model(path))
    if folder.is_dir():
        return folder
    try:
        return Path(cached_file(path, "config.json", local_files_only=True)).parent
    except (OSError, ValueError) as error:
        raise ModelError(
            "The weights before training are no longer on this machine", where=path, why=first_line(error)
        ) from error


def load_tokenizer(path: str, chat_template: str | None = None) -> Any:
    """Load the tokenizer of a model folder; padding falls back to the end-of-sequence token.

    Raises:
        ModelError: not a tokenizer, or one without an end of sequence.
    """
    from transformers import AutoTokenizer

    folder = resolve_language_model(path)
    require_inert(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if chat_template is not None:
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            "A tokenizer cannot be loaded", where=chat_template or path, why=first_line(error),
            do="Give a folder written by save_pretrained, or `tiny`",
        ) from error  # fmt: skip
    if tokenizer.eos_token_id is None:
        raise ModelError("A tokenizer has no end-of-sequence token", where=path, do="Add eos_token to its config")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def takes_images(path: str) -> bool:
    """Return whether the configuration in a model folder is that of a vision-language model."""
    from transformers import PretrainedConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    found, _ = PretrainedConfig.get_config_dict(resolve_language_model(path))
    return "vision_config" in found and found.get("model_type") in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def load_processor(path: str, chat_template: str | None = None) -> Any:
    """Load what makes a model's inputs: its tokenizer, or of a vision-language model the processor around it.

    Raises:
        ModelError: see `load_tokenizer`; or a vision-language model without an image processor.
    """
    from transformers import AutoProcessor

    tokenizer = load_tokenizer(path, chat_template)
    try:
        if not takes_images(path):
            return tokenizer
        processor = AutoProcessor.from_pretrained(resolve_language_model(path), trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            "A processor cannot be loaded", where=path, why=first_line(error),
            do="Give a folder with a processor's files; `pip install torchvision` if that is missing",
        ) from error  # fmt: skip
    if not has_images(processor):
        raise ModelError("A vision-language model comes without an image processor", where=path)
    processor.tokenizer = tokenizer
    processor.chat_template = tokenizer.chat_template if chat_template else processor.chat_template
    return processor


def load_language_model(config: LanguageModelConfig, *, seed: int) -> nn.Module:
    """Load the model of a configuration, ready to train: adapters on, dropout off, `logp_labels` understood.

    Trained weights are float32. The frozen ones of a LoRA run take `dtype`. Of a vision-language model only
    the language model trains, unless `train_vision`.

    Raises:
        ModelError: not a language model, or adapters that fit no layer of it.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    folder, lora = resolve_language_model(config.path), config.train == "lora"
    half = lora and config.dtype == "bf16"
    require_inert(folder)
    try:
        with quiet():
            kind = AutoModelForImageTextToText if takes_images(config.path) else AutoModelForCausalLM
            model = kind.from_pretrained(
                folder, dtype=torch.bfloat16 if half else torch.float32, trust_remote_code=False
            )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            "A language model cannot be loaded", where=config.path, why=first_line(error),
            do="Give a folder written by save_pretrained, or `tiny`",
        ) from error  # fmt: skip
    model.config.use_cache = False
    without_dropout(model)
    if not config.train_vision and _sees(model):
        model.requires_grad_(False)
        for part in filter(None, (model.get_decoder(), model.get_output_embeddings())):
            part.requires_grad_(True)
    if lora:
        model = _with_adapters(model, config, seed)
    if config.gradient_checkpointing and lora:
        model.enable_input_require_grads()
    return with_completion_logps(model)


def _sees(model: Any) -> bool:
    """Return whether a model holds more than a language model, such as a vision tower."""
    return getattr(model.config, "vision_config", None) is not None and model.base_model is not model.get_decoder()


def _with_adapters(model: nn.Module, config: LanguageModelConfig, seed: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    targets: list[str] | str = list(config.lora.targets) if config.lora.targets else "all-linear"
    if not config.train_vision and _sees(model):
        targets = _language_targets(model, config.lora.targets)
    partitioned = hasattr(next(model.parameters()), "ds_id")  # ZeRO 3 keeps float32 masters, and wants one dtype
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return get_peft_model(
                model,
                LoraConfig(
                    r=config.lora.rank,
                    lora_alpha=config.lora.alpha,
                    lora_dropout=0.0,
                    target_modules=targets,
                    task_type="CAUSAL_LM",
                ),
                autocast_adapter_dtype=not partitioned,
            )
        except ValueError as error:
            raise ModelError(
                "The adapters fit no layer of the model", where="model.lora.targets", why=first_line(error)
            ) from error


def _language_targets(model: Any, names: Sequence[str] | None) -> str:
    """Return a pattern of the layers of a vision-language model's decoder, all linear ones when not named."""
    decoder = model.get_decoder()
    inside = next(name for name, module in model.named_modules() if module is decoder)
    names = names or sorted({n.split(".")[-1] for n, m in decoder.named_modules() if isinstance(m, nn.Linear)})
    return rf"{re.escape(inside)}\.(.*\.)?({'|'.join(map(re.escape, names))})"


def without_dropout(model: nn.Module) -> None:
    """Switch every dropout of a model off, also those that are numbers of its attention layers."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "attn_dropout", "dropout", "hidden_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


# Log-probs at completion tokens


class _LogProb(torch.autograd.Function):
    """`logit_target - logsumexp(logits)` in float32, `[N, V]` and `[N]` to `[N]`; the gradient takes the logits' place.

    What is temporary exists for a few rows at a time. The logits serve one backward pass; autograd refuses a second.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        blocks = logits.split(tokens_at_once(logits.shape[-1], logits.device))
        normaliser = torch.cat([block.float().logsumexp(-1, keepdim=True) for block in blocks])
        ctx.save_for_backward(logits, normaliser, target)
        return logits.gather(-1, target[:, None]).float().sub_(normaliser)[:, 0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        logits, normaliser, target = ctx.saved_tensors
        size, outer = tokens_at_once(logits.shape[-1], logits.device), gradients[0][:, None]
        parts = (whole.split(size) for whole in (logits, normaliser, target[:, None], outer))
        for block, shift, ids, scale in zip(*parts, strict=True):
            found = (block.float() - shift).exp_().mul_(-scale)
            block.copy_(found.scatter_add_(-1, ids, scale))
        return logits, None


def tokens_at_once(vocabulary: int, device: torch.device) -> int:
    """Return how many tokens' logits are worked on together where they are not kept for a gradient."""
    return max(1, (CPU_BYTES if device.type == "cpu" else LOGIT_BYTES) // (4 * vocabulary))


def token_logps(hidden: Tensor, target: Tensor, head: Callable[[Tensor], Tensor], chunk: int) -> Tensor:
    """Return `log softmax(head(hidden))[target]` of N tokens, float32 `[N]`, logits existing `chunk` tokens at a time.

    With more than one chunk the output layer runs again in the backward pass.

    Args:
        hidden: `[N, H]`.
        target: `[N]`.
        head: `[n, H]` to logits `[n, V]`.
        chunk: tokens.
    """

    def piece(part: Tensor, ids: Tensor) -> Tensor:
        return _LogProb.apply(head(part), ids)

    if len(target) <= chunk:
        return piece(hidden, target)
    again = torch.is_grad_enabled() and hidden.requires_grad
    pieces = zip(hidden.split(chunk), target.split(chunk), strict=True)
    return torch.cat([checkpoint(piece, h, t, use_reentrant=False) if again else piece(h, t) for h, t in pieces])


def completion_mask(labels: Tensor) -> Tensor:
    """Return where completion tokens are predicted, `[B, T - 1]`."""
    return labels[:, 1:] != -100


def with_completion_logps(model: nn.Module, chunk: int | None = None) -> nn.Module:
    """Teach a causal language model the argument `logp_labels`, and return it.

    `model(input_ids, attention_mask, logp_labels=labels)` then returns the log-probs of all completion tokens, row
    after row, `[N]`; without that argument the model is as before, through any wrapper.

    Args:
        model: of transformers, with or without adapters of PEFT.
        chunk: tokens whose logits exist at once; as many as `LOGIT_BYTES` hold when None.

    Raises:
        ModelError: the model scales its logits in a way that is not known here.
    """
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    plain, head = inner.forward, inner.get_output_embeddings()
    body = inner.base_model if _sees(inner) else inner.get_decoder()  # the one that puts images among the tokens
    if head is None or body is inner:
        raise ModelError("This is not a causal language model", where=type(inner).__name__)
    text = inner.config.get_text_config()
    kept = chunk or max(1, LOGIT_BYTES // (4 * int(text.vocab_size)))
    cap, scale = getattr(text, "final_logit_softcapping", None), getattr(text, "logit_scale", None)
    divisor = getattr(text, "logits_scaling", None)

    def logits(part: Tensor) -> Tensor:
        found = head(part)
        found = found if not scale else found * scale
        found = found if not divisor else found / divisor
        return found if not cap else torch.tanh(found / cap) * cap

    def forward(*args: Any, logp_labels: Tensor | None = None, **options: Any) -> Any:
        if logp_labels is None:
            return plain(*args, **options)
        for unused in ("labels", "logits_to_keep"):
            options.pop(unused, None)
        hidden = body(*args, **{**options, "use_cache": False}).last_hidden_state
        mask = completion_mask(logp_labels)
        size = kept if torch.is_grad_enabled() else min(kept, tokens_at_once(text.vocab_size, hidden.device))
        return token_logps(hidden[:, :-1][mask], logp_labels[:, 1:][mask], logits, size)

    inner.forward = forward
    first = next(inner.parameters())
    if first.device.type != "meta" and not hasattr(first, "ds_id"):  # partitioned weights need their engine first
        require_same_logps(model)
    return model


def require_same_logps(model: nn.Module) -> None:
    """Compare log-probs with the logits the model itself returns, once, on a few tokens.

    Raises:
        ModelError: they differ.
    """
    first, training = next(model.parameters()), model.training
    ids = (torch.arange(12, device=first.device) * 7919 % model.config.get_text_config().vocab_size)[None]
    model.eval()
    with torch.no_grad():
        ours = model(input_ids=ids, attention_mask=torch.ones_like(ids), logp_labels=ids)
        own = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, :-1].float().log_softmax(-1)
    model.train(training)
    error = float((ours - own.gather(-1, ids[0, 1:, None])[:, 0]).abs().max())
    if not error <= (1e-3 if first.dtype == torch.float32 else 0.2):
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        raise ModelError(
            "Log-probs of this model cannot be had from its hidden states", where=type(inner).__name__,
            why=f"they differ from its own logits by up to {error:.2g} nats", do="Report the model's name",
        )  # fmt: skip


@dataclass(frozen=True)
class TokenLogps:
    """Log-probs of the completion tokens of B rows: `values [N]`, row after row, and `mask [B, T - 1]`."""

    values: Tensor
    mask: Tensor

    def per_row(self, values: Tensor | None = None) -> Tensor:
        """Return the sum over each row's tokens, float32 `[B]`, of these log-probs or of other token values."""
        found = self.values if values is None else values
        return torch.zeros(self.mask.shape, device=found.device).masked_scatter(self.mask, found.float()).sum(1)


def completion_logps(model: nn.Module, batch: Batch) -> TokenLogps:
    """Run a model that `with_completion_logps` has taught over a batch of `collate`."""
    values = model(**model_inputs(batch), logp_labels=batch["labels"])
    return TokenLogps(values, completion_mask(batch["labels"]))


# The model before training


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
        import copy

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
