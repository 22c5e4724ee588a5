"""What scoring costs beside the bare model, at ViT-B/32's real size with random weights.

    python scripts/bench_rewards.py --json bench.json [--batch 16] [--group 4] [--rounds 7] [--side 512]

scoring_vs_bare      bare open_clip forward of the same images and prompts / our scoring less preprocessing  (>= .95)
preprocessing        checks, resizing and normalising of the batch, seconds, and PIL's on the same images
prompt_tower_passes  rows that went through the prompt tower for P prompts of G images                     (== P)
file_reads           times the weights were read for two rewards on one file                               (== 1)
memory               of each reward: the peak while it loads and scores, and what its weights are, in MB

Arms alternate within each round and the medians of the rounds' ratios are reported; times are CPU time of the process,
or of a GPU by events. ViT-H/14 joins with an accelerator.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import open_clip
import torch
from measuring import cost, over_rounds, peak_mb
from PIL import Image

from align.run import describe_machine
from align.types import Samples
from rewards import get_reward, towers
from rewards.media import clip_pixels, problems, stacked
from rewards.towers import ClipReward

SIZES = {"ViT-B-32-quickgelu": ("clip/hessel", "clip/cosine"), "ViT-H-14": ("hpsv2", "pickscore")}


def write_weights(architecture: str, folder: Path) -> Path:
    """Save random weights of an architecture's real size."""
    torch.manual_seed(0)
    file = folder / f"{architecture}.pt"
    torch.save({"state_dict": open_clip.create_model(architecture, load_weights=False).state_dict()}, file)
    return file


def make_samples(batch: int, group: int, side: int) -> Samples:
    """Return `batch` random images, `group` a prompt."""
    generator = torch.Generator().manual_seed(0)
    prompts = [f"a photograph of subject number {i // group} in the rain" for i in range(batch)]
    return Samples(prompts=prompts, images=torch.rand(batch, 3, side, side, generator=generator))


class Arms:
    """One reward, and the same work done bare, on the same weights, images and prompts."""

    def __init__(self, reward: ClipReward, samples: Samples) -> None:
        self.reward, self.samples = reward, samples
        self.device, self.size = reward.placement.device, reward.towers.size
        self.bare = reward.towers.model
        self.seen = self.preprocess()
        prompts = [reward.recipe.prefix + p for p in samples.prompts]
        self.tokens = reward.towers.tokenizer(prompts).to(self.device)
        array = (samples.images * 255).round().byte().permute(0, 2, 3, 1).numpy()
        self.pictures = [Image.fromarray(np.ascontiguousarray(a)) for a in array]
        self.pil = open_clip.image_transform(self.size, is_train=False)

    def preprocess(self) -> torch.Tensor:
        """Everything scoring does to images before the tower."""
        problems(self.samples)
        return clip_pixels(stacked(self.samples.images, self.device), self.size, **self.reward.recipe.pixels)

    def forward(self) -> torch.Tensor:
        """The bare model on images and prompts that are ready."""
        with torch.no_grad():
            image, text, scale = self.bare(self.seen, self.tokens)
            return scale * (image * text).sum(-1)

    def score(self) -> None:
        """Our scoring, every prompt new."""
        self.reward.towers._prompts.clear()
        self.reward.score(self.samples)

    def rescore(self) -> None:
        """Our scoring, every prompt known."""
        self.reward.score(self.samples)

    def pil_preprocess(self) -> torch.Tensor:
        """open_clip's own transform of the same images."""
        return torch.stack([self.pil(picture) for picture in self.pictures])


def compare(architecture: str, file: Path, args: argparse.Namespace) -> dict[str, object]:
    """Measure one architecture."""
    first, second = SIZES[architecture]
    own = {"path": str(file), "architecture": architecture, "batch_size": args.batch}
    with mock.patch.object(towers, "load_tensors", wraps=towers.load_tensors) as reads:
        reward, other = get_reward(first, **own), get_reward(second, **own)
    # Distinct prompts, so that the bare model has no prompt less to do.
    arms = Arms(reward, make_samples(args.batch, 1, args.side))
    works = {
        "bare": arms.forward, "score": arms.score, "preprocess": arms.preprocess, "rescore": arms.rescore,
        "pil_preprocess": arms.pil_preprocess,
    }  # fmt: skip
    for work in works.values():
        work()
    rows = [{name: cost(work) for name, work in works.items()} for _ in range(args.rounds)]
    ratios = [row["bare"] / (row["score"] - row["preprocess"]) for row in rows]

    grouped, passed = make_samples(args.batch, args.group, args.side), []
    hook = reward.towers.model.transformer.register_forward_pre_hook(lambda module, given: passed.append(len(given[0])))
    reward.towers._prompts.clear()
    for _ in range(2):
        reward.score(grouped)
    hook.remove()
    median = {name: statistics.median(row[name] for row in rows) for name in works}
    return {
        **over_rounds("scoring_vs_bare", ratios),
        "whole_score_vs_bare": median["bare"] / median["score"],
        "prompt_tower_passes": sum(passed),
        "prompts": len(set(grouped.prompts)),
        "file_reads": reads.call_count,
        "shared": reward.towers is other.towers,
        "seconds": median,
        "images_a_second": args.batch / median["rescore"],
    }


def measure_memory(name: str, file: str, architecture: str, args: argparse.Namespace) -> None:
    """In a process of its own: build one reward, score one batch, and write the peak to standard output."""
    samples = make_samples(args.batch, args.group, args.side)
    before = peak_mb()
    reward = get_reward(name, path=file, architecture=architecture)
    loaded = peak_mb()
    scored = reward.score(samples)
    peak = peak_mb()
    weights = sum(t.numel() * t.element_size() for t in reward.towers.model.parameters()) / 1e6
    found = {"weights": weights, "peak_loading": loaded - before, "peak_scoring": peak - before}
    if torch.cuda.is_available():
        found["peak_accelerator"] = torch.cuda.max_memory_allocated() / 1e6
    if not scored.valid.all():
        raise SystemExit(f"the benchmark scored nothing: {scored.errors[0]}")
    sys.stdout.write(json.dumps(found))


def main() -> None:
    """Run the arms and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="file to write the figures to")
    parser.add_argument("--batch", type=int, default=16, help="images scored at once")
    parser.add_argument("--group", type=int, default=4, help="images of one prompt, where prompts repeat")
    parser.add_argument("--side", type=int, default=512, help="pixels of an image's side")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of alternating arms; medians are reported")
    parser.add_argument("--memory-of", nargs=3, metavar=("NAME", "FILE", "ARCHITECTURE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        measure_memory(*args.memory_of, args)
        return
    if not args.json:
        parser.error("--json is needed")
    result: dict[str, object] = {"batch": args.batch, "group": args.group, "side": args.side, "rounds": args.rounds}
    with tempfile.TemporaryDirectory() as folder:
        for architecture, names in SIZES.items():
            if architecture == "ViT-H-14" and not torch.cuda.is_available():
                continue
            file = write_weights(architecture, Path(folder))
            found = compare(architecture, file, args)
            shape = ["--batch", str(args.batch), "--group", str(args.group), "--side", str(args.side)]
            found["memory"] = {
                name: json.loads(
                    subprocess.run(
                        [sys.executable, __file__, "--memory-of", name, str(file), architecture, *shape],
                        check=True, capture_output=True, text=True,
                    ).stdout
                )
                for name in names
            }  # fmt: skip
            result[architecture] = found
    result |= describe_machine()
    Path(args.json).write_text(json.dumps(result, indent=1), encoding="utf-8")
    sys.stdout.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
