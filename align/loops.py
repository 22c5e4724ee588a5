"""The training loops by the value of `trainer`: one line each, from which configs, trainers and reports know them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Loop:
    """A training loop, and where its parts are.

    Args:
        title: what its parts are named after: `<title>Config`; what trains has the title itself, in the file of
            trainers/ that has the loop's name; an objective on language models, there too, is `<title>Objective`.
        config: module of its config.
    """

    title: str
    config: str


VISUAL = {
    "dance_grpo": Loop("DanceGRPO", "align.config"),
    "forward": Loop("Forward", "align.forward_config"),
    "offline": Loop("Offline", "align.offline_config"),
}
LANGUAGE = {
    "kto": Loop("KTO", "align.language_config"),
    "bco": Loop("BCO", "align.language_config"),
    "dpo": Loop("DPO", "align.language_config"),
    "sft": Loop("SFT", "align.language_config"),
    "rluf": Loop("RLUF", "align.rluf_config"),
}
REWARDS = {"fit": Loop("Fit", "align.fit_config"), "peering": Loop("Peering", "align.peering_config")}
"""Loops that fit rewards, which live in rewards/."""
LOOPS = {**VISUAL, **LANGUAGE, **REWARDS}
