"""The built-in server and its connections, over real sockets. test_parsing.py has its parser."""

from __future__ import annotations

import collections
import contextlib
import errno
import http.client
import io
import json
import os
import re
import select
import socket
import struct
import sys
import threading
import time
import tracemalloc
from email.utils import parsedate_to_datetime
from wsgiref.validate import check_environ

import pytest
from conftest import BODY, ITERATIONS, Answer, execute, fill, locked, not_on_windows, until

import profiler

GET = b"GET /users/ HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST_HEAD = (
    b"POST /users/ HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n"
)
POST = POST_HEAD % len(BODY) + BODY
DELETE = b"DELETE /users/9/ HTTP/1.1\r\nHost: localhost\r\n\r\n"


def is_wine():
    if os.name != "nt":
        return False
    import ctypes

    return hasattr(ctypes.WinDLL("ntdll"), "wine_get_version")


# A client of Wine receives the end of the stream before the reset.
needs_reset = pytest.mark.skipif(is_wine(), reason="Wine does not reset connections at once")


@contextlib.contextmanager
def serving(application, access_log=False):
    """Run a server in a thread. A test may change its limits before it connects."""
    with profiler.Server(socket.AF_INET, ("127.0.0.1", 0), application, access_log) as server:
        thread = threading.Thread(target=server.serve)
        thread.start()
        try:
            yield server
        finally:
            server.stop()
            thread.join(20)
            assert not thread.is_alive()


@pytest.fixture
def server(application, capfd):
    with serving(application) as server:
        yield server
    assert "Traceback" not in capfd.readouterr().err


@contextlib.contextmanager
def connected(server):
    with contextlib.closing(
        socket.create_connection(server.server_address, timeout=10)
    ) as connection:
        yield connection


def get(path, *fields):
    """Return a GET request for a path, with more header fields."""
    return b"".join(
        line + b"\r\n" for line in (b"GET %b HTTP/1.1" % path, b"Host: localhost", *fields, b"")
    )


def receive(connection):
    """Return everything up to the end of the stream."""
    with connection.makefile("rb") as stream:
        return stream.read()


def receive_until_reset(connection):
    """Return everything up to the reset of the connection."""
    received = b""
    with pytest.raises(ConnectionResetError):
        while part := connection.recv(1 << 16):
            received += part
    return received


class Stream(io.BufferedReader):
    """A stream that stays open when http.client closes a response."""

    def makefile(self, *_):
        return self

    def close(self):
        pass


def answers(connection, *methods):
    """Yield the next responses of a connection, to requests with these methods."""
    with connection.makefile("rb", buffering=0) as raw:
        stream = Stream(raw)
        for method in methods:
            response = http.client.HTTPResponse(stream, method=method)
            response.begin()
            yield Answer(response.status, response.headers, response.read())


def answer(connection, method="GET"):
    """Return the next response of a connection; no other may be on its way."""
    [response] = answers(connection, method)
    return response


def ask(connection, request=GET):
    """Send a request and return the response."""
    connection.sendall(request)
    return answer(connection, request.split(b" ")[0].decode())


def statuses(received):
    return [int(status) for status in re.findall(rb"HTTP/1\.1 ([2-5][0-9]{2})", received)]


def trickle(connection, message):
    """Send a message byte by byte until the server answers. Return False if it does not."""
    for byte in message:
        connection.sendall(bytes([byte]))
        if select.select([connection], [], [], 0.02)[0]:
            return True
    return False


class Gate:
    """Wraps an application: records the paths of requests; a request for /gate holds up
    the I/O thread."""

    def __init__(self, application):
        self.application, self.paths, self.environs = application, [], []
        self.reached, self.opened = threading.Event(), threading.Event()

    def may_wait(self, environ):
        return environ["PATH_INFO"] != "/gate" and self.application.may_wait(environ)

    def __call__(self, environ, start_response):
        self.paths.append(environ["PATH_INFO"])
        self.environs.append(environ)
        if environ["PATH_INFO"] == "/gate":
            self.reached.set()
            assert self.opened.wait(10)
        return self.application(environ, start_response)


def count_idle(server):
    """Return how many connections wait for the next request."""
    return sum(connection.is_idle for connection in list(server.connections))


@contextlib.contextmanager
def held_up(server, gate):
    """Hold up the I/O thread during the block, so that what is sent in it arrives at
    the same time."""
    with connected(server) as connection:
        connection.sendall(get(b"/gate"))
        assert gate.reached.wait(10)
        try:
            yield
        finally:
            gate.opened.set()
            answer(connection)


# -- requests and responses ------------------------------------------------------------


def test_connection_is_kept_alive_and_tells_its_timeout(server):
    with connected(server) as connection:
        for _ in range(3):
            response = ask(connection)
            assert (response.status, response.json, response.headers["Connection"]) == (
                200,
                [],
                None,
            )
            assert (
                response.headers["Keep-Alive"]
                == f"timeout={profiler.IDLE_TIMEOUT}"
                == "timeout=15"
            )


def test_pipelined_requests_are_answered_in_order(server):
    with connected(server) as connection:
        connection.sendall(POST + GET + get(b"/x/") + get(b"/users/", b"Connection: close"))
        received = receive(connection)
    assert statuses(received) == [201, 200, 404, 200]
    assert received.count(b'"Harry"') == 2


@pytest.mark.parametrize(
    "last",
    [
        GET.replace(b"1.1", b"1.0"),
        get(b"/users/", b"Connection: Close"),
        get(b"/users/", b"Connection: keep-alive,\tclose"),
        get(b"/users/", b"Connection: keep-alive", b"Connection: close"),
    ],
)
def test_http_1_0_and_connection_close_end_the_connection(server, last):
    with connected(server) as connection:
        connection.sendall(last + GET)
        received = receive(connection)
    assert statuses(received) == [200]
    assert b"\r\nConnection: close\r\n" in received
    assert b"Keep-Alive" not in received


@pytest.mark.parametrize("option", [b"keep-alive", b"closed", b"TE, Upgrade"])
def test_other_connection_options_keep_the_connection(server, option):
    with connected(server) as connection:
        for _ in range(2):
            kept = ask(connection, get(b"/users/", b"Connection: " + option))
            assert (kept.status, kept.headers["Connection"], kept.headers["Keep-Alive"]) == (
                200,
                None,
                "timeout=15",
            )


def test_last_response_ends_the_stream_at_once(server, monkeypatch):
    """While the server waits for the client to close, the client is not kept waiting."""
    monkeypatch.setattr(profiler, "LINGER_TIMEOUT", 60)
    with connected(server) as connection:
        connection.sendall(get(b"/users/", b"Connection: close"))
        assert statuses(receive(connection)) == [200]
    until(lambda: not server.connections)


def test_responses_without_a_body_keep_the_connection_in_step(server):
    with connected(server) as connection:
        assert ask(connection, POST).status == 201
        for request, expected in [
            (DELETE, 204),
            (GET.replace(b"GET", b"HEAD"), 200),
            (GET.replace(b"GET", b"OPTIONS"), 204),
            (get(b"/users/1/", b"If-None-Match: *"), 304),
            (get(b"/users/1/", b"If-None-Match: *").replace(b"GET", b"HEAD"), 304),
        ]:
            response = ask(connection, request)
            assert (response.status, response.body) == (expected, b"")
            assert ("Content-Length" in response.headers) == (expected == 200)
            assert "Transfer-Encoding" not in response.headers
        assert len(ask(connection).json) == 1


def test_long_list_is_chunked(server, path):
    fill(path, 3 * profiler.BATCH)
    with connected(server) as connection:
        for _ in range(2):
            response = ask(connection)
            assert (response.status, response.headers["Transfer-Encoding"]) == (200, "chunked")
            assert len(response.json) == 3 * profiler.BATCH
        assert ask(connection, GET.replace(b"GET", b"HEAD")).body == b""


def test_long_list_is_not_chunked_for_http_1_0(server, path):
    fill(path, 3 * profiler.BATCH)
    with connected(server) as connection:
        connection.sendall(GET.replace(b"1.1", b"1.0"))
        head, _, body = receive(connection).partition(b"\r\n\r\n")
    assert b"Transfer-Encoding" not in head
    assert len(json.loads(body)) == 3 * profiler.BATCH


def failing_after(pages, function, error=None):
    """Return a function that raises an error after some calls."""
    calls = iter(range(pages))

    def fail(*arguments, **options):
        if next(calls, None) is None:
            raise error or profiler.Unavailable("disk I/O error")
        return function(*arguments, **options)

    return fail


@needs_reset
@pytest.mark.parametrize(
    "error", [profiler.Unavailable("disk I/O error"), OSError("disk I/O error")]
)
@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
def test_list_that_fails_midway_resets_the_connection(
    application, users, path, capfd, monkeypatch, version, error
):
    """To an HTTP/1.0 client, the end of the stream would be the end of the list."""
    fill(path, 4 * profiler.BATCH)
    monkeypatch.setattr(users, "page", failing_after(2, users.page, error))
    with serving(application) as server, connected(server) as connection:
        connection.sendall(GET.replace(b"1.1", version) + GET)
        received = receive_until_reset(connection)
    assert statuses(received) == [200]
    assert b"user600@" in received
    [line] = capfd.readouterr().err.splitlines()
    assert "disk I/O error" in line


@needs_reset
def test_bug_in_the_middle_of_a_list_is_logged_with_its_traceback(
    application, users, path, capfd, monkeypatch
):
    fill(path, 4 * profiler.BATCH)
    monkeypatch.setattr(users, "page", failing_after(2, users.page, ZeroDivisionError("oops")))
    with serving(application) as server, connected(server) as connection:
        connection.sendall(GET)
        receive_until_reset(connection)
    assert re.fullmatch(
        r"Traceback .*\nZeroDivisionError: oops\n", capfd.readouterr().err, re.DOTALL
    )


def test_list_that_fails_before_its_first_page_is_503(server, users, monkeypatch):
    monkeypatch.setattr(users, "page", failing_after(0, users.page))
    with connected(server) as connection:
        assert ask(connection).status == 503


@pytest.mark.parametrize("body_parts", [(BODY,), (BODY[:5], BODY[5:])])
def test_100_continue_is_sent_to_a_client_that_waits_for_it(server, body_parts):
    """RFC 9110 10.1.1."""
    with connected(server) as connection:
        connection.sendall(
            (POST_HEAD % len(BODY)).replace(b"Host", b"Expect: 100-continue\r\nHost")
        )
        assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        for part in body_parts:
            connection.sendall(part)
        assert answer(connection).status == 201
        assert ask(connection).status == 200


def test_100_continue_is_not_sent_to_http_1_0(server):
    """RFC 9110 10.1.1: a server must not."""
    with connected(server) as connection:
        connection.sendall(
            POST.replace(b"1.1", b"1.0").replace(b"Host", b"Expect: 100-continue\r\nHost")
        )
        assert receive(connection).startswith(b"HTTP/1.1 201 ")


def test_100_continue_is_not_sent_if_the_body_is_too_large(server):
    with connected(server) as connection:
        connection.sendall((POST_HEAD % 100_000).replace(b"Host", b"Expect: 100-continue\r\nHost"))
        received = receive(connection)
    assert received.startswith(b"HTTP/1.1 413 ")
    assert b"\r\nConnection: close\r\n" in received


@pytest.mark.parametrize("method", [b"GET", b"HEAD"])
def test_rejected_request_is_answered_in_json_and_closed(server, method):
    with connected(server) as connection:
        connection.sendall(get(b"/users/", b"Content-Length: x").replace(b"GET", method) + GET)
        head, _, body = receive(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    for field in (
        b"Content-Type: application/json",
        b"Connection: close",
        b"X-Content-Type-Options: nosniff",
        b"X-Frame-Options: DENY",
        b"Cache-Control: no-store",
    ):
        assert field in head.split(b"\r\n")
    assert body == b"" if method == b"HEAD" else list(json.loads(body)) == ["error"]


@pytest.mark.parametrize(
    ("beginning", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b"\x80\x2e\x01\x00\x02", 400),
        (b"SSH-2.0-OpenSSH_9.2\r\n", 400),
        (b"GET /users/ HTTP/1.1\nHost: localhost\n\n", 400),
        (b"GET /" + b"a" * profiler.MAX_REQUEST_LINE, 414),
        (b"GET / HTTP/1.1\r\nX: " + b"a" * profiler.MAX_HEAD, 431),
    ],
    ids=["TLS", "SSLv2", "SSH", "bare line feeds", "request line", "head"],
)
def test_tls_garbage_and_oversized_heads_are_rejected_before_they_end(server, beginning, status):
    with connected(server) as connection:
        connection.sendall(beginning)
        assert receive(connection).startswith(b"HTTP/1.1 %d " % status)


def test_incomplete_head_is_400(server):
    with connected(server) as connection:
        connection.sendall(GET[:-2])
        connection.shutdown(socket.SHUT_WR)
        assert receive(connection).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("split", [1, 2, 3])
def test_empty_line_after_the_head_may_arrive_in_two_parts(server, split):
    """In two reads: the first part of the head is sent with a complete request, which
    is answered in between."""
    with connected(server) as connection:
        assert ask(connection, GET + GET[:-split]).status == 200
        assert ask(connection, GET[-split:]).status == 200


def test_cut_off_body_is_400_and_creates_no_user(server):
    with connected(server) as connection:
        connection.sendall(POST[:-1])
        connection.shutdown(socket.SHUT_WR)
        assert receive(connection).startswith(b"HTTP/1.1 400 ")
    assert server.application.users.count() == 0


CHUNKED_HEAD = POST_HEAD.replace(b"Content-Length: %d", b"Transfer-Encoding: chunked")


def chunks(body, size, last=b"0\r\n\r\n"):
    """Encode a body in chunks of a size."""
    parts = [body[i : i + size] for i in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + last


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("last", [b"0\r\n\r\n", b"000;a=b\r\nX: y\r\nY:\r\n\r\n"])
def test_chunked_body_creates_a_user_and_keeps_the_connection(server, size, last):
    with connected(server) as connection:
        connection.sendall(CHUNKED_HEAD + chunks(BODY, size, last) + GET)
        created, listed = answers(connection, "POST", "GET")
    assert (created.status, listed.json[0]["last_name"]) == (201, "Potter")


def test_chunked_body_may_arrive_byte_by_byte(server):
    with connected(server) as connection:
        for byte in CHUNKED_HEAD + chunks(BODY, 9):
            connection.sendall(bytes([byte]))
        assert answer(connection, "POST").status == 201


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"+5\r\nhello\r\n0\r\n\r\n", 400),
        (b"-5\r\nhello\r\n0\r\n\r\n", 400),
        (b" 5\r\nhello\r\n0\r\n\r\n", 400),
        (b"5 \r\nhello\r\n0\r\n\r\n", 400),
        (b"0x5\r\nhello\r\n0\r\n\r\n", 400),
        (b"5_0\r\nhello\r\n0\r\n\r\n", 400),
        (b"\r\nhello\r\n0\r\n\r\n", 400),
        (b"5\nhello\r\n0\r\n\r\n", 400),
        (b"5\r\nhello\n0\r\n\r\n", 400),
        (b"5\r\nhelloo\r\n0\r\n\r\n", 400),
        (b"5;a\nb\r\nhello\r\n0\r\n\r\n", 400),
        (b"5;" + b"a" * 64, 400),
        (b"0" * 65, 400),
        (b"0\r\nX y\r\n\r\n", 400),
        (b"0\r\nX : y\r\n\r\n", 400),
        (b"0\r\nX: y\n\r\n", 400),
        (b"0\r\nX: " + b"y" * profiler.MAX_HEAD, 431),
        (b"%x\r\n" % (profiler.MAX_BODY + 1), 413),
        (b"f" * 60 + b"\r\n", 413),
        (b"1\r\n \r\n" * 4_096, 413),
    ],
)
def test_malformed_or_too_large_chunked_body_is_rejected_at_once(server, body, status):
    """RFC 9112 7.1. The framing counts, too: decoding tiny chunks takes time."""
    with connected(server) as connection:
        connection.sendall(CHUNKED_HEAD + body)
        assert statuses(receive(connection)) == [status]


def test_chunked_body_of_the_largest_size_is_read(server):
    body = BODY + b" " * (profiler.MAX_BODY - len(BODY))
    with connected(server) as connection:
        assert ask(connection, CHUNKED_HEAD + chunks(body, 1000)).status == 201


def test_chunked_body_that_ends_early_is_400(server):
    with connected(server) as connection:
        connection.sendall(CHUNKED_HEAD + chunks(BODY, 9, b""))
        connection.shutdown(socket.SHUT_WR)
        assert statuses(receive(connection)) == [400]


def test_slow_chunked_body_times_out(server, monkeypatch):
    monkeypatch.setattr(profiler, "BODY_TIMEOUT", 0.1)
    with connected(server) as connection:
        connection.sendall(CHUNKED_HEAD + b"5\r\n")
        assert statuses(receive(connection)) == [408]


def test_100_continue_is_sent_before_a_chunked_body(server):
    with connected(server) as connection:
        connection.sendall(CHUNKED_HEAD.replace(b"Host", b"Expect: 100-continue\r\nHost"))
        assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(chunks(BODY, 9))
        assert answer(connection, "POST").status == 201


@pytest.mark.parametrize("lines", [b"\r\n", b"\r\n\r\n", b"\n", b"\r"])
def test_empty_lines_before_a_request_are_ignored(server, lines):
    """RFC 9112 2.2."""
    with connected(server) as connection:
        connection.sendall(lines)
        until(lambda: count_idle(server))
        connection.sendall(lines + GET)
        assert answer(connection).status == 200


def test_empty_lines_after_a_request_do_not_keep_the_connection_open(server, monkeypatch):
    """RFC 9112 2.2. They are not the beginning of a request that never ends."""
    with connected(server) as connection:
        assert ask(connection, GET + b"\r\n").status == 200
        monkeypatch.setattr(profiler, "IDLE_TIMEOUT", 0.2)
        assert ask(connection, GET + b"\r\n").status == 200
        assert trickle(connection, b"\r\n" * 500)
        assert receive(connection) == b""


def test_target_is_decoded_once_however_slowly_its_head_arrives(server, monkeypatch):
    """Otherwise a target of 8 KB that arrives byte by byte would take seconds."""
    decoded = []
    unquote = profiler.unquote
    monkeypatch.setattr(
        profiler, "unquote", lambda *given: decoded.append(given) or unquote(*given)
    )
    with connected(server) as connection:
        for byte in GET.replace(b"/users/", b"/%75sers/"):
            connection.sendall(bytes([byte]))
        assert answer(connection).status == 200
    assert len(decoded) == 1


@pytest.mark.parametrize(("request_", "status"), [(GET, 200), (POST, 201)], ids=["GET", "POST"])
def test_client_that_closes_its_sending_side_is_answered(server, request_, status):
    with connected(server) as connection:
        connection.sendall(request_)
        connection.shutdown(socket.SHUT_WR)
        assert statuses(receive(connection)) == [status]


def test_unread_body_is_not_taken_for_the_next_request(server):
    with connected(server) as connection:
        connection.sendall(get(b"/users/", b"Content-Length: %d" % len(GET)) + GET + get(b"/x/"))
        assert [response.status for response in answers(connection, "GET", "GET")] == [200, 404]


def test_sender_of_a_large_body_receives_413(server):
    """If the server closed with unread input, the connection would be reset and the
    response lost."""
    with connected(server) as connection:
        connection.sendall(POST_HEAD % 5_000_000 + b"x" * 5_000_000)
        received = receive(connection)
    assert received.startswith(b"HTTP/1.1 413 ")
    assert b"\r\nConnection: close\r\n" in received


def test_environ_conforms_to_pep_3333(application):
    gate = Gate(application)
    with serving(gate) as server, connected(server) as connection:
        assert ask(connection, POST).status == 201
        port = server.server_port
    [environ] = gate.environs
    check_environ({**environ, "wsgi.input": io.BytesIO()})
    assert (environ["REMOTE_ADDR"], environ["SERVER_NAME"], environ["SERVER_PORT"]) == (
        "127.0.0.1",
        "127.0.0.1",
        str(port),
    )
    assert (
        environ["wsgi.multithread"],
        environ["wsgi.multiprocess"],
        environ["wsgi.run_once"],
    ) == (True, False, False)


def test_responses_have_the_date_and_a_server_header_without_python(server):
    with connected(server) as connection:
        headers = ask(connection).headers
    assert headers["Server"] == f"profiler/{profiler.__version__}"
    assert abs(parsedate_to_datetime(headers["Date"]).timestamp() - time.time()) < 60


def test_small_response_is_one_packet_without_delay(server, monkeypatch):
    sent = []
    send = socket.socket.send
    monkeypatch.setattr(
        socket.socket, "send", lambda *arguments: sent.append(arguments[1]) or send(*arguments)
    )
    with connected(server) as connection:
        assert ask(connection).status == 200
        [served] = server.connections
        assert served.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert [message[:9] for message in sent if message != b"\0"] == [b"HTTP/1.1 "]


# -- timeouts --------------------------------------------------------------------------


def test_slow_head_times_out(server, monkeypatch):
    monkeypatch.setattr(profiler, "HEAD_TIMEOUT", 0.1)
    with connected(server) as connection:
        assert trickle(connection, GET[:-1])
        received = receive(connection)
    assert received.startswith(b"HTTP/1.1 408 ")
    assert b"\r\nConnection: close\r\n" in received


def test_slow_body_times_out(server, monkeypatch):
    monkeypatch.setattr(profiler, "BODY_TIMEOUT", 0.1)
    with connected(server) as connection:
        connection.sendall(POST_HEAD % len(BODY))
        assert trickle(connection, BODY[:-1])
        received = receive(connection)
    assert received.startswith(b"HTTP/1.1 408 ")
    assert b"\r\nConnection: close\r\n" in received


def test_missing_body_times_out(server, monkeypatch):
    monkeypatch.setattr(profiler, "BODY_TIMEOUT", 0.1)
    with connected(server) as connection:
        connection.sendall(POST_HEAD % len(BODY))
        assert receive(connection).startswith(b"HTTP/1.1 408 ")


def test_idle_connection_is_closed_silently(server, monkeypatch):
    monkeypatch.setattr(profiler, "IDLE_TIMEOUT", 0.05)
    with connected(server) as connection:
        assert receive(connection) == b""
    with connected(server) as connection:
        connection.sendall(GET)
        assert statuses(receive(connection)) == [200]


@pytest.fixture
def small_buffers(server):
    """Let the server's connections buffer little, so that it has to wait for its clients."""
    server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)


@contextlib.contextmanager
def slow_reader(server):
    """Connect with a small buffer."""
    with contextlib.closing(socket.socket()) as connection:
        connection.settimeout(10)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
        connection.connect(server.server_address)
        yield connection


@needs_reset
@pytest.mark.usefixtures("small_buffers")
@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
def test_client_that_reads_nothing_is_dropped_with_a_reset(server, path, monkeypatch, version):
    """To an HTTP/1.0 client, the end of the stream would be the end of the list."""
    monkeypatch.setattr(profiler, "SEND_TIMEOUT", 0.1)
    fill(path, 20 * profiler.BATCH)
    with slow_reader(server) as connection:
        connection.sendall(GET.replace(b"1.1", version))
        assert connection.recv(1) == b"H"
        until(lambda: not server.connections)
        received = receive_until_reset(connection)
    assert not received.endswith((b"]\n", b"0\r\n\r\n"))


@pytest.mark.usefixtures("small_buffers")
@pytest.mark.parametrize("request_", [GET, DELETE], ids=["GET", "DELETE"])
def test_client_that_pipelines_without_reading_is_dropped(server, monkeypatch, request_):
    monkeypatch.setattr(profiler, "SEND_TIMEOUT", 0.1)
    with slow_reader(server) as connection:
        connection.sendall(request_ * 500)
        until(lambda: server.connections)
        until(lambda: not server.connections)


@pytest.mark.usefixtures("small_buffers")
def test_client_that_reads_slowly_is_served(server, users, monkeypatch):
    """In total, this takes longer than a client may read nothing."""
    monkeypatch.setattr(profiler, "SEND_TIMEOUT", 0.7)
    monkeypatch.setattr(users, "page", lambda *_, **__: (b"1" * 200_000, None))
    started, received = time.monotonic(), b""
    with slow_reader(server) as connection:
        connection.sendall(GET.replace(b"1.1", b"1.0"))
        while part := connection.recv(1 << 13):
            received += part
            time.sleep(0.05)
    assert time.monotonic() - started > profiler.SEND_TIMEOUT
    assert received.count(b"1") > 200_000


def test_silent_client_is_closed_after_its_last_response(server, monkeypatch):
    monkeypatch.setattr(profiler, "LINGER_TIMEOUT", 0.05)
    with connected(server) as connection:
        connection.sendall(b"nonsense\r\n")
        assert statuses(receive(connection)) == [400]
        until(lambda: not server.connections)


def test_client_that_sends_on_after_its_last_response_is_closed(server, monkeypatch):
    """A lingering close has an overall limit."""
    monkeypatch.setattr(profiler, "LINGER_TIMEOUT", 10)
    monkeypatch.setattr(profiler, "MAX_LINGER", 0.1)
    with connected(server) as connection:
        connection.sendall(b"nonsense\r\n")
        assert statuses(receive(connection)) == [400]

        def is_closed():
            with contextlib.suppress(OSError):
                connection.sendall(b"more")
            return not server.connections

        until(is_closed)


def test_client_that_resets_the_connection_leaves_no_trace(server, path, capfd):
    fill(path, 20 * profiler.BATCH)
    for _ in range(3):
        with connected(server) as connection:
            connection.sendall(GET * 5)
            connection.recv(10)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    until(lambda: not server.connections)
    assert capfd.readouterr().err == ""


def test_what_arrived_while_the_process_was_suspended_is_answered(application, monkeypatch):
    """On a laptop that slept, for example. The deadlines have passed when it wakes."""
    monkeypatch.setattr(profiler, "HEAD_TIMEOUT", 0.3)
    gate = Gate(application)
    with serving(gate) as server, connected(server) as connection:
        assert ask(connection).status == 200
        connection.sendall(GET[:-2])
        until(lambda: count_idle(server) < len(server.connections))
        with held_up(server, gate):
            time.sleep(0.4)
            connection.sendall(GET[-2:])
        assert answer(connection).status == 200


# -- limits ----------------------------------------------------------------------------


def test_at_the_connection_limit_the_longest_idle_connection_is_closed(server):
    server.max_connections = 3
    with connected(server) as first, connected(server) as second, connected(server) as third:
        for connection in (first, second, third, first):
            assert ask(connection).status == 200
        with connected(server) as fourth:
            assert ask(fourth).status == 200
            assert receive(second) == b""
            for connection in (first, third, fourth):
                assert ask(connection).status == 200


def test_at_the_connection_limit_requests_in_flight_are_kept(server, slow_hash):
    server.max_connections = 1
    with connected(server) as busy:
        busy.sendall(POST)
        assert slow_hash.started.acquire(timeout=10)
        with connected(server) as other:
            assert receive(other) == b""
        slow_hash.go_on.set()
        assert answer(busy).status == 201
        with connected(server) as another:
            assert ask(another).status == 200
        assert receive(busy) == b""


BEGINNINGS = {
    "half a head": GET[:-2],
    "half a body": POST[:-1],
    "half a chunked body": CHUNKED_HEAD + b"5\r\n",
    "no request line": b"G",
    "lingering": b"nonsense\r\n",
}


@pytest.mark.parametrize("name", BEGINNINGS)
def test_at_the_connection_limit_the_one_that_has_waited_longest_is_closed(server, name):
    """Otherwise connections that never become idle would lock everybody out."""
    server.max_connections = 2
    with contextlib.ExitStack() as stack:
        connections = []
        for number in (1, 2):
            connections.append(stack.enter_context(connected(server)))
            connections[-1].sendall(BEGINNINGS[name])
            until(lambda count=number: len(server.connections) == count and not count_idle(server))
        third = stack.enter_context(connected(server))
        assert ask(third).status == 200
        assert len(server.connections) == 2
        assert statuses(receive(connections[0])) in ([], [400])


def test_without_file_descriptors_the_longest_idle_connection_is_closed(server, monkeypatch):
    with connected(server) as idle:
        assert ask(idle).status == 200
        monkeypatch.setattr(server, "socket", OutOfFiles(server.socket))
        with connected(server) as connection:
            assert ask(connection).status == 200
        assert receive(idle) == b""


def test_without_file_descriptors_and_idle_connections_the_server_pauses(server, monkeypatch):
    """Otherwise it would use all of a core: the waiting connection makes select return at once."""
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    monkeypatch.setattr(server, "socket", OutOfFiles(server.socket))
    with connected(server) as connection:
        assert ask(connection).status == 200
    assert pauses[0] == profiler.ACCEPT_PAUSE


class OutOfFiles:
    """A listening socket that cannot accept the next connection at first."""

    def __init__(self, listener):
        self.listener, self.failed = listener, False

    def __getattr__(self, name):
        return getattr(self.listener, name)

    def accept(self):
        if not self.failed:
            self.failed = True
            raise OSError(errno.EMFILE, "Too many open files")
        return self.listener.accept()


def test_accept_does_not_block_if_the_client_has_gone(server):
    """The connection can be gone between the event and accept()."""

    class Gone:
        """A listening socket of the same kind, whose next client has gone."""

        def accept(self):
            server.socket = listener
            return nobody.accept()

    with connected(server) as first, contextlib.closing(socket.socket()) as nobody:
        assert ask(first).status == 200
        nobody.bind(("127.0.0.1", 0))
        nobody.listen()
        nobody.setblocking(server.socket.getblocking())
        listener, server.socket = server.socket, Gone()
        with connected(server) as second:
            assert ask(first).status == ask(second).status == 200
            assert server.socket is listener


def test_event_of_a_connection_that_waits_for_a_worker_meanwhile_is_ignored(application):
    """It was reported together with 60 others, whose responses are sent first."""
    gate = Gate(application)
    with serving(gate) as server, contextlib.ExitStack() as stack:
        first, *others = [stack.enter_context(connected(server)) for _ in range(61)]
        for connection in (first, *others):
            for _ in range(2):
                assert ask(connection).status == 200
        first.sendall(GET * 2 + get(b"/gate") + POST)
        assert gate.reached.wait(10)
        for connection in others:
            connection.sendall(GET)
        first.sendall(GET)
        gate.opened.set()
        received = answers(first, "GET", "GET", "GET", "POST", "GET")
        assert [response.status for response in received] == [200, 200, 404, 201, 200]
        for connection in others:
            assert answer(connection).status == 200


def test_new_clients_do_not_wait_for_a_client_that_pipelines(application):
    """Several connections are accepted in a round."""
    gate = Gate(application)
    with serving(gate) as server, contextlib.ExitStack() as stack:
        greedy = stack.enter_context(connected(server))
        assert ask(greedy).status == 200
        with held_up(server, gate):
            greedy.sendall(get(b"/greedy") * 200)
            others = [stack.enter_context(connected(server)) for _ in range(30)]
            for connection in others:
                connection.sendall(get(b"/other"))
        for connection in others:
            assert answer(connection).status == 404
        assert {response.status for response in answers(greedy, *["GET"] * 200)} == {404}
    last = max(index for index, path in enumerate(gate.paths) if path == "/other")
    assert gate.paths[:last].count("/greedy") <= 3


class RefusingSelector:
    """Wraps a selector: refuses to watch more than its own two sockets while `refuses`."""

    def __init__(self, selector):
        self.selector, self.refuses = selector, False

    def register(self, *given):
        if self.refuses:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.selector.register(*given)

    def __getattr__(self, name):
        return getattr(self.selector, name)


def test_connection_that_the_selector_refuses_is_closed_and_no_other(server):
    """ENOSPC: fs.epoll.max_user_watches."""
    with connected(server) as first:
        for _ in range(2):
            assert ask(first).status == 200
        server.selector = RefusingSelector(server.selector)
        server.selector.refuses = True
        with connected(server) as second:
            assert receive(second) == b""
        server.selector.refuses = False
        with connected(server) as third:
            assert ask(third).status == ask(first).status == 200


def test_bug_in_one_connection_does_not_end_the_server(server, monkeypatch, capfd):
    monkeypatch.setattr(profiler, "parse_head", lambda head: 1 / 0)
    with connected(server) as first:
        first.sendall(GET)
        assert receive(first) == b""
    monkeypatch.undo()
    with connected(server) as second:
        assert ask(second).status == 200
    until(lambda: "ZeroDivisionError" in capfd.readouterr().err)


def test_event_without_bytes_to_read_closes_no_connection(application):
    """select() may report one."""
    with profiler.Server(socket.AF_INET, ("127.0.0.1", 0), application) as server:
        with connected(server):
            until(lambda: select.select([server.socket], [], [], 0)[0])
            server._accept()
            [connection] = server.connections
            connection._handle_event(profiler.READ)
            assert [*server.connections] == [connection]
        server.stop()
        server.serve()


def test_search_beyond_those_that_may_wait_is_503_and_others_are_served(
    application, users, path, monkeypatch
):
    """Otherwise searches would take all workers, and writes would wait for them."""
    fill(path, 1)
    waiting = threading.Semaphore(0)
    slot = users.slots["search"]

    def enter(limiter, enter=profiler.CapacityLimiter.enter):
        if limiter is slot:
            waiting.release()
        enter(limiter)

    monkeypatch.setattr(profiler.CapacityLimiter, "enter", enter)
    with serving(application) as server, contextlib.ExitStack() as stack:
        searchers = [stack.enter_context(connected(server)) for _ in range(66)]
        other = stack.enter_context(connected(server))
        assert slot.enter_within(0)
        with contextlib.ExitStack() as held:
            held.callback(slot.leave)
            for connection in searchers:
                connection.sendall(get(b"/users/?q=first"))
            for _ in searchers:
                assert waiting.acquire(timeout=10)
            until(lambda: select.select(searchers, [], [], 0)[0])
            assert ask(other, POST).status == 201
            assert ask(other, get(b"/users/?email=user1@example.com")).status == 200
        found = [answer(connection).status for connection in searchers]
    assert sorted(found) == [200] * 64 + [503] * 2


def test_without_threads_a_write_returns_503_and_reads_go_on(
    application, server, monkeypatch, capfd
):
    application.users.ping()
    with connected(server) as connection, connected(server) as reader:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", no_more_threads)
            refused = ask(connection, POST)
            assert (
                refused.status,
                refused.headers["Retry-After"],
                refused.headers["Connection"],
            ) == (
                503,
                "1",
                "close",
            )
            assert ask(reader).json == []
        assert ask(reader, DELETE).status == 204
    log = []
    until(lambda: log.append(capfd.readouterr().err) or any(log))
    assert "".join(log) == "profiler: 503: no worker thread could be started\n"


def test_server_starts_without_threads(application, monkeypatch):
    start = threading.Thread.start

    def fail_but_for_the_server(thread):
        if thread.daemon:
            raise RuntimeError("can't start new thread")
        start(thread)

    application.users.ping()
    monkeypatch.setattr(threading.Thread, "start", fail_but_for_the_server)
    with serving(application, access_log=True) as server, connected(server) as connection:
        assert ask(connection).status == 200


def no_more_threads(thread):
    raise RuntimeError("can't start new thread")


# -- fairness --------------------------------------------------------------------------


def test_many_incomplete_heads_do_not_hold_up_others(server):
    with contextlib.ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(connected(server)).sendall(b"GET /users/ HT")
        with connected(server) as connection:
            assert ask(connection).status == 200


@pytest.mark.usefixtures("small_buffers")
def test_list_that_is_read_slowly_does_not_hold_up_others(server, path):
    fill(path, 20 * profiler.BATCH)
    with slow_reader(server) as slow, connected(server) as other:
        slow.sendall(get(b"/users/", b"Connection: close"))
        assert slow.recv(1) == b"H"
        for _ in range(3):
            assert ask(other, get(b"/users/1/")).status == 200
        assert ask(other, POST).status == 201
        assert receive(slow).endswith(b"]\n\r\n0\r\n\r\n")


def test_list_that_is_read_fast_does_not_hold_up_others(server, users, monkeypatch):
    """The list has no end before the others are answered."""
    answered = threading.Event()
    page = b",".join([b"{}"] * 20_000)
    monkeypatch.setattr(
        users, "page", lambda limit, after=0, *_, **__: (page, None if answered.is_set() else 1)
    )

    with connected(server) as fast, connected(server) as other:
        reader = threading.Thread(target=ask, args=(fast,))
        reader.start()
        try:
            for _ in range(5):
                assert ask(other, get(b"/users/1/")).status == 404
            assert ask(other, DELETE).status == 204
            assert reader.is_alive()
        finally:
            answered.set()
            reader.join()


def test_pipelined_requests_do_not_hold_up_others(application):
    gate = Gate(application)
    with serving(gate) as server, connected(server) as greedy, connected(server) as other:
        for connection in (greedy, other):
            assert ask(connection).status == 200
        with held_up(server, gate):
            greedy.sendall(get(b"/greedy") * 500)
            other.sendall(get(b"/other"))
        assert answer(other).status == 404
        assert {response.status for response in answers(greedy, *["GET"] * 500)} == {404}
    assert gate.paths.count("/greedy") == 500
    assert gate.paths.index("/other") - gate.paths.index("/gate") <= 3


def test_many_clients_that_pipeline_do_not_hold_up_others(application):
    """Their responses fill every group that is sent together."""
    gate = Gate(application)
    with serving(gate) as server, contextlib.ExitStack() as stack:
        greedy = [stack.enter_context(connected(server)) for _ in range(40)]
        others = [stack.enter_context(connected(server)) for _ in range(10)]
        for connection in (*greedy, *others):
            assert ask(connection).status == 200
        with held_up(server, gate):
            for connection in greedy:
                connection.sendall(get(b"/greedy") * 20)
            for connection in others:
                connection.sendall(get(b"/other"))
        for connection in others:
            assert answer(connection).status == 404
        for connection in greedy:
            assert {response.status for response in answers(connection, *["GET"] * 20)} == {404}
    last = max(index for index, path in enumerate(gate.paths) if path == "/other")
    assert gate.paths[:last].count("/greedy") <= 4 * 40


def test_logins_that_wait_for_a_core_leave_workers_for_writes(one_core_server, slow_hash):
    with contextlib.ExitStack() as stack:
        logins = [stack.enter_context(connected(one_core_server)) for _ in range(300)]
        for number, connection in enumerate(logins):
            body = BODY.replace(b"harry", b"h%d" % number)
            connection.sendall(POST_HEAD % len(body) + body)
        assert slow_hash.started.acquire(timeout=10)
        writer = stack.enter_context(connected(one_core_server))
        assert ask(writer, DELETE).status == 204
        slow_hash.go_on.set()


def test_hashing_does_not_hold_up_reads(server, slow_hash):
    with connected(server) as writer, connected(server) as reader:
        writer.sendall(POST)
        assert slow_hash.started.acquire(timeout=10)
        assert ask(reader).status == 200
        slow_hash.go_on.set()
        assert answer(writer).status == 201


def test_read_that_may_have_to_wait_does_not_hold_up_others(server, users, path, monkeypatch):
    """Until the file is open, and without WAL."""
    fill(path, 1)
    execute(path, "PRAGMA journal_mode = DELETE")
    started, go_on = threading.Event(), threading.Event()

    def wait(user_id):
        started.set()
        assert go_on.wait(10)
        return b"{}"

    monkeypatch.setattr(users, "get", wait)
    with connected(server) as waiting, connected(server) as other:
        waiting.sendall(get(b"/users/1/"))
        assert started.wait(10)
        assert ask(other).status == 200
        go_on.set()
        assert answer(waiting).json == {}


@pytest.mark.parametrize(
    "query", ["q=first", "%71=first", "email=user1@example.com", "limit=101", "after=0&limit=999"]
)
def test_long_read_does_not_hold_up_others(server, users, path, monkeypatch, query):
    fill(path, 1)
    started, go_on = threading.Event(), threading.Event()
    page = users.page

    def read_slowly(limit, after=None, descending=False, email=None, text=""):
        if limit > profiler.SHORT_PAGE or email or text:
            started.set()
            assert go_on.wait(10)
        return page(limit, after, descending, email, text)

    monkeypatch.setattr(users, "page", read_slowly)
    with connected(server) as reader, connected(server) as other:
        assert ask(other).status == 200
        reader.sendall(get(b"/users/?" + query.encode()))
        assert started.wait(10)
        assert len(ask(other).json) == 1
        go_on.set()
        assert len(answer(reader).json) == 1


def test_write_lock_of_another_process_does_not_hold_up_reads(server, path):
    with connected(server) as reader, connected(server) as writer:
        assert ask(reader).status == 200
        with locked(path):
            writer.sendall(POST)
            for request in (GET, get(b"/users/1/"), get(b"/users/?q=x"), get(b"/health/")):
                assert ask(reader, request).status == (404 if b"/1/" in request else 200)
            assert not select.select([writer], [], [], 0)[0]
        assert answer(writer).status == 201


def test_file_locked_by_another_process_does_not_hold_up_others(server, path):
    """An exclusive lock without WAL keeps readers out, too."""
    fill(path, 1)
    execute(path, "PRAGMA journal_mode = DELETE")
    with connected(server) as reader, connected(server) as other:
        with locked(path, "BEGIN EXCLUSIVE"):
            reader.sendall(GET)
            assert ask(other, get(b"/x/")).status == 404
            assert not select.select([reader], [], [], 0)[0]
        assert len(answer(reader).json) == 1


@pytest.fixture
def waiting(monkeypatch):
    """An event: a thread has to wait for a core to hash on."""
    event = threading.Event()

    def wait(limiter, wait=profiler.CapacityLimiter._wait):
        event.set()
        wait(limiter)

    monkeypatch.setattr(profiler.CapacityLimiter, "_wait", wait)
    return event


@pytest.fixture
def one_core_server(path, waiting, monkeypatch):
    """A server that hashes one password at a time."""
    monkeypatch.setattr(profiler, "count_cores", lambda: 1)
    application = profiler.Application(profiler.Accounts(profiler.Users(path), ITERATIONS))
    with contextlib.closing(application), serving(application) as server:
        yield server


def test_password_of_a_client_that_waits_for_a_core_is_hashed(one_core_server, waiting, slow_hash):
    with connected(one_core_server) as first, connected(one_core_server) as second:
        first.sendall(POST)
        assert slow_hash.started.acquire(timeout=10)
        second.sendall(POST.replace(b"harry", b"ronny"))
        assert waiting.wait(10)
        slow_hash.go_on.set()
        assert (answer(first).status, answer(second).status) == (201, 201)


# -- log -------------------------------------------------------------------------------


def test_access_log_has_common_log_format_without_control_characters(application, capfd):
    with serving(application, access_log=True) as server, connected(server) as connection:
        connection.sendall(GET + get(b'/\xff"\\') + get(b"/\x9b2J") + get(b"/\x1b[2J"))
        receive(connection)
    first, second, third, fourth = capfd.readouterr().err.splitlines()
    assert re.fullmatch(
        r"127\.0\.0\.1 - - \[\d\d/[A-Z][a-z]{2}/\d{4}(:\d\d){3} [+-]\d{4}\] "
        r'"GET /users/ HTTP/1\.1" 200 3',
        first,
    )
    assert '"GET /\\u00ff\\"\\\\ HTTP/1.1" 404' in second
    assert '"GET /\\u009b2J HTTP/1.1" 404' in third
    assert '"" 400' in fourth


@pytest.mark.parametrize(
    "request_",
    [
        POST_HEAD.replace(b"Content-Length: %d\r\n", b"") + BODY,
        POST_HEAD.replace(b"Content-Length: %d\r\n", b"") + BODY + b"\r\n\r\n",
        POST_HEAD % 3 + BODY,
        POST_HEAD % 3 + BODY + b"\n\n",
        b"GET /users/ HTTP/1.1\nHost: localhost\nAuthorization: Bearer 1234\n\n",
        b"GET /users/ HTTP/1.1\rAuthorization: Bearer 1234\r\n\r\n",
        b"\x16\x03\x011234",
    ],
    ids=[
        "no length",
        "no length, empty line",
        "short length",
        "short length, empty line",
        "LF",
        "CR",
        "TLS",
    ],
)
def test_access_log_has_nothing_but_request_lines(application, capfd, request_):
    """A body whose length the client did not send right is taken for the next request.
    It contains a password."""
    with serving(application, access_log=True) as server, connected(server) as connection:
        connection.sendall(request_)
        assert statuses(receive(connection))[-1] == 400
    log = capfd.readouterr().err
    assert '"" 400' in log
    assert "1234" not in log


def test_access_log_has_no_target_that_is_no_path(application, capfd):
    """It may contain a password."""
    with serving(application, access_log=True) as server, connected(server) as connection:
        connection.sendall(b"GET http://u:secret@localhost/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert statuses(receive(connection)) == [400]
    assert "secret" not in capfd.readouterr().err


def test_idle_connection_keeps_no_response(server, path):
    """Otherwise 20,000 idle connections could take gigabytes."""
    fill(path, 1000)
    with connected(server) as connection:
        assert ask(connection, get(b"/users/?limit=1000")).status == 200
        tracemalloc.start()
        assert ask(connection, get(b"/users/?limit=1000")).status == 200
        until(lambda: count_idle(server))
        kept, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak > 100_000
    assert kept < 50_000


def test_access_log_has_every_request_of_one_selector_round(application, capfd):
    gate = Gate(application)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serving(gate, access_log=True))
        connections = [stack.enter_context(connected(server)) for _ in range(20)]
        for connection in connections:
            assert ask(connection).status == 200
        with held_up(server, gate):
            for number, connection in enumerate(connections):
                connection.sendall(get(b"/%d/" % number) * 3)
        for connection in connections:
            assert [response.status for response in answers(connection, *["GET"] * 3)] == [404] * 3
    logged = collections.Counter(re.findall('"GET /([0-9]+)/ ', capfd.readouterr().err))
    assert logged == {str(number): 3 for number in range(20)}


def test_access_log_shortens_long_request_lines(application, capfd):
    with serving(application, access_log=True) as server, connected(server) as connection:
        assert ask(connection, get(b"/" + b"a" * 7000)).status == 404
    assert 500 < len(capfd.readouterr().err) < 700


def test_tracebacks_do_not_interleave(application, users, capfd, monkeypatch):
    monkeypatch.setattr(users, "delete", lambda *_: 1 / 0)
    with serving(application) as server, contextlib.ExitStack() as stack:
        connections = [stack.enter_context(connected(server)) for _ in range(4)]
        for connection in connections:
            connection.sendall(DELETE * 5)
        for connection in connections:
            assert {response.status for response in answers(connection, *["DELETE"] * 5)} == {500}
    _, *tracebacks = capfd.readouterr().err.split("Traceback (most recent call last):\n")
    assert len(tracebacks) == 20
    assert all(
        traceback.endswith("\nZeroDivisionError: division by zero\n") for traceback in tracebacks
    )


@pytest.mark.parametrize("stderr", [None, io.StringIO()], ids=["none", "without a descriptor"])
def test_server_works_without_a_log(application, monkeypatch, stderr):
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(application.users, "get", lambda user_id: 1 / 0)
    with serving(application, access_log=True) as server, connected(server) as connection:
        for path_info, status in ((b"/users/", 200), (b"/users/1/", 500), (b"/users/", 200)):
            assert ask(connection, get(path_info)).status == status


def test_log_entries_that_wait_are_limited(application, capfd, monkeypatch):
    monkeypatch.setattr(profiler, "MAX_PENDING", 3)
    gate = Gate(application)
    with serving(gate, access_log=True) as server, contextlib.ExitStack() as stack:
        connections = [stack.enter_context(connected(server)) for _ in range(10)]
        with held_up(server, gate):
            for connection in connections:
                connection.sendall(get(b"/x/"))
        for connection in connections:
            assert answer(connection).status == 404
    assert 1 <= capfd.readouterr().err.count("/x/") < 10


# -- graceful shutdown -----------------------------------------------------------------


def test_shutdown_answers_requests_in_flight_and_closes_idle_connections(application, slow_hash):
    with serving(application) as server, connected(server) as idle, connected(server) as busy:
        assert ask(idle).status == 200
        busy.sendall(POST)
        assert slow_hash.started.acquire(timeout=10)
        server.stop()
        assert receive(idle) == b""
        assert server.connections
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(server.server_address)
        slow_hash.go_on.set()
        received = receive(busy)
    assert received.startswith(b"HTTP/1.1 201 ")
    assert b"\r\nConnection: close\r\n" in received


def test_shutdown_answers_a_request_that_has_just_arrived(application):
    gate = Gate(application)
    with serving(gate) as server, connected(server) as connection:
        assert ask(connection).status == 200
        with held_up(server, gate):
            connection.sendall(GET)
            server.stop()
        received = receive(connection)
    assert statuses(received) == [200]
    assert b"\r\nConnection: close\r\n" in received


def test_shutdown_answers_requests_of_connections_that_wait_to_be_accepted(application):
    gate = Gate(application)
    with serving(gate) as server, contextlib.ExitStack() as stack:
        assert ask(stack.enter_context(connected(server))).status == 200
        with held_up(server, gate):
            connections = [stack.enter_context(connected(server)) for _ in range(100)]
            for connection in connections[:50]:
                connection.sendall(GET)
            server.stop()
        for connection in connections[:50]:
            received = receive(connection)
            assert statuses(received) == [200]
            assert b"\r\nConnection: close\r\n" in received
        assert [receive(connection) for connection in connections[50:]] == [b""] * 50


def test_shutdown_answers_what_was_accepted_while_the_deadlines_were_checked(application):
    """A check accepts connections, too. Their deadline is 0 then, but they were not read yet."""
    with serving(application) as server, contextlib.ExitStack() as stack:
        assert ask(stack.enter_context(connected(server))).status == 200
        gate = Gate(application)
        server.application = gate
        with held_up(server, gate):
            connections = [stack.enter_context(connected(server)) for _ in range(150)]
            for connection in connections:
                connection.sendall(GET)
            time.sleep(2 * profiler.CHECK_INTERVAL)
            server.stop()
        assert {tuple(statuses(receive(connection))) for connection in connections} == {(200,)}


def test_shutdown_completes_a_list_and_then_closes_its_connection(server, users, monkeypatch):
    """Its head was sent before, without Connection: close."""
    started, stopped = threading.Event(), threading.Event()

    def page(limit, after=None, *_, **__):
        if after:
            started.set()
            assert stopped.wait(10)
        return b"{}", None if after else 1

    monkeypatch.setattr(users, "page", page)
    monkeypatch.setattr(profiler, "DRAIN_TIMEOUT", 60)
    with connected(server) as connection:
        connection.sendall(GET)
        assert started.wait(10)
        server.stop()
        until(lambda: server.socket.fileno() < 0)
        stopped.set()
        received = receive(connection)
    assert received.endswith(b"]\n\r\n0\r\n\r\n")
    assert b"\r\nConnection: close\r\n" not in received


def test_shutdown_does_not_wait_for_requests_longer_than_its_timeout(
    application, slow_hash, monkeypatch
):
    monkeypatch.setattr(profiler, "DRAIN_TIMEOUT", 0.05)
    with serving(application) as server, connected(server) as connection:
        connection.sendall(POST)
        assert slow_hash.started.acquire(timeout=10)
        server.stop()
        assert receive(connection) == b""
        assert not slow_hash.go_on.is_set()


@needs_reset
@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
def test_shutdown_resets_a_list_that_it_breaks_off(server, users, monkeypatch, version):
    """To an HTTP/1.0 client, the end of the stream would be the end of the list."""
    monkeypatch.setattr(profiler, "DRAIN_TIMEOUT", 0.05)
    monkeypatch.setattr(users, "page", lambda limit, after=None, *_, **__: (b"{}", 1))
    with connected(server) as connection:
        connection.sendall(GET.replace(b"1.1", version))
        assert connection.recv(1) == b"H"
        server.stop()
        receive_until_reset(connection)


@not_on_windows("has no non-blocking pipes")
def test_shutdown_waits_for_the_rest_of_the_log(application, monkeypatch):
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"x" * 4096)
    os.set_blocking(writer, True)
    with os.fdopen(reader, "rb") as log, os.fdopen(writer, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        monkeypatch.setattr(profiler, "LOG_TIMEOUT", 10)
        with serving(application, access_log=True) as server:
            with connected(server) as connection:
                assert ask(connection, get(b"/first/")).status == 404
                until(lambda: not server.log.entries.qsize())
                assert ask(connection, get(b"/last/")).status == 404
            server.stop()
            until(lambda: server.socket.fileno() < 0)
            received = bytearray()

            def has_arrived():
                received.extend(log.read() or b"")
                return b"GET /last/" in received

            until(has_arrived)
