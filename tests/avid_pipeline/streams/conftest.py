"""Fixtures of this room: a network that breaks, between the pipeline and an S3 server."""

import http.client
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

import pytest

from avid_pipeline.shards_spec.storage import open_storage

_KEPT_BY_THE_PROXY = {"connection", "transfer-encoding", "content-length", "keep-alive"}


@dataclass(frozen=True)
class Request:
    """A GET that the proxy saw: the object's name, its byte range, and how many GETs of this name came before."""

    name: str
    start: int
    stop: int | None
    earlier: int


@dataclass(frozen=True)
class Fault:
    """What happens to an answer.

    ``drop`` closes the connection after ``at`` bytes of body, ``stall`` falls silent there, ``flip`` changes that
    byte, ``shorten`` announces and sends only that many bytes, ``drip`` sends them one at a time and then stalls,
    ``status`` answers with a status and no content.
    """

    kind: Literal["drop", "stall", "flip", "shorten", "drip", "status"]
    at: int = 0
    status: int = 503


class FaultyProxy:
    """A proxy in front of an S3 server; ``decide`` chooses what happens to each GET of an object."""

    def __init__(self, target: str) -> None:
        parts = urlsplit(target)
        assert parts.hostname is not None
        assert parts.port is not None
        self.target = (parts.hostname, parts.port)
        self.decide: Callable[[Request], Fault | None] = lambda request: None
        self.requests: list[Request] = []
        self.closing = threading.Event()
        self._lock = threading.Lock()
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def of(self, ending: str) -> list[Request]:
        """The GETs of names that end so."""
        return [request for request in self.requests if request.name.endswith(ending)]

    def note(self, name: str, byte_range: str | None) -> Fault | None:
        start, stop = 0, None
        if byte_range is not None:
            first, _, last = byte_range.removeprefix("bytes=").partition("-")
            start, stop = int(first), int(last) + 1 if last else None
        with self._lock:
            earlier = sum(request.name == name for request in self.requests)
            request = Request(name, start, stop, earlier)
            self.requests.append(request)
        return self.decide(request)

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._thread.join(60)
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    owner: FaultyProxy
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        name = unquote(urlsplit(self.path).path).lstrip("/")
        listing = "list-type" in self.path
        self._answer(None if listing else self.owner.note(name, self.headers.get("Range")))

    def do_HEAD(self) -> None:
        self._answer(None)

    def _answer(self, fault: Fault | None) -> None:
        if fault is not None and fault.kind == "status":
            self.send_response(fault.status)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        upstream = http.client.HTTPConnection(*self.owner.target, timeout=60)
        try:
            upstream.request(self.command, self.path, headers=dict(self.headers))
            response = upstream.getresponse()
            self._send(response, response.read(), fault)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # The reader gave up.
        finally:
            upstream.close()

    def _send(self, response: http.client.HTTPResponse, body: bytes, fault: Fault | None) -> None:
        kind = fault.kind if fault else None
        at = min(fault.at, len(body)) if fault else len(body)
        if kind == "flip":
            changed = bytearray(body)
            changed[min(at, len(body) - 1)] ^= 0x40
            body, at = bytes(changed), len(body)
        length = at if kind == "shorten" else len(body)
        if self.command == "HEAD":
            length = int(response.headers["Content-Length"])
        self.send_response(response.status)
        for header, value in response.headers.items():
            if header.lower() not in _KEPT_BY_THE_PROXY:
                self.send_header(header, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if kind == "drip":
            for place in range(at):
                if self.owner.closing.wait(0.02):
                    break
                self.wfile.write(body[place : place + 1])
        else:
            self.wfile.write(body[:at])
        if kind in ("stall", "drip"):
            self.owner.closing.wait(60)
        if kind in ("drop", "stall", "drip"):
            self.close_connection = True


@pytest.fixture
def proxy(s3_endpoint: str) -> Iterator[FaultyProxy]:
    """A network between us and the S3 server that does what a test decides."""
    made = FaultyProxy(s3_endpoint)
    yield made
    made.close()


@dataclass(frozen=True)
class RemoteData:
    """A data set in a bucket: its URL, and the options to open it directly or through the proxy."""

    url: str
    direct: dict[str, str] = field(repr=False)
    through_proxy: dict[str, str] = field(repr=False)


@pytest.fixture
def upload(make_bucket, proxy: FaultyProxy) -> Callable[[Path], RemoteData]:
    """Copies a data set's folder to a new bucket."""

    def copy(folder: Path) -> RemoteData:
        bucket = make_bucket()
        target = open_storage(f"{bucket.url}/data", options=bucket.options)
        for path in sorted(path for path in folder.iterdir() if path.is_file()):
            target.write(path.name, path.read_bytes())
        return RemoteData(target.url, bucket.options, bucket.options | {"aws_endpoint": proxy.url})

    return copy


@pytest.fixture
def faults() -> Callable[..., Callable[[Request], Fault | None]]:
    """``faults(ending, first, second, …)``: what happens to the first, second, … GET of names that end so."""

    def decide(ending: str, *wanted: Fault | None) -> Callable[[Request], Fault | None]:
        def choose(request: Request) -> Fault | None:
            fits = request.name.endswith(ending) and request.earlier < len(wanted)
            return wanted[request.earlier] if fits else None

        return choose

    return decide


@pytest.fixture
def fault() -> type[Fault]:
    return Fault
