"""Every number the project's issues ask for, the benchmark that measures it, and the table that says what came out.

A number is found in the results file of its benchmark by a key: `a.b.2` goes down into the JSON, `*` takes all that
stands there, `A - B` and `A / B` are worked out. Lists count as their length. Of several values the table has the one
that is worst for the bar, and their range as spread; else the spread is what stands under the same key with `_spread`.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BEGIN = "<!-- written by `python scripts/bench_all.py --table`: begin -->"
END = "<!-- end -->"
COMPARISONS = {
    "<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt, "==": operator.eq,
}  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """How something is measured.

    Args:
        command: words after `python`; `{json}` is the file for the figures, `{work}` a folder that is kept. Without
            `{json}` the figures are the JSON object that the command prints last, or of pytest its counts.
        minutes: what it takes on two cores.
        quick: words that are added by `--quick`, to show in a short time that it runs.
        needs: what the machine must have, `gpu` or `data`.
    """

    command: str
    minutes: float
    quick: str = ""
    needs: str = "cpu"


@dataclass(frozen=True)
class Asked:
    """One number of an issue.

    Args:
        what: the number.
        bar: `<= .5` and the like, with words after it if need be; "" when it is only reported.
        bench: which benchmark has it; "" when none does.
        key: where in its figures.
        form: how it is shown.
        of: key of the count it is a part of.
        noun: what is counted.
        spread: key of its spread, where that has a name of its own.
        why: what to know about the figure; of one that is not measured, why.
        before: what stands in the place of a result that is not there: a figure, and where it comes from, such as date
            and command of a run whose output was not kept.
    """

    what: str
    bar: str
    bench: str
    key: str = ""
    form: str = ".3g"
    of: str = ""
    noun: str = ""
    spread: str = ""
    why: str = ""
    before: tuple[str, str] | None = None


def _pytest(words: str) -> str:
    return f"-m pytest -n 0 -p no:cacheprovider {words}"


def _kills(trainer: str, count: int) -> str:
    return f"-m scripts.fault_injection kills --trainer {trainer} --count {count}"


_GRID = (
    "--rates 3e-4,1e-3,3e-3 --tuning-seeds 0,1 --budget 32 prompts_per_step=8 group_size=12 "
    "evaluation.samples=200 evaluation.final_samples=200 evaluation.solver_steps=8"
)
_COLLECT = "--collect-only"

BENCHES: dict[str, Bench] = {
    "first_run": Bench("scripts/bench_first_run.py --json {json} --rounds 9", 4, "--rounds 1 --recipe smoke"),
    "step": Bench("scripts/bench_step.py --json {json} --rounds 7", 2, "--rounds 1 --recipe digits/smoke"),
    "guards": Bench("scripts/bench_guards.py --json {json} --pairs 50", 2, "--pairs 2"),
    "demo": Bench(
        "scripts/bench_demo.py --json {json} --work {work} --seeds 0-4", 15,
        "--seeds 0-0 --users 30 --images 4 steps=2 evaluation.every=1 evaluation.samples=20 "
        "evaluation.final_samples=40",
    ),
    "first_ratio": Bench(
        _pytest("-k first_ratio tests/parity/test_sd3.py tests/parity/test_stable_diffusion.py"), 1, _COLLECT
    ),
    "two_processes": Bench(_pytest('-m "not soak" tests/distributed/test_two_processes.py'), 4, _COLLECT),
    "rewards": Bench(
        "scripts/bench_rewards.py --json {json} --rounds 9", 3, "--rounds 1 --batch 4 --group 2 --side 64"
    ),
    "agreement": Bench(
        _pytest("tests/parity/test_agreement.py tests/golden/test_feedback_statistics.py"), 1, _COLLECT
    ),
    "pandalm": Bench(_pytest("tests/parity/test_pandalm.py"), 2, _COLLECT, "data"),
    "malformed": Bench(_pytest("-m slow tests/property/test_feedback_exchange.py"), 4, _COLLECT),
    "payloads": Bench(_pytest("tests/browser/test_http.py tests/browser/test_safety.py"), 3, _COLLECT),
    "feedback": Bench(
        "scripts/bench_feedback.py --json {json} --users 0 --events 0", 1, "--written 100 --rounds 1 --threads 4"
    ),
    "feedback_page": Bench(
        "scripts/bench_feedback_page.py --json {json} --users 50 --rounds 3", 3,
        "--users 3 --rounds 1 --think .05",
    ),
    "feedback_kills": Bench(_pytest("-m soak tests/crash/test_feedback_store.py"), 15, _COLLECT),
    "llm_speed": Bench("scripts/bench_llm.py --json {json} --parts speed", 4, "--rounds 1"),
    "llm_memory": Bench("scripts/bench_llm.py --json {json} --parts memory", 2),
    "llm_order": Bench("scripts/bench_llm.py --json {json} --parts order", 10, "--seeds 1"),
    "llm_gpu": Bench("scripts/bench_llm.py --json {json} --parts real --rounds 9", 5, "--rounds 1 --size 32k", "gpu"),
    "llm_workers": Bench("scripts/bench_llm.py --json {json} --parts workers", 3),
    "families": Bench(
        "scripts/bench_families.py --json {json} --shape small --rounds 5", 8,
        "--shape tiny --rounds 1 --families stable_diffusion",
    ),
    "families_gpu": Bench(
        "scripts/bench_families.py --json {json} --shape real --rounds 5", 20, "--shape tiny --rounds 1", "gpu"
    ),
    "algorithms": Bench(
        f"scripts/bench_algorithms.py --json {{json}} --cache {{work}} {_GRID}", 80,
        "--arms dance,nft --rates 1e-3 --tuning-seeds 0 --seeds 1,2 --budget 2 model.path=digits/random "
        "prompts_per_step=2 group_size=2 evaluation.samples=20 evaluation.final_samples=20 evaluation.solver_steps=2",
    ),
    "monitor": Bench(
        "scripts/bench_monitor.py --json {json} --cache {work} --seeds 100-119", 6,
        "--seeds 100-101 --worlds hacked_text,healthy_text",
    ),
    "plove": Bench(
        "scripts/bench_plove.py --json {json} --cache {work} --seeds 100-119 --calibration-seeds 100-104 "
        "--list-seeds 100-109", 5,
        "--seeds 0-1 --list-seeds 0 --calibration-seeds 0 --steps 5",
    ),
    "sparsity_compare": Bench("scripts/bench_sparsity.py --json {json} --sections compare", 6, "--millions 33"),
    "sparsity_rank": Bench("scripts/bench_sparsity.py --json {json} --sections rank --rounds 2", 5, "--side 512"),
    "sparsity_overlap": Bench(
        "scripts/bench_sparsity.py --json {json} --sections overlap", 1, "--mask-millions 8"
    ),
    "sparsity_floor": Bench(_pytest("tests/unit/test_sparsity_rank.py -k planted"), 1, _COLLECT),
    "sparsity_science": Bench(
        "scripts/bench_sparsity_science.py --json {json} --cache {work}", 100,
        "--arms kto,sft --rates 1e-4,1e-3 --seeds 0 --language-steps 2",
    ),
    "kill_save": Bench("scripts/kill_save.py --json {json}", 5, "--count 3"),
    **{
        f"kills_{trainer}": Bench(_kills(trainer, 30 if trainer in ("dance_grpo", "kto") else 5), 4, "--count 1")
        for trainer in ("dance_grpo", "kto", "forward", "offline", "bco", "dpo", "sft", "rluf")
    },
    "kills_two": Bench(
        "-m scripts.fault_injection kills steps=24 --ranks 2 --deepspeed zero2 --count 40", 20, "--count 1"
    ),
    "stops": Bench("-m scripts.fault_injection stops --count 100", 20, "--count 1"),
    "stops_two": Bench("-m scripts.fault_injection stops steps=24 --ranks 2 --count 20", 10, "--count 1"),
    "not_finite": Bench(
        _pytest('-m "not soak and not slow" tests/crash/test_not_finite.py -k "stop"'), 4, _COLLECT
    ),
    "not_finite_twenty": Bench(_pytest("-m soak tests/crash/test_not_finite.py"), 5, _COLLECT),
    "hostile_files": Bench(_pytest("-m slow tests/crash/test_hostile_files.py"), 1, _COLLECT),
    "matrix": Bench(
        _pytest(
            '-m "slow or soak" tests/distributed/test_matrix_language.py tests/distributed/test_matrix_trainers.py '
            "tests/distributed/test_offline_processes.py tests/distributed/test_rluf_processes.py "
            "tests/distributed/test_matrix_visual.py tests/distributed/test_matrix_fit.py"
        ), 20, _COLLECT,
    ),
    "plan": Bench(
        "scripts/bench_plan.py --json {json} --hidden 512 --layers 6", 12, "--hidden 64 --layers 2 --counts 1 --steps 2"
    ),
}  # fmt: skip

_CLIP = "ViT-B-32-quickgelu"
_NO_GPU = "no GPU was at hand"
_TESTS = "tests failed"
_PLAN = "run of 2026-11-25, `python scripts/bench_plan.py --hidden 512 --layers 6`, output not kept"
_ORDER = "run of 2026-11-24, `python scripts/bench_llm.py --parts order`, output not kept"
_FAMILIES = "run of 2026-11-24, `python scripts/bench_families.py --shape small --rounds 5`, output not kept"
_NAN = "run of 2026-11-25, `python -m pytest -n 0 tests/crash/test_not_finite.py -m soak`, output not kept"

ASKED: dict[str, list[Asked]] = {
    "The loop on one page": [
        Asked("seconds of `import align` over bare Python", "< .3", "first_run", "import_align_seconds", "z.3f"),
        Asked("seconds of `align --help` over bare Python", "< .3", "first_run", "help_seconds", "z.3f"),
        Asked("CPU seconds to pretrain the embedded model", "<= 120", "first_run", "base.cpu_seconds", ".0f",
              why="once, then cached; 116 to 132 before its optimizer stepped all weights together"),
        Asked("accuracy of that model under the held-out judge, guidance 1.0", ">= .80 and <= .97", "first_run",
              "base.guidance_1.accuracy"),
        Asked("its pixel std over that of real images", ">= .85", "first_run", "base.guidance_1.pixel_std_ratio"),
        Asked("its variance within a class over that of real images", ">= .85", "first_run",
              "base.guidance_1.class_variance_ratio"),
        Asked("`model_share`: bare forwards and backwards / an iteration", ">= .85", "step", "model_share"),
        Asked("`vs_batched_loop`: our iteration / a plain batched loop", "<= 1.0", "step", "vs_batched_loop"),
        Asked("`vs_official_loop`: our iteration / one (sample, step) at a time", "", "step", "vs_official_loop"),
        Asked("`rollout_vs_pipeline`: a plain pipeline call / our rollout", ">= .90", "step", "rollout_vs_pipeline"),
        Asked("first ratio exact on the same tiles, 1e-6 on others", "== 0", "first_ratio", "failed", "d", "tests",
              noun=_TESTS),
        Asked("resumed runs of 30 random kills that differ by a bit", "== 0", "kills_dance_grpo", "differing", "d",
              "runs", noun="runs compared"),
        Asked("processes (replicas, ZeRO 1 and 2) against one, 1e-5", "== 0", "two_processes", "failed", "d", "tests",
              noun=_TESTS),
    ],
    "The demo": [
        Asked("lower CI of the held-out gain, worst of the seeds", "> 0", "demo", "seeds.*.heldout_gain.ci_low"),
        Asked("change of held-out accuracy", ">= -.01", "demo",
              "seeds.*.heldout_accuracy_after - seeds.*.heldout_accuracy_before", "+.3f"),
        Asked("diversity over that of the base", ">= .8", "demo", "seeds.*.diversity_after / seeds.*.diversity_before"),
        Asked("largest error of the first ratio", "<= 1e-6", "demo", "seeds.*.first_ratio_error_max"),
        Asked("lower CI of the gain in the hidden taste, SD", "> 0", "demo", "seeds.*.taste_gain.ci_low"),
        Asked("change of legibility, points of the held-out judge's accuracy", ">= -1", "demo",
              "seeds.*.legibility_points.mean", "+.2f"),
        Asked("CPU seconds", "<= 600", "demo", "seeds.*.cpu_seconds", ".0f", why="the base model cached"),
        Asked("what `check_demo.py` finds wrong", "== 0", "demo", "seeds.*.failures", "d"),
    ],
    "Rewards": [
        Asked("bare open_clip forward / our scoring without preprocessing", ">= .95", "rewards",
              f"{_CLIP}.scoring_vs_bare"),
        Asked("prompt-tower passes for 4 prompts x 4 images", "== 4", "rewards", f"{_CLIP}.prompt_tower_passes", "d"),
        Asked("reads of the weights by two rewards on one file", "== 1", "rewards", f"{_CLIP}.file_reads", "d"),
        Asked("seconds to preprocess 16 images of 512 pixels", "", "rewards", f"{_CLIP}.seconds.preprocess"),
        Asked("peak memory of a reward, MB", "", "rewards", f"{_CLIP}.memory.*.peak_scoring", ".0f"),
        Asked("the same with ViT-H/14", "", "", why=f"{_NO_GPU}, and it is asked for on one only"),
    ],
    "Feedback": [
        Asked("events a second, grouped commits / a commit an event", ">= 5", "feedback", "grouped_vs_single"),
        Asked("page p95 with 50 annotators / single-user median, wall clock", "<= 5", "feedback_page",
              "p95_over_single_median"),
        Asked("64 writers, 1,000 SIGKILLs: lost, doubled, damaged", "== 0", "feedback_kills", "failed", "d", "tests",
              noun=_TESTS,
              before=("0 of 56,541 acknowledged events",
                      "run of 2026-11-24, `python -m pytest -m soak tests/crash`, output not kept")),
        Asked("alpha and kappas against textbooks and other packages, 1e-9", "== 0", "agreement", "failed", "d",
              "tests", noun=_TESTS),
        Asked("10,000 malformed rows of each format", "== 0", "malformed", "failed", "d", "tests", noun=_TESTS),
        Asked("500 XSS payloads, 1,000 traversal strings: through", "== 0", "payloads", "failed", "d", "tests",
              noun=_TESTS),
        Asked("PandaLM's published kappas, majorities and judges", "== 0", "pandalm", "failed", "d", "tests",
              why="needs the data (`ALIGN_DATA`)",
              before=("all equal, alpha .8642",
                      "run of 2026-11-24, `python -m pytest tests/parity/test_pandalm.py`, output not kept")),
    ],
    "Language models beside TRL": [
        Asked("our KTO step / TRL's, 32k", "<= .33", "llm_speed", "kto_ratio_32k"),
        Asked("the same, 152k", "<= .25", "llm_speed", "kto_ratio_152k"),
        Asked("peak memory, ours / TRL's, 32k", "<= .55", "llm_memory", "kto_memory_ratio_32k"),
        Asked("the same, 152k", "<= .75", "llm_memory", "kto_memory_ratio_152k",
              why="a process each; .72 to .78 before what it works on together on a CPU became smaller"),
        Asked("our BCO step / our KTO step, the worse vocabulary", "<= .70", "llm_speed",
              "bco_over_kto_ratio"),
        Asked("difference of the loss to TRL's", "<= 1e-5", "llm_speed", "loss_difference"),
        Asked("difference of the gradient to TRL's, over its norm", "<= 1e-5", "llm_speed", "gradient_difference"),
        Asked("held-out pair accuracy after paired data in the default order", ">= .80", "llm_order",
              "order.ours_median", spread="order.seeds.*.ours", before=(".94", _ORDER)),
        Asked("the same of TRL (issue: near .58)", "", "llm_order", "order.trl_median",
              spread="order.seeds.*.trl", before=(".57", _ORDER)),
        Asked("100,000 rows: plans of 1 and of 4 processes equal", "== 1", "llm_workers", "workers.equal", "d"),
        Asked("samples a second / TRL's at its defaults, 0.5 B in bf16", ">= 1.5", "llm_gpu", "real.kto_rate",
              why=_NO_GPU),
        Asked("the same with a precomputed reference", ">= 1.2", "llm_gpu", "real.kto_precomputed_rate", why=_NO_GPU),
        Asked("BCO's samples a second / KTO's on a GPU", ">= 1.25", "llm_gpu", "real.bco_rate", why=_NO_GPU),
    ],
    "Model families": [
        *(
            Asked(f"{what}; {size}", bar, bench, f"families.*.{key}", why=why,
                  before=(found, _FAMILIES) if bench == "families" else None)
            for bench, size, why in (
                ("families_gpu", "real sizes, bf16", _NO_GPU), ("families", "small, random weights, CPU", ""),
            )
            for what, bar, key, found in (
                ("a diffusers call / our rollout", ">= .95", "rollout_vs_pipeline", ".948 (SD 1.04, SD3 1.02): a miss"),
                ("a trained row in forwards, LoRA", "<= 2.3", "trained_step_feq.lora",
                 "2.52 (SD3 2.09, FLUX 2.08): a miss"),
                ("the same with checkpointing", "<= 3.2", "trained_step_feq.lora_checkpointed",
                 "3.27 (SD 3.21, FLUX 3.19): a miss"),
                ("share of an iteration outside the models", "<= .15", "non_model_overhead", ".08"),
                ("our iteration / the official loop", "<= .5", "official_loop_ratio", ".48"),
            )
        ),
    ],
    "Algorithms, F_eq to 95 % of DanceGRPO's gain over its own": [
        Asked("window", "<= .5", "algorithms", "arms.window.ratio.median", ".2f", spread="arms.window.ratios"),
        Asked("window with DPM++", "<= .3", "algorithms", "arms.flash.ratio.median", ".2f",
              spread="arms.flash.ratios"),
        Asked("forward process: NFT", "<= .25", "algorithms", "arms.nft.ratio.median", ".2f",
              spread="arms.nft.ratios"),
        Asked("forward process: AWM", "<= .25", "algorithms", "arms.awm.ratio.median", ".2f",
              spread="arms.awm.ratios", why="one of five seeds never gets there"),
        Asked("forward process: DGPO", "<= .25", "algorithms", "arms.dgpo.ratio.median", ".2f",
              spread="arms.dgpo.ratios"),
    ],
    "From feedback to rewards": [
        Asked("robust - naive, rank correlation with the truth, corrupted world: lower CI", "> 0", "plove",
              "gain.corrupted.ci_low", ".4f"),
        Asked("the same in the clean world: mean", ">= -.01", "plove", "gain.clean.mean", ".4f"),
        Asked("the same in a world that is not the fitted likelihood: lower CI", "", "plove", "gain.other.ci_low",
              ".4f"),
        Asked("adversaries: precision", ">= .9", "plove", "accounts.corrupted.precision", ".2f",
              spread="accounts.corrupted.precision_wilson"),
        Asked("adversaries: recall", ">= .6", "plove", "accounts.corrupted.recall", ".2f",
              spread="accounts.corrupted.recall_wilson"),
        Asked("debiased ECE of held-out people, worst seed and world", "<= .03", "plove",
              "calibration.*.largest_debiased_ece"),
        Asked("Brier gain over the base rate, worst seed and world", "> 0", "plove", "calibration.*.least_brier_gain"),
        Asked("AUROC calibrated - uncalibrated", ">= -.01", "plove",
              "calibration.*.auroc - calibration.*.auroc_uncalibrated", ".3f"),
        Asked("monitor: hacked runs stopped before 5 points are lost", ">= 19 of 20", "monitor",
              "worlds.hacked.tripped_in_time", "d", "worlds.hacked.runs"),
        Asked("monitor: healthy runs stopped", "<= 2 of 20", "monitor", "worlds.healthy.tripped", "d",
              "worlds.healthy.runs"),
        Asked("monitor on texts: healthy runs stopped", "<= 2 of 20", "monitor", "worlds.healthy_text.tripped", "d",
              "worlds.healthy_text.runs"),
    ],
    "Update sparsity": [
        Asked("`bits_over_limit`, numpy alone", ">= .60", "sparsity_compare", "bits_over_limit_numpy"),
        Asked("`bits_over_limit`, numba", ">= .85", "sparsity_compare", "bits_over_limit"),
        Asked("`battery_over_limit`", ">= .10", "sparsity_compare", "battery_over_limit"),
        Asked("two threads on the battery", ">= 1.6", "sparsity_compare", "two_threads"),
        Asked("`peak_anonymous_mb`", "<= 300", "sparsity_compare", "peak_anonymous_mb", ".0f"),
        Asked("`cpu_vs_authors`, bits", ">= 100", "sparsity_compare", "cpu_vs_authors.bits"),
        Asked("`cpu_vs_authors`, battery", ">= 20", "sparsity_compare", "cpu_vs_authors.battery"),
        Asked("delta sizes over the prototype's, five densities", ">= .9", "sparsity_compare", "delta_table.*.share"),
        Asked("svdvals / our count, 4096 x 4096, planted rank 16", ">= 8", "sparsity_rank",
              "rank.planted.svdvals_over_count"),
        Asked("the same, a dense update", ">= 8", "sparsity_rank", "rank.dense.svdvals_over_count"),
        Asked("planted rank 16 through bf16 at density 31 %", "== 16", "sparsity_rank", "rank.planted.above_edge", "d"),
        Asked("counts that are not those of svdvals", "== 0", "sparsity_rank",
              "rank.*.above_edge - rank.*.svdvals_above_edge", "d"),
        Asked("planted rank below the floor at 11.5 %", "== 0", "sparsity_floor", "failed", "d", "tests", noun=_TESTS),
        Asked("common bits of masks of 785 million: torch / packed", ">= 20", "sparsity_overlap",
              "overlap.torch_over_packed"),
        Asked("z of independent dense updates, by magnitude", "<= 3", "sparsity_overlap", "independent.*.by_magnitude",
              ".1f"),
        Asked("the same by the uniform null", "> 3", "sparsity_overlap", "independent.*.uniform", ",.0f"),
        Asked("rows at one rate and one norm, 7 arms, 3 seeds", "", "sparsity_science", "rows", "d",
              why="the figures are in [sparsity](sparsity.md#by-rewards-or-supervised)"),
    ],
    "Faults": [
        Asked("500 SIGKILLs while saving: torn", "== 0", "kill_save", "saves.torn", "d", "saves.checkpoints_verified"),
        Asked("the same: acknowledged saves lost", "== 0", "kill_save", "saves.lost", "d", "saves.saves"),
        Asked("500 SIGKILLs while answers are added: failures", "== 0", "kill_save", "events.failures", "d",
              "events.cases"),
        Asked("2,000 flips not refused by name", "== 0", "kill_save", "flips.failures", "d", "flips.cases"),
        Asked("cuts at each percent not refused", "== 0", "kill_save", "cuts.failures", "d", "cuts.cases"),
        Asked("missing, extra, swapped files not refused", "== 0", "kill_save", "files.failures", "d", "files.cases"),
        Asked("a disk full at 20 points of a save: failures", "== 0", "kill_save", "full.failures", "d", "full.cases"),
        Asked("the same of a store", "== 0", "kill_save", "store_full.failures", "d", "store_full.cases"),
        Asked("2,000 flips of a store that change an answer unseen", "== 0", "kill_save", "store_flips.failures", "d",
              "store_flips.cases"),
        *(
            Asked(f"resumed runs of {30 if trainer == 'kto' else 5} kills that differ, {trainer}", "== 0",
                  f"kills_{trainer}", "differing", "d", "runs", noun="runs compared")
            for trainer in ("kto", "forward", "offline", "bco", "dpo", "sft", "rluf")
        ),
        Asked("the same of 40 kills, two processes under ZeRO 2", "== 0", "kills_two", "differing", "d", "runs",
              noun="runs compared"),
        Asked("SIGTERM at 100 moments: not saved in grace", "== 0", "stops", "failures", "d", "stops"),
        Asked("SIGTERM at 20 moments, two processes", "== 0", "stops_two", "failures", "d", "stops"),
        Asked("NaN and infinity at 5 sites, one process and two: not stopped", "== 0", "not_finite", "failed", "d",
              "tests", noun=_TESTS),
        Asked("the same at 20 steps in one pair of processes", "== 0", "not_finite_twenty", "failed", "d", "tests",
              noun=_TESTS, before=("0 of 100 cases", _NAN)),
        Asked("loaders x hostile files: executed, not refused, or above 512 MB", "== 0", "hostile_files", "failed",
              "d", "tests", noun=_TESTS, why="67 pairs in one, 227 MB at most"),
        Asked("guards, share of a step", "<= .03", "guards", "guards_cost", "+.3f"),
    ],
    "Scale": [
        Asked("trainers x engines x LoRA, full: equal to one process to 1e-5, held shares below 60 %", "== 0",
              "matrix", "failed", "d", "tests", noun=_TESTS, before=("0 of 73 cells", "[scale](scale.md#the-matrix)"),
              why="the cells are in [scale](scale.md#the-matrix)"),
        Asked("`align plan`: memory planned / measured", "", "plan", "rows.*.memory_ratio", ".2f",
              why="by engine in [scale](scale.md)",
              before=(".39 to 1.13", _PLAN)),
        Asked("`align plan`: step planned / measured", "", "plan", "rows.*.seconds_ratio", ".2f",
              why="processes share two cores, and communication is left out",
              before=(".05 to 1.05", _PLAN)),
    ],
}  # fmt: skip


def find(figures: Any, key: str) -> list[float]:
    """Return the values under a key, in the order they stand; none where something on the way is missing."""
    for sign, work in ((" - ", operator.sub), (" / ", operator.truediv)):
        if sign in key:
            a, b = (find(figures, part) for part in key.split(sign))
            return [work(x, y) for x, y in zip(a, b, strict=True)]
    return list(_walk(figures, key.split(".")))


def _walk(value: Any, parts: Sequence[str]) -> Iterator[float]:
    if not parts:
        if isinstance(value, list):
            yield float(len(value))
        elif isinstance(value, int | float):
            yield float(value)
        return
    part, rest = parts[0], parts[1:]
    if part == "*":
        inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
        for one in inner:
            yield from _walk(one, rest)
    elif isinstance(value, Mapping) and part in value:
        yield from _walk(value[part], rest)
    elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
        yield from _walk(value[int(part)], rest)


def limits(bar: str) -> list[tuple[Callable[[float, float], bool], float]]:
    """Return the comparisons of a bar: `>= 19 of 20`, `>= .80 and <= .97`."""
    return [(COMPARISONS[sign], float(number)) for sign, number in re.findall(r"([<>=]=?)\s*(-?[\d.e-]+)", bar)]


def worst(values: Sequence[float], bar: str) -> float:
    """Return the value furthest on the wrong side of a bar, or closest to it; of no bar the median."""
    if not bar:
        return sorted(values)[len(values) // 2]
    if bar.startswith("=="):
        return max(values, key=lambda value: abs(value - limits(bar)[0][1]))
    return max(values) if bar.startswith("<") else min(values)


def meets(value: float, bar: str) -> bool:
    """Say whether a value is on the right side of every comparison of a bar."""
    return all(compare(value, number) for compare, number in limits(bar))


def shown(value: float, form: str) -> str:
    """Return a number as the table has it."""
    return format(int(value) if form == "d" else value, form)


def row(asked: Asked, results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table's row of one number: what, bar, measured, spread, met, run."""
    result = results.get(asked.bench)
    bar = asked.bar or "reported"
    if result is None:
        why = asked.why if not asked.bench or BENCHES[asked.bench].needs == "gpu" else ""
        if asked.before:
            return f"| {asked.what} | {bar} | {asked.before[0]} | | | {asked.before[1]} |"
        if asked.bench and not why:
            why = f"`--only {asked.bench}` takes {BENCHES[asked.bench].minutes:g} min"
        return f"| {asked.what} | {bar} | not measured here: {why} | | | |"
    run = f"[{asked.bench}](benchmarks/{asked.bench}.json)"
    if "load" in result and max(result["load"]) > int(result["machine"]["cpus"]):
        run += ", beside other work"
    values = find(result.get("figures", {}), asked.key)
    if not values:
        return f"| {asked.what} | {bar} | failed: {result.get('error') or 'no such figure'} | | no | {run} |"
    value = worst(values, asked.bar)
    measured = shown(value, asked.form)
    if asked.of:
        measured += f" of {shown(sum(find(result['figures'], asked.of)), ',.0f')} {asked.noun}".rstrip()
    if asked.why:
        measured += f" ({asked.why})"
    spread = values if len(values) > 1 else spread_of(result["figures"], asked)
    between = f"{shown(min(spread), asked.form)} to {shown(max(spread), asked.form)}" if len(spread) > 1 else ""
    met = ("yes" if meets(value, asked.bar) else "**no**") if asked.bar else ""
    if result.get("error"):
        run += ", cut short"
    return f"| {asked.what} | {bar} | {measured} | {between} | {met} | {run} |"


def spread_of(figures: Any, asked: Asked) -> list[float]:
    """Return the values whose range is the spread of a number."""
    if "*" in asked.key or " " in asked.key:
        return []
    key = asked.spread or f"{asked.key}_spread"
    return list(_walk(figures, (key if "*" in key else f"{key}.*").split(".")))


def run_row(name: str, result: Mapping[str, Any]) -> str:
    """Return the row of one run: command, when, how long, under what load, on what."""
    machine, versions = result.get("machine") or {}, result.get("versions") or {}
    what = ", ".join(filter(None, (
        f"{machine['cpus']} x {machine.get('processor') or machine.get('platform')}" if machine else "not recorded",
        machine.get("device", "cpu").replace("cpu", ""),
    )))  # fmt: skip
    told = ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "transformers") if name in versions)
    took = f"{result['seconds'] / 60:.1f} min" if result.get("seconds") else ""
    load = " to ".join(f"{value:.1f}" for value in result.get("load", ()))
    taken = ", taken from its output" if result.get("taken") else ""
    return f"| {name} | `python {result['command']}` | {result['date']}{taken} | {took} | {load} | {what} | {told} |"


def block(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the generated part of docs/benchmarks.md."""
    lines = [BEGIN]
    for title, numbers in ASKED.items():
        lines += [
            "",
            f"### {title}",
            "",
            "| number | bar | measured | spread | met | run |",
            "|---|---|---|---|---|---|",
        ]
        lines += [row(asked, results) for asked in numbers]
    lines += ["", "### The runs", "", "| run | command | date | took | load | machine | versions |"]
    lines += ["|---|---|---|---|---|---|---|", *(run_row(name, results[name]) for name in BENCHES if name in results)]
    return "\n".join([*lines, "", END])


@functools.cache
def benches_asked() -> frozenset[str]:
    """Return the benchmarks that some number needs."""
    return frozenset(asked.bench for numbers in ASKED.values() for asked in numbers if asked.bench)
