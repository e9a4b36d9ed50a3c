"""Serve an empty database on any port, for schemathesis, until it is killed: DOCUMENT TOKEN.

Write the document as it holds for this service, which asks for the token, or for none if that is empty. The database
is made beside it.
"""

from __future__ import annotations

import json
import pathlib
import sys

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import profiler  # noqa: E402  # the one beside this folder

path, token = pathlib.Path(sys.argv[1]), sys.argv[2] or None
document = json.loads((HERE.parent / "openapi.json").read_bytes())
document["security"] = [{"bearer": []}] if token else []
path.write_text(json.dumps(document))
application = profiler.create_app(path.with_suffix(".sqlite3"), iterations=1, token=token)
with profiler.Server("127.0.0.1", 0, application, access_log=False) as server:
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
