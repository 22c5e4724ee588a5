"""Engines under which no process has whole weights: torch's FSDP2, and ZeRO 3 of DeepSpeed.

Weights, frozen ones too, gradients and optimizer are split over the processes. A forward or backward pass gathers what
it needs, so all processes take it together; `gathered` holds the weights whole for a while, within which each may do
what it likes. Each process saves its pieces, and a run goes on under any number of processes, or another engine.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from align.checkpoint import Piece
from align.config import OptimizerConfig
from align.engine import MOMENTS, DeepSpeedEngine, ReplicaEngine, build_optimizer, read_settings
from align.launch import World, meeting

if TYPE_CHECKING:
    from torch import Tensor, nn


def shard_module(module: nn.Module) -> list[Any]:
    """Split a module's parameters over all processes with `fully_shard`, in place; return what is gathered one by one.

    Each process keeps a share of dimension 0 of every parameter, on its GPU where there is one. The entries of the
    outermost `nn.ModuleList`s, a transformer's blocks, are gathered and freed one by one, then the rest. The module
    itself comes last. Gradients are averaged over processes.
    """
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
    blocks = blocks_of(module)
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh, reshard_after_forward=True)
    return [*blocks, module]


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """Return the entries of the outermost lists of modules that have parameters."""
    import torch

    found: list[nn.Module] = []
    for child in module.children():
        if isinstance(child, torch.nn.ModuleList):
            found += [block for block in child if next(block.parameters(), None) is not None]
        else:
            found += blocks_of(child)
    return found


class FSDP2Engine:
    """Weights, gradients and optimizer are split with torch's `fully_shard`, on GPUs or, over gloo, on CPUs.

    Gradients meet in the last backward pass of an update; until then each process keeps a whole one of what trains.

    Args:
        module: is split, in place.
        trainable: returns the trained weights by name, once it is split; those of other modules stay whole.
        config: the optimizer.
        world: of several processes.
    """

    name, lockstep = "fsdp2", True

    def __init__(
        self, module: nn.Module, trainable: Callable[[], Mapping[str, nn.Parameter]], config: OptimizerConfig,
        world: World,
    ) -> None:  # fmt: skip
        self.world, self.max_norm = world, config.max_grad_norm
        with meeting():
            self.parts = shard_module(module)
        self.parameters = dict(trainable())
        self._held = {name: _local(p) for name, p in self.parameters.items()}
        self.optimizer = build_optimizer(self._held, config)

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Accumulate the gradient of `loss`; in the last pass of an update, add up over all processes."""
        self.parts[-1].set_requires_gradient_sync(last)
        (loss * self.world.size).backward()  # FSDP2 averages over processes

    def reduce(self) -> Tensor:
        """Add the gradients of what is whole up over all processes; return the norm of all."""
        import torch

        device = next(iter(self._held.values())).device  # NCCL adds up nothing that is on the CPU
        squares, alike = torch.zeros((), device=device), torch.zeros((), device=device)
        for name, parameter in self.parameters.items():
            held, split = self._held[name], _is_split(parameter)
            if not split:
                gradient = torch.zeros_like(held) if parameter.grad is None else parameter.grad / self.world.size
                held.grad = self.world.add(gradient)
            elif parameter.grad is not None:
                held.grad = _local(parameter.grad)
            if held.grad is not None:
                square = held.grad.float().square().sum()
                squares, alike = (squares + square, alike) if split else (squares, alike + square)
        return (self.world.add(squares) + alike).sqrt()

    def step(self, norm: Tensor) -> None:
        """Clip a gradient of this norm, take the optimizer step, and forget the gradient."""
        import torch

        if self.max_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._held.values(), self.max_norm, norm)
        self.optimizer.step()
        for tensor in (*self._held.values(), *self.parameters.values()):
            tensor.grad = None

    def pieces(self) -> dict[str, Piece]:
        """Return what this process holds of the trained weights."""
        return {name: self._piece(name, held) for name, held in self._held.items()}

    def _piece(self, name: str, values: Tensor) -> Piece:
        """Return values of the held part of a weight with their place: `fully_shard` splits as `torch.chunk` does."""
        shape = tuple(self.parameters[name].shape)
        if not _is_split(self.parameters[name]):
            return Piece(values, 0, shape, alike=True)
        rows = min(math.ceil(shape[0] / self.world.size) * self.world.rank, shape[0])
        return Piece(values, rows * math.prod(shape[1:]), shape)

    def optimizer_state(self) -> dict[str, Piece]:
        """Return what this process holds of the optimizer's state."""
        found: dict[str, Piece] = {}
        for i, (name, held) in enumerate(self._held.items()):
            state = self.optimizer.state.get(held, {})
            found |= {f"{i}.{slot}": self._piece(name, state[slot]) for slot in MOMENTS if slot in state}
            found |= {f"{i}.step": Piece(state["step"], 0, (), alike=True)} if state else {}
        return found

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """Set this process's part of whole tensors."""
        for i, (name, piece) in enumerate(self.pieces().items()):
            if f"{i}.step" in state:
                moments = {slot: piece.of(state[f"{i}.{slot}"]).to(piece.values).clone() for slot in MOMENTS}
                self.optimizer.state[self._held[name]] = {"step": state[f"{i}.step"].clone(), **moments}

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Have the weights whole within the block, where no process needs the others for a forward pass."""
        module = self.parts[-1]
        with meeting():
            module.set_reshard_after_forward(False)
            for part in self.parts:
                part.unshard()
        try:
            yield
        finally:
            module.set_reshard_after_forward(True)
            for part in self.parts:
                part.reshard()


def _is_split(tensor: Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def _local(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor, in the same memory."""
    tensor = tensor.detach()
    return tensor.to_local() if _is_split(tensor) else tensor


def is_sharded(module: nn.Module) -> bool:
    """Whether the weights of a module are split over the processes, by FSDP2 or ZeRO 3."""
    return hasattr(module, "unshard") or any(hasattr(p, "ds_tensor") for p in module.parameters())


def deepspeed_engine(
    module: nn.Module, parameters: Mapping[str, nn.Parameter], config: OptimizerConfig, world: World, settings: str
) -> DeepSpeedEngine:
    """Return the engine of DeepSpeed that settings ask for; see `DeepSpeedEngine`."""
    options, _ = read_settings(settings)
    kind = Zero3Engine if options["zero_optimization"]["stage"] == 3 else DeepSpeedEngine
    return kind(module, parameters, config, world, settings)


class Zero3Engine(DeepSpeedEngine):
    """ZeRO 3 of DeepSpeed: weights, gradients and optimizer are split, each weight by its flat values.

    Gradients meet once an update; until then each process keeps a whole one of what trains. See `DeepSpeedEngine`.

    Args:
        parameters: the trained weights by name; those of other modules come last, and stay whole.
    """

    lockstep = True
    stages = (3,)

    def __init__(
        self, module: nn.Module, parameters: Mapping[str, nn.Parameter], config: OptimizerConfig, world: World,
        settings: str,
    ) -> None:  # fmt: skip
        inside = {id(p) for p in module.parameters()}
        split = {name: p for name, p in parameters.items() if id(p) in inside}
        others = {name: p for name, p in parameters.items() if name not in split}
        super().__init__(module, split, config, world, settings)
        self.others = ReplicaEngine(others, config, world) if others else None
        self._max_norm, self._own_norm = config.max_grad_norm, 0.0

    def reduce(self) -> Tensor:
        """Add the gradients up over all processes; return the norm of the sum."""
        import torch
        from deepspeed.utils import safe_get_local_grad

        self._accumulate()
        self._open = False
        with meeting():
            self._accumulating.close()  # leaving the block exchanges the gradients
        gradients = [self._part(p, safe_get_local_grad(p)).values for p in self.parameters]
        norm = self.world.add(torch.stack([gradient.square().sum() for gradient in gradients]).sum()).sqrt()
        self._own_norm = float(norm)
        if self.others is None:
            return norm
        for parameter in self.others.parameters:
            if parameter.grad is not None:
                parameter.grad /= self.world.size  # as DeepSpeed does with its own
        return torch.hypot(norm, self.others.reduce())

    def step(self, norm: Tensor) -> None:
        """Clip a gradient of this norm, take the optimizer step, and forget the gradient."""
        if self._max_norm is not None:  # DeepSpeed knows the norm of its own part, and clips by that
            self.engine.optimizer.clip_grad = self._max_norm * (self._own_norm + 1e-6) / (float(norm) + 1e-6)
        super().step(norm)
        if self.others is not None:
            self.others.step(norm)

    def pieces(self) -> dict[str, Piece]:
        """Return what this process holds of the trained weights."""
        split = {name: self._part(p, p.ds_tensor) for name, p in self.named.items()}
        return split if self.others is None else split | self.others.pieces()

    def optimizer_state(self) -> dict[str, Piece]:
        """Return what this process holds of the optimizer's state."""
        from deepspeed.utils import safe_get_local_optimizer_state

        state, found = list(self.engine.optimizer.optimizer.state.values()), {}
        for name, value in () if self.others is None else self.others.optimizer_state().items():
            index, _, slot = name.partition(".")
            found[f"{len(self.parameters) + int(index)}.{slot}"] = Piece(value, 0, tuple(value.shape), alike=True)
        for i, p in enumerate(self.parameters if state else ()):
            found |= {f"{i}.{slot}": self._part(p, safe_get_local_optimizer_state(p, slot)) for slot in MOMENTS}
            found[f"{i}.step"] = Piece(state[0]["step"].detach().clone().float().reshape(()), 0, (), alike=True)
        return found

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """Set this process's part of whole tensors, and the float32 weights from the model's."""
        import torch
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        zero, count = self.engine.optimizer, len(self.parameters)
        if self.others is not None:
            places = ((*name.partition("."), name) for name in state)
            self.others.load_optimizer_state(
                {f"{int(i) - count}.{slot}": state[name] for i, _, slot, name in places if int(i) >= count}
            )
        for flat in zero.fp32_partitioned_groups_flat if state else ():  # the state that a first step would have made
            moments = {slot: torch.zeros_like(flat, requires_grad=False) for slot in MOMENTS}
            zero.optimizer.state[flat] = {"step": state["0.step"].clone(), **moments}
        for i, p in enumerate(self.parameters):
            padded = torch.zeros_like(p.ds_tensor, dtype=torch.float32)
            part = self._part(p, padded)
            part.values.copy_(self._part(p, p.ds_tensor).values)
            safe_set_local_fp32_param(p, padded)
            for slot in MOMENTS if state else ():
                part.values.copy_(part.of(state[f"{i}.{slot}"]))
                safe_set_local_optimizer_state(p, padded, slot)
        with self.gathered():  # what DeepSpeed kept whole is gathered again
            pass

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Have the weights whole within the block, where no process needs the others for a forward pass."""
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters, ZeroParamStatus

        every, offload = list(self.engine.module.parameters()), self.engine.optimizer.parameter_offload
        kept = [p for p in every if p.ds_status == ZeroParamStatus.AVAILABLE]
        hooks = [offload.fwd_pre_hook, *offload.forward_hooks, *offload.backward_hooks]
        with contextlib.ExitStack() as stack:
            with meeting():
                if kept:  # DeepSpeed keeps small weights whole: they are gathered anew, as their pieces may be others
                    kept[0].partition(param_list=kept)
                stack.enter_context(GatheredParameters(every))
            taken = [(hook.hooks_dict_ref(), hook.id) for hook in hooks]  # they gather, free, and compare processes
            held = [(where, number, where.pop(number)) for where, number in taken]
            try:
                yield
            finally:
                for where, number, hook in held:
                    where[number] = hook

    def _part(self, parameter: Any, values: Tensor) -> Piece:
        """Return values of the held part of a weight with their place, without what fills parts up to one size."""
        size, count = parameter.ds_tensor.numel(), parameter.ds_numel
        first = min(size * self.world.rank, count)
        held = values.detach().view(-1).narrow(0, 0, min(size, count - first))
        return Piece(held, first, tuple(parameter.ds_shape))
