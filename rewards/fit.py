"""A reward fitted to what people said: one latent of an output, seen through thumbs, ratings, comparisons and rankings.

    rows       what people said, split into trained on, calibrated on, held out   `fit_data`, `fit_split`, `fit_people`
    latent     f(x), a head on embeddings or a sequence classifier                `fit_latent`
    answers    the loss of what was said, given f                                 `fit_answers`, `fit_losses`, `plove`
    card       the reward, calibrated, and what it is worth on held-out rows      `fit_card`

The loop over them is here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from align.config import anchored, config_origins
from align.engine import Engine, require_engine
from align.errors import ConfigError
from align.feedback.events import Item
from align.feedback.overview import plain
from align.fit_config import FitConfig, require_fit
from align.launch import World, join_world, meeting
from align.run import Run, claiming
from align.seeding import permutation
from align.sharding import FSDP2Engine, deepspeed_engine
from align.types import StepStats
from rewards.fit_answers import Answers, batch_loss, pack, starting_effects
from rewards.fit_card import calibration_notes, fit_card, fit_receipt, latent_values, write_artefact
from rewards.fit_data import FitData, Observation, gate_notes, load_data, thin, warnings_on
from rewards.fit_latent import Latent, classifier_latent, frozen_latent, trained_parameters
from rewards.fit_people import leave_out_people
from rewards.fit_split import parts_of
from rewards.outputs import require_images, sample_of


@dataclass(frozen=True)
class FitResult:
    """What a fit left: its folder, how it ended, and the card of the reward."""

    directory: Path
    status: str
    card: dict[str, Any]


@meeting()
def fit_reward(
    config: FitConfig,
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
    deepspeed: str | None = None,
    fsdp: bool = False,
    data: FitData | None = None,
) -> FitResult:
    """Fit a reward, resuming what an earlier call with the same configuration left in the folder.

    A backbone that is trained itself may be fitted by several processes, as a launcher starts them: a batch is shared
    among them, and the reward is the same.

    Args:
        config: of `align.load_config`.
        out: the run folder, runs/NAME when None.
        deepspeed: ZeRO settings, see `align.engine.DeepSpeedEngine`; None holds all weights in every process. Stage 3
            splits the weights of a classifier too.
        fsdp: split the weights of a classifier, gradients and optimizer over the processes; see `align.sharding`.
        data: what people said, in place of what `config.data.paths` name; to resume, give the same again.

    Returns:
        the folder, whose `reward` holds the artefact, and the card in it.

    Raises:
        ConfigError: a config that contradicts itself, or cannot be fitted by several processes; a folder that is
            another run's.
        DataError: data that cannot be fitted, or a split that leaks; see `rewards.fit_data` and `rewards.fit_split`.
    """
    require_fit(config)
    config = anchored(config)
    split = require_engine(config.trainer, deepspeed, fsdp=fsdp)
    if split is not None:
        require_splittable(config, split)
    world = join_world(config.checkpoint.hung_after_seconds)
    if world.size > 1 or deepspeed is not None:
        require_launchable(config, world.size)
    directory = Path(out) if out is not None else Path("runs") / config.name
    with claiming(directory, config, world, overwrite=overwrite):
        data = load_data(config.data.paths, config.data) if data is None else data
        data, parts, dropped = parts_of(config, data)
        left = {**data.left_out, "between parts of the split": dropped}
        train_rows, share, thinned = thin(parts["train"], config)
        notes = warnings_on(train_rows, config)
        names = sorted({name for rows in parts.values() for row in rows for name in row.items})
        places = {name: i for i, name in enumerate(names)}
        items = [data.items[name] for name in names]
        require_images(items, data.folders)  # what is missing is said before anything is written
        trained_on = sorted({places[name] for row in train_rows for name in row.items})
        if config.model.backbone != "classifier":
            latent = frozen_latent(config, data, items, trained_on)
    if config.model.backbone == "classifier":
        latent = _classifier_of_all(config, directory, items, world)
    trimmed: list[dict[str, Any]] = []
    if config.users.trim:
        trimmed, people_left_out, trim_notes = leave_out_people(parts, latent, places, config)
        left |= people_left_out
        train_rows, share, thinned = thin(parts["train"], config)
        notes = [*warnings_on(train_rows, config), *trim_notes]
    notes += [*calibration_notes(parts["calibration"], config), *gate_notes(data.signals)]
    users = {name: i for i, name in enumerate(sorted({row.user for row in train_rows if row.user}))}
    train = pack(train_rows, places, users, config)
    levels = next((row.value[1] for rows in parts.values() for row in rows if row.kind == "rating"), 0)
    answers = Answers(
        config, train, levels, share, starting_effects(train, len(users), share) if config.users.effects else None
    ).to(latent.device)
    said = {f"answers.{name}": p for name, p in answers.named_parameters()}
    record = {"rows": {name: len(rows) for name, rows in parts.items()}, "origins": config_origins(config)}
    engine, parameters = _engine(config, latent, said, world, deepspeed, fsdp=fsdp, split=split)
    rows = train.to(latent.device)
    with Run(config, directory, parameters, record, world=world, engine=engine) as run:
        for note in notes if run.step == 0 else ():
            run.log.warn(0, "warning", "data", note)
        for step in run.steps():
            chosen = _rows_at(step, len(train), config)
            run.sitting.see(rows=lambda at=chosen: _seen(at, train_rows, data))
            run.sitting.at("training")
            with run.cut():
                loss, stats = batch_loss(answers, latent, rows, chosen, world)
                run.sitting.see_tile(loss=loss.detach(), **stats)
                run.backward(loss, weight=1.0)
            run.update()
            run.update_average()
            whole_loss = float(world.add(loss.detach().clone()))
            run.commit(step, {"loss": whole_loss, **stats}, StepStats(first_ratio_error=float("nan")))
        if run.sitting.stopping and run.step < config.steps:
            run.sitting.finish("stopped")
            return FitResult(directory, "stopped", {})
        run.sitting.at("calibrating")
        with run.delivered():
            with run.cut():
                value = latent_values(latent, len(places), world)
            card = fit_card(config, data, value, answers.cpu(), parts, places, train)
            card |= {
                "left_out": {what: n for what, n in {**left, **thinned}.items() if n},
                "trimmed_users": trimmed,
                "warnings": notes,
            }
            world.led(lambda: write_artefact(directory / "reward", config, latent, card))
        world.led(lambda: card.update(sparsity=fit_receipt(directory, config, run.log.read_metrics())))
        run.sitting.finish("complete")
        return FitResult(directory, "complete", plain(card))
    return FitResult(directory, "stopped", {})


def _classifier_of_all(config: FitConfig, directory: Path, items: Sequence[Item], world: World) -> Latent:
    """Build the classifier in every process, the leader first: it may keep a copy of the model in the folder."""
    if not world.leads:
        world.wait()
    with world.together():
        latent = classifier_latent(config, directory, items)
    if world.leads:
        world.wait()
    return latent


def _engine(
    config: FitConfig, latent: Latent, said: Mapping[str, nn.Parameter], world: World, deepspeed: str | None, *,
    fsdp: bool, split: str | None,
) -> tuple[Engine | None, Mapping[str, nn.Parameter]]:  # fmt: skip
    """Return the engine that shares a fit among processes, None where it has none, and all that is trained."""
    parameters: Mapping[str, nn.Parameter] = {**latent.parameters, **said}
    module = latent.module if split and latent.module is not None else nn.ParameterList(parameters.values())
    if fsdp:
        engine = FSDP2Engine(module, lambda: {**trained_parameters(module), **said}, config.optimizer, world)
        return engine, engine.parameters
    if deepspeed is not None:
        return deepspeed_engine(module, parameters, config.optimizer, world, deepspeed), parameters
    return None, parameters


def _seen(rows: Sequence[int], observations: Sequence[Observation], data: FitData) -> list[dict[str, Any]]:
    """Return the rows of a step, for people to read."""
    found = []
    for row in (observations[i] for i in rows):
        outputs = [dict(zip(("prompt", "output"), sample_of(data.items[name]), strict=True)) for name in row.items]
        found.append({"kind": row.kind, "said": row.value, "by": row.user, "outputs": outputs})
    return found


def require_launchable(config: FitConfig, processes: int) -> None:
    """Refuse a fit that cannot be shared among processes, or that gains nothing by it.

    Raises:
        ConfigError: naming the key.
    """
    model = config.model
    if model.backbone != "classifier" and not (model.unfreeze_image or model.unfreeze_text):
        raise ConfigError(
            "Frozen embeddings are fitted in one process", where=f"model.backbone {model.backbone}",
            why="their head takes seconds", do="Leave --launch out",
        )  # fmt: skip
    if config.data.silence == "unlabelled":
        raise ConfigError(
            "Learning from unlabelled silence takes one process", where="data.silence",
            why="its risk is one of a whole batch, and no sum over rows", do="Leave --launch out",
        )  # fmt: skip
    if config.batch_size < processes:
        raise ConfigError(
            "Every process needs a row", where=f"batch_size {config.batch_size}", why=f"{processes} share"
        )


def require_splittable(config: FitConfig, engine: str) -> None:
    """Refuse a backbone whose weights `engine` cannot split.

    Raises:
        ConfigError: naming the key.
    """
    if config.model.backbone != "classifier":
        raise ConfigError(
            f"{engine} splits classifiers", where=f"model.backbone {config.model.backbone}",
            why="towers are called in parts, of which it knows nothing", do="Use --deepspeed zero2",
        )  # fmt: skip


def _rows_at(step: int, count: int, config: FitConfig) -> list[int]:
    """Return the rows of a step, from 1: every epoch is an order of its own, and a batch may reach into the next."""
    size = min(config.batch_size, count)
    start = (step - 1) * size
    found: list[int] = []
    while len(found) < size:
        epoch, at = divmod(start + len(found), count)
        order = permutation(count, config.seed, epoch, "fit")
        found += order[at : at + size - len(found)]
    return found
