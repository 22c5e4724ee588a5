"""Our objectives against TRL: its KTO trainer on a tiny model, and what its last BCO computed, kept as numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from align.config import load_config
from align.launch import World
from align.preferences import load_preferences
from trainers.kto import KTOObjective
from trainers.language_logps import with_completion_logps
from trainers.language_model import load_tokenizer
from trainers.language_objective import Models, Totals, microbatch
from trainers.language_reference import Reference
from trainers.preference import PooledDelta, bco, class_sums, udm_weights
from trainers.preference_data import tokenise
from trainers.tiny_language import build_tiny, toy_thumbs

FIXTURE = json.loads((Path(__file__).parents[1] / "fixtures" / "bco_trl_1_13.json").read_text())


def test_bco_follows_trl_1_13_over_fifty_microbatches():
    """Loss, gradient and cumulative delta, with and without density-ratio weights."""
    state = PooledDelta()
    for made in FIXTURE["batches"]:
        sides = [torch.tensor(made[f"logp_{s}"]) - torch.tensor(made[f"ref_{s}"]) for s in ("up", "down")]
        h = torch.cat(sides).requires_grad_()
        label = torch.cat([torch.ones(len(sides[0])), torch.zeros(len(sides[1]))])
        state = state.update(class_sums(FIXTURE["beta"] * h, label > 0.5))
        weight = torch.ones(len(h))
        if made["probability"] is not None:
            weight[len(sides[0]) :] = udm_weights(torch.tensor(made["probability"]))
        terms = bco(h, label, state.value, beta=FIXTURE["beta"], weight=weight)
        terms.loss.mean().backward()
        assert state.value == pytest.approx(made["delta"], abs=1e-6)
        torch.testing.assert_close(terms.loss.detach(), torch.tensor(made["losses"]), atol=2e-6, rtol=1e-6)
        torch.testing.assert_close(h.grad, torch.tensor([*made["grad_up"], *made["grad_down"]]), atol=1e-7, rtol=1e-5)
    assert FIXTURE["release"].startswith("trl 1.13.0")


def test_kto_is_trls_on_a_tiny_model(tmp_path):
    """Same rows, TRL's own pairing: loss, KL and every gradient agree to 1e-6."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import KTOConfig, KTOTrainer

    folder = build_tiny(tmp_path / "tiny")
    tokenizer = load_tokenizer(str(folder))
    rows = load_preferences([
        {"prompt": r.prompt, "completion": r.completion, "label": bool(r.label)} for r in toy_thumbs(4).rows
    ])  # fmt: skip

    def model(noise):
        made = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        draw = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(noise * torch.randn(parameter.shape, generator=draw))
        return made

    arguments = KTOConfig(
        output_dir=str(tmp_path / "trl"), per_device_train_batch_size=8, beta=0.3, desirable_weight=1.2,
        undesirable_weight=0.7, report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    columns = [{"prompt": r.prompt, "completion": r.completion, "label": bool(r.label)} for r in rows.rows]
    theirs = KTOTrainer(
        model=model(0.02), ref_model=model(0.0), args=arguments, processing_class=tokenizer,
        train_dataset=Dataset.from_list(columns),
    )  # fmt: skip
    inputs = next(iter(theirs.get_train_dataloader()))
    theirs.model.train()
    loss = theirs.compute_loss(theirs.model, inputs)
    loss.backward()

    config = load_config({
        "trainer": "kto", "model": {"path": str(folder)}, "data": {"path": "toy"},
        "objective": {"beta": 0.3, "weight_desirable": 1.2, "weight_undesirable": 0.7},
    })  # fmt: skip
    tokens = tokenise(rows, tokenizer, max_length=1024)
    for i, (prompt, completion) in enumerate(zip(tokens.prompts, tokens.completions, strict=True)):
        ids = inputs["input_ids"][i][inputs["attention_mask"][i].bool()].tolist()
        assert ids == [*prompt.tolist(), *completion.tolist()]
    policy, reference = with_completion_logps(model(0.02)), with_completion_logps(model(0.0))
    holder = Reference("precomputed", reference)
    objective = KTOObjective(config)
    objective.prepare(tokens)
    assert objective.weights == (1.2, 0.7)
    batch = microbatch(
        tokens, torch.arange(8).numpy(), list(range(8)), [(i - 1) % 8 for i in range(8)], None, mismatched=True,
        pad=tokenizer.pad_token_id,
    )  # fmt: skip
    found = objective.losses(Models(policy, policy, holder), batch, Totals(8, 4, 4, 0), World())
    found.loss.backward()
    assert float(found.loss.detach()) == pytest.approx(float(loss.detach()), abs=1e-6)
    assert objective.finish(World())["z0"] == pytest.approx(theirs._metrics["train"]["kl"][-1], abs=1e-5)
    for (name, a), (_, b) in zip(policy.named_parameters(), theirs.model.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-4, msg=name)
