"""What a step of the language-model trainers costs beside TRL's, and what the order of paired data does to both.

    python scripts/bench_llm.py --json bench.json
    python scripts/bench_llm.py --json speed.json --parts speed memory --rounds 9
    python scripts/bench_llm.py --json order.json --parts order --seeds 5
    python scripts/bench_llm.py --json real.json --parts real                  # on a GPU

speed        kto_ratio_V          our KTO step / TRL's, live reference; forward and backward     (<= .33 and .25)
             bco_over_kto_ratio   our BCO step / our KTO step, the worse vocabulary              (<= .70)
             loss_difference, gradient_difference   ours against TRL's on one batch              (<= 1e-5)
memory       kto_memory_ratio_V   peak resident size of a process that makes our step / TRL's    (<= .55 and .75)
order        held-out pair accuracy after an epoch of paired data in each one's default order    (ours >= .80)
workers      tokens and plans of 100,000 rows, tokenised by one process and by four              (equal)
precomputed  the ratios of `speed`, with log-probs of the reference computed beforehand          (reported)
padding      share of tokens that are not padding; a pass over rows packed into one / padded     (reported)
real         samples a second of our KTO / TRL's at its defaults; with precomputed log-probs     (>= 1.5 and 1.2)
             our BCO / our KTO; ours with gradient checkpointing, a default of TRL's / TRL's     (>= 1.25; reported)

V is 32k (width 256, prompts of 64 to 128 tokens, completions of 32 to 64) or 152k (width 128, half as long): a random
Qwen2 of four layers in fp32, eight rows a step. `real` runs when it is named: about the shape of Qwen2-0.5B under
bf16 autocast, prompts of 256 to 512 tokens, completions of half that. Steps go through both libraries' own
`training_step`, without gradient checkpointing except for TRL's default there. Times are CPU seconds of the process, on
one thread, or a GPU's own, of arms that alternate in it; medians of the rounds' ratios. Sizes are those of fresh
processes, what they import included, medians of three. Progress goes to stderr.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measuring import cost, over_rounds, peak_mb

if TYPE_CHECKING:
    import torch

    from align.preferences import Completion
    from trainers.preference_data import Tokens

SHAPES = {
    "32k": {"vocabulary": 32_000, "hidden": 256, "layers": 4, "heads": 4, "prompt": 128, "completion": 64},
    "152k": {"vocabulary": 152_000, "hidden": 128, "layers": 4, "heads": 4, "prompt": 64, "completion": 32},
    "0.5b": {"vocabulary": 151_936, "hidden": 896, "layers": 24, "heads": 14, "prompt": 512, "completion": 256},
}
SMALL = ("32k", "152k")
PARTS = ("speed", "memory", "order", "workers", "precomputed", "padding", "real")
BATCH, BETA = 8, 0.1
PLAIN = {"bf16": False, "gradient_checkpointing": False}  # where TRL defaults to more
BARS = {
    "kto_ratio_32k": 0.33, "kto_ratio_152k": 0.25, "kto_memory_ratio_32k": 0.55, "kto_memory_ratio_152k": 0.75,
    "bco_over_kto_ratio": 0.70, "loss_difference": 1e-5, "gradient_difference": 1e-5,
}  # fmt: skip
"""What each figure may be at most."""
LEAST = {"real.kto_rate": 1.5, "real.kto_precomputed_rate": 1.2, "real.bco_rate": 1.25}
"""What each figure may be at least."""


def say(text: str) -> None:
    """Write a line of progress."""
    sys.stderr.write(f"{text}\n")


# Models and rows


def build_model(folder: Path, vocabulary: int, hidden: int, layers: int, heads: int, **_: int) -> Path:
    """Save a random Qwen2, with the tokenizer of the embedded model."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from trainers.tiny_language import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocabulary, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=2, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_model(folder: Path, shape: str) -> dict[str, Any]:
    """Save the model of a vocabulary, in a process of its own."""
    build_model(folder / shape, **SHAPES[shape])
    return {}


def words() -> list[str]:
    """Return the toy words that are one token each, with the space before them."""
    from trainers.tiny_language import WORDS, tiny_tokenizer

    tokenizer = tiny_tokenizer()
    return [f" {word}" for word in WORDS if len(tokenizer(f" {word}")["input_ids"]) == 1]


def random_rows(prompt: int, completion: int, **_: int) -> list[dict[str, Any]]:
    """Return rows of random words, half of them thumbs up, prompts and completions from half to all of their length."""
    import numpy as np

    draw, known = np.random.default_rng(0), words()

    def text(longest: int) -> str:
        return "".join(draw.choice(known, draw.integers(longest // 2, longest + 1)))

    return [  # an end of sequence follows
        {"prompt": text(prompt), "completion": text(completion - 1), "label": i % 2 == 0} for i in range(BATCH)
    ]


def perturb(model: torch.nn.Module) -> None:
    """Move a policy away from its reference, alike every time."""
    import torch

    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=draw))


def recompute(made: Any, wanted: bool) -> None:
    """Do what `train` does of a trainer that is told to checkpoint activations."""
    if wanted:
        name = "activation_checkpointing"  # transformers before 5.20 call it by its older name
        name = name if hasattr(made.model, f"{name}_enable") else "gradient_checkpointing"
        if not getattr(made.args, name):
            raise SystemExit("The trainer was not told to checkpoint activations")
        getattr(made.model, f"{name}_enable")()


# A step of each library

Step = tuple[Callable[[], "torch.Tensor"], "torch.nn.Module"]


def our_step(
    folder: Path,
    shape: str,
    trainer: str,
    *,
    precomputed: bool = False,
    checkpointing: bool = False,
    half: bool = False,
) -> Step:
    """Return forward and backward of our trainer on one batch, and the policy."""
    from align.config import load_config
    from align.preferences import load_preferences
    from align.sitting import Sitting
    from align.tracking import RunLog
    from trainers import trainer_for
    from trainers.language_model import load_language_model
    from trainers.language_objective import microbatch
    from trainers.language_reference import Reference
    from trainers.language_session import Session
    from trainers.language_trainer import AlignTrainer, Microbatches, training_arguments

    config = load_config({
        "trainer": trainer, "data": {"path": "toy", "heldout_fraction": 0}, "batch_size": BATCH, "microbatch": BATCH,
        "model": {
            "path": str(folder / shape), "train": "full", "dtype": "bf16" if half else "fp32",
            "gradient_checkpointing": checkpointing,
        },
        "objective": {"beta": BETA},
        "reference": {"mode": "precomputed" if precomputed else "copy", "cache": str(folder / "logps")},
    })  # fmt: skip
    rows = load_preferences(random_rows(**SHAPES[shape]))
    out = Path(tempfile.mkdtemp(dir=folder))
    run = trainer_for(config, out=out, rows=(rows, None))
    model = load_language_model(config.model, seed=0)
    reference = Reference(run.reference, model)
    cache = run._precompute(model) if precomputed else None
    perturb(model)
    log = RunLog(out, silent=True)
    session = Session(run, log, None, 0.0)
    session.sitting = Sitting(out, run.config, run.world, log, lambda: None)
    made = AlignTrainer(run, session, cache, reference, model=model, args=training_arguments(run, out / "staging"))
    recompute(made, checkpointing)
    made.state.global_step = 1  # the guard of the first step wants policy and reference to be one
    if precomputed:
        batch = Microbatches(run, cache)[0]
    else:  # TRL's pairing
        partners = [(i - 1) % BATCH for i in range(BATCH)]
        batch = microbatch(
            run.tokens, run.plan(0).rows[0], list(range(BATCH)), partners, None, pad=run.tokenizer.pad_token_id,
            mismatched=run.objective.mismatched,
        )  # fmt: skip
    return lambda: made.training_step(made.model, dict(batch), batch["totals"]), made.model


def trl_step(folder: Path, shape: str, *, precomputed: bool = False, half: bool = False) -> Step:
    """Return forward and backward of TRL's KTO trainer on the same batch, and the policy."""
    from datasets import Dataset

    made = trl_trainer(
        folder / shape, Dataset.from_list(random_rows(**SHAPES[shape])), folder, precompute_ref_log_probs=precomputed,
        **({} if half else PLAIN),
    )  # fmt: skip
    recompute(made, half)
    perturb(made.model)
    made.current_gradient_accumulation_steps = 1
    batch = next(iter(made.get_train_dataloader()))
    return lambda: made.training_step(made.model, dict(batch)), made.model


def trl_trainer(model: Path, rows: Any, folder: Path, **options: Any) -> Any:
    """Return TRL's KTO trainer at its defaults, but for the options."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import KTOConfig, KTOTrainer

    arguments = KTOConfig(
        output_dir=tempfile.mkdtemp(dir=folder), per_device_train_batch_size=BATCH, beta=BETA, report_to=[],
        use_cpu=not torch.cuda.is_available(), disable_tqdm=True, save_strategy="no", logging_strategy="no", **options,
    )  # fmt: skip
    return KTOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), args=arguments, train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(model),
    )  # fmt: skip


ARMS: dict[str, Callable[..., Step]] = {
    "kto": functools.partial(our_step, trainer="kto"),
    "trl": trl_step,
    "bco": functools.partial(our_step, trainer="bco"),
    "kto_checkpointed": functools.partial(our_step, trainer="kto", checkpointing=True),
    "kto_precomputed": functools.partial(our_step, trainer="kto", precomputed=True),
    "trl_precomputed": functools.partial(trl_step, precomputed=True),
    "bco_precomputed": functools.partial(our_step, trainer="bco", precomputed=True),
}


# Parts: each runs in a process of its own and returns its figures


def alternate(arms: dict[str, Callable[[], object]], rounds: int, label: str) -> dict[str, list[float]]:
    """Return CPU seconds of every arm in every round, after a warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for index in range(rounds + 1):
        for name, arm in arms.items():
            seconds[name].append(cost(arm))
        say(f"{label}, round {index or 'of warm-up'}: " + ", ".join(f"{n} {s[-1]:.2f}" for n, s in seconds.items()))
    return {name: values[1:] for name, values in seconds.items()}


def ratio(seconds: dict[str, list[float]], a: str, b: str) -> float:
    """Return the median over rounds of one arm's seconds over another's."""
    return statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))


def with_spread(name: str, seconds: dict[str, list[float]], a: str, b: str) -> dict[str, Any]:
    """Return that median under a name, and the smallest and largest of the rounds beside it."""
    return over_rounds(name, [x / y for x, y in zip(seconds[a], seconds[b], strict=True)])


def described(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Return median, smallest and largest seconds of every arm."""
    return {n: {"median": statistics.median(s), "least": min(s), "most": max(s)} for n, s in seconds.items()}


def steps_of(
    folder: Path, shape: str, names: list[str], rounds: int, *, half: bool = False
) -> tuple[dict[str, Step], dict[str, Any]]:
    """Return the arms, with the gradients of their last step, and their times."""
    build_model(folder / shape, **SHAPES[shape])
    steps = {name: ARMS[name](folder, shape, half=half) for name in names}
    found: dict[str, float] = {}

    def arm(name: str) -> Callable[[], None]:
        step, model = steps[name]

        def work() -> None:
            model.zero_grad(set_to_none=True)
            found[name] = float(step())

        return work

    seconds = alternate({name: arm(name) for name in names}, rounds, shape)
    return steps, {"seconds": seconds, "losses": found}


def speed(folder: Path, shape: str, rounds: int) -> dict[str, Any]:
    """Time our steps and TRL's on one vocabulary, and compare loss and gradient."""
    steps, made = steps_of(folder, shape, ["kto", "trl", "bco"], rounds)
    theirs = dict(steps["trl"][1].named_parameters())
    difference = norm = 0.0
    for name, parameter in steps["kto"][1].named_parameters():
        difference += float((parameter.grad - theirs[name].grad).double().square().sum())
        norm += float(theirs[name].grad.double().square().sum())
    return {
        **with_spread(f"kto_ratio_{shape}", made["seconds"], "kto", "trl"),
        **with_spread(f"bco_over_kto_ratio_{shape}", made["seconds"], "bco", "kto"),
        f"loss_difference_{shape}": abs(made["losses"]["kto"] - made["losses"]["trl"]),
        f"gradient_difference_{shape}": (difference / norm) ** 0.5,
        f"seconds_{shape}": described(made["seconds"]),
    }


def precomputed(folder: Path, shape: str, rounds: int) -> dict[str, Any]:
    """Time steps whose reference log-probs were computed before."""
    _, made = steps_of(folder, shape, ["kto_precomputed", "trl_precomputed", "bco_precomputed"], rounds)
    return {
        f"kto_precomputed_ratio_{shape}": ratio(made["seconds"], "kto_precomputed", "trl_precomputed"),
        f"bco_over_kto_precomputed_{shape}": ratio(made["seconds"], "bco_precomputed", "kto_precomputed"),
        f"seconds_precomputed_{shape}": described(made["seconds"]),
    }


def real(folder: Path, shape: str, rounds: int) -> dict[str, Any]:
    """Compare samples a second at a real model's size, reference live and precomputed."""
    found: dict[str, Any] = {}
    for ending in ("", "_precomputed"):
        names = [f"{name}{ending}" for name in ("kto", "trl", "bco")] + ([] if ending else ["kto_checkpointed"])
        seconds = steps_of(folder, shape, names, rounds, half=True)[1]["seconds"]
        found |= with_spread(f"kto{ending}_rate", seconds, f"trl{ending}", f"kto{ending}")
        found |= with_spread(f"bco{ending}_rate", seconds, f"kto{ending}", f"bco{ending}")
        if not ending:
            found |= with_spread("kto_checkpointed_rate", seconds, "trl", "kto_checkpointed")
        found |= {f"{name}_samples_a_second": BATCH / statistics.median(spent) for name, spent in seconds.items()}
    return found


def padding(folder: Path, rounds: int) -> dict[str, Any]:
    """Count padding of length-grouped and of random batches; time a pass over 8 rows packed into one, and padded."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    from trainers.preference_data import Tokens, collate, plan_epoch

    draw = np.random.default_rng(0)
    size = 4096
    lengths = [np.clip(draw.lognormal(mean, 0.8, size), 2, 512).astype(int) for mean in (4.5, 5.0)]
    ids = [[draw.integers(5, 400, n) for n in side] for side in lengths]
    label = np.arange(size) % 2 * 1.0
    tokens = Tokens(
        *ids, label, np.full(size, -1), np.ones(size), np.arange(size), [""] * size, {}, {}, 1024
    )  # fmt: skip
    length = tokens.length
    found: dict[str, Any] = {}
    plan = plan_epoch(tokens, microbatch=BATCH, batch_size=4 * BATCH, seed=0, epoch=0).rows
    for name, rows in {"grouped": plan, "random": draw.permutation(size).reshape(-1, BATCH)}.items():
        found[f"real_token_share_{name}"] = float(length[rows].sum() / (length[rows].max(1).sum() * BATCH))
    path = build_model(folder / "model", **SHAPES["32k"])
    model = AutoModelForCausalLM.from_pretrained(path).eval().get_decoder()
    rows = plan[np.argsort(length[plan].sum(1))[len(plan) // 2]]
    padded = collate([tokens.sequence(i, i) for i in rows], 0)
    mask = padded["attention_mask"].bool()
    row = torch.arange(BATCH)[:, None].expand(mask.shape)[mask]
    place = torch.arange(mask.shape[1])[None].expand(mask.shape)[mask]
    seen = ((row[:, None] == row[None]) & (place[:, None] >= place[None]))[None, None]
    packed = {"input_ids": padded["input_ids"][mask][None], "position_ids": place[None], "attention_mask": seen}
    states: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def pad() -> None:
        states["padded"] = model(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"])[0][mask]

    @torch.no_grad()
    def pack() -> None:
        states["packed"] = model(**packed, use_cache=False)[0][0]

    seconds = alternate({"packed": pack, "padded": pad}, rounds, "padding")
    worst = float((states["packed"] - states["padded"]).abs().max())
    return {**found, "packed_ratio": ratio(seconds, "packed", "padded"), "packed_difference": worst}


def memory(folder: Path, shape: str, arm: str) -> dict[str, Any]:
    """Make a step of one arm, twice, and return the peak of this process after imports, before and after the steps."""
    importlib.import_module("trl.trainer.kto_trainer" if arm == "trl" else "trainers.language")
    imported = peak_mb()
    step, model = ARMS[arm](folder, shape)
    ready = peak_mb()
    for _ in range(2):
        step()
        model.zero_grad(set_to_none=True)
    return {"peak_mb": peak_mb(), "imported_mb": imported, "before_steps_mb": ready}


def copy_prefix(pairs: int, seed: int) -> tuple[Completion, ...]:
    """Return pairs whose chosen completion is the prompt's first words, and whose rejected one is other words."""
    import numpy as np

    from align.preferences import Completion

    draw, known, rows = np.random.default_rng(seed), words(), []
    for pair in range(pairs):
        drawn = draw.choice(known, 12)
        prompt = "".join(drawn[:8])
        rows.append(Completion(prompt, "".join(drawn[:4]), True, pair=pair))
        rows.append(Completion(prompt, "".join(drawn[8:]), False, pair=pair))
    return tuple(rows)


ORDER = {"learning_rate": 1e-4, "pairs": 1000, "heldout": 200}


def order(folder: Path, seed: int) -> dict[str, Any]:
    """Train on paired data for one epoch in both libraries' default order, and measure the same held-out pairs."""
    from datasets import Dataset

    from align.config import load_config
    from align.preferences import PreferenceSet
    from trainers import trainer_for
    from trainers.tiny_language import build_tiny

    model = build_tiny(folder / "tiny", seed=seed)
    rows, cut = copy_prefix(ORDER["pairs"] + ORDER["heldout"], seed), 2 * ORDER["pairs"]
    training, heldout = PreferenceSet(rows[:cut], "training"), PreferenceSet(rows[cut:], "held-out")
    config = load_config({
        "trainer": "kto", "model": {"path": str(model), "train": "full"}, "data": {"path": "toy"}, "seed": seed,
        "batch_size": BATCH, "microbatch": BATCH, "objective": {"beta": BETA}, "evaluation": {"every": 0},
        "optimizer": {"lr": ORDER["learning_rate"], "warmup": 0}, "checkpoint": {"every": 0},
    })  # fmt: skip
    run = trainer_for(config, out=folder / "ours", rows=(training, heldout))
    with silence():
        run.train()
    trained = folder / "ours" / "checkpoints" / f"step_{run.steps:06d}"
    pairs = [
        {"prompt": up.prompt, "chosen": up.completion, "rejected": down.completion}
        for up, down in zip(rows[:cut:2], rows[1:cut:2], strict=True)
    ]
    theirs = trl_trainer(
        model, Dataset.from_list(pairs), folder, learning_rate=ORDER["learning_rate"], num_train_epochs=1, seed=seed,
        **PLAIN,
    )  # fmt: skip
    with silence():
        theirs.train()
    theirs.save_model(str(folder / "trl"))
    if theirs.state.global_step != run.steps:
        raise SystemExit(f"TRL took {theirs.state.global_step} steps, ours {run.steps}")
    before = log_probs(model, run.heldout)
    found = {"steps": run.steps}
    for name, path in {"ours": trained, "trl": folder / "trl"}.items():
        ratio = (log_probs(path, run.heldout) - before).reshape(-1, 2)
        found[name] = float((ratio[:, 0] > ratio[:, 1]).float().mean())
    say(f"order, seed {seed}: ours {found['ours']:.3f}, TRL {found['trl']:.3f}")
    return found


def log_probs(path: Path, tokens: Tokens) -> torch.Tensor:
    """Return the log-probs of completions as transformers itself has them."""
    import torch
    from transformers import AutoModelForCausalLM

    from trainers.preference_data import collate

    model, found = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), []
    for i in range(len(tokens)):
        batch = collate([tokens.sequence(i, i)], 0)
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"]).logits[0, :-1].log_softmax(-1)
        labels = batch["labels"][0, 1:]
        found.append(logits.gather(-1, labels.clamp(min=0)[:, None])[labels >= 0].sum())
    return torch.stack(found)


class Reload:
    """Loads a tokenizer again, in a worker."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self) -> Any:
        """Return it."""
        from trainers.language_model import load_tokenizer

        return load_tokenizer(self.path)


def workers(folder: Path, rows: int) -> dict[str, Any]:
    """Hash tokens and plans of many rows, tokenised by one process and by four."""
    from trainers.language_model import load_tokenizer
    from trainers.preference_data import plan_epoch, tokenise
    from trainers.tiny_language import build_tiny, toy_thumbs

    path = str(build_tiny(folder / "tiny"))
    thumbs, found = toy_thumbs(rows // 2), {}
    for count in (1, 4):
        began = time.perf_counter()
        tokens = tokenise(thumbs, load_tokenizer(path), max_length=64, workers=count, reload=Reload(path))
        digest = hashlib.sha256()
        for i in range(len(tokens)):
            digest.update(tokens.digest(i, i))
        for epoch in range(2):
            plan = plan_epoch(tokens, microbatch=16, batch_size=64, seed=0, epoch=epoch)
            digest.update(plan.rows.tobytes() + plan.partners.tobytes())
        found[f"{count}"] = {"hash": digest.hexdigest(), "seconds": time.perf_counter() - began}
        say(f"workers {count}: {digest.hexdigest()[:16]}, {found[f'{count}']['seconds']:.1f} s")
    return {"rows": len(thumbs), "equal": found["1"]["hash"] == found["4"]["hash"], **found}


# The whole


def child(folder: Path, task: dict[str, Any]) -> dict[str, Any]:
    """Do one task in this process."""
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    work = {f.__name__: f for f in (speed, memory, order, workers, precomputed, padding, real, save_model)}
    return work[task.pop("part")](folder, **task)


def in_a_process(task: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Do one task in a process of its own, on one thread, and return its figures."""
    out = folder / "figures.json"
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, __file__, "--json", str(out), "--task", json.dumps(task), "--folder", str(folder)]
    subprocess.run(command, check=True, env={**os.environ, **quiet}, stdout=subprocess.DEVNULL)
    return json.loads(out.read_text(encoding="utf-8"))


@contextmanager
def silence() -> Iterator[None]:
    """Keep the progress of training off the terminal."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stderr(nowhere):
        yield


@contextmanager
def scratch() -> Iterator[Path]:
    """Have an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def measure(parts: list[str], rounds: int, seeds: int, size: str) -> dict[str, Any]:
    """Run the parts, a process each, and return all figures."""
    found: dict[str, Any] = {}
    for part in ("speed", "precomputed"):
        for shape in SMALL if part in parts else ():
            with scratch() as folder:
                found |= in_a_process({"part": part, "shape": shape, "rounds": rounds}, folder)
    if "speed" in parts:
        for name in ("bco_over_kto_ratio", "loss_difference", "gradient_difference"):
            found[name] = max(found[f"{name}_{shape}"] for shape in SMALL)
    if "padding" in parts:
        with scratch() as folder:
            found |= in_a_process({"part": "padding", "rounds": rounds}, folder)
    if "memory" in parts:
        for shape in SMALL:
            with scratch() as folder:
                in_a_process({"part": "save_model", "shape": shape}, folder)
                rows = [
                    {
                        arm: in_a_process({"part": "memory", "shape": shape, "arm": arm}, folder)
                        for arm in ("kto", "trl", "bco")
                    }
                    for _ in range(min(rounds, 3))
                ]
            peaks = {arm: statistics.median(row[arm]["peak_mb"] for row in rows) for arm in rows[0]}
            say(f"{shape} peak MB: " + ", ".join(f"{arm} {peak:.0f}" for arm, peak in peaks.items()))
            ratios = [row["kto"]["peak_mb"] / row["trl"]["peak_mb"] for row in rows]
            found |= over_rounds(f"kto_memory_ratio_{shape}", ratios)
            found[f"memory_{shape}"] = {"peak_mb": peaks, "processes": rows}
    if "order" in parts:
        rows = []
        for seed in range(seeds):
            with scratch() as folder:
                rows.append(in_a_process({"part": "order", "seed": seed}, folder))
        found["order"] = {**ORDER, "seeds": rows} | {
            f"{name}_median": statistics.median(row[name] for row in rows) for name in ("ours", "trl")
        }
    if "real" in parts:
        with scratch() as folder:
            found["real"] = {"shape": size, **in_a_process({"part": "real", "shape": size, "rounds": rounds}, folder)}
    if "workers" in parts:
        with scratch() as folder:
            found["workers"] = in_a_process({"part": "workers", "rows": 100_000}, folder)
    return found


def main() -> None:
    """Run the parts and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, help="file to write the figures to")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS[:-1]), help="parts to run; all but `real` by default"
    )
    parser.add_argument(
        "--size", choices=list(SHAPES), default="0.5b", help="shape of `real`; a small one shows that it runs"
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds of alternating arms; medians are reported")
    parser.add_argument("--seeds", type=int, default=3, help="runs of `order`; medians are reported")
    parser.add_argument("--task", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        result = child(args.folder, args.task)
    else:
        result = measure(args.parts, args.rounds, args.seeds, args.size)
        from importlib.metadata import version

        from align.run import describe_machine

        about = describe_machine()
        about["versions"]["trl"] = version("trl")
        about["machine"]["threads"] = "1"
        result |= {"parts": args.parts, "rounds": args.rounds, **about}
        table = [(name, value) for name, value in result.items() if isinstance(value, float)]
        for name, value in table:
            bar = BARS.get(name)
            verdict = "" if bar is None else f"   <= {bar:g}   {'ok' if value <= bar else 'MISSED'}"
            sys.stdout.write(f"{name:32} {value:10.3g}{verdict}\n")
        for name, value in result.get("real", {}).items():
            bar = LEAST.get(f"real.{name}")
            if isinstance(value, float):
                verdict = "" if bar is None else f"   >= {bar:g}   {'ok' if value >= bar else 'MISSED'}"
                sys.stdout.write(f"{f'real, {name}':32} {value:10.3g}{verdict}\n")
        if "order" in result:
            sys.stdout.write(f"{'order, ours (>= .80)':32} {result['order']['ours_median']:10.3g}\n")
            sys.stdout.write(f"{'order, TRL':32} {result['order']['trl_median']:10.3g}\n")
        if "workers" in result:
            sys.stdout.write(f"{'workers, equal':32} {result['workers']['equal']!s:>10}\n")
    with open(args.json, "w", encoding="utf-8") as file:
        json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
