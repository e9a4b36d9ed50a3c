#!/usr/bin/env python3
"""User accounts over HTTP: a WSGI service on one SQLite file, in one module without
dependencies.

    GET, POST                  /users/                      list, page and search; create or import
    GET, PUT, PATCH, DELETE    /users/ID/                   get, update and delete a user
    PUT                        /users/ID/password/          change a password; below it, reset/ replaces a forgotten one
    POST                       /users/verify/               verify an email and a password
    GET                        /health/                     check that users can be read

Run:    `python profiler.py` serves http://127.0.0.1:5000/ on ./db.sqlite3. See `--help`
for all options. Embed:  `profiler:application` is a WSGI callable; `create_app()`
returns one for another database. Copy:   you only need this file and schema.sql, side
by side, and Python 3.9 or later with SQLite 3.27 or later.

It keeps accounts and checks passwords. It has no sessions, no roles and sends no email.
It reimplements the service of "Building REST APIs with Python and Flask", part 2, by
Tony J, and keeps its paths, fields, messages, table and file:
tonyj.me/blog/building-rest-apis-with-python-and-flask-part-2
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    # http.server imports ssl if it can, which takes 1.3 MB. None makes that import fail.
    sys.modules.setdefault("ssl", None)  # type: ignore[arg-type]
try:
    import argparse
    import contextlib
    import functools
    import hashlib
    import hmac
    import io
    import json
    import os
    import queue
    import re
    import selectors
    import signal
    import socket
    import socketserver
    import sqlite3
    import threading
    import time
    import unicodedata
    from binascii import a2b_base64
    from hashlib import pbkdf2_hmac
    from http import HTTPStatus
    from urllib.parse import parse_qsl, quote, unquote, urlencode
    from weakref import WeakSet
    from wsgiref.handlers import CGIHandler, format_date_time
    from wsgiref.simple_server import WSGIServer
except ImportError as error:
    message = f"profiler: {error}. Install the complete Python (python3, not python3-minimal), with SQLite and OpenSSL"
    raise (SystemExit if __name__ == "__main__" else ImportError)(message) from None

# Like typing.TYPE_CHECKING, but without importing typing at run time.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
    from typing import Any, Callable, Union
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

    # Status, body, extra headers. A body is bytes, an iterator for a streamed response, or None.
    Response = tuple[int, Union[bytes, Iterator[bytes], None], tuple[tuple[str, str], ...]]
    # A write calls it inside its transaction, with the user as JSON or None. If it
    # raises, nothing is written.
    Guard = Callable[[Union[bytes, None]], object]
    Path = Union[str, bytes, os.PathLike[str]]
    Steps = Generator[Any, Any, Any]

__all__ = ["app", "application", "create_app", "hash_password", "verify_password"]
__version__ = "1.2.0"

# -- configuration ---------------------------------------------------------------------
# Defaults, and limits that clients and operators meet. Other limits are at the head of
# the section that uses them. Numbers without a source are our own choice.

HOST, PORT = "127.0.0.1", 5000  # Flask's defaults, as in the tutorial
DATABASE = "db.sqlite3"  # the tutorial's file
ITERATIONS = 600_000  # of PBKDF2-HMAC-SHA256: OWASP Password Storage Cheat Sheet
MIN_TOKEN = 16  # characters

MAX_BODY = 64 * 1024  # bytes
MAX_NAME = 255  # characters of a first or last name
MAX_EMAIL = 254  # characters: RFC 5321 4.5.3.1.3, without the angle brackets
MAX_ID = 2**63 - 1  # SQLite's largest integer
MAX_LIMIT = 1000  # users on a page
BATCH = 500  # users read at once for the list, or on a page without a limit

# \d would match other digits, too. int() takes at most 4,300 digits.
DIGITS = re.compile("[0-9]{1,4000}")


def parse_number(text: str, name: str, low: int, high: int) -> int:
    """Return the number in a setting or a parameter. Raise ValueError."""
    number = int(text) if DIGITS.fullmatch(text) else low - 1
    if not low <= number <= high:
        raise ValueError(f"{name} must be a number from {low} to {high}")
    return number


# -- passwords -------------------------------------------------------------------------
# A hash names its own algorithm and cost. New hashes use Werkzeug's PBKDF2 format;
# others can be verified, too.

MAX_ITERATIONS = 10_000_000  # about 2-3 s on one core
MAX_SCRYPT_COST = 2**20  # n * r * p, 128 MiB: the costliest setting that OWASP lists (2**17, 8, 1)
SALT_BYTES = 16  # 128 bits: NIST SP 800-132 5.1

_ITERATIONS = "(?P<iterations>[1-9][0-9]{0,7})"
_N, _R, _P = "(?P<n>[1-9][0-9]{0,7})", "(?P<r>[1-9][0-9]?)", "(?P<p>[1-9][0-9]?)"
_SALT = "(?P<salt>[^$]*)"


def _decode(text: str) -> bytes:
    """Decode base64. passlib writes "." for "+" and omits the padding. Raise ValueError."""
    return a2b_base64(text.replace(".", "+") + "=" * (-len(text) % 4))


# Each format: a pattern for the whole hash, and how its salt and its digest are decoded.
_HASH_FORMATS: tuple[tuple[str, Callable[[str], bytes], Callable[[str], bytes]], ...] = (
    # In this order: this service and Werkzeug, Werkzeug, Django, Django, passlib.
    (
        rf"pbkdf2:sha256:{_ITERATIONS}\${_SALT}\$(?P<digest>[0-9a-f]{{64}})",
        str.encode,
        bytes.fromhex,
    ),
    (rf"scrypt:{_N}:{_R}:{_P}\${_SALT}\$(?P<digest>[0-9a-f]{{128}})", str.encode, bytes.fromhex),
    (
        rf"pbkdf2_sha256\${_ITERATIONS}\${_SALT}\$(?P<digest>[0-9A-Za-z+/]{{43}}=)",
        str.encode,
        a2b_base64,
    ),
    (
        rf"scrypt\${_N}\${_SALT}\${_R}\${_P}\$(?P<digest>[0-9A-Za-z+/]{{86}}==)",
        str.encode,
        a2b_base64,
    ),
    (
        rf"\$pbkdf2-sha256\${_ITERATIONS}\$(?P<salt>[0-9A-Za-z./]*)\$(?P<digest>[0-9A-Za-z./]{{43}})",
        _decode,
        _decode,
    ),
)


def hash_password(password: str, iterations: int = ITERATIONS) -> str:
    """Return `pbkdf2:sha256:ITERATIONS$SALT$DIGEST`. Raise ValueError for NUL, a lone
    surrogate, wrong iterations.
    """
    iterations = parse_number(str(iterations), "iterations", 1, MAX_ITERATIONS)
    salt = os.urandom(SALT_BYTES).hex()
    digest = pbkdf2_hmac("sha256", _encode(password), salt.encode(), iterations)
    return f"pbkdf2:sha256:{iterations}${salt}${digest.hex()}"


def verify_password(password_hash: str, password: str) -> bool:
    """Return True if the password matches the hash. A malformed, unsupported or too
    costly hash matches none.
    """
    matches = parse_hash(str(password_hash))
    try:
        # Other programs may have hashed the password without normalising it.
        candidates = {_encode(password), password.encode()}
    except ValueError:
        return False
    return matches is not None and any(map(matches, candidates))


def parse_hash(password_hash: str) -> Callable[[bytes], bool] | None:
    """Return a function that checks a password in UTF-8, or None if this hash cannot be
    verified here.
    """
    try:
        for pattern, decode_salt, decode_digest in _HASH_FORMATS:
            if match := re.fullmatch(pattern, password_hash):
                salt, digest = decode_salt(match["salt"]), decode_digest(match["digest"])
                break
        else:
            return None
    except ValueError:
        return None
    if "iterations" in match.re.groupindex:
        iterations = int(match["iterations"])
        if iterations > MAX_ITERATIONS:
            return None
        return lambda password: hmac.compare_digest(
            pbkdf2_hmac("sha256", password, salt, iterations), digest
        )
    n, r, p = int(match["n"]), int(match["r"]), int(match["p"])
    # n must be a power of two and less than 2**(16 * r) (RFC 7914 2). Some builds of
    # Python have no scrypt.
    is_valid = 2 <= n < 2 ** (16 * r) and n & (n - 1) == 0
    if not is_valid or n * r * p > MAX_SCRYPT_COST or not hasattr(hashlib, "scrypt"):
        return None
    # OpenSSL needs this many bytes.
    scrypt = functools.partial(
        hashlib.scrypt, salt=salt, n=n, r=r, p=p, maxmem=128 * r * (n + p + 3)
    )
    return lambda password: hmac.compare_digest(scrypt(password), digest)


def needs_rehash(password_hash: str, iterations: int) -> bool:
    """Return True if a hash has another format than ours, or fewer iterations."""
    match = re.fullmatch(_HASH_FORMATS[0][0], password_hash)
    return match is None or int(match["iterations"]) < iterations


def _encode(password: str) -> bytes:
    """Return the bytes to hash: UTF-8, normalised to NFC (NIST SP 800-63B 5.1.1.2, RFC
    8265 4.2). Raise ValueError.
    """
    if "\0" in password:
        raise ValueError(
            "a password must not contain NUL: HMAC ignores NULs at the end of its key"
        )
    return unicodedata.normalize("NFC", password).encode()


# -- database --------------------------------------------------------------------------
# One SQLite file. Theory of operation: the threads of a process share one connection
# for reads, one for searches and one for writes, each with a lock. SQLite releases the
# GIL on every call, so more connections only add contention. No transaction stays open
# after a read. Writes are short transactions that take the write lock first (BEGIN
# IMMEDIATE). A thread that must not wait, the server's I/O thread, gets WouldBlock
# instead. Before a fork the connections are closed, and both processes open new ones.
# Text is returned as bytes, because it goes straight into responses.

BUSY_TIMEOUT = 5.0  # seconds to wait for a lock: the default of sqlite3.connect
RETRY_INTERVAL = 0.001  # seconds between attempts to get a lock that another process holds
WAL_CHECK_INTERVAL = 1.0  # seconds between checks that the -wal file was not replaced
WAL_TIMEOUT = 1.0  # seconds to try to switch a file to WAL mode
CLOSE_TIMEOUT = 1.0  # seconds to wait for a running statement when closing
RETRY_AFTER = 1  # seconds, for the header Retry-After
MIN_DATABASE = 512  # bytes: SQLite's smallest page


class Unavailable(Exception):
    """The database is unavailable: missing, read-only, full or failing."""

    retry_after = RETRY_AFTER


class Busy(Unavailable):
    """The service is busy. The same request may succeed in a moment."""


class WouldBlock(BaseException):
    """The call would have to wait, but this thread must not. Not an Exception: only the
    server may catch it.
    """


class _ThisThread(threading.local):
    """For the server: whether this thread may wait, and whether its client has disconnected."""

    may_wait = True
    is_abandoned: Callable[[], bool] = staticmethod(lambda: False)


this_thread = _ThisThread()


class _Slot:
    """A connection that is opened when first needed, and the lock that protects it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.connection: sqlite3.Connection | None = None

    def wait(self) -> None:
        """Wait for the lock. Raise Busy; WouldBlock if this thread must not wait."""
        if not this_thread.may_wait:
            raise WouldBlock
        if not self.lock.acquire(timeout=BUSY_TIMEOUT):
            raise Busy("other threads are using the database")

    def close(self) -> None:
        """Close the connection; it is reopened on next use."""
        connection, self.connection = self.connection, None
        if connection:
            connection.close()


class Database:
    """One SQLite file, created on first use. Threads and, after a fork, processes may
    share the object.
    """

    _slots: Sequence[_Slot] = ()
    _held: Sequence[_Slot] = ()
    _inherited: Sequence[_Slot] = ()

    def open(self, path: str) -> None:
        """Store the absolute path; open nothing yet. Raise ValueError if it is not the
        path of a file.
        """
        if not path or path == ":memory:":
            raise ValueError(
                "the database must be a file, because a database in memory is lost with its connection"
            )
        if "://" in path:
            raise ValueError(
                "a database URL needs `python -m profiler_sqlalchemy` or profiler_sqlalchemy:application"
            )
        # SQLite puts its -wal file next to the file itself, not next to a symbolic link to it.
        self.location = os.path.realpath(path)
        self.created_table = False
        # Which file and which -wal file are open (device and inode), and when the
        # latter was last checked.
        self._file: tuple[int, int] | None = None
        self._wal: tuple[int, int] | None = None
        self._wal_checked = 0.0

    def read(self, statement: str, parameters: Any = (), slow: bool = False) -> list[Any]:
        """Return all rows of a SELECT. A slow one has its own connection. Raise Busy,
        Unavailable, WouldBlock.
        """
        slot = self._searcher if slow else self._reader
        if slow or not slot.lock.acquire(False):
            slot.wait()
        try:
            return _execute(
                slot.connection or self._connect(slot), statement, parameters
            ).fetchall()
        except sqlite3.Error as error:
            slot.close()
            raise self._translate(error) from None
        finally:
            slot.lock.release()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Hold the write lock; commit at the end of the block, or roll back if it
        raises. Raise as read does.
        """
        slot, deadline = self._writer, time.monotonic() + BUSY_TIMEOUT
        slot.wait()
        try:
            self.check_files()
            # As a context manager, the connection rolls back what was not committed.
            with slot.connection or self._connect(slot) as connection:
                # Immediate, because a transaction that reads first does not wait for
                # the write lock: it fails.
                _execute(connection, "BEGIN IMMEDIATE", wait=deadline - time.monotonic())
                yield connection
                _execute(connection, "COMMIT")
        except sqlite3.Error as error:
            slot.close()
            raise self._translate(error) from None
        finally:
            slot.lock.release()

    def check_files(self) -> None:
        """Raise Unavailable if the file, or the -wal file in use, was moved, replaced
        or deleted.
        """
        # SQLite would create a new, empty file, and changes to a deleted file are lost.
        is_gone = self._file is not None and self._file != _identify(self.location)
        wal, now = self.location + "-wal", time.monotonic()
        # Not at every write: on recent Linux, a write that follows a stat of its file
        # takes 40 us longer to sync.
        if now > self._wal_checked + WAL_CHECK_INTERVAL or not os.access(wal, os.F_OK):
            is_open = any(slot.connection for slot in self._slots)
            is_gone = is_gone or (
                is_open and self._wal is not None and self._wal != _identify(wal)
            )
            self._wal_checked = self._wal_checked if is_gone else now
        if is_gone:
            raise Unavailable(
                "the file or its -wal file was moved, replaced or deleted: put it back, or restart"
            )

    def backup(self, path: str) -> None:
        """Copy the database, complete and readable by its owner only, to a new file.
        Raise OSError, Unavailable.
        """
        path = os.path.abspath(path)
        part, slot = f"{path}.{os.urandom(4).hex()}.part", _Slot()
        try:
            if os.path.lexists(path) or path == f"{self.location}-journal":
                raise FileExistsError(
                    "choose another name: this file exists, or SQLite would use it"
                )
            if not os.path.exists(self.location):
                raise FileNotFoundError("there is no such database")
            os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
            _execute(self._connect(slot), "VACUUM INTO ?", (part,))
            with open(part, "rb") as file:
                os.fsync(file.fileno())
            try:
                # Unlike rename, it never replaces a file; but FAT has no links.
                os.link(part, path)
            except FileExistsError:
                raise
            except OSError:
                os.rename(part, path)
            folder = os.open(os.path.dirname(path), os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
        except (OSError, sqlite3.Error) as error:
            reason = getattr(error, "strerror", None) or error
            raise OSError(f"cannot copy {self.location} to {path}: {reason}") from None
        finally:
            slot.close()
            for leftover in (part, part + "-journal"):
                with contextlib.suppress(OSError):
                    os.unlink(leftover)

    def close(self) -> None:
        """Close this process's connections, except one that is still busy after CLOSE_TIMEOUT."""
        for slot in self._slots:
            if slot.lock.acquire(timeout=CLOSE_TIMEOUT):
                slot.close()
                slot.lock.release()

    def before_fork(self) -> None:
        """Close the connections and hold their locks: SQLite's own locks do not survive a fork."""
        self._held = [slot for slot in self._slots if slot.lock.acquire(timeout=CLOSE_TIMEOUT)]
        for slot in self._held:
            slot.close()

    def after_fork_in_parent(self) -> None:
        """Release the locks in the parent."""
        for slot in self._held:
            slot.lock.release()

    def reset_locks(self) -> None:
        """Create the locks. A forked child needs new ones: the threads that held them
        do not exist there.
        """
        # A parent's connection that was busy must never be closed here, not even by the
        # garbage collector.
        self._inherited = [*self._inherited, *self._slots]
        self._slots = self._reader, self._searcher, self._writer = _Slot(), _Slot(), _Slot()

    def _connect(self, slot: _Slot) -> sqlite3.Connection:
        """Open the file, and create the file and the table if there are none. Raise
        sqlite3.Error, Unavailable.
        """
        self.check_files()
        if not os.path.exists(self.location):
            # If schema.sql is missing, fail before an empty file is created.
            read_schema()
            with contextlib.suppress(OSError):
                # Left open, because closing it drops this process's locks
                # (sqlite.org/howtocorrupt.html).
                os.open(self.location, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        elif 0 < os.path.getsize(self.location) < MIN_DATABASE:
            # SQLite would overwrite it.
            raise sqlite3.DatabaseError("file is not a database")
        uri = f"file:{quote(os.fsencode(self.location))}?mode=rw"
        connection = sqlite3.connect(
            uri, timeout=0, isolation_level=None, check_same_thread=False, uri=True
        )
        connection.text_factory = bytes
        try:
            # Another process that is using the file can prevent the change. Then the
            # old mode stays.
            with contextlib.suppress(sqlite3.OperationalError):
                _execute(connection, "PRAGMA journal_mode = WAL", wait=WAL_TIMEOUT).fetchall()
            # In WAL mode, sync every commit.
            _execute(connection, "PRAGMA synchronous = FULL")
            if not _execute(
                connection, "SELECT 1 FROM sqlite_master WHERE name = 'user' COLLATE NOCASE"
            ).fetchall():
                _execute(connection, read_schema())
                self.created_table = True
        except BaseException:
            connection.close()
            raise
        self._file, self._wal = (
            self._file or _identify(self.location),
            _identify(self.location + "-wal"),
        )
        slot.connection = connection
        return connection

    def _translate(self, error: sqlite3.Error) -> Exception:
        """Return Busy or Unavailable for an operational error, others (a bug, a damaged
        file) unchanged.
        """
        if not isinstance(error, sqlite3.OperationalError):
            return error
        if "lock" in str(error):
            return Busy(str(error))
        folder = os.path.dirname(self.location)
        hint = "" if os.path.isdir(folder) else f": create the folder {folder}"
        if "full" in str(error):
            hint = f", or no id is left because {MAX_ID} was used"
        return Unavailable(f"{error}{hint}")


def read_schema() -> str:
    """Return the statement of schema.sql that creates the table of users, and nothing
    else that may be in it.
    """
    text = read_file("schema.sql").decode()
    match = re.search(r'CREATE TABLE[^(;]*\buser\b"?\s*(\(.*?\)[^();]*);', text, re.I | re.S)
    if not match:
        raise Unavailable(
            "schema.sql does not create a table of users: copy the one that belongs to profiler.py"
        )
    return f'CREATE TABLE IF NOT EXISTS "user" {match[1]}'


def read_file(name: str) -> bytes:
    """Return a file that is installed with this module: next to it, in a wheel or in a
    zip archive. Raise OSError.
    """
    here = os.path.dirname(__file__)
    # Scripts and mod_wsgi have no __spec__. Wheels use profiler_users/, where no other
    # package overwrites a file.
    spec = globals().get("__spec__")
    for path in (os.path.join(here, "profiler_users", name), os.path.join(here, name)):
        with contextlib.suppress(OSError):
            if spec is not None and hasattr(spec.loader, "get_data"):
                return bytes(spec.loader.get_data(path))
            with open(path, "rb") as file:
                return file.read()
    raise FileNotFoundError(
        f"{name} is missing: copy it to {os.path.abspath(here)}, next to this module"
    )


def _execute(
    connection: sqlite3.Connection, statement: str, parameters: Any = (), wait: float = 0
) -> sqlite3.Cursor:
    """Return the cursor. While another process has the lock, retry for `wait` seconds,
    by default BUSY_TIMEOUT.
    """
    # SQLite's busy handler sleeps up to 100 ms between attempts, so it loses to writers
    # that retry more often.
    deadline = 0.0
    while True:
        try:
            return connection.execute(statement, parameters)
        except sqlite3.OperationalError as error:
            deadline = deadline or time.monotonic() + (wait or BUSY_TIMEOUT)
            if "lock" not in str(error) or time.monotonic() > deadline:
                raise
            if not this_thread.may_wait:
                raise WouldBlock from None
        time.sleep(RETRY_INTERVAL)


def _identify(path: str) -> tuple[int, int] | None:
    """Return the device and the inode of a file, or None if it does not exist."""
    with contextlib.suppress(OSError):
        status = os.stat(path)
        return status.st_dev, status.st_ino
    return None


# -- users -----------------------------------------------------------------------------
# The rules of accounts, and the storage. Each method of Users may raise Busy,
# Unavailable or WouldBlock, too.

HASH_TIMEOUT = 10.0  # seconds to wait for a core to hash on
MAX_WAITING = 128  # requests that hash or wait for a core: half of the server's WORKERS
# NIST SP 800-63B 5.2.2 allows at most 100 consecutive failures; OWASP ASVS 6.3.1 asks
# for a limit of this kind.
MAX_FAILURES = 10  # consecutive wrong passwords of an account
ATTEMPT_INTERVAL = 60.0  # seconds between attempts after that
MAX_TRACKED = 10_000  # accounts whose wrong passwords are counted


class EmailTaken(Exception):
    """Another user has this email, or one that differs only in the case of ASCII letters."""


class NoSuchUser(Exception):
    """No user has this id."""


class WrongPassword(Exception):
    """The password is wrong, or no user has the email. The message, if any, is for the
    operator.
    """


class TooManyAttempts(Exception):
    """Too many wrong passwords: try again after `retry_after` seconds."""

    def __init__(self, retry_after: int) -> None:
        super().__init__()
        self.retry_after = retry_after


# Cast, because another program may have stored anything: json_object takes no BLOB, and
# created_on may be a number.
_USER = """json_object('id', id, 'first_name', CAST(first_name AS TEXT), 'last_name', CAST(last_name AS TEXT),
    'email', CAST(email AS TEXT), 'created_on', CAST(created_on AS TEXT))"""
_PASSWORD = "coalesce(CAST(password AS TEXT), '')"
_GET = f'SELECT {_USER} FROM "user" WHERE id = ?'
_CONTAINS = r"AND (first_name LIKE :text ESCAPE '\' OR last_name LIKE :text ESCAPE '\' OR email LIKE :text ESCAPE '\')"


@functools.cache
def _page_statement(descending: bool, by_email: bool, by_text: bool) -> str:
    """Return a SELECT of the users on a page, the id of the last one, and whether more follow."""
    beyond, last, order = ("<", "min", "DESC") if descending else (">", "max", "ASC")
    conditions = ("AND email = :email COLLATE NOCASE " if by_email else "") + (
        _CONTAINS if by_text else ""
    )
    # After a search that reached the last user, looking for more would scan the table again.
    may_have_more = "count(*) = :limit" if by_text else "TRUE"
    # SQLite does not document the order of group_concat over a subquery; in practice it
    # is the subquery's. Joining rows in Python makes lists 1.5 times slower.
    return f"""
WITH page AS (
    SELECT group_concat(user, ',') AS users, {last}(id) AS last, {may_have_more} AS may_have_more
    FROM (
        SELECT id, {_USER} AS user FROM "user"
        WHERE id {beyond} :after {conditions}
        ORDER BY id {order} LIMIT :limit
    )
)
SELECT users, last, may_have_more AND EXISTS (SELECT 1 FROM "user" WHERE id {beyond} last {conditions}) FROM page
"""


class Users(Database):
    """The users in an SQLite file. SQLite produces the JSON, so that a read builds no
    objects in Python.
    """

    def __init__(self, database: Path | None = None, iterations: int | str | None = None) -> None:
        """Open nothing yet. None stands for the setting in the environment, or the
        default. Raise ValueError.
        """
        if database is None:
            database = os.environ.get("PROFILER_DATABASE") or DATABASE
        if iterations is None:
            iterations = os.environ.get("PROFILER_ITERATIONS") or ITERATIONS
        self.iterations = parse_number(str(iterations), "iterations", 1, MAX_ITERATIONS)
        # Verified when there is no user or no usable hash, so that this takes as long
        # as a wrong password.
        self._dummy_hash = f"pbkdf2:sha256:{self.iterations}${'0' * 2 * SALT_BYTES}${'0' * 64}"
        self.open(os.fsdecode(database))
        self.reset_locks()
        _instances.add(self)

    def reset_locks(self) -> None:
        """Create the locks, and start counting anew."""
        super().reset_locks()
        self._cores = threading.BoundedSemaphore(count_cores())
        self._places = threading.BoundedSemaphore(MAX_WAITING)
        # The number and the time of the last wrong passwords of an account, least recent first.
        self._failures: dict[int | bytes, tuple[int, float]] = {}
        self._failures_lock = threading.Lock()

    def create(self, first_name: str, last_name: str, email: str, password: str) -> int:
        """Store a new user and return the id. Raise EmailTaken."""
        # This saves a hash. The insert decides whether the email is free.
        if self.find(email):
            raise EmailTaken
        with self._core():
            password_hash = hash_password(password, self.iterations)
        return self.insert(first_name, last_name, email, password_hash)

    def verify(self, email: str, password: str) -> int:
        """Return the user's id, and upgrade a weak or foreign hash. Raise
        WrongPassword, TooManyAttempts.
        """
        user_id, password_hash = self.find(email) or (None, self._dummy_hash)
        with self._core():
            # bytes.lower() changes ASCII letters only, as SQLite's NOCASE does.
            self._check_password(
                email.encode().lower() if user_id is None else user_id, password_hash, password
            )
            new_hash = (
                hash_password(password, self.iterations)
                if needs_rehash(password_hash, self.iterations)
                else ""
            )
        if user_id is None:
            raise WrongPassword
        if new_hash:
            # If it fails, the next login tries again.
            with contextlib.suppress(Unavailable):
                self.replace_password_hash(user_id, password_hash, new_hash)
        return user_id

    def change_password(
        self, user_id: int, old_password: str, new_password: str, guard: Guard | None = None
    ) -> None:
        """Replace a user's password if the old one is right. Raise NoSuchUser,
        WrongPassword, TooManyAttempts.
        """
        password_hash = self.get_password_hash(user_id)
        with self._core():
            self._check_password(user_id, password_hash, old_password)
            new_hash = hash_password(new_password, self.iterations)
        if not self.replace_password_hash(user_id, password_hash, new_hash, guard):
            raise WrongPassword

    def reset_password(self, user_id: int, new_password: str, guard: Guard | None = None) -> None:
        """Replace a user's password, whatever it is. Raise NoSuchUser."""
        self.get_password_hash(user_id)
        with self._core():
            new_hash = hash_password(new_password, self.iterations)
        if not self.replace_password_hash(user_id, None, new_hash, guard):
            raise NoSuchUser
        self._forget_failures(user_id)

    def _check_password(self, account: int | bytes, password_hash: str, password: str) -> None:
        """Raise WrongPassword, TooManyAttempts. It takes one hash even if the stored
        one is unusable.
        """
        with self._failures_lock:
            now = time.monotonic()
            count, last = self._failures.pop(account, (0, now))
            wait = last + ATTEMPT_INTERVAL - now if count >= MAX_FAILURES else 0
            # An attempt counts as a failure until the password has proved right.
            self._failures[account] = (count, last) if wait > 0 else (count + 1, now)
            if len(self._failures) > MAX_TRACKED:
                del self._failures[next(iter(self._failures))]
        if wait > 0:
            raise TooManyAttempts(int(wait) + 1)
        if not parse_hash(password_hash):
            verify_password(self._dummy_hash, password)
            raise WrongPassword(
                f"the password hash of user {account!r} is malformed or cannot be verified here"
            )
        if not verify_password(password_hash, password):
            raise WrongPassword
        self._forget_failures(account)

    def _forget_failures(self, account: int | bytes) -> None:
        with self._failures_lock:
            self._failures.pop(account, None)

    @contextlib.contextmanager
    def _core(self) -> Iterator[None]:
        """Hold one of the cores for a hash. Raise Busy."""
        if not self._places.acquire(blocking=False):
            raise Busy("too many requests wait for a core to hash a password")
        try:
            waited = not self._cores.acquire(blocking=False)
            if waited and not self._cores.acquire(timeout=HASH_TIMEOUT):
                raise Busy("no core was free to hash a password")
            try:
                if waited and this_thread.is_abandoned():
                    raise Busy("the client disconnected before its password was hashed")
                yield
            finally:
                self._cores.release()
        finally:
            self._places.release()

    # The storage: what a subclass for another database overrides.

    def find(self, email: str) -> tuple[int, str] | None:
        """Return the id and the password hash of the user with this email, or None."""
        rows = self.read(
            f'SELECT id, {_PASSWORD} FROM "user" WHERE email = ? COLLATE NOCASE', (email,)
        )
        return (rows[0][0], str(rows[0][1], "utf-8", "replace")) if rows else None

    def insert(self, first_name: str, last_name: str, email: str, password_hash: str) -> int:
        """Store a new user and return the id. Raise EmailTaken."""
        fields = {
            "first_name": first_name,
            "last_name": last_name,
            "email": email,
            "password_hash": password_hash,
        }
        statement = """
INSERT INTO "user" (first_name, last_name, email, password) SELECT :first_name, :last_name, :email, :password_hash
WHERE NOT EXISTS (SELECT 1 FROM "user" WHERE email = :email COLLATE NOCASE)
"""
        with self.transaction() as connection:
            cursor = connection.execute(statement, fields)
            if cursor.rowcount == 0:
                raise EmailTaken
            return cursor.lastrowid or 0

    def page(
        self,
        limit: int,
        after: int | None = None,
        descending: bool = False,
        email: str | None = None,
        text: str = "",
    ) -> tuple[bytes, int | None]:
        """Return one page of users as comma-separated JSON objects, and the last id if
        more follow.

        With `email`, only the user with this email; with `text`, only users whose names
        or email contain it.
        """
        parameters = {
            "after": float("inf" if descending else "-inf") if after is None else after,
            "limit": limit,
            "email": email,
            "text": "%" + re.sub(r"([\\%_])", r"\\\1", text) + "%",
        }
        statement = _page_statement(descending, email is not None, bool(text))
        [(users, last, more)] = self.read(statement, parameters, slow=bool(text))
        return _utf8(users or b""), last if more else None

    def get(self, user_id: int) -> bytes:
        """Return one user as a JSON object. Raise NoSuchUser."""
        rows = self.read(_GET, (user_id,))
        if not rows:
            raise NoSuchUser
        return _utf8(rows[0][0])

    def get_password_hash(self, user_id: int) -> str:
        """Return a user's password hash. Raise NoSuchUser."""
        rows = self.read(f'SELECT {_PASSWORD} FROM "user" WHERE id = ?', (user_id,))
        if not rows:
            raise NoSuchUser
        return str(rows[0][0], "utf-8", "replace")

    def update(self, user_id: int, fields: Mapping[str, str], guard: Guard | None = None) -> None:
        """Change the names and the email that are in `fields`. Raise NoSuchUser,
        EmailTaken, what guard raises.
        """
        parameters = {
            "first_name": None,
            "last_name": None,
            "email": None,
            **fields,
            "id": user_id,
        }
        statement = """
UPDATE "user" SET first_name = coalesce(:first_name, first_name), last_name = coalesce(:last_name, last_name),
    email = coalesce(:email, email)
WHERE id = :id AND NOT EXISTS (SELECT 1 FROM "user" WHERE email = :email COLLATE NOCASE AND id <> :id)
"""
        with self.transaction() as connection:
            _run_guard(connection, user_id, guard)
            if connection.execute(statement, parameters).rowcount == 0:
                raise EmailTaken if connection.execute(_GET, (user_id,)).fetchall() else NoSuchUser

    def delete(self, user_id: int, guard: Guard | None = None) -> None:
        """Delete the user with this id, if any. Ids are never reused. Raise what guard raises."""
        with self.transaction() as connection:
            _run_guard(connection, user_id, guard)
            connection.execute('DELETE FROM "user" WHERE id = ?', (user_id,))

    def replace_password_hash(
        self, user_id: int, old: str | None, new: str, guard: Guard | None = None
    ) -> bool:
        """Replace the hash if it still equals `old` (None: always). Return whether it
        did. Raise what guard raises.
        """
        condition = f"id = :id AND (:old IS NULL OR {_PASSWORD} = :old)"
        fields = {"id": user_id, "old": old, "new": new}
        with self.transaction() as connection:
            _run_guard(connection, user_id, guard)
            return (
                connection.execute(
                    f'UPDATE "user" SET password = :new WHERE {condition}', fields
                ).rowcount
                > 0
            )

    def count(self) -> int:
        """Return the number of users."""
        return int(self.read('SELECT count(*) FROM "user"')[0][0])

    def ping(self) -> None:
        """Raise an exception unless users can be read."""
        self.check_files()
        self.read(f'SELECT {_USER}, password FROM "user" LIMIT 1')

    def initialise(self, force: bool = False) -> bool:
        """Create the table, with `force` anew. Return whether it did. Raise
        FileExistsError if it holds users.
        """
        with self.transaction() as connection:
            [(count,)] = connection.execute('SELECT count(*) FROM "user"')
            if count and not force:
                raise FileExistsError(f"the table holds users ({count}): --force deletes them")
            if force:
                connection.execute('DROP TABLE "user"')
                connection.execute(read_schema())
        return force or self.created_table


_instances: WeakSet[Users] = WeakSet()


def _call_all(method: str) -> None:
    for users in list(_instances):
        getattr(users, method)()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=lambda: _call_all("before_fork"))
    os.register_at_fork(after_in_parent=lambda: _call_all("after_fork_in_parent"))
    os.register_at_fork(after_in_child=lambda: _call_all("reset_locks"))


def count_cores() -> int:
    """Return the number of cores that this process may use, within its CPU quota
    (Linux, cgroup v2).
    """
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    with contextlib.suppress(OSError, ValueError):
        with open("/proc/self/cgroup") as file:
            cgroup = file.read().partition("0::")[2].strip()
        with open(f"/sys/fs/cgroup{cgroup}/cpu.max") as file:
            quota, period = map(int, file.read().split())
        cores = min(cores, max(1, round(quota / period)))
    return cores


def _run_guard(connection: sqlite3.Connection, user_id: int, guard: Guard | None) -> None:
    if guard:
        rows = connection.execute(_GET, (user_id,)).fetchall()
        guard(_utf8(rows[0][0]) if rows else None)


def _utf8(text: bytes) -> bytes:
    """Return the text with U+FFFD for invalid UTF-8, which another program may have stored."""
    return text if text.isascii() else text.decode("utf-8", "replace").encode()


# -- HTTP ------------------------------------------------------------------------------
# Requests and responses, independent of the endpoints.

MAX_BRACKETS = 500  # [ and { in a body: the JSON parser recurses, at most 1,000 levels deep

JSON = ("Content-Type", "application/json")
# Of every response. Without X-Frame-Options, a website could probe which ids exist with
# <object data>.
_HEADERS = (
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Cache-Control", "no-store"),
)
_STATUS_LINES = {int(status): f"{status.value} {status.phrase}" for status in HTTPStatus}
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")  # Unicode's category Cc
_SURROGATE = re.compile("[\ud800-\udfff]")
# Unicode's property Default_Ignorable_Code_Point (DerivedCoreProperties.txt).
_INVISIBLE = (
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
_BLANK = re.compile(rf"(?:\s|{_INVISIBLE})*")
_EMAIL = re.compile(r"[^@\s]+@[^@\s]+")
# Our ETag, or what a compressing proxy makes of it: W/ before it (nginx), or -gzip at
# its end (Apache).
_ENTITY_TAG = re.compile(r'^(?:W/)?("[0-9a-f]{32})(?:-[a-z]+)?"\Z')


class HTTPError(Exception):
    """An error response: its status, a message for the client, extra headers."""

    def __init__(self, status: int, message: str, *headers: tuple[str, str]) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers


def to_json(value: object) -> bytes:
    """Return a line of compact JSON in UTF-8."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def to_wsgi(response: Response) -> tuple[str, list[tuple[str, str]], Iterable[bytes]]:
    """Return the status line, all headers and the body for a WSGI server. A complete
    body is a tuple of one part.
    """
    status, body, extra = response
    if isinstance(body, bytes):
        return (
            _STATUS_LINES[status],
            [*_HEADERS, *extra, ("Content-Length", f"{len(body)}")],
            (body,),
        )
    # hypercorn sends the head only with the first part.
    return _STATUS_LINES[status], [*_HEADERS, *extra], body or (b"",)


def read_object(environ: WSGIEnvironment, *media_types: str) -> dict[str, Any]:
    """Return the JSON object in a body of application/json or these types. Raise
    HTTPError: 400, 411, 413, 415.
    """
    media_type, *parameters = (
        environ.get("CONTENT_TYPE", "").lower().replace('"', "").replace(" ", "").split(";")
    )
    charsets = {parameter for parameter in parameters if parameter.startswith("charset=")}
    if media_type not in ("application/json", *media_types) or not charsets <= {
        "charset=utf-8",
        "charset=utf8",
    }:
        raise HTTPError(415, "Send the body as Content-Type: application/json, in UTF-8")
    body = _read_body(environ)
    if body.count(b"[") + body.count(b"{") > MAX_BRACKETS:
        raise HTTPError(400, f"The body must have at most {MAX_BRACKETS} brackets")
    try:
        # parse_int=float avoids the quadratic cost of huge integers, which no field needs.
        value = json.loads(body.decode("utf-8-sig"), parse_int=float)
    except UnicodeDecodeError:
        raise HTTPError(400, "The body must be UTF-8") from None
    except ValueError as error:
        raise HTTPError(400, f"The body must be JSON: {error}") from None
    if not isinstance(value, dict):
        raise HTTPError(400, "The body must be a JSON object")
    return value


def check_fields(fields: Mapping[str, Any], names: Sequence[str]) -> dict[str, str]:
    """Return the named fields. Raise HTTPError: 400."""
    if any(_BLANK.fullmatch(str(fields.get(name) or "")) for name in names):
        raise HTTPError(400, "Required fields are missing")
    return {name: check_field(name, fields[name]) for name in names}


def check_field(name: str, value: object) -> str:
    """Return the value of a field if it is valid. Raise HTTPError: 400; its message
    starts with the field's name.
    """
    if not isinstance(value, str):
        problem = "must be a string"
    elif _BLANK.fullmatch(value) and name != "q":
        problem = "must not be blank"
    elif _SURROGATE.search(value):
        problem = "must not contain a lone surrogate"
    elif name == "password_hash" and not parse_hash(value):
        formats = "a PBKDF2-SHA256 or scrypt hash of Werkzeug, Django or passlib, of moderate cost"
        problem = f"must be {formats}: others, such as bcrypt, cannot be verified here"
    elif "password" in name and "\0" in value:
        problem = "must not contain the NUL character"
    elif "password" not in name and _CONTROL.search(value):
        problem = "must not contain control characters"
    elif name == "email" and (
        len(value) > MAX_EMAIL or not _EMAIL.fullmatch(value) or re.search(_INVISIBLE, value)
    ):
        problem = f"must be an address such as harry@example.com, of at most {MAX_EMAIL} visible characters"
    elif "password" not in name and len(value) > MAX_NAME:
        problem = f"must have at most {MAX_NAME} characters"
    else:
        return value
    raise HTTPError(400, f"{name} {problem}")


def make_entity_tag(user: bytes) -> str:
    """Return the strong ETag of a user's JSON (RFC 9110 8.8.3)."""
    return f'"{hashlib.sha256(user).hexdigest()[:32]}"'


def check_preconditions(environ: WSGIEnvironment, user: bytes | None) -> bool:
    """Return True if a GET must be answered with 304 (RFC 9110 13.2.2). Raise
    HTTPError: 412; NoSuchUser.
    """
    # A user who does not exist is a 404, whatever the preconditions (13.2.1). Deleting
    # one is not an error.
    if user is None and environ["REQUEST_METHOD"] != "DELETE":
        raise NoSuchUser
    if_match, if_none_match = environ.get("HTTP_IF_MATCH"), environ.get("HTTP_IF_NONE_MATCH")
    if if_match is not None and not _matches(if_match, user):
        raise HTTPError(
            412,
            "The user has changed: get it again, then decide" if user else "No user has this id",
        )
    if if_none_match is None or not _matches(if_none_match, user):
        return False
    if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
        raise HTTPError(412, "The user matches If-None-Match")
    return True


def make_guard(environ: WSGIEnvironment) -> Guard | None:
    """Return a guard that checks the preconditions inside the transaction, or None if
    there are none.
    """
    if "HTTP_IF_MATCH" in environ or "HTTP_IF_NONE_MATCH" in environ:
        return functools.partial(check_preconditions, environ)
    return None


def _matches(field: str, user: bytes | None) -> bool:
    """Return True if a list of ETags contains the user's, or is "*" and there is a user."""
    # Our own tags contain no comma.
    tags = [_ENTITY_TAG.sub(r'\1"', tag.strip(" \t")) for tag in field.split(",")]
    return user is not None and (tags == ["*"] or make_entity_tag(user) in tags)


def parse_length(text: str) -> int:
    """Return the value of Content-Length (RFC 9110 8.6). Raise HTTPError: 400."""
    if not DIGITS.fullmatch(text):
        raise HTTPError(400, "Content-Length must be a number in decimal digits")
    return int(text)


def _read_body(environ: WSGIEnvironment) -> bytes:
    """Read Content-Length bytes, or all if the server sets wsgi.input_terminated. Raise
    HTTPError: 400, 411, 413.
    """
    is_terminated, is_chunked = (
        environ.get("wsgi.input_terminated", False),
        "HTTP_TRANSFER_ENCODING" in environ,
    )
    if is_chunked and not is_terminated:
        raise HTTPError(411, "This server takes no chunked body: send a Content-Length")
    size = 0 if is_chunked else parse_length(environ.get("CONTENT_LENGTH") or "0")
    limit, body = size or (MAX_BODY + 1 if is_terminated else 0), b""
    try:
        while (
            size <= MAX_BODY
            and len(body) < limit
            and (part := environ["wsgi.input"].read(limit - len(body)))
        ):
            body += part
    except Exception:
        # Each server has its own exceptions for a broken body.
        raise HTTPError(400, "The body could not be read to its end") from None
    if max(size, len(body)) > MAX_BODY:
        raise HTTPError(413, f"The body must be at most {MAX_BODY} bytes")
    if len(body) < size:
        raise HTTPError(400, "The body is shorter than its Content-Length")
    return body


# -- endpoints -------------------------------------------------------------------------
# A handler takes the users, the environ and, if its path contains one, a user's id. It
# raises HTTPError for a bad request, and what the methods of Users raise. See ROUTES.

_PROFILE = ("first_name", "last_name", "email")


def create_user(users: Users, environ: WSGIEnvironment) -> Response:
    """Return 201 with the new id and the user's location. The body has a password or,
    to import a user, its hash.
    """
    fields = read_object(environ)
    if "password_hash" not in fields:
        user_id = users.create(**check_fields(fields, (*_PROFILE, "password")))
    elif "password" in fields:
        raise HTTPError(400, "password_hash and password exclude each other: send one of them")
    else:
        user_id = users.insert(**check_fields(fields, (*_PROFILE, "password_hash")))
    return 201, to_json({"id": user_id}), (JSON, ("Location", _url(environ, f"users/{user_id}/")))


def list_users(users: Users, environ: WSGIEnvironment) -> Response:
    """Return 200 with an array of all users, or of those selected by limit, after,
    sort, email and q.
    """
    query_string = (
        environ.get("QUERY_STRING", "").encode("latin-1", "replace").decode("utf-8", "replace")
    )
    # The last of repeated parameters wins. "+" is literal (RFC 3986).
    query = dict(parse_qsl(query_string.replace("+", "%2B"), keep_blank_values=True))
    try:
        limit = parse_number(query["limit"], "limit", 1, MAX_LIMIT) if "limit" in query else None
        after = parse_number(query["after"], "after", 0, MAX_ID) if "after" in query else None
    except ValueError as error:
        raise HTTPError(400, str(error)) from None
    email = check_field("email", query["email"]) if "email" in query else None
    text = check_field("q", query["q"]) if query.get("q") else ""
    sort = query.get("sort", "id")
    if sort not in ("id", "-id"):
        raise HTTPError(400, "sort must be id or -id")
    page, last = users.page(limit or BATCH, after, sort == "-id", email, text)
    if last is None:
        return 200, b"[%b]\n" % page, (JSON,)
    if limit is None and email is None and not text:
        return 200, _all_users(users, page, last, sort == "-id"), (JSON,)
    selection = {name: query[name] for name in ("sort", "email", "q") if name in query}
    following = urlencode({"limit": limit or BATCH, "after": last, **selection}, quote_via=quote)
    link = f'<{_url(environ, "users/")}?{following}>; rel="next"'  # RFC 8288
    return 200, b"[%b]\n" % page, (JSON, ("Link", link))


def get_user(users: Users, environ: WSGIEnvironment, user_id: int) -> Response:
    """Return 200 with the user, or 304 if the client has it."""
    user = users.get(user_id)
    entity_tag = ("ETag", make_entity_tag(user))
    if make_guard(environ) and check_preconditions(environ, user):
        return 304, None, (entity_tag,)
    return 200, user + b"\n", (JSON, entity_tag)


def update_user(users: Users, environ: WSGIEnvironment, user_id: int) -> Response:
    """Return 200 with the id. PUT needs all fields; PATCH changes those in the body
    (RFC 7396). Others are ignored.
    """
    if environ["REQUEST_METHOD"] == "PUT":
        changes = check_fields(read_object(environ), _PROFILE)
    else:
        fields = read_object(environ, "application/merge-patch+json")
        changes = {name: check_field(name, fields[name]) for name in _PROFILE if name in fields}
    users.update(user_id, changes, make_guard(environ))
    return 200, to_json({"id": user_id}), (JSON,)


def delete_user(users: Users, environ: WSGIEnvironment, user_id: int) -> Response:
    """Return 204, whether the user existed or not."""
    users.delete(user_id, make_guard(environ))
    return 204, None, ()


def change_password(users: Users, environ: WSGIEnvironment, user_id: int) -> Response:
    """Return 204 if the old password was right."""
    fields = check_fields(read_object(environ), ("old_password", "new_password"))
    users.change_password(user_id, **fields, guard=make_guard(environ))
    return 204, None, ()


def reset_password(users: Users, environ: WSGIEnvironment, user_id: int) -> Response:
    """Return 204. The old password is not needed: this is for the holder of the token."""
    users.reset_password(
        user_id, **check_fields(read_object(environ), ("new_password",)), guard=make_guard(environ)
    )
    return 204, None, ()


def verify_user(users: Users, environ: WSGIEnvironment) -> Response:
    """Return 200 with the user's id, or 403. 401 would ask for another token (RFC 9110 15.5.2)."""
    return (
        200,
        to_json({"id": users.verify(**check_fields(read_object(environ), ("email", "password")))}),
        (JSON,),
    )


def get_health(users: Users, environ: WSGIEnvironment) -> Response:
    """Return 200 if users can be read."""
    users.ping()
    return 200, to_json({"status": "ok"}), (JSON,)


def get_file(users: Users, environ: WSGIEnvironment) -> Response:
    """Return 200 with the page or the OpenAPI document. Raise HTTPError: 404 if it is
    not installed.
    """
    path = environ.get("PATH_INFO")
    name, media_type = FILES[path or "/"]
    try:
        content = read_file(name)
    except OSError:
        raise HTTPError(404, NOTHING_HERE) from None
    if not path:
        # The mount point without a slash, to which the page's links would not be relative.
        return 308, b"", (("Content-Type", media_type), ("Location", _url(environ)))
    return 200, content, (("Content-Type", media_type),)


NOTHING_HERE = "Nothing is here: the users are at /users/"
FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/openapi.json": ("openapi.json", "application/json"),
}

_ID = "/users/([0-9]{1,19})"
ROUTES: tuple[tuple[re.Pattern[str], dict[str, Callable[..., Response]]], ...] = (
    (
        re.compile(f"{_ID}/?"),
        {"GET": get_user, "PUT": update_user, "PATCH": update_user, "DELETE": delete_user},
    ),
    (re.compile("/users/?"), {"GET": list_users, "POST": create_user}),
    (re.compile(f"{_ID}/password/?"), {"PUT": change_password}),
    (re.compile(f"{_ID}/password/reset/?"), {"PUT": reset_password}),
    (re.compile("/users/verify/?"), {"POST": verify_user}),
    (re.compile("/health/?"), {"GET": get_health}),
    (re.compile("/?"), {"GET": get_file}),
    (re.compile("/openapi[.]json"), {"GET": get_file}),
)
# Paths that need no token.
PUBLIC = re.compile("/health/?|/?|/openapi[.]json")


def _all_users(users: Users, page: bytes, last: int | None, descending: bool) -> Iterator[bytes]:
    """Yield a JSON array of the users on a page and all that follow. Each batch is a
    separate read.
    """
    yield b"[" + page
    while last is not None:
        page, last = users.page(BATCH, last, descending)
        if page:
            yield b"," + page
    yield b"]\n"


def _url(environ: WSGIEnvironment, rest: str = "") -> str:
    """Return an absolute path below SCRIPT_NAME."""
    mount_point = quote(environ.get("SCRIPT_NAME", ""), encoding="latin-1")
    # Two slashes would lead to another host.
    return "/" + f"{mount_point}/{rest}".lstrip("/")


# -- application -----------------------------------------------------------------------
# The WSGI callable (PEP 3333), and one table of the response to each exception, also
# for the server.

ERRORS: dict[type[Exception], tuple[int, str]] = {
    EmailTaken: (400, "This email is already registered"),
    NoSuchUser: (404, "Invalid user id"),
    WrongPassword: (403, "Wrong email or password"),
    TooManyAttempts: (429, "Too many wrong passwords: try again later"),
    Busy: (503, "The service is busy: try again"),
    Unavailable: (503, "The database is unavailable: see the server log"),
    socket.timeout: (408, "The request took too long to arrive"),
}
_TOKEN = re.compile(f"[!-~]{{{MIN_TOKEN},}}")
_LOOPBACK = re.compile(r"(localhost|127(\.[0-9]{1,3}){3}|\[::1\])(:[0-9]*)?", re.IGNORECASE)
_is_loopback = functools.lru_cache(maxsize=64)(_LOOPBACK.fullmatch)


class Application:
    """The WSGI callable. Created by create_app; any number of threads may call it."""

    def __init__(
        self, users: Users, token: str | None = None, anonymous: bool | None = None
    ) -> None:
        """Take what is None from PROFILER_TOKEN and PROFILER_ANONYMOUS; see create_app.
        Raise ValueError.
        """
        token = os.environ.get("PROFILER_TOKEN") if token is None else token
        if anonymous is None:
            anonymous = (
                parse_number(
                    os.environ.get("PROFILER_ANONYMOUS") or "0", "PROFILER_ANONYMOUS", 0, 1
                )
                == 1
            )
        self.users, self.anonymous = users, anonymous
        self.tokens = [] if token is None else [part.encode() for part in token.split()]
        if token is not None and not (self.tokens and all(map(_TOKEN.fullmatch, token.split()))):
            raise ValueError(
                f"tokens (--token-file, PROFILER_TOKEN) must be at least {MIN_TOKEN} characters of visible ASCII"
            )

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        try:
            response = self._respond(environ)
        except Exception as error:
            response = error_response(error, environ)
        status, headers, body = to_wsgi(response)
        start_response(status, headers)
        return (b"",) if environ["REQUEST_METHOD"] == "HEAD" else body

    def close(self) -> None:
        """Close the database. The next request reopens it."""
        self.users.close()

    def _respond(self, environ: WSGIEnvironment) -> Response:
        """Return the response of the route's handler. Raise what it raises; HTTPError:
        401, 404, 405, 421.
        """
        method, path = environ["REQUEST_METHOD"], environ.get("PATH_INFO", "")
        if self.tokens or not (
            self.anonymous or _is_loopback(environ.get("HTTP_HOST", "localhost"))
        ):
            self._check_access(environ, path)
        for pattern, handlers in ROUTES:
            if match := pattern.fullmatch(path):
                if handler := handlers.get("GET" if method == "HEAD" else method):
                    if not pattern.groups:
                        return handler(self.users, environ)
                    user_id = int(match[1])
                    if user_id > MAX_ID:
                        raise NoSuchUser
                    return handler(self.users, environ, user_id)
                methods = (
                    [*handlers, "OPTIONS", "HEAD"] if "GET" in handlers else [*handlers, "OPTIONS"]
                )
                allow = ("Allow", ", ".join(sorted(methods)))
                if method == "OPTIONS":
                    return 204, None, (allow,)
                raise HTTPError(405, f"The method must be one of: {allow[1]}", allow)
        raise HTTPError(404, NOTHING_HERE)

    def _check_access(self, environ: WSGIEnvironment, path: str) -> None:
        """Raise HTTPError: 401 without a valid token (RFC 6750), 421 for a Host that is
        not loopback.
        """
        if not self.tokens:
            # Against DNS rebinding: if a website points its name at 127.0.0.1, browsers
            # send its requests here.
            message = "Without a token, only the hosts localhost and 127.0.0.1 are served. Set PROFILER_TOKEN, "
            raise HTTPError(421, message + "or PROFILER_ANONYMOUS=1 to serve everybody")
        scheme, _, credentials = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
        given = credentials.strip(" ").encode("utf-8", "surrogatepass")
        # Compare all, in constant time.
        matches = sum(hmac.compare_digest(given, token) for token in self.tokens)
        if not PUBLIC.fullmatch(path) and not (matches and scheme.lower() == "bearer"):
            challenge = ("WWW-Authenticate", "Bearer")
            raise HTTPError(
                401, "Send a valid token in the header Authorization: Bearer TOKEN", challenge
            )


def create_app(
    database: Path | None = None,
    *,
    iterations: int | None = None,
    token: str | None = None,
    anonymous: bool | None = None,
) -> Application:
    """Return a WSGI application on an SQLite file, which the first request creates.
    Raise ValueError.

    What is None is taken from PROFILER_DATABASE (default: ./db.sqlite3),
    PROFILER_ITERATIONS (of PBKDF2 for new passwords, default: 600,000), PROFILER_TOKEN
    and PROFILER_ANONYMOUS. Requests need one of the tokens, which white space
    separates. Without a token they need a loopback Host, unless `anonymous` is true:
    use it where the application around this one checks who asks.
    """
    return Application(Users(database, iterations), token, anonymous)


def create_on_first_use(create: Callable[[], Application]) -> WSGIApplication:
    """Return a WSGI callable that creates its application at the first request."""
    created: dict[str, Application] = {}

    def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer as create() does. For an invalid setting, raise ValueError: servers
        answer 500 and log it.
        """
        # Concurrent first requests may create several, which opens nothing. All use the
        # same: setdefault is atomic.
        return (created.get("") or created.setdefault("", create()))(environ, start_response)

    return application


application = app = create_on_first_use(create_app)


def error_response(error: Exception, environ: WSGIEnvironment) -> Response:
    """Return the response for an exception. Log a bug with its traceback, any other
    message in one line.
    """
    if isinstance(error, HTTPError):
        return error.status, to_json({"error": str(error)}), (JSON, *error.headers)
    status, message = ERRORS.get(type(error), (500, "Internal server error"))
    text = f"profiler: {status}: {error}\n" if str(error) else ""
    if status == 500:
        from traceback import format_exception

        text = "".join(format_exception(type(error), error, error.__traceback__))
    if text:
        # The log may be full or closed.
        with contextlib.suppress(OSError, ValueError):
            environ["wsgi.errors"].write(text)
    headers = [("Retry-After", str(error.retry_after))] if hasattr(error, "retry_after") else []
    return status, to_json({"error": message}), (JSON, *headers)


# -- server: parsing -------------------------------------------------------------------
# From bytes to an environ, without a socket. Requests that a proxy could parse
# differently are rejected, because they allow request smuggling (RFC 9112 11.2).
# http.server is too lenient for that.

MAX_REQUEST_LINE = 8 * 1024  # bytes: the default of nginx and Apache
MAX_HEAD = 32 * 1024  # bytes: nginx's four buffers of 8 KiB
MAX_HEADER_FIELDS = 100  # Apache's, and http.client's

_NAME = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # RFC 9110 5.6.2
_HOST = r"[A-Za-z0-9._~!$&'()*+,;=:%\[\]-]"  # RFC 9110 7.2
# RFC 9112 3. A target is a path or, in absolute form, a URL with an authority, which
# overrides Host (3.2.2).
_TARGET = rf"(?:(?i:https?)://({_HOST}+)(?=[/?# ]))?([\x21-\x7e\x80-\xff]*)"
_HOST_VALUE = re.compile(f"{_HOST}*")  # RFC 9112 3.2
REQUEST_LINE = re.compile(rf"({_NAME}) {_TARGET} (HTTP/[0-9A-Za-z.]+)\r")
# Any beginning of a request line. An empty line may precede it (RFC 9112 2.2).
_REQUEST_START = re.compile(rf"\r?({_NAME}( [\x21-\x7e\x80-\xff]*( [0-9A-Za-z./]*\r?)?)?)?")
# No space before the colon, no folding, no bare CR or LF, no control character: RFC
# 9112 5.1, 5.2, 2.2; RFC 9110 5.5.
_FIELD_LINE = re.compile(rf"({_NAME}):([\t\x20-\x7e\x80-\xff]*)")
# Bare LFs end a head, too, so that parse_head rejects them at once.
HEAD_END = re.compile(rb"\n\r?\n")


def parse_head(head: bytes) -> WSGIEnvironment:
    """Return the environ for a request head. Raise HTTPError: 400, 411, 414, 417, 431,
    501, 505.
    """
    environ, authority = parse_request_line(head)
    _, *lines = head.decode("latin-1").removeprefix("\r\n").removesuffix("\r\n\r\n").split("\r\n")
    if len(lines) > MAX_HEADER_FIELDS:
        raise HTTPError(431, f"Send at most {MAX_HEADER_FIELDS} headers")
    for line in lines:
        match = _FIELD_LINE.fullmatch(line)
        if not match:
            raise HTTPError(
                400, "A header must be one line, `Name: value`, without control characters"
            )
        name, value = match[1].upper(), match[2].strip(" \t")
        # Dropped, because X_Y and X-Y would be the same key.
        if "_" in name:
            continue
        key = "HTTP_" + name.replace("-", "_")
        # RFC 9110 5.3. For Host and Content-Length, which must not be repeated, the
        # result is invalid.
        environ[key] = f"{environ[key]}, {value}" if key in environ else value
    is_http_1_1 = environ["SERVER_PROTOCOL"] == "HTTP/1.1"
    if (is_http_1_1 and "HTTP_HOST" not in environ) or not _HOST_VALUE.fullmatch(
        environ.get("HTTP_HOST", "")
    ):
        raise HTTPError(400, "Send one Host, such as localhost:5000")
    if (
        is_http_1_1 and environ.get("HTTP_EXPECT", "100-continue").lower() != "100-continue"
    ):  # RFC 9110 10.1.1
        raise HTTPError(417, "The only supported Expect is 100-continue")
    if "HTTP_CONTENT_LENGTH" in environ:
        parse_length(environ["HTTP_CONTENT_LENGTH"])
    if "HTTP_TRANSFER_ENCODING" in environ:  # RFC 9112 6.1 and 6.3
        if "HTTP_CONTENT_LENGTH" in environ:
            raise HTTPError(400, "Send either a Content-Length or a Transfer-Encoding")
        status = 411 if environ["HTTP_TRANSFER_ENCODING"].lower() == "chunked" else 501
        raise HTTPError(status, "This server takes no chunked body: send a Content-Length")
    environ["CONTENT_TYPE"] = environ.pop("HTTP_CONTENT_TYPE", "")
    environ["CONTENT_LENGTH"] = environ.pop("HTTP_CONTENT_LENGTH", "")
    if authority:
        environ["HTTP_HOST"] = authority
    return environ


def parse_request_line(head: bytes) -> tuple[WSGIEnvironment, str | None]:
    """Return the environ of the request line, and the authority of its target. While it
    is incomplete: {} and None.

    Raise HTTPError for a head that is too long or cannot become valid, such as TLS:
    400, 414, 431, 505.
    """
    line, newline, _ = head.removeprefix(b"\r\n").partition(b"\n")
    if len(line) > MAX_REQUEST_LINE:
        raise HTTPError(414, f"Send a request line of at most {MAX_REQUEST_LINE} bytes")
    if len(head) > MAX_HEAD:
        raise HTTPError(431, f"Send a head of at most {MAX_HEAD} bytes")
    text = line.decode("latin-1")
    if not newline:
        if not _REQUEST_START.fullmatch(text):
            raise HTTPError(400, "Send plain HTTP/1.1: this port does not speak TLS")
        return {}, None
    match = REQUEST_LINE.fullmatch(text)
    if not match:
        raise HTTPError(400, "The request line must be `METHOD /path HTTP/1.1`")
    method, authority, target, protocol = match.groups()
    if protocol not in ("HTTP/1.0", "HTTP/1.1"):  # RFC 9110 15.6.6
        raise HTTPError(505, "Use HTTP/1.1 or HTTP/1.0")
    if not (authority or target[:1] == "/" or target == "*"):
        raise HTTPError(400, "The request target must be a path")
    path, _, query = target.partition("?")
    environ = {"REQUEST_METHOD": method, "SERVER_PROTOCOL": protocol, "QUERY_STRING": query}
    environ["PATH_INFO"] = unquote(path or "/", "latin-1")
    return environ, authority


@functools.lru_cache(maxsize=1)
def format_time(second: int) -> tuple[str, str]:
    """Return a time for the header Date, and for the log in Common Log Format."""
    return format_date_time(second), time.strftime("%d/%b/%Y:%H:%M:%S %z", time.localtime(second))


# -- server: connections ---------------------------------------------------------------
# Theory of operation: one thread does all network I/O with a selector. Each connection
# is a generator that reads like blocking code. It yields what it waits for: an event of
# its socket, or a function to run in a worker thread. The server resumes it with the
# result, or throws socket.timeout into it when its deadline has passed. Complete
# responses to GET are made in the I/O thread: they take microseconds, and threads that
# compete for the GIL are slower. What may wait for a lock, a core or a disk runs in
# workers, which are daemon threads: writes, hashes, reads that raise WouldBlock, and
# each part of a streamed response. A worker does not use the selector, and of its
# connection only the socket, to look whether the client is there, and the response
# head: it queues its result and wakes the I/O thread. One more thread writes the log.
# The server never forks.

# Seconds unless stated otherwise.
IDLE_TIMEOUT = 15  # between requests; sent as Keep-Alive
HEAD_TIMEOUT = 15.0  # from the first byte of a head to its last
BODY_TIMEOUT = 30.0  # from the end of the head to the end of the body
SEND_TIMEOUT = 60.0  # without the client reading anything: nginx's send_timeout
LINGER_TIMEOUT = 2.0  # for the client to close, after the last response
DRAIN_TIMEOUT = 10.0  # for requests in flight at shutdown: what docker stop allows
CHECK_INTERVAL = 0.2  # between checks of the deadlines and signals
ACCEPT_PAUSE = 0.01  # when no connection can be accepted
LOG_INTERVAL = 0.01  # between writes to the log
LOG_TIMEOUT = 1.0  # for the rest of the log at shutdown
WORKERS = 256  # threads at most
MAX_CONNECTIONS = 20_000  # fewer if the limit of open files is lower
RESERVED_FILES = 32  # file descriptors for the database, the log and the like
RECEIVE_SIZE = 64 * 1024  # bytes per read
MAX_PENDING = 10_000  # log entries that wait to be written
MAX_LOGGED = 512  # bytes of a request line in the log

_CLOSE = re.compile(r"(^|,)[ \t]*close[ \t]*(,|$)", re.IGNORECASE)  # RFC 9112 9.3
_CHUNKED = ("Transfer-Encoding", "chunked")
_READ, _WRITE, _NOTHING = selectors.EVENT_READ, selectors.EVENT_WRITE, 0


class Server(WSGIServer):
    """An HTTP/1.1 server for an Application, in one process."""

    application: Application
    request_queue_size = 1024  # connections that wait to be accepted

    def __init__(
        self, family: int, address: Any, app: Application, access_log: bool = True
    ) -> None:
        """Listen on an address of getaddrinfo. Raise OSError if it cannot be bound."""
        self.address_family, self.access_log, self.log = family, access_log, Log()
        super().__init__(address, None)  # type: ignore[arg-type]
        self.set_app(app)
        self.stopping = False
        self.connections: dict[Connection, None] = {}
        # Connections between requests, idle longest first.
        self.idle: dict[Connection, None] = {}
        # Windows has no such limit, and -1 stands for none.
        files = os.sysconf("SC_OPEN_MAX") if hasattr(os, "sysconf") else -1
        self.max_connections = (
            MAX_CONNECTIONS if files < 0 else max(1, min(MAX_CONNECTIONS, files - RESERVED_FILES))
        )
        self.selector = selectors.DefaultSelector()
        self._workers = self._busy = 0
        self._next_check = 0.0
        # A job is a function, and the connection to resume with its result.
        self._jobs: queue.SimpleQueue[tuple[Callable[[], object], Connection]] = (
            queue.SimpleQueue()
        )
        self._finished: queue.SimpleQueue[tuple[Connection, object]] = queue.SimpleQueue()
        self._woken, self._waker = socket.socketpair()
        for end in (self.socket, self._woken, self._waker):
            end.setblocking(False)
        self.selector.register(self.socket, _READ, self._accept)
        self.selector.register(self._woken, _READ, self._resume_finished)

    def server_bind(self) -> None:
        """Bind the socket without a reverse DNS lookup. Connections inherit TCP_NODELAY."""
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = (
            str(self.server_address[0]),
            int(self.server_address[1]),
        )
        self.setup_environ()
        self.base_environ.update(
            {"wsgi.version": (1, 0), "wsgi.url_scheme": "http", "wsgi.errors": self.log}
        )
        self.base_environ.update(
            {"wsgi.multithread": True, "wsgi.multiprocess": False, "wsgi.run_once": False}
        )

    def stop(self, *_: object) -> None:
        """Make serve() return soon. Can be used as a signal handler."""
        self.stopping = True

    def serve(self) -> None:
        """Serve until stop() is called. Then give requests in flight DRAIN_TIMEOUT to
        finish, and close everything.
        """
        this_thread.may_wait = False
        while not self.stopping:
            self._serve_round()
        self.selector.unregister(self.socket)
        self.socket.close()
        # Idle connections receive nothing more. What they have received already is answered.
        for connection in list(self.idle):
            with contextlib.suppress(OSError):
                connection.socket.shutdown(socket.SHUT_RD)
        deadline = time.monotonic() + DRAIN_TIMEOUT
        while self.connections and time.monotonic() < deadline:
            self._serve_round()
        this_thread.may_wait = True
        for connection in list(self.connections):
            connection.close()
        for resource in (self.selector, self._woken, self._waker):
            resource.close()
        self.log.stop()

    def submit(self, function: Callable[[], object], connection: Connection) -> None:
        """Run a function in a worker, then resume the connection in this thread: with
        Busy if there is no worker.
        """
        if self._workers < min(self._busy + 1, WORKERS):
            with contextlib.suppress(RuntimeError):
                threading.Thread(target=self._work, daemon=True).start()
                self._workers += 1
        if self._workers:
            self._busy += 1
            self._jobs.put((function, connection))
        else:
            connection.resume(Busy("a thread is needed: can't start new thread"))

    def _work(self) -> None:
        while True:
            function, connection = self._jobs.get()
            this_thread.is_abandoned = connection.is_abandoned
            try:
                result = function()
            except Exception as error:
                # resume() treats an OSError as a lost connection, and logs nothing.
                result = Unavailable(str(error)) if isinstance(error, OSError) else error
            self._finished.put((connection, result))
            # Otherwise a worker without a job would keep its last connection and the
            # body of the request.
            del this_thread.is_abandoned, function, connection, result
            # The socket may be closed. If its buffer is full, the I/O thread wakes up anyway.
            with contextlib.suppress(OSError):
                self._waker.send(b"\0")

    def _resume_finished(self) -> None:
        self._woken.recv(RECEIVE_SIZE)
        while not self._finished.empty():
            self._busy -= 1
            connection, result = self._finished.get()
            connection.resume(result)

    def _serve_round(self) -> None:
        """Wait for events and resume the connections that they are for, or whose
        deadline has passed.
        """
        # Not forever, because a signal right before the wait is handled only after it.
        for key, _ in self.selector.select(CHECK_INTERVAL):
            key.data()
        now = time.monotonic()
        if now > self._next_check:
            self._next_check = now + CHECK_INTERVAL
            for connection in [
                connection for connection in self.connections if connection.deadline < now
            ]:
                connection.resume(socket.timeout())

    def _accept(self) -> None:
        """Accept a connection; at the limit, close the one that has been idle longest."""
        try:
            connection, address = self.socket.accept()
        except (BlockingIOError, ConnectionAbortedError):
            # The client has gone.
            return
        except OSError:
            # No file descriptor is left.
            if not self._close_idle():
                time.sleep(ACCEPT_PAUSE)
            return
        if len(self.connections) >= self.max_connections and not self._close_idle():
            connection.close()
        else:
            connection.setblocking(False)
            Connection(self, connection, address[0])

    def _close_idle(self) -> bool:
        connection = next(iter(self.idle), None)
        if connection:
            connection.close()
        return connection is not None


class Connection:
    """One connection and its requests. Its generators yield an event to wait for, or a
    function for a worker.
    """

    def __init__(self, server: Server, connection: socket.socket, client: str) -> None:
        self.server, self.socket, self.client = server, connection, client
        # Bytes that were received but not used yet, and the head of the current request.
        self.received = self.head = b""
        self.is_last = False
        self.deadline = float("inf")
        self._events = _NOTHING
        self._steps = self._serve()
        server.connections[self] = None
        self.resume()

    def resume(self, result: object = None) -> None:
        """Continue until the next wait, with the result of the last one, or its exception."""
        try:
            wanted = (
                self._steps.throw(result)
                if isinstance(result, Exception)
                else self._steps.send(result)
            )
        except Exception as reason:
            if not isinstance(reason, (StopIteration, OSError)):
                error_response(reason, self.server.base_environ)
            self.close()
            return
        self._wait_for(_NOTHING if callable(wanted) else wanted)
        if callable(wanted):
            self.deadline = float("inf")
            self.server.submit(wanted, self)

    def close(self) -> None:
        """Close the connection and forget it."""
        self._steps.close()
        self._wait_for(_NOTHING)
        self.socket.close()
        self.server.connections.pop(self, None)
        self.server.idle.pop(self, None)

    def is_abandoned(self) -> bool:
        """Return True if the client has closed the connection, or its sending side."""
        try:
            return not self.socket.recv(1, socket.MSG_PEEK)
        except OSError as error:
            return not isinstance(error, BlockingIOError)

    def _wait_for(self, events: int) -> None:
        if events != self._events:
            if self._events:
                self.server.selector.unregister(self.socket)
            if events:
                self.server.selector.register(self.socket, events, self.resume)
            self._events = events

    def _serve(self) -> Steps:
        """Answer requests until either side closes the connection. Raise OSError."""
        while not self.is_last:
            if self.received:
                # A pipelined request. Other connections come first.
                self.deadline = time.monotonic() + SEND_TIMEOUT
                yield _WRITE
            elif self.server.stopping:
                return
            else:
                self.server.idle[self] = None
                self.deadline = time.monotonic() + IDLE_TIMEOUT
                yield from self._receive()
                del self.server.idle[self]
                if not self.received:
                    return
            yield from self._answer_request()
        # Read until the client closes: closing with unread input may lose the response
        # (RFC 9112 9.6).
        self.socket.shutdown(socket.SHUT_WR)
        end, self.received = time.monotonic() + BODY_TIMEOUT, b"?"
        while self.received:
            self.deadline, self.received = min(end, time.monotonic() + LINGER_TIMEOUT), b""
            yield from self._receive()

    def _answer_request(self) -> Steps:
        """Receive a request, run the application and send its response. Raise OSError."""
        try:
            environ = yield from self._receive_request()
            run = functools.partial(self.server.application, environ, self._start_response)
            try:
                body = run() if environ["REQUEST_METHOD"] in ("GET", "HEAD") else (yield run)
            except WouldBlock:
                body = yield run
            status, headers = self._started
            is_http_1_1, options = (
                environ["SERVER_PROTOCOL"] == "HTTP/1.1",
                environ.get("HTTP_CONNECTION", ""),
            )
            if not is_http_1_1 or self.server.stopping or _CLOSE.search(options):
                self.is_last = True
            if is_http_1_1 and not isinstance(body, tuple):
                headers.append(_CHUNKED)
        except (HTTPError, Unavailable, socket.timeout) as error:
            self.is_last = True
            status, headers, body = to_wsgi(error_response(error, self.server.base_environ))
            body = (b"",) if self.head.startswith(b"HEAD ") else body
        yield from self._send_response(status, headers, body)

    def _receive_request(self) -> Steps:
        """Return the environ of the next request, whose body has arrived. Raise
        HTTPError, OSError.
        """
        self.deadline = time.monotonic() + HEAD_TIMEOUT
        while not (end := HEAD_END.search(self.received)):
            self.head = self.received.removeprefix(b"\r\n")
            parse_request_line(self.received)
            yield from self._receive("The head ends before its empty line")
        self.head = self.received[: end.end()].removeprefix(b"\r\n")
        self.received = self.received[end.end() :]
        environ = {**self.server.base_environ, **parse_head(self.head), "REMOTE_ADDR": self.client}
        length = int(environ["CONTENT_LENGTH"] or 0)
        if length > MAX_BODY:
            # The application answers 413.
            self.is_last, length = True, 0
        elif length and "HTTP_EXPECT" in environ and environ["SERVER_PROTOCOL"] == "HTTP/1.1":
            yield from self._send(b"HTTP/1.1 100 Continue\r\n\r\n")  # RFC 9110 10.1.1
        self.deadline = time.monotonic() + BODY_TIMEOUT
        while len(self.received) < length:
            yield from self._receive("The body is shorter than its Content-Length")
        environ["wsgi.input"] = io.BytesIO(self.received[:length])
        self.received = self.received[length:]
        return environ

    def _receive(self, problem: str = "") -> Steps:
        """Receive some bytes. At the end of the stream, raise HTTPError with the
        problem, if any. Raise OSError.
        """
        yield _READ
        more = self.socket.recv(RECEIVE_SIZE)
        self.received += more
        if problem and not more:
            raise HTTPError(400, problem)

    def _send(self, message: bytes) -> Steps:
        """Send a message. Raise OSError, among them socket.timeout if the client stops reading."""
        while message:
            try:
                message = message[self.socket.send(message) :]
            except BlockingIOError:
                self.deadline = time.monotonic() + SEND_TIMEOUT
                yield _WRITE

    def _start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: object = None
    ) -> Any:
        self._started = status, headers

    def _send_response(
        self, status: str, headers: list[tuple[str, str]], body: Iterable[bytes]
    ) -> Steps:
        """Send a response and log it. If it fails midway, reset the connection, so that
        it does not look complete.
        """
        date, moment = format_time(int(time.time()))
        persistence = (
            "Connection: close" if self.is_last else f"Keep-Alive: timeout={IDLE_TIMEOUT}"
        )
        fields = "".join([f"{name}: {value}\r\n" for name, value in headers])
        start = f"HTTP/1.1 {status}\r\nDate: {date}\r\nServer: profiler/{__version__}\r\n"
        head, size = f"{start}{fields}{persistence}\r\n\r\n".encode("latin-1"), 0
        try:
            if isinstance(body, tuple):
                size = len(body[0])
                yield from self._send(head + body[0])
            else:
                chunked, parts = _CHUNKED in headers, iter(body)
                while (part := (yield functools.partial(next, parts, None))) is not None:
                    yield from self._send(
                        head + (b"%x\r\n%b\r\n" % (len(part), part) if chunked else part)
                    )
                    head, size = b"", size + len(part)
                if chunked:
                    yield from self._send(b"0\r\n\r\n")  # RFC 9112 7.1
        except BaseException:
            # With l_onoff = 1 and l_linger = 0, close resets the connection.
            with contextlib.suppress(OSError):
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1" + bytes(7))
            raise
        finally:
            if self.server.access_log:
                # In Common Log Format, without control characters. What is no request
                # line may contain a password.
                line = self.head.partition(b"\n")[0].decode("latin-1")
                text = line[:MAX_LOGGED].rstrip("\r") if REQUEST_LINE.fullmatch(line) else ""
                text = text.encode("unicode_escape").decode().replace('"', '\\"')
                self.server.log.write(
                    f'{self.client} - - [{moment}] "{text}" {status[:3]} {size}\n'
                )


class Log(io.TextIOBase):
    """wsgi.errors: a thread writes its entries to stderr. What stderr does not take is dropped."""

    def __init__(self) -> None:
        self.entries: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write_entries, daemon=True)
        # If the system has no more threads, nothing is written.
        with contextlib.suppress(RuntimeError):
            self._writer.start()

    def write(self, text: str) -> int:
        """Keep an entry until it is written."""
        if self.entries.qsize() < MAX_PENDING:
            self.entries.put(text)
        return len(text)

    def stop(self) -> None:
        """Write the rest, for at most LOG_TIMEOUT."""
        self.entries.put(None)
        if self._writer.is_alive():
            self._writer.join(LOG_TIMEOUT)

    def _write_entries(self) -> None:
        # With os.write, because a full sys.stderr could block the interpreter's exit.
        # It may be closed, too.
        entries: list[str | None] = []
        while None not in entries:
            entries = [self.entries.get()]
            time.sleep(LOG_INTERVAL)
            entries += [self.entries.get() for _ in range(self.entries.qsize())]
            with contextlib.suppress(AttributeError, OSError, ValueError):
                os.write(
                    sys.stderr.fileno(),
                    "".join(filter(None, entries)).encode("utf-8", "backslashreplace"),
                )


# -- command line ----------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command (default: sys.argv). Exit with 2 for an invalid setting, with 1 for a failure.

    As a CGI program (RFC 3875), answer one request: then the arguments are the client's.
    """
    if argv is None and os.environ.get("GATEWAY_INTERFACE", "").startswith("CGI/"):
        CGIHandler().run(application)
    else:
        run_command(make_parser()[0], argv, Users)


def make_parser(
    prog: str = "profiler", database: str = "the SQLite file"
) -> tuple[argparse.ArgumentParser, Any]:
    """Return the parser of the command line, and its subparsers. `run` is the function
    of a command.
    """
    text = "User accounts over HTTP. Without a command, serve them. Each option overrides its environment variable."
    parser = argparse.ArgumentParser(prog, description=text, allow_abbrev=False)
    add = parser.add_argument
    add("--host", help=f"the address to listen on (PROFILER_HOST; default: {HOST})")
    add(
        "--port",
        help=f"the port to listen on; 0 picks a free one (PROFILER_PORT, else PORT; default: {PORT})",
    )
    add("--database", help=f"{database} (PROFILER_DATABASE; default: {DATABASE})")
    add(
        "--token-file",
        metavar="PATH",
        help="require a token of this file, one per line (PROFILER_TOKEN: the token)",
    )
    add(
        "--anonymous",
        action="store_true",
        default=None,
        help="serve without a token (PROFILER_ANONYMOUS=1)",
    )
    add(
        "--iterations",
        type=int,
        help=f"of PBKDF2 for new passwords (PROFILER_ITERATIONS; default: {ITERATIONS})",
    )
    add("--no-access-log", action="store_true", help="do not log each request to stderr")
    add("--version", action="version", version=f"profiler {__version__}")
    parser.set_defaults(run=_run_server)

    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    initialise = commands.add_parser(
        "initialise-database", help="create the table of users", allow_abbrev=False
    )
    initialise.add_argument("--force", action="store_true", help="delete all users in it")
    initialise.set_defaults(run=_initialise_database)
    backup = commands.add_parser(
        "backup", help="copy the database while it is served", allow_abbrev=False
    )
    backup.add_argument("path", metavar="PATH", help="a new file")
    backup.set_defaults(run=_backup)
    for command in (initialise, backup):
        command.add_argument("--database", default=argparse.SUPPRESS, help=database)
    return parser, commands


def run_command(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, storage: Callable[..., Users]
) -> None:
    """Run the command of the arguments on a storage. Exit as main does."""
    # sys.stderr is None if the caller has closed the descriptor.
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    arguments = parser.parse_args(argv)
    try:
        with contextlib.closing(storage(arguments.database, arguments.iterations)) as users:
            try:
                arguments.run(arguments, users)
            except (Unavailable, sqlite3.Error) as error:
                sys.exit(f"profiler: {users.location}: {error}")
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        sys.exit(f"profiler: {error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def _run_server(arguments: argparse.Namespace, users: Users) -> None:
    """Serve until a signal."""
    own_port = os.environ.get("PROFILER_PORT", "")
    # Kubernetes sets PROFILER_PORT=tcp://... for a Service named "profiler".
    own_port = "" if own_port.startswith("tcp://") else own_port
    port = parse_number(
        arguments.port or own_port or os.environ.get("PORT") or str(PORT), "port", 0, 65535
    )
    host = arguments.host or os.environ.get("PROFILER_HOST") or HOST
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM
        )[0]
    except (OSError, UnicodeError) as error:
        raise ValueError(f"invalid host {host!r}: {error}") from None
    token = None
    if arguments.token_file is not None:
        try:
            with open(arguments.token_file, encoding="utf-8-sig") as file:
                token = file.read()
        except (OSError, UnicodeError) as error:
            raise ValueError(f"--token-file: {error}") from None
    app = Application(users, token, arguments.anonymous)
    ip = str(address[0])
    if not (app.tokens or app.anonymous or ip.startswith("127.") or ip == "::1"):
        raise ValueError(
            f"others can reach {ip}: set a token (--token-file, PROFILER_TOKEN) or --anonymous"
        )
    users.ping()
    count = users.count()
    # Free the memory that counting took.
    users.close()
    try:
        server = Server(family, address, app, not arguments.no_access_log)
    except OSError as error:
        raise OSError(
            f"port {port} of {ip}: {error.strerror}: choose another --port or --host"
        ) from None
    signals = [signal.SIGTERM, signal.SIGINT]
    # Windows has no SIGHUP, and nohup ignores it.
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signals.append(signal.SIGHUP)
    with server:
        if users.iterations < ITERATIONS:
            server.log.write(
                f"profiler: {users.iterations} iterations are fewer than OWASP's {ITERATIONS}\n"
            )
        for signum in signals:
            signal.signal(signum, server.stop)
        print(f"http://{f'[{ip}]' if ':' in ip else ip}:{server.server_port}/")
        print(f"Database: {users.location} (users: {count}). Press Ctrl-C to stop.", flush=True)
        server.serve()
        # Another signal must not change the exit status.
        for signum in signals:
            signal.signal(signum, signal.SIG_IGN)


def _initialise_database(arguments: argparse.Namespace, users: Users) -> None:
    created = users.initialise(arguments.force)
    print("Successfully created database schema." if created else "The database schema exists.")


def _backup(arguments: argparse.Namespace, users: Users) -> None:
    users.backup(arguments.path)
    print(f"Backup written to {arguments.path}.")


if __name__ == "__main__":
    main()
