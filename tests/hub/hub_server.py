"""A Hub on this machine, as far as huggingface_hub's client asks it: repositories, revisions, uploads, downloads.

    with HubServer() as hub: ...  # hub.url for HF_ENDPOINT, hub.token for HF_TOKEN, hub.log of all requests

A commit is a complete {path: file} and never changes; branches, tags and pull requests name commits. Whoever shows the
token may write anything and read what is private. Faults are asked for over HTTP too, so that a client's process can:
PUT /faults with {"drop_uploads": [2, 3]} (the connection ends in the middle of these uploads, counted from now on),
{"cut": "model.safetensors"} (it ends in the middle of each download of that file) or {"shrink": ...} (the file is
served as if half of it were all). PUT /faults with {} ends them.
"""

import base64
import hashlib
import itertools
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

NAME = r"(?P<repo>[\w.-]+/[\w.-]+)"
OWNER = "jay"
LARGE = (".safetensors", ".bin")


@dataclass(frozen=True)
class File:
    """What stands at a path. `large`: it was uploaded apart from its commit."""

    content: bytes
    large: bool

    @property
    def etag(self) -> str:
        """As the Hub names it: git's number of a small file, sha256 of a large one."""
        if self.large:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repository:
    """Commits {id: {path: File}}, and what names them."""

    private: bool
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)

    def find(self, revision: str) -> str:
        """The commit that a branch, tag or commit names."""
        for names in (self.branches, self.tags, {commit: commit for commit in self.commits}):
            if revision in names:
                return names[revision]
        raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def add(self, branch: str, files: dict[str, File], message: str) -> str:
        """A new commit, which the branch names from now on."""
        seed = json.dumps([branch, message, len(self.commits), sorted((p, f.etag) for p, f in files.items())])
        commit = hashlib.sha1(seed.encode()).hexdigest()
        self.commits[commit], self.branches[branch], self.messages[commit] = files, commit, message
        return commit


class Refusal(Exception):
    """An answer that is an error: status, the Hub's name of it, text."""


class HubServer:
    """The server, in a thread, with what it holds. Its port is free at the time."""

    token = "hf_of_the_jay"

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.uploads: dict[str, bytes] = {}
        self.log: list[str] = []
        self.lock = threading.Lock()
        self.break_down({})
        handler = type("Handler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.server.shutdown()
        self.server.server_close()

    def break_down(self, faults: dict) -> None:
        """Have these faults from now on."""
        self.faults, self.upload_number = faults, itertools.count(1)


class Handler(BaseHTTPRequestHandler):
    """One request: it is logged, and one of `ROUTES` answers."""

    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *args) -> None:
        """Not to stderr: `hub.log` has it."""

    def answer(self) -> None:
        """Find the route; a `Refusal` becomes an answer too."""
        url = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(url.query).items()}
        self.status = None
        try:
            for methods, pattern, name in ROUTES:
                if self.command in methods.split() and (found := re.fullmatch(pattern, url.path)):
                    parts = {key: unquote(value or "") for key, value in found.groupdict().items()}
                    getattr(self, name)(**parts)
                    break
            else:
                self.body()
                raise Refusal(404, "NoRoute", f"{self.command} {url.path}")
        except Refusal as refusal:
            status, code, text = refusal.args
            self.give({"error": text}, status, {"X-Error-Code": code, "X-Error-Message": text})
        finally:
            self.hub.log.append(f"{self.command} {unquote(self.path)} {self.status or 'dropped'}")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def body(self) -> bytes:
        """All that the client sends."""
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def give(self, content, status=200, headers=(), declared=None) -> None:
        """Send bytes, or anything as JSON. declared: the length to announce, if not the true one."""
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.status = status
        self.send_response(status)
        length = len(content) if declared is None else declared
        for key, value in {"Content-Type": "application/json", "Content-Length": length, **dict(headers)}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def drop(self) -> None:
        """End the connection as it is."""
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    @property
    def known(self) -> bool:
        """Whether the client has shown the token."""
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def may_write(self) -> None:
        """Refuse a client without the token."""
        if not self.known:
            self.body()
            raise Refusal(401, "Unauthorized", "Invalid credentials")

    def found(self, repo: str) -> Repository:
        """A repository that this client may see."""
        held = self.hub.repositories.get(repo)
        if held is None or (held.private and not self.known):
            raise Refusal(404 if self.known else 401, "RepoNotFound", "Repository not found")
        return held

    # Each of the following answers one route.

    def faults(self) -> None:
        """PUT /faults."""
        self.hub.break_down(json.loads(self.body()))
        self.give({})

    def who(self) -> None:
        """Whose token it is."""
        self.may_write()
        self.give({"type": "user", "name": OWNER, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def check_yaml(self) -> None:
        """The Hub's check of a card's metadata."""
        content = json.loads(self.body())["content"]
        wrong = [] if content.startswith("---\n") else [{"message": "no metadata"}]
        for base in re.findall(r"^base_model: *(\S+)", content, re.MULTILINE):
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base):
                wrong.append({"message": f"base_model {base} is no name on a Hub"})
        self.give({"errors": wrong, "warnings": []}, 400 if wrong else 200)

    def create(self) -> None:
        """A new repository with nothing in it, or 409."""
        self.may_write()
        asked = json.loads(self.body())
        name = f"{asked.get('organization') or OWNER}/{asked['name']}"
        about = {"url": f"{self.hub.url}/{name}", "name": name, "id": name}
        if name in self.hub.repositories:
            return self.give({"error": "You already created this model repo"} | about, 409)
        new = Repository(private=bool(asked.get("private")) or asked.get("visibility") == "private")
        new.add("main", {".gitattributes": File(b"*.safetensors filter=lfs\n", False)}, "initial commit")
        self.hub.repositories[name] = new
        return self.give(about)

    def info(self, repo: str, revision: str = "main") -> None:
        """What a repository holds at a revision."""
        held = self.found(repo)
        commit = held.find(revision or "main")
        names = [{"rfilename": path} for path in sorted(held.commits[commit])]
        about = {"id": repo, "modelId": repo, "sha": commit, "private": held.private, "tags": [], "siblings": names}
        self.give(about | {"downloads": 0, "likes": 0})

    def tree(self, repo: str, revision: str, folder: str) -> None:
        """The files of a folder."""
        held = self.found(repo)
        files = held.commits[held.find(revision)]
        inside = [path for path in sorted(files) if path.startswith(f"{folder}/" if folder else "")]
        if not inside:
            raise Refusal(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        self.give([{"type": "file", "path": p, "size": len(files[p].content), "oid": files[p].etag} for p in inside])

    def refs(self, repo: str) -> None:
        """Branches and tags."""
        held = self.found(repo)
        lists = [
            [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": commit} for name, commit in names.items()]
            for kind, names in (("heads", held.branches), ("tags", held.tags))
        ]
        self.give({"branches": lists[0], "tags": lists[1], "converts": [], "pullRequests": []})

    def name_commit(self, repo: str, kind: str, name: str) -> None:
        """A new branch (its name in the address, where it starts in the body), or tag (the other way round)."""
        self.may_write()
        held, asked = self.found(repo), json.loads(self.body() or b"{}")
        names = held.branches if kind == "branch" else held.tags
        name, start = (name, asked.get("startingPoint", "main")) if kind == "branch" else (asked["tag"], name)
        if name in names:
            raise Refusal(409, "Conflict", "Reference already exists")
        names[name] = held.find(start)
        self.give({})

    def preupload(self, repo: str, revision: str) -> None:
        """Which files belong into the commit itself, and which are uploaded apart."""
        self.may_write()
        self.found(repo).find(revision)
        asked = json.loads(self.body())["files"]
        modes = [{"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular"} for f in asked]
        self.give({"files": [mode | {"shouldIgnore": False} for mode in modes]})

    def batch(self, repo: str) -> None:
        """Where to upload large files that are not here yet."""
        self.may_write()
        self.found(repo)
        objects = json.loads(self.body())["objects"]
        for wanted in objects:
            if wanted["oid"] not in self.hub.uploads:
                wanted["actions"] = {"upload": {"href": f"{self.hub.url}/uploads/{wanted['oid']}"}}
        self.give({"transfer": "basic", "objects": objects}, headers={"Content-Type": "application/vnd.git-lfs+json"})

    def upload(self, oid: str) -> None:
        """A large file; its bytes must have the number that they were announced by."""
        if next(self.hub.upload_number) in self.hub.faults.get("drop_uploads", ()):
            self.rfile.read(int(self.headers["Content-Length"]) // 2)
            return self.drop()
        content = self.body()
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refusal(400, "BadUpload", "sha256 differs")
        self.hub.uploads[oid] = content
        return self.give({})

    def commit(self, repo: str, revision: str) -> None:
        """One commit of lines {"key": header | file | lfsFile | deletedFile, "value": ...}, all of them or none."""
        self.may_write()
        held, lines = self.found(repo), [json.loads(line) for line in self.body().splitlines() if line.strip()]
        with self.hub.lock:
            files, message = dict(held.commits[held.find(revision)]), ""
            for key, value in ((line["key"], line["value"]) for line in lines):
                if key == "header":
                    message = value.get("summary", "")
                    if value.get("parentCommit") not in (None, held.find(revision)):
                        raise Refusal(412, "Conflict", "A commit has happened since. Please refresh and try again.")
                elif key == "file":
                    files[value["path"]] = File(base64.b64decode(value["content"]), False)
                elif key == "lfsFile" and value["oid"] in self.hub.uploads:
                    files[value["path"]] = File(self.hub.uploads[value["oid"]], True)
                elif key == "deletedFile" and value["path"] in files:
                    del files[value["path"]]
                else:
                    raise Refusal(400, "BadCommit", f"{key} {value.get('path')}: nothing there")
            proposed = "create_pr" in self.query
            branch = (
                f"refs/pr/{1 + sum(name.startswith('refs/pr/') for name in held.branches)}" if proposed else revision
            )
            oid = held.add(branch, files, message)
        about = {"commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}", "success": True}
        self.give(about | ({"pullRequestUrl": f"{self.hub.url}/{repo}/discussions/{branch[8:]}"} if proposed else {}))

    def download(self, repo: str, revision: str, path: str) -> None:
        """A file, or from a byte on; HEAD asks for its size and number."""
        held = self.found(repo)
        commit = held.find(revision)
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if path not in held.commits[commit]:
            headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return self.give({"error": "Entry not found"}, 404, headers)
        file = held.commits[commit][path]
        headers |= {"ETag": f'"{file.etag}"', "Content-Type": "application/octet-stream"}
        headers |= {"X-Linked-Size": len(file.content), "X-Linked-Etag": f'"{file.etag}"'} if file.large else {}
        content, status = file.content, 200
        if start := re.match(r"bytes=(\d+)-", self.headers.get("Range", "")):
            content, status = content[int(start[1]) :], 206
            headers["Content-Range"] = f"bytes {start[1]}-{len(file.content) - 1}/{len(file.content)}"
        if self.command == "GET" and path == self.hub.faults.get("shrink"):
            return self.give(content[: len(content) // 2], status, headers)
        if self.command == "GET" and path == self.hub.faults.get("cut"):
            self.give(content[: len(content) // 2], status, headers, declared=len(content))
            return self.drop()
        return self.give(content, status, headers)


ROUTES = (
    ("PUT", "/faults", "faults"),
    ("GET", "/api/whoami-v2", "who"),
    ("POST", "/api/validate-yaml", "check_yaml"),
    ("POST", "/api/repos/create", "create"),
    ("GET", f"/api/models/{NAME}(?:/revision/(?P<revision>[^/]+))?", "info"),
    ("GET", f"/api/models/{NAME}/tree/(?P<revision>[^/]+)/?(?P<folder>.*)", "tree"),
    ("GET", f"/api/models/{NAME}/refs", "refs"),
    ("POST", f"/api/models/{NAME}/(?P<kind>branch|tag)/(?P<name>.+)", "name_commit"),
    ("POST", f"/api/models/{NAME}/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", f"/{NAME}\\.git/info/lfs/objects/batch", "batch"),
    ("PUT", "/uploads/(?P<oid>[0-9a-f]{64})", "upload"),
    ("POST", f"/api/models/{NAME}/commit/(?P<revision>[^/]+)", "commit"),
    ("GET HEAD", f"/{NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "download"),
)
