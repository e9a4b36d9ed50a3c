"""Tests of the section *passwords*: hashes, their formats and their limits."""

from __future__ import annotations

import hashlib
import hmac
import types

import pytest

import profiler

# RFC 7914 11: PBKDF2-HMAC-SHA256 ("passwd", "salt", 1), of which a hash keeps the first 32 bytes.
PBKDF2 = "pbkdf2:sha256:1$salt$55ac046e56e3089fec1691c22544b605f94185216dde0465e68b9d57c20dacbc"
# RFC 7914 12: scrypt ("pleaseletmein", "SodiumChloride", N=16384, r=8, p=1).
SCRYPT = (
    "scrypt:16384:8:1$SodiumChloride$"
    "7023bdcb3afd7348461c06cd81fd38ebfda8fbba904f8e3ea9b543f6545da1f2"
    "d5432955613f0fcf62d49705242a9af9e61e85dc0d651e40dfcf017b45575887"
)
# "Pa\u0308sswort \u2603", not normalised, by Werkzeug 3.1.
DECOMPOSED = (
    "scrypt:1024:8:1$adks63AMQhguG8jc$"
    "ad4b6c479dd35ec02012a6d622f60d798d35631216513b4d56c40e86ad4a23a6"
    "e61bcc034b297fa93f041a8e407003176ff23d26dd0ffdc3bf48d4da734b2f91"
)
DIGEST, LONG_DIGEST = "0" * 64, "0" * 128
BASE64, LONG_BASE64 = "A" * 43, "A" * 86


@pytest.mark.parametrize(
    ("password_hash", "password"), [(PBKDF2, "passwd"), (SCRYPT, "pleaseletmein")]
)
def test_known_answers_of_rfc_7914(password_hash, password):
    assert profiler.verify_password(password_hash, password) is True
    assert profiler.verify_password(password_hash, password + "x") is False


@pytest.mark.parametrize(
    ("password_hash", "password"), [(PBKDF2, "passwd"), (SCRYPT, "pleaseletmein")]
)
def test_digests_are_compared_in_constant_time(monkeypatch, password_hash, password):
    compared = []

    def compare_digest(a, b):
        compared.append((a, b))
        return hmac.compare_digest(a, b)

    monkeypatch.setattr(profiler, "hmac", types.SimpleNamespace(compare_digest=compare_digest))
    assert profiler.verify_password(password_hash, password)
    [digests] = compared
    assert [digest.hex() for digest in digests] == [password_hash.split("$")[2]] * 2


def test_passlib_hash_without_salt():
    """By passlib 1.7. The known answers of test_profiler.py have salts."""
    password_hash = "$pbkdf2-sha256$10$$B7VtbvBzrwzGFoRgqOEapKGuFZKvRVFS9UY9k6P8aGU"
    assert profiler.verify_password(password_hash, "swordfish")


def test_hash_contains_method_iterations_and_salt():
    method, salt, digest = profiler.hash_password("1234", 3).split("$")
    assert method == "pbkdf2:sha256:3"
    assert digest == hashlib.pbkdf2_hmac("sha256", b"1234", salt.encode(), 3).hex()
    assert len(bytes.fromhex(salt)) == 16


def test_default_iterations_are_those_of_owasp():
    assert profiler.hash_password("1234").startswith("pbkdf2:sha256:600000$")


def test_hashes_of_one_password_differ():
    assert profiler.hash_password("1234", 1) != profiler.hash_password("1234", 1)


def test_only_the_password_matches_its_hash():
    password_hash = profiler.hash_password("pässwörd", 1)
    assert profiler.verify_password(password_hash, "pässwörd")
    assert not profiler.verify_password(password_hash, "Pässwörd")
    assert not profiler.verify_password(password_hash, "")


def test_nul_is_neither_hashed_nor_verified():
    """HMAC pads with NUL: otherwise "a" would match the hash of "a\\0"."""
    with pytest.raises(ValueError, match="NUL"):
        profiler.hash_password("a\0", 1)
    assert not profiler.verify_password(profiler.hash_password("a", 1), "a\0")


def test_lone_surrogate_matches_nothing():
    assert profiler.verify_password(profiler.hash_password("1234", 1), "\ud800") is False
    with pytest.raises(ValueError, match="surrogates"):
        profiler.hash_password("\ud800", 1)


def test_password_of_more_than_1024_characters_is_neither_hashed_nor_verified():
    """NFC takes quadratic time."""
    longest = "\U0001f40d" * profiler.MAX_PASSWORD
    assert len(longest) == 1024
    assert profiler.verify_password(profiler.hash_password(longest, 1), longest)
    with pytest.raises(ValueError, match="at most 1024 characters"):
        profiler.hash_password(longest + "x", 1)
    digest = hashlib.pbkdf2_hmac("sha256", b"x" * 1025, b"salt", 1).hex()
    assert not profiler.verify_password(f"pbkdf2:sha256:1$salt${digest}", "x" * 1025)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("\u00e9", "e\u0301"),
        ("\u1e69", "s\u0307\u0323"),
        ("\u212b", "A\u030a"),
        ("\uac00", "\u1100\u1161"),
    ],
)
def test_passwords_are_normalised_to_nfc(first, second):
    assert profiler.verify_password(profiler.hash_password(first, 1), second)
    assert profiler.verify_password(profiler.hash_password(second, 1), first)


def test_normalised_form_is_composed():
    """Other programs hash what is typed, mostly composed letters."""
    digest = hashlib.pbkdf2_hmac("sha256", "\u00e9".encode(), b"salt", 1).hex()
    assert profiler.verify_password(f"pbkdf2:sha256:1$salt${digest}", "e\u0301")


@pytest.mark.parametrize(
    ("first", "second"), [("\ufb01", "fi"), ("\u00b2", "2"), ("\uff21", "A"), ("x\u200b", "x")]
)
def test_compatible_characters_remain_different_passwords(first, second):
    """NFC, not NFKC."""
    assert not profiler.verify_password(profiler.hash_password(first, 1), second)


def test_foreign_hash_of_decomposed_letters_matches_the_raw_password():
    assert profiler.verify_password(DECOMPOSED, "Pa\u0308sswort \u2603")
    assert not profiler.verify_password(DECOMPOSED, "Passwort \u2603")


@pytest.mark.parametrize(
    "iterations", [0, -1, profiler.MAX_ITERATIONS + 1, 1.5, True, "", "x", None]
)
def test_invalid_iterations_raise_valueerror(iterations):
    with pytest.raises(ValueError, match="iterations must be a number from 1 to 10000000"):
        profiler.hash_password("1234", iterations)


@pytest.mark.parametrize(
    "password_hash",
    [
        "",
        "1234",
        "$$",
        "$$$",
        PBKDF2 + "$",
        PBKDF2 + "\n",
        PBKDF2[:-1],
        PBKDF2.upper(),
        PBKDF2.replace("sha256", "md5"),
        PBKDF2.replace(":1$", "$"),
        PBKDF2.replace(":1$", ":0$"),
        PBKDF2.replace(":1$", ":-1$"),
        PBKDF2.replace(":1$", ":1\n$"),
        PBKDF2.replace(":1$", ":\u0661$"),
        PBKDF2.replace("salt", "\ud800"),
        "pbkdf2:sha256:1$salt$zz",
        "pbkdf2:sha256:1$salt$\u00e9",
        f"pbkdf2:sha256:{10**12}$salt${DIGEST}",
        f"pbkdf2:sha256:{'9' * 5000}$salt${DIGEST}",
        f"pbkdf2:sha1:1$salt${DIGEST}",
        f"scrypt:32768:8$salt${LONG_DIGEST}",
        f"scrypt:0:0:0$salt${LONG_DIGEST}",
        f"scrypt:16384:8:1$salt${DIGEST}",
        f"pbkdf2_sha256$1$salt${BASE64}",
        f"pbkdf2_sha256$1$salt${'.' * 43}=",
        f"pbkdf2_sha1$1$salt${BASE64}=",
        f"scrypt$16384$salt$8${LONG_BASE64}==",
        f"$pbkdf2-sha256$1$salt${BASE64}=",
        f"$pbkdf2-sha256$1$s${BASE64}",  # a single base64 character is no byte
        f"$pbkdf2-sha512$1$salt${LONG_BASE64}",
        f"plain$salt${DIGEST}",
        None,
        b"",
    ],
)
def test_malformed_or_unsupported_hash_matches_nothing(password_hash):
    assert profiler.verify_password(password_hash, "passwd") is False
    assert not profiler.parse_hash(str(password_hash))


@pytest.mark.parametrize(
    ("password_hash", "allowed"),
    [
        (f"pbkdf2:sha256:{profiler.MAX_ITERATIONS}$salt${DIGEST}", True),
        (f"pbkdf2:sha256:{profiler.MAX_ITERATIONS + 1}$salt${DIGEST}", False),
        (f"pbkdf2_sha256${profiler.MAX_ITERATIONS}$salt${BASE64}=", True),
        (f"pbkdf2_sha256${profiler.MAX_ITERATIONS + 1}$salt${BASE64}=", False),
        (f"$pbkdf2-sha256${profiler.MAX_ITERATIONS + 1}$salt${BASE64}", False),
        (f"scrypt:{2**17}:8:1$salt${LONG_DIGEST}", True),
        (f"scrypt:{2**17}:8:2$salt${LONG_DIGEST}", False),
        (f"scrypt:{2**18}:8:1$salt${LONG_DIGEST}", False),
        (f"scrypt:{2**30}:8:1$salt${LONG_DIGEST}", False),
        (f"scrypt:2:1:{2**30}$salt${LONG_DIGEST}", False),
        (f"scrypt${2**14}$salt$8$5${LONG_BASE64}==", True),  # Django 5.2's own costs
        (f"scrypt${2**18}$salt$8$1${LONG_BASE64}==", False),
    ],
)
def test_hash_of_excessive_cost_is_not_verified(password_hash, allowed):
    """Whoever can store a hash could keep a core busy otherwise."""
    assert (profiler.parse_hash(password_hash) is not None) is allowed


@pytest.mark.parametrize("n", [1, 3, 6, 16383, 16385])
def test_scrypt_n_must_be_a_power_of_two(n):
    """RFC 7914 2."""
    assert not profiler.parse_hash(f"scrypt:{n}:8:1$salt${LONG_DIGEST}")
    assert profiler.verify_password(f"scrypt:{n}:8:1$salt${LONG_DIGEST}", "1234") is False


@pytest.mark.parametrize(
    "costs", [(2, 99, 99), (2, 1, 1), (32768, 1, 1), (65536, 1, 1), (2**19, 1, 1), (2**16, 2, 8)]
)
def test_scrypt_of_any_accepted_costs_can_be_computed(costs):
    """RFC 7914 2 also requires n to be less than 2 to the power of 16 * r."""
    password_hash = f"scrypt:{costs[0]}:{costs[1]}:{costs[2]}$salt${LONG_DIGEST}"
    assert profiler.verify_password(password_hash, "1234") is False
    assert (profiler.parse_hash(password_hash) is not None) is (costs[0] < 2 ** (16 * costs[1]))


def test_scrypt_is_not_verified_where_hashlib_lacks_it(monkeypatch):
    """LibreSSL, PyPy."""
    monkeypatch.delattr(profiler.hashlib, "scrypt")
    assert profiler.verify_password(SCRYPT, "pleaseletmein") is False
    assert not profiler.parse_hash(SCRYPT)


@pytest.mark.parametrize(
    ("password_hash", "expected"),
    [
        (f"pbkdf2:sha256:9$salt${DIGEST}", True),
        (f"pbkdf2:sha256:10$salt${DIGEST}", False),
        (f"pbkdf2:sha256:11$salt${DIGEST}", False),
        (f"pbkdf2_sha256$1000$salt${BASE64}=", True),
        (f"$pbkdf2-sha256$1000$salt${BASE64}", True),
        (SCRYPT, True),
    ],
)
def test_weak_or_foreign_hash_needs_a_rehash(password_hash, expected):
    assert profiler.needs_rehash(password_hash, 10) is expected


@pytest.mark.parametrize(("length", "is_allowed"), [(1024, True), (1025, False)])
def test_salt_has_at_most_1024_characters(length, is_allowed):
    """It is stored before created_on, so a long one makes each page of users slower."""
    password_hash = f"pbkdf2:sha256:1${'s' * length}${'0' * 64}"
    assert (profiler.parse_hash(password_hash) is not None) is is_allowed
