"""Serve an empty database on any port, for schemathesis, until it is killed. Arguments:
DOCUMENT TOKEN.

Write openapi.json to DOCUMENT, adapted to a service with this token, or without one if
it is empty. The database is created next to it.
"""

from __future__ import annotations

import json
import pathlib
import socket
import sys

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import profiler  # noqa: E402  # the one in this repository

path, token = pathlib.Path(sys.argv[1]), sys.argv[2] or None
document = json.loads((ROOT / "openapi.json").read_bytes())
document["security"] = [{"bearer": []}] if token else []
path.write_text(json.dumps(document))
application = profiler.create_app(path.with_suffix(".sqlite3"), iterations=1, token=token)
with profiler.Server(socket.AF_INET, ("127.0.0.1", 0), application, access_log=False) as server:
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve()
