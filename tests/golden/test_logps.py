"""Log-probs at completion tokens against the model's own logits, in fp64, and what must not change them."""

from __future__ import annotations

import pytest
import torch

from align.errors import ModelError
from trainers.language_logps import (
    BLOCK_BYTES,
    TokenLogps,
    completion_logps,
    completion_mask,
    token_logps,
    tokens_at_once,
    with_completion_logps,
)
from trainers.language_model import without_dropout
from trainers.language_reference import frozen_copy
from trainers.tiny_language import build_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_tiny(tmp_path_factory.mktemp("tiny"))


def load(folder, chunk=None):
    from transformers import AutoModelForCausalLM

    return with_completion_logps(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), chunk)


def batch(lengths=((3, 4), (5, 2), (1, 6)), width=0, left=False, seed=0):
    draw = torch.Generator().manual_seed(seed)
    width = max(width, *(p + c for p, c in lengths))
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for i, (p, c) in enumerate(lengths):
        row = torch.randint(4, 300, (p + c,), generator=draw)
        at = width - p - c if left else 0
        ids[i, at : at + p + c], mask[i, at : at + p + c] = row, 1
        labels[i, at + p : at + p + c] = row[p:]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def by_the_book(model, made):
    """Full logits, log-softmax in double precision, summed row by row."""
    logits = model(input_ids=made["input_ids"], attention_mask=made["attention_mask"]).logits.double()
    logp = logits[:, :-1].log_softmax(-1).gather(-1, made["input_ids"][:, 1:, None])[..., 0]
    return (logp * completion_mask(made["labels"])).sum(1)


@pytest.mark.parametrize("chunk", [None, 1, 5])
def test_values_and_gradients_are_those_of_the_full_logits(folder, chunk):
    made, model, plain = batch(), load(folder, chunk), load(folder)
    found = completion_logps(model, made)
    assert len(found.values) == 12
    expected = by_the_book(plain, made)
    torch.testing.assert_close(found.per_row().double(), expected, atol=1e-5, rtol=1e-6)
    weights = torch.tensor([1.0, -2.0, 0.5])
    (found.per_row() * weights).sum().backward()
    (expected * weights).sum().backward()
    for (name, a), (_, b) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("change", [{"width": 23}, {"left": True, "width": 11}])
def test_padding_changes_nothing_however_much_and_on_whichever_side(folder, change):
    model = load(folder)
    made, other = batch(), batch(**change)
    if change.get("left"):
        other["position_ids"] = (other["attention_mask"].cumsum(1) - 1).clamp(min=0)
    values = model(
        input_ids=other["input_ids"], attention_mask=other["attention_mask"], logp_labels=other["labels"],
        **({"position_ids": other["position_ids"]} if "position_ids" in other else {}),
    )  # fmt: skip
    torch.testing.assert_close(
        TokenLogps(values, completion_mask(other["labels"])).per_row(),
        completion_logps(model, made).per_row(),
        atol=1e-5,
        rtol=1e-6,
    )


def test_half_precision_logits_are_summed_in_single_precision():
    draw = torch.Generator().manual_seed(0)
    logits = (torch.randn(6, 50_000, generator=draw) * 3).bfloat16().requires_grad_()
    target = torch.randint(0, 50_000, (6,), generator=draw)
    found = token_logps(logits, target, lambda part: part, 2)
    expected = logits.double().log_softmax(-1).gather(-1, target[:, None])[:, 0]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_over_several_blocks_of_rows_are_those_of_log_softmax(dtype):
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(20, 1_000_000, generator=draw).to(dtype).requires_grad_()
    target, outer = torch.randint(0, 1_000_000, (20,), generator=draw), torch.randn(20, generator=draw)
    assert tokens_at_once(1_000_000, logits.device, BLOCK_BYTES) < 10  # several blocks
    expected = logits.detach().float().softmax(-1).mul_(-outer[:, None])
    expected.scatter_add_(-1, target[:, None], outer[:, None])
    found = token_logps(logits, target, lambda part: part * 1, 20)
    (gradient,) = torch.autograd.grad((found * outer).sum(), logits)
    torch.testing.assert_close(gradient.float(), expected, atol=1e-6, rtol=1e-5 if dtype == torch.float32 else 8e-3)


def test_a_second_backward_pass_is_refused_as_the_logits_are_gone():
    logits = torch.randn(3, 7, requires_grad=True)
    loss = token_logps(logits, torch.tensor([1, 2, 3]), lambda part: part * 1, 3).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_whole_of_the_logits_never_exists(folder):
    """The output layer sees no more than a chunk of completion tokens, and no prompt or padding."""
    model, seen = load(folder, 5), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    completion_logps(model, batch(width=40)).values.sum().backward()
    assert sum(seen[:3]) == 12 and max(seen) == 5


def test_logits_that_are_capped_or_scaled_are_so_here_too(tmp_path):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=320, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.2,
    )  # fmt: skip
    plain = Gemma2ForCausalLM(config).eval()
    with torch.no_grad():
        plain.model.norm.weight.add_(20.0)  # logits large enough for the cap to bind
    plain.save_pretrained(tmp_path)
    model, made = load(tmp_path).eval(), batch()
    torch.testing.assert_close(
        completion_logps(model, made).per_row().double(), by_the_book(plain, made), atol=1e-4, rtol=1e-5
    )


def test_a_model_whose_logits_are_its_own_is_refused(folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    plain = model.forward

    def odd(*args, **options):
        found = plain(*args, **options)
        found.logits = found.logits * 3
        return found

    model.forward = odd
    with pytest.raises(ModelError, match="differ from its own logits"):
        with_completion_logps(model)


def test_a_frozen_copy_stays_what_it_was(folder):
    model, made = load(folder), batch()
    copy = frozen_copy(model)
    before = completion_logps(copy, made).per_row()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    assert torch.equal(completion_logps(copy, made).per_row(), before)
    assert not torch.allclose(completion_logps(model, made).per_row(), before, atol=1e-2)
    assert not any(p.requires_grad for p in copy.parameters())


def test_dropout_is_off_wherever_it_is_kept(tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=320, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, attention_dropout=0.5,
    )).train()  # fmt: skip
    ids = batch()["input_ids"]
    assert not torch.equal(model(ids).logits, model(ids).logits)
    without_dropout(model)
    assert torch.equal(model(ids).logits, model(ids).logits)
