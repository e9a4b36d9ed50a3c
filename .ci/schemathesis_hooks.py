"""A check for schemathesis: valid requests are accepted, except for what a schema
cannot express."""

from __future__ import annotations

import re
from typing import Any

import schemathesis
from schemathesis.specs.openapi.checks import positive_data_acceptance

# Invisible characters above U+FFFF, which the document's patterns do not cover.
INVISIBLE = re.compile("[\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]")


@schemathesis.check
def valid_data_acceptance(ctx: Any, response: Any, case: Any) -> bool | None:
    """Report rejections of valid requests."""
    return None if is_expected(response, case) else positive_data_acceptance(ctx, response, case)


def is_expected(response: Any, case: Any) -> bool:
    """Return True if a schema cannot express why the request was rejected."""
    if response.status_code == 400:
        # n * r * p of scrypt is limited.
        body = case.body if isinstance(case.body, dict) else {}
        is_scrypt = str(body.get("password_hash")).startswith("scrypt")
        return (
            b'{"error":"This email is already registered"}' in response.content
            or (b'{"error":"password_hash must be ' in response.content and is_scrypt)
            or any(
                INVISIBLE.search(str(value))
                for value in [*body.values(), *(case.query or {}).values()]
            )
        )
    if response.status_code == 412:
        return not {"If-Match", "If-None-Match"}.isdisjoint(case.headers or ())
    return response.status_code == 429
