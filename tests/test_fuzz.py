"""Random input for the server: its connections, its parser and its decoder of chunks.

A strict parser, h11, reads every response, and checks that what we accept is valid. The
suite runs a few thousand cases with a fixed seed. For a million others:

    PROFILER_FUZZ=1000000 pytest tests/test_fuzz.py

The seed is printed. PROFILER_FUZZ_SEED repeats a run.
"""

from __future__ import annotations

import os
import random
import socket
import types

import pytest
from conftest import feed

import profiler

h11 = pytest.importorskip("h11")
COUNT = int(os.environ.get("PROFILER_FUZZ") or 3000)
SEED = int(
    os.environ.get("PROFILER_FUZZ_SEED")
    or (1 if "PROFILER_FUZZ" not in os.environ else random.SystemRandom().getrandbits(32))
)


@pytest.fixture
def dice():
    print(f"PROFILER_FUZZ_SEED={SEED}")
    return random.Random(SEED)


# -- what clients send -----------------------------------------------------------------


def chunk(dice, body):
    """Encode a body in chunks of random sizes."""
    parts = []
    while body:
        size = dice.randint(1, len(body))
        extension = dice.choice([b"", b"", b";a", b";a=b", b';a="b"'])
        parts.append(b"%x%b\r\n%b\r\n" % (size, extension, body[:size]))
        body = body[size:]
    trailers = dice.choice([b"", b"", b"X: y\r\n", b"X:\r\nY: z \r\n"])
    return b"".join(parts) + dice.choice([b"0", b"000"]) + b"\r\n" + trailers + b"\r\n"


def request(dice):
    """Return a valid request: its method and its bytes."""
    method = dice.choice([b"GET", b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"OPTIONS"])
    target = dice.choice(
        [b"/", b"/users/", b"/users/1/?a=b%20c", b"*", b"http://localhost/users/"]
    )
    version = dice.choice([b"1.1", b"1.1", b"1.1", b"1.0"])
    fields = [b"Host: localhost"]
    body = bytes(dice.choices(b"abc{}\r\n", k=dice.choice([0, 1, 20, 3000])))
    if method in (b"POST", b"PUT"):
        if version == b"1.1" and dice.random() < 0.5:
            fields.append(b"Transfer-Encoding: chunked")
            body = chunk(dice, body)
        else:
            fields.append(b"Content-Length: %d" % len(body))
        if dice.random() < 0.2:
            fields.append(b"Expect: 100-continue")
    else:
        body = b""
    if dice.random() < 0.2:
        fields.append(dice.choice([b"Connection: close", b"Connection: keep-alive", b"X_Y: z"]))
    dice.shuffle(fields)
    head = b"%b %b HTTP/%b\r\n%b\r\n\r\n" % (method, target, version, b"\r\n".join(fields))
    return method, dice.choice([b"", b"", b"", b"\r\n"]) + head + body


def mutate(dice, message):
    """Change some bytes of a message."""
    message = bytearray(message)
    for _ in range(dice.randint(1, 3)):
        start = dice.randrange(len(message) + 1)
        end = start + dice.choice([0, 1, 1, 5])
        message[start:end] = dice.choice(
            [b"", b"\r", b"\n", b"\r\n", b" ", b"\t", b"\0", b"0", b"f", b":", b",", b";", b"\xff"]
        )
    return bytes(message)


# -- connections -----------------------------------------------------------------------


class FakeSocket:
    """Delivers pieces of what a client sends, and keeps what is sent to the client."""

    def __init__(self, dice, pieces, faulty):
        self.dice, self.pieces, self.faulty = dice, pieces, faulty
        self.sent, self.failed, self.is_reset, self.closed = b"", False, False, False

    def fail(self):
        if self.faulty and self.dice.random() < 0.02:
            self.failed = True
            raise self.dice.choice([ConnectionResetError(), OSError(5, "I/O"), BrokenPipeError()])

    def setblocking(self, flag):
        pass

    def recv(self, size):
        self.fail()
        return self.pieces.pop(0)[:size] if self.pieces else b""

    def send(self, message):
        self.fail()
        if self.dice.random() < 0.2:
            raise BlockingIOError
        size = self.dice.choice([1, len(message), len(message)])
        self.sent += message[:size]
        return size

    def shutdown(self, how):
        self.fail()

    def setsockopt(self, level, option, value):
        self.is_reset = True
        self.fail()

    def close(self):
        self.closed = True
        self.fail()


class FakeSelector:
    """Reports sockets as ready in random rounds, and refuses some."""

    def __init__(self, dice, faulty):
        self.dice, self.faulty, self.watched = dice, faulty, {}

    def register(self, sock, events, data):
        assert sock not in self.watched
        if self.faulty and self.dice.random() < 0.02:
            sock.failed = True
            raise OSError(28, "No space left on device")
        self.watched[sock] = types.SimpleNamespace(data=data, events=events)

    def unregister(self, sock):
        del self.watched[sock]
        if self.faulty and self.dice.random() < 0.02:
            sock.failed = True
            raise KeyError("not registered")

    def select(self, timeout):
        keys = [key for key in self.watched.values() if self.dice.random() < 0.7]
        return [(key, key.events) for key in keys]


class FakeApplication:
    """Answers at random, but as the application does: complete, streamed or failing."""

    def __init__(self, dice):
        self.dice = dice

    def may_wait(self, environ):
        return self.dice.random() < 0.3

    def __call__(self, environ, start_response):
        json = (profiler.JSON_TYPE,)
        response = self.dice.choice(
            [
                (200, b"x" * self.dice.choice([0, 5, 70_000]), json),
                (200, iter([b"[1", b",2]"]), json),
                (204, None, ()),
                (304, None, (("ETag", '"1"'),)),
                profiler.Unavailable("disk I/O error"),
                ZeroDivisionError(),
            ]
        )
        if isinstance(response, Exception):
            raise response
        status, headers, body = profiler.to_wsgi(response)
        start_response(status, headers)
        return (b"",) if environ["REQUEST_METHOD"] == "HEAD" else body


@pytest.fixture
def fuzzed_server(monkeypatch):
    """A server without threads, whose sockets, selector and clock are replaced."""
    clock = [0.0]
    monkeypatch.setattr(
        profiler, "time", types.SimpleNamespace(
            monotonic=lambda: clock[0], time=lambda: 0.0, sleep=lambda seconds: None,
            strftime=lambda *_: "", localtime=lambda *_: None,
        ),
    )  # fmt: skip
    monkeypatch.setattr(profiler.Log, "write", lambda log, text: len(text))
    address = ("127.0.0.1", 0)
    with profiler.Server(socket.AF_INET, address, None) as server:
        real = server.selector
        server.clock, server.jobs = clock, []
        server.submit = lambda function, connection: server.jobs.append((function, connection))
        yield server
        real.close()
        for end in (server._woken, server._waker):
            end.close()
        server.log.stop()


def run_jobs(dice, server):
    """Run some of the functions that wait for a worker."""
    for job in [job for job in server.jobs if dice.random() < 0.5]:
        server.jobs.remove(job)
        function, connection = job
        try:
            result = function()
        except Exception as error:
            result = error
        connection.resume(result)


def read_responses(sock, methods):
    """Parse all responses that were sent to a client. Return how many were complete."""
    rest, count = sock.sent, 0
    for method in [*methods, b"GET"]:
        if not rest:
            break
        client = h11.Connection(h11.CLIENT, max_incomplete_event_size=1 << 20)
        headers = [("Host", "localhost"), ("Connection", "close")]
        client.send(h11.Request(method=method, target="/", headers=headers))
        client.send(h11.EndOfMessage())
        client.receive_data(rest)
        event = client.next_event()
        while not isinstance(event, (h11.EndOfMessage, type(h11.NEED_DATA))):
            event = client.next_event()
        if event is h11.NEED_DATA:
            # HTTP/1.0 has no chunks: the end of the stream ends the response.
            is_streamed = b"Content-Length" not in rest and b"chunked" not in rest
            assert sock.failed or sock.is_reset or is_streamed, rest[:300]
            break
        count += 1
        rest = client.trailing_data[0]
    return count


def test_no_exception_of_a_connection_ends_the_server_and_responses_are_valid(dice, fuzzed_server):
    server, complete = fuzzed_server, 0
    for _ in range(COUNT):
        faulty = dice.random() < 0.5
        server.application = FakeApplication(dice)
        server.selector = FakeSelector(dice, faulty)
        server.stopping = dice.random() < 0.1
        requests = [request(dice) for _ in range(dice.randint(1, 3))]
        methods = [method for method, _ in requests]
        message = b"".join(message for _, message in requests)
        if dice.random() < 0.3:
            message = mutate(dice, message)
            methods = None
        pieces = []
        while message:
            size = dice.choice([1, 10, 1000, 100_000])
            pieces.append(message[:size])
            message = message[size:]
        sock = FakeSocket(dice, pieces, faulty)
        connection = profiler.Connection(server, sock, "127.0.0.1")
        server.connections[connection] = None
        connection.resume()
        for _ in range(20_000):
            if not server.connections:
                break
            server.clock[0] += dice.choice([0.0, 0.0, 0.0, 0.1, 20.0]) if faulty else 0.0
            server._serve_round()
            run_jobs(dice, server)
        assert not server.connections, "it neither ends nor waits for the client"
        assert [server.senders, server.selector.watched] == [{}, {}]
        assert server.jobs == []
        assert sock.closed
        if methods is not None:
            complete += read_responses(sock, methods)
    assert complete > COUNT / 2


# -- heads and chunks ------------------------------------------------------------------


def parse_with_h11(message):
    """Return the request and the body that h11 reads, and what follows. Raise its error."""
    server = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
    server.receive_data(message)
    parsed, body = server.next_event(), b""
    event = server.next_event()
    while isinstance(event, h11.Data):
        body += event.data
        event = server.next_event()
    return parsed, body, event, server.trailing_data[0]


def test_every_head_that_is_accepted_is_valid(dice):
    accepted = 0
    for _ in range(COUNT):
        message = request(dice)[1].removeprefix(b"\r\n")
        head = message[: profiler.HEAD_END.search(message).end()]
        if dice.random() < 0.7:
            head = mutate(dice, head)
        end = profiler.HEAD_END.search(head)
        if not end:
            continue
        head = head[: end.end()]
        try:
            environ = profiler.parse_head(head)
        except profiler.HTTPError:
            continue
        accepted += 1
        target = head.split(b" ")[1]
        if not target.isascii():
            # Browsers and curl send UTF-8 as it is. h11 refuses that.
            continue
        # A body does not matter here.
        parsed, *_ = parse_with_h11(head)
        assert parsed.method.decode() == environ["REQUEST_METHOD"], head
        assert parsed.http_version.decode() == environ["SERVER_PROTOCOL"][5:]
        lengths = [value for name, value in parsed.headers if name == b"content-length"]
        assert lengths in ([], [environ["CONTENT_LENGTH"].encode()]) or (
            int(lengths[0]) == int(environ["CONTENT_LENGTH"])
        )
    assert accepted > COUNT / 5


def test_every_chunked_body_that_is_accepted_is_decoded_as_h11_does(dice):
    head = b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    accepted = 0
    for _ in range(COUNT):
        message = chunk(dice, bytes(dice.choices(b"abc0\r\n;", k=dice.choice([0, 1, 20, 500]))))
        is_mutated = dice.random() < 0.7
        if is_mutated:
            message = mutate(dice, message)
        rest = dice.choice([b"", b"GET / HTTP/1.1\r\n"])
        data, waiting, pieces = bytearray(), message + rest, []
        while waiting:
            size = dice.choice([1, 3, 1000])
            pieces.append(waiting[:size])
            waiting = waiting[size:]
        pieces = iter(pieces)
        try:
            body = feed(profiler.take_chunked_body(data), data, pieces)
        except profiler.HTTPError:
            body = None
        if body is None:
            assert is_mutated, message
            continue
        accepted += 1
        _, expected, event, trailing = parse_with_h11(head + message + rest)
        assert isinstance(event, h11.EndOfMessage), message
        assert (body, bytes(data) + b"".join(pieces)) == (expected, trailing), message
    assert accepted > COUNT / 5
