"""What is said of models that are not here: latent sizes, memory, hub names, and the recipes that use them."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch

import tiny_images
from align import published
from align.checks import check_config, require_valid
from align.cli import main
from align.config import LoraConfig, load_config
from align.diffusion.families import FAMILIES, Size
from align.diffusion.policy import add_lora, load_family, resolve_model
from align.errors import ModelError
from align.ledger import feq_ledger
from align.published import PUBLISHED, denoiser_size, is_hub_name, latent_dim, training_memory
from align.recipes import list_recipes

BASE = {"model": {"path": "digits"}, "prompts": {"path": "p.txt"}, "rewards": [{"name": "jpeg"}, {"name": "hpsv2.1"}]}
FLUX = "model.path=black-forest-labs/FLUX.1-dev"


@pytest.mark.parametrize(
    ("overrides", "dim"),
    [
        ([FLUX], 16 * 128 * 128),
        ([FLUX, "sampler.height=720", "sampler.width=720"], 129_600),
        (["model.path=CompVis/stable-diffusion-v1-4"], 4 * 64 * 64),
        (["model.path=models/my-own", "model.family=QwenImagePipeline"], 16 * 128 * 128),
        (["model.path=Wan-AI/Wan2.1-T2V-1.3B-Diffusers"], 16 * 21 * 60 * 104),
        (["model.path=hunyuanvideo-community/HunyuanVideo", "sampler.frames=53", "sampler.height=480",
          "sampler.width=480"], 16 * 14 * 60 * 60),
        (["model.path=models/my-own"], None),
        ([], 256),
    ],
)  # fmt: skip
def test_latent_sizes_by_hand(overrides, dim):
    assert latent_dim(load_config(BASE, overrides)) == dim


def test_memory_by_hand():
    """FLUX.1-dev: 11.9 B weights. Full, bf16: 4 + 2 + 4 + 8 bytes each; on 8: 6 + 16 / 8. An average: 4 more."""
    weights = PUBLISHED["black-forest-labs/FLUX.1-dev"].parameters
    full = load_config(BASE, [FLUX, "model.train=full", "model.dtype=bf16"])
    assert training_memory(full) == weights * 18 and training_memory(full, 8) == weights * 8
    averaged = load_config(BASE, [FLUX, "model.train=full", "optimizer.ema_decay=0.9", "objective.kl_weight=1"])
    assert training_memory(averaged) == weights * (16 + 4 + 4)
    lora = load_config(BASE, [FLUX, "model.dtype=bf16", "model.lora.rank=2"])
    assert training_memory(lora) == weights * 2 + 2 * 4_085_760 * 18
    assert training_memory(load_config(BASE, ["model.path=models/my-own"])) is None


@pytest.mark.parametrize("build", [tiny_images.flux, tiny_images.qwen_image, tiny_images.sdxl])
def test_a_folder_is_measured_from_its_headers(build, tmp_path: Path):
    folder = build(tmp_path / "model")
    config = load_config(BASE, [f"model.path={folder}", "sampler.height=16", "sampler.width=24"])
    family = load_family(folder)
    channels, height, width = family.latent_shape(Size(16, 24))
    assert latent_dim(config) == channels * height * width
    weights, adapted = denoiser_size(config.model)
    assert weights == sum(p.numel() for p in family.denoiser.parameters())
    idle = [family.denoiser.get_submodule(name) for name in family.idle_layers]
    unmoved = sum(layer.in_features + layer.out_features for layer in idle)
    add_lora(family, LoraConfig(rank=3), 0)
    trained = sum(p.numel() for p in family.denoiser.parameters() if p.requires_grad)
    assert 3 * adapted == pytest.approx(trained + 3 * unmoved, rel=0.1 if build is tiny_images.sdxl else 0)
    name = next((folder / family.component).glob("*.safetensors")).name
    (folder / family.component / name.replace(".", ".fp16.", 1)).write_bytes(b"other precision")
    assert denoiser_size(config.model) == (weights, adapted)
    (folder / family.component / name).write_bytes(b"no header")
    assert denoiser_size(config.model) is None


ARCHITECTURES = {
    "CompVis/stable-diffusion-v1-4": ("UNet2DConditionModel", {"cross_attention_dim": 768}),
    "black-forest-labs/FLUX.1-dev": ("FluxTransformer2DModel", {"guidance_embeds": True}),
    "Qwen/Qwen-Image": ("QwenImageTransformer2DModel", {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("hub", ARCHITECTURES)
def test_published_sizes_are_those_of_the_architectures(hub):
    import diffusers

    kind, options = ARCHITECTURES[hub]
    with torch.device("meta"):
        denoiser = getattr(diffusers, kind)(**options)
    known = PUBLISHED[hub]
    assert sum(p.numel() for p in denoiser.parameters()) == known.parameters
    targets = FAMILIES.get(known.family).lora_targets
    layers = [
        layer for name, layer in denoiser.named_modules()
        if isinstance(layer, torch.nn.Linear) and any(fnmatchcase(f".{name}", f"*.{target}") for target in targets)
    ]  # fmt: skip
    assert sum(layer.in_features + layer.out_features for layer in layers) == known.adapted


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("black-forest-labs/FLUX.1-dev", True), ("Qwen/Qwen-Image", True), ("digits/sd", False), ("digits", False),
        ("/models/flux", False), ("../models", False), ("./models", False), ("models/a/b", False), ("flux", False),
    ],
)  # fmt: skip
def test_what_is_a_hub_name(name, is_one):
    assert is_hub_name(name) == is_one


def test_a_folder_that_is_there_is_no_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "flux").mkdir(parents=True)
    assert not is_hub_name("models/flux") and is_hub_name("models/other")
    assert resolve_model("models/flux") == Path("models/flux")


def test_a_model_that_is_neither_here_nor_to_be_had_is_named(monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="no such folder, and the hub has no pipeline") as error:
        resolve_model("nobody/no-such-model")
    assert "nobody/no-such-model" in str(error.value)


def test_a_pipeline_of_the_hub_is_read_from_the_cache(monkeypatch, tmp_path):
    import huggingface_hub

    commit, home = "0" * 40, tmp_path / "hub" / "models--tiny--flux"
    folder = tiny_images.flux(home / "snapshots" / commit)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert resolve_model("tiny/flux") == folder and load_family(folder).name == "flux"
    config = load_config(BASE, ["model.path=tiny/flux"])
    assert not [finding for finding in check_config(config, files=True) if finding.code == "model_absent"]


READY = [name for name, _ in list_recipes() if name.split("/")[0] in ("stable_diffusion", "flux", "qwen_image")]


@pytest.mark.parametrize("recipe", READY)
def test_check_prints_what_a_recipe_costs_without_its_weights(recipe, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"prompt number {i}" for i in range(50)))
    assert main(["check", recipe, f"prompts.path={prompts}"]) == 0
    shown = capsys.readouterr().out
    assert "F_eq a sample" in shown and "nats over" in shown and "GB of weights and optimizer" in shown
    assert "fetches it from the hub" in shown
    assert main(["check", recipe]) == 2 and "prompts.txt" in capsys.readouterr().out


def test_recipes_are_what_the_facts_say():
    rows = {
        "stable_diffusion/hps": (49, 50, 16, 32, 2, 1e-5, 1.0, None, 512),
        "flux/hps_clip": (9, 16, 12, 16, 3, 1e-5, 1.0, 3, 720),
        "flux/hps_clip_8gpu": (9, 16, 12, 16, 2, 1e-5, 0.01, 3, 720),
        "flux/hps_clip_lora": (6, 12, 12, 16, 2, 3e-4, 1.0, 3, 720),
        "qwen_image/hps": (11, 20, 12, 16, 2, 1e-5, 1.0, 3, 720),
    }
    for recipe, expected in rows.items():
        config = load_config(recipe)
        require_valid(config)
        ledger = feq_ledger(config)
        assert (
            ledger["trained_steps"], ledger["solver_steps"], config.group_size, config.prompts_per_step,
            config.updates_per_step, config.optimizer.lr, config.optimizer.max_grad_norm, config.sampler.shift,
            config.sampler.height,
        ) == expected, recipe  # fmt: skip
        assert config.model.path in PUBLISHED
    assert {n: feq_ledger(load_config(n))["feq_per_sample"] for n in ("flux/hps", "flux/hps_clip_lora")} == {
        "flux/hps": 52, "flux/hps_clip_lora": 30,
    }  # fmt: skip
    both = load_config("flux/hps_clip")
    assert [(r.name, r.weight) for r in both.rewards] == [("hpsv2.1", 0.7), ("clip/dfn5b", 1.4)]
    lora = load_config("flux/hps_clip_lora").model.lora
    assert (lora.rank, lora.alpha, len(lora.targets)) == (128, 256, 4)


def test_json_keeps_the_memory(tmp_path, capsys):
    file = tmp_path / "found.json"
    main(["check", "flux/hps", "--json", str(file)])
    found = json.loads(file.read_text())
    assert found["memory_gb"] == {"1": 214.2, "8": 95.2} and found["latent_dim"] == 129_600
    assert published.published(load_config("flux/hps").model).family == "FluxPipeline"
