"""Log-probs of completions, worked out at completion tokens alone.

Hidden states are picked before the output layer, and its logits exist for a chunk of tokens at a time.
`model(..., logp_labels=labels)` returns them from any wrapped model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from align.errors import ModelError
from trainers.language_images import model_inputs

LOGIT_BYTES = 256 << 20
"""Logits of so many bytes at most exist at once, in float32, before chunks are recomputed in the backward pass."""

CPU_BYTES = 32 << 20
"""The same on a CPU where no gradient is needed: larger temporary memory would be mapped anew every time."""

BLOCK_BYTES = 8 << 20
"""What a CPU works on together, element by element: what is freed in larger blocks stays with the process in pieces."""

Batch = Mapping[str, Any]


class _LogProb(torch.autograd.Function):
    """`logit_target - logsumexp(logits)` in float32, `[N, V]` and `[N]` to `[N]`; the gradient takes the logits' place.

    What is temporary exists for a few rows at a time. The logits serve one backward pass; autograd refuses a second.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        blocks = logits.split(tokens_at_once(logits.shape[-1], logits.device, BLOCK_BYTES))
        normaliser = torch.cat([block.float().logsumexp(-1, keepdim=True) for block in blocks])
        ctx.save_for_backward(logits, normaliser, target)
        return logits.gather(-1, target[:, None]).float().sub_(normaliser)[:, 0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        logits, normaliser, target = ctx.saved_tensors
        size, outer = tokens_at_once(logits.shape[-1], logits.device, BLOCK_BYTES), gradients[0][:, None]
        parts = (whole.split(size) for whole in (logits, normaliser, target[:, None], outer))
        for block, shift, ids, scale in zip(*parts, strict=True):
            found = (block.float() - shift).exp_().mul_(-scale)
            block.copy_(found.scatter_add_(-1, ids, scale))
        return logits, None


def tokens_at_once(vocabulary: int, device: torch.device, on_cpu: int = CPU_BYTES) -> int:
    """Return how many tokens' logits are worked on together: those of `on_cpu` bytes there, else of `LOGIT_BYTES`."""
    return max(1, (on_cpu if device.type == "cpu" else LOGIT_BYTES) // (4 * vocabulary))


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
    body = inner.base_model if sees(inner) else inner.get_decoder()  # the one that puts images among the tokens
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


def sees(model: Any) -> bool:
    """Return whether a model holds more than a language model, such as a vision tower."""
    return getattr(model.config, "vision_config", None) is not None and model.base_model is not model.get_decoder()
