"""What a client sees on any storage: the endpoints, their errors, and who may use them.

tests/test_sqlalchemy.py runs these tests on other databases, with its own fixtures. All
other tests are in tests/.
"""

from __future__ import annotations

import json
import re
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote, urlencode

import pytest
from conftest import (  # noqa: F401
    HARRY,
    ITERATIONS,
    RON,
    TOKEN,
    accounts,
    advance,
    application,
    call,
    clean_environment,
    client,
    follow,
    guarded,
    path,
    post,
    users,
)

import profiler

FIELDS = ["id", "first_name", "last_name", "email", "created_on"]
WRONG = {"error": "Wrong email or password"}
TAKEN = {"error": "This email is already registered"}
UNKNOWN = {"error": "Invalid user id"}


def in_threads(function, count, threads=8):
    """Call a function with the numbers from 0 in several threads. Return what it returned."""
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, range(count)))


def insert(users, *names):
    """Store users with these last names, without hashing."""
    for name in names:
        users.insert("First", name, f"{users.count() + 1}@example.com", "x")


# -- create ----------------------------------------------------------------------------


def test_create_returns_201_with_id_and_location(client):
    answer = client.post_json("/users/", HARRY, status=201)
    assert (answer.json, answer.headers["Location"]) == ({"id": 1}, "/users/1/")


def test_create_stores_the_fields_and_ignores_others(client):
    client.post_json("/users/", {**HARRY, "id": 7, "admin": True, "created_on": "1980-07-31"})
    user = client.get("/users/1/").json
    assert re.fullmatch(
        "20[0-9]{2}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9]{2}", user.pop("created_on")
    )
    assert user == {
        "id": 1,
        "first_name": "Harry",
        "last_name": "Potter",
        "email": "harry@example.com",
    }


def test_create_stores_a_hash_of_the_password(client, accounts, users):
    client.post_json("/users/", HARRY)
    assert users.find_credentials(1)[1].startswith(f"pbkdf2:sha256:{accounts.iterations}$")
    assert profiler.verify_password(users.find_credentials(1)[1], "1234")


def test_ids_are_not_reused(client):
    for user_id in (1, 2, 3):
        assert client.post_json("/users/", HARRY).json == {"id": user_id}
        client.delete(f"/users/{user_id}/")


@pytest.mark.parametrize("email", ["harry@example.com", "HARRY@Example.COM"])
def test_create_with_taken_email_returns_400_in_any_case(client, users, email):
    client.post_json("/users/", HARRY)
    assert client.post_json("/users/", {**RON, "email": email}, status=400).json == TAKEN
    assert users.count() == 1


@pytest.mark.parametrize(
    ("email", "other"), [("é@x.y", "É@x.y"), ("ß@x.y", "ss@x.y"), ("İ@x.y", "i@x.y")]
)
def test_case_of_non_ascii_letters_in_emails_matters(client, email, other):
    client.post_json("/users/", {**HARRY, "email": email}, status=201)
    client.post_json("/users/", {**HARRY, "email": other}, status=201)
    client.post_json("/users/", {**HARRY, "email": email.replace("x", "X")}, status=400)


def test_email_is_returned_as_it_was_sent(client):
    client.post_json("/users/", {**HARRY, "email": "Harry@Example.com"})
    assert client.get("/users/1/").json["email"] == "Harry@Example.com"


def test_taken_email_is_rejected_before_the_password_is_hashed(client, monkeypatch):
    client.post_json("/users/", HARRY)
    monkeypatch.setattr(profiler, "hash_password", lambda *_: pytest.fail("hashed"))
    client.post_json("/users/", HARRY, status=400)


def test_email_taken_while_the_password_is_hashed_returns_400(application, users, monkeypatch):
    email = HARRY["email"].upper()
    monkeypatch.setattr(
        profiler, "hash_password", lambda *_: users.insert("R", "W", email, "x") and "hash"
    )
    answer = post(application)
    assert (answer.status, answer.json, users.count()) == (400, TAKEN, 1)


def test_concurrent_creates_with_the_same_email_store_one_user(application, users):
    def create(number):
        return call(
            application, "POST", fields={**HARRY, "email": f"{number % 5}@example.com"}
        ).status

    assert sorted(in_threads(create, 40)) == [201] * 5 + [400] * 35
    assert users.count() == 5


@pytest.mark.parametrize(
    "name", ["Złośnica \"\\/' 🐍 \u2028", "%s %(x)s :id ? {0} $1", "'; DROP TABLE user; --", " a "]
)
def test_names_are_returned_as_they_were_sent(client, name):
    client.post_json("/users/", {**HARRY, "first_name": name})
    assert (
        client.get("/users/1/").json["first_name"]
        == client.get("/users/").json[0]["first_name"]
        == name
    )


# -- import ----------------------------------------------------------------------------

PROFILE = {name: value for name, value in HARRY.items() if name != "password"}
# Hashes of "swordfish", by Werkzeug 3.1, Django 5.2 and passlib 1.7.
WERKZEUG = (
    "pbkdf2:sha256:1000$SeaNOPFgaVEg7ok2$"
    "3e38a0509e844c4e1fb5419223d5c0fd220c4c38f8b5ff006da3ea798fa01ef7"
)
FOREIGN = {
    "werkzeug scrypt": "scrypt:1024:8:1$9PpiEWsJGmx0rQ6n$"
    "3bc21a29a9b723096dbbbbf1e9aa0655c0bb58817d755a3d2a958ec273632"
    "95b3312baeee1e0c83e772b6313c355d3a5b88dd9022a03c86440903cb48b6079dd",
    "django pbkdf2": "pbkdf2_sha256$1000$seasalt$US68T8TK6+4heFooeAgijEgTwzgbp6gzzJFYgZrT8ZE=",
    "django scrypt": "scrypt$1024$seasalt$8$2$"
    "5VwF/7jgqBGmleQ6zyQ8Msa9fatHdfO2VSCFCX6EuA3mNCAdWHfAn/duKwrbYko9fzFq2mQW9"
    "/vz+mNaWzqg6w==",
    "passlib pbkdf2": "$pbkdf2-sha256$1000$kvLeG.M8Z8z5f48RIkQoxQ$"
    "OFA206B.vQj68S1DaKwEG15bvc62lHl/Dsz9dDj/WkA",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_user_imported_with_foreign_hash_keeps_the_password(client, name):
    client.post_json("/users/", {**PROFILE, "password_hash": FOREIGN[name]}, status=201)
    client.post_json("/users/verify/", {**HARRY, "password": "Swordfish"}, status=403)
    for _ in range(2):
        client.post_json("/users/verify/", {**HARRY, "password": "swordfish"}, status=200)


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_hash_is_replaced_after_successful_verification(client, accounts, users, name):
    client.post_json("/users/", {**PROFILE, "password_hash": FOREIGN[name]})
    client.post_json("/users/verify/", HARRY, status=403)
    assert users.find_credentials(1)[1] == FOREIGN[name]
    client.post_json("/users/verify/", {**HARRY, "password": "swordfish"}, status=200)
    assert users.find_credentials(1)[1].startswith(f"pbkdf2:sha256:{accounts.iterations}$")


def test_imported_hash_in_own_format_is_kept(client, users):
    client.post_json("/users/", {**PROFILE, "password_hash": WERKZEUG}, status=201)
    client.post_json("/users/verify/", {**HARRY, "password": "swordfish"}, status=200)
    assert users.find_credentials(1)[1] == WERKZEUG


@pytest.mark.parametrize("password_hash", [FOREIGN["django scrypt"], WERKZEUG])
def test_password_of_imported_user_can_be_changed(client, password_hash):
    client.post_json("/users/", {**PROFILE, "password_hash": password_hash})
    client.put_json(
        "/users/1/password/", {"old_password": "swordfish", "new_password": "1234"}, status=204
    )
    client.post_json("/users/verify/", HARRY, status=200)


@pytest.mark.parametrize(
    "password_hash",
    [
        "$2b$12$R9h/cIPz0gi.URNNX3kh2OPST9/PgBkqquzi.Ss7KIUgO2t0jWMUW",  # bcrypt
        "$argon2id$v=19$m=65536,t=3,p=4$c29tZXNhbHQ$RdescudvJCsgt3ub+b0dWRWJTmaaJObG",
        "{SSHA}DkMTwBl+a/3DQTxCYEApdUtNXGgdUac3",  # LDAP
        "$apr1$TqI9WECO$LHZB2DqRlk9nObiB6vJG9.",  # Apache
        "pbkdf2_sha1$1000$salt$" + "A" * 27 + "=",
        "pbkdf2:sha256:10000001$salt$" + "0" * 64,
        "swordfish",
        1,
        ["x"],
    ],
)
def test_import_of_unsupported_hash_returns_400(client, users, password_hash):
    answer = client.post_json("/users/", {**PROFILE, "password_hash": password_hash}, status=400)
    assert answer.json["error"].startswith("password_hash must be")
    assert users.count() == 0


@pytest.mark.parametrize("password", ["1234", "", None])
def test_create_with_password_and_password_hash_returns_400(client, password):
    answer = client.post_json(
        "/users/", {**PROFILE, "password": password, "password_hash": WERKZEUG}, status=400
    )
    assert answer.json["error"].startswith("password_hash")


def test_import_checks_the_other_fields(client):
    client.post_json("/users/", HARRY)
    client.post_json("/users/", {"password_hash": WERKZEUG}, status=400)
    client.post_json(
        "/users/", {**PROFILE, "email": "harry", "password_hash": WERKZEUG}, status=400
    )
    assert (
        client.post_json("/users/", {**PROFILE, "password_hash": WERKZEUG}, status=400).json
        == TAKEN
    )


# -- get, update, delete ---------------------------------------------------------------


def test_get_returns_the_public_fields(client):
    client.post_json("/users/", HARRY)
    assert list(client.get("/users/1/").json) == FIELDS
    assert list(client.get("/users/").json[0]) == FIELDS


def test_get_unknown_id_returns_404(client):
    assert client.get("/users/1/", status=404).json == UNKNOWN


def test_put_changes_names_and_email_only(client, users):
    client.post_json("/users/", HARRY)
    user, password_hash = client.get("/users/1/").json, users.find_credentials(1)[1]
    assert client.put_json(
        "/users/1/", {**RON, "password": ["ignored"], "password_hash": WERKZEUG}
    ).json == {"id": 1}
    expected = {**user, "first_name": "Ron", "last_name": "Weasley", "email": "ron@example.com"}
    assert (client.get("/users/1/").json, users.find_credentials(1)[1]) == (
        expected,
        password_hash,
    )


def test_put_changes_one_user_only(client, users):
    insert(users, "A", "B", "C")
    client.put_json("/users/2/", HARRY)
    assert [user["last_name"] for user in client.get("/users/").json] == ["A", "Potter", "C"]


def test_put_may_keep_the_email_or_change_its_case(client):
    client.post_json("/users/", HARRY)
    client.put_json("/users/1/", {**HARRY, "first_name": "H."}, status=200)
    client.put_json("/users/1/", {**HARRY, "email": "Harry@Example.com"}, status=200)
    assert client.get("/users/1/").json["email"] == "Harry@Example.com"


@pytest.mark.parametrize("email", ["harry@example.com", "HARRY@example.com"])
@pytest.mark.parametrize("method", ["PUT", "PATCH"])
def test_update_to_taken_email_returns_400(application, email, method):
    post(application)
    call(application, "POST", fields=RON)
    answer = call(
        application, method, "/users/2/", fields={**RON, "first_name": "R.", "email": email}
    )
    assert (answer.status, answer.json) == (400, TAKEN)
    assert call(application, path="/users/2/").json["first_name"] == "Ron"


@pytest.mark.parametrize("fields", [HARRY, RON])
@pytest.mark.parametrize("method", ["PUT", "PATCH"])
def test_update_of_unknown_id_returns_404_even_if_the_email_is_taken(application, fields, method):
    post(application)
    answer = call(application, method, "/users/2/", fields=fields)
    assert (answer.status, answer.json) == (404, UNKNOWN)


@pytest.mark.parametrize("name", PROFILE)
def test_patch_changes_the_given_field_only(client, users, name):
    client.post_json("/users/", HARRY)
    user, password_hash = client.get("/users/1/").json, users.find_credentials(1)[1]
    assert client.patch_json("/users/1/", {name: RON[name]}, status=200).json == {"id": 1}
    assert client.get("/users/1/").json == {**user, name: RON[name]}
    assert users.find_credentials(1)[1] == password_hash


def test_patch_may_change_several_fields(client):
    client.post_json("/users/", HARRY)
    client.patch_json("/users/1/", {"first_name": "Ron", "email": "HARRY@example.com"}, status=200)
    user = client.get("/users/1/").json
    assert (user["first_name"], user["last_name"], user["email"]) == (
        "Ron",
        "Potter",
        "HARRY@example.com",
    )


@pytest.mark.parametrize(
    "fields", [{}, {"password": "x", "password_hash": WERKZEUG, "id": 7, "created_on": None}]
)
def test_patch_without_fields_of_a_profile_changes_nothing(client, users, fields):
    client.post_json("/users/", HARRY)
    user, password_hash = client.get("/users/1/").json, users.find_credentials(1)[1]
    client.patch_json("/users/1/", fields, status=200)
    assert (client.get("/users/1/").json, users.find_credentials(1)[1]) == (user, password_hash)


def test_empty_patch_of_unknown_id_returns_404(client):
    assert client.patch_json("/users/1/", {}, status=404).json == UNKNOWN


@pytest.mark.parametrize("name", PROFILE)
@pytest.mark.parametrize("value", [None, "", " ", 1, [], "a\n@b", "\u200b", "a" * 256])
def test_patch_with_invalid_value_returns_400_naming_the_field(client, name, value):
    client.post_json("/users/", HARRY)
    user = client.get("/users/1/").json
    answer = client.patch_json(
        "/users/1/", {"first_name": "H.", "last_name": "P.", name: value}, status=400
    )
    assert answer.json["error"].startswith(f"{name} must")
    assert client.get("/users/1/").json == user


def test_patch_accepts_merge_patch_json(application):
    post(application)
    media_type = {"CONTENT_TYPE": "application/merge-patch+json; charset=utf-8"}
    assert (
        call(application, "PATCH", "/users/1/", fields={"last_name": "P."}, **media_type).status
        == 200
    )
    assert call(application, path="/users/1/").json["last_name"] == "P."
    assert call(application, "PUT", "/users/1/", fields=HARRY, **media_type).status == 415
    assert (
        call(
            application,
            "PATCH",
            "/users/1/",
            fields={},
            CONTENT_TYPE="application/json-patch+json",
        ).status
        == 415
    )


def test_concurrent_patches_of_different_fields_are_all_stored(application):
    post(application)

    def patch(number):
        name = ["first_name", "last_name", "email"][number % 3]
        return call(
            application, "PATCH", "/users/1/", fields={name: f"{number // 3}@example.com"}
        ).status

    for first in range(0, 30, 3):
        with ThreadPoolExecutor(3) as pool:
            assert list(pool.map(patch, range(first, first + 3))) == [200] * 3
        user = call(application, path="/users/1/").json
        assert {user["first_name"], user["last_name"], user["email"]} == {
            f"{first // 3}@example.com"
        }


def test_delete_returns_204_whether_the_user_existed_or_not(client, users):
    insert(users, "A", "B")
    for _ in range(2):
        assert client.delete("/users/1/", status=204).body == b""
    assert [user["id"] for user in client.get("/users/").json] == [2]


# -- passwords -------------------------------------------------------------------------


def change(application, old, new, user_id=1, **environ):
    fields = {"old_password": old, "new_password": new}
    return call(application, "PUT", f"/users/{user_id}/password/", fields=fields, **environ)


def reset(application, new, user_id=1, **environ):
    return call(
        application,
        "PUT",
        f"/users/{user_id}/password/reset/",
        fields={"new_password": new},
        **environ,
    )


def verify(application, password="1234", email="harry@example.com"):
    return call(
        application, "POST", "/users/verify/", fields={"email": email, "password": password}
    )


def test_verify_returns_the_id(application):
    call(application, "POST", fields=RON)
    post(application)
    assert (
        verify(application).json
        == verify(application, email="HARRY@example.com").json
        == {"id": 2}
    )


@pytest.mark.parametrize(
    "fields", [{**HARRY, "password": "12345"}, {**HARRY, "password": "123"}, RON]
)
def test_wrong_password_and_unknown_email_return_the_same_403(client, fields):
    client.post_json("/users/", HARRY)
    assert client.post_json("/users/verify/", fields, status=403).json == WRONG


def test_composed_and_decomposed_letters_are_the_same_password(application):
    """NFC and NFD: macOS types one, Windows the other."""
    call(application, "POST", fields={**HARRY, "password": "p\u00e4ss"})
    assert (
        verify(application, "pa\u0308ss").status == verify(application, "p\u00e4ss").status == 200
    )
    assert change(application, "pa\u0308ss", "e\u0301").status == 204
    assert verify(application, "\u00e9").status == 200


def test_password_may_contain_anything_but_nul(application):
    assert call(application, "POST", fields={**HARRY, "password": "a\0"}).error == (
        "password must not contain the NUL character"
    )
    assert (
        call(application, "POST", fields={**HARRY, "password": " \n\x7f ż🐍\u200b"}).status == 201
    )
    assert verify(application, " \n\x7f ż🐍\u200b").status == 200
    assert verify(application, " \n\x7f ż🐍").status == 403


def test_change_password_requires_the_old_one(application):
    post(application)
    answer = change(application, "4321", "5678")
    assert (answer.status, answer.json, verify(application).status) == (403, WRONG, 200)
    answer = change(application, "1234", "5678")
    assert (answer.status, answer.body) == (204, b"")
    assert [verify(application).status, verify(application, "5678").status] == [403, 200]


def test_change_password_changes_one_user_only(application):
    post(application)
    call(application, "POST", fields={**RON, "password": "1234"})
    assert change(application, "1234", "5678", user_id=2).status == 204
    assert verify(application).status == 200


def test_concurrent_password_changes_have_one_winner(application):
    post(application)
    statuses = in_threads(lambda number: change(application, "1234", f"new {number}").status, 8)
    assert sorted(statuses) == [204] + [403] * 7


def test_reset_password_needs_no_old_one(application):
    post(application)
    answer = reset(application, "5678")
    assert (answer.status, answer.body) == (204, b"")
    assert [verify(application).status, verify(application, "5678").status] == [403, 200]


def test_reset_password_changes_one_user_only(application):
    post(application)
    call(application, "POST", fields=RON)
    assert reset(application, "5678", user_id=2).status == 204
    assert verify(application).status == 200


def test_reset_replaces_a_hash_that_cannot_be_verified(application, users):
    users.insert(
        "H",
        "P",
        "harry@example.com",
        "$2b$12$R9h/cIPz0gi.URNNX3kh2OPST9/PgBkqquzi.Ss7KIUgO2t0jWMUW",
    )
    assert verify(application).status == 403
    assert reset(application, "1234").status == 204
    assert verify(application).status == 200


def test_change_and_reset_of_unknown_id_return_404(application, monkeypatch):
    monkeypatch.setattr(profiler, "hash_password", lambda *_: pytest.fail("hashed"))
    assert change(application, "1234", "5678").json == reset(application, "5678").json == UNKNOWN


def test_reset_during_a_password_change_wins(application, users, monkeypatch):
    post(application)
    theirs = profiler.hash_password("theirs", 1)
    monkeypatch.setattr(
        profiler,
        "hash_password",
        lambda *_: users.replace_password_hash(1, None, theirs) and "the change's",
    )
    assert change(application, "1234", "ours").status == 403
    assert users.find_credentials(1)[1] == theirs


def test_change_during_a_reset_is_overwritten(application, users, monkeypatch):
    post(application)
    ours = profiler.hash_password("ours", 1)
    monkeypatch.setattr(
        profiler,
        "hash_password",
        lambda *_: users.replace_password_hash(1, None, "theirs") and ours,
    )
    assert reset(application, "ours").status == 204
    assert users.find_credentials(1)[1] == ours


def test_user_deleted_during_a_reset_returns_404(application, users, monkeypatch):
    post(application)
    monkeypatch.setattr(profiler, "hash_password", lambda *_: users.delete(1) or "hash")
    assert reset(application, "5678").json == UNKNOWN


@pytest.mark.parametrize("name", ["old_password", "new_password"])
@pytest.mark.parametrize("value", [None, " ", 1, "a\0", "\ud800"])
def test_invalid_password_returns_400(application, name, value):
    post(application)
    fields = {"old_password": "1234", "new_password": "5678", name: value}
    for path_info in ("/users/1/password/", "/users/1/password/reset/")[
        : 1 if name == "old_password" else 2
    ]:
        answer = call(application, "PUT", path_info, fields=fields)
        assert answer.status == 400
        assert (
            answer.error.startswith(f"{name} must")
            or answer.error == "Required fields are missing"
        )


COMBINING = "a" + "\u0315" * 600 + "\u0334" * 600  # NFC takes quadratic time for it


@pytest.fixture
def never_normalised(monkeypatch):
    class Unicodedata:
        @staticmethod
        def normalize(form, text):
            assert len(text) <= 1024, "normalised"
            return unicodedata.normalize(form, text)

    monkeypatch.setattr(profiler, "unicodedata", Unicodedata)


@pytest.mark.usefixtures("never_normalised")
def test_new_password_of_more_than_1024_characters_returns_400(application, client):
    problem = "must have at most 1024 characters"
    fields = {**HARRY, "password": COMBINING}
    assert client.post_json("/users/", fields, status=400).json == {"error": f"password {problem}"}
    post(application)
    for answer in (change(application, "1234", COMBINING), reset(application, COMBINING)):
        assert (answer.status, answer.error) == (400, f"new_password {problem}")
    assert change(application, "1234", COMBINING[:1024]).status == 204
    assert verify(application, COMBINING[:1024]).status == 200


@pytest.mark.usefixtures("never_normalised")
def test_password_of_more_than_1024_characters_is_wrong(application):
    post(application)
    assert verify(application, COMBINING).json == WRONG
    assert verify(application, COMBINING, "nobody@example.com").json == WRONG
    assert change(application, COMBINING, "5678").json == WRONG


def test_password_that_costs_no_hash_is_not_counted(application, monkeypatch):
    """Otherwise thousands of them would push out the counts of other accounts."""
    monkeypatch.setattr(profiler, "MAX_TRACKED", 1)  # in memory
    post(application)
    assert [verify(application, "x").status for _ in range(11)] == [403] * 10 + [429]
    for number in range(3):
        assert verify(application, COMBINING, f"{number}@example.com").status == 403
    assert verify(application).status == 429


# Emails of databases of earlier versions and of the tutorial.
OLDER_EMAILS = [
    "harry", "a@b@example.com", "soft\u00adhyphen@example.com", "heart\u2764\ufe0f@example.com",
    "tab\t@example.com", "a b@example.com", "@", "\u200b@x", "1",
]  # fmt: skip


@pytest.mark.parametrize("email", OLDER_EMAILS)
def test_user_with_an_older_email_can_log_in_and_be_found(application, users, email):
    """Verifying and finding compare. Only creating and changing judge."""
    users.insert("H", "P", email, profiler.hash_password("1234", ITERATIONS))
    assert verify(application, email=email).json == {"id": 1}
    [user] = call(application, QUERY_STRING=urlencode({"email": email}, quote_via=quote)).json
    assert user["email"] == email
    assert call(application, "POST", fields={**HARRY, "email": email}).status == 400


@pytest.mark.parametrize("email", OLDER_EMAILS)
def test_unknown_older_email_is_403_or_an_empty_list(application, email):
    post(application)
    assert verify(application, email=email).json == WRONG
    query = urlencode({"email": email}, quote_via=quote)
    assert call(application, QUERY_STRING=query).json == []


def test_login_that_was_verified_while_the_user_was_deleted_returns_403(
    application, users, monkeypatch
):
    post(application)
    monkeypatch.setattr(profiler, "verify_password", lambda *_: users.delete(1) is None)
    assert verify(application).json == WRONG


def test_login_that_was_verified_during_a_reset_returns_403(application, users, monkeypatch):
    post(application)
    theirs = profiler.hash_password("theirs", ITERATIONS)
    verify_password = profiler.verify_password

    def reset_meanwhile(*given):
        is_right = verify_password(*given)
        users.replace_password_hash(1, None, theirs)
        return is_right

    monkeypatch.setattr(profiler, "verify_password", reset_meanwhile)
    assert verify(application).json == WRONG


def test_login_beside_one_that_replaces_the_hash_succeeds(application, users, monkeypatch):
    """A concurrent login of the same user may store a hash with another salt."""
    post(application)
    hashes = [profiler.hash_password("1234", ITERATIONS) for _ in range(2)]
    verify_password = profiler.verify_password

    def replace_meanwhile(*given):
        if hashes:
            users.replace_password_hash(1, None, hashes.pop())
        return verify_password(*given)

    monkeypatch.setattr(profiler, "verify_password", replace_meanwhile)
    assert verify(application).json == {"id": 1}
    assert hashes == []


def test_hash_with_fewer_iterations_is_replaced_after_verification(application, accounts, users):
    users.insert("H", "P", "harry@example.com", weak := profiler.hash_password("1234", 1))
    assert verify(application, "x").status == 403
    assert users.find_credentials(1)[1] == weak
    assert verify(application).status == 200
    assert users.find_credentials(1)[1].startswith(f"pbkdf2:sha256:{accounts.iterations}$")
    assert verify(application).status == 200


@pytest.mark.parametrize(("password", "status"), [("1234", 200), ("theirs", 403)])
def test_hash_that_was_replaced_during_verification_is_verified_anew(
    application, users, monkeypatch, password, status
):
    users.insert("H", "P", "harry@example.com", weak := profiler.hash_password("1234", 1))
    theirs, replace = profiler.hash_password(password, ITERATIONS), users.replace_password_hash
    monkeypatch.setattr(profiler, "hash_password", lambda *_: replace(1, weak, theirs) and "ours")
    assert verify(application).status == status
    assert users.find_credentials(1)[1] == theirs


def test_verify_succeeds_even_if_the_new_hash_cannot_be_stored(application, users, monkeypatch):
    users.insert("H", "P", "harry@example.com", profiler.hash_password("1234", 1))

    def replace_password_hash(*_):
        raise profiler.Unavailable("the disk is full")

    monkeypatch.setattr(users, "replace_password_hash", replace_password_hash)
    assert verify(application).status == 200


# -- rate limit ------------------------------------------------------------------------


def guess(application, count=profiler.MAX_FAILURES, **account):
    """Send wrong passwords. Return the statuses."""
    return [verify(application, "wrong", **account).status for _ in range(count)]


def test_more_than_ten_wrong_passwords_return_429_with_retry_after(application):
    post(application)
    assert guess(application) == [403] * 10
    for password in ("wrong", "1234"):
        answer = verify(application, password)
        assert (answer.status, list(answer.json)) == (429, ["error"])
        assert 30 <= int(answer.headers["Retry-After"]) <= 60


def test_one_attempt_per_minute_is_allowed_after_ten_wrong_passwords(application, advance):
    post(application)
    guess(application)
    for _ in range(3):
        advance(int(verify(application).headers["Retry-After"]))
        assert guess(application, 2) == [403, 429]
    advance(60)
    assert verify(application).status == 200


def test_rejected_attempts_do_not_prolong_the_wait(application, advance):
    post(application)
    guess(application)
    advance(50)
    answer = verify(application)
    assert (answer.status, 1 <= int(answer.headers["Retry-After"]) <= 10) == (429, True)
    advance(10)
    assert verify(application).status == 200


def test_right_password_resets_the_count(application):
    post(application)
    for _ in range(2):
        assert guess(application, 9) == [403] * 9
        assert verify(application).status == 200
    assert guess(application, 11) == [403] * 10 + [429]


@pytest.mark.parametrize("email", ["ron@example.com", "żółw@example.com"])
def test_unknown_emails_are_limited_like_known_ones(application, email):
    assert guess(application, 10, email=email) == [403] * 10
    assert guess(application, 1, email=email.replace("example", "EXAMPLE")) == [429]


@pytest.mark.parametrize("known", [True, False])
def test_emails_that_differ_in_the_case_of_other_letters_are_counted_apart(application, known):
    """They are two accounts. Otherwise a 429 would reveal that one of them is not known."""
    if known:
        assert (
            call(application, "POST", fields={**HARRY, "email": "Élan@example.com"}).status == 201
        )
    guess(application, email="Élan@example.com")
    assert guess(application, 1, email="élan@example.com") == [403]


def test_429_does_not_reveal_whether_the_email_is_known(application):
    post(application)
    guess(application)
    guess(application, email="ron@example.com")
    assert verify(application).json == verify(application, email="ron@example.com").json


def test_right_old_password_resets_the_count(application):
    post(application)
    assert guess(application, 9) == [403] * 9
    assert change(application, "1234", "5678").status == 204
    assert guess(application, 10) == [403] * 10


def test_limit_holds_for_any_case_of_the_email(application):
    post(application)
    guess(application, 5)
    assert guess(application, 6, email="HARRY@EXAMPLE.COM") == [403] * 5 + [429]


def test_verify_and_change_password_share_the_limit(application):
    post(application)
    for _ in range(5):
        assert (change(application, "wrong", "5678").status, guess(application, 1)) == (403, [403])
    assert (change(application, "1234", "5678").status, verify(application).status) == (429, 429)


def test_limit_of_an_account_does_not_affect_others(application):
    post(application)
    call(application, "POST", fields=RON)
    guess(application, 11)
    guess(application, 11, email="nobody@example.com")
    assert verify(application, "abcd", email="ron@example.com").status == 200


def test_rejected_attempt_is_not_hashed(application, monkeypatch):
    post(application)
    guess(application)
    monkeypatch.setattr(profiler, "verify_password", lambda *_: pytest.fail("hashed"))
    assert (verify(application).status, change(application, "1234", "5").status) == (429, 429)


def test_concurrent_guesses_do_not_exceed_the_limit(application):
    post(application)
    statuses = in_threads(lambda _: verify(application, "wrong").status, 40, threads=16)
    assert sorted(statuses) == [403] * 10 + [429] * 30


def test_reset_password_lifts_the_limit(application):
    post(application)
    guess(application, 11)
    assert reset(application, "5678").status == 204
    assert verify(application, "5678").status == 200


# -- conditional requests --------------------------------------------------------------


def entity_tag(application):
    return call(application, path="/users/1/").headers["ETag"]


# The requests that change a user. The value is the status without a precondition.
WRITES = {
    "put": (
        lambda application, **environ: call(
            application, "PUT", "/users/1/", fields=RON, **environ
        ),
        200,
    ),
    "patch": (
        lambda application, **environ: call(
            application, "PATCH", "/users/1/", fields=RON, **environ
        ),
        200,
    ),
    "delete": (
        lambda application, **environ: call(application, "DELETE", "/users/1/", **environ),
        204,
    ),
    "change": (lambda application, **environ: change(application, "1234", "5678", **environ), 204),
    "reset": (lambda application, **environ: reset(application, "5678", **environ), 204),
}


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("condition", [{"HTTP_IF_MATCH": '"other"'}, {"HTTP_IF_NONE_MATCH": "*"}])
def test_false_precondition_returns_412_and_changes_nothing(application, users, name, condition):
    post(application)
    before = users.get(1), users.find_credentials(1)[1]
    answer = WRITES[name][0](application, **condition)
    assert (answer.status, list(answer.json)) == (412, ["error"])
    assert (users.get(1), users.find_credentials(1)[1]) == before


@pytest.mark.parametrize("name", WRITES)
def test_true_precondition_is_like_none(application, name):
    post(application)
    write, status = WRITES[name]
    assert (
        write(
            application, HTTP_IF_MATCH=entity_tag(application), HTTP_IF_NONE_MATCH='"other"'
        ).status
        == status
    )


def test_second_of_two_editors_gets_412(client):
    client.post_json("/users/", HARRY)
    headers = {"If-Match": client.get("/users/1/").headers["ETag"]}
    client.put_json("/users/1/", {**HARRY, "first_name": "First"}, headers=headers, status=200)
    answer = client.put_json(
        "/users/1/", {**HARRY, "first_name": "Second"}, headers=headers, status=412
    )
    assert "changed" in answer.json["error"]
    client.delete("/users/1/", headers=headers, status=412)
    assert client.get("/users/1/").json["first_name"] == "First"


@pytest.mark.parametrize("method", ["PUT", "PATCH"])
def test_concurrent_edits_of_one_version_have_one_winner(application, method):
    post(application)
    tag = entity_tag(application)

    def edit(number):
        fields = {**HARRY, "first_name": f"Editor {number}"}
        return call(application, method, "/users/1/", fields=fields, HTTP_IF_MATCH=tag).status

    assert sorted(in_threads(edit, 8)) == [200] + [412] * 7


def test_unknown_id_returns_404_despite_a_false_precondition(application):
    """RFC 9110 13.2.1. Only DELETE would have succeeded."""
    for name, status in [
        ("put", 404),
        ("patch", 404),
        ("change", 404),
        ("reset", 404),
        ("delete", 412),
    ]:
        assert WRITES[name][0](application, HTTP_IF_MATCH="*").status == status
    assert call(application, path="/users/1/", HTTP_IF_MATCH="*").status == 404
    assert call(application, "DELETE", "/users/1/", HTTP_IF_NONE_MATCH="*").status == 204


def test_etag_changes_only_with_the_user(client):
    client.post_json("/users/", HARRY)
    tag = client.get("/users/1/").headers["ETag"]
    assert re.fullmatch('"[0-9a-f]{32}"', tag)
    client.put_json("/users/1/password/", {"old_password": "1234", "new_password": "5"})
    client.post_json("/users/", RON)
    client.patch_json("/users/1/", {})
    assert (
        client.get("/users/1/").headers["ETag"] == client.head("/users/1/").headers["ETag"] == tag
    )
    client.put_json("/users/1/", {**HARRY, "last_name": "Evans"})
    assert client.get("/users/1/").headers["ETag"] != tag


# -- list ------------------------------------------------------------------------------


def ids(client, query=""):
    return [user["id"] for user in client.get(f"/users/{query}").json]


def test_list_returns_all_users_in_order_of_id(client, users):
    assert client.get("/users/").json == []
    insert(users, "A", "B", "C", "D")
    users.delete(2)
    assert ids(client) == [1, 3, 4]


@pytest.fixture
def pages(client, users):
    """A client of a service with 25 users, whose ids are 1 to 25."""
    insert(users, *(f"Last{number}" for number in range(1, 26)))
    return client


@pytest.mark.parametrize(
    "url", ["/users/?limit=10", "/users?limit=10", "/users/?limit=10&sort=id"]
)
def test_pages_return_each_user_once(pages, url):
    assert follow(pages, url) == [list(range(1, 11)), list(range(11, 21)), list(range(21, 26))]


def test_pages_in_descending_order(pages):
    assert ids(pages, "?sort=-id") == list(range(25, 0, -1))
    assert follow(pages, "/users/?limit=10&sort=-id") == [
        list(range(25, 15, -1)), list(range(15, 5, -1)), list(range(5, 0, -1))
    ]  # fmt: skip


def test_link_keeps_limit_and_sort(pages):
    link = pages.get("/users/?sort=-id&limit=10").headers["Link"]
    assert link == '</users/?limit=10&after=16&sort=-id>; rel="next"'


def test_full_last_page_has_no_link(pages):
    assert follow(pages, "/users/?limit=5&after=20") == [[21, 22, 23, 24, 25]]
    assert follow(pages, "/users/?limit=5&after=6&sort=-id") == [[5, 4, 3, 2, 1]]


def test_page_after_the_last_user_is_empty(pages):
    for query in (
        "?limit=1&after=25",
        "?limit=1&after=1&sort=-id",
        f"?after={profiler.MAX_ID}",
        "?after=0&sort=-id",
    ):
        assert ids(pages, query) == []


def test_after_without_limit_returns_all_following_users(pages):
    assert ids(pages, "?after=20") == [21, 22, 23, 24, 25]
    assert ids(pages, "?after=4&sort=-id") == [3, 2, 1]
    assert len(ids(pages, "?after=0")) == 25


@pytest.mark.parametrize("sort", ["", "email", "-Id", "id,-id"])
def test_unknown_sort_returns_400(client, sort):
    assert client.get(f"/users/?sort={sort}", status=400).json == {
        "error": "sort must be id or -id"
    }


@pytest.mark.parametrize("email", ["7@example.com", "7@Example.COM", "7%40example.com"])
def test_email_selects_the_user_with_this_email(pages, email):
    assert ids(pages, f"?email={email}") == [7]
    assert follow(pages, f"/users/?email={email}&limit=1") == [[7]]


def test_email_combines_with_after_and_sort(pages):
    assert ids(pages, "?email=nobody@example.com") == []
    for query, expected in [
        ("after=7", []),
        ("after=6&limit=1", [7]),
        ("after=7&sort=-id", []),
        ("after=8&sort=-id", [7]),
    ]:
        assert ids(pages, f"?email=7@example.com&{query}") == expected


@pytest.mark.parametrize("query", ["a+b@example.com", "a%2Bb@example.com"])
def test_plus_in_an_email_is_literal(client, query):
    client.post_json("/users/", {**HARRY, "email": "a+b@example.com"})
    assert ids(client, f"?email={query}") == [1]


@pytest.mark.parametrize("query", ["q=Mary+Ann", "q=Mary%20Ann", "limit=1&q=mary+ann"])
def test_plus_in_a_search_is_a_space(client, users, query):
    """requests, URLSearchParams and urlencode write a space as a plus."""
    users.insert("Mary Ann", "A", "a@example.com", "x")
    users.insert("Mary+Ann", "B", "b@example.com", "x")
    assert ids(client, f"?{query}") == [1]
    assert ids(client, f"?{query.replace('+', '%2B').replace('%20', '%2B')}") == [2]


def test_link_of_a_search_with_spaces_leads_to_the_next_page(client, users):
    for number in range(3):
        users.insert("Mary Ann", "A", f"{number}@example.com", "x")
    assert follow(client, "/users/?q=Mary+Ann&limit=1") == [[1], [2], [3]]


@pytest.mark.parametrize(
    "query", ["email=%C5%BC%C3%B3%C5%82w@EXAMPLE.com", "email=żółw@example.com"]
)
def test_email_parameter_may_contain_any_letters(application, query):
    call(application, "POST", fields={**HARRY, "email": "żółw@example.com"})
    assert len(call(application, QUERY_STRING=query.encode().decode("latin-1")).json) == 1


@pytest.mark.parametrize(
    ("name", "values"),
    [
        (
            "limit",
            ["", "0", "-1", "1001", "1.0", "ten", "+1", "%D9%A3", "9" * 5000, "1%0A", "1,2"],
        ),
        ("after", ["", "-1", "9223372036854775808", "0x1", "0" * 5000, "x", "x&limit=5"]),
        ("email", ["%00@b"]),
        ("q", ["%00", "a%0Ab", "%C2%85", "a" * 256]),
    ],
)
def test_invalid_parameter_returns_400_naming_it(client, name, values):
    for value in values:
        assert (
            client.get(f"/users/?{name}={value}", status=400)
            .json["error"]
            .startswith(f"{name} must")
        ), value


@pytest.mark.parametrize(
    "query", ["", "page=2", "Limit=1", "&&=&a", "first_name=Harry", "%", "\u00ff", "Q=x", "q"]
)
def test_unknown_parameters_are_ignored(application, users, query):
    insert(users, "A", "B")
    answer = call(application, QUERY_STRING=query)
    assert (answer.status, len(answer.json), "Link" in answer.headers) == (200, 2, False)


# -- search ----------------------------------------------------------------------------


@pytest.fixture
def people(client, users):
    """A client of a service with a few users."""
    for first_name, last_name, email in [
        ("Harry", "Potter", "harry@example.com"),
        ("Ron", "Weasley", "ron@hogwarts.example"),
        ("Dorothy", "Żak", "d.potterfield@example.com"),
        ("100%", "under_score", "back\\slash@example.com"),
        ("1000", "underXscore", "backslash@example.com"),
    ]:
        users.insert(first_name, last_name, email, "pottery")
    return client


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pot", [1, 3]),
        ("POTTER", [1, 3]),
        ("Ron", [2]),
        ("oro", [3]),
        ("@example.com", [1, 3, 4, 5]),
        ("y@e", [1]),
        ("Żak", [3]),
        ("Harry Potter", []),
        (" ", []),
        ("pottery", []),
        ("", [1, 2, 3, 4, 5]),
    ],
)
def test_search_finds_text_in_names_and_emails(people, text, expected):
    assert [user["id"] for user in people.get("/users/", {"q": text}).json] == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("%25", [4]),
        ("0%25", [4]),
        ("%25%25", []),
        ("_", [4]),
        ("r_s", [4]),
        ("%5C", [4]),
        ("k%5Cs", [4]),
        ("%5C%5C", []),
        ("%5C%25", []),
        ("'", []),
        ("a+b", []),
        ("*", []),
        ("[a-z]", []),
    ],
)
def test_search_takes_wildcards_literally(people, text, expected):
    assert ids(people, f"?q={text}") == expected


def test_search_combines_with_the_other_parameters(people):
    assert ids(people, "?q=example&after=1&limit=2") == [2, 3]
    assert ids(people, "?q=pot&sort=-id") == [3, 1]
    assert ids(people, "?q=pot&after=3&sort=-id") == [1]
    assert ids(people, "?q=pot&email=HARRY@example.com") == [1]
    assert ids(people, "?q=weasley&email=harry@example.com") == []


def test_search_pages_link_to_each_other(people):
    assert follow(people, "/users/?q=%40example.com&limit=2") == [[1, 3], [4, 5]]
    assert follow(people, "/users/?q=%40example.com&limit=3&sort=-id") == [[5, 4, 3], [1]]
    assert (
        people.get("/users/?limit=1&q=%40e").headers["Link"]
        == '</users/?limit=1&after=1&q=%40e>; rel="next"'
    )


def test_search_without_limit_returns_a_page(people, users, monkeypatch):
    monkeypatch.setattr(profiler, "BATCH", 2)
    assert follow(people, "/users/?q=example") == [[1, 2], [3, 4], [5]]


def test_search_sees_changes_immediately(people):
    people.patch_json("/users/2/", {"last_name": "Potter"})
    people.delete("/users/1/")
    assert ids(people, "?q=potter") == [2, 3]


# -- paths, methods, responses ---------------------------------------------------------


@pytest.mark.parametrize(
    ("mount_point", "location"),
    [
        ("/api", "/api/users/1/"),
        ("//evil.com", "/evil.com/users/1/"),
        ("/a b\u00c3\u00a9\n", "/a%20b%C3%A9%0A/users/1/"),
    ],
)
def test_location_contains_the_mount_point_and_stays_on_the_host(
    application, mount_point, location
):
    assert post(application, SCRIPT_NAME=mount_point).headers["Location"] == location


def test_link_contains_the_mount_point(application, users):
    insert(users, "A", "B")
    answer = call(application, QUERY_STRING="limit=1", SCRIPT_NAME="/api")
    assert answer.headers["Link"] == '</api/users/?limit=1&after=1>; rel="next"'


@pytest.mark.parametrize("slash", ["/", ""])
def test_trailing_slash_is_optional(client, slash):
    client.post_json(f"/users{slash}", HARRY, status=201)
    assert len(client.get(f"/users{slash}").json) == 1
    client.put_json(f"/users/1{slash}", HARRY, status=200)
    client.patch_json(f"/users/1{slash}", {}, status=200)
    client.put_json(
        f"/users/1/password{slash}", {"old_password": "1234", "new_password": "5678"}, status=204
    )
    client.put_json(f"/users/1/password/reset{slash}", {"new_password": "1234"}, status=204)
    client.post_json(f"/users/verify{slash}", HARRY, status=200)
    client.get(f"/users/1{slash}", status=200)
    client.get(f"/health{slash}", status=200)
    client.delete(f"/users/1{slash}", status=204)


@pytest.mark.parametrize("path_info", ["/users/", "/users/1/", "/users/9/", "/health/"])
def test_body_is_one_line_of_compact_json(application, path_info):
    assert post(application).body == b'{"id":1}\n'
    body = call(application, path=path_info).body
    assert body == json.dumps(json.loads(body), separators=(",", ":")).encode() + b"\n"


@pytest.mark.parametrize(
    "digits",
    [
        "0",
        "9223372036854775807",
        "9223372036854775808",
        "9" * 19,
        "9" * 5000,
        "+1",
        "-1",
        "1.0",
        "\u0663",
        "1/\n",
        "1\n",
        "\n",
        " 1",
    ],
)
@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH"])
def test_impossible_id_returns_404(application, users, digits, method):
    insert(users, "A")
    path_info = f"/users/{digits}/".encode().decode("latin-1")
    assert (
        call(application, method, path_info, fields=HARRY if method != "GET" else None).status
        == 404
    )


@pytest.mark.parametrize(
    "path_info",
    [
        "/users//",
        "/users/1//",
        "//users/",
        "/users/1/x",
        "/Users/",
        "/users/\n",
        "*",
        "/health/x",
        "/users/1/password/reset/x",
        "/users/password/reset/",
        "/openapi_json",
    ],
)
def test_unknown_path_returns_404(application, path_info):
    answer = call(application, path=path_info)
    assert (answer.status, list(answer.json)) == (404, ["error"])


@pytest.mark.parametrize(
    ("path_info", "allow"),
    [
        ("/users/", "GET, HEAD, OPTIONS, POST"),
        ("/users/1/", "DELETE, GET, HEAD, OPTIONS, PATCH, PUT"),
        ("/users/1/password/", "OPTIONS, PUT"),
        ("/users/1/password/reset/", "OPTIONS, PUT"),
        ("/users/verify/", "OPTIONS, POST"),
        ("/health/", "GET, HEAD, OPTIONS"),
    ],
)
def test_other_methods_return_405_with_allow(application, path_info, allow):
    for method in ("get", "PROPFIND", "TRACE", "COPY"):
        answer = call(application, method, path_info)
        assert (answer.status, answer.headers["Allow"], list(answer.json)) == (
            405,
            allow,
            ["error"],
        )
    answer = call(application, "OPTIONS", path_info)
    assert (answer.status, answer.headers["Allow"], answer.body) == (204, allow, b"")


@pytest.mark.parametrize(
    "path_info", ["/users/", "/users/1/", "/users/2/", "/nowhere/", "/health/", "/users/?limit=x"]
)
def test_head_is_get_without_the_body(application, path_info):
    post(application)
    path_info, _, query = path_info.partition("?")
    answer = call(application, path=path_info, QUERY_STRING=query)
    assert call(application, "HEAD", path_info, QUERY_STRING=query) == answer._replace(body=b"")
    assert answer.headers["Content-Length"] == str(len(answer.body))


RESPONSES = [
    ("GET", "/users/"),
    ("GET", "/users/1/"),
    ("GET", "/users/9/"),
    ("DELETE", "/users/9/"),
    ("PUT", "/users/"),
]
RESPONSES += [
    ("OPTIONS", "/users/"),
    ("GET", "/health/"),
    ("GET", "/nowhere"),
    ("POST", "/users/verify/"),
    ("GET", "/"),
]


@pytest.mark.parametrize(("method", "path_info"), RESPONSES)
def test_every_response_has_the_security_headers(application, method, path_info):
    post(application)
    headers = call(application, method, path_info).headers
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-store"
    assert headers["X-Frame-Options"] == "DENY"


def test_responses_with_errors_or_without_body_have_the_security_headers(
    application, users, monkeypatch
):
    post(application)
    answers = [
        call(application, path="/users/1/", HTTP_IF_NONE_MATCH="*"),
        call(application, HTTP_HOST="a.example"),
    ]
    monkeypatch.setattr(users, "get", lambda user_id: 1 / 0)
    answers.append(call(application, path="/users/1/"))
    assert [answer.status for answer in answers] == [304, 421, 500]
    assert {answer.headers.get("X-Frame-Options") for answer in answers} == {"DENY"}


def test_204_and_304_have_neither_type_nor_length(application):
    post(application)
    answers = [
        call(application, path="/users/1/", HTTP_IF_NONE_MATCH="*"),
        call(application, "DELETE", "/users/1/"),
    ]
    assert [answer.status for answer in answers] == [304, 204]
    assert all({"Content-Type", "Content-Length"}.isdisjoint(answer.headers) for answer in answers)


def test_health_returns_200_if_users_can_be_read(application, users, monkeypatch):
    assert call(application, path="/health/").json == {"status": "ok"}

    def ping():
        raise profiler.Unavailable("disk I/O error")

    monkeypatch.setattr(users, "ping", ping)
    answer = call(application, path="/health/")
    assert (answer.status, answer.error) == (
        503,
        "The database is unavailable: see the server log",
    )
    assert answer.errors == "profiler: 503: disk I/O error\n"


def test_bug_returns_500_and_logs_a_traceback(application, users, monkeypatch):
    monkeypatch.setattr(users, "get", lambda user_id: 1 / 0)
    answer = call(application, path="/users/1/")
    assert (answer.status, answer.json) == (500, {"error": "Internal server error"})
    assert answer.errors.startswith("Traceback")
    assert answer.errors.endswith("ZeroDivisionError: division by zero\n")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (profiler.Busy("locked"), "The service is busy: try again"),
        (profiler.Unavailable("gone"), "The database is unavailable: see the server log"),
    ],
)
def test_unavailable_database_returns_503_with_retry_after(
    application, users, monkeypatch, error, message
):
    def get(user_id):
        raise error

    monkeypatch.setattr(users, "get", get)
    answer = call(application, path="/users/1/")
    assert (answer.status, answer.headers["Retry-After"], answer.error) == (503, "1", message)
    assert answer.errors == f"profiler: 503: {error}\n"


def test_passwords_and_hashes_are_neither_returned_nor_logged(application, users, monkeypatch):
    harry, passwords = (
        {**HARRY, "password": "swordfish"},
        {"old_password": "swordfish", "new_password": "tuna fish"},
    )
    requests = [
        ("POST", "/users/", harry), ("POST", "/users/", harry), ("GET", "/users/", None),
        ("GET", "/users/1/", None), ("PUT", "/users/1/", harry), ("POST", "/users/verify/", harry),
        ("PUT", "/users/1/password/", passwords),
        ("PUT", "/users/1/password/", passwords), ("PUT", "/users/1/password/reset/", passwords),
        ("POST", "/users/", {**RON, "password_hash": "pbkdf2:sha256:10$" + "swordfish"}),
    ]  # fmt: skip
    answers = [
        call(application, method, path_info, fields=fields)
        for method, path_info, fields in requests
    ]
    secrets = ["swordfish", "tuna fish", users.find_credentials(1)[1].split("$")[2]]
    for name in ("create", "update", "verify", "change_password", "reset_password"):
        monkeypatch.setattr(application.accounts, name, lambda *_, **__: 1 / 0)
    failed = [
        call(application, *request[:2], fields=request[2]) for request in requests if request[2]
    ]
    assert {answer.status for answer in failed} <= {400, 500}
    assert not [secret for secret in secrets if secret in repr(answers + failed)]


# -- access ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path_info"),
    [
        ("GET", "/users/"),
        ("POST", "/users/"),
        ("OPTIONS", "/users/"),
        ("HEAD", "/users/"),
        ("PATCH", "/users/1/"),
        ("POST", "/users/verify/"),
        ("PUT", "/users/1/password/"),
        ("PUT", "/users/1/password/reset/"),
        ("GET", "/nowhere"),
        ("OPTIONS", "*"),
        ("PUT", "/users/health/"),
        ("GET", "/health/x"),
    ],
)
@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        f"Basic {TOKEN}",
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN[:-1]}",
        TOKEN,
        "Bearer \u00ff\ud800",
        f"Bearer {TOKEN} {TOKEN}",
        f"Bearer {TOKEN.upper()}",
    ],
)
def test_request_without_valid_token_returns_401(guarded, method, path_info, authorization):
    environ = {} if authorization is None else {"HTTP_AUTHORIZATION": authorization}
    answer = call(guarded, method, path_info, **environ)
    assert (answer.status, answer.headers["WWW-Authenticate"], answer.errors) == (
        401,
        "Bearer",
        "",
    )
    assert answer.body == b"" if method == "HEAD" else list(answer.json) == ["error"]


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER "])
def test_request_with_token_is_served(guarded, scheme):
    assert call(guarded, HTTP_AUTHORIZATION=f"{scheme} {TOKEN}").status == 200


def test_token_opens_all_hosts(guarded):
    environ = {"HTTP_AUTHORIZATION": f"Bearer {TOKEN}"}
    assert call(guarded, HTTP_HOST="accounts.example.com", **environ).status == 200
    assert call(guarded, HTTP_HOST="accounts.example.com").status == 401


def test_any_of_several_tokens_is_valid(accounts):
    tokens = ["first-token-0123456", "second-token-012345", TOKEN]
    rotating = profiler.Application(accounts, token="\r\n".join(tokens) + "\n\n")
    assert {call(rotating, HTTP_AUTHORIZATION=f"Bearer {token}").status for token in tokens} == {
        200
    }
    assert call(rotating, HTTP_AUTHORIZATION=f"Bearer {' '.join(tokens)}").status == 401
    assert call(rotating, HTTP_AUTHORIZATION="Bearer ").status == 401


def test_health_needs_no_token(guarded):
    assert call(guarded, path="/health/", HTTP_HOST="accounts.example.com").json == {
        "status": "ok"
    }


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LocalHost:5000",
        "127.0.0.1",
        "127.0.0.1:80",
        "127.1.2.3",
        "[::1]",
        "[::1]:5000",
        "localhost:",
    ],
)
def test_loopback_host_is_served_without_token(application, host):
    assert call(application, HTTP_HOST=host).status == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "localhost.evil.example",
        "evil.example:5000",
        "127.0.0.1.evil.example",
        "192.168.0.1",
        "",
        "\n",
        "localhost:x",
        "xlocalhost",
        "localhost\n",
        "[::2]",
        "127.0.0.1@evil.example",
        "localhost,evil.example",
        "::1",
    ],
)
def test_other_host_returns_421_without_token(application, users, host):
    """DNS rebinding."""
    for method, path_info in [
        ("GET", "/users/"),
        ("POST", "/users/"),
        ("GET", "/health/"),
        ("GET", "/nowhere"),
    ]:
        answer = call(application, method, path_info, fields=HARRY, HTTP_HOST=host)
        assert (answer.status, "PROFILER_TOKEN" in answer.error) == (421, True)
    assert users.count() == 0


@pytest.mark.parametrize(
    "address", ["10.0.0.1", "192.168.127.1", "::2", "::ffff:10.0.0.1", "1127.0.0.1"]
)
def test_client_on_another_machine_gets_421_without_token(application, users, address):
    """It could send any Host."""
    answer = call(application, "POST", fields=HARRY, HTTP_HOST="localhost", REMOTE_ADDR=address)
    assert (answer.status, users.count()) == (421, 0)


@pytest.mark.parametrize("address", ["127.0.0.1", "127.1.2.3", "::1", "::ffff:127.0.0.1", ""])
def test_client_on_this_machine_is_served_without_token(application, address):
    """The address is empty for a Unix socket."""
    assert call(application, HTTP_HOST="localhost", REMOTE_ADDR=address).status == 200


def test_forwarded_host_is_ignored(application):
    assert (
        call(application, HTTP_HOST="evil.example", HTTP_X_FORWARDED_HOST="localhost").status
        == 421
    )
    assert (
        call(application, HTTP_HOST="localhost", HTTP_X_FORWARDED_HOST="evil.example").status
        == 200
    )


def test_anonymous_application_serves_any_host(accounts):
    assert (
        call(
            profiler.Application(accounts, anonymous=True), HTTP_HOST="accounts.example.com"
        ).status
        == 200
    )


def test_anonymous_does_not_disable_the_token(accounts):
    assert call(profiler.Application(accounts, token=TOKEN, anonymous=True)).status == 401
