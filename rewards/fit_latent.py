"""The latent reward that a fit trains: a head on frozen embeddings, one on towers, or a sequence classifier."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from align.feedback.events import Item
from align.fit_config import FitConfig
from align.seeding import seed
from align.sharding import is_sharded
from align.types import Samples
from rewards.classifier import Classifier, Encoded
from rewards.embeddings import build_embedder, clip_features, clip_towers, embed_all
from rewards.fit_data import FitData
from rewards.fitted import HEAD, LOG_SCALE, TOWERS, Head
from rewards.folders import read_model_config
from rewards.media import clip_pixels, stacked
from rewards.outputs import content_keys, load_outputs, sample_of
from rewards.placement import Placement


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


def frozen_latent(config: FitConfig, data: FitData, items: Sequence[Item], train: Sequence[int]) -> Latent:
    """Return a head on embeddings of numbered outputs, standardised over `train`, and the towers that are trained.

    Raises:
        ModelError: weights that are not there or not what they should be.
        DataError: outputs of another medium, or embeddings that are no numbers.
    """
    model = config.model
    embedder = build_embedder(
        model.backbone, path=model.path, architecture=model.architecture, size=model.size, placement=Placement()
    )

    def load(places: Sequence[int]) -> Samples:
        return load_outputs([items[i] for i in places], data.folders)

    features = embed_all(embedder, content_keys(items, data.folders), load)
    # Comparisons ask for differences alone; what else is said needs f near 0, and under CLIP's scale a cosine is 25.
    compared = {row.kind for row in data.rows} <= {"comparison", "ranking"}
    log_scale = embedder.log_scale if compared and embedder.log_scale is not None else LOG_SCALE
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed(config.seed, "fit", "head"))
        head = Head(model.head, features.shape[1], model.width, embedder.halves, log_scale)
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


def classifier_latent(config: FitConfig, directory: Path, items: Sequence[Item]) -> Latent:
    """The logit of a sequence classifier; dropout is off, so that a run is a function of its config."""
    start = with_one_output(str(config.model.path), directory, config.seed)
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

    return Latent(trained_parameters(reader.model), of, save, module=reader.model)


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights of a module that are trained, by name."""
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


def with_one_output(path: str, directory: Path, at: int) -> Path:
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
