"""User accounts over HTTP: a WSGI service on one SQLite file, with nothing but the standard library.

    POST    /users/       create a user                     201 {"id": 1}
    GET     /users/       list every user                   200 [{...}, ...]
    GET     /users/ID/    get one user                      200 {...}
    PUT     /users/ID/    update a user's names and email   200 {"id": 1}
    DELETE  /users/ID/    delete a user                     204

Run it: `python profiler.py` serves http://127.0.0.1:5000/users/ on ./db.sqlite3; `--help` tells the rest.
Embed it: `profiler:application` is the WSGI callable; `create_app()` makes one on another database.
Copy it: this file and schema.sql, side by side, are all of it. Python 3.9 or later.

It is not a login service: it keeps accounts and their password hashes for others to check with
`verify_password`, and knows no sessions, no roles and no mail.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import hmac
import io
import itertools
import json
import os
import re
import secrets
import signal
import socket
import socketserver
import sqlite3
import sys
import threading
import time
import traceback
from http import HTTPStatus
from urllib.parse import parse_qsl, quote, unquote, urlencode
from wsgiref.handlers import format_date_time
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

TYPE_CHECKING = False  # typing's own, which would cost every start its import
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from typing import Any, Callable, NoReturn, Union
    from wsgiref.types import InputStream, StartResponse, WSGIEnvironment

    Headers = tuple[tuple[str, str], ...]
    # A status, a body of JSON (None: there is none; an iterator: of unknown length), and headers beyond the usual.
    Response = tuple[HTTPStatus, Union[bytes, Iterator[bytes], None], Headers]

__version__ = "1.0.0"

# -- configuration -----------------------------------------------------------------------------------------------------
# Every limit of the service, its unit, and its source where it was not chosen here.

HOST, PORT = "127.0.0.1", "5000"  # the tutorial's, which are Flask's
WORKERS = "1"
DATABASE = "db.sqlite3"  # the tutorial's file

ITERATIONS = 600_000  # of PBKDF2-HMAC-SHA256: OWASP Password Storage Cheat Sheet
MAX_ITERATIONS = 10_000_000  # a stored hash that asks for more is refused; two to three seconds of one core
MAX_SCRYPT_COST = 2**20  # n * r * p, hence 128 MiB: the costliest setting that OWASP lists (2**17, 8, 1)
SALT_BYTES = 16  # 128 bits: NIST SP 800-132 5.1

MAX_BODY = 64 * 1024  # bytes
MAX_DIGITS = 4300  # of an integer in a body: CPython's own limit, where it has one
MAX_BRACKETS = 500  # that open an object or an array in a body: a parser's stack carries that many anywhere
MAX_EMAIL = 254  # characters: RFC 5321 4.5.3.1.3, less the angle brackets
MAX_ID = 2**63 - 1  # SQLite's largest integer
MAX_ID_DIGITS = len(str(MAX_ID))

MIN_DATABASE = 512  # bytes: SQLite's smallest page
BUSY_TIMEOUT = 5.0  # seconds that a statement waits for the database's lock: the default of sqlite3.connect
HASH_TIMEOUT = 10.0  # seconds that a request waits for a core to hash on
RETRY_AFTER = 1  # seconds, told to whom either wait was too long
BATCH = 500  # users read from the database at once
MAX_LIMIT = 1000  # users of a page
BEFORE_ALL = -(2**63)  # SQLite's smallest integer

MIN_TOKEN = 16  # characters

# Of the server; seconds, unless they say otherwise.
MAX_CONNECTIONS = 1000  # a thread each
MAX_REFUSALS = 50  # connections past that number, which are told 503
MAX_REQUEST_LINE = 8 * 1024  # bytes: nginx's and Apache's
MAX_HEAD = 32 * 1024  # bytes: nginx's four buffers of 8 KiB
MAX_FIELDS = 100  # of a head: Apache's, and http.client's
MAX_LINGER = 16 * 1024 * 1024  # bytes read, after the answer, of a request that is refused
IDLE_TIMEOUT = 15.0  # between requests
HEAD_TIMEOUT = 15.0  # from the first byte of a head to its last
BODY_TIMEOUT = 30.0  # from the end of the head to that of the body
SEND_TIMEOUT = 60.0  # without the client reading anything: nginx's send_timeout
LINGER_TIMEOUT = 2.0  # without the client sending anything, after the answer
DRAIN_TIMEOUT = 10.0  # for what is in flight when the server is told to stop: what docker stop allows
POLL_INTERVAL = 0.1  # until a stop is noticed
RESPAWN_INTERVAL = 1.0  # from the start of a worker that fails at once to the start of the next
MAX_WORKERS = 256
MAX_PORT = 2**16 - 1


# -- passwords ---------------------------------------------------------------------------------------------------------
# A stored hash tells how it was made: METHOD$SALT$DIGEST, as Werkzeug writes it. The salt's own text is the salt.

_PBKDF2 = re.compile("pbkdf2:sha256:([1-9][0-9]{0,9})")
_SCRYPT = re.compile("scrypt:([1-9][0-9]{0,9}):([1-9][0-9]{0,9}):([1-9][0-9]{0,9})")


def hash_password(password: str, iterations: int = ITERATIONS) -> str:
    """Return what to store for a password: `pbkdf2:sha256:ITERATIONS$SALT$DIGEST`, with a new salt.

    Raise ValueError for a password that holds NUL, and for iterations outside 1..MAX_ITERATIONS.
    """
    method, salt = f"pbkdf2:sha256:{iterations}", secrets.token_hex(SALT_BYTES)
    return f"{method}${salt}${_digest(method, salt, password)}"


def verify_password(password_hash: str, password: str) -> bool:
    """Tell whether a stored hash, Werkzeug's `pbkdf2:sha256` or `scrypt`, is this password's.

    A hash that is malformed, or would cost more than the limits above, is nobody's: False, at once.
    """
    try:
        method, salt, digest = str(password_hash).split("$")
        return hmac.compare_digest(_digest(method, salt, password).encode(), digest.encode())
    except ValueError:
        return False


def _digest(method: str, salt: str, password: str) -> str:
    """Return the digest in hexadecimal; raise ValueError for what is not to be computed."""
    if "\0" in password:  # HMAC pads its key with NUL: "a" and "a\0" would be one password
        raise ValueError("a password cannot hold the NUL character")
    if match := _PBKDF2.fullmatch(method):
        iterations = int(match[1])
        if iterations <= MAX_ITERATIONS:
            return hashlib.pbkdf2_hmac("sha256", password.encode(), salt.encode(), iterations).hex()
    elif match := _SCRYPT.fullmatch(method):
        n, r, p = map(int, match.groups())
        if n * r * p <= MAX_SCRYPT_COST:
            memory = 132 * n * r * p  # bytes: what scrypt needs, with a little to spare, as Werkzeug grants it
            return hashlib.scrypt(password.encode(), salt=salt.encode(), n=n, r=r, p=p, maxmem=memory).hex()
    raise ValueError(f"cannot hash by {method}: pbkdf2:sha256 takes 1 to {MAX_ITERATIONS} iterations")


# -- database ----------------------------------------------------------------------------------------------------------
# Two connections a process: one reads, one writes, and threads take turns. That is faster than a connection for each
# thread: SQLite's calls let go of the GIL, and threads that fight to get it back do little else. Text is handed over as
# the bytes that are stored, for it is on its way into a response.

# Result codes (sqlite.org/rescode.html), which Python names from 3.11 on.
SQLITE_ERROR, SQLITE_BUSY, SQLITE_LOCKED, SQLITE_READONLY, SQLITE_IOERR = 1, 5, 6, 8, 10
SQLITE_FULL, SQLITE_CANTOPEN, SQLITE_PROTOCOL = 13, 14, 15
_UNSHARED = (SQLITE_READONLY, SQLITE_IOERR, SQLITE_CANTOPEN)


class Busy(Exception):
    """The service is at its limit for now: the same request may well succeed in a moment."""


class _Seat:
    """A connection, made when it is first needed, and the lock of the thread that uses it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.connection: sqlite3.Connection | None = None


class _Seats(dict[int, _Seat]):
    """A seat for each process: what is from before a fork is neither used nor closed (sqlite.org/howtocorrupt.html)."""

    def __missing__(self, pid: int) -> _Seat:
        return self.setdefault(pid, _Seat())


class Database:
    """One SQLite file, made at the first use. Threads and, after a fork, processes may share the object."""

    _creating = threading.Lock()

    def __init__(self, path: str) -> None:
        """Take the path of the file. Raise ValueError for a database that would not outlive a connection."""
        if not path or path == ":memory:":
            raise ValueError("the database must be a file: one in memory would end with its connection")
        self.path = os.path.abspath(path)
        self._readers, self._writers = _Seats(), _Seats()

    def read(self, statement: str, parameters: Sequence[Any] = ()) -> list[Any]:
        """Return all rows of a SELECT; no lock and no snapshot outlives the call. Raise Busy, sqlite3.Error."""
        seat = self._readers[os.getpid()]
        if not seat.lock.acquire(True, BUSY_TIMEOUT):
            raise Busy("others are reading the database")
        try:
            if seat.connection is None:
                try:
                    seat.connection = self._connect()
                except sqlite3.OperationalError as error:
                    return self._read_immutable(statement, parameters, error)
            return seat.connection.execute(statement, parameters).fetchall()
        finally:
            seat.lock.release()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Hold the database's write lock; commit at the end of the block, roll back if it raises.

        Raise Busy if this process's other threads, or sqlite3.OperationalError if others, hold it past BUSY_TIMEOUT.
        """
        seat = self._writers[os.getpid()]
        if not seat.lock.acquire(True, BUSY_TIMEOUT):
            raise Busy("others are writing to the database")
        try:
            if seat.connection is None:
                seat.connection = self._connect()
            seat.connection.execute("BEGIN IMMEDIATE")  # what turns into a writer later cannot wait for the lock
            with seat.connection:
                yield seat.connection
        finally:
            if seat.connection and seat.connection.in_transaction:  # neither commit nor rollback succeeded
                seat.connection.close()
                seat.connection = None
            seat.lock.release()

    def close(self) -> None:
        """Close this process's connections; the last of all merges the write-ahead log into the file."""
        for seat in (self._readers[os.getpid()], self._writers[os.getpid()]):
            with seat.lock:
                if seat.connection:
                    seat.connection.close()
                    seat.connection = None

    def _connect(self) -> sqlite3.Connection:
        """Return a new connection to the file, which is made if need be, private to its owner, with the table in it."""
        # Under a lock, because to close a file drops the POSIX locks that this process's connections hold on it.
        with self._creating, contextlib.suppress(OSError):  # SQLite will tell better what is wrong with the place
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        with contextlib.suppress(OSError):  # as above
            if 0 < os.path.getsize(self.path) < MIN_DATABASE:  # of which SQLite would make one
                raise sqlite3.DatabaseError("file is not a database")
        connection = sqlite3.connect(self.path, timeout=0, isolation_level=None, check_same_thread=False)
        try:
            connection.text_factory = bytes
            with contextlib.suppress(sqlite3.OperationalError):  # a read-only place, or others at work: as it is, then
                connection.execute("PRAGMA journal_mode = WAL")
            connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT * 1000:.0f}")
            connection.execute("PRAGMA synchronous = FULL")  # in WAL mode: a commit is on disk before it is answered
            connection.executescript(read_schema())
        except BaseException:
            connection.close()
            raise
        return connection

    def _read_immutable(self, statement: str, parameters: Sequence[Any], error: sqlite3.OperationalError) -> list[Any]:
        """Read where WAL mode's shared memory cannot be made: on a read-only place, a full disk. Else raise the error.

        The file alone must hold all that was committed: a log or a journal beside it would have more.
        """
        code = getattr(error, "sqlite_errorcode", SQLITE_CANTOPEN) & 0xFF
        beside = (self.path + "-wal", self.path + "-journal")
        if code not in _UNSHARED or any(os.path.isfile(path) and os.path.getsize(path) for path in beside):
            raise error
        uri = "file:///" + quote(self.path.replace(os.sep, "/").lstrip("/")) + "?immutable=1"
        try:
            with contextlib.closing(sqlite3.connect(uri, uri=True)) as connection:
                connection.text_factory = bytes
                return connection.execute(statement, parameters).fetchall()
        except sqlite3.Error:
            raise error from None


def read_schema() -> str:
    """Return the text of schema.sql, beside this module in a folder, a wheel or a zip archive. Raise OSError."""
    path = os.path.join(os.path.dirname(__file__), "schema.sql")
    spec = globals().get("__spec__")  # a script has none, and mod_wsgi sets none
    if spec is not None and hasattr(spec.loader, "get_data"):
        return str(spec.loader.get_data(path), "utf-8")
    with open(path, encoding="utf-8") as file:
        return file.read()


# -- users -------------------------------------------------------------------------------------------------------------
# All the SQL there is. SQLite itself writes the JSON, so that a read builds nothing in Python.

_COLUMNS = ("first_name", "last_name", "email", "created_on")  # public, in the order of the answer; after the id
# Cast, for what another program may have written: of a BLOB json_object makes an error, and created_on may be a number.
_JSON = "json_object('id', id, " + ", ".join(f"'{name}', CAST({name} AS TEXT)" for name in _COLUMNS) + ")"
_PLAIN = re.sub("CAST[(]([a-z]+_name|email) AS TEXT[)]", r"\1", _JSON)  # for where there is no BLOB

# A file that the tutorial's service made compares emails with case; asked like this it does not, but has to be scanned.
# An email is asked for as it is given, too: such a file may hold it unfolded.
_TAKEN = 'SELECT 1 FROM "user" AS other WHERE other.email COLLATE NOCASE IN (?, ?)'
_CREATE = f"""INSERT INTO "user" (first_name, last_name, email, password)
SELECT ?, ?, ?, ? WHERE NOT EXISTS ({_TAKEN})"""
_LIST, _LIST_CAST = (
    f"""SELECT group_concat(user, ',') FROM (SELECT {user} AS user FROM "user" WHERE id > ? ORDER BY id LIMIT ?)"""
    for user in (_PLAIN, _JSON)
)
_ID = b'{"id":'
_PAGE = f'SELECT id, {_JSON} FROM "user" WHERE id > ? ORDER BY id LIMIT ?'
_FIND = f'SELECT id, {_JSON} FROM "user" WHERE email COLLATE NOCASE IN (?, ?) AND id > ? ORDER BY id LIMIT ?'
_GET = f'SELECT {_JSON} FROM "user" WHERE id = ?'
_EXISTS = 'SELECT 1 FROM "user" WHERE id = ?'
_UPDATE = f"""UPDATE "user" SET first_name = ?, last_name = ?, email = ?
WHERE id = ? AND (email COLLATE BINARY IN (?, ?) OR NOT EXISTS ({_TAKEN} AND other.id <> "user".id))"""
_DELETE = 'DELETE FROM "user" WHERE id = ?'
_COUNT = 'SELECT count(*) FROM "user"'
_DROP = 'DROP TABLE "user"'


class EmailTaken(Exception):
    """Another user has this email, or one that differs only in case."""


class NoSuchUser(Exception):
    """No user has this id."""


class TableInUse(Exception):
    """The table holds users, whom nobody said to drop."""


class Users:
    """The users in one database. sqlite3.Error and Busy pass through from there."""

    def __init__(self, database: Database, iterations: int, hashers: int) -> None:
        """Hash new passwords with so many iterations, at most `hashers` of them at once."""
        self.database = database
        self._iterations = iterations
        self.hashers = threading.BoundedSemaphore(hashers)

    def create(self, first_name: str, last_name: str, email: str, password: str) -> int:
        """Store a new user and return the id. Raise EmailTaken; Busy, if no core is free to hash the password."""
        emails = (email, _fold(email))
        if self.database.read(_TAKEN, emails):  # before the costly part; the statement itself decides once more
            raise EmailTaken
        password_hash = self._hash(password)
        with self.database.transaction() as connection:
            cursor = connection.execute(_CREATE, (first_name, last_name, emails[1], password_hash, *emails))
            if cursor.rowcount == 0:
                raise EmailTaken
            return cursor.lastrowid or 0

    def list(self, after: int = BEFORE_ALL) -> Iterator[bytes]:
        """Yield the users after an id, as JSON objects with commas between: batch by batch, each a read of its own."""
        while True:
            try:
                [(users,)] = self.database.read(_LIST, (after, BATCH))
            except sqlite3.OperationalError as error:  # of a BLOB; to cast every cell takes some 5 % longer
                if getattr(error, "sqlite_errorcode", SQLITE_ERROR) != SQLITE_ERROR:
                    raise
                [(users,)] = self.database.read(_LIST_CAST, (after, BATCH))
            if users is None:
                return
            last = users[users.rindex(_ID) + len(_ID) :]  # no value holds that: there, a quote has a backslash
            after = int(last[: last.index(b",")])
            yield _utf8(users)

    def page(self, limit: int, after: int = 0, email: str | None = None) -> tuple[bytes, int | None]:
        """Return the first users after an id, and the id after which there are more, or None.

        With an email, only the user who has it counts.
        """
        if email is None:
            rows = self.database.read(_PAGE, (after, limit + 1))
        else:
            rows = self.database.read(_FIND, (email, _fold(email), after, limit + 1))
        last = rows[limit - 1][0] if len(rows) > limit else None
        return _utf8(b",".join(user for _, user in rows[:limit])), last

    def get(self, user_id: int) -> bytes:
        """Return one user as a JSON object. Raise NoSuchUser."""
        rows = self.database.read(_GET, (user_id,))
        if not rows:
            raise NoSuchUser
        return _utf8(rows[0][0])

    def update(self, user_id: int, first_name: str, last_name: str, email: str) -> None:
        """Give a user other names and another email. Raise NoSuchUser, EmailTaken."""
        emails = (email, _fold(email))
        with self.database.transaction() as connection:
            parameters = (first_name, last_name, emails[1], user_id, *emails, *emails)
            if connection.execute(_UPDATE, parameters).rowcount == 0:
                raise EmailTaken if connection.execute(_EXISTS, (user_id,)).fetchone() else NoSuchUser

    def delete(self, user_id: int) -> None:
        """Delete a user, if there is one with this id, which is never used again."""
        with self.database.transaction() as connection:
            connection.execute(_DELETE, (user_id,))

    def count(self) -> int:
        """Return how many users there are."""
        [(count,)] = self.database.read(_COUNT)
        return int(count)

    def initialise(self, force: bool) -> None:
        """Make the table. Raise TableInUse if it holds users, unless forced to drop them."""
        with self.database.transaction() as connection:
            [(count,)] = connection.execute(_COUNT)
            if force:
                connection.execute(_DROP)
                connection.execute(read_schema())  # one statement: executescript would commit first
            elif count:
                raise TableInUse(count)

    def _hash(self, password: str) -> str:
        if not self.hashers.acquire(timeout=HASH_TIMEOUT):
            raise Busy("no core was free to hash a password")
        try:
            return hash_password(password, self._iterations)
        finally:
            self.hashers.release()


def _fold(email: str) -> str:
    """Return the email as it is stored: SQLite's NOCASE folds ASCII's letters, so the others are folded here."""
    if email.isascii():
        return email
    return "".join(next(form for form in (c.casefold(), c.lower(), c) if len(form) == 1) for c in email)


def _utf8(text: bytes) -> bytes:
    """Return the text with U+FFFD for whatever is not UTF-8: a cell written from outside may hold anything."""
    return text if text.isascii() else text.decode("utf-8", "replace").encode()


# -- HTTP --------------------------------------------------------------------------------------------------------------
# What a request may ask and what a response is, whatever it is about.

_OK = HTTPStatus.OK  # once: an enum is slow to find its members
_HEADERS = (  # of every response
    ("X-Content-Type-Options", "nosniff"),
    ("Cache-Control", "no-store"),
)
_DIGITS = re.compile("[0-9]+")  # not \d, which takes the digits of every script
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")  # Unicode's category Cc
_SURROGATE = re.compile("[\ud800-\udfff]")
_EMAIL = re.compile(r"[^@\s]+@[^@\s]+")
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)  # of JSON; the last one may lack its end
_BRACKET = re.compile(rb"[\[{]")


class HTTPError(Exception):
    """A request that is answered with an error: a status, what the client should change, and headers, if any."""

    def __init__(self, status: HTTPStatus, message: str, *headers: tuple[str, str]) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers


def to_json(value: object) -> bytes:
    """Return the value as JSON in UTF-8."""
    return json.dumps(value, ensure_ascii=False).encode()


def read_object(environ: WSGIEnvironment) -> dict[str, Any]:
    """Return the JSON object in the request's body. Raise HTTPError: 400, 408, 411, 413, 415."""
    _check_content_type(environ.get("CONTENT_TYPE", ""))
    body = _read_body(environ)
    if len(_BRACKET.findall(_STRING.sub(b"", body))) > MAX_BRACKETS:  # before the parser, whose stack may be too small
        raise HTTPError(HTTPStatus.BAD_REQUEST, f"The body is nested too deeply: it may have {MAX_BRACKETS} brackets")
    try:
        value = json.loads(body.decode(), parse_int=_parse_int, parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        raise HTTPError(HTTPStatus.BAD_REQUEST, "The body must be UTF-8") from None
    except ValueError as error:
        raise HTTPError(HTTPStatus.BAD_REQUEST, f"The body must be JSON: {error}") from None
    if not isinstance(value, dict):
        raise HTTPError(HTTPStatus.BAD_REQUEST, "The body must be a JSON object")
    return value


def read_fields(environ: WSGIEnvironment, names: Sequence[str]) -> list[str]:
    """Return the named fields of the JSON object in the body. Raise HTTPError: 400, or as read_object does."""
    fields = read_object(environ)
    values: list[Any] = [fields.get(name) for name in names]
    if not all(value.strip() if isinstance(value, str) else value for value in values):
        raise HTTPError(HTTPStatus.BAD_REQUEST, "Required fields are missing")
    for name, value in zip(names, values):
        if problem := _problem(name, value):
            raise HTTPError(HTTPStatus.BAD_REQUEST, f"{name} {problem}")
    return values


def read_query(environ: WSGIEnvironment) -> dict[str, str]:
    """Return the parameters of the query; of those with one name, the last. A + is a +, as RFC 3986 has it."""
    query = environ.get("QUERY_STRING", "").encode("latin-1", "replace").decode("utf-8", "replace")
    return dict(parse_qsl(query.replace("+", "%2B"), keep_blank_values=True))


def parse_length(text: str) -> int:
    """Return the number of bytes that a Content-Length announces (RFC 9110 8.6). Raise HTTPError: 400."""
    if not _DIGITS.fullmatch(text):
        raise HTTPError(HTTPStatus.BAD_REQUEST, "Content-Length must be a number in decimal digits")
    return int(text.lstrip("0")[:19] or "0")  # past every limit after so many digits; int() refuses thousands of them


def _check_content_type(content_type: str) -> None:
    media_type, *parameters = content_type.lower().split(";")
    named = [parameter.replace('"', "").split("=", 1) for parameter in parameters]
    is_utf8 = all(value.strip() == "utf-8" for name, *values in named if name.strip() == "charset" for value in values)
    if media_type.strip() != "application/json" or not is_utf8:
        raise HTTPError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "Send the body as Content-Type: application/json, in UTF-8")


def _read_body(environ: WSGIEnvironment) -> bytes:
    """Return the body, whose end is told by Content-Length or, where the server says that it is, by the stream."""
    chunked = "HTTP_TRANSFER_ENCODING" in environ
    terminated = environ.get("wsgi.input_terminated", False)
    if chunked and not terminated:
        raise HTTPError(HTTPStatus.LENGTH_REQUIRED, "This server takes no chunked body: send a Content-Length")
    text = "" if chunked else environ.get("CONTENT_LENGTH", "")
    size = parse_length(text) if text else MAX_BODY + 1 if terminated else 0
    body = b"" if text and size > MAX_BODY else _read(environ["wsgi.input"], size)
    if size > MAX_BODY and (text or len(body) == size):
        raise HTTPError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"The body must be at most {MAX_BODY} bytes")
    if text and len(body) < size:
        raise HTTPError(HTTPStatus.BAD_REQUEST, "The body is shorter than its Content-Length")
    return body


def _read(stream: InputStream, size: int) -> bytes:
    """Return so many bytes of the stream, or fewer at its end."""
    chunks = []
    try:
        while size and (chunk := stream.read(size)):
            chunks.append(chunk)
            size -= len(chunk)
    except socket.timeout:
        raise HTTPError(HTTPStatus.REQUEST_TIMEOUT, "The body took too long to arrive") from None
    except Exception:  # servers raise errors of their own for a client that leaves or breaks its chunks
        raise HTTPError(HTTPStatus.BAD_REQUEST, "The body could not be read to its end") from None
    return b"".join(chunks)


def _parse_int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"an integer has more than {MAX_DIGITS} digits")
    return int(digits)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _problem(name: str, value: object) -> str | None:
    """Tell what is wrong with the value of a field, if anything."""
    if not isinstance(value, str):
        return "must be a string"
    if _SURROGATE.search(value):
        return "must not contain a lone surrogate"
    if name == "password":
        return "must not contain the NUL character" if "\0" in value else None
    if _CONTROL.search(value):
        return "must not contain control characters"
    if name == "email" and not (_EMAIL.fullmatch(value) and len(value) <= MAX_EMAIL):
        return f"must be an address such as harry@example.com, of at most {MAX_EMAIL} characters"
    return None


# -- endpoints ---------------------------------------------------------------------------------------------------------
# Each takes the users, the request and, if its path has one, the digits of a user's id. Each raises HTTPError for a bad
# request, and what the users raise.

_PROFILE = ("first_name", "last_name", "email")


def create_user(users: Users, environ: WSGIEnvironment) -> Response:
    """Answer 201 with the new id, and where the user is to be found."""
    user_id = users.create(*read_fields(environ, (*_PROFILE, "password")))
    return HTTPStatus.CREATED, to_json({"id": user_id}), (("Location", _url(environ, f"{user_id}/")),)


def list_users(users: Users, environ: WSGIEnvironment) -> Response:
    """Answer 200 with an array of all users, or of those that the query's limit, after and email ask for."""
    query = read_query(environ)
    limit, after = _number(query, "limit", 1, MAX_LIMIT), _number(query, "after", 0, MAX_ID)
    email = query.get("email")
    if email is not None and (problem := _problem("email", email)):
        raise HTTPError(HTTPStatus.BAD_REQUEST, f"email {problem}")
    if limit is None and email is None:
        return _stream(users.list(BEFORE_ALL if after is None else after))
    page, last = users.page(limit or MAX_LIMIT, after or 0, email)
    following = {"limit": limit or MAX_LIMIT, "after": last, **({"email": email} if email else {})}
    link = ("Link", f'<{_url(environ)}?{urlencode(following)}>; rel="next"')  # RFC 8288
    return _OK, b"[%b]" % page, () if last is None else (link,)


def get_user(users: Users, environ: WSGIEnvironment, digits: str) -> Response:
    """Answer 200 with the user."""
    return _OK, users.get(_user_id(digits)), ()


def update_user(users: Users, environ: WSGIEnvironment, digits: str) -> Response:
    """Answer 200 with the id. A password in the body is ignored, as any other field is."""
    user_id = _user_id(digits)
    users.update(user_id, *read_fields(environ, _PROFILE))
    return _OK, to_json({"id": user_id}), ()


def delete_user(users: Users, environ: WSGIEnvironment, digits: str) -> Response:
    """Answer 204, whether the user existed or not."""
    users.delete(_user_id(digits))
    return HTTPStatus.NO_CONTENT, None, ()


def _stream(batches: Iterator[bytes]) -> Response:
    """Return an array that is sent as it is read, unless one batch is all of it."""
    first = list(itertools.islice(batches, 2))
    if len(first) < 2:
        return _OK, b"[%b]" % b"".join(first), ()
    return _OK, _array(itertools.chain(first, batches)), ()


def _array(batches: Iterable[bytes]) -> Iterator[bytes]:
    start = b"["
    for batch in batches:
        yield start + batch
        start = b","
    yield b"]"


def _url(environ: WSGIEnvironment, rest: str = "") -> str:
    """Return the path of the users, or of one, below the mount point."""
    mount_point = quote(environ.get("SCRIPT_NAME", ""), encoding="latin-1")
    return "/" + f"{mount_point}/users/{rest}".lstrip("/")  # two slashes would lead to another host


def _number(query: dict[str, str], name: str, low: int, high: int) -> int | None:
    """Return the number that a parameter of the query gives, if it does. Raise HTTPError: 400."""
    text = query.get(name)
    if text is None:
        return None
    if not _DIGITS.fullmatch(text) or len(text) > len(str(high)) or not low <= int(text) <= high:
        raise HTTPError(HTTPStatus.BAD_REQUEST, f"{name} must be a number from {low} to {high}")
    return int(text)


def _user_id(digits: str) -> int:
    if len(digits) > MAX_ID_DIGITS or (user_id := int(digits)) > MAX_ID:
        raise NoSuchUser
    return user_id


ROUTES: tuple[tuple[re.Pattern[str], dict[str, Callable[..., Response]]], ...] = (
    (re.compile("/users/?"), {"GET": list_users, "POST": create_user}),
    (re.compile("/users/([0-9]+)/?"), {"GET": get_user, "PUT": update_user, "DELETE": delete_user}),
)


# -- application -------------------------------------------------------------------------------------------------------
# PEP 3333. Here alone errors become responses, and tracebacks are written.

_ERRORS = {
    EmailTaken: HTTPError(HTTPStatus.BAD_REQUEST, "This email is already registered"),
    NoSuchUser: HTTPError(HTTPStatus.NOT_FOUND, "Invalid user id"),
    Busy: HTTPError(
        HTTPStatus.SERVICE_UNAVAILABLE, "The service is busy: try again", ("Retry-After", str(RETRY_AFTER))
    ),
}
# What may pass, or be mended. Any other code is somebody's mistake.
_SQLITE_ERRORS = {
    SQLITE_BUSY: _ERRORS[Busy],
    SQLITE_LOCKED: _ERRORS[Busy],
    SQLITE_PROTOCOL: _ERRORS[Busy],
    SQLITE_READONLY: HTTPError(HTTPStatus.SERVICE_UNAVAILABLE, "The database is read-only"),
    SQLITE_IOERR: HTTPError(HTTPStatus.SERVICE_UNAVAILABLE, "The disk of the database failed"),
    SQLITE_FULL: HTTPError(HTTPStatus.SERVICE_UNAVAILABLE, "The disk of the database is full"),
    SQLITE_CANTOPEN: HTTPError(HTTPStatus.SERVICE_UNAVAILABLE, "The database cannot be opened"),
}
_INTERNAL_ERROR = HTTPError(HTTPStatus.INTERNAL_SERVER_ERROR, "Internal server error")
_STATUS_LINES = {status: f"{status.value} {status.phrase}" for status in HTTPStatus}
_JSON_HEADERS = (*_HEADERS, ("Content-Type", "application/json"))
_BEARER = ("WWW-Authenticate", "Bearer")  # RFC 6750 3
_VISIBLE = re.compile("[!-~]+")


class Application:
    """The WSGI callable. Make it with create_app; any number of threads may call it."""

    def __init__(self, users: Users, token: str | None) -> None:
        """Serve these users, to whoever sends the token, if there is one."""
        self.users = users
        self.token = None if token is None else token.encode()

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer a request. Nothing that goes wrong before the response starts is left to the server."""
        try:
            response = self._respond(environ)
        except Exception as error:
            response = _error_response(error, environ)
        return _send(response, environ, start_response)

    def close(self) -> None:
        """Close the database. The next request opens it again."""
        self.users.database.close()

    def _respond(self, environ: WSGIEnvironment) -> Response:
        """Return the response of the path's handler for the method. Raise what it raises; HTTPError: 401, 404, 405."""
        if self.token is not None and not _carries(self.token, environ.get("HTTP_AUTHORIZATION", "")):
            raise HTTPError(HTTPStatus.UNAUTHORIZED, "Send the header Authorization: Bearer TOKEN", _BEARER)
        method, path = environ["REQUEST_METHOD"], environ.get("PATH_INFO", "")
        for pattern, handlers in ROUTES:
            if match := pattern.fullmatch(path):
                if handler := handlers.get("GET" if method == "HEAD" else method):
                    return handler(self.users, environ, *match.groups())
                allow = ("Allow", ", ".join(sorted((*handlers, "HEAD", "OPTIONS"))))
                if method == "OPTIONS":
                    return HTTPStatus.NO_CONTENT, None, (allow,)
                raise HTTPError(HTTPStatus.METHOD_NOT_ALLOWED, f"The method must be one of: {allow[1]}", allow)
        raise HTTPError(HTTPStatus.NOT_FOUND, "Nothing is here: the users are at /users/")


def create_app(
    database: str | os.PathLike[str] | None = None, *, iterations: int = ITERATIONS, token: str | None = None
) -> Application:
    """Return a WSGI application on a database: a path, else PROFILER_DATABASE, else db.sqlite3 in the current folder.

    The file is made at the first request. `iterations` are those of PBKDF2 for new passwords. With a token, else with
    PROFILER_TOKEN, every request must carry it (RFC 6750); without, all are let in.
    Raise ValueError for a database that is no file, iterations outside 1..MAX_ITERATIONS, a token that is too short.
    """
    if not 1 <= iterations <= MAX_ITERATIONS:
        raise ValueError(f"iterations must be a number from 1 to {MAX_ITERATIONS}")
    if database is None:
        database = os.environ.get("PROFILER_DATABASE") or DATABASE
    if token is None:
        token = os.environ.get("PROFILER_TOKEN")
    if token is not None and not (len(token) >= MIN_TOKEN and _VISIBLE.fullmatch(token)):
        raise ValueError(f"the token must be at least {MIN_TOKEN} characters of visible ASCII, without spaces")
    return Application(Users(Database(os.fspath(database)), iterations, _cores()), token)


@functools.cache
def _default_app() -> Application:
    return create_app()


def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """Answer as create_app() does, which is called at the first request: to import this module reads nothing."""
    try:
        default_app = _default_app()
    except ValueError as error:
        return _send(_error_response(error, environ), environ, start_response)
    return default_app(environ, start_response)


app = application


def _send(response: Response, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """Start the response and return its body."""
    status, body, extra = response
    if isinstance(body, bytes):
        start_response(_STATUS_LINES[status], [*_JSON_HEADERS, ("Content-Length", str(len(body))), *extra])
        return () if environ["REQUEST_METHOD"] == "HEAD" else (body,)
    start_response(_STATUS_LINES[status], [*(_HEADERS if body is None else _JSON_HEADERS), *extra])
    return () if body is None or environ["REQUEST_METHOD"] == "HEAD" else body


def _carries(token: bytes, authorization: str) -> bool:
    """Tell whether an Authorization header carries the token (RFC 6750 2.1)."""
    scheme, _, credentials = authorization.partition(" ")
    given = credentials.strip(" ").encode("utf-8", "surrogatepass")
    return scheme.lower() == "bearer" and hmac.compare_digest(given, token)


def _error_response(error: Exception, environ: WSGIEnvironment) -> Response:
    """Return what to tell the client; write to wsgi.errors what to tell the operator."""
    answer = error if isinstance(error, HTTPError) else _ERRORS.get(type(error))
    if isinstance(error, sqlite3.OperationalError):
        # Python 3.9 and 3.10 do not tell the code: there, whatever it is may pass.
        answer = _SQLITE_ERRORS.get(getattr(error, "sqlite_errorcode", SQLITE_BUSY) & 0xFF)
    with contextlib.suppress(OSError):  # a log that cannot be written to
        if answer is None:
            traceback.print_exception(type(error), error, error.__traceback__, file=environ["wsgi.errors"])
        elif answer.status == HTTPStatus.SERVICE_UNAVAILABLE:
            environ["wsgi.errors"].write(f"profiler: {answer.message}: {error}\n")
    answer = answer or _INTERNAL_ERROR
    return answer.status, to_json({"error": answer.message}), answer.headers


def _cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# -- server ------------------------------------------------------------------------------------------------------------
# wsgiref's server and handler, made fit to be left running: HTTP/1.1, a thread for each connection, a deadline for each
# wait, and a reader that refuses, and closes, wherever a proxy in front might read the same bytes otherwise (RFC 9112
# 11.2). It serves the Application above, which takes no body past MAX_BODY and starts each response once.

_NAME = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # RFC 9110 5.6.2
_REQUEST_LINE = re.compile(rb"(%s) ([\x21-\x7e\x80-\xff]+) HTTP/([0-9A-Za-z.]+)\r\n" % _NAME)  # RFC 9112 3
# No space before the colon, no folding, no bare CR or LF, no control character: RFC 9112 5.1, 5.2, 2.2; RFC 9110 5.5.
_FIELD_LINE = re.compile(rb"(%s):([\t\x20-\x7e\x80-\xff]*)\r\n" % _NAME)
_AUTHORITY = re.compile(r"https?://[^/?#]+", re.IGNORECASE)  # of an absolute target: RFC 9112 3.2.2
_HOST = re.compile(r"[A-Za-z0-9._~!$&'()*+,;=:%\[\]-]*")  # RFC 9110 7.2
_BASE_ENVIRON: dict[str, Any] = {  # PEP 3333
    "wsgi.version": (1, 0),
    "wsgi.url_scheme": "http",
    "wsgi.multithread": True,
    "wsgi.multiprocess": True,
    "wsgi.run_once": False,
}
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Server(socketserver.ThreadingMixIn, WSGIServer):
    """An HTTP server for an Application. An instance may have other timeouts, and another limit of connections."""

    daemon_threads = True
    request_queue_size = max_connections = MAX_CONNECTIONS
    idle_timeout, head_timeout, body_timeout = IDLE_TIMEOUT, HEAD_TIMEOUT, BODY_TIMEOUT
    send_timeout, drain_timeout = SEND_TIMEOUT, DRAIN_TIMEOUT

    def __init__(self, host: str, port: int, app: Application, access_log: bool = True) -> None:
        """Listen on the first of the host's addresses. Raise OSError if that cannot be."""
        self.address_family, _, _, _, address = socket.getaddrinfo(host.encode(), port, type=socket.SOCK_STREAM)[0]
        self.app = app
        self.access_log = access_log
        self.draining = False
        self.supervisor: int | None = None  # the process that this one is a worker of
        self.connections: dict[socket.socket, bool] = {}  # each with whether a request is being answered
        self._closed = threading.Condition()
        super().__init__((str(address[0]), int(address[1])), RequestHandler)
        self.socket.setblocking(False)  # another worker may have been quicker to accept

    def server_bind(self) -> None:
        """Bind the socket, without asking a name service what this host is called."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()
        self.base_environ.update(_BASE_ENVIRON)

    def service_actions(self) -> None:
        """End a worker whose supervisor was killed."""
        if self.supervisor not in (None, os.getppid()):
            os.kill(os.getpid(), signal.SIGTERM)

    def get_request(self) -> Any:
        """Accept a connection. Raise OSError: after a pause if the system is out of means, such as files to open."""
        try:
            return super().get_request()
        except OSError as error:
            if not isinstance(error, BlockingIOError):
                time.sleep(POLL_INTERVAL)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give a connection a thread: also one too many, to be told so, as long as there are not many of those."""
        self.connections[request] = False
        try:
            if len(self.connections) > self.max_connections + MAX_REFUSALS:
                raise RuntimeError("too many connections even to be told")
            super().process_request(request, client_address)
        except RuntimeError:  # also threading's own, where the system has no more threads
            self.shutdown_request(request)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection and forget it."""
        super().shutdown_request(request)
        with self._closed:
            self.connections.pop(request, None)
            self._closed.notify_all()

    def drain(self) -> None:
        """Accept no more, end the idle connections, and wait for the others, up to drain_timeout."""
        self.draining = True
        self.socket.close()
        for request, answering in list(self.connections.items()):
            if not answering:
                with contextlib.suppress(OSError):
                    request.shutdown(socket.SHUT_RD)  # its thread reads the end, behind whatever had arrived
        with self._closed:
            self._closed.wait_for(lambda: not self.connections, self.drain_timeout)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Write the traceback of what nobody expected to stderr, in one piece."""
        sys.stderr.write(traceback.format_exc())


class RequestHandler(WSGIRequestHandler):
    """One connection: its requests, one after another."""

    server: Server

    def setup(self) -> None:
        """Prepare to receive within deadlines, and to send without delay."""
        self.connection: socket.socket = self.request
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        self.receiver = _Receiver(self.connection)
        self.stream = io.BufferedReader(self.receiver)
        self.close_connection = False
        self.requestline = ""

    def handle(self) -> None:
        """Answer requests until either side wants no more."""
        with contextlib.suppress(OSError):  # the client has left, or stalls: there is nobody to tell
            if len(self.server.connections) > self.server.max_connections:
                self._refuse(_ERRORS[Busy])
            while not self.close_connection:
                self.handle_one_request()
            self._linger()

    def finish(self) -> None:
        """Leave it to the server to close the connection."""

    def handle_one_request(self) -> None:
        """Read a request and answer it. Raise OSError if the client is not there."""
        self.receiver.set_timeout(self.server.idle_timeout)
        if not self.stream.peek(1):
            self.close_connection = True
            return
        self.receiver.set_timeout(self.server.head_timeout)
        self.requestline = ""
        try:
            environ = self._read_head()
            self.server.connections[self.connection] = True
            self.receiver.set_timeout(self.server.body_timeout)
            environ["wsgi.input"] = io.BytesIO(self._read_body(environ))
        except socket.timeout:
            self._refuse(HTTPError(HTTPStatus.REQUEST_TIMEOUT, "The request took too long to arrive"))
        except HTTPError as error:
            self._refuse(error)
        else:
            self._answer(environ)
            self.server.connections[self.connection] = False
            if self.server.draining:  # perhaps too late for the response to say that it is the last
                self.close_connection = True

    def send(self, message: bytes) -> None:
        """Send it all, however slowly the client reads, as long as it does read. Raise OSError if not."""
        self.connection.settimeout(self.server.send_timeout)
        view = memoryview(message)
        while view:
            view = view[self.connection.send(view) :]

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Write a line in Common Log Format to stderr."""
        if self.server.access_log:
            with contextlib.suppress(OSError):
                request = self.requestline.encode("unicode_escape").decode().replace('"', '\\"')
                moment = _clock(int(time.time()))[1]
                sys.stderr.write(f'{self.client_address[0]} - - [{moment}] "{request}" {int(code)} {size}\n')

    def _read_head(self) -> WSGIEnvironment:
        """Return the environ of the next request. Raise HTTPError for what is not plainly HTTP/1; socket.timeout."""
        line = self._read_line(MAX_REQUEST_LINE, HTTPStatus.REQUEST_URI_TOO_LONG)
        if line == b"\r\n":  # RFC 9112 2.2: one left behind by the request before is passed over
            line = self._read_line(MAX_REQUEST_LINE, HTTPStatus.REQUEST_URI_TOO_LONG)
        self.requestline = line.decode("latin-1").rstrip("\r\n")
        environ = {**self.server.base_environ, **_parse_request_line(line), "REMOTE_ADDR": self.client_address[0]}
        left = MAX_HEAD - len(line)
        for count in itertools.count():
            line = self._read_line(left, HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
            if line == b"\r\n":
                break
            if count == MAX_FIELDS:
                raise HTTPError(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"Send at most {MAX_FIELDS} headers")
            _add_field(environ, line)
            left -= len(line)
        environ["CONTENT_TYPE"] = environ.pop("HTTP_CONTENT_TYPE", "")
        environ["CONTENT_LENGTH"] = environ.pop("HTTP_CONTENT_LENGTH", "")
        _check_framing(environ)
        return environ

    def _read_line(self, limit: int, status: HTTPStatus) -> bytes:
        line = self.stream.readline(limit + 1)
        if len(line) > limit:
            raise HTTPError(status, f"Send a request line of at most {MAX_REQUEST_LINE} bytes, a head of {MAX_HEAD}")
        return line

    def _refuse(self, error: HTTPError) -> None:
        """Answer with an error, as the last thing on this connection."""
        self.close_connection = True
        self.send(_error_message(error))
        self.log_request(error.status)

    def _read_body(self, environ: WSGIEnvironment) -> bytes:
        """Return the body, or none of one that the application refuses. Raise HTTPError: 400; socket.timeout."""
        length = parse_length(environ["CONTENT_LENGTH"] or "0")
        if length > MAX_BODY:
            self.close_connection = True
            return b""
        if length and "HTTP_EXPECT" in environ and environ["SERVER_PROTOCOL"] == "HTTP/1.1":
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n")  # RFC 9110 10.1.1
        body = self.stream.read(length)
        if len(body) < length:
            raise HTTPError(HTTPStatus.BAD_REQUEST, "The body is shorter than its Content-Length")
        return body

    def _answer(self, environ: WSGIEnvironment) -> None:
        """Send what the application answers (PEP 3333). If that fails midway, the response has no proper end."""
        environ["wsgi.errors"] = sys.stderr
        started: list[Any] = []
        result = self.server.app(environ, lambda *arguments: started.extend(arguments))  # type: ignore[arg-type]
        status, headers = started
        size = 0
        try:
            head, chunked = self._make_head(status, headers, environ)
            for part in filter(None, result):
                self.send(head + (b"%x\r\n%b\r\n" % (len(part), part) if chunked else part))  # RFC 9112 7.1
                head = b""
                size += len(part)
            self.send(head + (b"0\r\n\r\n" if chunked else b""))
        finally:
            self.log_request(status[:3], size)

    def _make_head(self, status: str, headers: list[Any], environ: WSGIEnvironment) -> tuple[bytes, bool]:
        """Return the head of a response, and whether its body is chunked. Settle whether the connection goes on."""
        modern = environ["SERVER_PROTOCOL"] == "HTTP/1.1"
        bodiless = environ["REQUEST_METHOD"] == "HEAD" or status.startswith("204")
        chunked = modern and not bodiless and "Content-Length" not in dict(headers)
        if chunked:
            headers.append(("Transfer-Encoding", "chunked"))
        options = environ.get("HTTP_CONNECTION", "").lower().replace(" ", "").split(",")
        if self.close_connection or not modern or "close" in options or self.server.draining:
            self.close_connection = True
            headers.append(("Connection", "close"))
        return _head(status, headers), chunked

    def _linger(self) -> None:
        """Read on for a while (RFC 9112 9.6): if bytes are unread at the close, TCP takes the answer back."""
        self.connection.shutdown(socket.SHUT_WR)
        deadline, left = time.monotonic() + self.server.body_timeout, MAX_LINGER
        self.connection.settimeout(LINGER_TIMEOUT)
        while left > 0 and time.monotonic() < deadline and (received := self.connection.recv(MAX_BODY)):
            left -= len(received)


class _Receiver(io.RawIOBase):
    """The receiving side of a socket, with a deadline for the sum of all waits."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._deadline = 0.0

    def set_timeout(self, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise socket.timeout("the deadline has passed")
        self._connection.settimeout(left)
        return self._connection.recv_into(buffer)


def _parse_request_line(line: bytes) -> WSGIEnvironment:
    """Return what the first line of a request says. Raise HTTPError: 400, 505."""
    match = _REQUEST_LINE.fullmatch(line)
    if not match:
        raise HTTPError(HTTPStatus.BAD_REQUEST, "The request line must be `METHOD /path HTTP/1.1`")
    method, target, version = (part.decode("latin-1") for part in match.groups())
    if version not in ("1.0", "1.1"):  # RFC 9110 15.6.6
        raise HTTPError(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "Speak HTTP/1.1 or HTTP/1.0")
    if target[0] != "/" and target != "*":
        authority = _AUTHORITY.match(target)
        if not authority:
            raise HTTPError(HTTPStatus.BAD_REQUEST, "The request target must be a path")
        target = target[authority.end() :]
    path, _, query = target.partition("?")
    path = unquote(path, "latin-1")
    return {"REQUEST_METHOD": method, "PATH_INFO": path, "QUERY_STRING": query, "SERVER_PROTOCOL": f"HTTP/{version}"}


def _add_field(environ: WSGIEnvironment, line: bytes) -> None:
    """Add a header to an environ. Raise HTTPError: 400."""
    match = _FIELD_LINE.fullmatch(line)
    if not match:
        raise HTTPError(HTTPStatus.BAD_REQUEST, "A header must be one line, `Name: value`, without control characters")
    name, value = match[1].decode().upper(), match[2].decode("latin-1").strip(" \t")
    if "_" in name:  # in an environ it would pass for the name with a hyphen
        return
    key = "HTTP_" + name.replace("-", "_")
    if key == "HTTP_CONTENT_LENGTH":
        parse_length(value)
    if key in environ:
        if key in ("HTTP_HOST", "HTTP_CONTENT_LENGTH"):  # RFC 9112 3.2, 6.3; even if both are equal
            raise HTTPError(HTTPStatus.BAD_REQUEST, f"Send one {name.title()}")
        value = f"{environ[key]}, {value}"  # RFC 9110 5.3
    environ[key] = value


def _check_framing(environ: WSGIEnvironment) -> None:
    """Refuse a request about whose addressee or end there may be two opinions. Raise HTTPError: 400, 411, 417, 501."""
    modern = environ["SERVER_PROTOCOL"] == "HTTP/1.1"
    if not _HOST.fullmatch(environ.get("HTTP_HOST", "no host" if modern else "")):  # RFC 9112 3.2
        raise HTTPError(HTTPStatus.BAD_REQUEST, "Send one Host, such as localhost:5000")
    if modern and environ.get("HTTP_EXPECT", "100-continue").lower() != "100-continue":  # RFC 9110 10.1.1
        raise HTTPError(HTTPStatus.EXPECTATION_FAILED, "The only Expect that can be met is 100-continue")
    if "HTTP_TRANSFER_ENCODING" in environ:  # RFC 9112 6.1 and 6.3
        if environ["CONTENT_LENGTH"]:
            raise HTTPError(HTTPStatus.BAD_REQUEST, "Send either a Content-Length or a Transfer-Encoding")
        if environ["HTTP_TRANSFER_ENCODING"].lower() == "chunked":
            raise HTTPError(HTTPStatus.LENGTH_REQUIRED, "This server takes no chunked body: send a Content-Length")
        raise HTTPError(HTTPStatus.NOT_IMPLEMENTED, "This server knows no Transfer-Encoding: send a Content-Length")


def _error_message(error: HTTPError) -> bytes:
    """Return a whole response, the last one of its connection."""
    response = error.status, to_json({"error": error.message}), (*error.headers, ("Connection", "close"))
    started: list[Any] = []
    body = _send(response, {"REQUEST_METHOD": ""}, lambda *arguments: started.extend(arguments))  # type: ignore[arg-type]
    return _head(*started) + b"".join(body)


def _head(status: str, headers: Iterable[tuple[str, str]]) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Date: {_clock(int(time.time()))[0]}", f"Server: profiler/{__version__}"]
    lines += [f"{name}: {value}" for name, value in headers]
    return "\r\n".join([*lines, "\r\n"]).encode("latin-1")


@functools.lru_cache(maxsize=1)
def _clock(second: int) -> tuple[str, str]:
    """Return a time as the Date header has it, and as Common Log Format does."""
    return format_date_time(second), time.strftime("%d/%b/%Y:%H:%M:%S %z", time.localtime(second))


def serve(server: Server) -> None:
    """Serve until SIGTERM or SIGINT; then answer what is in flight, within the server's drain_timeout."""

    def stop(*_: object) -> None:
        threading.Thread(target=server.shutdown).start()  # it waits for this thread, so it needs another

    for signum in _SIGNALS:
        signal.signal(signum, stop)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    server.serve_forever(POLL_INTERVAL)
    server.drain()
    server.app.close()


def supervise(server: Server, workers: int) -> None:
    """Keep so many processes serving until SIGTERM or SIGINT, which they are told; return when all have ended."""
    workers_since: dict[int, float] = {}  # by process id
    stopping = False

    def stop(*_: object) -> None:
        nonlocal stopping
        stopping = True
        for pid in workers_since:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    server.supervisor = os.getpid()
    for signum in _SIGNALS:
        signal.signal(signum, stop)
    while True:
        # With the signals held back no worker is overlooked, and none is told by the handler of its elder.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        while not stopping and len(workers_since) < workers:
            pid = os.fork()
            if pid == 0:
                _work(server)
            workers_since[pid] = time.monotonic()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        if not workers_since:
            return
        pid, status = os.wait()
        since = workers_since.pop(pid, None)  # None: a child that was there before, or an orphan given to process 1
        if since is not None and not stopping:
            code = os.waitstatus_to_exitcode(status)
            sys.stderr.write(f"profiler: worker {pid} ended with {code}: another takes its place\n")
            time.sleep(max(0.0, since + RESPAWN_INTERVAL - time.monotonic()))


def _work(server: Server) -> NoReturn:
    """Serve, and end the process: nothing that is the supervisor's is done after a fork."""
    try:
        serve(server)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


# -- command line ------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Serve, or make the table, as the arguments say (default: sys.argv). Return the exit status."""
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115  # closed by who started us
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may hold anything
    parser = _make_parser()
    arguments = parser.parse_args(argv)
    serving = arguments.command is None
    try:
        app = create_app(arguments.database, token=_read_token(arguments.token_file))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if serving and not (app.token or arguments.anonymous or _is_loopback(arguments.host)):
        parser.error(
            f"--host {arguments.host} is open to others: set a token (--token-file, PROFILER_TOKEN) or --anonymous"
        )
    if arguments.force and serving:
        parser.error("--force goes with initialise-database")
    if not hasattr(hashlib, "pbkdf2_hmac"):
        return _fail("this Python was built without OpenSSL, and so without hashlib.pbkdf2_hmac: take another")
    try:
        with contextlib.closing(app):
            return _run_server(app, arguments) if serving else _initialise_database(app, arguments.force)
    except sqlite3.Error as error:
        folder, name = os.path.split(app.users.database.path)
        remedy = "mend that" if os.path.isdir(folder) else f"make the folder {folder}"
        return _fail(f"{name} in {folder}: {error}: {remedy}, or name another file with --database")
    except OSError as error:
        return _fail(str(error))
    except KeyboardInterrupt:  # before there was anything to stop
        return 128 + signal.SIGINT
    finally:
        _flush_log()


def _flush_log() -> None:
    """Drop a stderr that cannot be written: what is left in its buffer would make the interpreter's exit a failure."""
    try:
        sys.stderr.flush()
    except OSError:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # open until the process ends


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="profiler", description="User accounts over HTTP, on one SQLite file.", allow_abbrev=False
    )
    commands = ["initialise-database"]
    parser.add_argument(
        "command", nargs="?", choices=commands, help="make the table of users, and end, without serving"
    )
    for name, read, default, text in (
        ("host", _address, HOST, f"the address to serve on (default: PROFILER_HOST, else {HOST})"),
        ("port", _port, PORT, f"the port; 0 is any free one (default: PROFILER_PORT or PORT, else {PORT})"),
        (
            "workers",
            _workers,
            WORKERS,
            f"how many processes; auto: one for each core (default: PROFILER_WORKERS, else {WORKERS})",
        ),
    ):
        variables = [f"PROFILER_{name.upper()}", *(["PORT"] if name == "port" else [])]
        default = next(filter(None, map(os.environ.get, variables)), default)
        parser.add_argument(f"--{name}", type=read, default=default, help=text)
    parser.add_argument(
        "--database", metavar="PATH", help=f"the SQLite file (default: PROFILER_DATABASE, else {DATABASE})"
    )
    parser.add_argument(
        "--token-file", metavar="PATH", help="a file with the token to ask for (default: PROFILER_TOKEN)"
    )
    parser.add_argument("--anonymous", action="store_true", help="serve other than loopback addresses without a token")
    parser.add_argument("--no-access-log", action="store_true", help="write no line for each request to stderr")
    parser.add_argument(
        "--force", action="store_true", help="with initialise-database: drop the users in the table, for good"
    )
    parser.add_argument("--version", action="version", version=f"profiler {__version__}")
    return parser


def _address(text: str) -> str:
    try:
        return str(socket.getaddrinfo(text.encode(), 0, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text!r}, from the flag or PROFILER_HOST: {error.strerror}") from None


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def _port(text: str) -> int:
    if not re.fullmatch("[0-9]{1,5}", text) or int(text) > MAX_PORT:
        message = f"{text!r}, from the flag, PROFILER_PORT or PORT, is no number from 0 to {MAX_PORT}"
        raise argparse.ArgumentTypeError(message)
    return int(text)


def _workers(text: str) -> int:
    if text == "auto":
        return _cores() if hasattr(os, "fork") else 1
    if not re.fullmatch("[0-9]{1,3}", text) or not 1 <= int(text) <= MAX_WORKERS:
        message = f"{text!r}, from the flag or PROFILER_WORKERS, is neither auto nor a number from 1 to {MAX_WORKERS}"
        raise argparse.ArgumentTypeError(message)
    if int(text) > 1 and not hasattr(os, "fork"):
        raise argparse.ArgumentTypeError(f"{text!r}: without a fork, this system can have no more than 1")
    return int(text)


def _read_token(path: str | None) -> str | None:
    """Return the token in a file, if there is one. Raise OSError, ValueError."""
    if path is None:
        return None
    with open(path, encoding="utf-8") as file:
        return file.read().strip()


def _initialise_database(app: Application, force: bool) -> int:
    try:
        app.users.initialise(force)
    except TableInUse as error:
        return _fail(f"the table holds {error} users: --force drops them, for good")
    print("Successfully created database schema.")
    return 0


def _run_server(app: Application, arguments: argparse.Namespace) -> int:
    """Serve until a signal, in this process or by workers."""
    app.users.database.read("PRAGMA cache_size = 0")  # what is read to count the users is not needed again
    count = app.users.count()  # a database that cannot be used is told now
    app.close()  # before there are workers
    app.users.hashers = threading.BoundedSemaphore(max(1, _cores() // arguments.workers))
    try:
        server = Server(arguments.host, arguments.port, app, access_log=not arguments.no_access_log)
    except OSError as error:
        return _fail(f"port {arguments.port} of {arguments.host}: {error.strerror}: choose another --port or --host")
    with server:
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # until what is to be done about them is settled
        host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
        print(f"http://{host}:{server.server_port}/users/")
        users = "1 user" if count == 1 else f"{count} users"
        print(f"The database is {app.users.database.path}; it holds {users}. Ctrl-C stops the server.", flush=True)
        if arguments.workers == 1:
            serve(server)
        else:
            supervise(server, arguments.workers)
            with contextlib.suppress(sqlite3.Error):  # workers that ended at once left it to each other
                app.users.database.read("PRAGMA wal_checkpoint(TRUNCATE)")
        for signum in _SIGNALS:
            signal.signal(signum, signal.SIG_IGN)  # all is done: a second one shall not spoil the exit status
    return 0


def _fail(message: str) -> int:
    print(f"profiler: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
