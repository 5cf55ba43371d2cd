"""A bucket on this machine: as much of the JSON API as gcsfs, TensorStore and ArrayRecord
use. Objects are a dict, so that a test can fill and read it."""

import base64
import contextlib
import email.parser
import json
import re
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import google_crc32c

STAMP = "2026-01-01T00:00:00.000Z"


class Bucket:
    """A server of one bucket, whatever its name; a context manager."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.asked: list[str] = []  # "METHOD path"
        self.generation: dict[str, int] = {}
        self.uploads: dict[str, tuple[str, bytes]] = {}  # resumable: id → (name, what came so far)
        self.lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True

    @property
    def environment(self) -> dict[str, str]:
        """What turns the three clients to this server, without credentials."""
        url = f"http://127.0.0.1:{self._server.server_address[1]}"
        return {
            "STORAGE_EMULATOR_HOST": url,  # gcsfs
            "FSSPEC_GCS_TOKEN": "anon",
            "TENSORSTORE_GCS_HTTP_URL": url,
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": url,  # ArrayRecord
            "GCE_METADATA_ROOT": "127.0.0.1:1",  # there is none
            "NO_GCE_CHECK": "true",
            "GOOGLE_CLOUD_PROJECT": "none",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks for the kind of bucket by gRPC
        }

    def __enter__(self) -> "Bucket":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    def put(self, name: str, data: bytes) -> None:
        with self.lock:
            self.objects[name] = data
            self.generation[name] = self.generation.get(name, 0) + 1

    def describe(self, bucket: str, name: str) -> dict[str, Any]:
        data = self.objects[name]
        crc = base64.b64encode(google_crc32c.Checksum(data).digest()).decode()
        return {
            "kind": "storage#object",
            "id": f"{bucket}/{name}",
            "bucket": bucket,
            "name": name,
            "size": str(len(data)),
            "crc32c": crc,
            "generation": str(self.generation[name]),
            "metageneration": "1",
            "timeCreated": STAMP,
            "updated": STAMP,
            "contentType": "application/octet-stream",
        }

    def listing(self, bucket: str, query: dict[str, str]) -> dict[str, Any]:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        items, folders = [], set()
        for name in sorted(self.objects):
            if not name.startswith(prefix) or name < query.get("startOffset", ""):
                continue
            if query.get("endOffset") and name >= query["endOffset"]:
                continue
            inner, found, _ = (
                name[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
            )
            if found:
                folders.add(prefix + inner + delimiter)
            else:
                items.append(self.describe(bucket, name))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(folders)}


def _handler(bucket: Bucket) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def handle(self) -> None:
            with contextlib.suppress(ConnectionError):  # clients leave when they have enough
                super().handle()

        def handle_any(self) -> None:
            url = urllib.parse.urlsplit(self.path)
            query = dict(urllib.parse.parse_qsl(url.query))
            body = self.body()
            with bucket.lock:
                bucket.asked.append(f"{self.command} {self.path}")
                status, headers, data = answer(
                    bucket, self.command, url.path, query, self.headers, body
                )
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = handle_any

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline().strip() or b"0", 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

    return Handler


Answer = tuple[int, dict[str, str], bytes]
JSON = {"Content-Type": "application/json"}


def answer(
    bucket: Bucket, method: str, path: str, query: dict[str, str], headers: Any, body: bytes
) -> Answer:
    """Status, headers and body."""
    if path.startswith("/batch/"):
        return _batch(bucket, headers, body)
    if upload := re.fullmatch(r"/(?:resumable/)?upload/storage/v1/b/([^/]+)/o", path):
        return _upload(bucket, upload[1], query, headers, body)
    if re.fullmatch(r"(/storage/v1)?/b/[^/]+", path):
        return 200, JSON, json.dumps({"name": path.rsplit("/", 1)[1], "location": "US"}).encode()
    if listing := re.fullmatch(r"(?:/storage/v1)?/b/([^/]+)/o/?", path):
        return 200, JSON, json.dumps(bucket.listing(listing[1], query)).encode()
    found = re.fullmatch(r"(?:/download)?(?:/storage/v1)?/b/([^/]+)/o/(.+)", path)
    if not found:
        found = re.fullmatch(r"/([^/]+)/(.+)", path)  # the XML API
        query = query | {"alt": "media"}
    if not found:
        return 404, JSON, b"{}"
    rest = re.split("/(?:rewriteTo/b/[^/]+|moveTo)/o/", found[2])
    name = urllib.parse.unquote(rest[0])
    if name not in bucket.objects:
        return (
            404,
            JSON,
            json.dumps({"error": {"code": 404, "message": f"No such {name}"}}).encode(),
        )
    if len(rest) == 2:
        copy = urllib.parse.unquote(rest[1])
        bucket.put(copy, bucket.objects[name])
        told = bucket.describe(found[1], copy)
        if "/moveTo/" in path:
            del bucket.objects[name]
        else:
            told = {"done": True, "resource": told}
        return 200, JSON, json.dumps(told).encode()
    if method == "DELETE":
        del bucket.objects[name]
        return 204, {}, b""
    if query.get("alt") == "media" or path.startswith("/download"):
        return _media(bucket, name, headers)
    return 200, JSON, json.dumps(bucket.describe(found[1], name)).encode()


def _media(bucket: Bucket, name: str, headers: Any) -> Answer:
    data = bucket.objects[name]
    total, start, stop = len(data), 0, len(data)
    if wanted := re.fullmatch(r"bytes=(\d*)-(\d*)", headers.get("Range", "")):
        if wanted[1]:
            start = int(wanted[1])
            stop = min(total, int(wanted[2]) + 1) if wanted[2] else total
        else:
            start = max(0, total - int(wanted[2]))
        if start >= total:
            return 416, {"Content-Range": f"bytes */{total}"}, b""
    found = {
        "Content-Type": "application/octet-stream",
        "x-goog-generation": str(bucket.generation[name]),
        "x-goog-stored-content-length": str(total),
    }
    if "Range" not in headers:
        return 200, found, data
    found["Content-Range"] = f"bytes {start}-{stop - 1}/{total}"
    return 206, found, data[start:stop]


def _upload(bucket: Bucket, name: str, query: dict[str, str], headers: Any, body: bytes) -> Answer:
    kind = query.get("uploadType")
    if "upload_id" in query:
        return _resumed(bucket, name, query["upload_id"], headers, body)
    if kind == "resumable":
        key = str(len(bucket.uploads))
        bucket.uploads[key] = (query.get("name") or json.loads(body)["name"], b"")
        where = f"http://{headers['Host']}/upload/storage/v1/b/{name}/o?upload_id={key}"
        return 200, JSON | {"Location": where}, b"{}"
    if kind == "multipart":
        boundary = re.search(r'boundary="?([^";]+)', headers["Content-Type"])[1].encode()
        first, second = body.split(b"--" + boundary)[1:3]
        told = json.loads(re.split(rb"\r?\n\r?\n", first, maxsplit=1)[1])
        data = re.split(rb"\r?\n\r?\n", second, maxsplit=1)[1]
        target, data = told["name"], re.sub(rb"\r?\n\Z", b"", data)
    else:
        target, data = query["name"], body
    if query.get("ifGenerationMatch") == "0" and target in bucket.objects:
        return 412, JSON, b"{}"
    bucket.put(target, data)
    return 200, JSON, json.dumps(bucket.describe(name, target)).encode()


def _resumed(bucket: Bucket, name: str, key: str, headers: Any, body: bytes) -> Answer:
    target, held = bucket.uploads[key]
    held += body
    bucket.uploads[key] = (target, held)
    if headers.get("Content-Range", "").endswith("/*"):
        return 308, {"Range": f"bytes=0-{len(held) - 1}"}, b""
    bucket.put(target, held)
    return 200, JSON, json.dumps(bucket.describe(name, target)).encode()


def _batch(bucket: Bucket, headers: Any, body: bytes) -> Answer:
    """gcsfs deletes in batches."""
    boundary = re.search(r'boundary="?([^";]+)', headers["Content-Type"])[1]
    parts = []
    for part in body.decode().split(f"--{boundary}")[1:-1]:
        request = re.search(r"^([A-Z]+) (\S+) HTTP", part, re.M)
        number = email.parser.Parser().parsestr(part.strip()).get("Content-ID", "")
        url = urllib.parse.urlsplit(request[2])
        status, _, data = answer(bucket, request[1], url.path, {}, {}, b"")
        parts.append(
            f"--answer\r\nContent-Type: application/http\r\nContent-ID: <response-{number[1:]}\r\n"
            f"\r\nHTTP/1.1 {status} Done\r\nContent-Length: {len(data)}\r\n\r\n{data.decode()}\r\n"
        )
    kind = {"Content-Type": 'multipart/mixed; boundary="answer"'}
    return 200, kind, ("".join(parts) + "--answer--").encode()
