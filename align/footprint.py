"""What a model's forward and backward pass take, counted on tensors without storage: nothing is loaded or computed.

    bytes(n blocks) = bytes(2) + (n - 2) (bytes(3) - bytes(2))

Blocks of one kind are alike, so models of two and three blocks tell what deeper ones take. The operations are those
that torch runs on a CPU, whose attention keeps no matrix of scores, as a GPU's does not.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

LOGITS = 256 << 20
"""Bytes of float32 logits that a language run has at once; beyond, they are recomputed in chunks."""

LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "model_type": "llama", "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    },
    "qwen2.5-7b": {
        "model_type": "qwen2", "vocab_size": 152_064, "hidden_size": 3584, "intermediate_size": 18_944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False,
    },
}  # fmt: skip
"""Configurations of the published models that recipes name, by what their hub names have in common."""


@dataclass(frozen=True)
class Footprint:
    """What one row takes: bytes with a gradient, and without one."""

    training: float
    sampling: float


def count(build: Callable[[], tuple[nn.Module, Callable[[], Tensor]]], *, half: bool, recomputed: bool) -> Footprint:
    """Return the peak of what a forward and backward pass allocate, and a forward pass alone.

    Weights are not counted, nor gradients of weights, which are there before, nor the bfloat16 copies of trained
    matrices that a forward pass keeps for the backward one: those are counted with the weights.

    Args:
        build: makes a model and its forward pass, called where tensors have no storage.
        half: products in bfloat16, by autocast.
        recomputed: whether activations are, and copies of matrices with them.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    with warnings.catch_warnings(), FakeTensorMode():
        warnings.simplefilter("ignore", UserWarning)
        model, forward = build()
        trained = [p for p in model.parameters() if p.requires_grad]
        kept = half and not recomputed
        copies = sum(2.0 * p.numel() for p in trained if p.ndim > 1) if kept else 0.0
        autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=half, cache_enabled=False)
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        there = [*model.parameters(), *model.buffers(), *(p.grad for p in trained)]
        with _Live(there) as sampling, torch.no_grad(), autocast():
            forward()
        with _Live(there) as training:
            with autocast():
                output = forward()
            output.float().square().mean().backward()
            del output
    return Footprint(max(0.0, training.peak - copies), sampling.peak)


def by_depth(of: Callable[[Mapping[str, int]], Footprint], depths: Mapping[str, int]) -> Footprint:
    """Return the footprint of a model of `depths` blocks of each kind from models of two and three of each.

    Args:
        of: the footprint of a model with these depths.
        depths: blocks by the name of their number in the model's configuration.
    """
    base = {name: min(depth, 2) for name, depth in depths.items()}
    few = of(base)
    training, sampling = few.training, few.sampling
    for name, depth in depths.items():
        if depth > 2:
            more = of({**base, name: 3})
            training += (depth - 2) * max(0.0, more.training - few.training)
            sampling += (depth - 2) * max(0.0, more.sampling - few.sampling)
    return Footprint(training, sampling)


def _live_mode() -> type:
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Live(TorchDispatchMode):
        """Counts the bytes of storages that operations make, for as long as they live; views of `there` make none."""

        def __init__(self, there: Sequence[Tensor]) -> None:
            super().__init__()
            self.live = self.peak = 0.0
            self.there = [tensor.untyped_storage() for tensor in there]
            self.seen: dict[int, Any] = {id(storage): storage for storage in self.there}

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = function(*args, **(kwargs or {}))
            for leaf in tree_leaves(output):
                if hasattr(leaf, "untyped_storage"):
                    self._add(leaf.untyped_storage())
            return output

        def _add(self, storage: Any) -> None:
            key, size = id(storage), storage.nbytes()
            if key in self.seen:
                return

            def gone(_: Any) -> None:
                self.live -= size
                self.seen.pop(key, None)

            self.seen[key] = weakref.ref(storage, gone)
            self.live += size
            self.peak = max(self.peak, self.live)

    return Live


def _Live(there: Sequence[Tensor]) -> Any:
    return _live_mode()(there)


# Language models


@dataclass(frozen=True)
class LanguageSize:
    """Weights of a language model: all, those of adapters of rank 1, of its largest block; its tokens, its blocks."""

    parameters: int
    adapted: int
    widest: int
    vocabulary: int
    depth: int


def read_config(folder: str | Path) -> Any | None:
    """Return transformers' configuration of a model folder, of a hub name that was fetched, or of a published model
    that is known here; None without one."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError):
        known = next((c for name, c in LANGUAGE_MODELS.items() if name in str(folder).lower()), None)
        return None if known is None else AutoConfig.for_model(**known)


def language_size(config: Any, targets: tuple[str, ...] | None = None) -> LanguageSize:
    """Count a language model on the meta device, from its configuration alone.

    Args:
        targets: endings of the names of adapted layers; every linear layer but the output's when None.
    """
    import torch
    from torch import nn

    with torch.device("meta"):
        model = _language(config)
    head = model.get_output_embeddings()
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    chosen = [m for n, m in linear.items() if targets is None or any(f".{n}".endswith(f".{end}") for end in targets)]
    blocks = [
        sum(p.numel() for p in b.parameters()) for m in model.modules() if isinstance(m, nn.ModuleList) for b in m
    ]
    text = config.get_text_config()
    return LanguageSize(
        sum(p.numel() for p in model.parameters()), sum(m.in_features + m.out_features for m in chosen),
        max(blocks, default=0), int(text.vocab_size), int(text.num_hidden_layers),
    )  # fmt: skip


def language_footprint(config: Any, *, tokens: int, half: bool, rank: int | None, checkpointing: bool) -> Footprint:
    """Return what a row of so many tokens takes in the body of a language model, its output layer left out.

    Args:
        half: products in bfloat16.
        rank: of the adapters that train, beside frozen matrices that keep no input of theirs; None trains all.
        checkpointing: recompute activations.
    """
    import copy

    import torch

    def of(depths: Mapping[str, int]) -> Footprint:
        def build() -> tuple[nn.Module, Callable[[], Tensor]]:
            small = copy.deepcopy(config)
            text = small.get_text_config()
            text.num_hidden_layers = depths["num_hidden_layers"]
            if getattr(text, "layer_types", None):
                text.layer_types = text.layer_types[: text.num_hidden_layers]
            model = _language(small)
            if checkpointing:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", FutureWarning)
                    model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
            if rank is not None:
                model.enable_input_require_grads()
                adapt(model.get_decoder(), lambda name: True, rank=rank, half=half)
            ids, body = torch.zeros(1, tokens, dtype=torch.long), model.get_decoder()
            return model, lambda: body(input_ids=ids, use_cache=False).last_hidden_state

        return count(build, half=half, recomputed=checkpointing)

    return by_depth(of, {"num_hidden_layers": int(config.get_text_config().num_hidden_layers)})


def _language(config: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kind = AutoModelForImageTextToText if getattr(config, "vision_config", None) is not None else AutoModelForCausalLM
    return kind.from_config(config)


def adapt(model: nn.Module, chosen: Callable[[str], bool], *, rank: int, half: bool) -> nn.Module:
    """Freeze a model without storage and put adapters `W x + B A x` in the place of its chosen linear layers.

    Args:
        chosen: which layers, by name.
        half: keep the frozen matrices in bfloat16.
    """
    import torch
    from torch import nn

    class Adapted(nn.Module):
        """A frozen linear layer with an adapter."""

        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base, self.weight, self.bias = base, base.weight, base.bias
            self.A = nn.Linear(base.in_features, rank, bias=False)
            self.B = nn.Linear(rank, base.out_features, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            """Return the layer's output and the adapter's."""
            return self.base(x) + self.B(self.A(x))

    model.requires_grad_(False)
    matrices = (nn.Linear, nn.Conv2d, nn.Conv3d)
    if half:
        for module in model.modules():
            if isinstance(module, matrices):
                for name, parameter in list(module.named_parameters(recurse=False)):
                    setattr(module, name, nn.Parameter(parameter.to(torch.bfloat16), requires_grad=False))
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and chosen(name):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, Adapted(module))
    return model
