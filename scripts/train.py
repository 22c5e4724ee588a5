"""What a bare launcher takes: `align train`, with the arguments of `align train --help`.

deepspeed --num_gpus 8 scripts/train.py my.yaml --deepspeed zero2
torchrun --nproc_per_node 8 scripts/train.py my.yaml
accelerate launch --config_file zero3.yaml scripts/train.py my.yaml
"""

from __future__ import annotations

import sys

from align.cli import main

if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank=")]  # deepspeed adds it
    sys.exit(main(["train", *words]))
