"""``abliterate push`` against a Hub on the loopback, with the unmodified client in a process of its own."""

import json
import shutil
import signal
import socket

import pytest

from abliterate.checkpoint.source import open_folder
from abliterate.checkpoint.upload_errors import explain
from abliterate.data.tiny_chat import model_path
from abliterate.errors import CheckpointError, OutputError, VerificationError
from abliterate.publishing import manifest
from abliterate.publishing.push import check_files, default_message, finished_manifest
from tests.loopback_hub import running
from tests.pushing import TOKEN, content, direction_file, errors, finished, run, start

NEW = "me/model"


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A verified folder, never to be written to."""
    return finished(tmp_path_factory.mktemp("push"))


@pytest.fixture
def hub():
    with running(token=TOKEN) as server:
        yield server


@pytest.fixture
def copy(out, tmp_path):
    """The verified folder with its base, to be spoilt."""
    shutil.copytree(out.parent, tmp_path / "copy")
    return tmp_path / "copy" / "out"


def visible(hub):
    """What anybody sees of the repository."""
    return set(hub.files(NEW)) if NEW in hub.repos else set()


def written(hub):
    """Requests that change something, or send a file."""
    return [line for line in hub.requests if line.startswith(("POST", "PUT"))]


# --- what arrives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part_bytes", [None, 4000], ids=["single", "multipart"])
def test_every_file_arrives_byte_for_byte_in_one_commit(part_bytes, out, hub, tmp_path):
    hub.part_bytes = part_bytes
    done = run(tmp_path, hub, "push", out, NEW, "--private", "--json")
    assert done.returncode == 0, done.stderr
    assert hub.files(NEW) == content(out)
    assert hub.repos[NEW].private
    assert len(hub.repos[NEW].messages) == 2
    assert any("/part/3" in line for line in hub.requests) == (part_bytes is not None)
    shown = json.loads(done.stdout)
    assert shown == {
        "name": NEW, "branch": "main", "url": f"{hub.url}/{NEW}", "commit": hub.repos[NEW].branches["main"],
        "files": len(content(out)), "size_bytes": sum(map(len, content(out).values())),
    }  # fmt: skip


def test_the_token_goes_to_the_hub_and_nowhere_else(out, hub, tmp_path):
    assert run(tmp_path, hub, "push", out, NEW, ABLITERATE_DEBUG="1").returncode == 0
    assert f"Bearer {TOKEN}" in hub.authorised
    assert not any(TOKEN.encode() in data for data in hub.files(NEW).values())
    assert not any(TOKEN.encode() in data for data in content(tmp_path).values())


def test_what_is_there_is_not_sent_again(out, hub, tmp_path):
    assert run(tmp_path, hub, "push", out, NEW).returncode == 0
    hub.clear()
    assert run(tmp_path, hub, "push", out, NEW).returncode == 0
    assert hub.uploaded_bytes() == 0
    assert len(hub.repos[NEW].messages) == 2


def test_terms_and_licence_of_the_base_are_in_the_card(out, hub, tmp_path):
    done = run(tmp_path, hub, "push", out, NEW)
    card = hub.files(NEW)["README.md"].decode()
    for line in ("license: other", "license_name: terms", "license_link: LICENSE", "extra_gated_prompt: Behave."):
        assert line in card
    assert "the base is gated" in done.stderr


def test_an_earlier_upload_is_replaced_whole(out, hub, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "abliterate.json").write_text("{}")
    (tmp_path / "old" / "model-00001-of-00009.safetensors").write_bytes(b"stale")
    hub.add(NEW, tmp_path / "old")
    assert run(tmp_path, hub, "push", out, NEW).returncode == 0
    assert hub.files(NEW) == content(out)


def test_a_file_that_the_hub_ignores_is_noticed(out, hub, tmp_path):
    """The client would leave it out of the commit without a word."""
    hub.ignored = ("tokenizer.json",)
    done = run(tmp_path, hub, "push", out, NEW)
    assert done.returncode == 5
    assert "holds another 'tokenizer.json' than was sent" in errors(done)[0]


def test_xet_is_used_where_the_client_has_it(out, hub, tmp_path):
    pytest.importorskip("hf_xet")
    (tmp_path / "cas").mkdir()
    hub.xet_endpoint = f"local://{tmp_path}/cas"
    done = run(tmp_path, hub, "push", out, NEW, HF_HUB_DISABLE_XET="0")
    assert done.returncode == 0, done.stderr
    assert not any("/lfs/" in line for line in hub.requests)
    hashes = manifest.read(out)["verification"]["sha256"]
    held = hub.repos[NEW].trees[hub.repos[NEW].branches["main"]]
    assert {name: held[name].oid() for name in hashes} == hashes
    kept = sum(len(data) for name, data in content(tmp_path / "cas").items() if "/xorbs/" in name)
    assert kept > sum((out / name).stat().st_size for name in hashes)


# --- what is never uploaded -------------------------------------------------------------------------------------------


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def unverified(folder):
    document = manifest.read(folder)
    (folder / "abliterate.json").write_text(json.dumps({**document, "verification": None}))


def failed(folder):
    document = manifest.read(folder)
    spoilt = {**document["verification"], "ok": False, "failures": ["x is wrong"]}
    (folder / "abliterate.json").write_text(json.dumps({**document, "verification": spoilt}))


SPOILT = {
    "unverified": (unverified, VerificationError, "was never verified"),
    "failed": (failed, VerificationError, "its verification failed: x is wrong"),
    "flipped bit": (lambda folder: flip(folder / "model-00002-of-00003.safetensors"), VerificationError, "out: "),
    "other tokenizer": (lambda folder: flip(folder / "tokenizer.json"), VerificationError, "tokenizer.json"),
    "missing file": (lambda folder: (folder / "LICENSE").unlink(), VerificationError, "LICENSE is missing"),
    "missing shard": (
        lambda folder: (folder / "model-00003-of-00003.safetensors").unlink(), VerificationError, "is missing",
    ),
    "strange file": (lambda folder: (folder / "notes").write_text(""), VerificationError, "notes was not there when"),
    "no manifest": (lambda folder: (folder / "abliterate.json").unlink(), CheckpointError, "has no abliterate.json"),
    "journal": (lambda folder: (folder / ".abliterate-journal.json").touch(), OutputError, "is unfinished"),
}  # fmt: skip


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("case", SPOILT)
def test_what_is_not_what_was_verified_is_refused(case, verify, copy):
    spoil, kind, says = SPOILT[case]
    check_files(copy, finished_manifest(copy), base=None, verify=verify)
    spoil(copy)
    with pytest.raises(kind, match=says) as caught:
        check_files(copy, finished_manifest(copy), base=None, verify=verify)
    assert caught.value.hint


def test_a_changed_manifest_does_not_help_where_the_base_is_here(copy):
    """Whoever changes a weight and its hash is found out by the proof."""
    from abliterate.checkpoint.hashes import sha256_file

    name = "model-00002-of-00003.safetensors"
    flip(copy / name)
    document = finished_manifest(copy)
    document["verification"]["sha256"][name] = sha256_file(copy / name)
    check_files(copy, document, base=None, verify=False)
    with pytest.raises(VerificationError):
        check_files(copy, document, base=None, verify=True)


def test_a_base_that_is_not_here_is_said(copy):
    shutil.rmtree(copy.parent / "base")
    document, heard = finished_manifest(copy), []
    document["source"]["name"] = str(copy.parent / "base")
    check_files(copy, document, base=None, verify=True, on_event=heard.append)
    assert any("is not on this disk" in getattr(event, "text", "") for event in heard)
    with pytest.raises(CheckpointError, match="no such folder"):
        check_files(copy, document, base=copy.parent / "base", verify=True)


def test_an_unfinished_folder_is_refused(copy):
    partial = copy.rename(copy.with_name("out.partial"))
    with pytest.raises(OutputError, match="is unfinished"):
        finished_manifest(partial)


@pytest.mark.parametrize("options", [[], ["--no-verify"]])
@pytest.mark.parametrize(("case", "code"), [("unverified", 4), ("flipped bit", 4), ("no manifest", 5), ("journal", 2)])
def test_a_refused_folder_makes_nothing_on_the_hub(case, code, options, copy, hub, tmp_path):
    SPOILT[case][0](copy)
    done = run(tmp_path, hub, "push", copy, NEW, *options)
    assert done.returncode == code
    assert len(errors(done)) == 2
    assert written(hub) == []
    assert NEW not in hub.repos


def test_verify_writes_down_what_it_proved(tmp_path):
    """``edit`` leaves a folder unverified; ``verify`` makes it one that can be pushed."""
    import abliterate

    folder = finished(tmp_path, verified=False)
    assert "Nothing yet" in (folder / "README.md").read_text()
    with pytest.raises(VerificationError, match="never verified"):
        finished_manifest(folder)
    assert abliterate.verify(folder).ok
    assert finished_manifest(folder)["verification"]["ok"]
    assert "Nothing yet" not in (folder / "README.md").read_text()


def test_the_message_names_no_folder_of_ours(out):
    assert default_message(manifest.read(out)).startswith("base, edited by abliterate ")


# --- where it may go --------------------------------------------------------------------------------------------------


def test_somebody_elses_files_are_never_overwritten(out, hub, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    hub.add(NEW, tmp_path / "other")
    done = run(tmp_path, hub, "push", out, NEW)
    assert done.returncode == 2
    assert "holds files already that abliterate did not write (config.json)" in errors(done)[0]
    assert written(hub) == []


def test_a_public_repository_is_not_private(out, hub, tmp_path):
    (tmp_path / "empty").mkdir()
    hub.add(NEW, tmp_path / "empty")
    done = run(tmp_path, hub, "push", out, NEW, "--private")
    assert (done.returncode, written(hub)) == (2, [])
    assert "exists, and is public" in errors(done)[0]


@pytest.mark.parametrize(("name", "says"), [("model", "not the name of a repo"), ("a/b c", "nor a valid Hub name")])
def test_bad_names(name, says, out, hub, tmp_path):
    done = run(tmp_path, hub, "push", out, name)
    assert (done.returncode, written(hub)) == (5, [])
    assert says in errors(done)[0]


def test_nobody_is_logged_in(out, hub, tmp_path):
    done = run(tmp_path, hub, "push", out, NEW, HF_TOKEN="")
    assert (done.returncode, hub.requests) == (5, [])
    assert errors(done)[0] == f"error: {NEW}: nobody is logged in"


# --- what the Hub may say ---------------------------------------------------------------------------------------------

CREATE, BATCH, PUT, COMMIT = "POST /api/repos/create", "objects/batch", "PUT /lfs", "/commit/"
SAYS = {
    "401": (CREATE, {"status": 401}, "the token is missing or not valid"),
    "403": (CREATE, {"status": 403}, "the token may not write here"),
    "404": (BATCH, {"status": 404}, "no such repository or branch"),
    "402": (BATCH, {"status": 402}, "no room is left"),
    "413": (PUT, {"status": 413}, "a file is larger than the Hub takes"),
    "412": (COMMIT, {"status": 412}, "was changed by someone else meanwhile"),
    "507": (PUT, {"status": 507}, "no room is left"),
    "500": (COMMIT, {"status": 500}, "the Hub answered 500"),
    "429": (COMMIT, {"status": 429}, "too many requests"),
    "drop": (COMMIT, {"drop": True}, "the Hub cannot be reached"),
    "lost": (
        COMMIT,
        {"status": 400, "body": {"error": "LFS pointer pointed to a file that does not exist"}},
        "the Hub has let go",
    ),
    "storage": (COMMIT, {"status": 403, "body": {"error": "Private storage limit reached"}}, "no room is left"),
}


@pytest.mark.parametrize("case", SAYS)
def test_what_the_hub_refuses_is_said_in_two_lines(case, out, hub, tmp_path):
    match, fault, says = SAYS[case]
    hub.fail(match, **fault)
    done = run(tmp_path, hub, "push", out, NEW, "--no-verify")
    assert done.returncode == 5, done.stderr
    assert errors(done)[0].startswith(f"error: {NEW}: {says}")
    assert visible(hub) <= {".gitattributes"}


def test_a_full_account_is_said(out, hub, tmp_path):
    hub.limit_bytes = 20_000
    done = run(tmp_path, hub, "push", out, NEW)
    assert done.returncode == 5
    assert "no room is left in the account's storage" in errors(done)[0]
    assert visible(hub) == {".gitattributes"}


def test_no_network(out, hub, tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        done = run(tmp_path, hub, "push", out, NEW, HF_ENDPOINT=url)
    assert done.returncode == 5
    assert "the Hub cannot be reached" in errors(done)[0]


@pytest.mark.parametrize(
    ("fault", "note"),
    [
        ({"status": 429, "headers": {"Retry-After": "0"}, "times": 2}, "the Hub asks to wait"),
        ({"status": 503, "times": 1}, "the Hub does not answer as it should"),
        ({"drop": True, "times": 1}, "the Hub does not answer as it should"),
        ({"delay": 1.0, "times": 2}, ""),
    ],
    ids=["rate limit", "unavailable", "dropped", "slow"],
)
@pytest.mark.parametrize("match", [BATCH, PUT])
def test_a_hub_in_trouble_is_asked_again(match, fault, note, out, hub, tmp_path):
    hub.fail(match, **fault)
    done = run(tmp_path, hub, "push", out, NEW, "--no-verify")
    assert done.returncode == 0, done.stderr
    assert hub.files(NEW) == content(out)
    assert note in done.stderr


def test_errors_that_are_not_the_hubs_stay_what_they_are():
    assert explain("x", ZeroDivisionError()) is None
    assert explain("x", ValueError("something else")) is None
    assert isinstance(explain("x", FileNotFoundError(2, "gone", "shard")), CheckpointError)


def test_interrupted_and_continued(out, hub, tmp_path):
    """Ctrl-C while the second shard is sent: nothing is to be seen, and the first is not sent again."""
    processes = []
    hub.fail(PUT, skip=4, times=1, call=lambda: processes[0].send_signal(signal.SIGINT), delay=0.1, drop=True)
    with start(tmp_path, hub, "push", out, NEW, "--no-verify") as process:
        processes.append(process)
        _, said = process.communicate(timeout=120)
    assert process.returncode == 6, said
    assert "interrupted: nothing of it is to be seen at me/model yet" in said
    assert visible(hub) == {".gitattributes"}
    before = dict(hub.received)
    hub.clear()
    assert run(tmp_path, hub, "push", out, NEW, "--no-verify").returncode == 0
    assert hub.files(NEW) == content(out)
    assert before
    assert not before.keys() & hub.received.keys()


def test_run_pushes_what_it_verified(hub, tmp_path):
    direction_file(tmp_path, open_folder(model_path(), name="x").config["hidden_size"])
    command = ("run", "--direction", "d.safetensors", "--out", "out", "--no-eval", "--push", NEW, "--private", "--json")
    done = run(tmp_path, hub, *command)
    assert done.returncode == 0, done.stderr
    assert hub.files(NEW).keys() - content(tmp_path / "out").keys() == {".gitattributes"}
    assert content(tmp_path / "out").items() <= hub.files(NEW).items()
    assert hub.repos[NEW].private
    shown = json.loads(done.stdout)
    assert shown["published"]["name"] == NEW
    assert shown["verification"]["behaviour"]


def test_run_asks_the_hub_before_it_works(hub, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    hub.add(NEW, tmp_path / "other")
    direction_file(tmp_path, 96)
    done = run(tmp_path, hub, "run", "--direction", "d.safetensors", "--out", "out", "--push", NEW)
    assert done.returncode == 2
    assert "holds files already" in errors(done)[0]
    assert not list(tmp_path.glob("out*"))
