"""Kill, stop and resume training at random moments, and see whether anything acknowledged was lost.

    python -m scripts.fault_injection kills --count 30                   # SIGKILL; resumed runs against one left alone
    python -m scripts.fault_injection kills --trainer kto --count 30
    python -m scripts.fault_injection kills steps=24 --ranks 2 --deepspeed zero2 --count 40
    python -m scripts.fault_injection kills steps=24 --ranks 2 --deepspeed zero2 --lone   # one alone: the other ends
    python -m scripts.fault_injection stops --count 100                  # SIGTERM: saved within the grace time
    python -m scripts.fault_injection stops --ranks 2 --count 20

Prints a JSON object; exits with 1 when something was lost. `--json FILE` adds a line to a file for every run that was
compared and every stop as it is done, so that a sitting that is cut off keeps what it found and another `--seed` adds
to it. What is killed is forked from this process, which has imported everything already, so that a kill costs a second
and not ten. For checkpoints and stores themselves see `kill_save.py`.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from align import checkpoint
from align.cli import main as align
from align.config import load_config
from align.errors import AlignError
from align.tracking import read_jsonl
from scripts.kill_save import child
from trainers import trainer_for

RECIPE = [
    "model.path=digits/random", "steps=8", "checkpoint.every=2", "optimizer.ema_decay=0.9", "evaluation.every=3",
    "evaluation.final_samples=20", "evaluation.samples=20", "tracking.samples_every=4",
]  # fmt: skip
_LANGUAGE = [
    "steps=40",
    "batch_size=8",
    "microbatch=4",
    "evaluation.every=15",
    "evaluation.rows=8",
    "checkpoint.every=7",
]
_IMAGES = [*RECIPE[:3], *RECIPE[4:], "model.lora.rank=4", "sampler.solver_steps=4", "evaluation.solver_steps=4"]
# A recipe of every trainer, made small: its name and what is changed.
RECIPES = {
    "dance_grpo": ("digits/smoke", RECIPE),
    "forward": ("digits/nft", [*_IMAGES, "prompts_per_step=3", "group_size=4"]),
    "offline": ("digits/diffusion_kto", [*_IMAGES[:-2], "evaluation.solver_steps=4", "batch_size=8"]),
    "kto": ("kto/smoke", [*_LANGUAGE, "evaluation.max_new_tokens=4"]),
    "bco": ("bco/smoke", [*_LANGUAGE, "evaluation.max_new_tokens=4"]),
    "dpo": ("dpo/smoke", [*_LANGUAGE, "evaluation.max_new_tokens=4"]),
    "sft": ("sft/smoke", _LANGUAGE),
    "rluf": ("rluf/smoke", ["steps=6", "evaluation.rows=8", "evaluation.prompts=8", "checkpoint.every=2"]),
}
GRACE = 60  # seconds in which a run that was told to stop must have saved and ended


def _timeless(row: Any) -> Any:
    if isinstance(row, dict):
        return {k: _timeless(v) for k, v in row.items() if not any(t in k for t in ("seconds", "time", "memory"))}
    return [_timeless(value) for value in row] if isinstance(row, list) else row


def fingerprint(run: Path) -> dict[str, Any]:
    """Everything a run ends with, without its timings: weights, optimizer, average, random state, logs."""
    steps = checkpoint.checkpoints(run / "checkpoints")
    last = steps[max(steps)]
    hashes = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(last.rglob("*.safetensors"))}
    state = _timeless(json.loads((last / "state.json").read_text(encoding="utf-8")))
    logs = {
        name: [_timeless(json.loads(line)) for line in (run / name).read_text(encoding="utf-8").splitlines()]
        for name in ("metrics.jsonl", "evaluation.jsonl", "generations.jsonl", "warnings.jsonl")
        if (run / name).is_file()
    }
    summary = _timeless(json.loads((run / "summary.json").read_text(encoding="utf-8")))
    return {"steps": list(steps), **hashes, "state": state, **logs, "summary": summary}


def _launch(work: Callable[[], Any], ranks: int, folder: Path) -> list[int]:
    """Fork `work` as a launcher's processes, which find each other, or as one process; return their pids.

    What each writes to stderr goes to `said_RANK` in the folder.
    """
    if ranks == 1:
        return [child(work, folder / "said_0")]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        world = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}

    def ranked(rank: int) -> Callable[[], None]:
        def named() -> None:
            os.environ.update({**world, "RANK": str(rank), "LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"})
            work()

        return named

    return [child(ranked(rank), folder / f"said_{rank}") for rank in range(ranks)]


def _ended(pids: list[int], seconds: float) -> dict[int, int]:
    """Wait that long for processes, and return the exit codes of those that ended."""
    until, codes = time.monotonic() + seconds, {}
    while len(codes) < len(pids):
        for pid in [pid for pid in pids if pid not in codes]:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            break
        time.sleep(0.005)
    return codes


def _killed(pids: list[int], seconds: float, victim: int | None = None) -> tuple[list[int], float]:
    """Kill processes that still run after that long: all, or the victim alone, which the others must then notice.

    Returns:
        the exit codes (of who had to be killed, -9), and the seconds that the others took to end.
    """
    codes = _ended(pids, seconds)
    left, began = [pid for pid in pids if pid not in codes], time.monotonic()
    for pid in left if victim is None else {pids[victim]} & set(left):
        os.kill(pid, signal.SIGKILL)
    codes |= _ended(left, GRACE)
    took = time.monotonic() - began
    for pid in [pid for pid in left if pid not in codes]:
        os.kill(pid, signal.SIGKILL)
        codes |= _ended([pid], GRACE)
    return [codes[pid] for pid in pids], took


def kills(
    count: int, seed: int, folder: Path, trainer: str = "dance_grpo", ranks: int = 1, deepspeed: str | None = None, *,
    lone: bool = False, more: Sequence[str] = (), tell: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:  # fmt: skip
    """Kill training at random moments until `count` kills are done; compare every finished run with one left alone.

    Args:
        count: kills to do; the run of the last one is started again until it ends.
        seed: of the moments.
        folder: for the runs.
        trainer, ranks, deepspeed: what is killed.
        lone: kill one process of a world alone; the others must end by themselves, in words.
        more: what else is changed of the trainer's recipe.
        tell: is given what was found of every run once it is compared.
    """
    recipe, changes = RECIPES[trainer]
    waits = [f"checkpoint.hung_after_seconds={GRACE // 3}"] if lone else []
    config, draw = load_config(recipe, [*changes, *waits, *more]), random.Random(seed)
    _warm(config, deepspeed, folder / "here")

    def train(out: Path) -> Callable[[], None]:
        def work() -> None:
            try:
                trainer_for(config, out=out, deepspeed=deepspeed).train()
            except AlignError as error:
                sys.stderr.write(f"align: {error}\n")
                os._exit(2)

        return work

    began = time.monotonic()
    codes, _ = _killed(_launch(train(folder / "alone"), ranks, folder), 600)
    if set(codes) != {0}:
        raise SystemExit(f"the run that is left alone ended with exit codes {codes}")
    alone, whole = time.monotonic() - began, fingerprint(folder / "alone")
    done, runs, differing, stood, failures, longest = 0, 0, [], [], [], 0.0
    while done < count:
        out, before = folder / f"killed_{runs}", (done, len(failures))
        while True:
            seconds, victim = (draw.uniform(0.0, alone), draw.randrange(ranks)) if done < count else (600.0, 0)
            codes, took = _killed(_launch(train(out), ranks, folder), seconds, victim if lone else None)
            if set(codes) == {0}:
                break
            done += 1
            stood.append(len(read_jsonl(out / "metrics.jsonl")[0]) if (out / "metrics.jsonl").exists() else 0)
            if wrong := _survivors(codes, victim, folder) if lone else set(codes) - {-9, 0}:
                failures.append(f"kill {done}, after {seconds:.2f} s of process {victim}: {wrong}")
            longest = max(longest, took)
        found = fingerprint(out)
        differs = [f"run {runs}: {key}" for key in whole if found.get(key) != whole[key]]
        differing += differs
        tell({
            "trainer": trainer, "ranks": ranks, "deepspeed": deepspeed, "lone": lone, "seed": seed, "run": runs,
            "kills": done - before[0], "steps_done_at_the_kills": stood[before[0] :], "differing": differs,
            "failures": failures[before[1] :],
        })  # fmt: skip
        runs += 1
        shutil.rmtree(out)
    return {
        "trainer": trainer, "ranks": ranks, "deepspeed": deepspeed, "lone": lone, "kills": done, "runs": runs,
        "steps_done_at_the_kills": stood, "seconds_of_one_run": round(alone, 2), "differing": differing,
        "longest_until_the_others_ended": round(longest, 2) if lone else None, "failures": failures,
    }  # fmt: skip


def _survivors(codes: list[int], victim: int, folder: Path) -> str:
    """Say what is wrong with how processes ended of which one was killed; nothing if they said that it is gone."""
    if codes[victim] != -signal.SIGKILL:
        return f"exit codes {codes}"
    for rank, code in enumerate(codes):
        words = _last_line(folder / f"said_{rank}")
        named = "Another process of the run is gone" in words or "A process of the run does not come" in words
        if rank != victim and code and not (code == 2 and named):
            return f"exit codes {codes}, process {rank} said {words!r}"
    return ""


def _last_line(said: Path) -> str:
    """Return the last line that a process wrote."""
    return (said.read_text(encoding="utf-8", errors="replace").splitlines() or [""])[-1]


def _warm(config: Any, deepspeed: str | None, out: Path) -> None:
    """Run once here, which imports all that a run imports, so that kills hit training."""
    trainer_for(config, out=out).train()
    if deepspeed:
        os.environ["DS_ACCELERATOR"] = "cpu"
        for module in ("deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer"):  # the second is imported late
            importlib.import_module(module)


def stops(
    count: int, seed: int, folder: Path, trainer: str = "dance_grpo", ranks: int = 1,
    *, more: Sequence[str] = (), tell: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:  # fmt: skip
    """Send SIGTERM at `count` random moments, from the start of the command on; all must save and end in `GRACE`."""
    recipe, changes = RECIPES[trainer][0], [*RECIPES[trainer][1], *more]
    draw, failures, took = random.Random(seed), [], []
    met = {"saved": 0, "complete": 0, "nothing_to_save": 0}
    codes: dict[str, int] = {}
    _warm(load_config(recipe, changes), None, folder / "here")

    def train(out: Path) -> Callable[[], None]:
        return lambda: os._exit(align(["train", recipe, *changes, "--out", str(out)]))

    began = time.monotonic()
    _killed(_launch(train(folder / "alone"), ranks, folder), 600)
    alone = time.monotonic() - began
    for n in range(count):
        out = folder / f"stopped_{n}"
        pids = _launch(train(out), ranks, folder)
        time.sleep(draw.uniform(0.0, alone))
        began, chosen = time.monotonic(), draw.choice(pids)
        os.kill(chosen, signal.SIGTERM)
        ended, _ = _killed(pids, GRACE)
        took.append(time.monotonic() - began)
        together = " ".join(map(str, sorted(ended)))
        codes[together] = codes.get(together, 0) + 1
        how = _state(out, ended)
        if how in met:
            met[how] += 1
        else:
            failures.append(f"stop {n}, exit codes {ended}: {how}")
        tell({
            "trainer": trainer, "ranks": ranks, "seed": seed, "stop": n, "codes": ended, "how": how,
            "seconds": round(took[-1], 2),
        })  # fmt: skip
        shutil.rmtree(out, ignore_errors=True)
    return {
        "trainer": trainer, "ranks": ranks, "stops": count, **met, "exit_codes": codes,
        "seconds_of_one_run": round(alone, 2), "longest_seconds": round(max(took), 2), "failures": failures,
    }  # fmt: skip


def _state(out: Path, codes: list[int]) -> str:
    """Say how a run was left: saved at the last step it logged, complete, before its first step, or what is wrong."""
    logged = read_jsonl(out / "metrics.jsonl")[0] if (out / "metrics.jsonl").exists() else []
    found = checkpoint.load_latest(out / "checkpoints") if (out / "checkpoints").exists() else None
    if (found.step if found else 0) != (logged[-1]["step"] if logged else 0):
        return f"logged {len(logged)} steps, and saved {found and found.step}"
    if set(codes) == {0}:
        return "complete"
    if not logged:
        return "nothing_to_save"
    return "saved" if set(codes) == {130} else "it did not end as a stopped run"


def main() -> int:
    """Read the arguments, run one of the two, and print what it found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kills", "stops"))
    parser.add_argument("more", nargs="*", metavar="KEY=VALUE", help="changes of the recipe besides its own")
    parser.add_argument("--count", type=int, default=30, help="how many times (default: 30)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--trainer", choices=RECIPES, default="dance_grpo", help="(default: dance_grpo)")
    parser.add_argument("--ranks", type=int, default=1, help="processes of the run (default: 1)")
    parser.add_argument("--deepspeed", help="settings of DeepSpeed, as of `align train`; for kills")
    parser.add_argument("--lone", action="store_true", help="kill one of the processes, not all together")
    parser.add_argument("--json", type=Path, metavar="FILE", help="add what is found to it, as it is found")
    options = parser.parse_args()
    torch.set_num_threads(1)

    def tell(found: dict[str, Any]) -> None:
        if options.json:
            with options.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"what": options.what, **found}) + "\n")

    with tempfile.TemporaryDirectory() as name:
        shared = (options.count, options.seed, Path(name), options.trainer, options.ranks)
        if options.what == "kills":
            found = kills(*shared, options.deepspeed, lone=options.lone, more=options.more, tell=tell)
        else:
            found = stops(*shared, more=options.more, tell=tell)
    sys.stdout.write(json.dumps(found, indent=1) + "\n")
    return int(any(found.get(name) for name in ("differing", "failures")))


if __name__ == "__main__":
    sys.exit(main())
