"""What the language-model trainers share: a run folder, data, tokens, the plan, the reference, a Trainer.

trainers/kto.py, bco.py, dpo.py, sft.py     an objective each, and the function that makes a run of it
trainers/rluf.py                            an objective that draws what it learns from
trainers/language.py                        the run
trainers/language_trainer.py                transformers.Trainer with our batches, guards and checkpoints
trainers/language_session.py                signals, the log, the record
trainers/language_objective.py              a microbatch's tensors and losses
trainers/language_measures.py               metrics and held-out evaluation
trainers/language_generation.py             answers to held-out prompts
trainers/language_images.py                 images as a model's processor makes tensors of them
trainers/language_engine.py                 DeepSpeed's settings
trainers/language_fsdp.py                   FSDP2: a model and its optimizer, split over the processes
trainers/language_model.py                  tokenizer, weights, adapters
trainers/language_logps.py                  log-probs at completion tokens
trainers/language_reference.py              the model before training
trainers/preference_data.py                 tokens, and the plan of an epoch
trainers/preference.py                      the objectives as pure functions
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from align import checkpoint
from align.checks import require_valid
from align.config import anchored
from align.engine import require_fsdp
from align.errors import CheckpointError, ConfigError
from align.language_checks import require_divisible
from align.language_config import LanguageConfig
from align.launch import join_world, meeting
from align.preferences import PreferenceSet, load_preferences
from align.rluf_config import RLUFConfig
from align.run import claiming, require_not_hacked
from align.tracking import RunLog
from trainers.language_engine import engine_settings, settled, sharded, zero_stage
from trainers.language_fsdp import shard_module
from trainers.language_generation import Prompt, choose_prompts, read_prompts
from trainers.language_images import has_images
from trainers.language_measures import LanguageEvaluation
from trainers.language_model import load_language_model, load_processor, over_positions
from trainers.language_objective import Objective, Online
from trainers.language_reference import LogpCache, Reference, reference_mode
from trainers.language_session import Session
from trainers.language_trainer import AlignTrainer, training_arguments
from trainers.preference import effective_sample_size
from trainers.preference_data import Plan, Tokens, plan_epoch, tokenise
from trainers.result import RunResult
from trainers.sparsity import require_maskable
from trainers.tiny_language import toy_thumbs


class LanguageRun:
    """Train a language model with one objective.

    Args:
        config: of the trainer.
        objective: what it optimises.
        out: the run folder, `runs/<name>` when None. An unfinished run there is resumed.
        overwrite: start again, replacing a run that is there.
        fork: go on with a run that is there under a changed configuration.
        deepspeed: name or file of DeepSpeed settings; those of `accelerate launch`, if it has any, when None.
        fsdp: split weights, gradients and optimizer over the processes with torch's FSDP2.
        rows: training rows in place of `data.path`, and held-out ones in place of `data.heldout_path`.
    """

    def __init__(
        self,
        config: LanguageConfig,
        objective: Objective,
        *,
        out: str | Path | None = None,
        overwrite: bool = False,
        fork: bool = False,
        deepspeed: str | None = None,
        fsdp: bool = False,
        rows: tuple[PreferenceSet, PreferenceSet | None] | None = None,
    ) -> None:
        config = anchored(config)
        self.config, self.objective = config, objective
        self.findings = require_valid(config)
        self.world = join_world(config.checkpoint.hung_after_seconds)
        require_divisible(config, self.world.size)
        self.deepspeed = engine_settings(deepspeed, config, self.world)
        self.fsdp = fsdp
        if fsdp:
            require_fsdp(self.deepspeed, self.world.size)
        self._require_sparsity()
        self.directory = Path(out or Path("runs") / config.name)
        with claiming(self.directory, config, self.world, overwrite=overwrite, fork=fork) as self._changed:
            self.processor = load_processor(config.model.path, config.model.chat_template)
            self.tokenizer = self.processor.tokenizer if has_images(self.processor) else self.processor
            training, heldout = rows if rows is not None else read_data(config)
            self.tokens = tokenise_rows(config, objective, self.processor, training, training=True)
            self.heldout, self.prompts = read_heldout(config, objective, self.processor, heldout)
            if objective.online:
                cast(Online, objective).ask(training, self.tokens, self.tokenizer)
            self._require_images_everywhere()
            self.about = {**objective.prepare(self.tokens), "tokens": self._about_data()}
            if long := over_positions(self.about["tokens"]["longest"], config.model.path):
                self.about["warnings"] = [*self.about.get("warnings", ()), f"{long}. Lower data.max_length"]
            self._plan: tuple[int, Plan] | None = None
            epoch = self.plan(0)
            self.per_epoch = len(epoch.rows)
            self.about["epoch"] = {
                "microbatches": self.per_epoch, "left_out": epoch.left_out, "same_prompt": epoch.same_prompt,
                "single_class": epoch.single_class, "same_rows": self._fixed,
            }  # fmt: skip
            self.steps = config.steps or config.epochs * self.per_epoch // self.accumulation

    @property
    def accumulation(self) -> int:
        """Microbatches of an optimizer step."""
        return self.config.batch_size // self.config.microbatch

    @property
    def engine(self) -> str:
        """What carries the updates out, as run.json names it."""
        if self.deepspeed is not None:
            return f"deepspeed_zero{zero_stage(self.deepspeed)}"
        if self.fsdp:
            return "fsdp2"
        return "single" if self.world.size == 1 else "data_parallel"

    @property
    def splits_weights(self) -> bool:
        """Whether no process holds a whole weight: ZeRO 3, FSDP2."""
        return self.fsdp or zero_stage(self.deepspeed) == 3

    def _require_sparsity(self) -> None:
        """Refuse a mask, and measures while training, where the weights are not whole."""
        asked, lora = self.config.sparsity, self.config.model.train == "lora"
        require_maskable(asked.mask, adapted=lora, deepspeed=self.deepspeed, fsdp=self.fsdp)
        if asked.every and self.splits_weights:
            raise ConfigError(
                "Under ZeRO 3 and FSDP2 weights are measured after training alone", where="sparsity.every",
                why="no process holds a whole tensor meanwhile", do="Set it to 0, or use zero2",
            )  # fmt: skip

    def _require_images_everywhere(self) -> None:
        """Refuse what would wait for ever: where weights are split all processes gather the vision tower's or none."""
        found = [tokens.pictures for tokens in (self.tokens, self.heldout) if tokens is not None]
        if any(p is not None and p.mixed for p in found) and self.splits_weights:
            raise ConfigError(
                "Under ZeRO 3 and FSDP2 either all rows have images or none", where="--fsdp" if self.fsdp
                else "--deepspeed", why="some rows have none",
                do="Use zero2, or split the data",
            )  # fmt: skip

    def _about_data(self) -> dict[str, Any]:
        tokens = self.tokens
        return {
            "rows": len(tokens), "up": int(tokens.desirable.sum()), "down": int((tokens.label <= 0.5).sum()),
            "heldout_rows": 0 if self.heldout is None else len(self.heldout), "dropped": tokens.dropped,
            "truncated": tokens.truncated, "longest": int(tokens.length.max()),
            **_row_weights(tokens),
        }  # fmt: skip

    @property
    def reference(self) -> str:
        """How the model before training is had: lora_off, copy, precomputed, or none."""
        if not self.objective.referenced:
            return "none"
        return reference_mode(self.config.reference.mode, self.config.model.train)

    def plan(self, epoch: int) -> Plan:
        """Return the plan of an epoch; every epoch has `per_epoch` microbatches."""
        if self._plan is None or self._plan[0] != epoch:
            config, objective = self.config, self.objective
            made = plan_epoch(
                self.tokens, microbatch=config.microbatch, batch_size=config.batch_size, seed=config.seed, epoch=epoch,
                paired=objective.paired, oversample=objective.oversample, fixed=self._fixed,
            )  # fmt: skip
            self._plan = (epoch, made)
        return self._plan[1]

    @property
    def _fixed(self) -> bool:
        """Whether every epoch has the microbatches of the first: log-probs of mismatched pairs are computed once."""
        return self.reference == "precomputed" and self.objective.mismatched

    @meeting()
    def train(self) -> RunResult:
        """Train to the configured number of steps, or until asked to stop."""
        began = time.perf_counter()
        found = checkpoint.latest(self.directory / "checkpoints")
        saved = _read_state(found) if found is not None else None
        if saved is not None:
            require_not_hacked(saved, saved["step"], self.config, self.directory)
            self._require_same_engine(saved)
        with settled():
            # Under ZeRO 3 these arguments are why `from_pretrained` leaves each process its share of the weights.
            arguments = training_arguments(self, self.directory / "checkpoints" / ".staging")
            with self.world.together():
                model = load_language_model(self.config.model, seed=self.config.seed)
                reference = self._reference(model) if self.objective.referenced else None
                if self.fsdp:
                    shard_module(model)
                cache = self._precompute(model) if self.reference == "precomputed" else None
            log = RunLog(self.directory, tensorboard=self.config.tracking.tensorboard, silent=not self.world.leads)
            with Session(self, log, saved, began) as session:
                trainer = AlignTrainer(self, session, cache, reference, model=model, args=arguments)
                session.evaluation = LanguageEvaluation(self, trainer.models, cache, log)
                session.save = trainer.save_committed
                with session.region():
                    trainer.train(resume_from_checkpoint=None if found is None else str(found))
                return session.after()
            return RunResult(self.directory, "stopped", {})

    def _require_same_engine(self, saved: Mapping[str, Any]) -> None:
        """Refuse a checkpoint whose optimizer is split in another way. DeepSpeed keeps a file of each process; the
        shares of FSDP2 make whole tensors for any number of processes."""
        there, now = (saved.get("engine"), saved.get("processes")), (self.engine, self.world.size)
        split = [str(engine).startswith("deepspeed") or engine == "fsdp2" for engine, _ in (there, now)]
        if there == now or not any(split) or there[0] == now[0] == "fsdp2":
            return
        raise CheckpointError(
            "The run cannot go on under this engine", where=str(self.directory),
            why=f"its optimizer is that of {there[0]} on {there[1]} processes, and this is {now[0]} on {now[1]}",
            do="Launch it as before; or start another run from the checkpoint, whose weights are whole",
        )  # fmt: skip

    def _reference(self, model: nn.Module, mode: str = "") -> Reference:
        """Return the model before training; a copy is split under ZeRO 3 and FSDP2, and else a replica."""
        mode, half = mode or self.reference, self.config.model.dtype == "bf16"
        if mode != "copy" or zero_stage(self.deepspeed) < 3:
            found = Reference(mode, model, half=half and self.deepspeed is None)
            if found.copy is not None and self.deepspeed is not None and half:
                found.copy.to(torch.bfloat16)  # as DeepSpeed makes the policy
            if found.copy is not None and self.fsdp:
                found = Reference(mode, model, shard_module(found.copy), half=half)
            return found
        whole = self.config.model.model_copy(update={"train": "full", "gradient_checkpointing": False})
        again = load_language_model(whole, seed=self.config.seed).requires_grad_(False)
        return Reference(mode, model, sharded(again, self.deepspeed, half=half))

    def _precompute(self, model: nn.Module) -> LogpCache:
        """Compute the reference's log-probs of everything the run will ask for, once."""
        config = self.config
        precision = "fp32" if config.model.dtype == "fp32" else f"bf16 {config.model.train}"  # stored so, or cast
        cache = LogpCache(config.reference.cache, config.model.path, precision)
        wanted = [(i, i) for i in range(len(self.tokens))]
        if self.objective.mismatched:
            plan = self.plan(0)
            wanted += list(zip(plan.rows.flatten().tolist(), plan.partners.flatten().tolist(), strict=True))
        partitioned = zero_stage(self.deepspeed) == 3  # no weights are at hand outside of an engine
        reference = self._reference(model, "copy" if partitioned else "")
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        if not self.splits_weights:
            model.to(device)

        def score(batch: Mapping[str, Tensor]) -> Tensor:
            half = torch.autocast(device.type, torch.bfloat16, enabled=self.config.model.dtype == "bf16")
            with half:
                return reference.logps(send_to_device(batch, device)).per_row().cpu()

        model.eval()
        pad = self.tokenizer.pad_token_id
        cache.fill(self.tokens, wanted, score, world=self.world, pad=pad)
        if self.heldout is not None:
            cache.fill(self.heldout, [(i, i) for i in range(len(self.heldout))], score, world=self.world, pad=pad)
        return cache


def tokenise_rows(
    config: LanguageConfig, objective: Objective, processor: Any, rows: PreferenceSet, *, training: bool
) -> Tokens:
    """Return the tokens of the rows that an objective has a use for.

    Raises:
        DataError: none of them, a row without a label where one is needed, or training rows of one class.
    """
    soft = objective.soft
    if objective.online:
        rows = rows.one_a_prompt()
    elif objective.paired:
        rows = rows.pairs()
    elif objective.labelled:
        rows = rows.require_labels(threshold=config.data.score_threshold, soft=soft)
        if training and not config.data.allow_one_class:
            rows.require_both_classes()
    else:
        rows = PreferenceSet(tuple(row for row in rows.rows if row.label is not False), rows.source)
    return tokenise(
        rows, processor, max_length=config.data.max_length, soft=soft, workers=config.data.workers,
        max_prompt_length=config.data.max_prompt_length,
        reload=_Reload(config.model.path, config.model.chat_template),
    )  # fmt: skip


def read_heldout(
    config: LanguageConfig, objective: Objective, processor: Any, rows: PreferenceSet | None
) -> tuple[Tokens | None, list[Prompt]]:
    """Return the tokens of the held-out rows, and the prompts among them, without images, that the model answers."""
    if rows is None:
        return None, []
    chosen = choose_prompts(rows, config.evaluation.prompts, config.seed)
    tokenizer = processor.tokenizer if has_images(processor) else processor
    return (
        tokenise_rows(config, objective, processor, rows, training=False),
        read_prompts(chosen, tokenizer, config.data.max_prompt_length),
    )


def _row_weights(tokens: Tokens) -> dict[str, Any]:
    """Return what the columns weight and udm_weight come to, by class; nothing where they change nothing."""
    if (tokens.weight == 1).all():
        return {}
    classes = {"up": tokens.weight[tokens.desirable], "down": tokens.weight[tokens.label <= 0.5]}
    return {"row_weights": {
        name: {
            "mean": float(weight.mean()), "least": float(weight.min()), "largest": float(weight.max()),
            "effective_rows": effective_sample_size(torch.from_numpy(weight)),
        }
        for name, weight in classes.items() if len(weight)
    }}  # fmt: skip


@dataclass(frozen=True)
class _Reload:
    """Loads the tokenizer or processor again, in a worker."""

    path: str
    template: str | None

    def __call__(self) -> Any:
        return load_processor(self.path, self.template)


def read_data(config: LanguageConfig) -> tuple[PreferenceSet, PreferenceSet | None]:
    """Return the training and the held-out rows of a configuration."""
    data, alone = config.data, isinstance(config, RLUFConfig) and config.prompts_alone
    rows = toy_thumbs() if data.path == "toy" else load_preferences(data.path, prompts=alone)
    if data.heldout_path is not None:
        return rows, load_preferences(data.heldout_path, prompts=alone)
    return rows.split(data.heldout_fraction) if data.heldout_fraction else (rows, None)


def _read_state(folder: Path) -> dict[str, Any]:
    """Verify a checkpoint and return its state."""
    checkpoint.verify(folder)
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    if not isinstance(state, dict) or "objective" not in state:
        raise CheckpointError("A checkpoint is not one of a language model's run", where=str(folder))
    return state
