"""A reward fitted to what people said: one latent of an output, seen through thumbs, ratings, comparisons and rankings.

    f(x)                             the latent reward: a head on frozen embeddings, or a sequence classifier
    thumb        sigmoid(s f + c + b_u)      c the base rate, b_u a person's own effect, N(0, tau^2); scored at b_u = 0
    rating       P(y > k) = sigmoid(s f - theta_k)
    comparison   sigmoid(f_a - f_b), with ties by Rao and Kupper or Davidson
    ranking      Plackett and Luce

The scale s is 1 for the first protocol that is there, comparisons before thumbs before ratings, and fitted for others.
A probability is calibrated on rows held out for it, and reported on rows held out from both.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from align.config import config_origins
from align.engine import Engine, require_engine
from align.errors import ConfigError, DataError, ModelError
from align.feedback.events import Item
from align.feedback.overview import plain
from align.fit_config import FitConfig, require_fit
from align.launch import World, join_world, meeting
from align.run import Run, claiming
from align.seeding import permutation, seed
from align.sharding import FSDP2Engine, deepspeed_engine, is_sharded
from align.sparsity.callback import Travelled
from align.sparsity.receipt import write_receipt
from align.tracking import replace_text
from align.types import Samples, StepStats
from rewards import fit_losses, plove
from rewards.campaigns import find_campaigns
from rewards.classifier import Classifier, Encoded
from rewards.embeddings import build_embedder, clip_features, clip_towers, embed_all
from rewards.fit_data import (
    PARTS,
    FitData,
    Observation,
    load_data,
    require_apart,
    split_rows,
    thin,
    warnings_on,
)  # fmt: skip
from rewards.fitted import ARTEFACT, FORMAT, HEAD, TOWERS, Head, calibrated
from rewards.folders import read_model_config
from rewards.media import clip_pixels, stacked
from rewards.on_feedback import by_protocol
from rewards.outputs import content_keys, load_outputs, sample_of
from rewards.placement import Placement

FOLDS = 5
EVALUATED_AT_ONCE = 64


@dataclass(frozen=True)
class FitResult:
    """What a fit left: its folder, how it ended, and the card of the reward."""

    directory: Path
    status: str
    card: dict[str, Any]


@dataclass(frozen=True)
class Latent:
    """The latent reward of numbered outputs: its trained weights, its values on their graph, and how it is saved.

    Args:
        module: what an engine can split; None where that is not offered.
    """

    parameters: Mapping[str, nn.Parameter]
    of: Callable[[Sequence[int]], Tensor]
    save: Callable[[Path], None]
    penalty: Callable[[], Tensor] | None = None
    embedder: str = ""
    features: Tensor | None = None
    module: nn.Module | None = None

    @property
    def device(self) -> torch.device:
        """Where its values are."""
        return next((p.device for p in self.parameters.values()), torch.device("cpu"))


# --- the latent -------------------------------------------------------------------------------------


def _frozen(config: FitConfig, data: FitData, items: Sequence[Item], train: Sequence[int]) -> Latent:
    model = config.model
    embedder = build_embedder(
        model.backbone, path=model.path, architecture=model.architecture, size=model.size, placement=Placement()
    )

    def load(places: Sequence[int]) -> Samples:
        return load_outputs([items[i] for i in places], data.folders)

    features = embed_all(embedder, content_keys(items, data.folders), load)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed(config.seed, "fit", "head"))
        head = Head(model.head, features.shape[1], model.width, embedder.halves)
    if model.head == "mlp":
        nn.init.normal_(head.weight, std=model.width**-0.5, generator=torch.Generator().manual_seed(config.seed))
    head.standardise(features[list(train)])

    if model.unfreeze_image or model.unfreeze_text:
        return _unfrozen(config, load, head, features, embedder.identity)

    def save(folder: Path) -> None:
        _save(head.state_dict(), folder / HEAD)

    trained = {f"head.{name}": p for name, p in head.named_parameters() if p.requires_grad}
    return Latent(
        trained, lambda rows: head(features[list(rows)]), save, lambda: model.ridge * head.penalty(), embedder.identity,
        features,
    )  # fmt: skip


def _unfrozen(
    config: FitConfig, load: Callable[[Sequence[int]], Samples], head: Head, features: Tensor, identity: str
) -> Latent:
    """A head on CLIP's towers whose last blocks are trained with it; a tower that is frozen keeps its embeddings.

    Args:
        features: of the towers before training.
    """
    from rewards.towers import unfreeze

    model, placement = config.model, Placement()
    towers = clip_towers(str(model.path), model.architecture, placement, shared=False)
    trained = unfreeze(towers.model, model.unfreeze_image, model.unfreeze_text)
    head, features, half = head.to(placement.device), features.to(placement.device), head.halves

    def of(rows: Sequence[int]) -> Tensor:
        start, samples = features[list(rows)], load(rows)
        image, text = start[:, :half], start[:, half : 2 * half]
        if model.unfreeze_image:
            pixels = [clip_pixels(stacked([one], placement.device), towers.size) for one in samples.images or ()]
            image = towers.embed_pixels(torch.cat(pixels))
        if model.unfreeze_text:
            known = {prompt: i for i, prompt in enumerate(dict.fromkeys(samples.prompts))}
            text = towers.embed_texts(list(known))[0][[known[prompt] for prompt in samples.prompts]]
        return head(clip_features(image, text))

    def save(folder: Path) -> None:
        _save(head.state_dict(), folder / HEAD)
        _save(trained, folder / TOWERS)

    parameters = {f"towers.{name}": p for name, p in trained.items()}
    parameters |= {f"head.{name}": p for name, p in head.named_parameters() if p.requires_grad}
    return Latent(parameters, of, save, lambda: model.ridge * head.penalty(), identity, features.cpu())


def _save(tensors: Mapping[str, Tensor], file: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: value.detach().contiguous() for name, value in tensors.items()}, file)


def _classifier(config: FitConfig, directory: Path, items: Sequence[Item]) -> Latent:
    """The logit of a sequence classifier; dropout is off, so that a run is a function of its config."""
    start = _with_one_output(str(config.model.path), directory, config.seed)
    reader = _reader(config, start)
    encoded: list[Encoded] = [reader.encode(*sample_of(item))[0] for item in items]

    def of(rows: Sequence[int]) -> Tensor:
        return reader.forward([encoded[i] for i in rows], reader.placement.device)[:, 0]

    def save(folder: Path) -> None:
        trained = reader.model
        if is_sharded(trained):  # it cannot be saved by itself: its weights, whole for the moment, in a fresh one
            trained = _reader(config, start).model
            with torch.no_grad():
                for into, value in zip(trained.parameters(), reader.model.parameters(), strict=True):
                    into.copy_(value)
        whole = trained.merge_and_unload() if config.model.train == "lora" else trained
        whole.save_pretrained(folder / "classifier", safe_serialization=True)
        reader.tokenizer.save_pretrained(folder / "classifier")

    return Latent(_trained(reader.model), of, save, module=reader.model)


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def _reader(config: FitConfig, start: Path) -> Classifier:
    """Load a classifier, its weights trained as the configuration says."""
    model = config.model
    reader = Classifier(
        str(start), model.template, model.max_length, "cpu" if not torch.cuda.is_available() else "resident", labels=1
    )
    if model.train == "lora":
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(
            task_type="SEQ_CLS", r=model.lora.rank, lora_alpha=model.lora.alpha, lora_dropout=0.0,
            target_modules=list(model.lora.targets) if model.lora.targets else "all-linear",
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed(config.seed, "fit", "lora"))
            reader.model = get_peft_model(reader.model, lora).eval()
    else:
        reader.model.requires_grad_(True)
    return reader


def _with_one_output(path: str, directory: Path, at: int) -> Path:
    """Return a folder of a classifier with one output: `path` itself, or a copy of that model under a new head."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = Path(path).expanduser()
    described = read_model_config(folder, "a transformers model")
    if described.num_labels == 1 and any("SequenceClassification" in a for a in described.architectures or ()):
        return folder
    copy = directory / "start"
    if not (copy / "config.json").is_file():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed(at, "fit", "classifier"))
            made = AutoModelForSequenceClassification.from_pretrained(
                folder, num_labels=1, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
            )
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False).save_pretrained(copy)
        made.save_pretrained(copy)
    return copy


# --- what people said, packed -----------------------------------------------------------------------


@dataclass(frozen=True)
class Packed:
    """Observations as arrays: the kind of each row, the places of its outputs (-1 none), and what was said.

    Args:
        said_N: thumb, level of a rating, or share of a comparison; NaN for rankings and silence.
        rank_NM: ranks of rankings, 0 none.
        margin_N: of a comparison, signed for the first.
        user_N: index of who said it, -1 where unknown or not in training.
    """

    kind_N: np.ndarray
    item_NM: Tensor
    said_N: Tensor
    rank_NM: Tensor
    margin_N: Tensor
    weight_N: Tensor
    user_N: Tensor

    def __len__(self) -> int:
        return len(self.kind_N)

    def to(self, device: torch.device) -> Packed:
        """Return the same rows with their tensors on a device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)


def pack(rows: Sequence[Observation], places: Mapping[str, int], users: Mapping[str, int], config: FitConfig) -> Packed:
    """Return observations as arrays; with the loss pick, a comparison weighs one over the pairs of its prompt."""
    widest = max([2, *(len(row.items) for row in rows)])
    item = torch.full((len(rows), widest), -1)
    rank = torch.zeros(len(rows), widest, dtype=torch.long)
    said = np.full(len(rows), np.nan)
    margin, weight = np.zeros(len(rows)), np.array([row.weight for row in rows], dtype=np.float64)
    pairs: dict[str, int] = {}
    for row in rows:
        pairs[row.prompt] = pairs.get(row.prompt, 0) + (row.kind == "comparison")
    for i, row in enumerate(rows):
        item[i, : len(row.items)] = torch.tensor([places[name] for name in row.items])
        if row.kind == "ranking":
            rank[i, : len(row.items)] = torch.tensor(row.value)
        elif row.kind != "silence":
            said[i] = row.value[0] if row.kind == "rating" else row.value
        if row.kind == "comparison":
            asked = config.objective.margin if row.margin is None else row.margin
            margin[i] = asked * np.sign(row.value - 0.5)
            if config.objective.comparisons == "pick":
                weight[i] /= pairs[row.prompt]
    user = torch.tensor([users.get(row.user, -1) for row in rows])
    kind = np.array([row.kind for row in rows], dtype=object)
    columns = (torch.from_numpy(column).float() for column in (said, margin, weight))
    said_N, margin_N, weight_N = columns
    return Packed(kind, item, said_N, rank, margin_N, weight_N, user)


class Answers(nn.Module):
    """The observation models' own parameters, and the loss of rows given the latent reward of their outputs.

    Args:
        train: the training rows.
        levels: of ratings, 0 where there are none.
        share: of the negatives that were kept.
        effects: start and variance of people's effects; None fits none.
    """

    def __init__(
        self, config: FitConfig, train: Packed, levels: int, share: float, effects: tuple[np.ndarray, float] | None
    ) -> None:
        super().__init__()
        self.objective, self.shift, self.levels = config.objective, -math.log(share), levels
        kinds = set(train.kind_N)
        compared = bool(kinds & {"comparison", "ranking"})
        thumbs = bool(kinds & {"thumb", "silence"})
        if thumbs:
            rate = base_rate(train, share) if "thumb" in kinds else 0.5
            rate = self.objective.prior or rate if "silence" in kinds else rate
            clean = (rate - self.objective.rho_down) / (1 - self.objective.rho_up - self.objective.rho_down)
            clean = min(max(clean, 1e-3), 1 - 1e-3)
            self.thumb_bias = _number(math.log(clean / (1 - clean)))
            if compared:
                self.thumb_log_scale = _number(0.0)
            if self.objective.mistakes == "fitted":
                start = torch.tensor([self.objective.rho_up, self.objective.rho_down]).clamp(0.02, 0.48)
                self.mistakes = nn.Parameter(torch.logit(2 * start))
        if levels:
            ordinal = self.objective.ratings == "ordinal"
            spread = torch.logit(torch.arange(1, levels) / levels)
            gaps = spread.diff()
            self.rating_first = _number(float(spread[0]) if ordinal else 0.5)
            if ordinal:
                self.rating_gaps = nn.Parameter(torch.log(torch.expm1(gaps)))
            if compared or thumbs or not ordinal:
                self.rating_log_scale = _number(0.0 if ordinal else -1.0)
        if "comparison" in kinds and self.objective.comparisons in ("rao_kupper", "davidson"):
            self.tie = _number(0.0)
        self.variance = None if effects is None else effects[1]
        self.rows = max(1, len(train))
        if effects is not None:
            self.effect = nn.Parameter(torch.from_numpy(effects[0]).float())

    def thumb_scale(self) -> Tensor:
        """Return s of thumbs, 1 where no comparisons set the unit."""
        return self.thumb_log_scale.exp() if hasattr(self, "thumb_log_scale") else torch.ones(())

    def rating_scale(self) -> Tensor:
        """Return s of ratings, 1 where they are alone."""
        return self.rating_log_scale.exp() if hasattr(self, "rating_log_scale") else torch.ones(())

    def thumb_logit(self, latent: Tensor, user: Tensor | None = None) -> Tensor:
        """Return the logit of a thumb up; with `user`, of those people, an unknown one at 0."""
        logit = self.thumb_scale() * latent + self.thumb_bias
        if user is None or self.variance is None:
            return logit
        return logit + torch.where(user >= 0, self.effect[user.clamp(min=0)], torch.zeros_like(latent))

    def mistake_rates(self) -> tuple[Tensor | float, Tensor | float]:
        """Return rho_up and rho_down, as given or as fitted so far."""
        if not hasattr(self, "mistakes"):
            return self.objective.rho_up, self.objective.rho_down
        up, down = plove.mistake_rates(self.mistakes)
        return up, down

    def thresholds(self) -> Tensor:
        """Return the thresholds of ratings, rising."""
        return fit_losses.ordered(self.rating_first, self.rating_gaps)

    def losses(self, kind: str, rows: Packed, pick: Tensor, latent_NM: Tensor) -> Tensor:
        """Return one loss a row, of rows of one kind; `latent_NM` is 0 where there is no output."""
        first, said = latent_NM[:, 0], rows.said_N[pick]
        objective = self.objective
        if kind == "thumb":
            logit = self.thumb_logit(first, rows.user_N[pick])
            return plove.forward_corrected(logit, said, *self.mistake_rates(), self.shift)
        if kind == "rating":
            score = self.rating_scale() * first
            if objective.ratings == "ordinal":
                return fit_losses.ordinal(score, said, self.thresholds())
            return fit_losses.squared(score + self.rating_first, said / (self.levels - 1))
        if kind == "ranking":
            return fit_losses.plackett_luce(latent_NM, rows.rank_NM[pick])
        second = latent_NM[:, 1]
        delta = first - second
        if objective.comparisons == "bradley_terry":
            loss = fit_losses.bradley_terry(delta, said, rows.margin_N[pick])
        elif objective.comparisons == "pick":
            loss = fit_losses.pick(delta, said)
        else:
            tie = F.softplus(self.tie) + 1e-4 if objective.comparisons == "rao_kupper" else self.tie
            loss = fit_losses.COMPARISONS[objective.comparisons](delta, (said - 0.5).sign(), tie)
        return loss + fit_losses.centre(first, second, objective.centre) if objective.centre else loss

    def unlabelled(self, logits: Mapping[str, Tensor]) -> Tensor:
        """Return the nnPU objective of a batch's logits by class: up, silent, and down where there are any."""
        up, silent, down = (logits[name] for name in ("up", "silent", "down"))
        prior = float(self.objective.prior or 0.5)
        if not len(silent) or not len(up):
            rest = [plove.logistic_loss(up), plove.logistic_loss(-down), 0.0 * silent]
            return torch.cat(rest).mean()
        if len(down):
            return plove.pnu(up, silent, down, prior)[1]
        return plove.nnpu(up, silent, prior, loss=plove.logistic_loss)[1]

    def penalty(self) -> Tensor:
        """Return minus the log-prior of people's effects and of mistakes, a share of it a row of N.

        `(sum b_u^2 / (2 tau^2) - log Beta(rho)) / N`
        """
        total = torch.zeros(())
        if self.variance is not None:
            total = total + self.effect.square().sum() / (2 * float(self.variance or 1))
        if hasattr(self, "mistakes"):
            total = total + plove.mistake_prior(plove.mistake_rates(self.mistakes))
        return total / self.rows


def _number(value: float) -> nn.Parameter:
    """A parameter of one number: DeepSpeed sends weights as bytes, which it cannot do with a tensor of no axis."""
    return nn.Parameter(torch.tensor([value]))


def base_rate(rows: Packed, share: float) -> float:
    """Return the share of thumbs that are up among all, negatives that were not drawn included."""
    thumbs = torch.from_numpy((rows.kind_N == "thumb").astype(bool))
    up = float((rows.weight_N * rows.said_N.nan_to_num())[thumbs].sum())
    down = float((rows.weight_N * (1 - rows.said_N.nan_to_num()))[thumbs].sum()) / share
    return up / max(up + down, 1e-9)


def batch_loss(
    answers: Answers, latent: Latent, rows: Packed, chosen: Sequence[int], world: World = World()
) -> tuple[Tensor, dict[str, float]]:
    """Return the loss of some rows, every one weighing the same whatever its kind, and the mean loss of each kind.

    Of several processes each works out its part of the rows. Their losses add up to that of the batch.
    """
    everything = rows.kind_N[list(chosen)]
    mine = [chosen[i] for i in world.share(len(chosen))]
    picked = torch.tensor(mine)
    items = rows.item_NM[picked]
    unique, place = items.clamp(min=0).unique(return_inverse=True)
    values = latent.of(unique.tolist())[place] * (items >= 0)
    kinds = rows.kind_N[mine]
    total, weight = values.new_zeros(()), rows.weight_N[list(chosen)].sum()
    pu = "silence" in set(rows.kind_N)
    sums: dict[str, Tensor] = {}
    for kind in dict.fromkeys(everything):
        if pu and kind in ("thumb", "silence"):
            continue
        where = torch.from_numpy(np.flatnonzero(kinds == kind))
        loss = answers.losses(kind, rows, picked[where], values[where])
        sums[kind] = loss.detach().sum()
        total = total + (loss * rows.weight_N[picked[where]]).sum()
    summed = world.add(torch.stack(list(sums.values()))) if sums else ()
    stats = {f"loss/{kind}": float(s) / int((everything == kind).sum()) for kind, s in zip(sums, summed, strict=True)}
    if pu:
        named: dict[str, Tensor] = {}
        for name, mask in (
            ("up", (kinds == "thumb") & (rows.said_N[picked].cpu().numpy() > 0.5)),
            ("down", (kinds == "thumb") & (rows.said_N[picked].cpu().numpy() <= 0.5)),
            ("silent", kinds == "silence"),
        ):
            where = torch.from_numpy(np.flatnonzero(mask))
            named[name] = answers.thumb_logit(values[where, 0], rows.user_N[picked[where]])
        if count := sum(len(part) for part in named.values()):
            risk = answers.unlabelled(named)
            stats["loss/unlabelled"] = float(risk.detach())
            total = total + risk * count
    loss = total / weight.clamp(min=1e-9)
    if world.leads and (answers.variance is not None or hasattr(answers, "mistakes")):
        loss = loss + answers.penalty()
    if world.leads and latent.penalty is not None:
        loss = loss + latent.penalty()
    return loss, stats


# --- the fit ----------------------------------------------------------------------------------------


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
        DataError: data that cannot be fitted, or a split that leaks; see `rewards.fit_data`.
    """
    require_fit(config)
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
        if config.data.media == "image":
            content_keys(items, data.folders)  # what is missing is said before anything is written
        trained_on = sorted({places[name] for row in train_rows for name in row.items})
        if config.model.backbone != "classifier":
            latent = _frozen(config, data, items, trained_on)
    if config.model.backbone == "classifier":  # after the claim: it may keep a copy of the model in the folder
        if not world.leads:
            world.wait()
        with world.together():
            latent = _classifier(config, directory, items)
        if world.leads:
            world.wait()
    trimmed: list[dict[str, Any]] = []
    if config.users.trim:
        screened = [row for name in _screened(config) for row in parts[name]]
        trimmed = _trimmed(thin(screened, config)[0], latent, places, config)
        gone = {row["account"] for row in trimmed}
        for name in _screened(config):
            kept = [row for row in parts[name] if row.user not in gone]
            left[f"of trimmed people, in {name}"] = len(parts[name]) - len(kept)
            parts[name] = kept
        train_rows, share, thinned = thin(parts["train"], config)
        notes = [*warnings_on(train_rows, config), *_trim_notes(trimmed, config)]
    notes += _calibration_notes(parts["calibration"], config)
    users = {name: i for i, name in enumerate(sorted({row.user for row in train_rows if row.user}))}
    train = pack(train_rows, places, users, config)
    levels = next((row.value[1] for rows in parts.values() for row in rows if row.kind == "rating"), 0)
    answers = Answers(
        config, train, levels, share, _effects(train, len(users), share) if config.users.effects else None
    ).to(latent.device)
    said = {f"answers.{name}": p for name, p in answers.named_parameters()}
    parameters: Mapping[str, nn.Parameter] = {**latent.parameters, **said}
    record = {"rows": {name: len(rows) for name, rows in parts.items()}, "origins": config_origins(config)}
    engine: Engine | None = None
    module = latent.module if split and latent.module is not None else nn.ParameterList(parameters.values())
    if fsdp:
        engine = FSDP2Engine(module, lambda: {**_trained(module), **said}, config.optimizer, world)
        parameters = engine.parameters
    elif deepspeed is not None:
        engine = deepspeed_engine(module, parameters, config.optimizer, world, deepspeed)
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
                value = _values(latent, len(places), world)
            card = _card(config, data, value, answers.cpu(), parts, places, train)
            card |= {
                "left_out": {what: n for what, n in {**left, **thinned}.items() if n},
                "trimmed_users": trimmed,
                "warnings": notes,
            }
            world.led(lambda: _write_artefact(directory / "reward", config, latent, card))
        world.led(lambda: card.update(sparsity=_receipt(directory, config, run.log.read_metrics())))
        run.sitting.finish("complete")
        return FitResult(directory, "complete", plain(card))
    return FitResult(directory, "stopped", {})


def _seen(rows: Sequence[int], observations: Sequence[Observation], data: FitData) -> list[dict[str, Any]]:
    """Return the rows of a step, for people to read."""
    found = []
    for row in (observations[i] for i in rows):
        outputs = [dict(zip(("prompt", "output"), sample_of(data.items[name]), strict=True)) for name in row.items]
        found.append({"kind": row.kind, "said": row.value, "by": row.user, "outputs": outputs})
    return found


def _receipt(directory: Path, config: FitConfig, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Write which weights of a classifier moved; a head on frozen embeddings has none to be compared with."""

    def base() -> Path:
        if config.model.backbone != "classifier":
            raise ModelError(
                "A head has no weights before training to be compared with", where=config.model.backbone,
                why="it starts from nothing, and what it reads was not trained",
            )  # fmt: skip
        return _with_one_output(str(config.model.path), directory, config.seed)

    weights = directory / "reward" / "classifier"
    adapted = config.model.backbone == "classifier" and config.model.train == "lora"
    return write_receipt(directory, base, weights, travelled=Travelled(rows), adapted=adapted)


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


def parts_of(config: FitConfig, data: FitData) -> tuple[FitData, dict[str, list[Observation]], int]:
    """Return all that was read, a held-out file too, the rows of each part, and how many lie between parts.

    Raises:
        DataError: a split that leaks.
    """
    found, dropped = split_rows(data.rows, config.split, config.seed)
    parts = {name: [data.rows[i] for i in rows] for name, rows in found.items()}
    if config.split.heldout_path is not None:
        other = load_data([config.split.heldout_path], config.data)
        parts["train"] += parts["heldout"]
        for name in ("train", "calibration"):
            require_apart(parts[name], other.rows, config.split.by) if parts[name] else None
        parts["heldout"] = other.rows
        hashes = {n if n not in data.hashes else f"{n}, held out": digest for n, digest in other.hashes.items()}
        data = FitData(
            data.items | other.items, data.rows + other.rows, data.folders | other.folders, data.hashes | hashes,
            data.notes + other.notes, data.left_out + other.left_out,
        )  # fmt: skip
    return data, parts, dropped


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


def _screened(config: FitConfig) -> tuple[str, ...]:
    """Return the parts in which people are looked for, and from which those found are left out.

    A campaign is nobody's opinion in any part. People who only cost much stay where the reward is calibrated and
    reported: without them it would look better than it is.
    """
    return PARTS if config.users.trim == "auto" else ("train",)


def _trimmed(
    rows: Sequence[Observation], latent: Latent, places: Mapping[str, int], config: FitConfig
) -> list[dict[str, Any]]:
    """Return who is left out and why: accounts that act together, or the share whose thumbs are the least likely."""
    if latent.features is None:
        raise DataError("People are trimmed on frozen embeddings", where="users.trim", do="Choose another backbone")
    thumbs = [row for row in rows if row.kind == "thumb" and row.user]
    names = sorted({row.user for row in thumbs})
    if len(names) < 2 * FOLDS:
        raise DataError(
            "There are too few people to trim any", where="users.trim", why=f"{len(names)} gave thumbs",
            do=f"Set users.trim: 0, or collect from {2 * FOLDS} or more",
        )  # fmt: skip
    index = {name: i for i, name in enumerate(names)}
    user = np.array([index[row.user] for row in thumbs])
    output, item = np.unique([places[row.items[0]] for row in thumbs], return_inverse=True)
    features = latent.features[output].double()
    features = (features - features.mean(0)) / features.std(0).clamp(min=1e-6)
    seen = torch.tensor([float(row.value) for row in thumbs]).double()
    order = np.array(permutation(len(names), config.seed, "folds"))
    logit, loss = plove.out_of_fold(features, seen, order[user] % FOLDS, item_N=item, ridge=float(features.shape[1]))
    if config.users.trim == "auto":
        given = seen.numpy() > 0.5 if config.data.silence == "negative" else None
        found = find_campaigns(
            logit.numpy(), seen.numpy(), user, item, names, rate=config.users.false_discovery, answered_N=given,
            seed=config.seed,
        )  # fmt: skip
        return [row.as_dict() for row in found]
    cut = plove.trim_users(loss.numpy(), user, config.users.trim)
    reason = "their thumbs cost {:.3f} a row under a model of the others, among the {} that cost most"
    return [{"account": names[u], "reason": reason.format(cut.loss_U[u], len(cut.users))} for u in cut.users]


def _trim_notes(trimmed: Sequence[Mapping[str, Any]], config: FitConfig) -> list[str]:
    """Return who was left out as a warning, by name: nobody is left out silently."""
    if not trimmed:
        return []
    by = (
        f"false discovery rate {config.users.false_discovery:g}"
        if config.users.trim == "auto"
        else "the share asked for"
    )
    names = ", ".join(row["account"] for row in trimmed[:10]) + (" and others" if len(trimmed) > 10 else "")
    return [f"{len(trimmed)} accounts are left out ({by}), listed in the card with the reason of each: {names}"]


def _calibration_notes(rows: Sequence[Observation], config: FitConfig) -> list[str]:
    """Return that a probability cannot be calibrated as asked, with counts."""
    thumbs = [row.value for row in rows if row.kind == "thumb"]
    if config.calibration == "none" or not thumbs or 0 < sum(thumbs) < len(thumbs):
        return []
    return [f"{int(sum(thumbs))} of {len(thumbs)} thumbs held out for the calibration are up: it is left out"]


def _effects(train: Packed, users: int, share: float) -> tuple[np.ndarray, float]:
    """Return where people's effects start, and their variance under a model that knows nothing of the outputs."""
    rows = (train.kind_N == "thumb") & (train.user_N.numpy() >= 0)
    if not rows.any():
        raise DataError("Effects of people are of thumbs", where="users.effects", why="nobody gave one")
    user, seen = train.user_N.numpy()[rows], train.said_N.numpy()[rows].astype(np.float64)
    weight = np.where(seen > 0.5, 1.0, 1 / share)
    count = np.bincount(user, weights=weight, minlength=users)
    rate = np.bincount(user, weights=weight * seen, minlength=users) / np.maximum(count, 1e-9)
    base = min(max(float((weight * seen).sum() / weight.sum()), 1e-3), 1 - 1e-3)
    start = np.where(count > 0, plove.start_effects(count, rate, base), 0.0)
    _, variance = plove.fit_effects(np.full(len(seen), math.log(base / (1 - base))), seen, user, weight)
    return start, variance


# --- the card ---------------------------------------------------------------------------------------


@torch.no_grad()
def _values(latent: Latent, count: int, world: World) -> np.ndarray:
    """The latent reward of all outputs, each process working out its share."""
    mine = world.share(count)
    parts = [latent.of(mine[s : s + EVALUATED_AT_ONCE]) for s in range(0, len(mine), EVALUATED_AT_ONCE)]
    return np.concatenate(world.gather(torch.cat(parts).double().cpu().numpy() if parts else np.zeros(0)))


def _card(
    config: FitConfig, data: FitData, value: np.ndarray, answers: Answers, parts: Mapping[str, list[Observation]],
    places: Mapping[str, int], train: Packed,
) -> dict[str, Any]:  # fmt: skip
    """Return what the reward is worth on held-out rows, and what it was made of."""
    if bad := int((~np.isfinite(value)).sum()):
        raise DataError("The fitted reward is no number somewhere", why=f"of {bad} of {len(value)} outputs")
    calibration = _calibration(config, answers, value, parts["calibration"], places)
    return {
        "data": {
            "hashes": data.hashes, "observations": data.counts(), "notes": {k: n for k, n in data.notes.items() if n},
        },
        "split": {name: _part_counts(rows) for name, rows in parts.items()},
        "read": data.read,
        "trained_on": len(train),
        "calibration": calibration,
        "observation_models": _observation_models(answers),
        **_people(answers, train, value),
        "heldout": by_protocol(
            [row for row in parts["heldout"] if row.kind != "thumb" or calibration is not None],
            {name: value[i] for name, i in places.items()},
            None if calibration is None else lambda latent: calibrated(latent, calibration),
        ),
        "shared_with_heldout": _shared(parts),
        "known_failure_modes": _failure_modes(config, calibration),
    }  # fmt: skip


def _part_counts(rows: Sequence[Observation]) -> dict[str, int]:
    return {
        "rows": len(rows), "prompts": len({row.prompt for row in rows}),
        "users": len({row.user for row in rows} - {""}),
        "outputs": len({name for row in rows for name in row.items}),
    }  # fmt: skip


def _shared(parts: Mapping[str, list[Observation]]) -> dict[str, int]:
    """How many held-out rows have their prompt, or their person, in training: 0 for what was split by."""
    found = {}
    for axis in ("prompt", "user"):
        known = {getattr(row, axis) for row in parts["train"]} - {""}
        found[axis] = sum(getattr(row, axis) in known for row in parts["heldout"])
    return found


def _thumbs(rows: Sequence[Observation], value: np.ndarray, places: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray]:
    thumbs = [row for row in rows if row.kind == "thumb"]
    seen = np.array([float(row.value) for row in thumbs])
    return value[[places[row.items[0]] for row in thumbs]] if thumbs else np.zeros(0), seen


def _calibration(
    config: FitConfig, answers: Answers, value: np.ndarray, rows: Sequence[Observation], places: Mapping[str, int]
) -> dict[str, Any] | None:
    """Return what makes a probability of the latent; None where nobody gave thumbs."""
    if not hasattr(answers, "thumb_bias"):
        return None
    plain = {"kind": "none", "a": answers.thumb_scale().item(), "b": answers.thumb_bias.item(), "n": 0}
    latent, seen = _thumbs(rows, value, places)
    if config.calibration == "none" or config.data.silence == "unlabelled" or not 0 < seen.sum() < len(seen):
        return plain
    if config.calibration == "isotonic":
        if len(seen) < 1000:
            raise DataError(
                "An isotonic calibration needs 1,000 rows", where="calibration", why=f"{len(seen)} are held out for it",
                do="Use calibration: temperature",
            )  # fmt: skip
        return {"kind": "isotonic", **plove.fit_isotonic(latent, seen), "n": len(seen)}
    a, b = plove.fit_temperature(latent, seen)
    return {"kind": "temperature", "a": a, "b": b, "n": len(seen)}


def _observation_models(answers: Answers) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: value.item()
        for name, value in answers.named_parameters()
        if name not in ("effect", "rating_first", "rating_gaps", "mistakes")
    }
    if hasattr(answers, "thumb_bias"):
        found["mistakes"] = dict(
            zip(
                ("rho_up", "rho_down"),
                (float(rate.detach() if isinstance(rate, Tensor) else rate) for rate in answers.mistake_rates()),
                strict=True,
            )
        )
    if hasattr(answers, "rating_gaps"):
        found["rating_thresholds"] = answers.thresholds().tolist()
    return found


def _people(answers: Answers, train: Packed, value: np.ndarray) -> dict[str, Any]:
    """Return the variance of people's effects: that of the prior, and that of the training rows given the reward."""
    if answers.variance is None:
        return {}
    rows = (train.kind_N == "thumb") & (train.user_N.numpy() >= 0)
    with torch.no_grad():
        logit = answers.thumb_logit(torch.from_numpy(value[train.item_NM[:, 0].numpy()[rows]])).numpy()
    user, seen = train.user_N.numpy()[rows], train.said_N.numpy()[rows].astype(np.float64)
    _, variance = plove.fit_effects(logit, seen, user, np.where(seen > 0.5, 1.0, math.exp(answers.shift)))
    return {"user_variance": {"prior": answers.variance, "given_the_reward": variance}}


def _failure_modes(config: FitConfig, calibration: Mapping[str, Any] | None) -> list[str]:
    found = [
        "A policy that is trained on it finds outputs that it scores high and people do not: keep a judge that it does "
        "not see, and prefer selection to training.",
        "It says what those people said of those outputs; others, and outputs unlike them, are not covered.",
    ]
    if config.model.backbone == "words":
        found.append("It reads words, not meaning: long or keyword-laden responses may score high.")
    if config.model.backbone == "pixels":
        found.append("It does not read the prompt: an image that answers another prompt scores the same.")
    if config.data.silence == "negative":
        found.append("Silence counted as a negative: what decides whether people react at all is part of the score.")
    if config.data.silence == "unlabelled":
        found.append("The share of positives in silence was assumed, and its probability is not calibrated.")
    elif calibration is not None and calibration["n"] == 0:
        found.append("Its probability was not calibrated on held-out rows.")
    if calibration is not None and config.users.trim != "auto":
        found.append("Accounts that act together were not looked for (users.trim: auto).")
    if config.objective.mistakes == "fitted":
        found.append("Its rates of mistakes were fitted, of which a log says little.")
    if calibration is None:
        found.append("It is known up to a constant of each prompt: compare outputs of one prompt only.")
    return found


def _write_artefact(folder: Path, config: FitConfig, latent: Latent, card: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    latent.save(folder)
    document = {
        "format": FORMAT, "name": config.name, "media": config.data.media, "embedder": latent.embedder,
        "model": config.model.model_dump(mode="json"), "calibration": card["calibration"], "card": card,
    }  # fmt: skip
    if config.model.path is not None:
        document["model"]["path"] = os.path.abspath(Path(config.model.path).expanduser())
    replace_text(folder / ARTEFACT, json.dumps(plain(document), indent=1, allow_nan=False) + "\n")
