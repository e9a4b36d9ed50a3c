"""Tests of the section *users* that need SQLite, or look at the cores, the memory or the rows."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import io
import json
import os
import sqlite3
import threading
import tracemalloc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import (
    HARRY,
    RON,
    TUTORIAL_SCHEMA,
    call,
    execute,
    fill,
    follow,
    ignores_fork_warning,
    in_a_fork,
    needs_fork,
    post,
    start,
)

import profiler

EMAIL = "harry@example.com"


def verify(application, password="1234", email=EMAIL):
    return call(
        application, "POST", "/users/verify/", fields={"email": email, "password": password}
    )


def put(application, **fields):
    return call(application, "PATCH", "/users/1/", fields=fields)


# The requests that need a core.
HASHING = {
    "create": post,
    "verify": verify,
    "change": lambda application: call(
        application,
        "PUT",
        "/users/1/password/",
        fields={"old_password": "1234", "new_password": "5678"},
    ),
    "reset": lambda application: call(
        application, "PUT", "/users/1/password/reset/", fields={"new_password": "5678"}
    ),
}


# -- the list --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "count", [profiler.BATCH - 1, profiler.BATCH, profiler.BATCH + 1, 3 * profiler.BATCH]
)
def test_list_read_in_batches_is_one_json_array(client, path, count):
    fill(path, count)
    assert [user["id"] for user in client.get("/users/").json] == list(range(1, count + 1))
    assert [user["id"] for user in client.get("/users/?sort=-id").json] == list(
        range(count, 0, -1)
    )


def test_list_holds_no_transaction_between_batches(application, path):
    """Otherwise the -wal file would grow while a client reads slowly."""
    fill(path, 3 * profiler.BATCH)
    parts = start(application)
    next(parts)
    execute(path, 'DELETE FROM "user" WHERE id = ?', (3 * profiler.BATCH,))
    [(busy, _, _)] = execute(path, "PRAGMA wal_checkpoint(TRUNCATE)")
    assert busy == 0


def test_memory_of_a_list_does_not_grow_with_the_number_of_users(application, path):
    def peak():
        tracemalloc.start()
        for _ in start(application):
            pass
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return peak

    fill(path, 4 * profiler.MAX_LIMIT)
    small = peak()
    execute(path, 'DELETE FROM "user"')
    fill(path, 40 * profiler.MAX_LIMIT)
    assert peak() < 1.5 * small


def test_list_is_valid_json_if_its_last_users_are_deleted_while_it_is_sent(application, path):
    fill(path, 2 * profiler.BATCH)
    parts = start(application)
    first = next(parts)
    execute(path, 'DELETE FROM "user" WHERE id > ?', (profiler.BATCH,))
    assert len(json.loads(first + b"".join(parts))) == profiler.BATCH


def test_list_that_breaks_off_raises_so_that_the_server_resets(
    application, users, path, monkeypatch
):
    fill(path, 2 * profiler.BATCH)
    parts = start(application)
    next(parts)
    monkeypatch.setattr(users, "page", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(parts)


@pytest.fixture
def page_cost(users, path, monkeypatch):
    """A function that reads a page of 3,000 users, and returns hundreds of steps of SQLite."""
    fill(path, 3000)
    connect, steps = sqlite3.connect, []

    def connect_and_count(*arguments, **keywords):
        connection = connect(*arguments, **keywords)
        connection.set_progress_handler(lambda: steps.append(1) and None, 100)
        return connection

    monkeypatch.setattr(profiler.sqlite3, "connect", connect_and_count)

    def cost(*arguments, **options):
        steps.clear()
        users.page(10, *arguments, **options)
        return len(steps)

    return cost


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("options", [{}, {"email": EMAIL}, {"text": "First"}])
def test_deep_page_costs_as_much_as_the_first(page_cost, descending, options):
    """It seeks to `after`, and does not scan the users before it."""
    page_cost(1, **options)
    deep = page_cost(100 if descending else 2900, descending, **options)
    assert deep <= page_cost(3001 if descending else 0, descending, **options) + 1


def test_search_that_finds_few_users_scans_the_table_once(page_cost):
    page_cost(text="nobody")
    assert page_cost(text="user1@") < 1.5 * page_cost(text="nobody")


# -- rows of other programs ------------------------------------------------------------


@pytest.mark.parametrize("cell", ["CAST(X'ff41c3' AS TEXT)", "X'ff41c3'"])
@pytest.mark.parametrize("column", ["first_name", "last_name", "email", "created_on"])
def test_invalid_utf8_is_replaced_in_responses(client, path, cell, column):
    fill(path, 2)
    execute(path, f'UPDATE "user" SET {column} = {cell} WHERE id = 1')
    assert client.get("/users/1/").json[column] == "\ufffdA\ufffd"
    assert client.get("/users/").json[0][column] == "\ufffdA\ufffd"
    assert len(client.get("/users/?q=user2").json) == 1


@pytest.mark.parametrize("moment", [1700000000, 1.5, 9e999])
def test_created_on_is_a_string_even_if_a_number_is_stored(client, path, moment):
    fill(path, 1)
    execute(path, 'UPDATE "user" SET created_on = ?', (moment,))
    user = client.get("/users/1/").json
    assert isinstance(user["created_on"], str)
    assert client.get("/users/").json == client.get("/users/?limit=1").json == [user]


@pytest.mark.parametrize("stored", ["NULL", "x'ff'", "''", "17", "'$2b$12$abc'"])
def test_stored_value_that_is_no_hash_matches_no_password_until_reset(application, path, stored):
    execute(
        path,
        'CREATE TABLE "user" '
        "(id INTEGER PRIMARY KEY, first_name, last_name, email, password, created_on)",
    )
    execute(path, f"INSERT INTO \"user\" VALUES (1, 'H', 'P', '{EMAIL}', {stored}, '')")
    assert (verify(application).status, HASHING["change"](application).status) == (403, 403)
    assert HASHING["reset"](application).status == 204
    assert verify(application, "5678").status == 200


def test_hash_stored_as_a_blob_is_verified_and_can_be_changed(client, path):
    fill(path, 1)
    stored = profiler.hash_password("1234", 2).encode()
    execute(path, 'UPDATE "user" SET email = ?, password = ?', (EMAIL, stored))
    client.post_json("/users/verify/", HARRY, status=200)
    client.put_json(
        "/users/1/password/", {"old_password": "1234", "new_password": "5678"}, status=204
    )
    client.post_json("/users/verify/", {**HARRY, "password": "5678"}, status=200)


@pytest.mark.parametrize("user_id", [0, -1])
def test_user_with_an_id_below_1_is_listed_and_verified(client, path, user_id):
    fill(path, 1)
    execute(
        path,
        'UPDATE "user" SET id = ?, email = ?, password = ?',
        (user_id, EMAIL, profiler.hash_password("1234", 2)),
    )
    assert client.post_json("/users/verify/", HARRY, status=200).json == {"id": user_id}
    assert [user["id"] for user in client.get("/users/?limit=1").json] == [user_id]


def test_unique_index_of_an_operator_is_not_reported_as_a_taken_email(application, path):
    fill(path, 1)
    execute(path, 'CREATE UNIQUE INDEX one_family ON "user" (last_name)')
    assert post(application).status == 201
    for answer in (
        call(application, "POST", fields={**RON, "last_name": "Potter"}),
        put(application, last_name="Potter"),
    ):
        assert (answer.status, "UNIQUE constraint failed: user.last_name" in answer.errors) == (
            500,
            True,
        )


def test_trigger_of_an_operator_is_not_reported_as_a_taken_email(application, path):
    fill(path, 1)
    execute(
        path,
        "CREATE TRIGGER no BEFORE INSERT ON \"user\" BEGIN SELECT RAISE(ABORT, 'not today'); END",
    )
    answer = post(application)
    assert (answer.status, "not today" in answer.errors) == (500, True)


def test_used_up_ids_are_reported_as_such(application, path):
    """SQLite says "database or disk is full"."""
    fill(path, 1)
    execute(path, 'UPDATE "user" SET id = ?', (profiler.MAX_ID,))
    execute(path, "UPDATE sqlite_sequence SET seq = ?", (profiler.MAX_ID,))
    answer = post(application)
    assert (
        answer.status,
        f"no id is left because {profiler.MAX_ID} was used" in answer.errors,
    ) == (503, True)
    assert call(application, path=f"/users/{profiler.MAX_ID}/").status == 200


def test_other_errors_are_not_reported_as_used_up_ids(application, path):
    fill(path, 1)
    execute(
        path, 'CREATE TRIGGER no BEFORE INSERT ON "user" BEGIN INSERT INTO nowhere VALUES (1); END'
    )
    answer = post(application)
    assert (answer.status, answer.errors) == (503, "profiler: 503: no such table: main.nowhere\n")


def test_column_added_while_running_is_no_error(application, path):
    assert post(application).status == 201
    execute(path, 'ALTER TABLE "user" ADD COLUMN phone TEXT')
    assert (
        call(application, path="/users/1/").status,
        put(application, last_name="P.").status,
    ) == (200, 200)


def test_search_works_on_numbers_and_null(client, path):
    execute(
        path,
        'CREATE TABLE "user" '
        "(id INTEGER PRIMARY KEY, first_name, last_name, email, password, created_on)",
    )
    execute(
        path,
        "INSERT INTO \"user\" VALUES (1, 17, NULL, 'a@b', NULL, NULL), (2, 1.5, 8, NULL, '', '')",
    )
    found = [
        [user["id"] for user in client.get(f"/users/?q={text}").json]
        for text in ("7", "1.5", "@", "x")
    ]
    assert found == [[1], [2], [1], []]


def test_search_ignores_the_case_of_ascii_letters_only(client, users):
    users.insert("Łukasz", "Żak", EMAIL, "x")
    assert [
        len(client.get("/users/", {"q": text}).json) for text in ("ŁUKASZ", "łukasz", "ŻAK")
    ] == [1, 0, 1]


def test_users_whose_emails_differ_in_case_only_are_found_on_several_pages(
    client, path, monkeypatch
):
    """In a table that the tutorial's own schema.sql created."""
    monkeypatch.setattr(profiler, "SHORT_PAGE", 2)
    execute(path, TUTORIAL_SCHEMA)
    for email in ("a@b.c", "A@b.c", "other@b.c", "a@B.c", "another@b.c"):
        execute(path, f"INSERT INTO user VALUES (NULL, 'a', 'b', '{email}', 'x', '2020-01-01')")
    assert follow(client, "/users/?email=a@b.c") == [[1, 2], [4]]


def test_users_whose_emails_differ_in_case_only_log_in_with_their_own_passwords(application, path):
    execute(path, TUTORIAL_SCHEMA)
    for email in ("a@b.c", "A@b.c"):
        stored = profiler.hash_password(f"password of {email}", 1)
        execute(
            path, f"INSERT INTO user VALUES (NULL, 'a', 'b', '{email}', '{stored}', '2020-01-01')"
        )
    for user_id, email in [(1, "a@b.c"), (2, "A@b.c")]:
        answer = verify(application, f"password of {email}", email)
        assert (answer.status, answer.json) == (200, {"id": user_id})
    assert verify(application, "password of a@b.c", "A@b.c").status == 403
    assert verify(application, "password of a@b.c", "a@B.c").json == {"id": 1}


def test_email_is_no_id_for_a_change_of_password(accounts):
    user_id = accounts.create("Harry", "Potter", EMAIL, "1234")
    with pytest.raises(profiler.NoSuchUser):
        accounts.change_password(EMAIL, "1234", "5678")
    with pytest.raises(profiler.NoSuchUser):
        accounts.reset_password(EMAIL, "5678")
    assert accounts.verify(EMAIL, "1234") == user_id


# -- commands --------------------------------------------------------------------------


def test_new_table_starts_without_wrong_passwords(application, users):
    """Its ids begin at 1 again."""
    assert post(application).status == 201
    for _ in range(profiler.MAX_FAILURES):
        assert verify(application, "wrong").status == 403
    assert verify(application).status == 429
    users.initialise(force=True)
    assert post(application).status == 201
    assert verify(application).status == 200


def test_initialise_returns_whether_it_created_the_table(users, path):
    assert [users.initialise() for _ in range(2)] == [True, False]
    users.close()
    fresh = profiler.Users(str(path))
    assert fresh.initialise() is False
    fresh.close()


def test_initialise_keeps_users_unless_forced(users):
    users.insert("H", "P", EMAIL, "x")
    with pytest.raises(FileExistsError, match="1"):
        users.initialise()
    assert users.count() == 1
    assert users.initialise(force=True) is True
    assert users.count() == 0


def test_initialise_of_an_empty_table_does_not_reuse_ids(users):
    users.delete(users.insert("H", "P", EMAIL, "x"))
    users.initialise()
    assert users.insert("H", "P", EMAIL, "x") == 2


# -- hashing ---------------------------------------------------------------------------


@pytest.fixture
def hashed(monkeypatch):
    """The arguments of pbkdf2_hmac, for each call."""
    calls = []
    monkeypatch.setattr(
        profiler,
        "pbkdf2_hmac",
        lambda *arguments: calls.append(arguments) or hashlib.pbkdf2_hmac(*arguments),
    )
    return calls


@pytest.mark.parametrize(
    "stored",
    [
        ...,
        "NULL",
        "''",
        "'nonsense'",
        "'$2b$12$abc'",
        "'pbkdf2:sha256:10000001$salt$00'",
        "x'00ff'",
    ],
)
@pytest.mark.parametrize("path_info", ["/users/verify/", "/users/1/password/"])
def test_any_check_of_a_password_costs_one_hash(application, path, hashed, stored, path_info):
    """Otherwise the time of a 403 would tell whether an email is known."""
    execute(path, TUTORIAL_SCHEMA.replace(" NOT NULL", "").strip())
    assert post(application).status == 201
    if stored is not ...:
        execute(path, f'UPDATE "user" SET password = {stored}')
    hashed.clear()
    fields = {"email": EMAIL, "password": "wrong", "old_password": "wrong", "new_password": "5678"}
    method = "POST" if "verify" in path_info else "PUT"
    assert call(application, method, path_info, fields=fields).status == 403
    assert [(name, iterations) for name, _, _, iterations in hashed] == [
        ("sha256", application.accounts.iterations)
    ]


def test_check_of_an_unknown_email_costs_the_same_hash(application, hashed):
    assert post(application).status == 201
    hashed.clear()
    for email in (EMAIL, "ron@example.com"):
        assert verify(application, "wrong", email).status == 403
    [known, unknown] = [
        (name, password, len(salt), iterations) for name, password, salt, iterations in hashed
    ]
    assert known == unknown


def test_hash_that_cannot_be_verified_is_logged(application, users):
    users.insert("H", "P", EMAIL, "$2b$12$R9h/cIPz0gi.URNNX3kh2OPST9/PgBkqquzi.Ss7KIUgO2t0jWMUW")
    answer = verify(application)
    assert (
        answer.errors
        == "profiler: 403: the password hash of user 1 is malformed or cannot be verified here\n"
    )
    assert verify(application, email="ron@example.com").errors == ""


def test_scrypt_hash_without_hashlib_scrypt_returns_403_and_is_logged(
    application, users, hashed, monkeypatch
):
    users.insert("H", "P", EMAIL, "scrypt:1024:8:1$salt$" + "0" * 128)
    monkeypatch.delattr(profiler.hashlib, "scrypt")
    answer = verify(application)
    assert (answer.status, "user 1" in answer.errors, len(hashed)) == (403, True, 1)


def test_no_password_matches_an_unknown_email(application, monkeypatch):
    """Not even one that matches the dummy hash."""
    monkeypatch.setattr(profiler, "verify_password", lambda *_: True)
    assert verify(application).status == 403


@pytest.fixture
def two_cores(path, monkeypatch):
    """An application that hashes on two cores."""
    monkeypatch.setattr(profiler, "count_cores", lambda: 2)
    accounts = profiler.Accounts(profiler.Users(path), 1)
    with contextlib.closing(profiler.Application(accounts)) as application:
        yield application


@pytest.fixture
def busy_cores(two_cores, slow_hash):
    """Both cores are busy with creating users during the test."""
    with ThreadPoolExecutor(2) as threads:
        answers = [
            threads.submit(call, two_cores, "POST", fields={**HARRY, "email": f"{n}@b.c"})
            for n in (1, 2)
        ]
        for _ in answers:
            assert slow_hash.started.acquire(timeout=10)
        yield two_cores
        slow_hash.go_on.set()
        assert [answer.result().status for answer in answers] == [201, 201]


@pytest.mark.parametrize("name", HASHING)
def test_request_that_waits_too_long_for_a_core_returns_503(
    busy_cores, slow_hash, monkeypatch, name
):
    monkeypatch.setattr(busy_cores.accounts._cores, "timeout", 0.01)
    busy_cores.users.insert("R", "W", RON["email"], "x")
    answer = HASHING[name](busy_cores)
    assert (answer.status, answer.headers["Retry-After"], answer.errors.count("\n")) == (
        503,
        "1",
        1,
    )


def test_request_beyond_those_that_may_wait_returns_503_at_once(path, slow_hash, monkeypatch):
    """Otherwise many logins at once would take all workers of the server, and writes
    would wait for them."""
    monkeypatch.setattr(profiler, "count_cores", lambda: 1)
    monkeypatch.setattr(profiler, "MAX_WAITING_HASHES", 0)
    application = profiler.Application(profiler.Accounts(profiler.Users(path), 1))
    with contextlib.closing(application), ThreadPoolExecutor(1) as threads:
        first = threads.submit(post, application)
        assert slow_hash.started.acquire(timeout=10)
        answer = call(application, "POST", fields=RON)
        assert (answer.status, answer.errors.count("too many requests wait")) == (503, 1)
        slow_hash.go_on.set()
        assert first.result().status == 201


def test_requests_without_hashing_do_not_wait_for_a_core(busy_cores, monkeypatch):
    monkeypatch.setattr(busy_cores.accounts._cores, "timeout", 0.01)
    profile = {name: HARRY[name] for name in ("first_name", "last_name", "email")}
    imported = {**profile, "password_hash": "pbkdf2:sha256:1$salt$" + "0" * 64}
    assert call(busy_cores, "POST", fields=imported).status == 201
    assert put(busy_cores, last_name="P.").status == call(busy_cores).status == 200


def test_core_is_free_again_after_each_outcome(two_cores, monkeypatch):
    monkeypatch.setattr(two_cores.accounts._cores, "timeout", 0.01)
    assert post(two_cores).status == 201
    for _ in range(3):
        assert (verify(two_cores).status, verify(two_cores, "x").status) == (200, 403)
    monkeypatch.setattr(profiler, "hash_password", lambda *_: 1 / 0)
    assert [call(two_cores, "POST", fields=RON).status for _ in range(3)] == [500] * 3


@needs_fork
@ignores_fork_warning
def test_child_forked_while_others_hash_has_its_own_cores(two_cores, slow_hash, monkeypatch):
    monkeypatch.setattr(two_cores.accounts._cores, "timeout", 0.05)
    with ThreadPoolExecutor(2) as threads:
        answers = [
            threads.submit(call, two_cores, "POST", fields={**HARRY, "email": f"{n}@b.c"})
            for n in (1, 2)
        ]
        for _ in answers:
            assert slow_hash.started.acquire(timeout=10)

        def child():
            monkeypatch.setattr(profiler, "hash_password", lambda *_: "hash")
            return post(two_cores).status == 201

        assert in_a_fork(child)
        slow_hash.go_on.set()
        assert [answer.result().status for answer in answers] == [201, 201]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        ({"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        ({"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),
        ({"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/cpu.max": "10000 100000\n"}, 1),
        ({"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/cpu.max": "1600000 100000\n"}, 8),
        ({"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/cpu.max": "max 100000\n"}, 8),
        (
            {
                "/proc/self/cgroup": "0::/a.service\n",
                "/sys/fs/cgroup/a.service/cpu.max": "100000 100000\n",
            },
            1,
        ),
        ({"/proc/self/cgroup": "4:cpu:/docker/1\n"}, 8),
    ],
)
def test_cores_are_limited_by_the_cpu_quota(monkeypatch, files, expected):
    def fake_open(name, *_, **__):
        if name.replace("//", "/") in files:
            return io.StringIO(files[name.replace("//", "/")])
        raise FileNotFoundError(name)

    monkeypatch.setattr(profiler.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(profiler, "open", fake_open, raising=False)
    assert profiler.count_cores() == expected


# -- rate limit ------------------------------------------------------------------------


def test_accounts_beyond_the_limit_are_forgotten_oldest_wrong_password_first(
    application, monkeypatch
):
    monkeypatch.setattr(profiler, "MAX_TRACKED", 2)
    monkeypatch.setattr(profiler, "MAX_FAILURES", 2)

    def guess(name):
        return verify(application, "wrong", f"{name}@example.com").status

    assert [guess(name) for name in ("a", "b", "a", "a")] == [403, 403, 403, 429]
    assert guess("c") == 403  # b is forgotten, not a
    assert [guess("a"), guess("b"), guess("b"), guess("b")] == [429, 403, 403, 429]
    assert guess("c") == 403


def test_rate_limit_is_checked_after_waiting_for_a_core(two_cores, monkeypatch):
    """Otherwise all attempts that wait for a core would be hashed."""
    monkeypatch.setattr(profiler, "hash_password", lambda *_: "pbkdf2:sha256:1$salt$" + "0" * 64)
    assert post(two_cores).status == 201
    hashing, go_on, hashed = threading.Semaphore(0), threading.Event(), []

    def verify_password(*_):
        hashing.release()
        hashed.append(go_on.wait(10))
        return False

    monkeypatch.setattr(profiler, "verify_password", verify_password)
    with ThreadPoolExecutor(30) as threads:
        answers = [threads.submit(verify, two_cores) for _ in range(30)]
        assert hashing.acquire(timeout=10)
        go_on.set()
    assert sorted(answer.result().status for answer in answers) == [403] * 10 + [429] * 20
    # The other core may be busy with one more.
    assert len(hashed) <= 11


def test_right_password_beside_too_many_wrong_ones_is_429(application, monkeypatch):
    """Otherwise guesses that are hashed at the same time would all be answered."""
    assert post(application).status == 201
    verify_password = profiler.verify_password

    def verify_slowly(*given):
        for _ in range(profiler.MAX_FAILURES):
            application.users.failures.add(1)
        return verify_password(*given)

    monkeypatch.setattr(profiler, "verify_password", verify_slowly)
    assert verify(application).status == 429


@needs_fork
@ignores_fork_warning
def test_each_process_counts_for_itself(application):
    assert post(application).status == 201

    def fail():
        return [verify(application, "wrong").status for _ in range(profiler.MAX_FAILURES)]

    assert in_a_fork(lambda: fail() == [403] * profiler.MAX_FAILURES)
    assert verify(application).status == 200


# -- lifetime --------------------------------------------------------------------------


def test_discarded_applications_leave_nothing_behind(tmp_path):
    """Neither fork hooks nor connections."""
    references = []
    for number in range(10):
        application = profiler.create_app(tmp_path / f"{number}.sqlite3")
        assert call(application).status == 200
        application.close()
        references.append(weakref.ref(application.users))
    del application
    gc.collect()
    assert [reference() for reference in references] == [None] * 10


def test_creating_applications_registers_no_fork_hooks(tmp_path, monkeypatch):
    monkeypatch.setattr(
        os, "register_at_fork", lambda **_: pytest.fail("registered"), raising=False
    )
    with contextlib.closing(profiler.create_app(tmp_path / "db.sqlite3")) as application:
        assert call(application).status == 200


def test_closed_application_is_reopened_by_the_next_request(application):
    assert post(application).status == 201
    application.close()
    application.close()
    assert call(application, path="/users/1/").status == 200
