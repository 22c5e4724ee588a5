"""Published files of weights: where they are, here or on the hub, and how to know them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from align.errors import ModelError, first_line
from align.weights import file_sha256


@dataclass(frozen=True)
class Weights:
    """A published file of weights: where it is, and how to know it.

    Args:
        repo: hub repository, "owner/name".
        file: path inside it.
        sha256: of the file, or its first digits where no more are known; empty where no hash has been published.
        bytes: size of the file, 0 where unknown.
        revision: commit of the repository, the newest when None.
    """

    repo: str
    file: str
    sha256: str = ""
    bytes: int = 0
    revision: str | None = None


def locate(weights: Weights, path: str | Path | None = None) -> Path:
    """Return the file of `weights`: at `path`, a file or a folder that holds it, else from the hub or its cache.

    The size and the hash are checked where they are known, also of a local file.

    Raises:
        ModelError: no such file, a hub that cannot be reached, or a file that is not the published one.
    """
    if path is not None:
        found = Path(path).expanduser()
        inside = [found / name for name in (weights.file, Path(weights.file).name)]
        found = next((p for p in inside if p.is_file()), found)
        if not found.is_file():
            raise ModelError(
                "The weights are not there", where=str(path),
                why=f"there is no {Path(weights.file).name} in it" if Path(path).is_dir() else "there is no such file",
                do=f"Give the file {weights.file} of {weights.repo}",
            )  # fmt: skip
    else:
        found = download(weights.repo, weights.file, weights.revision)
    require_file(found, weights)
    return found


def download(repo: str, file: str, revision: str | None = None) -> Path:
    """Return a hub file from the local cache, fetched on first use.

    Raises:
        ModelError: the hub cannot be reached, or has no such file.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, file, revision=revision))
    except (OSError, ValueError, RuntimeError) as error:  # what the hub client raises derives from one of these
        raise ModelError(
            "Weights could not be fetched", where=f"{repo}, {file}", why=first_line(error),
            do="Download the file where there is a network, and give its path",
        ) from error  # fmt: skip


def download_folder(repo: str, revision: str | None = None) -> Path:
    """Return the folder of a hub repository's safetensors, configuration and tokenizer; no code, nothing pickled.

    Raises:
        ModelError: the hub cannot be reached, or the repository holds no safetensors.
    """
    from huggingface_hub import snapshot_download

    kinds = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=kinds))
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            "There is no such folder, and the hub has no model of that name to be fetched", where=repo,
            why=first_line(error),
            do="Give the path of a folder, or download the repository where there is a network",
        ) from error  # fmt: skip
    if not any(folder.glob("*.safetensors")):
        raise ModelError("The repository holds no safetensors", where=repo, do="Convert its weights, and give a folder")
    return folder


def download_pipeline(repo: str) -> Path:
    """Return the folder of a diffusers pipeline on the hub: its parts in safetensors, no code, nothing pickled.

    Raises:
        ModelError: the hub cannot be reached, or has no such pipeline.
    """
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(repo, use_safetensors=True))
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            "There is no such folder, and the hub has no pipeline of that name to be fetched", where=repo,
            why=first_line(error),
            do="Give the path of a folder, or download the repository where there is a network",
        ) from error  # fmt: skip


def require_file(path: Path, weights: Weights) -> None:
    """Refuse a file that is not the published one.

    Raises:
        ModelError: another size or another sha256.
    """
    size = path.stat().st_size
    if weights.bytes and size != weights.bytes:
        raise ModelError(
            "These are not the published weights", where=str(path), why=f"{size:,} bytes instead of {weights.bytes:,}",
            do=f"Fetch {weights.file} of {weights.repo} again",
        )  # fmt: skip
    if weights.sha256 and not (digest := file_sha256(path)).startswith(weights.sha256):
        raise ModelError(
            "These are not the published weights", where=str(path),
            why=f"its sha256 begins {digest[:12]}, that of the published file {weights.sha256[:12]}",
            do=f"Fetch {weights.file} of {weights.repo} again",
        )  # fmt: skip
