"""What a bare launcher takes: `align train`, with the arguments of `align train --help`.

deepspeed --num_gpus 8 scripts/train.py my.yaml --deepspeed zero2
torchrun --nproc_per_node 8 scripts/train.py my.yaml
"""

from __future__ import annotations

import sys

from align.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
