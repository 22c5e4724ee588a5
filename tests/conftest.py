"""One thread a process, as `make test` sets it: two gain nothing on tiny models, and another number rounds otherwise."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
