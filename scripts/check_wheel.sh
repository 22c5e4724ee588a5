#!/usr/bin/env bash
# Builds the wheel, installs it into an environment of its own, and uses it from another folder.
# The heavy dependencies are taken from the environment this runs in; align itself is not.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python -m pip wheel --quiet --no-deps --wheel-dir "$work/dist" "$root"
python -m venv "$work/venv"
bin=$work/venv/bin
site=$("$bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
"$bin/python" -m pip install --quiet --no-deps "$work"/dist/*.whl
# A plain path line adds the packages; it does not run the other environment's .pth files (its editable align).
python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' > "$site/zz_dependencies.pth"
cd "$work"
home=$("$bin/python" -c 'import align; print(align.__file__)')
case "$home" in "$work"/*) ;; *) echo "the wheel's align was not the one imported: $home" >&2; exit 1 ;; esac
"$bin/align" doctor --fix > /dev/null
"$bin/align" configs
"$bin/align" train digits/smoke --out "$work/run"
test -s "$work/run/report.html" && test -s "$work/run/summary.json"
"$bin/python" - <<'END'
from align.feedback.server.app import HERE, STATIC
missing = [n for n in (*(f"static/{n}" for n in STATIC), "static/htmx.LICENSE.txt", "templates/screen.html") if not (HERE / n).is_file()]
raise SystemExit(f"the wheel lacks {missing}" if missing else 0)
END
echo "wheel: ok"
