"""Foreign files against the doors they come in by: nothing runs, little memory is taken, and the file is named.

A child process imports the loaders, then takes one case after another under an audit hook.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import sqlite3
import struct
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = """
import json, resource, sys
seen, watching = [], False
def hook(event, args):
    if watching and (event in ("os.system", "subprocess.Popen", "os.posix_spawn", "os.fork", "pickle.find_class",
        "socket.connect") or event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax")):
        seen.append(f"{event} {args}"[:200])
sys.addaudithook(hook)
import pickle, torch, pyarrow.parquet
from pathlib import Path
from align import checkpoint, images, prompts, scoretable, textfiles, weights
from align.errors import AlignError
from align.feedback import columns
from align.feedback.store import Store
from align.feedback.exchange import tables
from align.sparsity import sources
from rewards import folders, tokens
DOORS = {
    "weights": weights.load_tensors, "folder": weights.require_inert, "sparsity": sources.open_source,
    "image": lambda p: images.image_file(Path(p), p).pixels(), "prompts": prompts.load_prompts,
    "scores": scoretable.read_scores, "columns": lambda p: list(columns.read_rows(p)),
    "exchange": lambda p: list(tables.read_table(p)), "checkpoint": checkpoint.verify,
    "store": lambda p: list(Store.open(p, create=False).current()),
    "yaml": lambda p: textfiles.parse_yaml(textfiles.read_text(p), p), "json": textfiles.read_json,
    "reward": lambda p: folders.read_model_config(Path(p), "a model"), "tokenizer": tokens.load_tokenizer,
    "plain pickle": lambda p: pickle.load(open(p, "rb")),
}
def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) / 1024
for door, path in json.load(open(sys.argv[1])):
    open("/proc/self/clear_refs", "w").write("5")
    before, said, seen[:] = peak(), "", []
    watching = True
    try:
        DOORS[door](path)
    except AlignError as error:
        said = str(error)
    except BaseException as error:
        said = f"!{type(error).__name__}: {error}"
    watching = False
    print(json.dumps([door, path, said, seen, peak() - before]), flush=True)
"""


class Payload:
    """What an attacker pickles."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


def header(text: bytes, body: bytes = b"\0" * 16, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(*spans, shape=(4,)):
    return {f"t{i}": {"dtype": "F32", "shape": list(shape), "data_offsets": list(s)} for i, s in enumerate(spans)}


def write(folder: Path) -> list[tuple[str, str]]:
    """Write the hostile files and return (door, path)."""
    import pyarrow
    from PIL import Image
    from pyarrow import parquet

    from align.feedback.store import Store

    cases: list[tuple[str, str]] = []

    def add(name: str, data: bytes, *doors: str) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        cases.extend((door, str(path)) for door in doors)

    live = Payload(folder / "touched")
    pickles = {
        "live2": pickle.dumps(live, 2), "live4": pickle.dumps(live, 4),
        "extension": b"\x80\x02\x82\x07.", "bytearray": b"\x80\x05\x96" + struct.pack("<Q", 8 << 30) + b".",
        "bytearray_call": b"\x80\x02cbuiltins\nbytearray\nJ\x00\x00\x00\x70\x85R.", "lists": b"\x80\x02" + b"]" * (15 << 20),
    }  # fmt: skip
    for name, data in pickles.items():
        add(f"{name}.pt", data, "weights", "sparsity")
    add("length.safetensors", header(b"{}", length=1 << 60), "weights", "sparsity")
    add("long.safetensors", header(b" " * (17 << 20)), "weights", "sparsity")
    add("beyond.safetensors", header(json.dumps(entry((0, 1 << 50))).encode()), "weights", "sparsity")
    add("overflow.safetensors", header(json.dumps(entry((0, 16), shape=(1 << 40, 1 << 40))).encode()), "weights", "sparsity")  # fmt: skip
    add("deep.safetensors", header(b'{"a":' * 100_000), "weights", "sparsity")
    for i, shard in enumerate(("../../etc/passwd", "/etc/passwd", "..")):
        add(f"index{i}/model.safetensors.index.json", json.dumps({"weight_map": {"w": shard}}).encode())
        cases += [(door, str(folder / f"index{i}")) for door in ("weights", "folder", "sparsity")]
    settings = ({"attn_implementation": "evil/kernel"}, {"megatron_config": {"a": 1}, "megatron_core": "evil"},
                {"auto_mapping": {"parent_library": "evil"}})  # fmt: skip
    for i, said in enumerate(settings):
        add(f"code{i}/config.json", json.dumps(said).encode())
        cases += [(door, str(folder / f"code{i}")) for door in ("folder", "reward", "tokenizer")]
    add("pickled/pytorch_model.bin", pickles["live2"])
    cases.append(("folder", str(folder / "pickled")))
    add("deep.json", b"[" * 1_000_000, "json", "columns")
    add("many.json", b"[" + b"{}," * (4 << 20) + b"{}]", "json", "columns", "exchange")
    laughs = "\n".join(["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12))])
    add("laughs.yaml", laughs.encode(), "yaml")
    add("deep.yaml", b"[" * 10_000, "yaml")
    for kind, doors in (("csv", ("prompts", "columns", "exchange", "scores")), ("jsonl", ("prompts", "columns", "exchange"))):  # fmt: skip
        path = folder / f"line.{kind}"
        path.write_bytes(b'prompt\n"')
        os.truncate(path, 1 << 30)
        cases.extend((door, str(path)) for door in doors)
    table = {"prompt": pyarrow.array(["x" * 1_000_000]).dictionary_encode().take(pyarrow.array([0] * 100_000))}
    parquet.write_table(pyarrow.table(table), folder / "bomb.parquet")
    cases.extend((door, str(folder / "bomb.parquet")) for door in ("prompts", "columns", "exchange", "scores"))
    Image.new("1", (20_000, 20_000)).save(folder / "huge.png")
    add("page.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "image")
    add("vector.svg", b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "image")
    cases.append(("image", str(folder / "huge.png")))
    one = bytes.fromhex("21f90400000000002c0000000001000100000202440100")
    add("moving.gif", b"GIF89a" + bytes.fromhex("01000100800000000000ffffff") + one * 1_000_000 + b";", "image")
    schemas = {
        "view": "DROP TABLE notes; CREATE VIEW notes AS WITH RECURSIVE n(no) AS (SELECT 1 UNION ALL SELECT no + 1 FROM n)"
        " SELECT no, no AS item, '{}' AS metadata FROM n",
        "trigger": "CREATE TRIGGER more AFTER INSERT ON events BEGIN INSERT INTO notes SELECT NULL, 1, '{}'; END",
        "table": "CREATE VIRTUAL TABLE found USING fts5(text)",
    }
    for name, schema in schemas.items():
        Store.open(folder / f"{name}.db").close()
        with contextlib.closing(sqlite3.connect(folder / f"{name}.db")) as db:
            db.executescript(schema)
        cases.append(("store", str(folder / f"{name}.db")))
    step = folder / "step_000001"
    step.mkdir()
    (step / "manifest.json").write_text(json.dumps({"step": 1, "files": {}}))
    (step / "linked").symlink_to("/etc")
    cases.append(("checkpoint", str(step)))
    return cases


@pytest.mark.slow
def test_hostile_files_run_nothing_and_are_refused_by_name(tmp_path: Path):
    cases = write(tmp_path)
    live = str(tmp_path / "live2.pt")
    (tmp_path / "cases.json").write_text(json.dumps([*cases, ("plain pickle", live)]))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD, str(tmp_path / "cases.json")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(cases) + 1, done.stderr[-2000:]
    *refused, plain = found
    assert (tmp_path / "touched").exists() and any("posix" in s or "os.system" in s for s in plain[3]), plain
    for door, path, said, seen, grown in refused:
        assert not seen, (door, path, seen)
        assert said and not said.startswith("!") and Path(path).name in said, (door, path, said[:300])
        assert grown < 512, (door, path, grown)
