"""FSDP2 for language models: torch's `fully_shard` over the processes of a run, on GPUs or, over gloo, on CPUs.

The model is split before `transformers.Trainer` sees it, whose Accelerator is asked for mixed precision alone: on a CPU
accelerate's own FSDP becomes data parallelism without a word. Every parameter is checked to be split.

Each process writes its share of the optimizer as safetensors. They are put together again a tensor at a time, so that a
run goes on under any number of processes.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from align.errors import CheckpointError, ModelError
from align.launch import World

FOLDER = "fsdp2"
"""Of a checkpoint: where the shares of the optimizer are."""

_MOMENTS = ("exp_avg", "exp_avg_sq")


def shard_module(module: nn.Module) -> nn.Module:
    """Split a module's parameters over all processes with `fully_shard`, in place, and return it.

    Each process keeps a share of dimension 0 of every parameter, on its GPU where there is one. The entries of the
    outermost `nn.ModuleList`s, a transformer's blocks, are gathered and freed one by one; what is left is gathered for
    a whole forward pass, also by `generate`. Gradients are averaged over processes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
    for block in _blocks(module):
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh, reshard_after_forward=True)
    if hasattr(module, "generate"):
        register_fsdp_forward_method(module, "generate")
    return module


def _blocks(module: nn.Module) -> list[nn.Module]:
    """Return the entries of the outermost lists of modules that have parameters."""
    found: list[nn.Module] = []
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            found += [block for block in child if next(block.parameters(), None) is not None]
        else:
            found += _blocks(child)
    return found


def require_sharded(model: nn.Module) -> None:
    """Refuse to train a model of which a parameter is whole.

    Raises:
        ModelError: naming it.
    """
    from torch.distributed.tensor import DTensor

    whole = next((name for name, p in model.named_parameters() if not isinstance(p, DTensor)), None)
    if whole is not None or isinstance(model, nn.parallel.DistributedDataParallel):
        raise ModelError(
            "The model is not split over the processes", where="--fsdp",
            why=f"{whole or type(model).__name__} is whole on each of them",
            do="Report the releases of torch, transformers and accelerate; --deepspeed zero3 splits weights too",
        )  # fmt: skip


def whole_weights(model: nn.Module, *, trained: bool) -> dict[str, Tensor]:
    """Return a split model's whole tensors in the first process's main memory, and none elsewhere. All together.

    Args:
        trained: leave out what does not train.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    how = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained)
    return get_model_state_dict(model, options=how)


def set_weights(model: nn.Module, whole: dict[str, Tensor], *, trained: bool) -> None:
    """Give a split model the values of whole tensors, which every process brings.

    Args:
        trained: `whole` has what trains alone.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    set_model_state_dict(model, whole, options=StateDictOptions(full_state_dict=True, strict=not trained))


def save_optimizer(model: nn.Module, optimizer: Any, scheduler: Any, folder: Path, world: World) -> None:
    """Write this process's share of an optimizer's state, by the names of the weights, and the schedule's.

    Args:
        folder: of the checkpoint.
    """
    from safetensors.torch import save_file

    root = folder / FOLDER
    root.mkdir(parents=True, exist_ok=True)
    shares = {}
    for name, parameter in model.named_parameters():
        for slot, value in optimizer.state.get(parameter, {}).items():
            local = value.to_local() if hasattr(value, "to_local") else value
            shares[f"{name}.{slot}"] = local.detach().cpu().contiguous()
    save_file(shares, root / f"optimizer_{world.rank:05d}.safetensors")
    if world.leads:
        (root / "schedule.json").write_text(json.dumps(scheduler.state_dict()), encoding="utf-8")


def load_optimizer(model: nn.Module, optimizer: Any, scheduler: Any, folder: Path) -> None:
    """Read what `save_optimizer` wrote, for this number of processes, whatever that one was.

    Raises:
        CheckpointError: shares of other weights.
    """
    from safetensors import safe_open
    from torch.distributed.tensor import distribute_tensor

    root = folder / FOLDER
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, "pt")) for path in sorted(root.glob("*.safetensors"))]
        saved = set(files[0].keys()) if files else set()
        foreign = saved - {f"{name}.{slot}" for name in trained for slot in ("step", *_MOMENTS)}
        if foreign or not saved:
            raise CheckpointError(
                "The optimizer's state is not that of the trained weights", where=str(root),
                why=f"it is of {min(foreign)}" if foreign else "there is none",
                do="Go on under the configuration that the run was started with",
            )  # fmt: skip
        for name, p in trained.items():
            if f"{name}.step" not in saved:  # it never had a gradient
                continue
            optimizer.state[p]["step"] = files[0].get_tensor(f"{name}.step")
            for slot in _MOMENTS:
                whole = torch.cat([file.get_tensor(f"{name}.{slot}") for file in files]).to(p.device)
                optimizer.state[p][slot] = distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None)
    scheduler.load_state_dict(json.loads((root / "schedule.json").read_text(encoding="utf-8")))
    for group, lr in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = lr
        for state in (optimizer.state.get(p, {}) for p in group["params"] if group.get("fused")):
            if "step" in state:
                state["step"] = state["step"].to(next(iter(group["params"])).device)
