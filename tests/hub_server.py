"""A small Hugging Face Hub on this machine, for tests: what huggingface_hub 2.4 and datasets 5.2 ask over HTTP.

    with HubServer() as hub:
        hub.add("org/pairs", {"train.jsonl": b"..."}, "dataset")  # or a folder; public unless private=True
        token = hub.login("alice")  # may write to alice/...; write=False for a token that only reads
        subprocess.run(command, env=hub.environment(tmp_path / "home", token))
        hub.files("alice/adapter")["README.md"]  # what the branch main holds

The libraries read HF_ENDPOINT when they are imported, so a client is a process of its own, with `environment()`: an
empty HF_HOME, no token but the one given, and Xet storage off, whose protocol this server doesn't speak (files of
`LFS_SUFFIXES` go by git-lfs, others inside the commit). Cards are checked as the Hub does: YAML, base_model a Hub id.

What goes wrong is scripted, for requests whose "METHOD /path" a regular expression finds:

    hub.refuse(r"POST /api/repos/create", 403)  # answers this status
    hub.cut(r"PUT /lfs/", after=1000, times=1)  # closes the connection after 1000 bytes of the body

`hub.requests` lists "METHOD /path" of all requests in their order.
"""

import base64
import hashlib
import json
import os
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_SUFFIXES = (".safetensors", ".parquet", ".png", ".bin")
PREFIX = {"model": "", "dataset": "datasets/"}


def is_lfs(path: str) -> bool:
    return path.endswith(LFS_SUFFIXES)


def blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repository:
    id: str
    type: str
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # commit id: path: content
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], message: str, branch: str = "main") -> str:
        listing = "".join(f"{path} {blob_id(data)}\n" for path, data in sorted(files.items()))
        name = hashlib.sha1(f"{self.id} {len(self.commits)} {message}\n{listing}".encode()).hexdigest()
        self.commits[name], self.branches[branch] = files, name
        return name

    def resolve(self, revision: str) -> str:
        """The commit that `revision` names; an `Answer` of 404 if there is none."""
        name = self.branches.get(revision, revision)
        if name not in self.commits:
            raise Answer(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return name


class Answer(Exception):
    """An error status with the headers by which huggingface_hub tells errors apart."""

    def __init__(self, status: int, code: str = "", message: str = ""):
        self.status, self.code, self.message = status, code, message


class HubServer:
    def __init__(self):
        self.repositories: dict[tuple[str, str], Repository] = {}  # (type, id)
        self.users: dict[str, tuple[str, bool]] = {}  # token: name, may write
        self.objects: dict[str, bytes] = {}  # LFS, by SHA-256
        self.requests: list[str] = []
        self.refused: list[tuple[str, int]] = []
        self.cuts: list[list] = []  # [pattern, bytes, times left]
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, repo_id: str, files: dict[str, bytes] | Path, type: str = "model", private: bool = False) -> str:
        """Put a repository there, from contents by path or from a folder; the id of its commit."""
        if isinstance(files, Path):
            files = {str(f.relative_to(files)): f.read_bytes() for f in sorted(files.rglob("*")) if f.is_file()}
        repository = self.repositories[type, repo_id] = Repository(repo_id, type, private)
        return repository.commit(files, "initial commit")

    def files(self, repo_id: str, type: str = "model", revision: str = "main") -> dict[str, bytes]:
        repository = self.repositories[type, repo_id]
        return repository.commits[repository.resolve(revision)]

    def login(self, name: str, write: bool = True) -> str:
        token = f"hf_{hashlib.sha256(f'{name} {write}'.encode()).hexdigest()[:34]}"
        self.users[token] = (name, write)
        return token

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """A client's environment variables: these libraries' own settings stand back for this server's."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_OFFLINE"))}
        kept |= {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        kept |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
        kept |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        return kept | ({"HF_TOKEN": token} if token else {})

    def refuse(self, pattern: str, status: int) -> None:
        self.refused.append((pattern, status))

    def cut(self, pattern: str, after: int, times: int | None = None) -> None:
        self.cuts.append([pattern, after, times])


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        split = urlsplit(self.path)
        path, self.query = unquote(split.path), parse_qs(split.query)
        line = f"{self.command} {path}"
        with self.hub.lock:
            self.hub.requests.append(line)
            cut = next((c for c in self.hub.cuts if re.search(c[0], line) and c[2] != 0), None)
            if cut and cut[2]:
                cut[2] -= 1
        if cut:
            self._read_body(cut[1])
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.body = self._read_body()
        try:
            if status := next((s for pattern, s in self.hub.refused if re.search(pattern, line)), None):
                raise Answer(status, message="You don't have the rights to do that")
            for pattern, method in ROUTES:
                if match := re.fullmatch(pattern, line):
                    with self.hub.lock:
                        method(self, **match.groupdict())
                    return
            raise Answer(404, message=f"this server has no {line}")
        except Answer as answer:
            headers = {"X-Error-Code": answer.code, "X-Error-Message": answer.message}
            self.answer({"error": answer.message}, answer.status, {k: v for k, v in headers.items() if v})

    do_HEAD = do_POST = do_PUT = do_GET

    def _read_body(self, most: int | None = None) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            length = int(self.headers.get("Content-Length", 0))
            return self.rfile.read(length if most is None else min(most, length))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
            if most is not None and sum(map(len, parts)) >= most:
                return b""
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, value, status: int = 200, headers: dict | None = None) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # --- who asks for what

    def user(self) -> tuple[str | None, bool]:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        if scheme == "Bearer" and token not in self.hub.users:
            raise Answer(401, message="Invalid credentials in Authorization header")
        return self.hub.users.get(token, (None, False))

    def repository(self, types: str | None, id: str) -> Repository:
        type = "dataset" if types == "datasets" else "model"
        repository = self.hub.repositories.get((type, id))
        name, _ = self.user()
        if repository is None or (repository.private and name != id.split("/")[0]):
            raise Answer(404 if name else 401, "RepoNotFound", "Repository not found")
        return repository

    def check_may_write(self, namespace: str) -> None:
        name, write = self.user()
        if name is None:
            raise Answer(401, message="Invalid username or password.")
        if name != namespace or not write:
            raise Answer(403, message=f"You don't have the rights to write under the namespace {namespace!r}")

    # --- routes

    def whoami(self) -> None:
        name, write = self.user()
        if name is None:
            raise Answer(401, message="Invalid username or password.")
        role = {"accessToken": {"displayName": "test", "role": "write" if write else "read"}}
        self.answer({"type": "user", "id": name, "name": name, "fullname": name, "orgs": [], "auth": role})

    def create(self) -> None:
        wanted = json.loads(self.body)
        namespace = wanted.get("organization") or self.user()[0] or ""
        self.check_may_write(namespace)
        type, id = wanted.get("type", "model"), f"{namespace}/{wanted['name']}"
        url = f"{self.hub.url}/{PREFIX[type]}{id}"
        if (type, id) in self.hub.repositories:
            return self.answer({"error": "You already created this repo", "url": url}, 409)
        self.hub.add(id, {".gitattributes": b""}, type, wanted.get("visibility") == "private")
        return self.answer({"url": url, "id": id, "name": id})

    def info(self, types: str, id: str, revision: str = "main") -> None:
        repository = self.repository(types, id)
        commit = repository.resolve(revision)
        siblings = []
        for path, data in sorted(repository.commits[commit].items()):
            siblings.append({"rfilename": path})
            if "blobs" in self.query:
                siblings[-1] |= {"size": len(data), "blobId": blob_id(data)}
                if is_lfs(path):
                    digest = hashlib.sha256(data).hexdigest()
                    siblings[-1]["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 130}
        date = "2026-01-01T00:00:00.000Z"
        self.answer({
            "_id": id, "id": id, "author": id.split("/")[0], "sha": commit, "private": repository.private,
            "gated": False, "disabled": False, "tags": [], "downloads": 0, "likes": 0, "lastModified": date,
            "createdAt": date, "siblings": siblings, "usedStorage": 0,
        })  # fmt: skip

    def branch(self, types: str, id: str, name: str) -> None:
        repository = self.repository(types, id)
        self.check_may_write(id.split("/")[0])
        if name in repository.branches:
            raise Answer(409, message=f"Reference already exists: {name}")
        repository.branches[name] = repository.branches["main"]
        self.answer({})

    def auth_check(self, types: str, id: str, write: str | None) -> None:
        repository = self.repository(types, id)
        if write:
            self.check_may_write(repository.id.split("/")[0])
        self.answer({})

    def tree(self, types: str, id: str, revision: str, path: str | None) -> None:
        repository = self.repository(types, id)
        files = repository.commits[repository.resolve(revision)]
        folder = f"{path}/" if path else ""
        if path and not any(name.startswith(folder) for name in files):
            raise Answer(404, "EntryNotFound", f"{path} does not exist on {revision!r}")
        self.answer(entries(files, folder, self.query.get("recursive", ["false"])[0].lower() in ("true", "1")))

    def paths_info(self, types: str, id: str, revision: str) -> None:
        repository = self.repository(types, id)
        files = repository.commits[repository.resolve(revision)]
        wanted = parse_qs(self.body.decode()).get("paths", [])
        folders = {"", *(f"{path.rpartition('/')[0]}/" for path in wanted)}
        found = {entry["path"]: entry for folder in folders for entry in entries(files, folder)}
        self.answer([found[path] for path in wanted if path in found])

    def resolve(self, types: str | None, id: str, revision: str, path: str) -> None:
        repository = self.repository(types, id)
        commit = repository.resolve(revision)
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        data = repository.commits[commit].get(path)
        if data is None:
            headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return self.answer({"error": "Entry not found"}, 404, headers)
        digest = hashlib.sha256(data).hexdigest() if is_lfs(path) else blob_id(data)
        headers["ETag"] = f'"{digest}"'
        if is_lfs(path):
            headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data))}
        if span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(span[1]), min(int(span[2] or len(data)), len(data) - 1)
            if first >= len(data):
                return self.answer(b"", 416, headers | {"Content-Range": f"bytes */{len(data)}"})
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            return self.answer(data[first : last + 1], 206, headers)
        return self.answer(data, 200, headers)

    def validate_yaml(self) -> None:
        if error := card_error(json.loads(self.body)["content"]):
            return self.answer({"errors": [{"message": error}], "warnings": []}, 400)
        return self.answer({"errors": [], "warnings": []})

    def preupload(self, types: str, id: str, revision: str) -> None:
        repository = self.repository(types, id)
        self.check_may_write(id.split("/")[0])
        there = {e["path"]: e for e in entries(repository.commits[repository.resolve(revision)], "", True)}
        answers = []
        for file in json.loads(self.body)["files"]:
            path, old = file["path"], there.get(file["path"], {})
            mode = {"path": path, "uploadMode": "lfs" if is_lfs(path) else "regular", "shouldIgnore": False}
            answers.append(mode | ({"oid": old.get("lfs", old)["oid"]} if old else {}))
        self.answer({"files": answers})

    def lfs_batch(self, types: str | None, id: str) -> None:
        self.repository(types, id)
        self.check_may_write(id.split("/")[0])
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            action = {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}}
            objects.append(wanted | ({} if wanted["oid"] in self.hub.objects else action))
        self.answer({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Answer(400, message=f"the content is not {oid}")
        self.hub.objects[oid] = self.body
        self.answer({})

    def commit(self, types: str, id: str, revision: str) -> None:
        repository = self.repository(types, id)
        self.check_may_write(id.split("/")[0])
        files, summary = dict(repository.commits[repository.resolve(revision)]), ""
        for line in self.body.decode().splitlines():
            key, value = (operation := json.loads(line))["key"], operation["value"]
            if key == "header":
                summary = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise Answer(400, message=f"LFS object {value['oid']} was not uploaded")
                files[value["path"]] = self.hub.objects[value["oid"]]
            else:
                raise Answer(400, message=f"this server has no operation {key!r}")
        if "README.md" in files and (error := card_error(files["README.md"].decode())):
            raise Answer(400, message=f"Invalid metadata in README.md: {error}")
        commit = repository.commit(files, summary, revision)
        url = f"{self.hub.url}/{PREFIX[repository.type]}{id}/commit/{commit}"
        self.answer({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})


def card_error(text: str) -> str | None:
    """What the Hub has against a card's metadata, if anything."""
    try:
        metadata = yaml.safe_load(text.split("---\n")[1]) if text.startswith("---\n") else {}
    except yaml.YAMLError as error:
        return str(error)
    base = metadata.get("base_model", [])
    for name in [base] if isinstance(base, str) else base:
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
            return f'"base_model" with value {name!r} is not valid. Use a model id from https://hf.co/models.'
    return None


def entries(files: dict[str, bytes], folder: str, recursive: bool = False) -> list[dict]:
    """Files (and folders) below `folder`, which is "" or ends with a slash, as the Hub lists them."""
    folders, found = set(), []
    for path, data in sorted(files.items()):
        if not path.startswith(folder):
            continue
        parts = path.removeprefix(folder).split("/")
        for depth in range(1, len(parts) if recursive else min(2, len(parts))):
            folders.add(folder + "/".join(parts[:depth]))
        if recursive or len(parts) == 1:
            entry = {"type": "file", "path": path, "size": len(data), "oid": blob_id(data)}
            if is_lfs(path):
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            found.append(entry)
    return found + [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(folders)]


_API = r"/api/(?P<types>models|datasets)/(?P<id>[^/]+/[^/]+)"
_PAGE = r"/(?:(?P<types>datasets)/)?(?P<id>[^/]+/[^/]+)"
ROUTES = (
    (r"GET /api/whoami-v2", _Handler.whoami),
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.validate_yaml),
    (rf"GET {_API}", _Handler.info),
    (rf"GET {_API}/revision/(?P<revision>[^/]+)", _Handler.info),
    (rf"GET {_API}/auth-check(?P<write>/write)?", _Handler.auth_check),
    (rf"GET {_API}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", _Handler.tree),
    (rf"POST {_API}/branch/(?P<name>[^/]+)", _Handler.branch),
    (rf"POST {_API}/paths-info/(?P<revision>[^/]+)", _Handler.paths_info),
    (rf"POST {_API}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    (rf"POST {_API}/commit/(?P<revision>[^/]+)", _Handler.commit),
    (rf"(?:GET|HEAD) {_PAGE}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
    (rf"POST {_PAGE}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (r"PUT /lfs/(?P<oid>[0-9a-f]{64})", _Handler.lfs_upload),
)
