"""What a launcher starts in these tests: train, and leave what each process ended with as OUT/told_RANK.json.

torchrun --nproc_per_node 2 tests/distributed/train_and_tell.py OUT KEY=VALUE...
deepspeed --num_accelerators 2 --no_local_rank tests/distributed/train_and_tell.py OUT --deepspeed zero2 KEY=VALUE...
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch

from align.config import load_config
from align.launch import leave_world
from trainers import DanceGRPO


class Told(DanceGRPO):
    """A trainer that keeps its run, so that one can see what really carried its updates out."""

    def open_run(self):
        self.run = super().open_run()
        return self.run


def train(out: Path, overrides: list[str], deepspeed: str | None = None) -> dict:
    """Train `digits/smoke` under these overrides; return what this process ended with."""
    trainer = Told(load_config("digits/smoke", overrides), out=out, deepspeed=deepspeed)
    result = trainer.train()
    weights = {n: p.detach() for n, p in sorted(trainer.policy.trainable().items())}
    digest = hashlib.sha256(b"".join(w.numpy().tobytes() for w in weights.values())).hexdigest()
    engine = trainer.run.engine
    told = {
        "status": result.status, "weights": digest, "engine": type(engine).__name__, "name": engine.name,
        "world": torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1,
    }  # fmt: skip
    if deepspeed is not None:
        import deepspeed as ds

        inner = engine.engine
        told |= {
            "inner": isinstance(inner, ds.DeepSpeedEngine), "stage": inner.zero_optimization_stage(),
            "optimizer": type(inner.optimizer).__name__, "splits_gradients": inner.optimizer.partition_gradients,
        }  # fmt: skip
    return told


if __name__ == "__main__":
    out, *rest = sys.argv[1:]
    settings = rest.pop(rest.index("--deepspeed") + 1) if "--deepspeed" in rest else None
    told = train(Path(out), [word for word in rest if "=" in word], settings)
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    (Path(out) / f"told_{rank}.json").write_text(json.dumps(told))
    leave_world()
