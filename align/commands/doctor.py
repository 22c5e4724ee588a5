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
        level = "FAULT" if not check.ok else "advice" if check.do else "ok"
        why = f": {check.why}" if check.why else ""
        rows.append((level, f"{check.name}: {check.found}{why}" + (f". {check.do}." if check.do else "")))
    give(options, [vars(check) for check in checks], "\n".join([*mended, table(rows)]))
    return 0 if all(check.ok for check in checks) else 2


def doctor_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `align doctor`."""
    parser.add_argument("--fix", action="store_true", help="repair what can be repaired")
    add_dry_run(parser)
    add_json(parser)
