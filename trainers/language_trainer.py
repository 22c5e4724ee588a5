"""`transformers.Trainer` with our batches, losses, guards and checkpoints.

It owns the loop: accumulation, distribution, mixed precision, schedules. Everything it would print, send, rotate or
write outside a staging folder is off.

A loss that is not finite is refused before its backward pass, and a gradient before the optimizer. Under DeepSpeed the
optimizer steps inside the backward pass of the last microbatch: DeepSpeed itself discards a step whose gradient is not
finite, and the run stops before that step is logged or saved. A version that steps all the same is told by its norm.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, SequentialSampler
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from align import checkpoint, guards, stops
from align.errors import GuardError
from align.sparsity.live import live_source
from align.sparsity.sources import Source
from align.sparsity.subnetwork import SubnetworkAdamW, read_places
from trainers.language_engine import zero_stage
from trainers.language_fsdp import load_optimizer, require_sharded, save_optimizer, set_weights, whole_weights
from trainers.language_logps import require_same_logps
from trainers.language_model import quiet, weights_folder
from trainers.language_objective import Models, Online, RowLosses, add_totals, microbatch
from trainers.language_reference import LogpCache, Reference
from trainers.sparsity import open_tracker

if TYPE_CHECKING:
    from align.sparsity.callback import Tracker
    from trainers.language import LanguageRun
    from trainers.language_session import Session

REFERENCE_TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
"""Largest |log-ratio| a token, in nats, before the first update."""


def training_arguments(run: LanguageRun, staging: Path) -> TrainingArguments:
    """Return what `transformers.Trainer` is told: everything it would write, print, send or rotate is off."""
    config, optimizer = run.config, run.config.optimizer
    schedule = {"constant": "constant_with_warmup"}.get(optimizer.schedule, optimizer.schedule)
    cpu = not torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(staging), per_device_train_batch_size=config.microbatch // run.world.size,
        gradient_accumulation_steps=run.accumulation, max_steps=run.steps, learning_rate=optimizer.lr,
        lr_scheduler_type=schedule, warmup_steps=round(optimizer.warmup * run.steps), adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1], adam_epsilon=optimizer.eps, weight_decay=optimizer.weight_decay,
        max_grad_norm=(optimizer.max_grad_norm or 0.0) if run.deepspeed else 0.0, seed=config.seed % 2**32,
        bf16=config.model.dtype == "bf16", use_cpu=cpu, ddp_backend="gloo" if cpu and run.world.size > 1 else None,
        ddp_find_unused_parameters=config.model.train_vision,
        deepspeed=run.deepspeed, logging_nan_inf_filter=False,
        save_strategy="no", logging_strategy="no", eval_strategy="no", report_to=[], disable_tqdm=True,
        remove_unused_columns=False,
        **_checkpointing(config.model.gradient_checkpointing),
    )  # fmt: skip


def _checkpointing(wanted: bool) -> dict[str, Any]:
    """Return how this release of transformers is told to recompute activations."""
    if not wanted:
        return {}
    new = "activation_checkpointing" in inspect.signature(TrainingArguments.__init__).parameters
    name = "activation_checkpointing" if new else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


class Microbatches(Dataset):
    """This process's part of every microbatch of a run, in order over all epochs."""

    def __init__(self, run: LanguageRun, cache: LogpCache | None) -> None:
        self.run, self.cache = run, cache

    def __len__(self) -> int:
        return self.run.steps * self.run.accumulation

    def __getitem__(self, index: int) -> dict[str, Any]:
        run = self.run
        epoch, place = divmod(index, run.per_epoch)
        plan, share = run.plan(epoch), run.world.share(run.config.microbatch)
        rows, partners = plan.rows[place], plan.partners[place]
        return microbatch(
            run.tokens, rows, rows[share.start : share.stop].tolist(), partners[share.start : share.stop].tolist(),
            self.cache, pad=run.tokenizer.pad_token_id, paired=run.objective.paired,
            mismatched=run.objective.mismatched,
        )  # fmt: skip


class AlignTrainer(transformers.Trainer):
    """`transformers.Trainer` with our batches, losses, guards and checkpoints.

    Args:
        run: what is trained.
        session: where it is written down.
        cache: reference log-probs that were computed before.
        reference: the model before training.
    """

    def __init__(
        self, run: LanguageRun, session: Session, cache: LogpCache | None, reference: Reference | None, **options: Any
    ) -> None:
        super().__init__(**options, callbacks=[_Commit(run, session, self)])
        self.remove_callback(PrinterCallback)
        self.loss_is_scaled_for_ga = True
        self.subnetwork: SubnetworkAdamW | None = None
        self.run, self.session, self.cache = run, session, cache
        self.expects_gradient = False
        self.models = Models(self.model, self.model, reference)
        if run.fsdp:  # the model is split already: no wrapper, and no move
            prepare = self.accelerator.prepare_model
            self.accelerator.prepare_model = functools.partial(prepare, device_placement=False, evaluation_mode=True)

    def get_train_dataloader(self) -> DataLoader:
        """Return this process's microbatches of the whole run, one at a time; resuming skips them unread."""
        data = Microbatches(self.run, self.cache)
        return DataLoader(data, batch_size=1, sampler=SequentialSampler(data), collate_fn=lambda items: items[0])

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """Return the microbatches of an optimizer step and their `Totals`, which are those of all processes."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        return batches, add_totals([batch["totals"] for batch in batches]) if batches else None

    def create_optimizer(self, *args: Any, **options: Any) -> torch.optim.Optimizer:
        """Build the Trainer's AdamW, or that of a mask, with the same weights left out of weight decay."""
        config = self.run.config
        if config.sparsity.mask is None or self.optimizer is not None:
            return super().create_optimizer(*args, **options)
        weights = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        places = read_places(config.sparsity.mask, weights)
        decayed = set(self.get_decay_parameter_names(self.model))
        ordered = sorted(weights, key=lambda name: name not in decayed)
        groups = [
            {"params": [weights[n] for n in ordered if (n in decayed) == decays], "weight_decay": decay}
            for decays, decay in ((True, config.optimizer.weight_decay), (False, 0.0))
        ]
        self.optimizer = self.subnetwork = SubnetworkAdamW(
            groups, [places[n] for n in ordered], lr=config.optimizer.lr, betas=tuple(config.optimizer.betas),
            eps=config.optimizer.eps,
        )  # fmt: skip
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Run a microbatch forward and backward; FSDP2's gradients meet once an update, in its last one."""
        if self.run.fsdp:
            model.set_requires_gradient_sync(self.accelerator.sync_gradients)
        return super().training_step(model, inputs, num_items_in_batch)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return 0: nothing here is called input_ids, which the Trainer counts by."""
        return 0

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """Return this process's part of the global batch's loss, refused when any process's is not finite."""
        self.models.policy = model
        self.session.sitting.see(rows=lambda: self._seen(inputs))
        found = self.run.objective.losses(self.models, inputs, num_items_in_batch, self.run.world)
        self.session.sitting.see_tile(
            rows=inputs["index"].tolist(), losses=found.rows.detach(), loss=found.loss.detach(),
            **{name: value.detach() for name, value in found.measures.items()},
        )  # fmt: skip
        self._require_finite(found, inputs)
        if self.state.global_step == 0:
            self._require_reference(found, inputs)
        self.session.collect(found, inputs)
        return found.loss * self.run.world.size  # gradients are averaged over processes

    def _seen(self, inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return what a microbatch learns from, for people to read: its rows, or what was drawn for them."""
        if self.run.objective.online:
            return cast(Online, self.run.objective).seen()
        tokens, decode = self.run.tokens, self.run.tokenizer.decode
        return [
            {
                "row": tokens.place[i], "prompt": decode(tokens.prompts[i]),
                "completion": decode(tokens.completions[i]), "label": float(tokens.label[i]),
            }
            for i in inputs["index"].tolist()
        ]  # fmt: skip

    def _require_finite(self, found: RowLosses, inputs: Mapping[str, Any]) -> None:
        bad = ~found.rows.detach().isfinite()
        wrong = bad.any() | ~found.loss.detach().isfinite()
        flags = self.run.world.add(torch.stack([wrong, (found.rows.detach() != 0).any()]).float()).tolist()
        self.expects_gradient |= bool(flags[1])
        if not flags[0]:
            return
        names = [self.run.tokens.place[int(i)] for i in inputs["index"][: len(bad)][bad].tolist()]
        raise GuardError(
            "The loss is not finite", where=f"step {self.state.global_step + 1}",
            why=self.run.world.first([", ".join(names[:4])]) or "the sum of its rows overflowed",
            do="The weights are unchanged by this step. Lower optimizer.lr, use fp32, or look at those rows",
        )  # fmt: skip

    def _require_reference(self, found: RowLosses, inputs: Mapping[str, Any]) -> None:
        """Before the first update the policy is the reference, so every log-ratio is 0 up to rounding."""
        ratio = found.measures.get("log_ratio")
        if ratio is None:
            return
        tokens = torch.tensor([len(self.run.tokens.completions[int(i)]) for i in inputs["index"]], device=ratio.device)
        error = (ratio.abs() / tokens[: len(ratio)]).max().reshape(1)
        worst = max(float(e) for e in self.run.world.gather(float(error)))
        if worst > REFERENCE_TOLERANCE[self.run.config.model.dtype]:
            raise GuardError(
                "The policy is not the reference before the first update", where="step 1",
                why=f"a log-ratio of {worst:.2g} nats a token, where rounding leaves "
                f"{REFERENCE_TOLERANCE[self.run.config.model.dtype]:.0e}",
                do="Look for dropout, another precision, or a reference cache of another model",
            )  # fmt: skip

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Read whole weights as `from_pretrained` does: some models keep them under other names on disk."""
        full = self.run.config.model.train == "full"
        if full:
            with quiet():
                saved = type(self.model).from_pretrained(resume_from_checkpoint, dtype=torch.float32).state_dict()
        if self.run.fsdp:
            set_weights(self.model, saved if full else self._adapters(resume_from_checkpoint), trained=not full)
        elif full:
            self.model.load_state_dict(saved)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def save_committed(self) -> None:
        """Write the checkpoint of the step at which the weights stand."""
        self._save_checkpoint(self.model, None)

    def _adapters(self, folder: str) -> dict[str, Tensor]:
        """Read the adapters of a checkpoint, by the names they have in the model."""
        from peft import load_peft_weights

        saved = load_peft_weights(folder, device="cpu")
        names = [name for name, p in self.model.named_parameters() if p.requires_grad]
        return {name: saved[name.replace(f".{self.model.active_adapter}.", ".")] for name in names}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the whole weights as `from_pretrained` reads them, from one process."""
        if not self.run.fsdp:
            super().save_model(output_dir, _internal_call)
            return
        state = whole_weights(self.model, trained=self.run.config.model.train == "lora")
        if self.run.world.leads:
            self.model.save_pretrained(output_dir, state_dict=state)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Write the optimizer's state: under FSDP2 each process its share."""
        if self.run.fsdp:
            save_optimizer(self.model, self.optimizer, self.lr_scheduler, Path(output_dir), self.run.world)
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Read what `_save_optimizer_and_scheduler` wrote."""
        if self.run.fsdp and checkpoint is not None:
            load_optimizer(self.model, self.optimizer, self.lr_scheduler, Path(checkpoint))
        else:
            super()._load_optimizer_and_scheduler(checkpoint)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Have the Trainer write into a staging folder, and publish it whole."""
        self.session.sitting.at("saving")
        with stops.whole():
            self._save_whole(model, trial)

    def _save_whole(self, model: nn.Module, trial: Any) -> None:
        staging = Path(self.args.output_dir)
        self.run.world.led(lambda: shutil.rmtree(staging, ignore_errors=True))
        if zero_stage(self.run.deepspeed) == 3:
            self.model_wrapped.empty_partition_cache()  # weights that an evaluation was still fetching
        save = super()._save_checkpoint
        with quiet():
            self.run.world.each(lambda: save(model, trial))
        self.run.world.led(lambda: self._publish(staging))

    def _publish(self, staging: Path) -> None:
        folder = staging / f"checkpoint-{self.state.global_step}"
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle; config.yaml says it all
        self.run.processor.save_pretrained(folder)
        checkpoint.publish(
            self.session.directory / "checkpoints", self.state.global_step, folder, self.session.state(),
            keep=self.run.config.checkpoint.keep,
        )  # fmt: skip
        shutil.rmtree(staging, ignore_errors=True)


class _Commit(TrainerCallback):
    """Guards the gradient before each optimizer step; logs, evaluates and asks for checkpoints after it."""

    def __init__(self, run: LanguageRun, session: Session, trainer: AlignTrainer) -> None:
        self.run, self.session, self.trainer = run, session, trainer
        self.norm, self.lr = float("nan"), float("nan")
        self._update = contextlib.ExitStack()  # no stop between here and the commit
        self.watch: Tracker | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the model before training: under ZeRO 3 its weights can be had in the engine alone."""
        if self.run.fsdp:
            require_sharded(self.trainer.model_wrapped)
        if zero_stage(self.run.deepspeed) == 3:
            require_same_logps(self.trainer.model)
        self.session.before()
        if self.run.world.leads:
            self.watch = open_tracker(
                self.run.config.sparsity, lambda: weights_folder(self.run.config.model.path), self._weights,
                self.session.log, state.global_step,
            )  # fmt: skip

    def _weights(self) -> Source:
        """Return the weights as they stand; of adapters these alone."""
        model, config = self.trainer.model, self.run.config.model
        if config.train == "lora":
            adapters = {n: p for n, p in model.named_parameters() if p.requires_grad}
            return live_source(adapters, {"lora_alpha": config.lora.alpha})
        tied = bool(model.config.get_text_config().tie_word_embeddings)
        return live_source(dict(model.named_parameters()), {"tie_word_embeddings": tied})

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the weights before the update: no microbatch moves them."""
        self.session.sitting.begin_step(state.global_step + 1)
        self.session.sitting.at("training")
        if self.watch is not None:
            self.watch.before_update(state.global_step + 1)

    def _expected(self, first: bool) -> bool:
        """Whether the first step must have a gradient: its rows had losses other than 0."""
        return first and self.trainer.expects_gradient

    def _require_step(self, engine: Any, step: int) -> None:
        """Refuse a step of DeepSpeed's whose gradient was not finite."""
        norm = torch.as_tensor(float(engine.get_global_grad_norm() or 0.0))
        if not engine.was_step_applied():
            norm = torch.full_like(norm, torch.inf)  # whatever norm it kept
        elif not bool(norm.isfinite()):
            raise GuardError(
                "The gradient norm is not finite", where=f"step {step}", why="DeepSpeed stepped all the same",
                do="The step is not kept: the last checkpoint is as it was. Lower optimizer.lr, or use fp32",
            )  # fmt: skip
        guards.require_gradient(norm, torch.zeros(()), f"step {step}", expected=self._expected(step == 1))
        self.norm = float(norm)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Refuse a gradient that is not finite, then clip it."""
        self._update.enter_context(stops.whole())
        self.lr = float(self.trainer.lr_scheduler.get_last_lr()[0])
        if self.trainer.is_deepspeed_enabled:
            return control  # it has stepped already; see on_step_end
        if self.trainer.subnetwork is not None:
            self.trainer.subnetwork.mask_gradients()
        parameters = [p for p in self.trainer.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters]) if parameters else torch.zeros(())
        norm = norm.full_tensor() if self.run.fsdp else norm  # of all processes' shares
        first = self._expected(state.global_step == 0)
        self.session.sitting.see(grad_norm=norm)
        guards.require_gradient(norm, torch.zeros(()), f"step {state.global_step + 1}", expected=first)
        limit = self.run.config.optimizer.max_grad_norm
        if limit is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        self.norm = float(norm)
        return control

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Write the step down, and stop or save when it is time."""
        if self.trainer.is_deepspeed_enabled:
            self._require_step(self.trainer.model_wrapped, state.global_step)
        trained = [p for p in self.trainer.model.parameters() if p.requires_grad]
        guards.require_weights(self.run.world.add(guards.weights_check(trained)), f"step {state.global_step}")
        measured: dict[str, float] = {}
        if self.watch is not None:
            self.watch.after_update(self.lr)
            measured = self.watch.row()
        stop = self.session.commit(state.global_step, {"lr": self.lr, "grad_norm": self.norm, **measured})
        every = self.run.config.checkpoint.every
        last = state.global_step >= self.run.steps
        self._update.close()
        control.should_training_stop = bool(stop) or last
        control.should_save = bool(stop) or last or bool(every and state.global_step % every == 0)
        return control
