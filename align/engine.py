"""What carries an update out: accumulate, add up over processes, check, clip, step. One process, several, or ZeRO.

Gradients are accumulated where they arise and exchanged once an update. The weights of one update's losses
add up to 1 over all processes, so the gradient is the same however its samples are spread.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from align.checkpoint import Piece
from align.config import OptimizerConfig
from align.errors import ConfigError
from align.launch import World, meeting
from align.recipes import list_engines, read_engine
from align.registry import suggest

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


MOMENTS = ("exp_avg", "exp_avg_sq")
SPLITTING = ("dance_grpo", "fit")
"""Trainers on the loop of `align.run` that go on where no process has whole weights."""


def build_optimizer(parameters: Mapping[str, Tensor], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Build AdamW over the trained parameters."""
    import torch

    return torch.optim.AdamW(
        list(parameters.values()),
        lr=config.lr,
        betas=tuple(config.betas),
        eps=config.eps,
        weight_decay=config.weight_decay,
    )


class Engine(Protocol):
    """Carries updates out. `optimizer_state` and `load_optimizer_state` speak of whole tensors, `{index}.{slot}`
    by the place of each weight, so that a run can go on under another engine or another number of processes.

    `lockstep`: the weights are split, and the processes meet within a model's forward or backward pass, so none may
    take or leave one alone. The optimizer's state then comes in pieces.
    """

    name: str
    lockstep: bool

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Accumulate the gradient of `loss`; `last`: of this update, alike on every process."""

    def reduce(self) -> Tensor:
        """Add the gradients up over all processes; return the norm of the sum."""

    def step(self, norm: Tensor) -> None:
        """Clip a gradient of this norm, take the optimizer step, and forget the gradient."""

    def pieces(self) -> dict[str, Piece]:
        """Return what this process holds of the trained weights, to be written to in place."""

    def optimizer_state(self) -> Mapping[str, Tensor | Piece]:
        """Return the optimizer's state. Every process must call it."""

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """Set what `optimizer_state` returned."""

    def gathered(self) -> contextlib.AbstractContextManager[None]:
        """Have the weights whole within the block. Every process must call it."""


class _WholeWeights:
    """Every process holds all trained weights, at all times."""

    lockstep = False
    named: Mapping[str, nn.Parameter]

    def pieces(self) -> dict[str, Piece]:
        """Return the trained weights."""
        return {name: Piece(p.detach(), 0, tuple(p.shape), alike=True) for name, p in self.named.items()}

    def gathered(self) -> contextlib.AbstractContextManager[None]:
        """Weights are whole at all times."""
        return contextlib.nullcontext()


class ReplicaEngine(_WholeWeights):
    """Every process holds all trained weights and their optimizer: one process, or plain data parallelism.

    Args:
        optimizer: what takes the steps, AdamW as configured when None. Where it has `mask_gradients`, that is called
            on the whole gradient, before its norm is taken.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], config: OptimizerConfig, world: World,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:  # fmt: skip
        self.name = "single" if world.size == 1 else "data_parallel"
        self.named, self.world, self.max_norm = parameters, world, config.max_grad_norm
        self.parameters = list(parameters.values())
        self.optimizer = build_optimizer(parameters, config) if optimizer is None else optimizer
        self._mask = getattr(self.optimizer, "mask_gradients", None)

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Accumulate the gradient of `loss`."""
        loss.backward()

    def reduce(self) -> Tensor:
        """Add the gradients up over all processes; return the norm of the sum."""
        import torch

        if self.world.size > 1:
            _fill(self.parameters)
            flat = self.world.add(torch.cat([p.grad.flatten() for p in self.parameters]))
            for p, part in zip(self.parameters, flat.split([p.numel() for p in self.parameters]), strict=True):
                p.grad.copy_(part.view_as(p))
        if self._mask is not None:
            self._mask()
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())

    def step(self, norm: Tensor) -> None:
        """Clip a gradient of this norm, take the optimizer step, and forget the gradient."""
        import torch

        if self.max_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.max_norm, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def optimizer_state(self) -> dict[str, Tensor]:
        """Return the optimizer's state."""
        state = self.optimizer.state_dict()["state"]
        return {f"{i}.{slot}": value for i, slots in state.items() for slot, value in slots.items()}

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """Set what `optimizer_state` returned."""
        slots: dict[int, dict[str, Tensor]] = {}
        for name, value in state.items():
            index, _, slot = name.partition(".")
            slots.setdefault(int(index), {})[slot] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": slots, "param_groups": groups})


class DeepSpeedEngine(_WholeWeights):
    """ZeRO stage 1 or 2 of DeepSpeed: optimizer state, and gradients, are split over the processes.

    Args:
        module: the denoiser.
        parameters: its trained weights by name.
        config: the optimizer.
        world: must be of the launcher's making.
        settings: a name in configs/deepspeed, such as "zero2", or a JSON file in DeepSpeed's own format.
            Batch sizes, clipping and the optimizer come from `align`'s configuration.

    Raises:
        ConfigError: DeepSpeed or its launcher is missing, or settings that this loop cannot run under.
    """

    stages: tuple[int, ...] = (1, 2)

    def __init__(
        self,
        module: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        config: OptimizerConfig,
        world: World,
        settings: str,
    ) -> None:
        options = require_deepspeed(settings, self.stages)
        try:
            import deepspeed
        except ImportError as error:
            raise ConfigError("DeepSpeed is not installed", where="--deepspeed", do="pip install deepspeed") from error
        import torch

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        if not torch.cuda.is_available():  # an accelerated CPU collective would need a compiler; gloo does without
            with contextlib.suppress(AttributeError, ImportError, KeyError):
                deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", verbose=False)
        self.named, self.parameters, self.world = parameters, list(parameters.values()), world
        self.engine, *_ = deepspeed.initialize(
            model=module,
            model_parameters=self.parameters,
            optimizer=build_optimizer(parameters, config),
            config={
                **options,
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "gradient_clipping": config.max_grad_norm or 0.0,
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
                "steps_per_print": 1 << 62,
            },
        )
        self.name = f"deepspeed_zero{self.engine.zero_optimization_stage()}"
        self._accumulating = contextlib.ExitStack()
        self._open = False

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Accumulate the gradient of `loss`."""
        self._accumulate()
        self.engine.backward(loss * self.world.size)  # DeepSpeed averages over processes

    def reduce(self) -> Tensor:
        """Add the gradients up over all processes; return the norm of the sum."""
        import torch

        self._accumulate()
        _fill(self.parameters)
        self._open = False
        with meeting():
            self._accumulating.close()  # leaving the block exchanges the gradients
            norm = torch.as_tensor(self.engine.optimizer.scaled_global_norm())
        return torch.where(norm < 0, torch.nan, norm)  # DeepSpeed says -1 where it is not finite, and skips the update

    def step(self, norm: Tensor) -> None:
        """Take the optimizer step; DeepSpeed clips by the same norm."""
        with meeting():
            self.engine.step()

    def optimizer_state(self) -> Mapping[str, Tensor | Piece]:
        """Return the optimizer's state, gathered. Every process must call it."""
        from deepspeed.utils import safe_get_full_optimizer_state

        found, flat = {}, list(self.engine.optimizer.optimizer.state.values())
        for i, parameter in enumerate(self.parameters if flat else ()):
            for slot in MOMENTS:
                found[f"{i}.{slot}"] = safe_get_full_optimizer_state(parameter, slot).detach().clone()
            found[f"{i}.step"] = flat[0]["step"].detach().clone().float().reshape(())
        return found

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """Set what `optimizer_state` returned, and the float32 weights from the model's."""
        import torch
        from deepspeed.utils import safe_set_full_optimizer_state

        zero = self.engine.optimizer
        zero.refresh_fp32_params()
        if not state:
            return
        for flat in zero.single_partition_of_fp32_groups:  # the state that a first step would have made
            moments = {slot: torch.zeros_like(flat) for slot in MOMENTS}
            zero.optimizer.state[flat] = {"step": state["0.step"].clone(), **moments}
        zero._lazy_init_hp_params_optimizer_state()
        for name, value in state.items():
            index, _, slot = name.partition(".")
            if slot in MOMENTS:
                safe_set_full_optimizer_state(self.parameters[int(index)], value, slot)

    def _accumulate(self) -> None:
        if not self._open:
            self._accumulating.enter_context(self.engine.coalesce_grad_reduction())
            self._open = True


def _fill(parameters: list[nn.Parameter]) -> None:
    """Give a zero gradient to weights without one: a process that holds no sample of an update still takes part."""
    import torch

    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def require_engine(
    trainer: str, deepspeed: str | None, *, fsdp: bool = False, launching: int | None = None
) -> str | None:
    """Refuse an engine that a run cannot have; return the name of one that splits weights, None for another.

    Args:
        trainer: of the configuration.
        deepspeed: settings, by name or file.
        launching: how many processes are about to be started; None where this one is of those that train.

    Raises:
        ConfigError: two engines, unusable settings, no launcher, one process for FSDP2, or an engine that splits
            weights where the trainer needs them whole.
    """
    read = require_deepspeed if launching is None else deepspeed_settings
    stage = 0 if deepspeed is None else read(deepspeed)["zero_optimization"]["stage"]
    if not fsdp and stage != 3:
        return None
    require_splitting(trainer, "--fsdp" if fsdp else f"--deepspeed {deepspeed}")
    if fsdp:
        require_fsdp(deepspeed, launching or int(os.environ.get("WORLD_SIZE", "1")))
    return "FSDP2" if fsdp else "ZeRO 3"


def require_fsdp(deepspeed: str | None, processes: int) -> None:
    """Refuse FSDP2 beside DeepSpeed, and for one process.

    Raises:
        ConfigError: saying so.
    """
    if deepspeed is not None:
        raise ConfigError(
            "FSDP2 and DeepSpeed do not go together", where="--fsdp", why="each splits the weights in its own way",
            do="Give one of --fsdp and --deepspeed",
        )  # fmt: skip
    if processes == 1:
        raise ConfigError(
            "FSDP2 needs several processes", where="--fsdp", why="there is one, which would hold everything",
            do="Add --launch torchrun --nproc N",
        )  # fmt: skip


def require_splitting(trainer: str, where: str) -> None:
    """Refuse an engine that splits weights, asked for at `where`, to a trainer that needs them whole.

    Raises:
        ConfigError: naming the trainer.
    """
    if trainer not in SPLITTING:
        raise ConfigError(
            f"The trainer {trainer} needs whole weights", where=where,
            why="it keeps and swaps copies of them, which FSDP2 and ZeRO 3 leave to no process",
            do="Use --deepspeed zero2",
        )  # fmt: skip


def require_deepspeed(settings: str, stages: tuple[int, ...] = (1, 2, 3)) -> dict[str, Any]:
    """Return the settings this process is to train under, refusing what can be seen at once.

    Raises:
        ConfigError: unusable settings, or no launcher.
    """
    options = deepspeed_settings(settings, stages)
    if "RANK" not in os.environ or "MASTER_ADDR" not in os.environ:
        raise ConfigError(
            "ZeRO needs a launcher", where=f"--deepspeed {settings}",
            do="Add --launch deepspeed --nproc N, or leave --deepspeed out to train in one process",
        )  # fmt: skip
    return options


def deepspeed_settings(settings: str, stages: tuple[int, ...] = (1, 2, 3)) -> dict[str, Any]:
    """Read and check DeepSpeed settings of a run on our own loop, by name or file.

    Raises:
        ConfigError: no such settings, not JSON, mixed precision (which `model.dtype` decides), or a stage other
            than `stages`.
    """
    options, where = read_settings(settings, stages)
    zero = options["zero_optimization"]
    options["zero_optimization"] = {key: value for key, value in zero.items() if value != "auto"}  # DeepSpeed's default
    for half in ("fp16", "bf16"):
        if options.get(half, {}).get("enabled"):
            raise ConfigError(
                f"DeepSpeed's own {half} would round the trained weights", where=f"{where}, {half}",
                do="Remove it; model.dtype: bf16 computes in bfloat16 over float32 weights",
            )  # fmt: skip
    return options


def read_settings(settings: str, stages: tuple[int, ...] = (1, 2, 3)) -> tuple[dict[str, Any], str]:
    """Read DeepSpeed settings by name or file; return them and where they stand.

    Raises:
        ConfigError: no such settings, not a JSON object, or a stage that is not one of `stages`.
    """
    if settings in list_engines():
        text, where = read_engine(settings), f"configs/deepspeed/{settings}.json"
    elif Path(settings).is_file():
        text, where = Path(settings).read_text(encoding="utf-8"), settings
    else:
        raise ConfigError(
            f"There are no DeepSpeed settings {settings!r}", where="--deepspeed", do=suggest(settings, list_engines())
        )
    try:
        options = json.loads(text)
        stage = options.get("zero_optimization", {}).get("stage", 0)
    except (ValueError, AttributeError) as error:
        raise ConfigError("DeepSpeed settings are one JSON object", where=where, why=str(error)) from error
    require_stage(stage, where, stages)
    return options, where


def require_stage(stage: Any, where: str, stages: tuple[int, ...] = (1, 2, 3)) -> None:
    """Refuse a stage that is not one of `stages`."""
    if stage not in stages:
        raise ConfigError(
            f"ZeRO stage {stage} is not supported here", where=f"{where}, zero_optimization.stage",
            do=f"Use one of {', '.join(map(str, stages))}; stage 0 is `--launch torchrun`",
        )  # fmt: skip
