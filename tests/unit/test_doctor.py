"""`align doctor`: each fault is made for real, in a process of its own, and found."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from align.doctor import CHECKS, run_checks
from align.errors import ConfigError
from align.torchvision_hook import has_cuda

ROOT = Path(__file__).parents[2]
LOOK = "import json, sys; from align.doctor import run_checks; print(json.dumps([vars(c) for c in run_checks(sys.argv[1:])]))"


def look(
    *names: str,
    before: str = "",
    cwd: Path = ROOT,
    path: Path | None = None,
    root: Path = ROOT,
    code: str = LOOK,
    **env: str,
):
    """Run checks in a process of its own and return what each found; `before` is a shell's first command."""
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "MASTER_PORT", "RANK")}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, filter(None, (path, root)))), **env}
    command = [sys.executable, "-c", code, *names]
    if before:
        command = ["sh", "-c", f'{before} && exec "$@"', "sh", *command]
    child = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=240)
    assert child.returncode == 0, child.stderr
    return {found["name"]: found for found in json.loads(child.stdout.splitlines()[-1])}


def fault(found: dict, *words: str) -> None:
    assert not found["ok"] and found["do"] and found["why"]
    assert all(word in found["found"] + found["do"] for word in words), found


def dist(folder: Path, name: str, number: str, *requires: str) -> None:
    """Write the metadata of a package as an installer does."""
    info = folder / f"{name}-{number}.dist-info"
    info.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {number}", *(f"Requires-Dist: {r}" for r in requires)]
    (info / "METADATA").write_text("\n".join(lines) + "\n")


def test_versions_that_do_not_go_together(tmp_path):
    dist(tmp_path, "peft", "0.1.0")
    dist(tmp_path, "torchvision", "0.99.0", "torch (==9.9.0)", "numpy; extra == 'never'")
    found = look("versions", path=tmp_path)["versions"]
    fault(found, "0.1.0 is installed", "torchvision asks for torch==9.9.0")


def test_a_gpu_that_torch_cannot_use(tmp_path):
    if has_cuda():
        pytest.skip("this torch was built with CUDA")
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-1)'\n")
    smi.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    fault(
        look("gpu", PATH=path)["gpu"],
        "1 listed by nvidia-smi",
        "a CPU build and cannot use them",
        "Install a CUDA build",
    )
    smi.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    assert look("gpu", PATH=path)["gpu"]["ok"], "a driver that does not answer has no GPU"


def test_folders_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    found = look("folders", ALIGN_CACHE=str(tmp_path / "file" / "cache"), HF_HOME="/proc/1/nothing", cwd=Path("/proc"))
    fault(found["cache"], "cannot be written", "ALIGN_CACHE")
    fault(found["hub cache"], "cannot be written", "HF_HOME")
    fault(found["run folder"], "cannot be written", "--out")
    given = str(tmp_path / "file")
    found = look("folders", ALIGN_CACHE=given, HF_HUB_CACHE=given)
    fault(found["cache"], f"ALIGN_CACHE={given} cannot be written: it is a file", "or set ALIGN_CACHE to a folder")
    fault(found["hub cache"], f"HF_HUB_CACHE={given} ", "Move that file away")
    found = look("folders", ALIGN_CACHE=str(tmp_path / "new"), HF_HUB_CACHE=str(tmp_path / "hub"), cwd=tmp_path)
    assert found["cache"]["ok"] and found["hub cache"]["ok"] and sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def mounts(tmp_path: Path) -> bool:
    """Whether this process may mount in a namespace of its own."""
    tried = subprocess.run(
        ["unshare", "-m", "sh", "-c", f"mount -t tmpfs -o size=1m x {tmp_path}"], capture_output=True
    )
    return tried.returncode == 0


def test_a_full_disk_and_little_shared_memory(tmp_path):
    if not shutil.which("unshare") or not mounts(tmp_path):
        pytest.skip("mounting is not allowed here")
    script = f"mount -t tmpfs -o size=64m x /dev/shm && mount -t tmpfs -o size=50m x {tmp_path} && cd {tmp_path}"
    command = [
        "unshare",
        "-m",
        "sh",
        "-c",
        f'{script} && exec "$@"',
        "sh",
        sys.executable,
        "-c",
        LOOK,
        "memory",
        "folders",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    found = {row["name"]: row for row in json.loads(child.stdout)}
    fault(found["shared memory"], "67 MB at /dev/shm", "--shm-size")
    fault(found["run folder"], "0.1 GB free", "Free 2 GB")


def test_processes_that_could_not_meet(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        found = look("network", MASTER_PORT=port, GLOO_SOCKET_IFNAME="nope7", NCCL_SOCKET_IFNAME="^docker0,lo")
    fault(found["MASTER_PORT"], port, "Unset MASTER_PORT")
    fault(found["GLOO_SOCKET_IFNAME"], "'nope7'", "lo")
    assert "NCCL_SOCKET_IFNAME" not in found, "lo is there, and what is left out need not be"
    assert look("network", MASTER_PORT=port)["MASTER_PORT"]["ok"], "it is free again"
    fault(look("network", MASTER_PORT="http")["MASTER_PORT"], "is no port")


def test_a_host_name_that_does_not_resolve(tmp_path):
    if subprocess.run(["unshare", "-u", "hostname", "nowhere"], capture_output=True).returncode:
        pytest.skip("the host name cannot be changed here")
    command = ["unshare", "-u", "sh", "-c", 'hostname no-such-host.invalid && exec "$@"', "sh"]
    child = subprocess.run(
        [*command, sys.executable, "-c", LOOK, "network"], env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    fault(json.loads(child.stdout)[0], "no-such-host.invalid", "/etc/hosts")


def test_the_hub_token_and_offline():
    found = look("hub", HF_TOKEN="hf_abc\n", HF_HUB_OFFLINE="1")
    fault(found["hub token"], "white space")
    assert "hf_abc" not in json.dumps(found), "the token is not told"
    assert found["hub"]["ok"] and "HF_HUB_OFFLINE is set" in found["hub"]["found"] and found["hub"]["do"]
    assert set(look("hub", HF_TOKEN="hf_abc", HF_HUB_OFFLINE="0")) == {"hub"}


def test_more_threads_than_processors():
    cpus = len(os.sched_getaffinity(0))
    fault(look("threads", OMP_NUM_THREADS="4096")["threads"], f"4096 threads on {cpus}", f"OMP_NUM_THREADS={cpus}")
    fault(look("threads", OMP_NUM_THREADS="many")["threads"], "is no number")
    assert look("threads", OMP_NUM_THREADS="1")["threads"]["ok"]
    if cpus > 1 and shutil.which("taskset"):
        one = min(os.sched_getaffinity(0))
        fault(
            look("threads", before=f"taskset -cp {one} $$ >/dev/null", OMP_NUM_THREADS=str(cpus))["threads"],
            "on 1 proc",
        )


def test_few_open_files():
    fault(look("files", before="ulimit -n 256")["open files"], "256 at once", "ulimit -n 1024")


def test_a_file_that_hides_a_package(tmp_path):
    (tmp_path / "peft.py").write_text("")
    (tmp_path / "rewards").mkdir()
    (tmp_path / "rewards" / "__init__.py").write_text("")
    (tmp_path / "diffusers").mkdir()  # without __init__.py it hides nothing
    for name in ("yaml.py", "queue.py"):
        (tmp_path / name).write_text("")
    (tmp_path / "PIL").mkdir()
    (tmp_path / "PIL" / "__init__.py").write_text("")
    console = "import sys; sys.path.remove(''); " + LOOK  # what the installed command has; launchers look here
    assert look("shadowed", cwd=tmp_path, code=console)["shadowed"]["found"].count(str(tmp_path)) == 5
    found = look("shadowed", path=tmp_path, cwd=tmp_path)["shadowed"]
    fault(found, *(f"{name} is {tmp_path / path}" for name, path in (("yaml", "yaml.py"), ("PIL", "PIL"))))
    fault(found, f"queue is {tmp_path / 'queue.py'}, not the one of Python")
    fault(found, f"peft is {tmp_path / 'peft.py'}", f"rewards is {tmp_path / 'rewards'}")
    assert "diffusers" not in found["found"]
    assert look("shadowed")["shadowed"]["ok"]


def test_a_clock_that_is_behind(tmp_path):
    shutil.copytree(ROOT / "align", tmp_path / "align", ignore=shutil.ignore_patterns("__pycache__", "*.html"))
    tomorrow = time.time() + 3 * 86400
    os.utime(tmp_path / "align" / "doctor.py", (tomorrow, tomorrow))
    fault(look("clock", cwd=tmp_path, root=tmp_path)["clock"], "3 days before", "Set the clock")
    assert look("clock")["clock"]["ok"]


def test_an_import_that_crashes(tmp_path):
    (tmp_path / "torch.py").write_text("import os\nos.abort()\n")
    found = look("imports", path=tmp_path)["imports"]
    fault(found, "torch: its import ended the process, exit code -6", f"torch is {tmp_path / 'torch.py'}")
    assert found["do"].startswith("Mend `shadowed` first") and "Install" not in found["do"]


def test_an_unknown_check_is_refused():
    with pytest.raises(ConfigError, match="Did you mean 'clock'"):
        run_checks(["clok"])
    assert list(CHECKS)[-1] == "imports"


@pytest.mark.slow
def test_the_verb_ends_with_2_on_a_fault_and_lists_it(tmp_path):
    """Broken imports and a wrong accelerator, through the command line."""
    (tmp_path / "peft.py").write_text("raise ImportError('cannot import name X')\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "DS_ACCELERATOR": "abacus", "OMP_NUM_THREADS": "1"}
    child = subprocess.run(
        [sys.executable, "-m", "align.cli", "doctor", "--json", str(tmp_path / "found.json")], env=environment,
        cwd=tmp_path, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert child.returncode == 2 and child.stderr == ""
    assert re.search(r"^FAULT +imports: ", child.stdout, re.M) and re.search(
        r"^FAULT +shadowed: peft is ", child.stdout, re.M
    )
    found = {row["name"]: row for row in json.loads((tmp_path / "found.json").read_text())}
    fault(found["imports"], "peft: ImportError: cannot import name X", "deepspeed: ", "abacus")
    assert {row["level"] for row in found.values()} <= {"ok", "advice", "fault"} and found["imports"][
        "level"
    ] == "fault"
    assert found["python"] == {
        "level": "ok",
        "name": "python",
        "ok": True,
        "found": found["python"]["found"],
        "do": "",
        "why": "",
    }
