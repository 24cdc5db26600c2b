"""A minimal S3-speaking server for the benchmarks: GET with ranges and HEAD of the files below a folder.

It exists because a general S3 emulator in Python reads whole objects for a range and would be what is measured. This
one sends file pages with sendfile from a process of its own; it checks no signature and cannot write.

    python benchmarks/s3_server.py FOLDER [--port 9000] [--delay-ms 0]
"""

import argparse
import os
import re
import socket
import threading
import time
from email.utils import formatdate
from pathlib import Path
from urllib.parse import unquote, urlsplit

_RANGE = re.compile(rb"^range:\s*bytes=(\d+)-(\d*)\s*$", re.IGNORECASE | re.MULTILINE)


def answer(connection: socket.socket, folder: Path, method: str, path: str, head: bytes, delay: float) -> None:
    """Answer one request for ``/bucket/name``."""
    time.sleep(delay)
    name = unquote(urlsplit(path).path).lstrip("/").partition("/")[2]
    try:
        descriptor = os.open(folder / name, os.O_RDONLY)
    except OSError:
        connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
        return
    try:
        status = os.fstat(descriptor)
        start, stop, line = 0, status.st_size, "200 OK"
        wanted = _RANGE.search(head)
        extra = ""
        if wanted:
            start = int(wanted[1])
            stop = min(stop, int(wanted[2]) + 1) if wanted[2] else stop
            line, extra = "206 Partial Content", f"Content-Range: bytes {start}-{stop - 1}/{status.st_size}\r\n"
        headers = (
            f'HTTP/1.1 {line}\r\nContent-Length: {stop - start}\r\n{extra}ETag: "{status.st_mtime_ns:x}"\r\n'
            f"Last-Modified: {formatdate(status.st_mtime, usegmt=True)}\r\nAccept-Ranges: bytes\r\n\r\n"
        )
        connection.sendall(headers.encode())
        while method == "GET" and start < stop:
            start += os.sendfile(connection.fileno(), descriptor, start, stop - start)
    finally:
        os.close(descriptor)


def serve_connection(connection: socket.socket, folder: Path, delay: float) -> None:
    """Answer requests of one connection until it closes."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    waiting = b""
    with connection:
        while True:
            while b"\r\n\r\n" not in waiting:
                data = connection.recv(65536)
                if not data:
                    return
                waiting += data
            head, _, waiting = waiting.partition(b"\r\n\r\n")
            method, path, _ = head.split(b"\r\n", 1)[0].decode().split(" ", 2)
            answer(connection, folder, method, path, head.replace(b"\r\n", b"\n"), delay)


def main() -> None:
    """Serve until killed; the first line of output is the address."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--delay-ms", type=float, default=0.0, help="wait so long before every answer")
    arguments = parser.parse_args()
    server = socket.create_server(("127.0.0.1", arguments.port), backlog=128)
    print(f"http://127.0.0.1:{server.getsockname()[1]}", flush=True)
    while True:
        connection, _ = server.accept()
        threading.Thread(
            target=serve_connection, args=(connection, arguments.folder, arguments.delay_ms / 1000), daemon=True
        ).start()


if __name__ == "__main__":
    main()
