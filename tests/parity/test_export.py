"""Exports of every family, loaded back by the tools they are for and compared pixel by pixel with the policy's own."""

from __future__ import annotations

import errno
import json
import re
import shutil
from types import SimpleNamespace

import pytest
import tiny_videos
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_runs import BUILD, random_run, size_of

from align.cli import main
from align.commands.export import export_model
from align.diffusion import export as exporting
from align.diffusion.comfyui import KEY_MAPS, NOT_OPENED, native_layers, to_comfyui
from align.diffusion.export import export, find_trained
from align.diffusion.families import FAMILIES
from align.diffusion.kernels import step_table
from align.diffusion.policy import Policy, load_family
from align.diffusion.rollout import decode, initial_noise, solve
from align.errors import CheckpointError, ConfigError, ModelError
from align.reports.markdown import plain
from align.types import ImagePrompt
from align.weights import file_sha256, weights_sha256
from trainers.evaluation import open_source

ALL = pytest.mark.parametrize("name", list(BUILD))


def some(*names):
    """All families, of which only `names` in the quick tests."""
    return pytest.mark.parametrize(
        "name", [pytest.param(n, marks=() if n in names else pytest.mark.slow) for n in BUILD]
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run folders with a checkpoint, weights of the adapters or of the denoiser drawn at random, and what they make."""
    root, made = tmp_path_factory.mktemp("exports"), {}
    picture = tiny_videos.picture(root / "first.png")

    def run(name, train="lora", average=False):
        key = (name, train, average)
        if key in made:
            return made[key]
        if name not in made:
            made[name] = BUILD[name](root / name)
        base, size = made[name], size_of(name)
        folder = random_run(root / "_".join(map(str, key)), base, name, train, average)
        policy = open_source(folder).policy
        prompt = ImagePrompt("a red cat", picture) if policy.family.takes_image else "a red cat"
        found = SimpleNamespace(
            folder=folder, base=base, size=size, prompt=prompt, component=policy.family.component,
            made=pixels(policy, prompt), plain=pixels(Policy(load_family(base), size=size), prompt),
        )  # fmt: skip
        assert (found.made - found.plain).abs().max() > 1e-2, "training is seen"
        made[key] = found
        return found

    return run


def pixels(policy, prompt):
    table = step_table("ode", 0.0, policy.family.schedule(2, None, policy.latent_shape))
    noise = initial_noise(policy.latent_shape, range(1), 1, "none", 5)
    return decode(policy, solve(policy, noise, [prompt], table).x0)


def same(run, family):
    torch.testing.assert_close(pixels(Policy(family, size=run.size), run.prompt), run.made, atol=1e-5, rtol=0)


@ALL
def test_a_diffusers_lora_makes_the_same(runs, name, tmp_path):
    run, out = runs(name), tmp_path / "lora"
    card = export(run.folder, to="diffusers-lora", out=out)
    family = load_family(run.base)
    family.pipeline.load_lora_weights(str(out), weight_name="pytorch_lora_weights.safetensors")
    same(run, family)
    file = out / "pytorch_lora_weights.safetensors"
    assert card["files"] == {file.name: file_sha256(file)}
    state = load_file(file)
    assert all(key.startswith(f"{run.component}.") for key in state) and len(state) == 2 * card["trained"]["layers"]
    with safe_open(file, "pt") as opened:
        told = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert (told[f"{run.component}.r"], told[f"{run.component}.lora_alpha"]) == (2, 3.0)


@some("flux", "wan_image_to_video")
def test_a_peft_adapter_makes_the_same(runs, name, tmp_path):
    from peft import PeftModel

    run, out = runs(name), tmp_path / "peft"
    export(run.folder, to="peft", out=out)
    family = load_family(run.base)
    setattr(family.pipeline, run.component, PeftModel.from_pretrained(family.denoiser, out).get_base_model())
    same(run, family)
    told = json.loads((out / "adapter_config.json").read_text())
    assert (told["r"], told["lora_alpha"], told["base_model_name_or_path"]) == (2, 3.0, str(run.base))


@some("sd35", "skyreels")
@pytest.mark.parametrize("train", ["lora", "full"])
def test_a_full_folder_makes_the_same(runs, name, train, tmp_path):
    run, out = runs(name, train), tmp_path / "full"
    card = export(run.folder, to="full", out=out)
    family = load_family(out)
    same(run, family)
    assert not getattr(family.denoiser, "peft_config", None)
    base, now = (
        {p.relative_to(f).as_posix(): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in (run.base, out)
    )
    changed = {path for path in base if base[path] != now[path] and not path.startswith(f"{run.component}/")}
    assert changed <= {"model_index.json"}, "what was not trained is the base's, byte for byte"
    assert card["base"]["sha256"] == weights_sha256(run.base / run.component)
    assert card["trained"]["train"] == train and ("rank" in card["trained"]) == (train == "lora")


def test_the_average_is_what_is_exported(runs, tmp_path):
    run = runs("flux", average=True)
    card = export(run.folder / "checkpoints" / "step_000003", to="diffusers-lora", out=tmp_path / "lora")
    family = load_family(run.base)
    family.pipeline.load_lora_weights(str(tmp_path / "lora"), weight_name="pytorch_lora_weights.safetensors")
    same(run, family)
    assert (card["run"]["weights"], card["run"]["step"]) == ("running average", 3)
    assert card["run"]["sha256"] == file_sha256(run.folder / "checkpoints" / "step_000003" / "average.safetensors")


def test_bf16_halves_the_weights_but_for_what_stays_fp32(runs, tmp_path):
    run = runs("wan", "full")
    export(run.folder, to="full", out=tmp_path / "full", dtype="bf16")
    kinds = {n: t.dtype for n, t in load_file(next((tmp_path / "full" / "transformer").glob("*.safetensors"))).items()}
    assert kinds["blocks.0.attn1.to_q.weight"] == torch.bfloat16
    assert kinds["blocks.0.scale_shift_table"] == kinds["blocks.0.norm2.weight"] == torch.float32
    trained, loaded = find_trained(run.folder).weights, load_family(tmp_path / "full").denoiser.state_dict()
    for key, value in trained.items():
        torch.testing.assert_close(loaded[key], value, atol=0, rtol=2**-8)
    export(runs("wan").folder, to="peft", out=tmp_path / "peft", dtype="bf16")
    state = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert {value.dtype for value in state.values()} == {torch.bfloat16}


# ComfyUI


def back(tensors, layers, family, widths, rank):
    """Read a file in ComfyUI's layout again: A and B of every one of diffusers' layers, and alpha."""
    found = {}
    for native, parts in native_layers(layers, family).items():
        name = "lora_unet_" + native.replace(".", "_")
        down, up = tensors.pop(f"{name}.lora_down.weight"), tensors.pop(f"{name}.lora_up.weight")
        alpha = tensors.pop(f"{name}.alpha")
        here = [part for part in parts if part in layers]
        blocks = dict(zip(parts, up.split([widths[part] for part in parts]), strict=True))
        for i, part in enumerate(here):
            columns = slice(i * rank, (i + 1) * rank)
            found[part] = (down[columns], blocks[part][:, columns], float(alpha) / len(here))
            rest = torch.cat([blocks[part][:, : i * rank], blocks[part][:, (i + 1) * rank :]], 1)
            assert not rest.any(), "adapters side by side do not mix"
        assert not any(blocks[part].any() for part in parts if part not in here)
    assert not tensors, "every key was read"
    return found


@ALL
def test_comfyui_keys_go_round(runs, name, tmp_path):
    run, out = runs(name), tmp_path / "comfyui"
    card = export_model(run.folder, to="comfyui", out=out)
    trained, file = find_trained(run.folder), out / "comfyui_lora.safetensors"
    widths = {n: m.out_features for n, m in trained.denoiser().named_modules() if hasattr(m, "out_features")}
    family = FAMILIES.get(trained.pipeline).name
    read = back(load_file(file), list(trained.adapters), family, widths, 2)
    assert set(read) == set(trained.adapters)
    for layer, (a, b) in trained.adapters.items():
        assert torch.equal(read[layer][0], a) and torch.equal(read[layer][1], b) and read[layer][2] == 3.0
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["note"] == NOT_OPENED == card["note"]
    assert plain(NOT_OPENED) in (out / "README.md").read_text()


NAMES = {  # as in the checkpoints that the models' authors published
    "sd": "down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0",
    "sdxl": "up_blocks_0_attentions_1_transformer_blocks_1_ff_net_0_proj",
    "sd35": "joint_blocks_1_x_block_attn2_qkv",
    "flux": "single_blocks_1_linear1",
    "qwen": "transformer_blocks_0_attn_add_q_proj",
    "wan": "blocks_1_cross_attn_o",
    "wan_image_to_video": "blocks_0_cross_attn_v_img",
    "hunyuan_video": "txt_in_individual_token_refiner_blocks_0_self_attn_qkv",
    "skyreels": "double_blocks_0_txt_mlp_2",
}


@ALL
def test_comfyui_names_are_the_published_ones(runs, name):
    trained = find_trained(runs(name).folder)
    native = native_layers(list(trained.adapters), FAMILIES.get(trained.pipeline).name)
    assert NAMES[name] in {layer.replace(".", "_") for layer in native}


@pytest.mark.parametrize(
    "name", ["sd", pytest.param("sdxl", marks=pytest.mark.slow), "qwen", "wan", "wan_image_to_video"]
)
def test_what_diffusers_makes_of_the_comfyui_file_is_the_same(runs, name, tmp_path):
    """diffusers' own converters of kohya's layout are an independent reading of the names."""
    run = runs(name)
    export(run.folder, to="comfyui", out=tmp_path / "comfyui")
    family = load_family(run.base)
    family.pipeline.load_lora_weights(str(tmp_path / "comfyui"), weight_name="comfyui_lora.safetensors")
    same(run, family)


def test_what_diffusers_makes_of_fluxs_fused_layers_is_the_same(runs):
    """diffusers reads single blocks at FLUX.1's own width, so those are drawn at that width."""
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers as convert

    widths = {f"transformer_blocks.3.attn.{n}": 5 for n in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj")}
    widths |= {"transformer_blocks.3.attn.add_v_proj": 5, "transformer_blocks.3.attn.to_out.0": 5}
    widths |= {"transformer_blocks.3.ff.net.0.proj": 7, "transformer_blocks.3.ff_context.net.2": 7}
    widths |= {f"single_transformer_blocks.4.{n}": 3072 for n in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_out")}
    widths["single_transformer_blocks.4.proj_mlp"] = 12288
    generator = torch.Generator().manual_seed(0)
    pairs = {
        n: (torch.randn(2, 3, generator=generator), torch.randn(w, 2, generator=generator)) for n, w in widths.items()
    }
    read = convert(to_comfyui(pairs, 3.0, "flux", widths))
    assert len(read) == 2 * len(pairs)
    for layer, (a, b) in pairs.items():
        product = read[f"transformer.{layer}.lora_B.weight"] @ read[f"transformer.{layer}.lora_A.weight"]
        torch.testing.assert_close(product, 1.5 * b @ a)


def test_a_fused_layer_with_adapters_on_a_part_of_it():
    a, b = torch.ones(1, 2), torch.tensor([[2.0], [3.0]])
    widths = {f"transformer_blocks.0.attn.{n}": 2 for n in ("to_q", "to_k", "to_v")}
    made = to_comfyui({"transformer_blocks.0.attn.to_v": (a, b)}, 4.0, "sd3", widths)
    name = "lora_unet_joint_blocks_0_x_block_attn_qkv"
    assert made[f"{name}.lora_up.weight"].flatten().tolist() == [0, 0, 0, 0, 2, 3]
    assert (made[f"{name}.lora_down.weight"].tolist(), float(made[f"{name}.alpha"])) == ([[1, 1]], 4.0)


def test_comfyui_refuses_what_has_no_name_there():
    with pytest.raises(ModelError, match=r"no name in ComfyUI's layout \(transformer_blocks.0.norm1.linear\)"):
        native_layers(["transformer_blocks.0.norm1.linear"], "flux")
    with pytest.raises(ModelError, match="no ComfyUI layout of the family mine"):
        native_layers(["a"], "mine")
    assert {kind.name for kind in map(FAMILIES.get, FAMILIES)} == set(KEY_MAPS)


# Refusals, and what is left behind


@pytest.mark.parametrize("layout", ["diffusers-lora", "peft", "comfyui"])
def test_a_full_fine_tune_is_no_adapter(runs, layout, tmp_path):
    with pytest.raises(ConfigError, match=f"{layout} cannot hold(.|\n)*Use --to full"):
        export(runs("sd", "full").folder, to=layout, out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_bad_input_is_named(runs, tmp_path):
    run = runs("sd")
    with pytest.raises(ConfigError, match="Did you mean 'diffusers-lora'"):
        export(run.folder, to="diffusers_lora", out=tmp_path / "out")
    with pytest.raises(ConfigError, match="--dtype"):
        export(run.folder, to="peft", out=tmp_path / "out", dtype="fp16")
    with pytest.raises(CheckpointError, match="nothing trained here"):
        export(run.base, to="peft", out=tmp_path / "out")
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(ConfigError, match=r"something there already \(--out"):
        export(run.folder, to="peft", out=tmp_path / "taken")
    copy = shutil.copytree(run.folder, tmp_path / "run")
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace(str(run.base), str(tmp_path / "gone")))
    with pytest.raises(ModelError, match="there is no such folder"):
        export(copy, to="peft", out=tmp_path / "out")
    (copy / "checkpoints" / "step_000003" / "model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="wrong size"):
        export(copy, to="peft", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_is_whole_or_not_there(runs, tmp_path, monkeypatch):
    run = runs("sd")

    def full(trained, folder, dtype):
        (folder / "half").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setitem(exporting.LAYOUTS, "full", full)
    with pytest.raises(ConfigError, match="could not be written(.|\n)*No space left"):
        export(run.folder, to="full", out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_verb(runs, tmp_path, capsys):
    run, out = runs("flux"), tmp_path / "out"
    arguments = ["export", str(run.folder), "--to", "comfyui", "--out", str(out)]
    assert main([*arguments, "--dry-run"]) == 0 and not out.exists()
    assert re.search(r"step +3\b", capsys.readouterr().out)
    assert main([*arguments, "--json", str(tmp_path / "card.json")]) == 0
    assert NOT_OPENED in capsys.readouterr().out
    assert json.loads((tmp_path / "card.json").read_text()) == json.loads((out / "export.json").read_text())
    assert main(arguments) == 2 and "something there already" in capsys.readouterr().err
    assert main(["export", "--help"]) == 0 and "not opened in ComfyUI" in " ".join(capsys.readouterr().out.split())
