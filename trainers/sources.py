"""What `sample` and `evaluate` are given: a run, one of its checkpoints, a recipe or a bare model; images or text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align import checkpoint
from align.config import load_config
from align.errors import ConfigError
from align.published import is_embedded, is_hub_name
from align.recipes import list_recipes

NAME_PROMPTS = "Give a file with --prompts FILE, or to `align sample` a --prompt TEXT"


@dataclass(frozen=True)
class Source:
    """A source, found and not yet loaded.

    Args:
        name: as it was given.
        language: a language model, rather than one of images.
        config: of the run or recipe; None for a bare model.
        run: the run folder, None outside of one.
        checkpoint: the run's checkpoint, None where there is no run.
        bare: the source is itself the folder or name of a model.
    """

    name: str
    language: bool
    config: Any = None
    run: Path | None = None
    checkpoint: Path | None = None
    bare: bool = False

    @property
    def folder(self) -> Path | None:
        """Where trained weights are; None for a recipe, of which nothing has been trained."""
        return Path(self.name) if self.bare else self.checkpoint

    @property
    def sampled(self) -> Path:
        """Where samples go unless told: into the run's folder; of anything else, to this place."""
        images, answers = "samples" if self.run is None else "sampled", "completions.jsonl"
        return (self.run or Path()) / (answers if self.language else images)


def find_source(source: str | Path) -> Source:
    """Find a run folder (its last checkpoint), a checkpoint folder, a language recipe, or a model folder or name.

    Raises:
        CheckpointError: a run without a checkpoint.
        ConfigError: nothing of that name, or a folder of runs, which is none.
    """
    path, name = Path(source), str(source)
    found = checkpoint.find_run(source)
    if found is not None:
        run, step = found
        config = load_config(run / "config.yaml")
        return Source(name, config.language, config, run, step)
    if path.suffix in (".yaml", ".yml") or name in dict(list_recipes()):
        config = load_config(name)
        if config.language:
            return Source(name, True, config)
    pipeline = (path / "model_index.json").is_file()
    known = (path / "adapter_config.json").is_file() or (path / "config.json").is_file()
    if not (pipeline or known) and checkpoint.name_runs(path):
        raise checkpoint.not_a_run(path, "it holds runs, and is none")
    if not (path.exists() or is_embedded(name) or is_hub_name(name)):
        raise ConfigError(
            "There is no such run, model or recipe", where=name,
            do="Give a run folder, a checkpoint, a model folder, a recipe's name, digits or tiny",
        )  # fmt: skip
    return Source(name, name == "tiny" or (known and not pipeline), bare=True)
