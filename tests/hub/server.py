"""A Hugging Face Hub on 127.0.0.1, in memory: enough for the real client to create, upload, commit and download.

It answers what huggingface_hub asks of huggingface.co, and Git LFS' batch API with the hub's multipart transfer
(https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md). There is no Xet storage behind it: a client with
hf_xet installed sets HF_HUB_DISABLE_XET=1 and speaks LFS, as it does with every hub that has none.
"""

import base64
import binascii
import hashlib
import json
import re
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

#: The user behind each token that the hub knows.
USERS = {"hf_owl": "owl", "hf_bat": "bat"}

LFS_BYTES = 10_000_000
PAGE = 5


@dataclass(frozen=True)
class File:
    """One file of a commit; a large one is known by its sha256 and kept apart."""

    size: int
    oid: str
    content: bytes | None = None
    sha256: str | None = None

    @classmethod
    def regular(cls, content: bytes) -> "File":
        return cls(len(content), _git_oid(content), content=content)

    @classmethod
    def large(cls, sha256: str, size: int) -> "File":
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
        return cls(size, _git_oid(pointer.encode()), sha256=sha256)


@dataclass
class Repo:
    """Commits by their hash, branches by their name."""

    id: str
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, File], branch: str = "main") -> str:
        sha = hashlib.sha1(f"{self.id} {len(self.commits)}".encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def sha(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, File]:
        return self.commits[self.branches[revision]]


class Hub:
    """The hub's state, and the levers a test pulls.

    Attributes:
        requests: ``"METHOD /path"`` of every request answered, in order.
        part_bytes: Files larger than this are uploaded in parts of this size.
        uploaded_bytes: Bytes of large files received so far.
        sent_bytes: Bytes of large files sent so far.
        sends_at_most: What would make them more than this is not sent.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.requests: list[str] = []
        self.part_bytes = 1 << 20
        self.uploaded_bytes = 0
        self.sent_bytes = 0
        self.sends_at_most = sys.maxsize
        self.lock = threading.Lock()
        self._bytes_left: int | None = None
        self._stays_down = False
        self.url = ""
        #: Large files live on another host, as on the real hub: the client follows redirects within one host only.
        self.storage_url = ""

    def keep(self, content: bytes) -> File:
        """A large file with this content, for a commit."""
        sha256 = hashlib.sha256(content).hexdigest()
        self.objects[sha256] = content
        return File.large(sha256, len(content))

    def create(self, repo_id: str, *, private: bool = False, gated: bool = False) -> Repo:
        repo = self.repos[repo_id] = Repo(repo_id, private, gated)
        repo.commit({".gitattributes": File.regular(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")})
        return repo

    def lose_connection(self, *, after_bytes: int, for_good: bool) -> None:
        """Cut the upload that carries byte ``after_bytes`` from now on; ``for_good``: and every request after it."""
        self._bytes_left, self._stays_down = after_bytes, for_good

    def restore_connection(self) -> None:
        self._bytes_left = None

    @property
    def down(self) -> bool:
        return self._bytes_left == 0

    def receive(self, chunk: bytes) -> bool:
        """Account for a chunk of an upload; False: the connection is gone."""
        with self.lock:
            self.uploaded_bytes += len(chunk)
            if self._bytes_left is None:
                return True
            self._bytes_left = max(0, self._bytes_left - len(chunk))
            if self._bytes_left:
                return True
            if not self._stays_down:
                self._bytes_left = None
            return False


class Refusal(Exception):
    """An answer other than success, as the hub words it: status, X-Error-Code, X-Error-Message."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class ConnectionLost(Exception):
    """The cable was pulled: no answer."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def _serve(self) -> None:
        path = urlsplit(self.path).path
        self.body_read = False
        try:
            if self.hub.down:
                raise ConnectionLost
            for method, pattern, answer in _ROUTES:
                if method == self.command and (match := pattern.fullmatch(path)):
                    self.hub.requests.append(f"{self.command} {path}")
                    answer(self, **{name: unquote(value) for name, value in match.groupdict().items()})
                    return
            raise Refusal(404, f"Not a route: {self.command} {path}")
        except Refusal as refusal:
            if not self.body_read:  # or the next request on this connection would begin with it
                for _ in self.body():
                    pass
            headers = {"X-Error-Message": refusal.message} | ({"X-Error-Code": refusal.code} if refusal.code else {})
            self.send_json({"error": refusal.message}, refusal.status, headers)
        except ConnectionLost:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    # What comes in

    def body(self) -> Iterator[bytes]:
        self.body_read = True
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length", 0))
        while left and (chunk := self.rfile.read(min(left, 1 << 16))):
            left -= len(chunk)
            yield chunk

    def json(self) -> Any:
        return json.loads(b"".join(self.body()))

    def user(self) -> str | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        if (token := header.removeprefix("Bearer ")) not in USERS:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return USERS[token]

    def repo(self, repo_id: str, *, write: bool = False) -> Repo:
        user, repo = self.user(), self.hub.repos.get(repo_id)
        owner = repo_id.split("/")[0]
        if repo is None or (repo.private and user != owner):
            # An anonymous caller cannot tell a missing repository from a private one.
            raise Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and user != owner:
            if repo.gated:
                raise Refusal(403, f"Access to model {repo_id} is restricted", "GatedRepo")
            if user is None:
                raise Refusal(401, "Invalid username or password.")
            raise Refusal(403, f"Forbidden: you don't have write access to {repo_id}")
        return repo

    def readable(self, repo_id: str) -> Repo:
        repo = self.repo(repo_id)
        if repo.gated and self.user() != repo_id.split("/")[0]:
            raise Refusal(403 if self.user() else 401, f"Access to model {repo_id} is restricted.", "GatedRepo")
        return repo

    def revision(self, repo: Repo, revision: str) -> str:
        sha = repo.sha(revision)
        if sha is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    # What goes out

    def send(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_json(self, document: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send(json.dumps(document).encode(), status, {"Content-Type": "application/json"} | (headers or {}))

    # Who may do what

    def whoami(self) -> None:
        user = self.user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        self.send_json({"type": "user", "name": user})

    def auth_check(self, repo: str) -> None:
        self.readable(repo)
        self.send_json({})

    # Repositories

    def create_repo(self) -> None:
        asked, user = self.json(), self.user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        owner = asked["organization"] or user
        repo_id = f"{owner}/{asked['name']}"
        if owner != user:
            raise Refusal(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        document = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}
        if repo_id in self.hub.repos:
            self.send_json(document | {"error": "You already created this model repo"}, 409)
            return
        self.hub.create(repo_id, private=asked.get("visibility") == "private" or bool(asked.get("private")))
        self.send_json(document)

    def repo_info(self, repo: str, revision: str = "main") -> None:
        found = self.repo(repo)
        sha = self.revision(found, revision)
        self.send_json(
            {
                "id": repo,
                "sha": sha,
                "private": found.private,
                "gated": "manual" if found.gated else False,
                "siblings": [{"rfilename": path} for path in found.commits[sha]],
            }
        )

    def tree(self, repo: str, revision: str) -> None:
        found = self.repo(repo)
        files = sorted(found.commits[self.revision(found, revision)].items())
        query = urlsplit(self.path).query
        start = int(cursor[1]) if (cursor := re.search(r"cursor=(\d+)", query)) else 0
        entries = [_entry(path, file) for path, file in files[start : start + PAGE]]
        more = {}
        if start + PAGE < len(files):
            here = self.hub.url + urlsplit(self.path).path
            more = {"Link": f'<{here}?recursive=true&cursor={start + PAGE}>; rel="next"'}
        self.send_json(entries, headers=more)

    def paths_info(self, repo: str, revision: str) -> None:
        asked = parse_qs(b"".join(self.body()).decode())["paths"]
        found = self.repo(repo)
        files = found.commits[self.revision(found, revision)]
        self.send_json([_entry(path, files[path]) for path in asked if path in files])

    def resolve(self, repo: str, revision: str, path: str) -> None:
        found = self.readable(repo)
        sha = self.revision(found, revision)
        file = found.commits[sha].get(path)
        if file is None:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        headers = {"X-Repo-Commit": sha, "ETag": f'"{file.sha256 or file.oid}"'}
        if file.sha256 is None:
            assert file.content is not None
            self.send(file.content, headers=headers)
            return
        linked = {"X-Linked-Size": str(file.size), "X-Linked-ETag": f'"{file.sha256}"'}
        self.send(b"", 302, headers | linked | {"Location": f"{self.hub.storage_url}/{file.sha256}"})

    # Commits

    def create_branch(self, repo: str, branch: str) -> None:
        asked = self.json()
        found = self.repo(repo, write=True)
        if branch in found.branches:
            raise Refusal(409, f"Reference already exists: {branch}")
        found.branches[branch] = self.revision(found, asked.get("startingPoint", "main"))
        self.send_json({})

    def validate_yaml(self) -> None:
        front = re.match(r"---\n(.*?)\n---\n", self.json()["content"], re.DOTALL)
        data = yaml.safe_load(front[1]) if front else {}
        errors = []
        if not isinstance(data, dict):
            errors.append('"README.md" metadata must be an object')
        elif data.get("license") == "other" and not {"license_name", "license_link"} <= data.keys():
            errors.append('"license_name" and "license_link" are required when "license" is "other"')
        elif not isinstance(data.get("license", ""), (str, list)):
            errors.append('"license" must be a string')
        self.send_json({"errors": [{"message": error} for error in errors], "warnings": []}, 400 if errors else 200)

    def preupload(self, repo: str, revision: str) -> None:
        asked = self.json()
        found = self.repo(repo, write=True)
        files = found.commits[self.revision(found, revision)]
        answers = []
        for file in asked["files"]:
            large = file["path"].endswith(".safetensors") or file["size"] > LFS_BYTES
            present = files.get(file["path"])
            answers.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if large else "regular",
                    "shouldIgnore": False,
                    "oid": present and (present.sha256 or present.oid),
                }
            )
        self.send_json({"files": answers})

    def commit(self, repo: str, revision: str) -> None:
        lines = [json.loads(line) for line in b"".join(self.body()).splitlines()]
        found = self.repo(repo, write=True)
        files = dict(found.commits[self.revision(found, revision)])
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "header" if not value["summary"]:
                    raise Refusal(400, "A commit needs a summary")
                case "file":
                    files[value["path"]] = File.regular(base64.b64decode(value["content"], validate=True))
                case "lfsFile":
                    size = len(self.hub.objects.get(value["oid"], b""))
                    if size != value.get("size", size) or value["oid"] not in self.hub.objects:
                        raise Refusal(400, f"LFS object {value['oid']} of {value['path']} was never uploaded")
                    files[value["path"]] = File.large(value["oid"], size)
                case "deletedFile":
                    if files.pop(value["path"], None) is None:
                        raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
        sha = found.commit(files, revision)
        self.send_json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}"})

    # Large files

    def lfs_batch(self, repo: str) -> None:
        asked = self.json()
        self.repo(repo, write=True)
        if asked["operation"] != "upload" or "multipart" not in asked["transfers"] or asked["hash_algo"] != "sha256":
            raise Refusal(422, "Only uploads, by sha256, to clients that know multipart")
        self.send_json(
            {"transfer": "multipart", "objects": [self._lfs_action(repo, each) for each in asked["objects"]]}
        )

    def _lfs_action(self, repo: str, asked: dict[str, Any]) -> dict[str, Any]:
        oid, size, part = asked["oid"], asked["size"], self.hub.part_bytes
        answer = {"oid": oid, "size": size}
        if oid in self.hub.objects:
            return answer
        storage = f"{self.hub.storage_url}/{oid}"
        upload: dict[str, Any] = {"href": storage}
        if size > part:
            urls = {str(n): f"{storage}/{n}" for n in range(1, -(-size // part) + 1)}
            upload = {"href": f"{storage}/complete", "header": {"chunk_size": str(part)} | urls}
        return answer | {
            "actions": {"upload": upload, "verify": {"href": f"{self.hub.url}/{repo}.git/info/lfs/verify"}}
        }

    def lfs_verify(self, repo: str) -> None:
        asked = self.json()
        self.repo(repo, write=True)
        if len(self.hub.objects.get(asked["oid"], b"")) != asked["size"]:
            raise Refusal(404, "Object not found")
        self.send_json({})

    def store(self, oid: str) -> None:
        content = self._upload()
        self._keep(oid, content)
        self.send(b"", headers={"ETag": f'"{oid}"'})

    def store_part(self, oid: str, number: str) -> None:
        content = self._upload()
        self.hub.parts[oid, int(number)] = content
        self.send(b"", headers={"ETag": f'"{binascii.crc32(content):08x}"'})

    def complete(self, oid: str) -> None:
        asked = self.json()
        contents = []
        for part in asked["parts"]:
            content = self.hub.parts.pop((oid, part["partNumber"]))
            if part["etag"] != f'"{binascii.crc32(content):08x}"':
                raise Refusal(400, f"Part {part['partNumber']} was another")
            contents.append(content)
        self._keep(oid, b"".join(contents))
        self.send_json({})

    def fetch(self, oid: str) -> None:
        content = self.hub.objects[oid]
        headers = {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(wanted[1]), int(wanted[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            self.send_large(content[start : end + 1], 206, headers)
        else:
            self.send_large(content, 200, headers)

    def send_large(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        """Send a large file, or a range of one."""
        with self.hub.lock:
            if self.hub.sent_bytes + len(content) > self.hub.sends_at_most:
                raise ConnectionLost
            self.hub.sent_bytes += len(content)
        self.send(content, status, headers)

    def _upload(self) -> bytes:
        chunks = []
        for chunk in self.body():
            if not self.hub.receive(chunk):
                raise ConnectionLost
            chunks.append(chunk)
        return b"".join(chunks)

    def _keep(self, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refusal(400, "The content is not what its sha256 says")
        self.hub.objects[oid] = content


def _entry(path: str, file: File) -> dict[str, Any]:
    """A file as the hub lists it."""
    large = {"lfs": {"oid": file.sha256, "size": file.size, "pointerSize": 134}} if file.sha256 else {}
    return {"type": "file", "path": path, "oid": file.oid, "size": file.size} | large


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


_KIND = "(?:models|datasets)"
_REPO, _REVISION, _OID = r"(?P<repo>[^/]+/[^/]+?)", r"(?P<revision>[^/]+)", r"(?P<oid>[0-9a-f]{64})"
_ROUTES = [
    (method, re.compile(pattern), answer)
    for methods, pattern, answer in [
        ("POST", "/api/repos/create", _Handler.create_repo),
        ("GET", "/api/whoami-v2", _Handler.whoami),
        ("GET", f"/api/models/{_REPO}/auth-check", _Handler.auth_check),
        ("POST", "/api/validate-yaml", _Handler.validate_yaml),
        ("GET", f"/api/{_KIND}/{_REPO}", _Handler.repo_info),
        ("GET", f"/api/{_KIND}/{_REPO}/revision/{_REVISION}", _Handler.repo_info),
        ("GET", f"/api/{_KIND}/{_REPO}/tree/{_REVISION}", _Handler.tree),
        ("POST", f"/api/{_KIND}/{_REPO}/paths-info/{_REVISION}", _Handler.paths_info),
        ("POST", f"/api/models/{_REPO}/preupload/{_REVISION}", _Handler.preupload),
        ("POST", f"/api/models/{_REPO}/commit/{_REVISION}", _Handler.commit),
        ("POST", f"/api/models/{_REPO}/branch/(?P<branch>.+)", _Handler.create_branch),
        ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
        ("POST", rf"/{_REPO}\.git/info/lfs/verify", _Handler.lfs_verify),
        ("GET HEAD", rf"/(?:datasets/)?{_REPO}/resolve/{_REVISION}/(?P<path>.+)", _Handler.resolve),
        ("PUT", f"/storage/{_OID}", _Handler.store),
        ("PUT", rf"/storage/{_OID}/(?P<number>\d+)", _Handler.store_part),
        ("POST", f"/storage/{_OID}/complete", _Handler.complete),
        ("GET", f"/storage/{_OID}", _Handler.fetch),
    ]
    for method in methods.split()
]


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that answers at ``hub.url`` while the block runs."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    hub.storage_url = f"http://localhost:{server.server_port}/storage"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
