"""A web server on this machine for downloads: ranges as RFC 9110 has them, and the ways in which servers go wrong."""

import email.utils
import hashlib
import re
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

STEP = 1 << 14


class FileServer(ThreadingHTTPServer):
    """``files``: path -> content. The other fields say how it answers; ``log`` holds what was asked and sent."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.files = {}
        self.ranges = True  # whether ranges are supported
        self.check_if_range = True  # a server that ignores If-Range sends ranges of whatever it has now
        self.etags = True
        self.weak = False  # weak ETags, and the time of the last change
        self.changed = 0.0
        self.length = True  # whether the size is stated
        self.cuts = []  # the connection ends after this many bytes of the body, once for each
        self.statuses = []  # answers before the proper ones
        self.headers = {}  # sent besides
        self.redirects = {}  # path -> (path, headers)
        self.pause = 0.0  # seconds between steps
        self.log = []

    def etag(self, path):
        tag = f'"{hashlib.sha1(self.files[path]).hexdigest()}"'
        return f"W/{tag}" if self.weak else tag

    @property
    def sent(self):
        """The bytes of all bodies."""
        return sum(entry["sent"] for entry in self.log)


@contextmanager
def file_server(files=()):
    server = FileServer()
    server.files = dict(files)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: FileServer
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server, path = self.server, self.path
        entry = {"path": path, "range": self.headers.get("Range"), "if_range": self.headers.get("If-Range"), "sent": 0}
        server.log.append(entry)
        self.close_connection = True
        if server.statuses:
            return self.send_error(server.statuses.pop(0))
        if path in server.redirects:
            target, headers = server.redirects[path]
            return self._head(302, {"Location": target, "Content-Length": "0", **headers})
        if path not in server.files:
            return self.send_error(404)
        content, first, headers = server.files[path], 0, dict(server.headers)
        if server.etags:
            headers["ETag"] = server.etag(path)
        if server.changed:
            headers["Last-Modified"] = email.utils.formatdate(server.changed, usegmt=True)
        wanted = re.fullmatch(r"bytes=(\d+)-", entry["range"] or "")
        strong = headers.get("ETag") if not server.weak else None
        same = entry["if_range"] in {strong, headers.get("Last-Modified")} - {None}
        if wanted and server.ranges and (same or not server.check_if_range):
            first = int(wanted[1])
            if first >= len(content):
                return self._head(416, {"Content-Range": f"bytes */{len(content)}", "Content-Length": "0"})
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        if server.length:
            headers["Content-Length"] = str(len(content) - first)
        self._head(206 if "Content-Range" in headers else 200, headers)
        stop = min(len(content), first + server.cuts.pop(0)) if server.cuts else len(content)
        for at in range(first, stop, STEP):
            piece = content[at : min(at + STEP, stop)]
            try:
                self.wfile.write(piece)
            except ConnectionError:  # the client was killed
                return None
            entry["sent"] += len(piece)
            time.sleep(server.pause)
        return None

    def _head(self, status, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()

    def log_message(self, *_):
        pass
