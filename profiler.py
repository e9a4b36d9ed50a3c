#!/usr/bin/env python3
"""User accounts over HTTP: a WSGI service on one SQLite file, with nothing but the standard library.

    POST    /users/               create a user                     201 {"id":1}
    GET     /users/               list every user                   200 [{...},...]
    GET     /users/ID/            get one user                      200 {...}
    PUT     /users/ID/            update a user's names and email   200 {"id":1}
    DELETE  /users/ID/            delete a user                     204
    PUT     /users/ID/password/   change a user's password          204
    POST    /users/verify/        check an email and a password     200 {"id":1}
    GET     /health/              tell whether users can be read    200 {"status":"ok"}

Run it: `python profiler.py` serves http://127.0.0.1:5000/users/ on ./db.sqlite3; `--help` tells the rest.
Embed it: `profiler:application` is the WSGI callable; `create_app()` makes one on another database.
Copy it: this file and schema.sql, side by side, are all of it. Python 3.9 or later.

It keeps accounts and checks passwords. It knows no sessions, no roles and no mail.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import functools
import hashlib
import hmac
import io
import json
import os
import re
import secrets
import select
import signal
import socket
import socketserver
import sqlite3
import sys
import threading
import time
import traceback
import weakref
from http import HTTPStatus
from urllib.parse import parse_qsl, quote, unquote, urlencode
from wsgiref.handlers import CGIHandler, format_date_time
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

TYPE_CHECKING = False  # typing's own, without importing typing at every start
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from typing import Any, Callable, Union
    from wsgiref.types import InputStream, StartResponse, WSGIEnvironment

    Headers = tuple[tuple[str, str], ...]
    # A status line, a body (None: there is none; an iterator: its length is not known), headers beyond the usual ones.
    Response = tuple[str, Union[bytes, Iterator[bytes], None], Headers]
    # Is called with a user's JSON as it is now, or None for nobody, and raises if the user must not be changed.
    Check = Callable[[Union[bytes, None]], object]

__all__ = ["app", "application", "create_app", "hash_password", "verify_password"]
__version__ = "1.1.0"

# -- configuration -----------------------------------------------------------------------------------------------------
# Every limit of the service, its unit, and where the number comes from. Without a source, it was chosen here.

HOST, PORT = "127.0.0.1", "5000"  # the tutorial's, which are Flask's; as text, as a flag would give them
DATABASE = "db.sqlite3"  # the tutorial's file

ITERATIONS = 600_000  # of PBKDF2-HMAC-SHA256: OWASP Password Storage Cheat Sheet
MAX_ITERATIONS = 10_000_000  # a hash stored with more is refused: this many take a core two to three seconds
MAX_SCRYPT_COST = 2**20  # n * r * p, hence 128 MiB: the costliest setting that OWASP lists (2**17, 8, 1)
SALT_BYTES = 16  # 128 bits: NIST SP 800-132 5.1

MAX_BODY = 64 * 1024  # bytes
MAX_BRACKETS = 500  # objects and arrays in a body: CPython's parser recurses, and so many fit into STACK_SIZE
MAX_NAME = 255  # characters of a first or last name
MAX_EMAIL = 254  # characters: RFC 5321 4.5.3.1.3, less the angle brackets
MAX_ID = 2**63 - 1  # SQLite's largest integer

MIN_DATABASE = 512  # bytes: SQLite's smallest page
BUSY_TIMEOUT = 5.0  # seconds that a request waits for its turn at the database: the default of sqlite3.connect
RETRY_INTERVAL = 0.001  # seconds after which a writer asks again for a lock that another process holds
MOVED_INTERVAL = 0.1  # seconds for which a reader takes it for granted that the file is in its place
HASH_TIMEOUT = 10.0  # seconds that a request waits for a core to hash on
RETRY_AFTER = 1  # seconds that a client is told to wait before it asks again
BATCH = 500  # users that the list reads at once
MAX_LIMIT = 1000  # users on a page
BACKUP_PAGES = 2048  # of the database, copied at once: some 8 MiB

MIN_TOKEN = 16  # characters

# The built-in server's; seconds unless it says otherwise.
MAX_CONNECTIONS = 1000  # each has a thread
MAX_REFUSALS = 50  # connections beyond that number, which are told 503
RESERVED_FILES = 32  # open files that are kept for the database, the log and the like
STACK_SIZE = 512 * 1024  # bytes of a thread: 100 of them fit into 200 MB of address space
MAX_REQUEST_LINE = 8 * 1024  # bytes: nginx's and Apache's
MAX_HEAD = 32 * 1024  # bytes: nginx's four buffers of 8 KiB
MAX_FIELDS = 100  # headers of a request: Apache's, and http.client's
MAX_LOGGED = 512  # bytes of a request line: a pipe that takes anything takes a line of that much (PIPE_BUF)
RECEIVE_SIZE = 64 * 1024  # bytes asked of a socket at once
MAX_LINGER = 16 * 1024 * 1024  # bytes of a refused request that are read after the answer
IDLE_TIMEOUT = 15.0  # between requests
HEAD_TIMEOUT = 15.0  # from the first byte of a head to its last
BODY_TIMEOUT = 30.0  # from the end of the head to that of the body
SEND_TIMEOUT = 60.0  # without the client reading anything: nginx's send_timeout
LINGER_TIMEOUT = 2.0  # without the client sending anything, after the answer
DRAIN_TIMEOUT = 10.0  # for what is in flight when the server is told to stop: what docker stop allows
TURN_TIMEOUT = 0.1  # for a thread's turn; then it goes on without
POLL_INTERVAL = 0.1  # until the server notices that it is told to stop
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

    A hash that is malformed, or would cost more than the limits above, matches no password: False, without hashing.
    """
    try:
        method, salt, digest = str(password_hash).split("$")  # None is nobody's, too
        # As bytes: compare_digest refuses a str that is not ASCII.
        return hmac.compare_digest(_digest(method, salt, password).encode(), digest.encode())
    except ValueError:
        return False


def is_weak(password_hash: str, iterations: int) -> bool:
    """Tell whether a stored hash is PBKDF2's with fewer iterations than these. One of scrypt's never is."""
    match = _PBKDF2.match(password_hash)
    return match is not None and int(match[1]) < iterations


def _digest(method: str, salt: str, password: str) -> str:
    """Return the digest in hexadecimal. Raise ValueError for a method or a cost that is not to be computed."""
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
# One SQLite file. One connection reads and one writes, and the threads of a process take turns at each. That is faster
# than a connection for every thread: SQLite's calls let go of the GIL, and threads that fight to get it back do little
# else. Text comes as the bytes that are stored, for it is on its way into a response.

# Result codes (sqlite.org/rescode.html), which Python names from 3.11 on.
_BUSY, _LOCKED, _READONLY, _IOERR, _FULL, _CANTOPEN, _PROTOCOL = 5, 6, 8, 10, 13, 14, 15
_CODES = {  # for Python 3.9 and 3.10, which tell no code, but SQLite's fixed words for one (sqlite3_errstr)
    "database is locked": _BUSY,
    "database table is locked": _LOCKED,
    "attempt to write a readonly database": _READONLY,
    "disk I/O error": _IOERR,
    "database or disk is full": _FULL,
    "unable to open database file": _CANTOPEN,
    "locking protocol": _PROTOCOL,
}

_HAS_TABLE = "SELECT 1 FROM sqlite_master WHERE name = 'user' COLLATE NOCASE"

# To close a descriptor of a file drops this process's POSIX locks on it (sqlite.org/howtocorrupt.html). So a new file
# is made and closed under this lock, and nobody connects before that is over. A fork waits, so that no child finds it
# held.
_creating = threading.Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_creating.acquire, after_in_parent=_creating.release, after_in_child=_creating.release)


class Unavailable(Exception):
    """The database cannot be used as things are: it is away, its disk is full, read-only or failing."""


class Busy(Unavailable):
    """The service is at its limit for now: the same request may well succeed in a moment."""


class _Seat:
    """A connection, made when it is first needed, and the lock of the thread that uses it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.connection: sqlite3.Connection | None = None

    def close(self) -> None:
        """Close the connection; whoever comes next makes another."""
        if self.connection:
            self.connection.close()
            self.connection = None


class Database:
    """One SQLite file, made at the first use. Threads and, after a fork, processes may share the object."""

    def __init__(self, path: str, before_writing: Callable[[sqlite3.Connection], None]) -> None:
        """Take the path of the file, and what to do with a new connection before it writes.

        Raise ValueError for a database in memory, Unavailable if the path is relative to a folder that is gone.
        """
        if not path or path == ":memory:":
            raise ValueError("the database must be a file: one in memory would end with its connection")
        try:
            self.path = os.path.realpath(path)  # SQLite puts its log beside the file, not beside a link to it
        except FileNotFoundError:
            raise Unavailable(f"the current folder is gone, where {path} would be") from None
        self._before_writing = before_writing
        self._file: tuple[int, int] | None = None  # the file that this process has had, which it never makes anew
        self._in_place_at = 0.0  # when it was last seen there, by time.monotonic
        self._inherited: list[_Seat] = []  # kept, because to collect them would close them
        self._reader, self._writer = _Seat(), _Seat()

    def read(self, statement: str, parameters: Mapping[str, Any]) -> list[Any]:
        """Return all rows of a SELECT. No lock and no snapshot outlives the call. Raise Busy, Unavailable."""
        seat = self._reader
        if not seat.lock.acquire(True, BUSY_TIMEOUT):
            raise Busy("other threads are reading the database")
        try:
            if time.monotonic() - self._in_place_at > MOVED_INTERVAL:
                self._check_place()
            if seat.connection is None:
                try:
                    seat.connection = self._connect()
                except sqlite3.OperationalError as error:
                    return self._read_alone(statement, parameters, error)
            return seat.connection.execute(statement, parameters).fetchall()
        except sqlite3.OperationalError as error:
            raise self._translate(error) from None
        finally:
            seat.lock.release()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Hold the database's write lock; commit at the end of the block, roll back if it raises.

        Raise Busy if other threads or other processes hold it past BUSY_TIMEOUT, Unavailable.
        """
        deadline = time.monotonic() + BUSY_TIMEOUT
        seat = self._writer
        if not seat.lock.acquire(timeout=BUSY_TIMEOUT):
            raise Busy("other threads are writing to the database")
        try:
            self._check_place()
            if seat.connection is None:
                seat.connection = self._connect(to_write=True)
            _insist(seat.connection, "BEGIN IMMEDIATE", deadline)  # a reader that turns writer could not wait
            try:
                yield seat.connection
                _insist(seat.connection, "COMMIT", deadline)
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    seat.connection.execute("ROLLBACK")
                raise
        except sqlite3.OperationalError as error:
            raise self._translate(error) from None
        finally:
            if seat.connection and seat.connection.in_transaction:  # it could neither commit nor roll back
                seat.close()
            seat.lock.release()

    def copy(self, path: str, progress: Callable[[int, int], object]) -> None:
        """Write a copy as of now to a new file, its owner's alone, while others read and write.

        The file gets its name when it is whole and on disk. After some pages `progress` is told how many are left, and
        of how many. Raise FileExistsError, another OSError, Busy, Unavailable.
        """
        import tempfile  # takes its time, and is needed here alone

        if os.path.lexists(path):
            raise FileExistsError(f"{path} is there already: a backup goes to a new file")
        if os.path.realpath(path).startswith(f"{self.path}-"):
            raise OSError(f"{path} is a name that SQLite may use beside the database: choose another")
        folder, name = os.path.split(os.path.abspath(path))
        if not os.path.isdir(folder):
            raise OSError(f"{path} cannot be made: make the folder {folder}")
        descriptor, part = tempfile.mkstemp(".part", f"{name}.", folder)
        os.close(descriptor)
        try:
            with contextlib.closing(self._connect()) as source, contextlib.closing(sqlite3.connect(part)) as target:
                source.execute("BEGIN")
                source.execute("SELECT 1 FROM sqlite_master").fetchall()  # from here on it sees no newer state
                source.backup(target, pages=BACKUP_PAGES, progress=lambda _, left, total: progress(left, total))
            _rename(part, path)
        except sqlite3.OperationalError as error:
            raise self._translate(error) from None
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(part)

    def expect(self) -> None:
        """Never make the file, from now on. Raise Unavailable if it is not there."""
        self._file = self._identify()
        if self._file is None:
            raise Unavailable("there is no such file")

    def close(self) -> None:
        """Close this process's connections; the last of all merges the write-ahead log into the file."""
        for seat in (self._reader, self._writer):
            with seat.lock:
                seat.close()

    def renew(self) -> None:
        """Begin without connections in a forked child, which may neither use nor close its parent's."""
        self._inherited += [self._reader, self._writer]
        self._reader, self._writer = _Seat(), _Seat()

    def _connect(self, to_write: bool = False) -> sqlite3.Connection:
        """Return a new connection to the file, which is made if need be: private to its owner, with the table in it."""
        if self._identify() is None:
            read_file("schema.sql")  # without it, leave no empty file
        if self._file is None:
            with _creating, contextlib.suppress(OSError):  # SQLite will tell better what is wrong with the place
                os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        with _creating, contextlib.suppress(OSError):  # and wait for whoever makes it
            if 0 < os.path.getsize(self.path) < MIN_DATABASE:  # SQLite would take it for an empty one and overwrite it
                raise sqlite3.DatabaseError("file is not a database")
        connection = self._open("mode=rw")  # which makes no file
        try:
            # On a read-only place, or while others are at work, the file stays in the mode it has.
            with contextlib.suppress(sqlite3.OperationalError):
                connection.execute("PRAGMA journal_mode = WAL").fetchall()
            connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT * 1000:.0f}")
            connection.execute("PRAGMA synchronous = FULL")  # in WAL mode: a commit is on disk before it is answered
            if not connection.execute(_HAS_TABLE).fetchall():
                connection.executescript(read_file("schema.sql").decode())
            if to_write:
                self._before_writing(connection)
                connection.execute("PRAGMA busy_timeout = 0")  # transaction asks again by itself, and more often
        except BaseException:
            connection.close()
            raise
        self._file = self._file or self._identify()
        return connection

    def _read_alone(self, statement: str, parameters: Mapping[str, Any], error: sqlite3.OperationalError) -> list[Any]:
        """Read where WAL mode's shared memory cannot be made: on a read-only place, a full disk. Else raise the error.

        The file alone must hold all that was committed: a log or a journal beside it would have more.
        """
        beside = (self.path + "-wal", self.path + "-journal")
        if _code(error) not in (_READONLY, _IOERR, _CANTOPEN) or any(map(_is_filled, beside)):
            raise error
        try:
            with contextlib.closing(self._open("mode=ro&immutable=1")) as connection:
                return connection.execute(statement, parameters).fetchall()
        except sqlite3.Error:
            raise error from None

    def _open(self, query: str) -> sqlite3.Connection:
        """Return a connection that waits for no lock (sqlite.org/uri.html)."""
        path = quote(os.fsencode(self.path.replace(os.sep, "/")).lstrip(b"/"))
        uri = f"file:///{path}?{query}"
        connection = sqlite3.connect(uri, timeout=0, isolation_level=None, check_same_thread=False, uri=True)
        connection.text_factory = bytes
        return connection

    def _identify(self) -> tuple[int, int] | None:
        """Return what tells the file in this place from another one; None if there is none."""
        with contextlib.suppress(OSError):
            status = os.stat(self.path)
            return status.st_dev, status.st_ino
        return None

    def _check_place(self) -> None:
        """Raise Unavailable if the file that this process has had is no longer in its place.

        A new one would be empty; and what is written to one without its name is lost to who looks for it.
        """
        if self._file is not None and self._identify() != self._file:
            raise Unavailable("the file was moved or replaced: put it back, or start the service anew")
        self._in_place_at = time.monotonic()

    def _translate(self, error: sqlite3.OperationalError) -> Exception:
        """Return Busy or Unavailable for what may pass or be mended. Any other error is somebody's mistake: itself."""
        code, folder = _code(error), os.path.dirname(self.path)
        if code in (_BUSY, _LOCKED, _PROTOCOL):
            return Busy(str(error))
        if code == _CANTOPEN and not os.path.isdir(folder):
            return Unavailable(f"{error}: make the folder {folder}")
        if code in (_READONLY, _IOERR, _FULL, _CANTOPEN):
            return Unavailable(str(error))
        return error


def _code(error: sqlite3.OperationalError) -> int | None:
    """Return the primary result code of an error, if it is known."""
    code = getattr(error, "sqlite_errorcode", None)
    return _CODES.get(str(error)) if code is None else code & 0xFF


def _insist(connection: sqlite3.Connection, statement: str, deadline: float) -> None:
    """Execute a statement that takes a lock, and ask again until the deadline while another process holds it.

    SQLite would do so, too, but its pauses grow to 100 ms, in which others take the lock again and again.
    """
    while True:
        try:
            connection.execute(statement)
            return
        except sqlite3.OperationalError as error:
            if _code(error) != _BUSY or time.monotonic() > deadline:
                raise
        time.sleep(RETRY_INTERVAL)


def _is_filled(path: str) -> bool:
    return os.path.isfile(path) and os.path.getsize(path) > 0


def _rename(part: str, path: str) -> None:
    """Give a file its name, unless another has it. Raise FileExistsError."""
    try:
        os.link(part, path)
    except FileExistsError:
        raise FileExistsError(f"{path} is there already: a backup goes to a new file") from None
    except OSError:  # a file system that has no links: there nothing looks and names at once
        if os.path.lexists(path):
            raise
        os.rename(part, path)


def read_file(name: str) -> bytes:
    """Return a file that came with this module: from beside it, in a folder, a wheel or a zip archive. Raise OSError.

    In a wheel it has a folder of its own, where no other package writes.
    """
    here = os.path.dirname(os.path.abspath(__file__))
    spec = globals().get("__spec__")  # a script has none, and mod_wsgi sets none
    for path in (os.path.join(here, "profiler_users", name), os.path.join(here, name)):
        with contextlib.suppress(OSError):
            if spec is not None and hasattr(spec.loader, "get_data"):
                return bytes(spec.loader.get_data(path))
            with open(path, "rb") as file:
                return file.read()
    raise FileNotFoundError(f"{name} cannot be read: put it beside {os.path.basename(__file__)} in {here}")


# -- users -------------------------------------------------------------------------------------------------------------
# The storage that the endpoints know: Users has the rules, which are about accounts, and a subclass has the statements,
# which are about a database. The statements of SQLite follow here; profiler_sqlalchemy.py has those of other engines.


class EmailTaken(Exception):
    """Another user has this email, or one that differs only in the case of ASCII letters."""


class NoSuchUser(Exception):
    """No user has this id, or this email."""


class WrongPassword(Exception):
    """The password is not the user's, or nobody has the email it came with."""


class TableInUse(Exception):
    """The table holds users, whom nobody said to drop."""


class Users:
    """The rules of users, whatever database they are in. Each method may also raise Busy or Unavailable.

    A storage is a subclass that gives the methods named here; SQLiteUsers, below, tells what each of them does.
    """

    place: str  # where the users are, for people to read
    # Declared here for the sake of types.
    find: Callable[[str], tuple[int, str] | None]
    insert: Callable[[str, str, str, str], int]
    page: Callable[..., tuple[bytes, int | None]]
    get: Callable[[int], bytes]
    get_password: Callable[[int], str]
    update: Callable[[int, str, str, str, Check | None], None]
    delete: Callable[[int, Check | None], None]
    replace_password: Callable[[int, str | None, str], bool]
    count: Callable[[], int]
    check: Callable[[], None]
    initialise: Callable[[bool], None]
    prepare: Callable[[], None]
    expect: Callable[[], None]
    backup: Callable[[str, Callable[[int, int], object]], None]
    close: Callable[[], None]

    def __init__(self, iterations: int, hashers: int) -> None:
        """Hash new passwords with so many iterations, at most `hashers` of them at once."""
        self._iterations = iterations
        self._hashers = hashers
        self._cores = threading.BoundedSemaphore(hashers)
        # Nobody's password: to try one against it takes as long as against a user's.
        self._nobody = 0, f"pbkdf2:sha256:{iterations}${'0' * 2 * SALT_BYTES}${'0' * 64}"
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=functools.partial(_renew, weakref.ref(self)))

    def create(self, first_name: str, last_name: str, email: str, password: str) -> int:
        """Store a new user and return the id. Raise EmailTaken; Busy if no core is free to hash the password."""
        if self.find(email):  # before the costly part; the insert itself decides once more
            raise EmailTaken
        with self._core():
            password_hash = hash_password(password, self._iterations)
        return self.insert(first_name, last_name, email, password_hash)

    def list(self, after: int | None = None, descending: bool = False) -> Iterator[bytes]:
        """Yield all users behind an id, as page returns them: batch by batch, each a read of its own."""
        while True:
            users, after = self.page(BATCH, after, descending=descending)
            yield users
            if after is None:
                return

    def verify(self, email: str, password: str) -> int:
        """Return the id of the user whose email and password these are. Raise WrongPassword, Busy.

        A hash that is weaker than a new one is made anew, now that the password is at hand.
        """
        user_id, password_hash = self.find(email) or self._nobody
        new_hash = None
        with self._core():
            right = verify_password(password_hash, password)
            if right and is_weak(password_hash, self._iterations):
                new_hash = hash_password(password, self._iterations)
        if not right or user_id < 1:
            raise WrongPassword
        if new_hash:
            with contextlib.suppress(Unavailable):  # then another time
                self.replace_password(user_id, password_hash, new_hash)
        return user_id

    def change_password(self, user_id: int, old_password: str, new_password: str) -> None:
        """Give a user another password, if the old one is right. Raise NoSuchUser, WrongPassword, Busy."""
        password_hash = self.get_password(user_id)
        with self._core():
            if not verify_password(password_hash, old_password):
                raise WrongPassword
            new_hash = hash_password(new_password, self._iterations)
        if not self.replace_password(user_id, password_hash, new_hash):  # of two at once the second is too late
            raise WrongPassword

    def set_password(self, email: str, new_password: str) -> None:
        """Give the user who has this email another password, whatever the old one is. Raise NoSuchUser."""
        user = self.find(email)
        if not (user and self.replace_password(user[0], None, hash_password(new_password, self._iterations))):
            raise NoSuchUser

    def renew(self) -> None:
        """Hold nothing in a forked child that the parent's other threads held: nobody would release it there."""
        self._cores = threading.BoundedSemaphore(self._hashers)

    @contextlib.contextmanager
    def _core(self) -> Iterator[None]:
        """Hold one of the cores to hash on. Raise Busy."""
        cores = self._cores
        if not cores.acquire(timeout=HASH_TIMEOUT):
            raise Busy("no core was free to hash a password")
        try:
            yield
        finally:
            cores.release()


# Cast, for another program may have written anything: json_object takes no BLOB, and created_on may be a number.
_USER = """json_object(
    'id', id,
    'first_name', CAST(first_name AS TEXT),
    'last_name', CAST(last_name AS TEXT),
    'email', CAST(email AS TEXT),
    'created_on', CAST(created_on AS TEXT)
)"""

# A file that the tutorial's service made compares emails with case, unless it is told otherwise. It may hold two that
# differ in case alone, whose users can still be updated; and another program may have given a user an id below 1, who
# is nobody here.
_HAS_EMAIL = "email COLLATE NOCASE = :email"


def _page(descending: bool, by_email: bool) -> str:
    """Return the statement of a page: the users, the id of the last one, and whether there are more behind it."""
    beyond, last, order = ("<", "min", "DESC") if descending else (">", "max", "ASC")
    # SQLite seeks by one bound on each side: where ids go up, `after` is the lower one, and never below 0.
    condition = ("AND id > 0 " if descending else "") + (f"AND {_HAS_EMAIL}" if by_email else "")
    return f"""
WITH page AS (
    SELECT group_concat(user, ',') AS users, {last}(id) AS last
    FROM (
        SELECT id, {_USER} AS user FROM "user"
        WHERE id {beyond} :after {condition}
        ORDER BY id {order} LIMIT :limit
    )
)
SELECT users, last, EXISTS (SELECT 1 FROM "user" WHERE id {beyond} last {condition}) FROM page
"""


_PAGES = {
    (descending, by_email): _page(descending, by_email) for descending in (False, True) for by_email in (False, True)
}
_FIND = f"""
SELECT id, CAST(password AS TEXT) FROM "user" WHERE {_HAS_EMAIL} ORDER BY email COLLATE BINARY = :email DESC, id LIMIT 1
"""
_GET = f"""SELECT {_USER} FROM "user" WHERE id = :id AND id > 0"""
_GET_PASSWORD = """SELECT CAST(password AS TEXT) FROM "user" WHERE id = :id AND id > 0"""
_INSERT = f"""
INSERT INTO "user" (first_name, last_name, email, password)
SELECT :first_name, :last_name, :email, :password_hash
WHERE NOT EXISTS (SELECT 1 FROM "user" WHERE {_HAS_EMAIL})
"""
_UPDATE = f"""
UPDATE "user" SET first_name = :first_name, last_name = :last_name, email = :email
WHERE id = :id AND id > 0 AND (
    email COLLATE BINARY = :email
    OR NOT EXISTS (SELECT 1 FROM "user" WHERE {_HAS_EMAIL} AND id <> :id)
)
"""
_DELETE = """DELETE FROM "user" WHERE id = :id AND id > 0"""
_REPLACE_PASSWORD = """
UPDATE "user" SET password = :new_hash
WHERE id = :id AND id > 0 AND (:old_hash IS NULL OR CAST(password AS TEXT) = :old_hash)
"""
_COUNT = """SELECT count(*) FROM "user" WHERE id > 0"""
_CHECK = """SELECT id, first_name, last_name, email, password, created_on FROM "user" LIMIT 1"""
_DROP = """DROP TABLE "user" """
_EMAIL_INDEX = """
SELECT 1
FROM pragma_index_list('user') AS index_, pragma_index_xinfo(index_.name) AS column_
WHERE column_.seqno = 0 AND column_.name = 'email' AND column_.coll = 'NOCASE' COLLATE NOCASE AND NOT index_.partial
"""
_CREATE_EMAIL_INDEX = """CREATE INDEX IF NOT EXISTS user_email ON "user" (email COLLATE NOCASE)"""


class SQLiteUsers(Users):
    """The users in an SQLite file. The database itself writes the JSON, so that a read builds nothing in Python."""

    def __init__(self, path: str, iterations: int, hashers: int) -> None:
        """Take the path of the file, and what Users takes. Raise ValueError for a database that is no file."""
        super().__init__(iterations, hashers)
        self._database = Database(path, _index_emails)
        self.place = self._database.path

    def find(self, email: str) -> tuple[int, str] | None:
        """Return the id and the password's hash of the user who has this email, or else has it in another case."""
        rows = self._database.read(_FIND, {"email": email})
        return (rows[0][0], _text(rows[0][1])) if rows else None

    def insert(self, first_name: str, last_name: str, email: str, password_hash: str) -> int:
        """Store a new user and return the id. Raise EmailTaken."""
        fields = {"first_name": first_name, "last_name": last_name, "email": email, "password_hash": password_hash}
        with self._database.transaction() as connection:
            cursor = connection.execute(_INSERT, fields)
            if cursor.rowcount == 0:
                raise EmailTaken
            return cursor.lastrowid or 0

    def page(
        self, limit: int, after: float | None = None, email: str | None = None, descending: bool = False
    ) -> tuple[bytes, int | None]:
        """Return the first users behind an id, as JSON objects with commas between, by id or `descending`.

        And the id behind which there are more, or None. With an email, only who has it counts.
        """
        if after is None:
            after = float("inf") if descending else 0
        parameters = {"after": after, "limit": limit, "email": email}
        [(users, last, more)] = self._database.read(_PAGES[descending, email is not None], parameters)
        return _utf8(users or b""), last if more else None

    def get(self, user_id: int) -> bytes:
        """Return one user as a JSON object. Raise NoSuchUser."""
        rows = self._database.read(_GET, {"id": user_id})
        if not rows:
            raise NoSuchUser
        return _utf8(rows[0][0])

    def get_password(self, user_id: int) -> str:
        """Return the hash of a user's password. Raise NoSuchUser."""
        return _text(_only(self._database.read(_GET_PASSWORD, {"id": user_id})))

    def update(self, user_id: int, first_name: str, last_name: str, email: str, check: Check | None = None) -> None:
        """Give a user other names and another email. Raise NoSuchUser, EmailTaken, and what the check raises."""
        fields = {"id": user_id, "first_name": first_name, "last_name": last_name, "email": email}
        with self._database.transaction() as connection:
            if check:
                check(_utf8(_only(connection.execute(_GET, fields).fetchall())))
            if connection.execute(_UPDATE, fields).rowcount == 0:
                _only(connection.execute(_GET, fields).fetchall())
                raise EmailTaken

    def delete(self, user_id: int, check: Check | None = None) -> None:
        """Delete a user, if there is one with this id, which is never used again. Raise what the check raises."""
        with self._database.transaction() as connection:
            if check:
                rows = connection.execute(_GET, {"id": user_id}).fetchall()
                check(_utf8(rows[0][0]) if rows else None)
            connection.execute(_DELETE, {"id": user_id})

    def replace_password(self, user_id: int, old_hash: str | None, new_hash: str) -> bool:
        """Store another hash in place of this one, or of any; tell whether it was there to be replaced."""
        fields = {"id": user_id, "old_hash": old_hash, "new_hash": new_hash}
        with self._database.transaction() as connection:
            return connection.execute(_REPLACE_PASSWORD, fields).rowcount > 0

    def count(self) -> int:
        """Return how many users there are."""
        return int(_only(self._database.read(_COUNT, {})))

    def check(self) -> None:
        """Return if users can be read; else raise what is in the way."""
        self._database.read(_CHECK, {})

    def initialise(self, force: bool) -> None:
        """Make the table, as any use does. Raise TableInUse if it holds users, unless forced to drop them first."""
        with self._database.transaction() as connection:
            count = _only(connection.execute(_COUNT).fetchall())
            if count and not force:
                raise TableInUse(f"the table holds {count_users(count)}: --force drops them, for good")
            if force:
                connection.execute(_DROP)
                connection.execute(read_file("schema.sql").decode())  # one statement: executescript would commit first

    def prepare(self) -> None:
        """Make the file, its table and its index. What may only be read is served as it is."""
        with contextlib.suppress(Unavailable), self._database.transaction():
            pass

    def expect(self) -> None:
        """Make no database from now on. Raise Unavailable if there is none."""
        self._database.expect()

    def backup(self, path: str, progress: Callable[[int, int], object]) -> None:
        """Write a copy to a new file, and tell `progress` how much is left, and of how much. Raise OSError."""
        self._database.copy(path, progress)

    def close(self) -> None:
        """Close the database. The next call of a method opens it again."""
        self._database.close()

    def renew(self) -> None:
        """Begin anew in a forked child, as Users does."""
        super().renew()
        self._database.renew()


def _renew(reference: weakref.ref[Users]) -> None:
    """Call renew of the users, if they are still there."""
    if users := reference():
        users.renew()


def _index_emails(connection: sqlite3.Connection) -> None:
    """Add an index for emails without case to a file that has none: the tutorial's."""
    if not connection.execute(_EMAIL_INDEX).fetchall():
        connection.execute(_CREATE_EMAIL_INDEX)


def _only(rows: list[Any]) -> Any:
    """Return the one column of the one row. Raise NoSuchUser if there is none."""
    if not rows:
        raise NoSuchUser
    return rows[0][0]


def _utf8(text: bytes) -> bytes:
    """Return the text with U+FFFD for whatever is not UTF-8: a cell written from outside may hold anything."""
    return text if text.isascii() else text.decode("utf-8", "replace").encode()


def _text(cell: bytes | None) -> str:
    """Return a cell as a str: an empty one for NULL, which another program may have stored."""
    return _utf8(cell or b"").decode()


def count_users(count: int) -> str:
    """Return a number of users in words."""
    return "1 user" if count == 1 else f"{count} users"


def open_users(database: str, iterations: int) -> Users:
    """Return the users in a database: the path of a file, or the URL of a server. Nothing is opened yet.

    Raise ValueError for a database that cannot be; Unavailable.
    """
    hashers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if "://" not in database:
        return SQLiteUsers(database, iterations, hashers)
    sys.modules.setdefault("profiler", sys.modules[__name__])  # run as a program, this module is not known by its name
    try:
        import profiler_sqlalchemy  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        extra = "mysql" if database.startswith(("mysql", "mariadb")) else "postgresql"
        raise ValueError(
            f"a database by URL needs profiler_sqlalchemy.py beside this module, and what "
            f"`pip install 'profiler-users[{extra}]'` installs: {error}"
        ) from None
    users: Users = profiler_sqlalchemy.SQLAlchemyUsers(database, iterations, hashers)
    return users


# -- HTTP --------------------------------------------------------------------------------------------------------------
# What a request may ask and what a response is, whatever it is about.

JSON = ("Content-Type", "application/json")
_HEADERS = (  # of every response
    ("X-Content-Type-Options", "nosniff"),
    ("Cache-Control", "no-store"),
)
_DIGITS = re.compile("[0-9]{1,4000}")  # not \d, which takes the digits of every script; int() takes no more than 4300
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")  # Unicode's category Cc
_SURROGATE = re.compile("[\ud800-\udfff]")
_EMAIL = re.compile(r"[^@\s]+@[^@\s]+")
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)  # in JSON; without an end, it takes what is left
_BRACKET = re.compile(rb"[\[{]")
_ENTITY_TAG = re.compile(r'(W/)?("[\x21\x23-\x7e\x80-\xff]*")')  # RFC 9110 8.8.3


NOTHING_HERE = "Nothing is here: the users are at /users/"


def status_line(status: HTTPStatus) -> str:
    """Return a status as PEP 3333 has it, such as `200 OK`."""
    return f"{status.value} {status.phrase}"


OK, CREATED, NO_CONTENT = map(status_line, (HTTPStatus.OK, HTTPStatus.CREATED, HTTPStatus.NO_CONTENT))
NOT_MODIFIED, PERMANENT_REDIRECT = map(status_line, (HTTPStatus.NOT_MODIFIED, HTTPStatus.PERMANENT_REDIRECT))


class HTTPError(Exception):
    """A request that is answered with an error: a status, what the client should change, and headers, if any."""

    def __init__(self, status: HTTPStatus, message: str, *headers: tuple[str, str]) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers

    def response(self) -> Response:
        """Return what the client is answered."""
        return status_line(self.status), to_json({"error": self.message}), (JSON, *self.headers)


def to_json(value: object) -> bytes:
    """Return the value as a line of JSON in UTF-8."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def complete(response: Response) -> tuple[str, list[tuple[str, str]], Iterable[bytes]]:
    """Return the response as PEP 3333 has it: the status line, all headers, the body."""
    status, body, extra = response
    if body is None:
        return status, [*_HEADERS, *extra], (b"",)  # hypercorn sends no head before the first part
    if isinstance(body, bytes):
        return status, [*_HEADERS, *extra, ("Content-Length", str(len(body)))], (body,)
    return status, [*_HEADERS, *extra], body


def read_object(environ: WSGIEnvironment) -> dict[str, Any]:
    """Return the JSON object in the request's body. Raise HTTPError: 400, 408, 411, 413, 415."""
    _check_content_type(environ.get("CONTENT_TYPE", ""))
    body = _read_body(environ)
    if len(_BRACKET.findall(_STRING.sub(b"", body))) > MAX_BRACKETS:  # the parser would run out of its thread's stack
        raise HTTPError(HTTPStatus.BAD_REQUEST, f"The body is nested too deeply: it may have {MAX_BRACKETS} brackets")
    try:
        # No field is a number. As floats, numbers of thousands of digits cost nothing.
        value = json.loads(body.decode(), parse_int=float, parse_constant=_refuse_constant)
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
    values = [fields.get(name) for name in names]
    if not all(str(value or "").strip() for value in values):
        raise HTTPError(HTTPStatus.BAD_REQUEST, "Required fields are missing")
    return [check_field(name, value) for name, value in zip(names, values)]


def check_field(name: str, value: object) -> str:
    """Return a field's value, if it is valid. Raise HTTPError: 400; its message begins with the field's name."""
    problem = _find_problem(name, value)
    if problem:
        raise HTTPError(HTTPStatus.BAD_REQUEST, f"{name} {problem}")
    return str(value)


def read_query(environ: WSGIEnvironment) -> dict[str, str]:
    """Return the parameters of the query; of those with one name, the last. A + is a +, as RFC 3986 has it."""
    query = environ.get("QUERY_STRING", "").encode("latin-1", "replace").decode("utf-8", "replace")
    return dict(parse_qsl(query.replace("+", "%2B"), keep_blank_values=True))


def read_number(text: str, name: str, low: int, high: int) -> int:
    """Return the number that a parameter of the query gives. Raise HTTPError: 400."""
    if not _DIGITS.fullmatch(text) or not low <= int(text) <= high:
        raise HTTPError(HTTPStatus.BAD_REQUEST, f"{name} must be a number from {low} to {high}")
    return int(text)


def parse_length(text: str) -> int:
    """Return the number of bytes that a Content-Length announces (RFC 9110 8.6). Raise HTTPError: 400."""
    if not _DIGITS.fullmatch(text):
        raise HTTPError(HTTPStatus.BAD_REQUEST, "Content-Length must be a number in decimal digits")
    return int(text)


def make_entity_tag(body: bytes) -> str:
    """Return the strong ETag of a body: the same wherever and whenever it is the same (RFC 9110 8.8.3)."""
    return f'"{hashlib.blake2b(body, digest_size=16).hexdigest()}"'


def check_preconditions(environ: WSGIEnvironment, body: bytes | None) -> bool:
    """Tell whether the answer to a GET is 304. `body` is the user as it is now; None: there is none (RFC 9110 13.2.2).

    Raise HTTPError: 412 if the client does not want the request to be met as things are.
    """
    if_match, if_none_match = environ.get("HTTP_IF_MATCH"), environ.get("HTTP_IF_NONE_MATCH")
    entity_tag = None if body is None else make_entity_tag(body)
    if if_match is not None and not _matches(if_match, entity_tag, strongly=True):
        raise HTTPError(HTTPStatus.PRECONDITION_FAILED, "The user has changed since: get it again, then decide")
    if if_none_match is None or not _matches(if_none_match, entity_tag, strongly=False):
        return False
    if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
        raise HTTPError(HTTPStatus.PRECONDITION_FAILED, "The user is one that If-None-Match rules out")
    return True


def _matches(field: str, entity_tag: str | None, strongly: bool) -> bool:
    """Tell whether a list of ETags has this one. Strongly, a weak one has no match (RFC 9110 8.8.3.2)."""
    if entity_tag is None:
        return False
    if field.strip() == "*":
        return True
    if _ENTITY_TAG.sub("", field).strip(" \t,"):  # it is no list of ETags
        return False
    return any(tag == entity_tag and not (weak and strongly) for weak, tag in _ENTITY_TAG.findall(field))


def _check_content_type(content_type: str) -> None:
    media_type, *parameters = (part.strip() for part in content_type.lower().replace('"', "").split(";"))
    charsets = {parameter for parameter in parameters if parameter.startswith("charset=")}
    if media_type != "application/json" or not charsets <= {"charset=utf-8"}:
        raise HTTPError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "Send the body as Content-Type: application/json, in UTF-8")


def _read_body(environ: WSGIEnvironment) -> bytes:
    """Return the body. Its end is told by Content-Length or, where the server says that it is, by the stream."""
    stream, length = environ["wsgi.input"], environ.get("CONTENT_LENGTH", "")
    chunked = "HTTP_TRANSFER_ENCODING" in environ
    if length and not chunked:
        size = parse_length(length)
        _check_size(size)
        body = _read(stream, size)
        if len(body) < size:
            raise HTTPError(HTTPStatus.BAD_REQUEST, "The body is shorter than its Content-Length")
        return body
    if environ.get("wsgi.input_terminated", False):
        body = _read(stream, MAX_BODY + 1)
        _check_size(len(body))
        return body
    if chunked:
        raise HTTPError(HTTPStatus.LENGTH_REQUIRED, "This server takes no chunked body: send a Content-Length")
    return b""


def _check_size(size: int) -> None:
    if size > MAX_BODY:
        raise HTTPError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"The body must be at most {MAX_BODY} bytes")


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


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _find_problem(name: str, value: object) -> str | None:
    """Tell what is wrong with the value of a field, if anything."""
    if not isinstance(value, str):
        return "must be a string"
    if _SURROGATE.search(value):
        return "must not contain a lone surrogate"
    if name.endswith("password"):
        return "must not contain the NUL character" if "\0" in value else None
    if _CONTROL.search(value):
        return "must not contain control characters"
    if name == "email" and not (_EMAIL.fullmatch(value) and len(value) <= MAX_EMAIL):
        return f"must be an address such as harry@example.com, of at most {MAX_EMAIL} characters"
    if name.endswith("name") and len(value) > MAX_NAME:
        return f"must have at most {MAX_NAME} characters"
    return None


# -- endpoints ---------------------------------------------------------------------------------------------------------
# Each takes the users, the request and, if its path has one, the id of a user. Each raises HTTPError for a bad request,
# and what the users raise. ROUTES, below them, is their summary.

_PROFILE = ("first_name", "last_name", "email")
_SORTS = {"id": False, "-id": True}  # the value of sort, and whether it is descending: JSON:API's spelling


def create_user(users: Users, environ: WSGIEnvironment) -> Response:
    """Answer 201 with the new id, and where the user is to be found."""
    user_id = users.create(*read_fields(environ, (*_PROFILE, "password")))
    return CREATED, to_json({"id": user_id}), (JSON, ("Location", _url(environ, f"users/{user_id}/")))


def list_users(users: Users, environ: WSGIEnvironment) -> Response:
    """Answer 200 with an array of all users, or of those that the query's limit, after, email and sort ask for."""
    query = read_query(environ)
    limit = read_number(query["limit"], "limit", 1, MAX_LIMIT) if "limit" in query else None
    after = read_number(query["after"], "after", 0, MAX_ID) if "after" in query else None
    email = check_field("email", query["email"]) if "email" in query else None
    sort = query.get("sort", "id")
    if sort not in _SORTS:
        raise HTTPError(HTTPStatus.BAD_REQUEST, "sort must be id or -id")
    page, last = users.page(limit or BATCH, after, email, _SORTS[sort])
    if last is None:
        return OK, b"[%b]\n" % page, (JSON,)
    if limit is None and email is None:
        return OK, _array(page, users.list(last, _SORTS[sort])), (JSON,)
    following = {
        "limit": limit or BATCH,
        "after": last,
        **{name: query[name] for name in query if name in ("email", "sort")},
    }
    link = f'<{_url(environ, "users/")}?{urlencode(following)}>; rel="next"'  # RFC 8288
    return OK, b"[%b]\n" % page, (JSON, ("Link", link))


def get_user(users: Users, environ: WSGIEnvironment, user_id: int) -> Response:
    """Answer 200 with the user; 304 if the client has it already."""
    user = users.get(user_id) + b"\n"
    entity_tag = ("ETag", make_entity_tag(user))
    if ("HTTP_IF_NONE_MATCH" in environ or "HTTP_IF_MATCH" in environ) and check_preconditions(environ, user):
        return NOT_MODIFIED, None, (entity_tag,)
    return OK, user, (JSON, entity_tag)


def update_user(users: Users, environ: WSGIEnvironment, user_id: int) -> Response:
    """Answer 200 with the id. A password in the body is ignored, as any other field is."""
    first_name, last_name, email = read_fields(environ, _PROFILE)
    users.update(user_id, first_name, last_name, email, _precondition(environ))
    return OK, to_json({"id": user_id}), (JSON,)


def delete_user(users: Users, environ: WSGIEnvironment, user_id: int) -> Response:
    """Answer 204, whether the user existed or not."""
    users.delete(user_id, _precondition(environ))
    return NO_CONTENT, None, ()


def change_password(users: Users, environ: WSGIEnvironment, user_id: int) -> Response:
    """Answer 204 if the old password was right."""
    users.change_password(user_id, *read_fields(environ, ("old_password", "new_password")))
    return NO_CONTENT, None, ()


def verify_user(users: Users, environ: WSGIEnvironment) -> Response:
    """Answer 200 with the id of the user who has this email and this password; 403 alike for either that is wrong.

    Not 401, which would ask for another token (RFC 9110 15.5.2).
    """
    try:
        user_id = users.verify(*read_fields(environ, ("email", "password")))
    except WrongPassword:
        raise HTTPError(HTTPStatus.FORBIDDEN, "Wrong email or password") from None
    return OK, to_json({"id": user_id}), (JSON,)


def get_health(users: Users, environ: WSGIEnvironment) -> Response:
    """Answer 200 if users can be read. Raise Unavailable, whatever is in the way."""
    try:
        users.check()
    except Exception as error:
        raise Unavailable(str(error)) from error
    return OK, to_json({"status": "ok"}), (JSON,)


def get_page(users: Users, environ: WSGIEnvironment) -> Response:
    """Answer 200 with index.html, if it lies beside this module; the mount point without its slash leads to it."""
    page, policy = _read_page()
    if not environ.get("PATH_INFO"):
        return PERMANENT_REDIRECT, None, (("Location", _url(environ)),)
    return OK, page, (("Content-Type", "text/html; charset=utf-8"), ("Content-Security-Policy", policy))


def get_document(users: Users, environ: WSGIEnvironment) -> Response:
    """Answer 200 with openapi.json, if it lies beside this module."""
    return OK, _read_optional("openapi.json"), (JSON,)


ROUTES: tuple[tuple[re.Pattern[str], dict[str, Callable[..., Response]]], ...] = (
    (re.compile("/users/([0-9]{1,19})/?"), {"GET": get_user, "PUT": update_user, "DELETE": delete_user}),
    (re.compile("/users/?"), {"GET": list_users, "POST": create_user}),
    (re.compile("/users/([0-9]{1,19})/password/?"), {"PUT": change_password}),
    (re.compile("/users/verify/?"), {"POST": verify_user}),
    (re.compile("/health/?"), {"GET": get_health}),
    (re.compile("/?"), {"GET": get_page}),
    (re.compile("/openapi[.]json"), {"GET": get_document}),
)
TOKENLESS = re.compile("/health/?|/?|/openapi[.]json")  # paths that ask for no token: nothing there is secret


def _array(page: bytes, more: Iterable[bytes]) -> Iterator[bytes]:
    """Yield an array that is sent as it is read, page by page."""
    yield b"[" + page
    for page in more:
        if page:  # the last users may have gone since
            yield b"," + page
    yield b"]\n"


def _precondition(environ: WSGIEnvironment) -> Check | None:
    """Return what judges the request's preconditions by the user as it is when it is written."""
    if "HTTP_IF_MATCH" not in environ and "HTTP_IF_NONE_MATCH" not in environ:
        return None
    return lambda user: check_preconditions(environ, None if user is None else user + b"\n")


def _url(environ: WSGIEnvironment, rest: str = "") -> str:
    """Return the path of what is served below the mount point."""
    mount_point = quote(environ.get("SCRIPT_NAME", ""), encoding="latin-1")
    return "/" + f"{mount_point}/{rest}".lstrip("/")  # two slashes would lead to another host


def has_page() -> bool:
    """Tell whether there is a page to open in a browser."""
    with contextlib.suppress(HTTPError):
        return bool(_read_page())
    return False


@functools.cache
def _read_page() -> tuple[bytes, str]:
    """Return the page and the policy that lets a browser run its script, and use its style, and no others."""
    page = _read_optional("index.html")
    return page, (
        "default-src 'none'; "
        f"script-src {_hash_elements(b'script', page)}; style-src {_hash_elements(b'style', page)}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _hash_elements(name: bytes, page: bytes) -> str:
    """Return how the policy names what stands in a page's elements of this name (CSP Level 3, 2.3.1)."""
    texts = re.findall(b"<%b>(.*?)</%b>" % (name, name), page, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(text).digest()).decode() for text in texts]
    return " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"


@functools.cache
def _read_optional(name: str) -> bytes:
    """Return a file that may lie beside this module. Raise HTTPError: 404."""
    try:
        return read_file(name)
    except OSError:
        raise HTTPError(HTTPStatus.NOT_FOUND, NOTHING_HERE) from None


# -- application -------------------------------------------------------------------------------------------------------
# PEP 3333. Here alone errors become responses, and tracebacks are written.

# Answers, which are never raised: an exception that is raised again and again keeps the frames of each time.
ERRORS: dict[type[Exception], HTTPError] = {
    EmailTaken: HTTPError(HTTPStatus.BAD_REQUEST, "This email is already registered"),
    NoSuchUser: HTTPError(HTTPStatus.NOT_FOUND, "Invalid user id"),
    WrongPassword: HTTPError(HTTPStatus.FORBIDDEN, "Wrong password"),
    Busy: HTTPError(
        HTTPStatus.SERVICE_UNAVAILABLE, "The service is busy: try again", ("Retry-After", str(RETRY_AFTER))
    ),
    Unavailable: HTTPError(
        HTTPStatus.SERVICE_UNAVAILABLE,
        "The database cannot be used now: its operator finds the reason in the log",
        ("Retry-After", str(RETRY_AFTER)),
    ),
}
_INTERNAL_ERROR = HTTPError(HTTPStatus.INTERNAL_SERVER_ERROR, "Internal server error")
_VISIBLE = re.compile("[!-~]+")


class Application:
    """The WSGI callable. Make it with create_app; any number of threads may call it."""

    def __init__(self, users: Users, token: str | None) -> None:
        """Serve these users, to whoever sends the token, if there is one. Raise ValueError if it is too short."""
        if token is not None and not (len(token) >= MIN_TOKEN and _VISIBLE.fullmatch(token)):
            raise ValueError(f"the token must be at least {MIN_TOKEN} characters of visible ASCII, without spaces")
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
        self.users.close()

    def _respond(self, environ: WSGIEnvironment) -> Response:
        """Return the response of the path's handler for the method. Raise what it raises; HTTPError: 401, 404, 405."""
        method, path = environ["REQUEST_METHOD"], environ.get("PATH_INFO", "")
        if self.token and not (
            TOKENLESS.fullmatch(path) or _carries(self.token, environ.get("HTTP_AUTHORIZATION", ""))
        ):
            challenge = ("WWW-Authenticate", "Bearer")  # RFC 6750 3
            raise HTTPError(HTTPStatus.UNAUTHORIZED, "Send the header Authorization: Bearer TOKEN", challenge)
        for pattern, handlers in ROUTES:
            if match := pattern.fullmatch(path):
                if handler := handlers.get("GET" if method == "HEAD" else method):
                    if pattern.groups:
                        return handler(self.users, environ, _read_id(match[1]))
                    return handler(self.users, environ)
                allow = ("Allow", ", ".join(sorted([*handlers, "OPTIONS"] + ["HEAD"] * ("GET" in handlers))))
                if method == "OPTIONS":
                    return NO_CONTENT, None, (allow,)
                raise HTTPError(HTTPStatus.METHOD_NOT_ALLOWED, f"The method must be one of: {allow[1]}", allow)
        if method == "OPTIONS" and path == "*":  # asks the server as a whole: RFC 9110 9.3.7
            return NO_CONTENT, None, ()
        raise HTTPError(HTTPStatus.NOT_FOUND, NOTHING_HERE)


def create_app(
    database: str | os.PathLike[str] | None = None, *, iterations: int = ITERATIONS, token: str | None = None
) -> Application:
    """Return a WSGI application on a database: a path or a URL, else PROFILER_DATABASE, else ./db.sqlite3.

    The file is made at the first request. `iterations` are those of PBKDF2 for new passwords. With a token, else with
    PROFILER_TOKEN, every request must carry it (RFC 6750); without, all are let in.
    Raise ValueError for a database that cannot be, iterations outside 1..MAX_ITERATIONS, a token that is too short.
    """
    if type(iterations) is not int or not 1 <= iterations <= MAX_ITERATIONS:
        raise ValueError(f"iterations must be a number from 1 to {MAX_ITERATIONS}")
    if database is None:
        database = os.environ.get("PROFILER_DATABASE") or DATABASE
    if token is None:
        token = os.environ.get("PROFILER_TOKEN")
    return Application(open_users(os.fspath(database), iterations), token)


_default: dict[str, Application] = {}


def _default_app() -> Application:
    """Return the one default application of this process. setdefault is atomic: concurrent callers get the same one."""
    return _default.get("app") or _default.setdefault("app", create_app())


def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """Answer as create_app() does, which is called at the first request: to import this module reads nothing."""
    try:
        default_app = _default_app()
    except Exception as error:  # a setting that cannot be: let nobody in, and tell the operator
        return _send(_error_response(error, environ), environ, start_response)
    return default_app(environ, start_response)


app = application


def _send(response: Response, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """Start the response and return its body."""
    status, headers, body = complete(response)
    start_response(status, headers)
    return (b"",) if environ["REQUEST_METHOD"] == "HEAD" else body


def _read_id(digits: str) -> int:
    """Return the id that a path gives. Raise NoSuchUser for one that nobody can have."""
    user_id = int(digits)
    if user_id > MAX_ID:
        raise NoSuchUser
    return user_id


def _carries(token: bytes, authorization: str) -> bool:
    """Tell whether an Authorization header carries the token (RFC 6750 2.1)."""
    scheme, _, credentials = authorization.partition(" ")
    given = credentials.strip(" ").encode("utf-8", "surrogatepass")
    return scheme.lower() == "bearer" and hmac.compare_digest(given, token)


def _error_response(error: Exception, environ: WSGIEnvironment) -> Response:
    """Return what to tell the client; write to wsgi.errors what to tell the operator."""
    answer = error if isinstance(error, HTTPError) else ERRORS.get(type(error), _INTERNAL_ERROR)
    with contextlib.suppress(OSError, ValueError):  # a log that cannot be written to, or is closed
        if answer is _INTERNAL_ERROR:
            traceback.print_exception(type(error), error, error.__traceback__, file=environ["wsgi.errors"])
        elif answer.status == HTTPStatus.SERVICE_UNAVAILABLE:
            environ["wsgi.errors"].write(f"profiler: answered 503: {error}\n")
    return answer.response()


# -- server: parsing ---------------------------------------------------------------------------------------------------
# From bytes to an environ, without a socket. What a proxy in front might read otherwise than this server is refused
# (RFC 9112 11.2): http.server's own parser, which lets much of it through, is not used.

_NAME = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # RFC 9110 5.6.2
_REQUEST_LINE = re.compile(rb"(%b) ([\x21-\x7e\x80-\xff]+) HTTP/([0-9A-Za-z.]+)" % _NAME)  # RFC 9112 3
# No space before the colon, no folding, no bare CR or LF, no control character: RFC 9112 5.1, 5.2, 2.2; RFC 9110 5.5.
_FIELD_LINE = re.compile(rb"(%b):([\t\x20-\x7e\x80-\xff]*)" % _NAME)
HEAD_END = re.compile(rb"\n\r?\n")  # a line's end without CR is found here, so that it can be refused at once
_HOST = re.compile(r"[A-Za-z0-9._~!$&'()*+,;=:%\[\]-]*")  # RFC 9110 7.2
_ABSOLUTE = re.compile(rf"https?://(?![/?#]|$)({_HOST.pattern})((?:[/?#].*)?)", re.IGNORECASE)  # RFC 9112 3.2.2
_LOCAL_HOST = re.compile(r"(localhost|127(\.[0-9]{1,3}){3}|\[::1\])(:[0-9]*)?", re.IGNORECASE)


def parse_head(head: bytes) -> WSGIEnvironment:
    """Return what the head of a request says, under PEP 3333's names. `head` ends with its empty line.

    Raise HTTPError for what is not plainly HTTP/1: 400, 411, 414, 417, 431, 501, 505.
    """
    check_head_size(head)
    lines = head.removeprefix(b"\r\n").removesuffix(b"\r\n\r\n").split(b"\r\n")  # RFC 9112 2.2: one may go before
    environ, authority = _parse_request_line(lines[0])
    if len(lines) > MAX_FIELDS + 1:
        raise HTTPError(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"Send at most {MAX_FIELDS} headers")
    for line in lines[1:]:
        _add_field(environ, line)
    environ["CONTENT_TYPE"] = environ.pop("HTTP_CONTENT_TYPE", "")
    environ["CONTENT_LENGTH"] = environ.pop("HTTP_CONTENT_LENGTH", "")
    _check_framing(environ)
    if authority:  # of an absolute target: it goes before the Host (RFC 9112 3.2.2)
        environ["HTTP_HOST"] = authority
    return environ


def check_head_size(head: bytes) -> None:
    """Return if a head, or what there is of it, may be that long. Raise HTTPError: 414, 431."""
    if len(head) > MAX_REQUEST_LINE and b"\n" not in head.removeprefix(b"\r\n")[:MAX_REQUEST_LINE]:
        raise HTTPError(HTTPStatus.REQUEST_URI_TOO_LONG, f"Send a request line of at most {MAX_REQUEST_LINE} bytes")
    if len(head) > MAX_HEAD:
        raise HTTPError(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"Send a head of at most {MAX_HEAD} bytes")


def check_local_host(environ: WSGIEnvironment) -> None:
    """Return if the request is for a name of this machine's loopback. Raise HTTPError: 421.

    A web page whose own name was made to lead to 127.0.0.1 can send requests here, but under its own name alone.
    """
    host = environ.get("HTTP_HOST")
    if host is not None and not _LOCAL_HOST.fullmatch(host):
        raise HTTPError(
            HTTPStatus.MISDIRECTED_REQUEST,  # RFC 9110 15.5.20
            "Send the Host localhost or 127.0.0.1; for others the server needs a token, or --anonymous",
        )


def wants_close(environ: WSGIEnvironment) -> bool:
    """Tell whether the request is its connection's last (RFC 9112 9.3): HTTP/1.0's always is, here."""
    if environ["SERVER_PROTOCOL"] != "HTTP/1.1":
        return True
    options = environ.get("HTTP_CONNECTION", "").lower().split(",")
    return "close" in [option.strip(" \t") for option in options]


def format_head(status: str, headers: Iterable[tuple[str, str]]) -> bytes:
    """Return the head of a response."""
    lines = [f"HTTP/1.1 {status}", f"Date: {_http_date(int(time.time()))}", f"Server: profiler/{__version__}"]
    lines += [f"{name}: {value}" for name, value in headers]
    return "\r\n".join([*lines, "\r\n"]).encode("latin-1")


def _parse_request_line(line: bytes) -> tuple[WSGIEnvironment, str]:
    """Return what the first line says, and the authority of a target that has one. Raise HTTPError: 400, 505."""
    match = _REQUEST_LINE.fullmatch(line)
    if not match:
        raise HTTPError(HTTPStatus.BAD_REQUEST, "The request line must be `METHOD /path HTTP/1.1`")
    method, target, version = (part.decode("latin-1") for part in match.groups())
    if version not in ("1.0", "1.1"):  # RFC 9110 15.6.6
        raise HTTPError(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "Speak HTTP/1.1 or HTTP/1.0")
    authority = ""
    if target[0] != "/" and target != "*":
        absolute = _ABSOLUTE.fullmatch(target)
        if not absolute:
            raise HTTPError(HTTPStatus.BAD_REQUEST, "The request target must be a path")
        authority, target = absolute.groups()
    path, _, query = target.partition("?")
    environ = {
        "REQUEST_METHOD": method,
        "PATH_INFO": unquote(path, "latin-1"),
        "QUERY_STRING": query,
        "SERVER_PROTOCOL": f"HTTP/{version}",
    }
    return environ, authority


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
    http_1_1 = environ["SERVER_PROTOCOL"] == "HTTP/1.1"
    if (http_1_1 and "HTTP_HOST" not in environ) or not _HOST.fullmatch(environ.get("HTTP_HOST", "")):  # RFC 9112 3.2
        raise HTTPError(HTTPStatus.BAD_REQUEST, "Send one Host, such as localhost:5000")
    if http_1_1 and environ.get("HTTP_EXPECT", "100-continue").lower() != "100-continue":  # RFC 9110 10.1.1
        raise HTTPError(HTTPStatus.EXPECTATION_FAILED, "The only Expect that can be met is 100-continue")
    if "HTTP_TRANSFER_ENCODING" in environ:  # RFC 9112 6.1 and 6.3
        if environ["CONTENT_LENGTH"]:
            raise HTTPError(HTTPStatus.BAD_REQUEST, "Send either a Content-Length or a Transfer-Encoding")
        if environ["HTTP_TRANSFER_ENCODING"].lower() == "chunked":
            raise HTTPError(HTTPStatus.LENGTH_REQUIRED, "This server takes no chunked body: send a Content-Length")
        raise HTTPError(HTTPStatus.NOT_IMPLEMENTED, "This server knows no Transfer-Encoding: send a Content-Length")


@functools.lru_cache(maxsize=1)
def _http_date(second: int) -> str:
    return str(format_date_time(second))


# -- server: connections -----------------------------------------------------------------------------------------------
# wsgiref's server and handler, made fit to be left running: HTTP/1.1, a thread for each connection, a deadline for each
# wait. Two things are replaced: http.server's reading of requests, by the parser above, and wsgiref's writing of
# responses, which knows HTTP/1.0 alone. It serves the Application, which takes no body past MAX_BODY.

_BODILESS = (204, 304)  # RFC 9110 6.4.1


class Server(socketserver.ThreadingMixIn, WSGIServer):
    """An HTTP server for an Application, in one process."""

    application: Application  # set_app keeps it here
    daemon_threads = True
    request_queue_size = MAX_CONNECTIONS
    timeout = POLL_INTERVAL

    def __init__(
        self, host: str, port: int, app: Application, access_log: bool = True, check_host: bool = False
    ) -> None:
        """Listen on an address, an IPv4 or IPv6 one. Raise OSError if that cannot be.

        With `check_host`, requests under another name than this machine's loopback has are refused.
        """
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.access_log = access_log
        self.check_host = check_host
        self.max_connections, self.max_refusals = MAX_CONNECTIONS, MAX_REFUSALS
        self.log = Log()
        self.stopping = False
        self.turn = threading.Lock()  # see RequestHandler
        self.connections: dict[socket.socket, bool] = {}  # each with whether a request is being answered
        self._closed = threading.Condition()
        super().__init__((host, port), RequestHandler)
        self.socket.settimeout(POLL_INTERVAL)  # no accept may wait for a client who has left meanwhile
        self.set_app(app)

    def server_bind(self) -> None:
        """Bind the socket, without asking a name service what this host is called."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()
        self.base_environ.update(  # PEP 3333
            {
                "wsgi.version": (1, 0),
                "wsgi.url_scheme": "http",
                "wsgi.multithread": True,
                "wsgi.multiprocess": False,
                "wsgi.run_once": False,
            }
        )

    def stop(self, *_: object) -> None:
        """Tell the server to stop: a signal's handler."""
        self.stopping = True

    def serve(self) -> None:
        """Serve until stop is called; then answer what is in flight, within DRAIN_TIMEOUT, and close."""
        while not self.stopping:
            self.handle_request()
        self.socket.close()
        for request, answering in list(self.connections.items()):
            if not answering:
                with contextlib.suppress(OSError):
                    request.shutdown(socket.SHUT_RD)  # its thread reads the end, behind whatever had arrived
        with self._closed:
            self._closed.wait_for(lambda: not self.connections, DRAIN_TIMEOUT)

    def get_request(self) -> Any:
        """Accept a connection. Raise OSError: after a pause if the system is out of means, such as files to open."""
        try:
            return super().get_request()
        except socket.timeout:
            raise
        except OSError:
            time.sleep(POLL_INTERVAL)
            raise

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Take a connection too many, too, so that it can be told; but not many of those."""
        return len(self.connections) < self.max_connections + self.max_refusals

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give a connection its thread, or close it where the system has no more threads."""
        self.connections[request] = False
        try:
            super().process_request(request, client_address)
        except RuntimeError:
            self.shutdown_request(request)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection and forget it."""
        super().shutdown_request(request)
        with self._closed:
            self.connections.pop(request, None)
            self._closed.notify_all()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Write the traceback of what nobody expected to the log."""
        self.log.write(traceback.format_exc())


class RequestHandler(WSGIRequestHandler):
    """One connection: its requests, one after another.

    Threads take turns: one at a time receives what has come, answers a read and sends what the socket takes at once,
    because threads that fight for the GIL at each of these steps answer fewer requests. The turn is left before any
    wait for a client and before any write or hash, and whoever does not get it within TURN_TIMEOUT goes on without it.
    """

    server: Server

    def setup(self) -> None:
        """Prepare to send without delay."""
        self.connection: socket.socket = self.request
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        self.connection.setblocking(False)  # _wait does all the waiting
        self.poll = select.poll() if hasattr(select, "poll") else None  # Windows has none
        self.received = b""  # and not yet used
        self.close_connection = False
        self.linger = False
        self.has_turn = False
        self.head = b""  # of the request that is being answered, as far as it has come
        self.started: tuple[str, list[tuple[str, str]]] = ("", [])

    def handle(self) -> None:
        """Answer requests until either side wants no more."""
        with contextlib.suppress(OSError):  # the client has left, or stalls: there is nobody to tell
            if len(self.server.connections) > self.server.max_connections:
                self._refuse(ERRORS[Busy])
            while not self.close_connection:
                self.handle_one_request()
            if self.linger or self.received:
                self._linger()

    def finish(self) -> None:
        """Leave the turn, whatever happened; the server closes the connection."""
        self._leave_turn()

    def handle_one_request(self) -> None:
        """Receive a request and answer it. Raise OSError if the client is not there."""
        try:
            head = self._receive_head()
            if not head:
                self.close_connection = True
                return
            self.server.connections[self.connection] = True
            environ = {**self.server.base_environ, **parse_head(head), "REMOTE_ADDR": self.client_address[0]}
            if self.server.check_host:
                check_local_host(environ)
            environ["wsgi.input"] = io.BytesIO(self._receive_body(environ))
            environ["wsgi.errors"] = self.server.log
        except socket.timeout:
            if self.head:
                self._refuse(HTTPError(HTTPStatus.REQUEST_TIMEOUT, "The request took too long to arrive"))
            self.close_connection = True
        except HTTPError as error:
            self._refuse(error)
        else:
            self._answer(environ)
            self.server.connections[self.connection] = False
            if self.server.stopping:  # perhaps too late for the response to say that it is the last
                self.close_connection = True

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Write a line in Common Log Format."""
        if self.server.access_log:
            request = self._request_line().encode("unicode_escape").decode().replace('"', '\\"')
            moment = _log_time(int(time.time()))
            self.server.log.write(f'{self.client_address[0]} - - [{moment}] "{request}" {code} {size}\n')

    def _receive_head(self) -> bytes:
        """Return the next head, or nothing if the client ends before it begins one. Raise HTTPError; socket.timeout."""
        deadline = time.monotonic() + (HEAD_TIMEOUT if self.received else IDLE_TIMEOUT)
        searched = 0
        while not (end := HEAD_END.search(self.received, max(0, searched - 2))):  # it may begin two bytes earlier
            self.head = self.received
            check_head_size(self.received)
            searched = len(self.received)
            more = self._receive(deadline)
            if not (more or self.received):
                return b""
            if not more:
                raise HTTPError(HTTPStatus.BAD_REQUEST, "The head ends before its empty line")
            if not self.received:
                deadline = time.monotonic() + HEAD_TIMEOUT
            self.received += more
        self.head, self.received = self.received[: end.end()], self.received[end.end() :]
        return self.head

    def _request_line(self) -> str:
        """Return the first line of the request, or the beginning of a long one, for the log."""
        return self.head.lstrip(b"\r\n").split(b"\n", 1)[0].rstrip(b"\r")[:MAX_LOGGED].decode("latin-1")

    def _receive_body(self, environ: WSGIEnvironment) -> bytes:
        """Return the body, or none of one that the application refuses. Raise HTTPError: 400; socket.timeout."""
        length = parse_length(environ["CONTENT_LENGTH"] or "0")
        if length > MAX_BODY:
            self.close_connection = self.linger = True
            return b""
        if length and "HTTP_EXPECT" in environ and environ["SERVER_PROTOCOL"] == "HTTP/1.1":
            self._send(b"HTTP/1.1 100 Continue\r\n\r\n")  # RFC 9110 10.1.1
        deadline = time.monotonic() + BODY_TIMEOUT
        while len(self.received) < length:
            more = self._receive(deadline)
            if not more:
                raise HTTPError(HTTPStatus.BAD_REQUEST, "The body is shorter than its Content-Length")
            self.received += more
        body, self.received = self.received[:length], self.received[length:]
        return body

    def _receive(self, deadline: float) -> bytes:
        """Return some of what the client sends, or nothing at its end. Raise socket.timeout after the deadline."""
        self._wait(deadline - time.monotonic())
        self._take_turn()
        return self.connection.recv(RECEIVE_SIZE)

    def _send(self, message: bytes) -> None:
        """Send it all, however slowly the client reads, as long as it does read. Raise OSError if not."""
        while message := self._send_at_once(message):
            self._wait(SEND_TIMEOUT, to_write=True)

    def _send_at_once(self, message: bytes) -> bytes:
        """Send what the socket takes without waiting; return the rest."""
        try:
            return message[self.connection.send(message) :]
        except BlockingIOError:
            return message

    def _wait(self, seconds: float, to_write: bool = False) -> None:
        """Wait until the socket can be read from, or written to. Raise socket.timeout.

        The socket's own timeout would have to be set for each wait, which lets go of the GIL once more.
        """
        self._leave_turn()
        seconds = max(0.0, seconds)
        if self.poll:
            self.poll.register(self.connection, select.POLLOUT if to_write else select.POLLIN)
            is_ready = bool(self.poll.poll(seconds * 1000))
        else:
            is_ready = any(
                select.select(*(([], [self.connection]) if to_write else ([self.connection], [])), [], seconds)
            )
        if not is_ready:
            raise socket.timeout("the deadline has passed")

    def _take_turn(self) -> None:
        self.has_turn = self.has_turn or self.server.turn.acquire(timeout=TURN_TIMEOUT)

    def _leave_turn(self) -> None:
        if self.has_turn:
            self.has_turn = False
            self.server.turn.release()

    def _start_response(self, status: str, headers: list[tuple[str, str]], exc_info: object = None) -> Any:
        """Take note of how the response begins (PEP 3333); it is sent with the first part of the body."""
        self.started = status, headers
        return self._send

    def _answer(self, environ: WSGIEnvironment) -> None:
        """Send what the application answers. If its body fails midway, the response has no proper end."""
        if environ["REQUEST_METHOD"] in ("GET", "HEAD"):
            self._take_turn()
        else:
            self._leave_turn()
        try:
            parts = iter(self.server.application(environ, self._start_response))
            part = next(parts, b"")
            status, headers = self.started
            code = int(status[:3])
            chunked = self._settle(code, headers, environ)
            rest = self._send_at_once(format_head(status, headers) + _format_part(part, chunked))
        finally:
            self._leave_turn()
        size = len(part)
        try:
            if rest:
                self._send(rest)
            for part in parts:
                self._send(_format_part(part, chunked))
                size += len(part)
            if chunked:
                self._send(b"0\r\n\r\n")  # RFC 9112 7.1
        except OSError:
            self.log_request(code, size)
            raise
        except Exception as error:
            self.close_connection = True
            self.server.log.write(
                f"profiler: {self._request_line()}: the answer broke off after {size} bytes: {error!r}\n"
            )
        else:
            self.log_request(code, size)

    def _settle(self, code: int, headers: list[tuple[str, str]], environ: WSGIEnvironment) -> bool:
        """Add the connection's own headers. Tell whether the body is chunked, so that its end can be told."""
        bodiless = code in _BODILESS or environ["REQUEST_METHOD"] == "HEAD"
        chunked = not bodiless and "Content-Length" not in dict(headers) and environ["SERVER_PROTOCOL"] == "HTTP/1.1"
        if chunked:
            headers.append(("Transfer-Encoding", "chunked"))
        if self.close_connection or self.server.stopping or wants_close(environ):
            self.close_connection = True
            headers.append(("Connection", "close"))
        return chunked

    def _refuse(self, error: HTTPError) -> None:
        """Answer with an error, as the last thing on this connection."""
        self.close_connection = self.linger = True
        status, headers, body = complete(error.response())
        content = b"" if self.head.startswith(b"HEAD ") else b"".join(body)
        self._send(format_head(status, [*headers, ("Connection", "close")]) + content)
        self.log_request(status[:3], len(content))

    def _linger(self) -> None:
        """Read on for a while: if bytes are unread at the close, TCP takes the answer back (RFC 9112 9.6)."""
        self.connection.shutdown(socket.SHUT_WR)
        deadline, left = time.monotonic() + BODY_TIMEOUT, MAX_LINGER
        while left > 0 and (more := self._receive(min(deadline, time.monotonic() + LINGER_TIMEOUT))):
            left -= len(more)


class Log(io.TextIOBase):
    """stderr, less what it does not take at once: a log that is full, closed or not read any more ends nothing."""

    def write(self, text: str) -> int:
        """Write the text, or drop it."""
        with contextlib.suppress(OSError, ValueError):
            if _is_writable(sys.stderr):
                sys.stderr.write(text)
        return len(text)


def _is_writable(stream: Any) -> bool:
    """Tell whether a stream takes some text without waiting, as far as the system can tell."""
    try:
        return bool(select.select([], [stream], [], 0)[1])
    except (OSError, ValueError):  # it is no file; or this is Windows, which tells it of sockets alone
        return True


def _format_part(part: bytes, chunked: bool) -> bytes:
    """Return a part of a body as it is sent. An empty chunk would be the last one: RFC 9112 7.1."""
    return b"%x\r\n%b\r\n" % (len(part), part) if chunked and part else part


@functools.lru_cache(maxsize=1)
def _log_time(second: int) -> str:
    return time.strftime("%d/%b/%Y:%H:%M:%S %z", time.localtime(second))


# -- command line ------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the arguments say (default: sys.argv). Return 0, or 1 for what failed; exit with 2 for a bad setting.

    As a CGI program (RFC 3875) answer one request: there the arguments are the client's.
    """
    if argv is None and os.environ.get("GATEWAY_INTERFACE", "").startswith("CGI/"):
        CGIHandler().run(application)
        return 0
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115  # whoever started us may have closed it
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may hold anything
    parser = _make_parser()
    arguments = parser.parse_args(argv)
    if not hasattr(hashlib, "pbkdf2_hmac"):
        return _fail("this Python was built without OpenSSL, and so without hashlib.pbkdf2_hmac: take another")
    try:
        users = open_users(arguments.database, ITERATIONS)
    except ValueError as error:
        parser.error(str(error))
    except Unavailable as error:
        return _fail(str(error))
    try:
        with contextlib.closing(users):
            arguments.run(arguments, users)
    except _BadSetting as error:
        parser.error(str(error))
    except (Unavailable, sqlite3.Error) as error:
        return _fail(f"{users.place}: {error}. Another database is chosen by --database")
    except (_Failure, HTTPError, NoSuchUser, TableInUse, OSError) as error:
        return _fail(str(error))
    except KeyboardInterrupt:  # before there was anything to stop
        return 128 + signal.SIGINT
    finally:
        _flush()
    return 0


class _Failure(Exception):
    """What kept a command from doing its work."""


class _BadSetting(argparse.ArgumentTypeError):
    """An argument or a variable of the environment that cannot be."""


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="profiler",
        description="User accounts over HTTP. Without a command: serve them.",
        epilog="What no flag gives is taken from the environment: PROFILER_HOST, PROFILER_PORT or PORT, "
        "PROFILER_DATABASE, PROFILER_TOKEN (the token itself).",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--host", type=_address, help=f"the address to serve on ({HOST})")
    add("--port", type=_port, help=f"the port; 0 is any free one ({PORT})")
    database = os.environ.get("PROFILER_DATABASE") or DATABASE
    add("--database", default=database, help=f"the SQLite file, or a URL ({DATABASE})")
    add(
        "--token-file",
        type=_token,
        dest="token",
        metavar="PATH",
        help="a file with the token that every request must carry",
    )
    add("--anonymous", action="store_true", help="serve any address, and under any name, without a token")
    add("--no-access-log", action="store_true", help="write no line for each request to stderr")
    add("--version", action="version", version=f"profiler {__version__}")
    parser.set_defaults(run=_serve)

    every = argparse.ArgumentParser(add_help=False)  # what may stand behind a command as well
    every.add_argument("--database", default=argparse.SUPPRESS, help="the SQLite file, or a URL")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    initialise = commands.add_parser(
        "initialise-database", parents=[every], allow_abbrev=False, help="make the table of users"
    )
    initialise.add_argument("--force", action="store_true", help="drop the users in the table, for good")
    initialise.set_defaults(run=_initialise_database)

    set_password = commands.add_parser(
        "set-password", parents=[every], allow_abbrev=False, help="give a user another password"
    )
    set_password.add_argument("email", metavar="EMAIL", help="whose; the password is read from the terminal or stdin")
    set_password.set_defaults(run=_set_password)

    backup = commands.add_parser(
        "backup", parents=[every], allow_abbrev=False, help="copy the database while it is served"
    )
    backup.add_argument("path", metavar="PATH", help="where to; a file that is not there yet")
    backup.set_defaults(run=_backup)
    return parser


def _address(text: str) -> str:
    try:
        return str(socket.getaddrinfo(text.encode(), 0, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise _BadSetting(f"{text!r}, from the flag or PROFILER_HOST: {error.strerror}") from None


def _port(text: str) -> int:
    if re.fullmatch("[0-9]{1,5}", text) and int(text) <= MAX_PORT:
        return int(text)
    message = f"{text!r}, from the flag, PROFILER_PORT or PORT, is no number from 0 to {MAX_PORT}"
    raise _BadSetting(message)


def _token(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().strip()
    except (OSError, ValueError) as error:
        raise _BadSetting(f"{path!r} cannot be read: {error}") from None


def _serve(arguments: argparse.Namespace, users: Users) -> None:
    """Serve until a signal."""
    environ = os.environ.get
    own_port = environ("PROFILER_PORT") or ""
    if own_port.startswith("tcp://"):  # not meant for us: Kubernetes sets it so for a Service that is called profiler
        own_port = ""
    host = arguments.host or _address(environ("PROFILER_HOST") or HOST)
    port = _port(own_port or environ("PORT") or PORT) if arguments.port is None else arguments.port
    token = environ("PROFILER_TOKEN") if arguments.token is None else arguments.token
    try:
        app = Application(users, token)
    except ValueError as error:
        raise _BadSetting(str(error)) from None
    is_open = token is None and not arguments.anonymous
    if is_open and not (host.startswith("127.") or host == "::1"):
        raise _BadSetting(f"--host {host} is open to others: set a token (--token-file, PROFILER_TOKEN) or --anonymous")
    users.prepare()
    count = users.count()  # a database that cannot be used is told now
    users.close()  # what was read to count them need not stay in memory
    _save_address_space()
    try:
        server = Server(host, port, app, not arguments.no_access_log, check_host=is_open)
    except OSError as error:
        raise _Failure(f"port {port} of {host}: {error.strerror}: choose another --port or --host") from None
    with server:
        spare = max(2, _raise_file_limit() - RESERVED_FILES)
        server.max_refusals = min(MAX_REFUSALS, spare // 10)
        server.max_connections = min(MAX_CONNECTIONS, spare - server.max_refusals)
        signals = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]
        for signum in signals:
            if signum in (signal.SIGTERM, signal.SIGINT) or signal.getsignal(signum) != signal.SIG_IGN:  # as nohup says
                signal.signal(signum, server.stop)
        name = f"[{host}]" if ":" in host else host
        _say(f"http://{name}:{server.server_port}/{'' if has_page() else 'users/'}")
        _say(f"The database is {users.place}; it holds {count_users(count)}. Ctrl-C stops the server.")
        server.serve()
        for signum in signals:
            signal.signal(signum, signal.SIG_IGN)  # all is done: a second one shall not spoil the exit status


def _save_address_space() -> None:
    """Give threads small stacks, and one heap in common: glibc reserves 64 MiB for each thread's own (mallopt(3))."""
    threading.stack_size(STACK_SIZE)
    with contextlib.suppress(Exception):  # another C library, or a Python without ctypes
        import ctypes

        m_arena_max = -8  # malloc.h
        ctypes.CDLL(None).mallopt(m_arena_max, 1)


def _raise_file_limit() -> int:
    """Let this process open as many files as it may at most; return how many."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return sys.maxsize
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        limit = most
    return sys.maxsize if limit == resource.RLIM_INFINITY else limit


def _initialise_database(arguments: argparse.Namespace, users: Users) -> None:
    users.initialise(arguments.force)
    _say("Successfully created database schema.")


def _set_password(arguments: argparse.Namespace, users: Users) -> None:
    users.expect()
    if not users.find(check_field("email", arguments.email)):  # before anybody types a password
        raise NoSuchUser(f"nobody has the email {arguments.email}")
    password = check_field("password", _read_password())
    if not password.strip():
        raise _Failure("the password must not be blank")
    users.set_password(arguments.email, password)
    _say(f"{arguments.email} has another password now.")


def _read_password() -> str:
    """Return a new password: twice the same from a terminal, without echo, or a line of stdin. Raise OSError."""
    if sys.stdin is None:
        raise _Failure("stdin is closed: the password is read from there")
    try:
        if not sys.stdin.isatty():
            return sys.stdin.buffer.readline().decode().rstrip("\r\n")
        import getpass

        password = getpass.getpass("New password: ")
        if getpass.getpass("Once more: ") != password:
            raise _Failure("the two differ: nothing was changed")
        return password
    except (UnicodeDecodeError, EOFError):
        raise _Failure("a password must be given, in UTF-8") from None


def _backup(arguments: argparse.Namespace, users: Users) -> None:
    def show(left: int, total: int) -> None:
        if total > BACKUP_PAGES and sys.stderr.isatty():
            print(f"\r{100 * (total - left) // total} %", end="" if left else "\n", file=sys.stderr, flush=True)

    users.expect()
    users.backup(arguments.path, show)
    _say(f"The copy is {arguments.path}.")


def _say(message: str) -> None:
    try:
        print(message, flush=True)
    except OSError as error:
        raise _Failure(f"stdout cannot be written to: {error.strerror}") from None


def _fail(message: str) -> int:
    Log().write(f"profiler: {message}\n")
    return 1


def _flush() -> None:
    """Drop a stream that cannot be written to: what its buffer holds would make the interpreter's exit a failure."""
    for name in ("stdout", "stderr"):
        try:
            getattr(sys, name).flush()
        except (AttributeError, OSError, ValueError):
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  # until the process ends


if __name__ == "__main__":
    sys.exit(main())
