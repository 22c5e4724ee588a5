"""A tiny language model, and its runs in one process, for a module's tests to share."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from trainers.tiny_language import build_tiny

    return build_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def alone(model, tmp_path_factory):
    """Returns the folder of a run in one process, made when it is first asked for."""
    from tests.distributed.language_runs import Told, small

    root, made = tmp_path_factory.mktemp("alone"), {}

    def find(trainer, overrides):
        key = (trainer, overrides)
        if key not in made:
            out = root / str(len(made))
            assert Told(small(model, trainer, *overrides), out, None).train().status == "complete"
            made[key] = out
        return made[key]

    return find
