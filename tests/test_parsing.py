"""The server's parser: from the bytes of a request head to a WSGI environ, without a socket."""

from __future__ import annotations

import pytest
from conftest import feed

import profiler

GET = b"GET /users/ HTTP/1.1\r\nHost: localhost\r\n\r\n"


def status_of(head):
    """Return the status with which a request head is rejected."""
    with pytest.raises(profiler.HTTPError) as rejection:
        profiler.parse_head(head)
    return rejection.value.status


def test_head_becomes_a_wsgi_environ():
    """PEP 3333."""
    head = (
        b"PUT /%75sers/1/?a=b%20c HTTP/1.1\r\n"
        b"Host: localhost:80\r\n"
        b"X-Two: a\r\n"
        b"x-two:\tb \r\n"
        b"Content-Length: 2\r\n\r\n"
    )
    assert profiler.parse_head(head) == {
        "REQUEST_METHOD": "PUT",
        "PATH_INFO": "/users/1/",
        "QUERY_STRING": "a=b%20c",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "HTTP_HOST": "localhost:80",
        "HTTP_X_TWO": "a, b",
        "CONTENT_TYPE": "",
        "CONTENT_LENGTH": "2",
    }


@pytest.mark.parametrize(
    "line",
    [
        b"GET  /users/ HTTP/1.1",
        b"GET /users/ HTTP/1.1 ",
        b"GET\t/users/ HTTP/1.1",
        b" GET /users/ HTTP/1.1",
        b"GET /users/\x01 HTTP/1.1",
        b"GET /users/\r HTTP/1.1",
        b"GET /users/\x7f HTTP/1.1",
        b"G@T /users/ HTTP/1.1",
        b"GET users/ HTTP/1.1",
        b"GET /users/ http/1.1",
        b"GET /users/",
        b"",
        b"\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"CONNECT localhost:80 HTTP/1.1",
        b"GET ftp://localhost/users/ HTTP/1.1",
        b"GET http://a@b/users/ HTTP/1.1",
        b"GET http:///users/ HTTP/1.1",
        b"GET http://?a HTTP/1.1",
    ],
)
def test_malformed_request_line_is_rejected(line):
    assert status_of(line + b"\r\nHost: a\r\n\r\n") == 400


@pytest.mark.parametrize("version", [b"0.9", b"1.2", b"1.10", b"2.0", b"3"])
def test_other_http_versions_are_rejected(version):
    assert status_of(b"GET /users/ HTTP/%b\r\nHost: a\r\n\r\n" % version) == 505


def test_http_2_preface_is_rejected():
    assert status_of(b"PRI * HTTP/2.0\r\n\r\n") == 505


@pytest.mark.parametrize(
    "field",
    [
        b"X",
        b": x",
        b"X : a",
        b" X: a",
        b"X@Y: x",
        b"X: a\r\n b",
        b"X: a\rb",
        b"X: a\nY: b",
        b"X: a\x00b",
        b"X: a\x7f",
    ],
)
def test_malformed_header_is_rejected(field):
    assert status_of(b"GET /users/ HTTP/1.1\r\nHost: a\r\n%b\r\n\r\n" % field) == 400


@pytest.mark.parametrize(
    "head", [GET.replace(b"\r\n", b"\n"), GET[:-2] + b"\n", GET[:-4] + b"\n\r\n"]
)
def test_bare_line_feed_is_rejected(head):
    assert profiler.HEAD_END.search(head)
    assert status_of(head) == 400


@pytest.mark.parametrize(
    "fields",
    [b"", b"Host: a\r\nHost: a\r\n", b"Host: a b\r\n", b"Host: a/b\r\n", b"Host: a,b@c\r\n"],
)
def test_missing_repeated_or_malformed_host_is_rejected(fields):
    """RFC 9112 3.2."""
    assert status_of(b"GET /users/ HTTP/1.1\r\n%b\r\n" % fields) == 400


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        (b"Content-Length: 2\r\nContent-Length: 2\r\n", 400),
        (b"Content-Length: 2\r\nContent-Length: 3\r\n", 400),
        (b"Content-Length: 2, 2\r\n", 400),
        (b"Content-Length: +2\r\n", 400),
        (b"Content-Length: -2\r\n", 400),
        (b"Content-Length: 2_0\r\n", 400),
        (b"Content-Length: 0x2\r\n", 400),
        (b"Content-Length:\r\n", 400),
        (b"Content-Length: \xb2\r\n", 400),
        (b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n", 400),
        (b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n", 400),
        (b"Transfer-Encoding: gzip, chunked\r\n", 501),
        (b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n", 501),
        (b"Transfer-Encoding: xchunked\r\n", 501),
        (b"Transfer-Encoding:\r\n", 501),
    ],
)
@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
def test_request_smuggling_is_rejected(fields, status, version):
    """Ambiguous or unsupported framing of the body: RFC 9112 6.1, 6.3 and 11.2."""
    assert status_of(b"POST /users/ HTTP/%b\r\nHost: a\r\n%b\r\n" % (version, fields)) == status


def test_chunked_body_of_http_1_0_is_rejected():
    """RFC 9112 6.1: its framing is faulty."""
    head = b"POST /users/ HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert status_of(head) == 400


def test_huge_content_length_is_rejected():
    """int() raises ValueError for more than 4,300 digits."""
    assert status_of(GET.replace(b"Host", b"Content-Length: %b\r\nHost" % (b"1" * 5000))) == 400


def test_unknown_expectation_is_rejected():
    """RFC 9110 10.1.1; HTTP/1.0 has no Expect."""
    assert status_of(GET.replace(b"Host", b"Expect: a miracle\r\nHost")) == 417
    profiler.parse_head(GET.replace(b"Host", b"Expect: 100-Continue\r\nHost"))
    profiler.parse_head(GET.replace(b"1.1", b"1.0").replace(b"Host", b"Expect: a miracle\r\nHost"))


def test_request_line_of_the_maximum_length_is_accepted():
    path, others = b"/" + b"a" * (profiler.MAX_REQUEST_LINE - 15), b"Host: a\r\n\r\n"
    line = b"GET %b HTTP/1.1\r" % path
    assert len(line) == profiler.MAX_REQUEST_LINE
    assert profiler.parse_head(line + b"\n" + others)["PATH_INFO"] == path.decode()
    assert status_of(line.replace(b"/", b"/a", 1) + b"\n" + others) == 414


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /" + b"a" * profiler.MAX_REQUEST_LINE + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * profiler.MAX_HEAD + b"\r\n\r\n", 431),
        (
            b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: a\r\n" * profiler.MAX_HEADER_FIELDS + b"\r\n",
            431,
        ),
    ],
    ids=["request line", "head", "number of headers"],
)
def test_oversized_head_is_rejected(head, status):
    assert status_of(head) == status


@pytest.mark.parametrize(
    "head",
    [
        GET.replace(b"Host: localhost", b"hOST:\t localhost:80 \t"),
        GET.replace(b"/users/", b"http://localhost/users/"),
        GET.replace(b"/users/", b"HTTP://localhost:80/users/?q"),
        GET.replace(b"/users/", b"/%75sers/?q#\xff"),
        GET.replace(
            b"\r\n\r\n", b"\r\n" + b"X: \xff\r\n" * (profiler.MAX_HEADER_FIELDS - 1) + b"\r\n"
        ),
        GET.replace(b"Host", b"Content-Length: 000\r\nHost"),
        GET.replace(b"Host: localhost", b"Host:"),
        b"GET /users/ HTTP/1.0\r\n\r\n",
    ],
)
def test_unusual_but_valid_head_is_accepted(head):
    environ = profiler.parse_head(head)
    assert (environ["REQUEST_METHOD"], environ["PATH_INFO"]) == ("GET", "/users/")


def test_header_names_with_an_underscore_are_dropped():
    """In an environ, Content_Length would replace Content-Length."""
    environ = profiler.parse_head(
        GET.replace(b"Host", b"Content_Length: 5\r\nTransfer_Encoding: chunked\r\nHost")
    )
    assert environ["CONTENT_LENGTH"] == ""
    assert "HTTP_TRANSFER_ENCODING" not in environ


def test_absolute_target_overrides_host():
    """RFC 9112 3.2.2."""
    head = GET.replace(b"/users/", b"http://evil.example/users/")
    assert profiler.parse_head(head)["HTTP_HOST"] == "evil.example"


def test_path_is_latin_1():
    """PEP 3333: each character stands for a byte."""
    head = GET.replace(b"/users/", b"/%e9%C3%A9/\xe9")
    assert profiler.parse_head(head)["PATH_INFO"] == "/\u00e9\u00c3\u00a9/\u00e9"


def test_asterisk_is_a_target():
    """RFC 9112 3.2.4: OPTIONS * asks about the server."""
    environ = profiler.parse_head(GET.replace(b"GET /users/", b"OPTIONS *"))
    assert (environ["REQUEST_METHOD"], environ["PATH_INFO"]) == ("OPTIONS", "*")


def test_absolute_target_without_a_path_is_the_root():
    """RFC 9110 4.2.3."""
    assert (
        profiler.parse_head(GET.replace(b"/users/", b"http://localhost?a=b"))["PATH_INFO"] == "/"
    )


@pytest.mark.parametrize(
    "head", [GET, GET.replace(b"/users/", b"http://localhost/users/?a=b%20c")]
)
def test_head_is_accepted_however_it_arrives(head):
    for size in range(1, len(head) + 1):
        received = bytearray()
        pieces = (head[start : start + size] for start in range(0, len(head), size))
        assert feed(profiler.take_head(received), received, pieces) == head
    rest = b"POST "
    received = bytearray(head + rest)
    assert feed(profiler.take_head(received), received, iter(())) == head
    assert received == rest


@pytest.mark.parametrize(
    ("beginning", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b"\x00", 400),
        (b"GET /users/ HTTP/1.1 \r", 400),
        (b"\r\n", 400),
        (b"SSH-2.0-OpenSSH_9.2\r\n", 400),
        (b"GET /users/ HTTP/2.0\r\n", 505),
        (b"GET /" + b"a" * profiler.MAX_REQUEST_LINE, 414),
        (b"GET / HTTP/1.1\r\nX: " + b"a" * profiler.MAX_HEAD, 431),
    ],
    ids=["TLS", "NUL", "space", "empty lines", "SSH", "HTTP/2", "request line", "head"],
)
def test_head_that_cannot_become_valid_is_rejected_early(beginning, status):
    received = bytearray(beginning)
    with pytest.raises(profiler.HTTPError) as rejection:
        profiler.parse_head(feed(profiler.take_head(received), received, iter(())))
    assert rejection.value.status == status


# -- chunked bodies --------------------------------------------------------------------


def decode(data, size=1_000_000):
    """Decode a chunked body that arrives in pieces of this size.

    Return it and what follows it, or None if it is incomplete.
    """
    pieces = iter([data[start : start + size] for start in range(0, len(data), size)])
    received = bytearray()
    body = feed(profiler.take_chunked_body(received), received, pieces)
    return None if body is None else (body, bytes(received) + b"".join(pieces))


def status_of_chunks(data):
    """Return the status with which a chunked body is rejected."""
    with pytest.raises(profiler.HTTPError) as rejection:
        decode(data)
    return rejection.value.status


@pytest.mark.parametrize(
    ("data", "body"),
    [
        (b"0\r\n\r\n", b""),
        (b"2\r\n{}\r\n0\r\n\r\n", b"{}"),
        (b"1\r\n{\r\n1\r\n}\r\n0\r\n\r\n", b"{}"),
        (b"A\r\n0123456789\r\n00\r\n\r\n", b"0123456789"),
        (b"009\r\n\r\n\r\n0\r\n\r\n\r\n0\r\n\r\n", b"\r\n\r\n0\r\n\r\n"),
        (b'2;a=b;c="d e"\r\n{}\r\n0;e\r\n\r\n', b"{}"),
        (b"2\r\n{}\r\n0\r\nA: b\r\nC:\r\n\r\n", b"{}"),
    ],
    ids=["empty", "one", "two", "hexadecimal", "line breaks", "extensions", "trailers"],
)
@pytest.mark.parametrize("size", [1, 2, 3, 1000])
@pytest.mark.parametrize("rest", [b"", b"GET / HTTP/1.1\r\n"])
def test_chunked_body_is_decoded_however_it_arrives(data, body, size, rest):
    """RFC 9112 7.1."""
    assert decode(data + rest, size) == (body, rest)
    for end in range(len(data)):
        assert decode(data[:end], size) is None


@pytest.mark.parametrize(
    "line",
    [
        b"\r\n",
        b"x\r\n",
        b"-1\r\n",
        b"+1\r\n",
        b"0x1\r\n",
        b"0_1\r\n",
        b" 1\r\n",
        b"1 \r\n",
        b"\xb2\r\n",
        b";a\r\n",
        b"1;a\0\r\n",
        b"1;a\rb\r\n",
        b"1\r\r\n",
        b"1\n",
    ],
)
def test_malformed_size_of_a_chunk_is_rejected(line):
    """Python's int() accepts some of them."""
    end = b"x\r\n0\r\n\r\n"
    assert decode(b"1\r\n" + end) == (b"x", b"")
    assert status_of_chunks(line + end) == 400


@pytest.mark.parametrize(
    "data",
    [
        b"2\r\n{}\n0\r\n\r\n",
        b"2\r\n{}0\r\n\r\n",
        b"2\r\n{}XX0\r\n\r\n",
        b"0\r\n\n",
        b"0\r\nA\r\n\r\n",
        b"0\r\nA : b\r\n\r\n",
        b"0\r\n A: b\r\n\r\n",
        b"0\r\nA: b\n\r\n",
        b"0\r\nA: b\r\n\n",
        b"0\r\nA: \0\r\n\r\n",
    ],
)
def test_malformed_end_of_a_chunk_or_of_the_body_is_rejected(data):
    """A proxy could see the end of the request elsewhere (RFC 9112 11.2)."""
    assert status_of_chunks(data) == 400


def test_line_of_a_chunk_is_limited():
    line = b"1;" + b"a" * (profiler.MAX_CHUNK_LINE - 4) + b"\r\n"
    assert len(line) == profiler.MAX_CHUNK_LINE
    assert decode(line + b"x\r\n0\r\n\r\n") == (b"x", b"")
    assert status_of_chunks(line.replace(b"a", b"aa", 1)) == 400
    assert status_of_chunks(b"0" * profiler.MAX_CHUNK_LINE) == 400


def test_chunked_body_is_limited():
    """It is rejected before it has arrived."""
    size = profiler.MAX_BODY
    data = b"%x\r\n%b\r\n0\r\n\r\n" % (size, b"x" * size)
    assert decode(data) == (b"x" * size, b"")
    assert status_of_chunks(b"%x\r\n" % (size + 1)) == 413
    assert status_of_chunks(data.replace(b"\r\n0\r\n", b"\r\n1\r\n")) == 413
    assert status_of_chunks(b"f" * 32 + b"\r\n") == 413


def test_many_tiny_chunks_are_rejected():
    """They would cost more time than they bring data."""
    count = profiler.MAX_FRAMING // len(b"1\r\n\r\n")
    data = b"1\r\nx\r\n" * (count - 1) + b"0\r\n\r\n"
    assert decode(data) == (b"x" * (count - 1), b"")
    assert status_of_chunks(b"1\r\nx\r\n" * (count + 1)) == 413


def test_trailers_are_limited():
    assert decode(b"0\r\nA: " + b"b" * (profiler.MAX_HEAD - 7) + b"\r\n\r\n") == (b"", b"")
    assert status_of_chunks(b"0\r\nA: " + b"b" * profiler.MAX_HEAD) == 431
    assert status_of_chunks(b"0\r\n" + b"A: b\r\n" * profiler.MAX_HEAD + b"\r\n") == 431
