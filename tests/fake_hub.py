"""A hub in one process: the few endpoints of huggingface.co that creating, committing and downloading a model need."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlparse


class FakeHub(ThreadingHTTPServer):
    """``repos``: name -> {revision: {path: bytes}}; ``main`` follows the newest commit. ``log`` holds every request."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos, self.log, self.cards = {}, [], []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def commit(self, repo, files):
        revision = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.repos.setdefault(repo, {})[revision] = files
        self.repos[repo]["main"] = files
        return revision

    def revision(self, repo, name):
        """The commit's hash for a hash or a branch."""
        revisions = self.repos.get(repo, {})
        if name not in revisions:
            return None
        return next(key for key, files in revisions.items() if files is revisions[name] and key != "main")


@contextmanager
def fake_hub():
    server = FakeHub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def do_POST(self):
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self._path()
        if path == "/api/repos/create":
            wanted = json.loads(data)
            repo = "/".join(filter(None, (wanted.get("organization"), wanted["name"])))
            self.server.repos.setdefault(repo, {})
            return self._json({"url": f"{self.server.url}/{repo}", "private": wanted.get("private", False)})
        if path == "/api/validate-yaml":
            self.server.cards.append(json.loads(data)["content"])
            return self._json({"errors": [], "warnings": []})
        if match := re.fullmatch(r"/api/models/(.+)/preupload/main", path):
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                     for file in json.loads(data)["files"]]  # fmt: skip
            return self._json({"files": files})
        if match := re.fullmatch(r"/api/models/(.+)/commit/main", path):
            lines = [json.loads(line) for line in data.splitlines()]
            files = {line["value"]["path"]: base64.b64decode(line["value"]["content"])
                     for line in lines if line["key"] == "file"}  # fmt: skip
            revision = self.server.commit(match[1], files)
            url = f"{self.server.url}/{match[1]}/commit/{revision}"
            return self._json({"success": True, "commitOid": revision, "commitUrl": url})
        return self._missing("EntryNotFound")

    def do_GET(self):
        path = self._path()
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/(.+))?", path):
            revision = self.server.revision(match[1], match[3] or "main")
            if revision is None:
                return self._missing("RevisionNotFound" if match[1] in self.server.repos else "RepoNotFound")
            return self._json({"id": match[1], "sha": revision, "siblings": [], "private": False, "tags": []})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/(.+)", path):
            files = self.server.repos[match[1]][match[2]]
            return self._json([
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
            ])  # fmt: skip
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            files = self.server.repos.get(match[1], {}).get(match[2])
            if files is None or match[3] not in files:
                return self._missing("EntryNotFound")
            revision = self.server.revision(match[1], match[2])
            tag = hashlib.sha1(files[match[3]]).hexdigest()
            return self._send(files[match[3]], {"X-Repo-Commit": revision, "ETag": f'"{tag}"'})
        return self._missing("EntryNotFound")

    do_HEAD = do_GET  # noqa: N815  # the base class names it

    def _path(self):
        path = urlparse(self.path).path
        self.server.log.append(f"{self.command} {path}")
        return path

    def _json(self, value):
        self._send(json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _missing(self, code):
        self._send(b"{}", {"X-Error-Code": code, "X-Error-Message": code}, status=404)

    def _send(self, data, headers, status=200):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *args):
        pass
