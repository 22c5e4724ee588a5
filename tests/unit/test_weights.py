"""The one door for weights, against files that lie, that are torn, and that want to run something."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import textwrap
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from align.errors import ModelError
from align.hub import Weights, locate
from align.weights import file_sha256, load_into, load_tensors, structure_sha256, weights_sha256

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")
STATE = {"a": torch.arange(12.0).reshape(3, 4), "b.c": torch.ones(5).half(), "d": torch.full((2,), -1.0).bfloat16()}


class Payload:
    """What an attacker pickles: to unpickle it is to touch a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


def same(found, expected=None):
    expected = STATE if expected is None else expected
    return found.keys() == expected.keys() and all(torch.equal(found[k], v) for k, v in expected.items())


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.bin", "w.ckpt", "w.safetensors"])
def test_tensors_return_as_they_were_saved(tmp_path, name):
    (save_file if name.endswith("safetensors") else torch.save)(STATE, tmp_path / name)
    assert same(load_tensors(tmp_path / name))


@pytest.mark.parametrize("nest", [["state_dict"], ["model"], ["module"], ["state_dict", "model"]])
def test_nested_tables_are_opened(tmp_path, nest):
    found = STATE
    for key in reversed(nest):
        found = {"epoch": 3, "name": "x", key: found}
    torch.save(found, tmp_path / "w.pt")
    assert same(load_tensors(tmp_path / "w.pt"))
    torch.save({"optimizer": {"lr": 1.0}}, tmp_path / "none.pt")
    with pytest.raises(ModelError, match="no table of tensors"):
        load_tensors(tmp_path / "none.pt")


def poisoned(kind, payload):
    """The same payload in every way a torch file can hold it."""
    buffer = io.BytesIO()
    if kind == "archive":
        torch.save({"w": torch.ones(2), "x": payload}, buffer)
    elif kind == "legacy":
        torch.save({"w": torch.ones(2), "x": payload}, buffer, _use_new_zipfile_serialization=False)
    elif kind == "bare pickle":
        pickle.dump(payload, buffer, protocol=2)
    elif kind == "newest pickle":
        pickle.dump(payload, buffer, protocol=5)
    elif kind == "first thing":
        torch.save(payload, buffer)
    return buffer.getvalue()


WATCH = """
    import sys
    seen = []
    sys.addaudithook(lambda event, args: seen.append((event, str(args)[:200])) if watching else None)
    watching = False
    import torch
    from align.errors import ModelError
    from align.weights import load_tensors
    torch.save({"w": torch.ones(1)}, sys.argv[2])
    load_tensors(sys.argv[2])  # what loading imports is imported before anyone watches
    watching = True
    try:
        load_tensors(sys.argv[1])
        raise SystemExit("it loaded")
    except ModelError as error:
        watching = False
        message = str(error)
    wrong = [s for s in seen if s[0] in ("os.system", "subprocess.Popen", "os.posix_spawn", "os.fork", "exec",
                                         "pickle.find_class", "socket.connect", "import", "ctypes.dlopen")]
    wrong += [s for s in seen if s[0] == "open" and "'w" in s[1]]
    wrong += ["planted module"] * ("planted_payload" in sys.modules)
    sys.stdout.write(message + "\\n" + ("quiet" if seen and not wrong else f"noise: {wrong} of {len(seen)}"))
"""


@pytest.mark.parametrize("kind", ["archive", "legacy", "bare pickle", "newest pickle", "first thing"])
def test_a_payload_is_refused_and_nothing_runs(tmp_path, kind):
    touched = tmp_path / "touched"
    (tmp_path / "w.pt").write_bytes(poisoned(kind, Payload(touched)))
    with pytest.raises(ModelError, match="more than tensors.*system"):
        load_tensors(tmp_path / "w.pt")
    assert not touched.exists()
    pickle.loads(pickle.dumps(Payload(touched)))  # noqa: S301  the payload is live: unpickling it elsewhere does what it says
    assert touched.exists()


def test_an_audit_hook_sees_nothing_looked_up(tmp_path, monkeypatch):
    """In a process of its own, told by its environment to load anything: no import, no lookup, no file, no program."""
    (tmp_path / "planted_payload.py").write_text("class Innocent:\n    def __init__(self, *a): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    import planted_payload

    class Reference:
        def __reduce__(self):
            return (planted_payload.Innocent, (1,))

    del sys.modules["planted_payload"]
    sys.modules["planted_payload"] = planted_payload
    (tmp_path / "w.pt").write_bytes(poisoned("archive", Reference()))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", ""), os.getcwd()]),
        "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WATCH), str(tmp_path / "w.pt"), str(tmp_path / "warm.pt")],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.stdout.endswith("quiet") and "planted_payload.Innocent" in done.stdout, done.stdout + done.stderr


def test_a_compressed_archive_is_refused_before_it_is_opened(tmp_path):
    torch.save({"w": torch.zeros(8_000_000)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "bomb.pt", "w") as bomb:
        for member in plain.infolist():
            bomb.writestr(member.filename, plain.read(member), compress_type=zipfile.ZIP_DEFLATED)
    assert (tmp_path / "bomb.pt").stat().st_size < 100_000
    with pytest.raises(ModelError, match="compressed.*32,000"):
        load_tensors(tmp_path / "bomb.pt")


def test_a_tensor_that_repeats_one_number_is_refused(tmp_path):
    """A terabyte of zeros in a kilobyte: harmless until someone copies it."""
    torch.save({"w": torch.zeros(1).expand(1 << 38)}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match="claims more weights"):
        load_tensors(tmp_path / "w.pt")
    tied = torch.ones(1000)
    torch.save({"in": tied, "out": tied}, tmp_path / "tied.pt")
    assert load_tensors(tmp_path / "tied.pt").keys() == {"in", "out"}


def lying(header, body=b"\0" * 16, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x01\x02",
        lying({}, length=1 << 40),
        lying({}, length=(1 << 64) - 1),
        lying(b"not json"),
        lying({"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 16]}}),
        lying({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 1 << 50]}}),
        lying({"w": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}}),
        lying({"w": {"dtype": "PICKLE", "shape": [4], "data_offsets": [0, 16]}}),
        lying({"w": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}),
        lying({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
               "b": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}),
        lying({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}),
    ],
)  # fmt: skip
def test_a_header_that_lies_is_refused(tmp_path, data):
    (tmp_path / "w.safetensors").write_bytes(data)
    with pytest.raises(ModelError, match="safetensors"):
        load_tensors(tmp_path / "w.safetensors")


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
@pytest.mark.parametrize("keep", [0, 1, 7, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path, name, keep):
    (save_file if name.endswith("safetensors") else torch.save)(STATE, tmp_path / name)
    raw = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(raw[: int(keep if keep >= 1 else keep * len(raw))])
    with pytest.raises(ModelError, match=name):
        load_tensors(tmp_path / name)


@pytest.mark.parametrize("archive", [True, False])
def test_damaged_bytes_load_or_are_refused_and_nothing_else(tmp_path, archive):
    torch.save(STATE, tmp_path / "w.pt", _use_new_zipfile_serialization=archive)
    raw, path, refused = (tmp_path / "w.pt").read_bytes(), tmp_path / "damaged.pt", 0
    for seed in range(300):
        rng, damaged = random.Random(seed), bytearray(raw)
        for _ in range(rng.randint(1, 8)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            load_tensors(path)
        except ModelError:
            refused += 1
    assert refused > 100


def shards(folder, names, index="model.safetensors.index.json"):
    folder.mkdir(exist_ok=True)
    (folder / index).write_text(json.dumps({"weight_map": dict(zip(STATE, names, strict=True))}))
    for name in {n for n in names if isinstance(n, str) and "/" not in n}:
        save_file({k: v for k, v in STATE.items() if names[list(STATE).index(k)] == name}, folder / name)
    return folder


def test_a_folder_of_shards_is_one_table(tmp_path):
    folder = shards(tmp_path / "m", ["one.safetensors", "two.safetensors", "one.safetensors"])
    assert same(load_tensors(folder))
    (folder / "two.safetensors").unlink()
    with pytest.raises(ModelError, match="two.safetensors"):
        load_tensors(folder)
    (folder / "two.safetensors").symlink_to(folder)  # a folder that holds itself
    with pytest.raises(ModelError, match="two.safetensors"):
        load_tensors(folder)


def test_shards_may_be_links_as_a_hub_cache_keeps_them(tmp_path):
    folder = shards(tmp_path / "snapshot", ["one.safetensors"] * 3)
    (folder / "one.safetensors").rename(tmp_path / "blob.safetensors")
    (folder / "one.safetensors").symlink_to(tmp_path / "blob.safetensors")
    assert same(load_tensors(folder))


@pytest.mark.parametrize("name", ["../out.safetensors", "sub/../../out.safetensors", "ABSOLUTE", "", "..", 3])
def test_an_index_that_points_outside_is_refused(tmp_path, name):
    save_file(STATE, tmp_path / "out.safetensors")
    name = str(tmp_path / "out.safetensors") if name == "ABSOLUTE" else name
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ModelError, match="no file of its folder"):
        load_tensors(folder)


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": [1]}', '{"weight_map": {"a": ["b"]}}', "{}"])
def test_an_index_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match="index"):
        load_tensors(tmp_path)


def test_what_is_no_weights_is_named(tmp_path):
    for path, message in (
        (tmp_path / "gone.pt", "no such file"),
        (tmp_path, "holds no weights"),
        (tmp_path / "w.gguf", "ends in .gguf"),
        (tmp_path / "text.pt", "cannot be read"),
    ):
        if path.suffix in (".gguf", ".pt") and "gone" not in path.name:
            path.write_text("a plain text file, renamed")
        with pytest.raises(ModelError, match=message):
            load_tensors(path)


def test_published_files_are_known_by_size_and_hash(tmp_path):
    save_file(STATE, tmp_path / "w.safetensors")
    sha256, size = file_sha256(tmp_path / "w.safetensors"), (tmp_path / "w.safetensors").stat().st_size
    known = Weights("someone/model", "sub/w.safetensors", sha256=sha256, bytes=size)
    assert locate(known, tmp_path / "w.safetensors") == locate(known, tmp_path) == tmp_path / "w.safetensors"
    assert locate(Weights("someone/model", "w.safetensors", sha256=sha256[:12]), tmp_path)
    with pytest.raises(ModelError, match=f"{size:,} bytes instead of 7"):
        locate(Weights("someone/model", "w.safetensors", bytes=7), tmp_path)
    with pytest.raises(ModelError, match=f"begins {sha256[:12]}"):
        locate(Weights("someone/model", "w.safetensors", sha256="0" * 64), tmp_path)
    # The same size, one bit apart, changed after it was first hashed.
    raw = bytearray((tmp_path / "w.safetensors").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "w.safetensors").write_bytes(raw)
    os.utime(tmp_path / "w.safetensors", ns=(1, 1))
    with pytest.raises(ModelError, match="not the published weights"):
        locate(known, tmp_path)
    with pytest.raises(ModelError, match="no other.safetensors in it"):
        locate(Weights("someone/model", "other.safetensors"), tmp_path)


def test_the_hash_of_a_folder_is_that_of_its_weights(tmp_path):
    folder = shards(tmp_path / "m", ["one.safetensors", "two.safetensors", "one.safetensors"])
    before = weights_sha256(folder)
    (folder / "README.md").write_text("not weights")
    assert weights_sha256(folder) == before != weights_sha256(folder / "one.safetensors")
    save_file({"b.c": STATE["b.c"] + 1}, folder / "two.safetensors")
    os.utime(folder / "two.safetensors", ns=(1, 1))
    assert weights_sha256(folder) != before


def test_every_key_and_shape_is_accounted_for():
    with torch.device("meta"):
        module = torch.nn.Linear(3, 2)
    weights = {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}
    for change, message in (
        ({"bias": None}, "lacks tensor bias"),
        ({"extra": torch.ones(1)}, "foreign tensor extra"),
        ({"weight": torch.ones(3, 2)}, r"\(3, 2\) instead of \(2, 3\)"),
    ):
        wrong = {k: v for k, v in {**weights, **change}.items() if v is not None}
        with pytest.raises(ModelError, match=message):
            load_into(module, wrong, "here")
    load_into(module, {**weights, "extra": torch.ones(1)}, "here", unused=["extra"])
    assert not module.weight.is_meta and module(torch.ones(1, 3)).tolist() == [[3.0, 3.0]]


def test_structure_hash_by_hand():
    import hashlib

    state = {"b": torch.zeros(2, 3), "a": torch.zeros(())}
    assert structure_sha256(state) == hashlib.sha256(b"a []\nb [2, 3]").hexdigest()
