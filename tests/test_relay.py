"""``--stream`` against a Hub on the loopback: the same bytes as on disk, little disk, and no half upload, ever."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Event, Thread

import pytest
import torch

import abliterate
from abliterate.checkpoint.direction_file import load, save
from abliterate.checkpoint.shells import RemoteFile, RemoteFiles
from abliterate.checkpoint.source import open_folder
from abliterate.editing.planning import plan
from abliterate.errors import UsageError
from abliterate.method.directions import Candidate, DirectionSet, Subspace
from abliterate.method.moments import ActivationStats, Moments
from abliterate.publishing.relay import needed_elsewhere, stream
from tests import checkpoints, factories
from tests.checkpoints import write_llama
from tests.loopback_hub import running
from tests.pushing import TOKEN, content, direction_file, errors, run, settings, start
from tests.quantising import quantised_gpt_oss, quantised_llama

BASE, NEW = "owner/model", "me/model"
DATED = {"abliterate.json", "README.md"}
STREAM = ("edit", BASE, "d.safetensors", "--push", NEW, "--stream", "--out", "work")


@pytest.fixture
def hub():
    with running(token=TOKEN) as server:
        yield server


def undated(files):
    return {name: data for name, data in files.items() if name not in DATED}


def visible(hub):
    return set(hub.files(NEW)) if NEW in hub.repos else set()


def scattered(folder):
    """A copy of a checkpoint whose norms and scales lie in other shards than what they belong to."""
    tensors = {name: checkpoints.read(folder, name) for name in open_folder(folder, name="x").tensors}
    apart = ("norm.weight", "_scales", "_scale_inv")
    mixed = dict(sorted(tensors.items(), key=lambda item: not item[0].endswith(apart)))
    config = json.loads((folder / "config.json").read_text())
    return checkpoints.write(folder.with_name("base"), config, mixed, shards=4)


def bases(kind, folder):
    if kind == "one file":
        return write_llama(folder / "base")
    if kind == "tied":
        return write_llama(folder / "base", shards=3, tied=True, head=False, biases=True)
    if kind == "class B":
        return scattered(factories.save(factories.build("gemma2"), folder / "whole", dtype=torch.bfloat16))
    if kind == "FP8":
        return scattered(quantised_llama(folder / "whole", "blocks")[0])
    return scattered(quantised_gpt_oss(folder / "whole"))


@pytest.mark.parametrize("kind", ["one file", "tied", "class B", "FP8", "MXFP4"])
def test_the_same_bytes_as_on_disk(kind, hub, tmp_path):
    base = bases(kind, tmp_path)
    hub.add(BASE, base)
    made = plan(base)
    file = direction_file(tmp_path, made.model_map.d_model)
    if kind in ("class B", "FP8", "MXFP4"):
        writers = {writer.tensor.shard for writer in made.writers if writer.norms or writer.packed}
        assert writers - {small.shard for small in needed_elsewhere(made)}
    abliterate.edit(base, load(file), tmp_path / "out")
    done = run(tmp_path, hub, *STREAM)
    assert done.returncode == 0, done.stderr
    ours = undated(content(tmp_path / "out"))
    ours["abliterate/base-README.md"] = (base / "README.md").read_bytes()
    assert undated(hub.files(NEW)) == ours
    assert len(hub.repos[NEW].messages) == 2
    document = json.loads(hub.files(NEW)["abliterate.json"])
    assert document["verification"]["ok"]
    assert (document["source"]["name"], document["source"]["revision"]) == (BASE, hub.repos[BASE].branches["main"])
    report = abliterate.verify(tmp_path / "out")
    assert document["verification"]["sha256"] == dict(report.bytes.sha256_files)
    assert document["verification"]["identical_tensors"] == report.bytes.identical_tensors
    assert len(document["verification"]["edited"]) == len(made.writers)
    assert not (tmp_path / "work.partial").exists()
    assert not (tmp_path / "work").exists()
    assert not any(path.name.endswith(".safetensors") for path in (tmp_path / "home").rglob("*"))


def test_run_streams_along_a_given_direction(hub, tmp_path):
    hub.add(BASE, write_llama(tmp_path / "base", shards=2))
    file = direction_file(tmp_path)
    done = run(tmp_path, hub, "run", BASE, "--direction", file, "--push", NEW, "--stream", "--private", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["name"] == NEW
    assert hub.repos[NEW].private
    assert "abliterate.json" in hub.files(NEW)


# --- the disk ---------------------------------------------------------------------------------------------------------


def disk(folder):
    """Bytes that the disk holds for a folder."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(place) / name).lstat().st_blocks * 512
            except FileNotFoundError:
                continue  # gone meanwhile
    return total


@pytest.fixture
def large(tmp_path):
    """Sixteen shards of up to three megabytes."""
    sizes = {"hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": 12, "vocab_size": 1024}
    base = write_llama(tmp_path / "base", shards=16, sizes=sizes)
    direction_file(tmp_path, 256)
    return base


def test_the_disk_holds_two_shards(large, hub, tmp_path):
    hub.add(BASE, large)
    stop, seen = Event(), [0]

    def watch():
        while not stop.is_set():
            seen.append(disk(tmp_path / "work.partial") + disk(tmp_path / "home"))
            time.sleep(0.002)

    watcher = Thread(target=watch)
    watcher.start()
    hub.fail("PUT /lfs", delay=0.05)  # so that the watcher sees every state
    try:
        done = run(tmp_path, hub, *STREAM)
    finally:
        stop.set()
        watcher.join()
    assert done.returncode == 0, done.stderr
    shards = [path.stat().st_size for path in large.glob("*.safetensors")]
    print(f"peak {max(seen):,} bytes; shards {sum(shards):,}, the largest {max(shards):,}; {len(seen)} looks")
    assert 1.5 * max(shards) < max(seen) < 2 * max(shards) + 600_000
    assert 2 * max(shards) + 600_000 < 0.25 * sum(shards)


def test_every_shard_is_fetched_and_sent_once(large, hub, tmp_path):
    hub.add(BASE, large)
    assert run(tmp_path, hub, *STREAM).returncode == 0
    for path in large.glob("*.safetensors"):
        assert hub.served[path.name] <= path.stat().st_size + 200_000
    sent = sum(path.stat().st_size for path in large.glob("*.safetensors"))
    assert sent <= hub.uploaded_bytes() <= sent + 20_000


# --- killed, interrupted, refused -------------------------------------------------------------------------------------

DEATHS = {
    "while headers come": ("GET /owner/model/resolve/.*safetensors$", 4),
    "while other files come": ("GET /owner/model/resolve/.*tokenizer.json", 0),
    "before the repository is made": ("POST /api/repos/create", 0),
    "before the second shard comes": ("HEAD /owner/model/resolve/.*00002-of", 0),
    "before the second shard is sent": ("PUT /lfs", 1),
    "before the last shard is checked": ("POST /lfs/.*/verify", 3),
    "before the small files are sent": ("POST /api/models/me/model/preupload", 4),
    "before the commit": ("/commit/", 0),
}


@pytest.mark.parametrize("death", DEATHS)
def test_killed_anywhere_and_continued(death, hub, tmp_path):
    match, skip = DEATHS[death]
    base = write_llama(tmp_path / "base", shards=4, tied=True, head=False)
    hub.add(BASE, base)
    abliterate.edit(base, load(direction_file(tmp_path)), tmp_path / "out")
    processes = []
    fault = hub.fail(match, skip=skip, times=1, call=lambda: processes[0].kill(), drop=True)
    with start(tmp_path, hub, *STREAM) as process:
        processes.append(process)
        process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert fault.hits == skip + 1
    assert visible(hub) <= {".gitattributes"}
    journal = tmp_path / "work.partial" / ".abliterate-journal.json"
    done = json.loads(journal.read_text())["shards"] if journal.exists() else {}
    before = dict(hub.large)
    hub.clear()
    again = run(tmp_path, hub, *STREAM)
    assert again.returncode == 0, again.stderr
    ours = undated(content(tmp_path / "out"))
    ours["abliterate/base-README.md"] = (base / "README.md").read_bytes()
    assert undated(hub.files(NEW)) == ours
    assert not before.keys() & hub.received.keys()  # nothing is sent twice
    whole = [line for line in hub.requests if line.startswith("HEAD") and line.endswith(tuple(done) or ("nothing",))]
    assert whole == []  # nor fetched twice
    print(f"{death}: {len(done)} shards were done; after it {hub.uploaded_bytes():,} bytes sent")
    assert not (tmp_path / "work.partial").exists()


def stored(cas):
    """The data that ``hf_xet`` stored, without its books."""
    return {name for name in content(cas) if "/xorbs/" in name and ".mdb" not in name and not name.endswith(".redb")}


def test_killed_and_continued_with_xet(hub, tmp_path):
    """What ``hf_xet`` stored is not stored again, and the commit names files that another process sent."""
    pytest.importorskip("hf_xet")
    base = write_llama(tmp_path / "base", shards=4)
    hub.add(BASE, base)
    abliterate.edit(base, load(direction_file(tmp_path)), tmp_path / "out")
    cas = tmp_path / "cas"
    cas.mkdir()
    hub.xet_endpoint = f"local://{cas}"
    hub.fail("/commit/", status=500, times=1)
    assert run(tmp_path, hub, *STREAM, HF_HUB_DISABLE_XET="0").returncode == 5
    before = stored(cas)
    done = run(tmp_path, hub, *STREAM, HF_HUB_DISABLE_XET="0")
    assert done.returncode == 0, done.stderr
    assert before
    assert stored(cas) == before
    tree = hub.repos[NEW].trees[hub.repos[NEW].branches["main"]]
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert tree[path.name].oid() == hashlib.sha256(path.read_bytes()).hexdigest()
    assert not any("/lfs/" in line for line in hub.requests)


def test_shards_that_are_not_large_wait_for_the_commit(hub, tmp_path):
    """A repository may say of any file that it is a plain one: then it stays here until the commit."""
    base = write_llama(tmp_path / "base", shards=3)
    hub.add(BASE, base)
    abliterate.edit(base, load(direction_file(tmp_path)), tmp_path / "out")
    hub.endings = (".nothing",)
    hub.fail("/commit/", status=500, times=1)
    assert run(tmp_path, hub, *STREAM).returncode == 5
    done = run(tmp_path, hub, *STREAM)
    assert done.returncode == 0, done.stderr
    assert hub.received == {}
    ours = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.safetensors")}
    assert ours.items() <= hub.files(NEW).items()


@pytest.mark.parametrize(
    "fault",
    [
        {"match": "GET .*00002-of", "skip": 3, "cut": 1000},
        {"match": "GET .*00001-of", "skip": 1, "status": 503},
        {"match": "HEAD .*00002-of", "drop": True},
        {"match": "PUT /lfs", "skip": 1, "drop": True},
    ],
    ids=["cut", "unavailable", "dropped", "dropped while sending"],
)
def test_a_hub_in_trouble_is_asked_again(fault, hub, tmp_path):
    base = write_llama(tmp_path / "base", shards=3)
    hub.add(BASE, base)
    abliterate.edit(base, load(direction_file(tmp_path)), tmp_path / "out")
    met = hub.fail(times=1, **fault)
    done = run(tmp_path, hub, *STREAM)
    assert done.returncode == 0, done.stderr
    assert met.hits > met.skip
    ours = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.safetensors")}
    assert ours.items() <= hub.files(NEW).items()


def test_interrupted_and_continued(hub, tmp_path):
    hub.add(BASE, write_llama(tmp_path / "base", shards=4))
    direction_file(tmp_path)
    processes = []
    hub.fail("PUT /lfs", skip=2, times=1, call=lambda: processes[0].send_signal(signal.SIGINT), delay=0.1, drop=True)
    with start(tmp_path, hub, *STREAM) as process:
        processes.append(process)
        _, said = process.communicate(timeout=120)
    assert process.returncode == 6, said
    assert "nothing of it is to be seen" in said
    assert visible(hub) == {".gitattributes"}
    assert run(tmp_path, hub, *STREAM).returncode == 0
    assert "abliterate.json" in hub.files(NEW)


def test_what_the_hub_let_go_of_is_said(hub, tmp_path):
    """Files that no commit names are deleted after a while."""
    hub.add(BASE, write_llama(tmp_path / "base", shards=3))
    direction_file(tmp_path)
    hub.fail("/commit/", status=500, times=1)
    assert run(tmp_path, hub, *STREAM).returncode == 5
    hub.large.clear()
    done = run(tmp_path, hub, *STREAM)
    assert done.returncode == 5
    assert "has let go of files that were sent long ago" in errors(done)[0]
    assert visible(hub) == {".gitattributes"}


def test_another_run_does_not_continue_it(hub, tmp_path):
    hub.add(BASE, write_llama(tmp_path / "base", shards=3))
    direction_file(tmp_path)
    hub.fail("/commit/", status=500, times=1)
    assert run(tmp_path, hub, *STREAM).returncode == 5
    other = run(tmp_path, hub, *STREAM, "--rounding", "nearest")
    assert other.returncode == 2
    assert "is the unfinished output of another run" in errors(other)[0]


def test_a_damaged_download_is_noticed(hub, tmp_path):
    hub.add(BASE, write_llama(tmp_path / "base", shards=3))
    direction_file(tmp_path)
    hub.corrupt = {"model-00002-of-00003.safetensors"}
    done = run(tmp_path, hub, *STREAM)
    assert done.returncode == 5
    assert "model-00002-of-00003.safetensors: what arrived is not what the Hub holds" in errors(done)[0]
    assert visible(hub) == {".gitattributes"}
    hub.corrupt = set()
    assert run(tmp_path, hub, *STREAM).returncode == 0


SABOTAGE = """
import sys
from pathlib import Path
import abliterate
from abliterate.checkpoint import direction_file as directions
from abliterate.editing import shards as editor
real = editor.Editor.write_shard
def spoilt(self, shard, target, **options):
    real(self, shard, target, **options)
    if shard.name.startswith("model-00002"):
        data = bytearray(target.read_bytes())
        data[-1] ^= 1
        target.write_bytes(data)
editor.Editor.write_shard = spoilt
try:
    abliterate.stream("owner/model", directions.load(Path("d.safetensors")), "me/model", "work")
except abliterate.errors.VerificationError as error:
    sys.exit(f"{error.exit_code} {error}")
"""


def test_a_wrong_shard_is_not_sent(hub, tmp_path):
    hub.add(BASE, write_llama(tmp_path / "base", shards=3))
    direction_file(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", SABOTAGE], env=settings(tmp_path, hub), capture_output=True, text=True, check=False,
        cwd=tmp_path,
    )  # fmt: skip
    assert done.stderr.startswith("4 verification failed"), done.stderr
    assert len(hub.received) == 1
    assert visible(hub) == {".gitattributes"}


def test_a_hub_without_ranges_is_refused(hub, tmp_path):
    hub.add(BASE, write_llama(tmp_path / "base", shards=3))
    direction_file(tmp_path)
    hub.ranges = False
    done = run(tmp_path, hub, *STREAM)
    assert done.returncode == 5
    assert "does not answer requests for a part of" in errors(done)[0]
    assert NEW not in hub.repos


def test_a_model_that_cannot_be_edited_is_refused_before_anything_is_made(hub, tmp_path):
    base = write_llama(tmp_path / "base", shards=3)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": "unheard-of"}))
    hub.add(BASE, base)
    direction_file(tmp_path)
    done = run(tmp_path, hub, *STREAM)
    assert done.returncode == 3
    assert not any(line.startswith(("POST", "PUT")) for line in hub.requests)
    assert not (tmp_path / "work.partial").exists()


def test_a_constant_is_not_streamed(hub, tmp_path):
    """In an embedding it could ruin the model, which its rows tell, and they are not there yet."""
    hub.add(BASE, write_llama(tmp_path / "base", shards=3))
    one = Candidate(
        id="some/-1/1", subspace=Subspace(vectors=torch.randn(32, 1)), layer=1,
        provenance={"estimator": "some", "position": -1},
    )  # fmt: skip
    layers = open_folder(tmp_path / "base", name="x").config["num_hidden_layers"]
    means = {kind: Moments(count=2, mean=torch.randn(1, layers, 32)) for kind in ("harmful", "harmless")}
    made = DirectionSet(candidates=(one,), statistics=ActivationStats(positions=(-1,), moments=means))
    save(made.choose_candidate(one.id), tmp_path / "d.safetensors")
    done = run(tmp_path, hub, *STREAM, "--change", "affine")
    assert done.returncode == 3, done.stderr
    assert "'model.embed_tokens.weight' would gain a constant" in errors(done)[0]
    assert NEW not in hub.repos


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("edit", BASE, "d.safetensors", "--push", NEW), "an edit is not verified"),
        (("edit", BASE, "d.safetensors", "--stream"), "--stream sends every shard to the Hub"),
        (("run", BASE, "--stream", "--push", NEW), "measuring needs the whole model"),
        (("run", BASE, "--stream", "--push", NEW, "--dry-run"), "--dry-run shows nothing of a stream"),
        (("edit", "base", "d.safetensors", "--push", NEW, "--stream"), "lies on this disk"),
        (("edit", BASE, "d.safetensors", "--push", BASE, "--stream"), "is the base itself"),
    ],
)
def test_what_makes_no_sense_is_refused(args, says, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from abliterate.cli.app import app

    write_llama(tmp_path / "base")
    direction_file(tmp_path)
    monkeypatch.chdir(tmp_path)
    shown = CliRunner().invoke(app, list(args))
    assert shown.exit_code == 2
    assert says in shown.stderr
    assert len(shown.stderr.splitlines()) == 2


def test_local_models_are_not_streamed(tmp_path):
    direction = load(direction_file(tmp_path))
    with pytest.raises(UsageError, match="lies on this disk"):
        stream("./x", direction, NEW, tmp_path / "out", abliterate.Recipe())


def test_shells_hold_their_headers_and_their_size(tmp_path, monkeypatch):
    base = write_llama(tmp_path / "base", shards=3)
    found = {path.name: path.read_bytes() for path in base.glob("*.safetensors")}
    files = RemoteFiles(
        repository=BASE,
        commit=None,
        files={n: RemoteFile(name=n, size_bytes=len(data), sha256=None) for n, data in found.items()},
    )
    monkeypatch.setattr(RemoteFiles, "read", lambda self, name, start, end: found[name][start:end])
    monkeypatch.setattr("abliterate.checkpoint.shells.PART_BYTES", 10)
    before = open_folder(base, name="x")
    norms = [info for name, info in before.tensors.items() if "norm" in name]
    for name in found:
        files.make_shell(name, base / name)
    after = open_folder(base, name="x")
    assert after.shards == before.shards
    assert files.fill(norms, base) == sum(norm.size_bytes for norm in norms)
    for norm in norms:
        data = (base / norm.shard).read_bytes()
        assert data[norm.start : norm.end] == found[norm.shard][norm.start : norm.end]
