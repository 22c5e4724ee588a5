"""`align doctor`: what is wrong with this installation, and its repair."""

from __future__ import annotations

import argparse

from align.output import add_dry_run, add_json, give, table


def doctor(options: argparse.Namespace) -> int:
    """Look at this installation, and repair it where that is asked for."""
    from align.doctor import run_checks
    from align.torchvision_hook import fix

    mended = fix() if options.fix and not options.dry_run else []
    checks = run_checks()
    rows = []
    for check in checks:
        level = check.level.upper() if check.level == "fault" else check.level
        why = f": {check.why}" if check.why else ""
        rows.append((level, f"{check.name}: {check.found}{why}" + (f". {check.do}." if check.do else "")))
    give(options, [{"level": check.level, **vars(check)} for check in checks], "\n".join([*mended, table(rows)]))
    return 0 if all(check.ok for check in checks) else 2


def doctor_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `align doctor`."""
    parser.description = (
        f"{parser.description}\nAll that is found is ok, advice (it slows a run or keeps a feature from working) or a "
        "FAULT.\nThe exit code is 2 with a FAULT, else 0: advice does not change it."
    )
    parser.add_argument("--fix", action="store_true", help="repair what can be repaired")
    add_dry_run(parser)
    add_json(parser)
