"""A Hub on the loopback for the unmodified ``huggingface_hub``: repositories in memory, and faults on demand.

It speaks what the client asks for: model info, refs, tree, paths, resolve (ranges, ETags), repository and branch
creation, preupload, LFS batch with single and multipart uploads, commit, and the write token of Xet.  What arrived can
be read back byte by byte: ``hub.files("owner/name")``.

The client decides about Xet alone, from the installed packages: no answer of a server steers its uploads to LFS, so
tests of LFS set ``HF_HUB_DISABLE_XET=1``.  Downloads use Xet only where an answer has the header ``X-Xet-Hash``, which
none here has.  For uploads with Xet ``hub.xet_endpoint`` may be ``local:///some/folder``: the unmodified ``hf_xet``
then stores there what it would send, and the Hub knows such files by hash and size only.
"""

import base64
import hashlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import RLock, Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.loopback_repos import Blob, Fault, Repo

COMMIT = "0123456789abcdef0123456789abcdef01234567"
"""The first commit of a repository that ``add`` made."""

LARGE = (".safetensors", ".bin", ".model", ".png")
"""What becomes LFS, as the Hub's own .gitattributes has it."""

REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


class Hub(ThreadingHTTPServer):
    """Repositories by name.  ``served`` and ``received`` count bytes of files; ``requests`` are "METHOD /path".

    Writing needs ``token`` (None: anyone may).  ``part_bytes`` splits larger uploads in parts.  ``limit_bytes`` is the
    storage an account has, ``endings`` what becomes LFS.  ``ranges`` False answers every range with the whole file;
    whole files named in ``corrupt`` are served with a flipped bit.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, *, token: str | None = None, part_bytes: int | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = RLock()
        self.token, self.part_bytes = token, part_bytes
        self.limit_bytes: int | None = None
        self.ranges = True
        self.endings = LARGE
        self.ignored: tuple[str, ...] = ()
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.xet_endpoint: str | None = None
        self.corrupt: set[str] = set()
        self.faults: list[Fault] = []
        self.clear()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no error of ours."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def clear(self) -> None:
        """Forget what was counted, and all faults."""
        self.faults = []
        self.requests: list[str] = []
        self.served: dict[str, int] = {}
        self.received: dict[str, int] = {}
        self.authorised: set[str | None] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def add(self, name: str, folder: Path, **options: Any) -> Repo:
        """A repository with the files of ``folder``, which is read anew for every answer."""
        tree = {
            path.relative_to(folder).as_posix(): Blob(data=path, large=path.name.endswith(LARGE))
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        repo = self.repos[name] = Repo(**options)
        repo.commit("main", tree, "the base", oid=COMMIT)
        return repo

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """The bytes of every file of a repository."""
        repo = self.repos[name]
        return {path: blob.read() for path, blob in repo.trees[repo.branches[revision]].items()}

    def fail(self, match: str, **what: Any) -> Fault:
        """Have requests fail; see ``Fault``."""
        fault = Fault(match=match, **what)
        self.faults.append(fault)
        return fault

    def uploaded_bytes(self) -> int:
        """Bytes of large files that came in."""
        return sum(self.received.values())


@contextmanager
def running(**options: Any) -> Iterator[Hub]:
    """A Hub that answers until the end of the block."""
    with Hub(**options) as hub:
        thread = Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def do_PUT(self) -> None:
        self.answer()

    def answer(self) -> None:
        url = urlsplit(self.path)
        line = f"{self.command} {url.path}"
        self.cut: int | None = None
        with self.server.lock:
            self.server.requests.append(line)
            self.server.authorised.add(self.headers.get("Authorization"))
            fault = self._fault(line)
        if fault is not None and self._fails(fault):
            return
        body = self._body()
        for pattern, method in ROUTES:
            found = re.fullmatch(pattern, line)
            if found:
                with self.server.lock:
                    method(self, body=body, query=parse_qs(url.query), **found.groupdict())
                return
        self.json({"error": f"no route for {line}"}, status=404)

    def _fault(self, line: str) -> Fault | None:
        for fault in self.server.faults:
            if re.search(fault.match, line):
                fault.hits += 1
                if fault.skip < fault.hits <= fault.skip + fault.times:
                    return fault
        return None

    def _fails(self, fault: Fault) -> bool:
        time.sleep(fault.delay)
        if fault.call is not None:
            fault.call()
        self.cut = fault.cut
        if fault.drop:
            self.close_connection = True
            return True
        if fault.status is None:
            return False
        self._body()
        self.json(fault.body, status=fault.status, headers=fault.headers)
        return True

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0] or b"0", 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def json(self, document: Any, *, status: int = 200, headers: Mapping[str, str] = {}) -> None:
        self.send(status, {"Content-Type": "application/json", **headers}, json.dumps(document).encode())

    def send(self, status: int, headers: Mapping[str, str], content: bytes) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.cut is not None:
            self.wfile.write(content[: self.cut])
            self.close_connection = True
            return
        self.wfile.write(content)

    def refuse(self, status: int, code: str, message: str = "") -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message or code}
        self.json({"error": message or code}, status=status, headers=headers)

    def repo_of(self, name: str, *, write: bool = False) -> Repo | None:
        """The repository, if whoever asks may; otherwise the request is answered."""
        token = self.server.token
        known = token is None or self.headers.get("Authorization") == f"Bearer {token}"
        repo = self.server.repos.get(name)
        if write and not known:
            self.refuse(401, "", "Invalid credentials in Authorization header")
            return None
        if repo is None or (repo.private and not known):
            self.refuse(404 if known else 401, "RepoNotFound", "Repository not found")
            return None
        if repo.gated and not known and not write:
            self.refuse(403, "GatedRepo", "Access is gated")
            return None
        return repo

    def tree_of(self, name: str, revision: str | None) -> tuple[Repo, str, dict[str, Blob]] | None:
        repo = self.repo_of(name)
        if repo is None:
            return None
        commit = repo.resolve(revision or "main")
        if commit is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repo, commit, repo.trees[commit]

    # --- reading ------------------------------------------------------------------------------------------------------

    def info(self, *, repo: str, rev: str | None = None, **_: Any) -> None:
        found = self.tree_of(repo, rev)
        if found:
            held, commit, tree = found
            siblings = [{"rfilename": path} for path in sorted(tree)]
            self.json({"id": repo, "sha": commit, "private": held.private, "gated": held.gated, "siblings": siblings})

    def refs(self, *, repo: str, **_: Any) -> None:
        held = self.repo_of(repo)
        if held:
            self.json(held.refs())

    def tree(self, *, repo: str, rev: str, **_: Any) -> None:
        found = self.tree_of(repo, rev)
        if found:
            self.json([blob.entry(path) for path, blob in sorted(found[2].items())])

    def paths(self, *, repo: str, rev: str, body: bytes, **_: Any) -> None:
        found = self.tree_of(repo, rev)
        if found:
            text = body.decode()
            wanted = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text).get("paths", [])
            self.json([found[2][path].entry(path) for path in wanted if path in found[2]])

    def file(self, *, repo: str, rev: str, path: str, **_: Any) -> None:
        found = self.tree_of(repo, rev)
        if not found:
            return
        blob = found[2].get(unquote(path))
        if blob is None:
            self.refuse(404, "EntryNotFound")
            return
        content = blob.read()
        headers = {"ETag": f'"{blob.oid()}"', "X-Repo-Commit": found[1], "Accept-Ranges": "bytes"}
        if blob.large:
            headers |= {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{blob.oid()}"'}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if self.server.ranges else None
        status = 206 if wanted else 200
        if unquote(path) in self.server.corrupt and not wanted:
            content = content[:-1] + bytes([content[-1] ^ 1])
        if wanted:
            first, last = int(wanted[1]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content = content[first : last + 1]
        if self.command == "GET":
            self.server.served[unquote(path)] = self.server.served.get(unquote(path), 0) + len(content)
        self.send(status, headers, content)

    # --- writing ------------------------------------------------------------------------------------------------------

    def create(self, *, body: bytes, **_: Any) -> None:
        wanted = json.loads(body)
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if self.server.token is not None and self.headers.get("Authorization") != f"Bearer {self.server.token}":
            self.refuse(401, "", "Invalid credentials in Authorization header")
        elif name in self.server.repos:
            self.json({"error": "You already created this model repo", "url": f"{self.server.url}/{name}"}, status=409)
        else:
            repo = self.server.repos[name] = Repo(private=wanted.get("visibility") == "private")
            repo.commit("main", {".gitattributes": Blob(data=b"*.safetensors lfs\n", large=False)}, "initial commit")
            self.json({"url": f"{self.server.url}/{name}", "name": name})

    def branch(self, *, repo: str, rev: str, body: bytes, **_: Any) -> None:
        held = self.repo_of(repo, write=True)
        if not held:
            return
        start = held.resolve(json.loads(body or b"{}").get("startingPoint", "main"))
        if unquote(rev) in held.branches:
            self.refuse(409, "", "Reference already exists")
        elif start is None:
            self.refuse(404, "RevisionNotFound", "Invalid starting point")
        else:
            held.branches[unquote(rev)] = start
            self.json({})

    def validate(self, **_: Any) -> None:
        self.json({"errors": [], "warnings": []})

    def preupload(self, *, repo: str, rev: str, body: bytes, **_: Any) -> None:
        if not self.repo_of(repo, write=True):
            return
        found = self.tree_of(repo, rev)
        if not found:
            return
        answers = []
        for file in json.loads(body)["files"]:
            path, old = file["path"], found[2].get(file["path"])
            large = path.endswith(self.server.endings) or file["size"] > 10 * 2**20
            answers.append({
                "path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": path in self.server.ignored,
                **({"oid": old.oid()} if old else {}),
            })  # fmt: skip
        self.json({"files": answers})

    def batch(self, *, repo: str, body: bytes, **_: Any) -> None:
        if not self.repo_of(repo, write=True):
            return
        hub, answers = self.server, []
        for wanted in json.loads(body)["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            answer: dict[str, Any] = {"oid": oid, "size": size}
            if hub.limit_bytes is not None and sum(map(len, hub.large.values())) + size > hub.limit_bytes:
                answer["error"] = {"code": 403, "message": "Private repository storage limit reached"}
            elif oid not in hub.large:
                upload: dict[str, Any] = {"href": f"{hub.url}/lfs/{oid}?X-Amz-Signature=secret", "header": {}}
                if hub.part_bytes is not None and size > hub.part_bytes:
                    count = -(-size // hub.part_bytes)
                    upload["href"] = f"{hub.url}/lfs/{oid}/complete"
                    upload["header"] = {"chunk_size": str(hub.part_bytes)} | {
                        str(part): f"{hub.url}/lfs/{oid}/part/{part}" for part in range(1, count + 1)
                    }
                answer["actions"] = {"upload": upload, "verify": {"href": f"{hub.url}/lfs/{oid}/verify"}}
            answers.append(answer)
        self.json({"transfer": "basic", "objects": answers})

    def put(self, *, oid: str, body: bytes, **_: Any) -> None:
        self._count(oid, body)
        if hashlib.sha256(body).hexdigest() != oid:
            self.refuse(400, "", "the content does not match its hash")
            return
        self.server.large[oid] = body
        self.send(200, {"ETag": f'"{oid}"'}, b"")

    def put_part(self, *, oid: str, part: str, body: bytes, **_: Any) -> None:
        self._count(oid, body)
        self.server.parts.setdefault(oid, {})[int(part)] = body
        self.send(200, {"ETag": f'"{hashlib.md5(body).hexdigest()}"'}, b"")

    def _count(self, oid: str, body: bytes) -> None:
        self.server.received[oid] = self.server.received.get(oid, 0) + len(body)

    def complete(self, *, oid: str, body: bytes, **_: Any) -> None:
        parts = self.server.parts.get(oid, {})
        content = b"".join(parts.get(part["partNumber"], b"") for part in json.loads(body)["parts"])
        if hashlib.sha256(content).hexdigest() != oid:
            self.refuse(400, "", "the parts do not match the hash")
            return
        self.server.large[oid] = content
        self.json({})

    def verified(self, *, oid: str, body: bytes, **_: Any) -> None:
        known = len(self.server.large.get(oid, b"")) == json.loads(body)["size"]
        self.json({}, status=200 if known else 404)

    def commit(self, *, repo: str, rev: str, body: bytes, **_: Any) -> None:
        held = self.repo_of(repo, write=True)
        if not held:
            return
        parent = held.branches.get(unquote(rev))  # a tag or a commit can be read, not committed to
        if parent is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {rev}")
            return
        old = held.trees[parent]
        tree, header = dict(old), {}
        for entry in map(json.loads, body.splitlines()):
            key, value = entry["key"], entry["value"]
            if key == "header":
                header = value
            elif key == "file":
                tree[value["path"]] = Blob(data=base64.b64decode(value["content"]), large=False)
            elif key == "lfsFile" and value["oid"] in self.server.large:
                tree[value["path"]] = Blob(data=self.server.large[value["oid"]], large=True)
            elif key == "lfsFile" and self.server.xet_endpoint is not None:
                tree[value["path"]] = Blob(large=True, declared=(value["oid"], value["size"]))
            elif key == "deletedFile":
                del tree[value["path"]]
            else:
                self.refuse(400, "", f"LFS pointer pointed to a file that does not exist: {value['path']}")
                return
        if header.get("parentCommit", parent) != parent:
            self.refuse(412, "", "A commit has happened since. Please refresh and try again.")
            return
        oid = held.commit(unquote(rev), tree, header["summary"])
        self.json({"commitUrl": f"{self.server.url}/{repo}/commit/{oid}", "commitOid": oid, "success": True})

    def xet_token(self, *, repo: str, **_: Any) -> None:
        if not self.repo_of(repo, write=True):
            return
        if self.server.xet_endpoint is None:
            self.refuse(404, "", "no Xet here")
            return
        expires = int(time.time()) + 3600
        self.json(
            {"accessToken": "xet", "exp": expires, "casUrl": self.server.xet_endpoint},
            headers={
                "X-Xet-Cas-Url": self.server.xet_endpoint,
                "X-Xet-Access-Token": "xet",
                "X-Xet-Token-Expiration": str(expires),
            },
        )

    def log_message(self, *args: Any) -> None:
        pass


ROUTES: tuple[tuple[str, Callable[..., None]], ...] = (
    (rf"GET /api/models/{REPO}", Handler.info),
    (rf"GET /api/models/{REPO}/revision/(?P<rev>[^/]+)", Handler.info),
    (rf"GET /api/models/{REPO}/refs", Handler.refs),
    (rf"GET /api/models/{REPO}/tree/(?P<rev>[^/]+)", Handler.tree),
    (rf"POST /api/models/{REPO}/paths-info/(?P<rev>[^/]+)", Handler.paths),
    (rf"(?:GET|HEAD) /{REPO}/resolve/(?P<rev>[^/]+)/(?P<path>.+)", Handler.file),
    (r"POST /api/repos/create", Handler.create),
    (rf"POST /api/models/{REPO}/branch/(?P<rev>[^/]+)", Handler.branch),
    (r"POST /api/validate-yaml", Handler.validate),
    (rf"POST /api/models/{REPO}/preupload/(?P<rev>[^/]+)", Handler.preupload),
    (rf"POST /{REPO}\.git/info/lfs/objects/batch", Handler.batch),
    (r"PUT /lfs/(?P<oid>\w+)", Handler.put),
    (r"PUT /lfs/(?P<oid>\w+)/part/(?P<part>\d+)", Handler.put_part),
    (r"POST /lfs/(?P<oid>\w+)/complete", Handler.complete),
    (r"POST /lfs/(?P<oid>\w+)/verify", Handler.verified),
    (rf"POST /api/models/{REPO}/commit/(?P<rev>[^/]+)", Handler.commit),
    (rf"GET /api/models/{REPO}/xet-write-token/(?P<rev>[^/]+)", Handler.xet_token),
)
