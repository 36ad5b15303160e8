"""A small HTTP proxy before the S3 server that spoils requests: delays, cuts, lost answers, errors."""

import contextlib
import random
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

CHUNK_BYTES = 16 << 10


@dataclass(frozen=True)
class Fault:
    """What happens to one request. Nothing set: it passes."""

    delay_seconds: float = 0.0
    cut_request: float | None = None
    """Cut both connections after this share of the request's body went through."""
    cut_response: float | None = None
    """Let the server do its work, then cut after this share of its answer (0: the answer is lost)."""
    answer: tuple[int, str] | None = None
    """Answer with this status and S3 error code; the server hears nothing."""


@dataclass
class Proxy:
    """Listens on `port`; `choose(method, path)` names the fault of each request."""

    upstream_port: int
    choose: Callable[[str, str], Fault] = lambda method, path: Fault()
    requests: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def script(self, *faults: Fault, method: str = "PUT") -> None:
        """The next requests of this method meet these faults, in order; later ones pass."""
        waiting = list(faults)
        lock = threading.Lock()

        def choose(found: str, path: str) -> Fault:
            with lock:
                return waiting.pop(0) if found == method and waiting else Fault()

        self.choose = choose

    def spoil_at_random(self, share: float, seed: int) -> None:
        """About this share of all requests meets one fault or another."""
        generator = random.Random(seed)
        lock = threading.Lock()

        def choose(method: str, path: str) -> Fault:
            with lock:
                if generator.random() >= share:
                    return Fault()
                at = generator.random()
                return generator.choice(
                    [
                        Fault(cut_request=at),
                        Fault(cut_response=0.0),
                        Fault(cut_response=at),
                        Fault(delay_seconds=0.2 * at),
                        Fault(answer=(503, "SlowDown")),
                        Fault(answer=(500, "InternalError")),
                        *([Fault(answer=(409, "ConditionalRequestConflict"))] if method == "PUT" else []),
                    ]
                )

        self.choose = choose

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        """Relay one client connection, request by request."""
        server: socket.socket | None = None
        try:
            server = socket.create_connection(("127.0.0.1", self.upstream_port))
            while self._relay(_Stream(client), _Stream(server)):
                pass
        except (OSError, EOFError):
            pass
        finally:
            for connection in (client, server):
                if connection is not None:
                    _reset(connection)

    def _relay(self, client: "_Stream", server: "_Stream") -> bool:
        head = client.read_head()
        if head is None:
            return False
        method, path = head.split(b" ", 2)[:2]
        self.requests.append((method.decode(), path.decode()))
        fault = self.choose(*self.requests[-1])
        time.sleep(fault.delay_seconds)
        if fault.answer is not None:
            client.send(_error(*fault.answer))
            client.finish()
            return False
        server.send(head)
        length = _length(head)
        if b"expect: 100-continue" in head.lower() and not self._continue(client, server):
            return True
        sent = client.copy_to(server, length if fault.cut_request is None else int(length * fault.cut_request))
        if fault.cut_request is not None and sent <= length:
            return False
        return self._answer(client, server, method, fault)

    def _continue(self, client: "_Stream", server: "_Stream") -> bool:
        """Pass the server's word on whether the body is wanted. False: it was a final answer."""
        interim = server.read_head()
        if interim is None:
            raise EOFError
        client.send(interim)
        if b" 100 " in interim.split(b"\r\n")[0]:
            return True
        server.copy_to(client, _length(interim))
        return False

    def _answer(self, client: "_Stream", server: "_Stream", method: bytes, fault: Fault) -> bool:
        head = server.read_head()
        if head is None or fault.cut_response == 0.0:
            return False
        client.send(head)
        if method == b"HEAD":
            return True
        if b"transfer-encoding: chunked" in head.lower():
            while (size := server.copy_line_to(client)) > 0:
                server.copy_to(client, size + 2)
            server.copy_to(client, 2)
            return fault.cut_response is None
        length = _length(head)
        server.copy_to(client, length if fault.cut_response is None else int(length * fault.cut_response))
        return fault.cut_response is None


class _Stream:
    """Buffered reading of one socket. One request at a time, so nothing is left in the buffer between two."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._buffer = b""

    def send(self, data: bytes) -> None:
        self._connection.sendall(data)

    def finish(self) -> None:
        """Say that no more comes, and let the other side read what was said before the connection goes."""
        self._connection.shutdown(socket.SHUT_WR)
        self._connection.settimeout(2)
        while self._connection.recv(CHUNK_BYTES):
            pass

    def read_head(self) -> bytes | None:
        while b"\r\n\r\n" not in self._buffer:
            if not self._fill():
                return None
        head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        return head + b"\r\n\r\n"

    def copy_line_to(self, other: "_Stream") -> int:
        """Pass a chunk's size line on; its size."""
        while b"\r\n" not in self._buffer:
            if not self._fill():
                raise EOFError
        line, _, self._buffer = self._buffer.partition(b"\r\n")
        other.send(line + b"\r\n")
        return int(line.split(b";")[0], 16)

    def copy_to(self, other: "_Stream", count: int) -> int:
        copied = 0
        while copied < count:
            if not self._buffer and not self._fill():
                raise EOFError
            piece, self._buffer = self._buffer[: count - copied], self._buffer[count - copied :]
            other.send(piece)
            copied += len(piece)
        return copied

    def _fill(self) -> bool:
        data = self._connection.recv(CHUNK_BYTES)
        self._buffer += data
        return bool(data)


def _length(head: bytes) -> int:
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line.split(b":")[1])
    return 0


def _error(status: int, code: str) -> bytes:
    body = b"" if status < 300 else f"<Error><Code>{code}</Code><Message>by the tests' proxy</Message></Error>".encode()
    head = f"HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\n"
    head += f"Content-Length: {len(body)}\r\nConnection: close\r\n"
    return head.encode() + b"\r\n" + body


def _reset(connection: socket.socket) -> None:
    """Close at once, as a cable that is pulled would."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
