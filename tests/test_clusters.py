"""Services on clusters of database servers, some of which are killed. Run with `-m
cluster`; it takes minutes."""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("sqlalchemy", reason="SQLAlchemy is not installed")
pytest.importorskip("psycopg", reason="psycopg is not installed")
pytest.importorskip("pymysql", reason="PyMySQL is not installed")

import servers
from conftest import HARRY, ITERATIONS, call, post
from servers import database_of

import profiler_sqlalchemy

pytestmark = pytest.mark.cluster


@contextlib.contextmanager
def make_app(database):
    with contextlib.closing(
        profiler_sqlalchemy.create_app(database, iterations=ITERATIONS)
    ) as application:
        yield application


def require(*names):
    if reason := servers.missing(*names):
        pytest.skip(reason)


def create(application, email):
    return post(application, json.dumps({**HARRY, "email": email}).encode())


class Clients:
    """Eight clients, who create users on several applications until the end of the block."""

    def __init__(self, *applications, prefix=""):
        self.prefix = prefix
        self.acknowledged, self.statuses, self.stopped = [], set(), threading.Event()
        self.slowest = self.pause = 0.0  # seconds
        self.last = time.monotonic()
        self.threads = [
            threading.Thread(
                target=self.write, args=(applications[number % len(applications)], number)
            )
            for number in range(8)
        ]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.stopped.set()
        for thread in self.threads:
            thread.join()

    def write(self, application, client):
        for number in itertools.count():
            if self.stopped.is_set():
                return
            email = f"{self.prefix}{client}.{number}@example.com"
            begin = time.monotonic()
            status = create(application, email).status
            now = time.monotonic()
            self.statuses.add(status)
            self.slowest = max(self.slowest, now - begin)
            if status == 201:
                self.acknowledged.append(email)
                self.pause, self.last = max(self.pause, now - self.last), now
            # Leave the interpreter to the thread that kills a server, and the machine
            # to the servers.
            self.stopped.wait(0.01 if status == 201 else 0.02)

    def wait(self, count, seconds=90):
        """Wait until so many more users are acknowledged."""
        target = len(self.acknowledged) + count
        servers.until(lambda: len(self.acknowledged) >= target, seconds)

    def check(self, name, application, slowest=12.5):
        """Assert that only 201 and 503 were returned, in time, and that no acknowledged
        user is lost."""
        print(
            f"{name}: {len(self.acknowledged)} users, pause {self.pause:.1f} s, "
            f"slowest {self.slowest:.1f} s"
        )
        assert self.statuses <= {201, 503}
        assert self.slowest < slowest
        assert emails_of(application) >= set(self.acknowledged)


def emails_of(application):
    return {user["email"] for user in call(application).json}


# -- Galera ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def galera():
    require("galera", "haproxy")
    with servers.galera() as nodes:
        yield nodes


def test_email_requested_on_two_nodes_at_once_is_given_to_one(galera):
    url = galera[0].make_database()
    with make_app(url) as one, make_app(galera[1].url(database_of(url))) as two:
        one.users.count()
        for number in range(25):

            def request(application, email=f"{number}@example.com"):
                return create(application, email).status

            with ThreadPoolExecutor(8) as threads:
                assert sorted(threads.map(request, [one, two] * 4)) == [201] + [400] * 7


def test_user_can_be_updated_on_two_nodes_at_once(galera):
    url = galera[0].make_database()
    with make_app(url) as one, make_app(galera[1].url(database_of(url))) as two:
        # The ids of a node depend on its place in the cluster.
        path_info = f"/users/{create(one, 'harry@example.com').json['id']}/"

        def change(number):
            fields = {"first_name": str(number)}
            return call((one, two)[number % 2], "PATCH", path_info, fields=fields).status

        with ThreadPoolExecutor(6) as threads:
            statuses = list(threads.map(change, range(180)))
    assert statuses.count(200) > 170
    assert set(statuses) <= {200, 503}


def test_nodes_share_the_limit_of_wrong_passwords(galera):
    url = galera[0].make_database()
    with make_app(url) as one, make_app(galera[1].url(database_of(url))) as two:
        assert create(one, "harry@example.com").status == 201
        for application in (one, two):
            application.users.failures.check(1)

        def guess(application):
            fields = {"email": "harry@example.com", "password": "wrong"}
            return call(application, "POST", "/users/verify/", fields=fields).status

        with ThreadPoolExecutor(16) as threads:
            statuses = list(threads.map(guess, [one, two] * 40))
        assert [guess(one), guess(two)] == [429, 429]
    assert sorted(statuses) == [403] * 10 + [429] * 70


def test_killed_node_of_galera_loses_no_acknowledged_user(galera):
    config = servers.config_from_docs(servers.DOCUMENTATION, "haproxy-galera.cfg")
    with servers.haproxy(config, galera) as proxy:
        url = proxy.make_database()
        name = database_of(url)
        with make_app(url) as one, make_app(galera[1].url(name)) as two:
            with Clients(one, two) as clients:
                clients.wait(200)
                galera[0].kill()
                clients.wait(200)
            clients.check("Galera, node killed", one)
            for node in galera[1:]:
                with make_app(node.url(name)) as application:
                    assert emails_of(application) >= set(clients.acknowledged)
            galera[0].start()
            with make_app(galera[0].url(name)) as application:
                assert emails_of(application) >= set(clients.acknowledged)


# -- PostgreSQL with a standby ---------------------------------------------------------


def test_promoted_standby_has_all_acknowledged_users():
    require("postgresql_with_standby")
    with servers.postgresql_with_standby() as (primary, standby):
        name = database_of(primary.make_database())
        url = servers.multi_host_url([primary, standby], name)
        with make_app(url) as one, make_app(url) as two:
            with Clients(one, two) as clients:
                clients.wait(200)
                primary.kill()
                standby.execute("SELECT pg_promote()")
                clients.wait(200)
            clients.check("standby promoted", one)


def test_writes_without_the_synchronous_standby_are_503_in_time():
    """Commits wait for it without limit, and statement_timeout does not end that."""
    require("postgresql_with_standby")
    with (
        servers.postgresql_with_standby() as (primary, standby),
        make_app(primary.make_database()) as application,
    ):
        assert create(application, "harry@example.com").status == 201
        standby.kill()
        begin = time.monotonic()
        assert create(application, "ron@example.com").status == 503
        assert time.monotonic() - begin < 12.5
        assert call(application, path="/users/1/").status == 200


# -- Patroni ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def patroni():
    require("patroni", "haproxy")
    with servers.patroni() as cluster:
        yield cluster


def is_synchronous(node):
    return servers.http_status(node.rest_port, "/synchronous") == 200


@pytest.mark.parametrize("kind", ["machine", "postgres"])
def test_killed_primary_of_patroni_loses_no_acknowledged_user(patroni, kind):
    """Eight clients use the URL of all nodes, eight others haproxy, which asks Patroni
    for the primary.

    Writes pause for about `ttl`, 20 seconds, if the machine is killed.
    """
    # Without a standby that etcd records as synchronous, Patroni promotes none.
    servers.until(lambda: any(is_synchronous(node) for node in patroni.nodes), 60, 0.1)
    url = patroni.make_database()
    config = servers.config_from_docs(servers.DOCUMENTATION, "haproxy-patroni.cfg")
    with (
        servers.haproxy(config, patroni.nodes) as proxy,
        make_app(url) as hosts,
        make_app(proxy.url(database_of(url))) as haproxy,
    ):
        servers.until(lambda: call(hosts).status == call(haproxy).status == 200, 30)
        primary = patroni.primary()
        with (
            Clients(hosts, prefix="hosts") as by_hosts,
            Clients(haproxy, prefix="haproxy") as by_haproxy,
        ):
            by_hosts.wait(100)
            by_haproxy.wait(100)
            if kind == "machine":
                patroni.kill(primary)
            else:
                primary.kill_postgresql()
            by_hosts.wait(100)
            by_haproxy.wait(100)
        by_hosts.check(f"Patroni, {kind} killed, several hosts", hosts)
        by_haproxy.check(f"Patroni, {kind} killed, haproxy", haproxy)
        assert max(by_hosts.pause, by_haproxy.pause) < 35
        if kind == "machine":
            patroni.start(primary)
