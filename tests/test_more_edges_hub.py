"""A Hub that is broken or hostile, before the unmodified client: half a file, other bytes, other hosts, old tokens."""

import hashlib

import pytest

import abliterate
from abliterate.checkpoint.direction_file import load
from tests.checkpoints import write_llama
from tests.loopback_hub import COMMIT, running
from tests.pushing import TOKEN, content, direction_file, errors, finished, run

BASE, NEW = "owner/model", "me/model"
EDIT = ("edit", BASE, "d.safetensors", "--out", "out")
SHARD = "model.safetensors"


@pytest.fixture
def hub(tmp_path):
    """One that has a base, and shows it to everybody."""
    with running(token=TOKEN) as server:
        server.add(BASE, write_llama(tmp_path / "base"))
        direction_file(tmp_path)
        yield server


@pytest.fixture
def elsewhere(tmp_path, hub):
    """Another host, that has the same files."""
    with running() as server:
        server.add(BASE, tmp_path / "base")
        yield server


def test_a_hub_that_sends_half_a_file(hub, tmp_path):
    fault = hub.fail(rf"GET /{BASE}/resolve/{COMMIT}/{SHARD}", skip=1, times=1, cut=3000)  # behind that for the header
    done = run(tmp_path, hub, *EDIT)
    assert done.returncode == 0, done.stderr
    assert fault.hits > 2
    abliterate.edit(tmp_path / "base", load(tmp_path / "d.safetensors"), tmp_path / "here")
    assert (tmp_path / "out" / SHARD).read_bytes() == (tmp_path / "here" / SHARD).read_bytes()


def test_a_hub_that_sends_other_bytes_than_it_says(hub, tmp_path):
    """The client compares sizes; the proof, which reads everything, compares the hash as well."""
    hub.corrupt = {SHARD}
    assert run(tmp_path, hub, *EDIT).returncode == 0
    done = run(tmp_path, hub, "verify", "out", "--bytes-only")
    assert done.returncode == 5
    digest = hashlib.sha256((tmp_path / "base" / SHARD).read_bytes()).hexdigest()
    assert f"blobs/{digest}: its SHA-256 is not the one that the Hub gave" in errors(done)[0]


@pytest.mark.parametrize("what", ["files", "everything"])
def test_the_token_does_not_follow_to_another_host(what, hub, elsewhere, tmp_path):
    """Files of the real Hub lie on other hosts, which get no token either."""
    data = (tmp_path / "base" / SHARD).read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    file = f"/{BASE}/resolve/{COMMIT}/{SHARD}"
    headers = {
        "Location": f"{elsewhere.url}{file}", "X-Repo-Commit": COMMIT, "ETag": f'"{digest}"',
        "X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data)),
    }  # fmt: skip
    hub.fail(rf"(GET|HEAD) {file}", status=302, headers=headers)
    if what == "everything":
        hub.fail(rf"GET /api/models/{BASE}$", status=307, headers={"Location": f"{elsewhere.url}/api/models/{BASE}"})
    done = run(tmp_path, hub, *EDIT)
    assert done.returncode == 0, done.stderr
    assert f"GET {file}" in elsewhere.requests
    assert elsewhere.authorised == {None}
    assert f"Bearer {TOKEN}" in hub.authorised


WHEN = {
    "asking where to": (r"POST .*/objects/batch", 1),
    "sending": (r"PUT /lfs/", 1),
    "the commit": (r"POST .*/commit/", 0),
}


@pytest.mark.parametrize("when", WHEN)
def test_a_token_that_expires_in_the_middle_of_an_upload(when, tmp_path):
    out = finished(tmp_path)
    match, skip = WHEN[when]
    with running(token=TOKEN) as hub:
        hub.fail(
            match, skip=skip, status=401, headers={"X-Error-Message": "Invalid credentials in Authorization header"}
        )
        done = run(tmp_path, hub, "push", out, NEW)
        assert done.returncode == 5
        first, hint = errors(done)
        assert "the token is missing or not valid" in first
        assert "hf auth login" in hint
        assert set(hub.files(NEW)) == {".gitattributes"}
        known = len(hub.large)
        hub.clear()
        assert run(tmp_path, hub, "push", out, NEW).returncode == 0
        assert hub.files(NEW) == content(out)
        assert len(hub.received) == len(hub.large) - known, "what was sent is not sent again"
