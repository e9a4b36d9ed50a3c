"""Start and stop real servers for tests and measurements, on Linux.

PostgreSQL, MariaDB, MySQL, a Galera cluster, a primary with a synchronous standby, Patroni
with etcd, PgBouncer and haproxy:

    with postgresql() as server, pgbouncer(server, "session") as pooler:
        url = pooler.url(database_of(server.make_database()))

Every server runs in a temporary folder on free ports of 127.0.0.1, with a minimal
environment: as the user who runs the tests or, if that is root, as the server's own
account. The roles are `app`, which may create databases, and `limited`, which may do
nothing until `allow` lets it use the table. Their password is SECRET.

`missing` returns the Debian packages to install. A context manager kills every process
of its server and removes the folder when it is left, also if the start failed or was
interrupted. Servers have sessions of their own, so that Ctrl-C reaches only the process
that started them.

Configuration files that docs/databases.md shows are read from it. It describes three
nodes, 10.0.0.11 to 10.0.0.13, and etcd on 10.0.0.21 to 10.0.0.23; PgBouncer and haproxy
run on the machine of the service. The tests replace addresses, ports, folders,
passwords and the mode of PgBouncer, see PGBOUNCER_DOCUMENTED, PATRONI_DOCUMENTED and
HAProxy. They add one setting to patroni.yml, so that a killed PostgreSQL leaves no
shared memory.
"""

from __future__ import annotations

import atexit
import contextlib
import http.client
import os
import pathlib
import pwd
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time

import psycopg
import pymysql

DOCUMENTATION = pathlib.Path(__file__).resolve().parent.parent / "docs" / "databases.md"
GALERA = pathlib.Path("/usr/lib/galera/libgalera_smm.so")
SECRET = "h0rcrux"  # the password of every role

# -- what is installed -----------------------------------------------------------------

FOLDERS = [
    *os.environ.get("PATH", os.defpath).split(os.pathsep),
    "/usr/sbin",
    "/usr/local/sbin",
    # Debian keeps each version of PostgreSQL in a folder of its own; the newest goes first.
    *sorted(
        map(str, pathlib.Path("/usr/lib/postgresql").glob("*/bin")),
        key=lambda folder: [int(number) for number in re.findall("[0-9]+", folder)],
        reverse=True,
    ),
]
PACKAGES = {
    "postgres": "postgresql",
    "mariadbd": "mariadb-server",
    "mysqld": "mysql-server-core",
    GALERA: "galera-4",
    "rsync": "rsync",
    "haproxy": "haproxy",
    "pgbouncer": "pgbouncer",
    "patroni": "patroni",
    "etcd": "etcd-server",
}
NEEDS = {
    "postgresql": ["postgres"],
    "postgresql_with_standby": ["postgres"],
    "mariadb": ["mariadbd"],
    "mysql": ["mysqld"],
    "galera": ["mariadbd", GALERA, "rsync"],
    "pgbouncer": ["postgres", "pgbouncer"],
    "patroni": ["postgres", "patroni", "etcd"],
    "haproxy": ["haproxy"],
}


def missing(*names):
    """Return which Debian packages these context managers need and do not find, or ""
    if they have all they need."""
    needed = {program: None for name in names for program in NEEDS[name]}
    packages = [PACKAGES[program] for program in needed if not find_program(program)]
    return f"not installed (Debian packages): {' '.join(packages)}" if packages else ""


def find_program(name):
    if isinstance(name, pathlib.Path):
        return name if name.exists() else None
    path = shutil.which(name, path=os.pathsep.join(FOLDERS))
    # MariaDB has a link of the name mysqld.
    is_link = name == "mysqld" and path and os.path.realpath(path).endswith("mariadbd")
    return None if is_link else path


def program(name):
    """Return the path of a program."""
    if path := find_program(name):
        return path
    raise FileNotFoundError(
        f"{name} is not installed (Debian package {PACKAGES.get(name, 'unknown')})"
    )


# -- configuration from the documentation ----------------------------------------------


def config_from_docs(path, name):
    """Return the fenced code block of a Markdown file whose first line is a comment
    that starts with this name."""
    text = pathlib.Path(path).read_text("utf-8")
    blocks = re.findall(
        rf"^```[^\n]*\n(# {re.escape(name)}(?![\w.-]).*?)^```$", text, re.MULTILINE | re.DOTALL
    )
    if len(blocks) != 1:
        raise ValueError(
            f"{path} has {len(blocks)} code blocks that start with '# {name}', not one"
        )
    return blocks[0]


def substitute(text, replacements):
    """Replace every key, in one pass. Each has to occur, so that the documentation and
    the tests cannot drift apart."""
    if absent := [key for key in replacements if key not in text]:
        raise ValueError(f"the configuration does not contain {absent}")
    pattern = "|".join(map(re.escape, sorted(replacements, key=len, reverse=True)))
    return re.sub(pattern, lambda match: str(replacements[match[0]]), text)


# -- processes -------------------------------------------------------------------------


def processes():
    """Return the running processes: a dict from pid to (parent's pid, session, command line)."""
    found = {}
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        # One that has just ended has no files.
        with contextlib.suppress(OSError):
            state, parent, _, session = (
                (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            )
            if state not in "ZX":
                found[int(folder.name)] = (
                    int(parent),
                    int(session),
                    (folder / "cmdline").read_bytes(),
                )
    return found


def family(is_root):
    """Return the pids of the processes for which `is_root(session, command)` is true,
    and of all that they started.

    PostgreSQL's children have sessions of their own; a script's children may outlive
    it, but stay in its session.
    """
    table = processes()
    found, grown = (
        set(),
        {pid for pid, (_, session, command) in table.items() if is_root(session, command)},
    )
    while grown != found:
        found = grown
        sessions = {table[pid][1] for pid in found} - {os.getsid(0)}
        grown = found | {
            pid
            for pid, (parent, session, _) in table.items()
            if parent in found or session in sessions
        }
    return found


def freeze(is_root):
    """Suspend the family with SIGSTOP, and return the pids."""
    frozen = set()
    # A suspended process starts no other one, so the family is complete once it no longer grows.
    while new := family(is_root) - frozen:
        send_signal(new, signal.SIGSTOP)
        frozen |= new
    return frozen


def kill(pids):
    """End processes with SIGKILL, wait for it, and remove the shared memory that a
    killed PostgreSQL leaves."""
    mapped = ""
    for pid in pids:
        with contextlib.suppress(OSError):
            mapped += pathlib.Path(f"/proc/{pid}/maps").read_text()
    send_signal(pids, signal.SIGKILL)
    until(lambda: pids.isdisjoint(processes()), 60)
    for file in set(re.findall(r"/dev/shm/PostgreSQL\.[0-9]+", mapped)):
        pathlib.Path(file).unlink(missing_ok=True)
    for segment in set(re.findall("([0-9]+) +/SYSV", mapped)):
        subprocess.run(["ipcrm", "-m", segment], check=False, stderr=subprocess.DEVNULL)


def send_signal(pids, signum):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)


def until(condition, seconds=10, pause=0.01):
    """Call the condition until it returns something true, and return that. Raise TimeoutError."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"still waiting after {seconds} s")
        time.sleep(pause)
    return value


_ports = set()


def free_port():
    """Return a port that is free, was not returned before, and is below those that the
    system gives to clients."""
    while True:
        port = random.randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            if port not in _ports:
                _ports.add(port)
                return port


def database_of(url):
    """Return the name of the database in a URL, with or without a query."""
    return url.partition("?")[0].rpartition("/")[2]


# -- one server ------------------------------------------------------------------------

_open = set()


class Server:
    """A server in a temporary folder, on a free port of 127.0.0.1.

    Subclasses define `command` and `connect`, and start with `create`, which makes what
    the server needs and starts it.
    """

    account = "nobody"  # who runs it if root must not
    stop_signal = signal.SIGTERM

    def __init__(self):
        self.port, self.process = free_port(), None
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="profiler-"))
        self.creator = os.getpid()
        _open.add(self)
        self.folder.chmod(0o755)
        self.credentials = {}
        if os.geteuid() == 0:
            accounts = {entry.pw_name: entry for entry in pwd.getpwall()}
            account = accounts.get(self.account) or accounts["nobody"]
            self.credentials = {
                "user": account.pw_uid,
                "group": account.pw_gid,
                "extra_groups": [],
            }
            os.chown(self.folder, account.pw_uid, account.pw_gid)
        self.environment = {
            "PATH": os.pathsep.join(FOLDERS),
            "HOME": str(self.folder),
            "LANG": "C.UTF-8",
        }
        self.log = self.folder / "log"

    def write(self, name, text, mode=0o600):
        """Create a file in the folder that belongs to the server's account, and return
        its path."""
        path = self.folder / name
        path.write_text(text)
        path.chmod(mode)
        if self.credentials:
            os.chown(path, self.credentials["user"], self.credentials["group"])
        return path

    def failure(self, reason):
        return RuntimeError(f"{reason}:\n{self.log.read_text('utf-8', 'replace')[-6000:]}")

    def spawn(self, *command):
        """Start a program as the server's account, in a session of its own."""
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **self.credentials,
            )

    def run(self, *command):
        """Run a program to its end."""
        self.spawn(*command)
        if status := self.process.wait():
            raise self.failure(f"{command[0]} exited with status {status}")

    def launch(self, *arguments):
        """Start the server without waiting until it answers."""
        self.spawn(*map(str, self.command()), *arguments)

    def start(self, *arguments, seconds=60):
        """Start it, with what it stored before, and wait until it answers."""
        self.launch(*arguments)
        self.wait(seconds)

    def wait(self, seconds=60):
        try:
            until(self.answers, seconds, 0.05)
        except TimeoutError as error:
            raise self.failure(error) from None

    def answers(self):
        """Return whether it is ready. Raise RuntimeError, with its log, if it has exited."""
        if self.process.poll() is not None:
            raise self.failure(
                f"{type(self).__name__} exited with status {self.process.returncode}"
            )
        return self.is_ready()

    def is_ready(self):
        with contextlib.suppress(psycopg.Error, pymysql.Error):
            self.connect().close()
            return True
        return False

    def is_own(self, session, command):
        """Return whether this is a process of the server. Its command line names the folder."""
        if self.process and session == self.process.pid:
            return True
        return "".join(f"{part}\0" for part in self.command()).encode() in command

    def stop(self):
        """Stop it regularly, without waiting for its clients."""
        started = family(self.is_own)
        if self.process and self.process.poll() is None:
            self.process.send_signal(self.stop_signal)
            self.process.wait(timeout=60)
        self._kill(started)

    def freeze(self):
        """Suspend every process, as if the virtual machine were suspended. Connections
        stay open."""
        freeze(self.is_own)

    def thaw(self):
        send_signal(family(self.is_own), signal.SIGCONT)

    def kill(self):
        """End every process at once with SIGKILL, as a power failure does."""
        self._kill(freeze(self.is_own))

    def _kill(self, pids):
        kill(pids)
        if self.process:
            self.process.wait(timeout=60)
            self.process = None

    def close(self):
        """Kill it and remove everything that it made."""
        self.kill()
        if self.folder.exists():
            shutil.rmtree(self.folder)
        _open.discard(self)

    def execute(self, statement, database=None):
        """Run one statement in a connection of its own and return its rows, if it has any."""
        with (
            contextlib.closing(self.connect(database)) as connection,
            connection.cursor() as cursor,
        ):
            cursor.execute(statement)
            return list(cursor.fetchall()) if cursor.description else []

    def make_database(self, options=""):
        """Return the URL of a new, empty database."""
        name = f"test{random.randrange(10**9)}"
        self.execute(f"CREATE DATABASE {name} {options}")
        return self.url(name)


@atexit.register
def close_all():
    """Close the servers that are still open, for example because Ctrl-C was pressed
    again during `close`."""
    for server in list(_open):
        if server.creator == os.getpid():
            server.close()


@contextlib.contextmanager
def running(server, *arguments):
    """Create and start a server, and close it at the end, also if the start fails."""
    with contextlib.closing(server):
        server.create(*arguments)
        yield server


# -- PostgreSQL ------------------------------------------------------------------------


class PostgreSQLProtocol(Server):
    """A server that speaks PostgreSQL's protocol."""

    account = "postgres"
    documented_port = 5432
    writable = "SELECT NOT pg_is_in_recovery()"
    table = '"user"'
    superuser = "app"

    def connect(self, database=None, port=None):
        return psycopg.connect(
            host="127.0.0.1",
            port=port or self.port,
            user=self.superuser,
            password=SECRET,
            dbname=database or "postgres",
            autocommit=True,
            connect_timeout=5,
        )

    def url(self, database, user="app", port=None):
        return f"postgresql://{user}:{SECRET}@127.0.0.1:{port or self.port}/{database}"

    def allow(self, url):
        """Return the URL for a role that may change the rows of the table, and nothing else."""
        self.execute(
            f"GRANT SELECT, INSERT, UPDATE, DELETE ON {self.table} TO limited", database_of(url)
        )
        return self.url(database_of(url), "limited")


class PostgreSQL(PostgreSQLProtocol):
    """PostgreSQL. `settings` are those of postgresql.conf; changes apply at the next start."""

    stop_signal = signal.SIGINT

    def __init__(self, **settings):
        self.programs = pathlib.Path(program("postgres")).resolve().parent
        super().__init__()
        self.data = self.folder / "data"
        self.settings = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": "",
            # In the data folder, not in /dev/shm, where a killed server leaves it.
            "dynamic_shared_memory_type": "mmap",
            "fsync": "off",
            "log_line_prefix": "%d|",
            **settings,
        }

    def create(self):
        self.run(
            self.programs / "initdb", "-D", self.data, "-U", self.superuser, "-E", "UTF8",
            "--locale=C",
            "-A", "scram-sha-256", f"--pwfile={self.write('password', SECRET)}", "-N",
        )  # fmt: skip
        self.start()
        self.execute(f"CREATE ROLE limited LOGIN PASSWORD '{SECRET}'")

    def create_standby(self, primary):
        """Copy a primary, and follow it."""
        self.run(
            self.programs / "pg_basebackup", "-D", self.data, "-R", "-c", "fast", "--no-sync",
            "-d", f"host=127.0.0.1 port={primary.port} user={self.superuser} password={SECRET}",
        )  # fmt: skip
        self.start()

    def command(self):
        settings = [
            part for name, value in self.settings.items() for part in ("-c", f"{name}={value}")
        ]
        return [self.programs / "postgres", "-D", self.data, *settings]

    def is_postgresql(self, _, command):
        """Return whether this is the first process of PostgreSQL, even if Patroni
        started it, in another session."""
        return f"\0-D\0{self.data}\0".encode() in command

    def is_own(self, session, command):
        return super().is_own(session, command) or self.is_postgresql(session, command)


def postgresql(**settings):
    """Start PostgreSQL: `with postgresql(fsync="on") as server`."""
    return running(PostgreSQL(**settings))


@contextlib.contextmanager
def postgresql_with_standby(**settings):
    """Start a primary, whose commits wait for its standby, and the standby; yield both."""
    with (
        postgresql(**settings) as primary,
        contextlib.closing(PostgreSQL(cluster_name="standby", **settings)) as standby,
    ):
        standby.create_standby(primary)
        # Not earlier: the standby has a copy of these settings, and must not wait for
        # another one once it is promoted.
        primary.execute("ALTER SYSTEM SET synchronous_standby_names = 'standby'")
        primary.execute("SELECT pg_reload_conf()")
        until(
            lambda: primary.execute("SELECT 1 FROM pg_stat_replication WHERE sync_state = 'sync'")
        )
        yield primary, standby


def multi_host_url(servers, database, options="target_session_attrs=read-write"):
    """Return one URL of several PostgreSQL servers, of which SQLAlchemy's driver uses
    the primary."""
    hosts = ",".join("127.0.0.1" for _ in servers)
    ports = ",".join(str(server.port) for server in servers)
    return f"postgresql://app:{SECRET}@/{database}?host={hosts}&port={ports}&{options}"


# -- MariaDB and Galera ----------------------------------------------------------------


class MariaDB(Server):
    """MariaDB. `settings` are options of the command line; changes apply at the next start."""

    account = "mysql"
    documented_port = 3306
    writable = "SELECT 1"
    table = "user"
    daemon = "mariadbd"

    def __init__(self, **settings):
        self.program = program(self.daemon)
        super().__init__()
        self.data = self.folder / "data"
        self.settings = {
            "datadir": self.data,
            "port": self.port,
            "bind-address": "127.0.0.1",
            # Otherwise the anonymous account of localhost would take precedence over ours.
            "skip-name-resolve": 1,
            "socket": self.folder / "socket",
            "pid-file": self.folder / "pid",
            "innodb-flush-log-at-trx-commit": 0,
            # The service must not depend on the server's character set and mode.
            "character-set-server": "latin1",
            "sql-mode": "",
            **settings,
        }

    def install(self):
        """Create the data folder, without roles of ours: a node of Galera gets them
        from the others."""
        self.run(
            program("mariadb-install-db"), "--no-defaults", f"--datadir={self.data}",
            "--auth-root-authentication-method=normal",
            "--skip-test-db",
        )  # fmt: skip

    def create(self, *arguments):
        self.install()
        setup = self.write(
            "setup.sql",
            f"CREATE USER app IDENTIFIED BY '{SECRET}';\n"
            "GRANT ALL ON *.* TO app WITH GRANT OPTION;\n"
            f"CREATE USER limited IDENTIFIED BY '{SECRET}';\n",
        )
        self.start(f"--init-file={setup}", *arguments)

    def command(self):
        return [
            self.program,
            "--no-defaults",
            *(f"--{name}={value}" for name, value in self.settings.items()),
        ]

    def connect(self, database=None, port=None):
        return pymysql.connect(
            host="127.0.0.1",
            port=port or self.port,
            user="app",
            password=SECRET,
            database=database,
            autocommit=True,
            connect_timeout=5,
            ssl_disabled=True,
        )

    def url(self, database, user="app", port=None):
        return f"mysql://{user}:{SECRET}@127.0.0.1:{port or self.port}/{database}"

    def allow(self, url):
        """Return the URL for an account that may change the rows of the table, and
        nothing else."""
        name = database_of(url)
        self.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE ON {name}.{self.table} TO limited")
        return self.url(name, "limited")


class MySQL(MariaDB):
    """MySQL, whose authentication needs the package cryptography without TLS."""

    daemon = "mysqld"

    def __init__(self, **settings):
        super().__init__(**{"mysqlx": 0, "sync-binlog": 0, "secure-file-priv": "NULL", **settings})

    def install(self):
        self.run(self.program, "--no-defaults", "--initialize-insecure", f"--datadir={self.data}")


class GaleraNode(MariaDB):
    """A node of a Galera cluster: the one with this number, counted from 0, of those
    that listen on the addresses."""

    def __init__(self, addresses, number, **settings):
        options = {
            "gmcast.listen_addr": f"tcp://{addresses[number]}",
            "ist.recv_addr": f"127.0.0.1:{free_port()}",
            # A node that does not answer is given up after 2 seconds instead of 5.
            "evs.keepalive_period": "PT0.5S",
            "evs.suspect_timeout": "PT2S",
        }
        cluster = {
            "wsrep-on": "ON",
            "wsrep-provider": GALERA,
            "wsrep-provider-options": ";".join(
                f"{name}={value}" for name, value in options.items()
            ),
            "wsrep-cluster-address": "gcomm://" + ",".join(addresses),
            "wsrep-node-address": "127.0.0.1",
            "wsrep-sst-method": "rsync",
            "wsrep-sst-receive-address": f"127.0.0.1:{free_port()}",
            "binlog-format": "ROW",
            "innodb-autoinc-lock-mode": 2,
        }
        super().__init__(**{**cluster, **settings})

    def is_ready(self):
        return super().is_ready() and self.execute("SHOW STATUS LIKE 'wsrep_ready'")[0][1] == "ON"


def mariadb(**settings):
    """Start MariaDB: `with mariadb(**{"sql-mode": "ANSI"}) as server`."""
    return running(MariaDB(**settings))


def mysql(**settings):
    """Start MySQL, as `mariadb` does MariaDB."""
    return running(MySQL(**settings))


@contextlib.contextmanager
def galera(count=3, **settings):
    """Start a Galera cluster and yield its nodes, each of which accepts writes. A
    killed node returns with `start`."""
    for name in NEEDS["galera"]:
        program(name)
    addresses = [f"127.0.0.1:{free_port()}" for _ in range(count)]
    with contextlib.ExitStack() as stack:
        nodes = [
            stack.enter_context(contextlib.closing(GaleraNode(addresses, i, **settings)))
            for i in range(count)
        ]
        nodes[0].create("--wsrep-new-cluster")
        for node in nodes[1:]:
            node.install()
            node.start()
        yield nodes


# -- PgBouncer and haproxy -------------------------------------------------------------


# What the documentation shows, and what the test uses instead.
PGBOUNCER_DOCUMENTED = {
    "host=10.0.0.11 port=5432": "host=127.0.0.1 port={server}",
    "listen_port = 6432": "listen_port = {port}",
    "/etc/pgbouncer/userlist.txt": "{folder}/userlist.txt",
    "pool_mode = transaction": "pool_mode = {mode}",
}


class PgBouncer(PostgreSQLProtocol):
    """PgBouncer in front of a PostgreSQL server, for the roles app and limited and all
    its databases."""

    def __init__(self, server, mode, config):
        self.program = program("pgbouncer")
        super().__init__()
        self.values = {
            "server": server.port,
            "port": self.port,
            "folder": self.folder,
            "mode": mode,
        }
        self.config = config

    def create(self):
        self.write("userlist.txt", f'"app" "{SECRET}"\n"limited" "{SECRET}"\n')
        self.write(
            "pgbouncer.ini", substitute_documented(self.config, PGBOUNCER_DOCUMENTED, self.values)
        )
        self.start()

    def command(self):
        return [self.program, self.folder / "pgbouncer.ini"]


class HAProxy(Server):
    """haproxy in front of database servers of one kind."""

    account = "haproxy"

    def __init__(self, config, nodes):
        self.program = program("haproxy")
        super().__init__()
        self.config, self.nodes = config, nodes

    def create(self):
        port = self.nodes[0].documented_port
        replacements = {f"bind 127.0.0.1:{port}": f"bind 127.0.0.1:{self.port}"}
        for number, node in enumerate(self.nodes, start=11):
            # On one machine each Patroni needs a port of its own for the health check, too.
            check = f" port {node.rest_port}" if hasattr(node, "rest_port") else ""
            replacements[f"10.0.0.{number}:{port}"] = f"127.0.0.1:{node.port}{check}"
        self.write("haproxy.cfg", substitute(self.config, replacements))
        self.start()

    def command(self):
        return [self.program, "-db", "-f", self.folder / "haproxy.cfg"]

    def is_ready(self):
        """Return whether it leads only to servers that accept writes.

        haproxy considers every server healthy until two checks have failed, and until
        then connects to each in turn.
        """
        with contextlib.suppress(psycopg.Error, pymysql.Error):
            return all(self.execute(self.nodes[0].writable)[0][0] for _ in self.nodes)
        return False

    def connect(self, database=None):
        return self.nodes[0].connect(database, self.port)

    def url(self, database, user="app"):
        return self.nodes[0].url(database, user, self.port)


def substitute_documented(config, documented, values):
    return substitute(config, {shown: used.format(**values) for shown, used in documented.items()})


def pgbouncer(server, mode="transaction", config=None):
    """Start PgBouncer in front of a server, in mode "transaction" or "session", with
    the documented pgbouncer.ini."""
    return running(
        PgBouncer(server, mode, config or config_from_docs(DOCUMENTATION, "pgbouncer.ini"))
    )


def haproxy(config, nodes):
    """Start haproxy with a documented configuration: `haproxy(config_from_docs(path,
    "haproxy-galera.cfg"), nodes)`."""
    return running(HAProxy(config, nodes))


# -- Patroni ---------------------------------------------------------------------------


def http_status(port, path):
    """Return the status of a GET request, or None without a response."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
        connection.request("GET", path)
        return connection.getresponse().status
    return None


class Etcd(Server):
    """An etcd of one member."""

    account = "etcd"

    def __init__(self):
        self.program = program("etcd")
        super().__init__()
        # etcd refuses other machines than amd64 without it.
        self.environment["ETCD_UNSUPPORTED_ARCH"] = "arm64"

    def create(self):
        self.peer = f"http://127.0.0.1:{free_port()}"
        self.start()

    def command(self):
        client = f"http://127.0.0.1:{self.port}"
        return [
            self.program, "--name=etcd", f"--data-dir={self.folder / 'data'}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}", f"--listen-peer-urls={self.peer}",
            f"--initial-advertise-peer-urls={self.peer}", f"--initial-cluster=etcd={self.peer}",
        ]  # fmt: skip

    def is_ready(self):
        return http_status(self.port, "/health") == 200


# What the documentation shows for the first node, and what the test uses instead.
PATRONI_DOCUMENTED = {
    "name: node1": "name: {name}",
    "10.0.0.11:8008": "127.0.0.1:{rest_port}",
    "10.0.0.11:5432": "127.0.0.1:{port}",
    "10.0.0.21:2379,10.0.0.22:2379,10.0.0.23:2379": "127.0.0.1:{etcd}",
    "10.0.0.0/24": "127.0.0.1/32",
    "/var/lib/postgresql/15/users": "{folder}/data",
    "/var/lib/postgresql/users.pgpass": "{folder}/pgpass",
    "/usr/lib/postgresql/15/bin": "{programs}",
    "password: first-secret": "password: {secret}",
    # As in PostgreSQL's settings above.
    "unix_socket_directories: /var/run/postgresql": (
        "unix_socket_directories: {folder}\n    dynamic_shared_memory_type: mmap"
    ),
}


class PatroniNode(PostgreSQL):
    """A PostgreSQL server that Patroni manages. Killing it kills both."""

    stop_signal = signal.SIGTERM
    superuser = "postgres"

    def __init__(self, number, etcd, config):
        self.program = program("patroni")
        super().__init__()
        self.rest_port, self.name = free_port(), f"node{number}"
        values = {
            "name": self.name,
            "rest_port": self.rest_port,
            "port": self.port,
            "etcd": etcd.port,
            "folder": self.folder,
            "programs": self.programs,
            "secret": SECRET,
        }
        self.write("patroni.yml", substitute_documented(config, PATRONI_DOCUMENTED, values))

    def command(self):
        return [self.program, self.folder / "patroni.yml"]

    def is_ready(self):
        return super().is_ready() and http_status(self.rest_port, "/health") == 200

    def is_primary(self):
        return http_status(self.rest_port, "/primary") == 200

    def kill_postgresql(self):
        """Kill PostgreSQL and not Patroni, which starts it again or lets another node
        take over."""
        kill(freeze(self.is_postgresql))


class Patroni:
    """Nodes that Patroni manages, and their etcd."""

    def __init__(self, nodes, etcd):
        self.nodes, self.etcd = nodes, etcd

    def primary(self, seconds=60):
        """Return the node that is the primary, waiting for one."""
        return until(
            lambda: next((node for node in self.nodes if node.is_primary()), None), seconds, 0.1
        )

    def standbys(self):
        primary = self.primary()
        return [node for node in self.nodes if node is not primary]

    def is_synchronous(self):
        """Return whether commits of the primary wait for a standby that is connected."""
        return self._has_standby("sync_state = 'sync'")

    def is_following(self, node):
        """Return whether this node receives what the primary commits."""
        return self._has_standby(f"application_name = '{node.name}' AND state = 'streaming'")

    def _has_standby(self, condition):
        # The primary may just have been stopped.
        with contextlib.suppress(psycopg.Error):
            return bool(
                self.primary().execute(f"SELECT 1 FROM pg_stat_replication WHERE {condition}")
            )
        return False

    def kill(self, node):
        """Kill PostgreSQL and Patroni of a node, as a power failure does."""
        node.kill()

    def start(self, node, seconds=60):
        """Start a killed node again, and wait until it follows the primary.

        A former primary accepts connections, stops, rewinds what the others do not
        have, and starts again.
        """
        node.launch()
        until(lambda: node.answers() and self.is_following(node), seconds, 0.1)

    def url(self, database):
        """Return a URL of all nodes, of which the driver uses the primary."""
        return multi_host_url(self.nodes, database)

    def make_database(self):
        return self.url(database_of(self.primary().make_database("OWNER app")))


@contextlib.contextmanager
def patroni(count=3, config=None):
    """Start nodes with the documented patroni.yml; yield the cluster once commits wait
    for a standby."""
    config = config or config_from_docs(DOCUMENTATION, "patroni.yml")
    with contextlib.ExitStack() as stack:
        etcd = stack.enter_context(running(Etcd()))
        nodes = [
            stack.enter_context(contextlib.closing(PatroniNode(number, etcd, config)))
            for number in range(1, count + 1)
        ]
        nodes[0].start()
        cluster = Patroni(nodes, etcd)
        primary = cluster.primary()
        primary.execute(f"CREATE ROLE app LOGIN PASSWORD '{SECRET}'")
        primary.execute(f"CREATE ROLE limited LOGIN PASSWORD '{SECRET}'")
        for node in nodes[1:]:
            node.launch()
        for node in nodes[1:]:
            until(lambda node=node: node.answers() and cluster.is_following(node), 60, 0.1)
        if count > 1:
            until(cluster.is_synchronous, 60, 0.1)
        yield cluster
