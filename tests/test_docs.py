"""The README and docs/: transcripts and scripts are run, and what is stated is compared
with the module."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import urllib.request
from http import HTTPStatus
from urllib.error import HTTPError

import pytest
from conftest import HARRY, HERE, TOKEN, call, execute, fill, run_program, until

import profiler

PAGES = {
    page.relative_to(HERE).as_posix(): page.read_text("utf-8")
    for page in [
        HERE / "README.md",
        HERE / "CHANGELOG.md",
        HERE / "CONTRIBUTING.md",
        *sorted(HERE.glob("docs/*.md")),
    ]
}
README, API, DEPLOY, OPERATE = (
    PAGES[name] for name in ("README.md", "docs/api.md", "docs/deploy.md", "docs/operate.md")
)
FILES = ("profiler.py", "schema.sql", "index.html", "openapi.json")
needs_bash = pytest.mark.skipif(
    not (shutil.which("bash") and shutil.which("curl")), reason="bash or curl is missing"
)


def needs(*programs):
    missing = [program for program in programs if not shutil.which(program)]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def blocks(page, language):
    """Return the code blocks of a page in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def section(page, title):
    """Return the text below a heading, up to the next heading of any level."""
    return re.split(r"^#+ ", page.split(f"# {title}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def plain(page):
    """Return the text in one line, to find sentences that are wrapped."""
    return " ".join(page.split())


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def running(command, folder, log="log", **environ):
    """Run a command in a process group of its own until the end of the block."""
    environ = {
        **os.environ,
        "PROFILER_ITERATIONS": "1",
        "PYTHONPATH": str(HERE),
        "PYTHONUNBUFFERED": "1",
        **environ,
    }
    with open(folder / log, "w") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environ,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(2)
        with contextlib.suppress(ProcessLookupError):  # what is left of the group
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def serving(folder, *options, **environ):
    """Run profiler.py in a folder. Return its port, and the lines that it prints."""
    for name in FILES:
        shutil.copy(HERE / name, folder)
    command = [sys.executable, "profiler.py", "--port", "0", "--no-access-log", *options]
    with running(command, folder, **environ) as process:
        until(lambda: "Ctrl-C" in (folder / "log").read_text() or process.poll() is not None)
        output = (folder / "log").read_text()
        assert process.poll() is None, output
        yield int(re.search(r"^http://[^/]+:([0-9]+)/", output, re.MULTILINE)[1]), output


def listens(port):
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def ask(url, method="GET", fields=None, token=None, host=None, context=None):
    """Return the status, the headers and the body of a response."""
    headers = {"Content-Type": "application/json"}
    headers.update({"Authorization": f"Bearer {token}"} if token else {})
    headers.update({"Host": host} if host else {})
    body = None if fields is None else json.dumps(fields).encode()
    request = urllib.request.Request(url, body, headers, method=method)
    handlers = [urllib.request.ProxyHandler({})] + (
        [urllib.request.HTTPSHandler(context=context)] if context else []
    )
    try:
        with urllib.request.build_opener(*handlers).open(request, timeout=10) as response:
            return response.status, response.headers, response.read()
    except HTTPError as error:
        with error:
            return error.code, error.headers, error.read()


# -- transcripts -----------------------------------------------------------------------


def steps(console):
    """Return the commands in a transcript, each with what it prints."""
    lines, found = console.splitlines(), []
    while lines:
        command = lines.pop(0).removeprefix("$ ")
        while command.endswith("\\") or command.count("'") % 2:
            command += "\n" + lines.pop(0)
        output = []
        while lines and not lines[0].startswith("$ "):
            output.append(lines.pop(0))
        found.append((command, "\n".join(output)))
    return found


class Session:
    """A folder with the service, in which the transcripts of a page run one after
    another, as in a shell."""

    def __init__(self, folder, stack):
        self.folder, self.stack = folder, stack
        self.port, self.server = None, contextlib.ExitStack()
        self.tags = {}  # from an ETag on the page to the one of this run
        for name in FILES:
            shutil.copy(HERE / name, folder)

    def serve(self, *options):
        self.server.close()
        self.port, output = self.server.enter_context(serving(self.folder, *options))
        self.stack.push(self.server)
        return output

    def run(self, command):
        """Return what a command prints. A server that it starts is stopped by the next one."""
        words = shlex.split(command)
        if words[:2] == ["python3", "profiler.py"] and not {"backup", "initialise-database"} & set(
            words
        ):
            return self.serve(*words[2:])
        if "curl" in words and self.port is None:
            self.serve()
        command = command.replace("127.0.0.1:5000", f"127.0.0.1:{self.port}")
        for documented, actual in self.tags.items():
            command = command.replace(documented, actual)
        functions = 'curl() { command curl --silent "$@"; }; python3() { "$PYTHON" "$@"; };'
        environ = {**os.environ, "PYTHON": sys.executable, "no_proxy": "*"}
        output = subprocess.run(
            ["bash", "-c", f"{functions} {command}"],
            cwd=self.folder,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=20,
        )
        return output.stdout

    def check(self, command, expected):
        output = self.run(command).replace(f":{self.port}/", ":5000/")
        tag = re.compile('"[0-9a-f]{32}"')
        self.tags.update(zip(tag.findall(expected), tag.findall(output)))
        assert self.comparable(output) == self.comparable(expected), command

    def comparable(self, text):
        """Return a text without what differs in each run: times, ETags and the folder."""
        text = re.sub(
            r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d|(?<=Date: )[^\r\n]*", "TIME", text.replace("\r", "")
        )
        text = re.sub(r"(?<=Database: )\S+/", "", re.sub('"[0-9a-f]{32}"', "TAG", text))
        return re.sub(
            r"^profiler: 1 iterations are fewer.*\n", "", text, flags=re.MULTILINE
        ).strip()


@needs_bash
@pytest.mark.parametrize("name", [name for name, page in PAGES.items() if blocks(page, "console")])
def test_transcripts_are_what_happens(tmp_path, name):
    with contextlib.ExitStack() as stack:
        session = Session(tmp_path, stack)
        if name == "docs/operate.md":  # its reader has a user and a token
            with contextlib.closing(
                profiler.create_app(tmp_path / "db.sqlite3", iterations=1)
            ) as application:
                assert call(application, "POST", fields=HARRY).status == 201
            (tmp_path / "token").write_text(f"a-token-to-replace\n{TOKEN}\n")
            session.serve("--token-file", "token")
        for console in blocks(PAGES[name], "console"):
            for command, expected in steps(console):
                session.check(command, expected)


@needs_bash
def test_restore_steps_bring_the_users_back_and_keep_the_old_files(tmp_path):
    folder, backups = tmp_path / "lib", tmp_path / "backup"
    folder.mkdir(), backups.mkdir()
    fill(backups / "users-2026-11-27.sqlite3", 3)
    fill(folder / "db.sqlite3", 1)
    (folder / "db.sqlite3-wal").write_bytes(b"of the old database")
    [script] = blocks(section(OPERATE, "Restore"), "sh")
    script = script.replace("/var/lib/profiler", str(folder)).replace("/srv/backup", str(backups))
    script = re.sub("^systemctl .*\n", "", script, flags=re.MULTILINE)
    subprocess.run(["bash", "-euc", script], check=True)
    assert execute(folder / "db.sqlite3", 'SELECT count(*) FROM "user"') == [(3,)]
    assert (folder / "db.sqlite3").stat().st_mode & 0o777 == 0o600
    [replaced] = folder.glob("replaced-*/db.sqlite3")
    assert execute(replaced, 'SELECT count(*) FROM "user"') == [(1,)]


@needs_bash
def test_command_for_a_new_token_appends_a_valid_one(tmp_path):
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    command = re.search("^ *(python3 -c .*)$", section(OPERATE, "Tokens"), re.MULTILINE)[1]
    subprocess.run(
        ["bash", "-euc", command.replace("python3", sys.executable)], cwd=tmp_path, check=True
    )
    old, new = profiler.create_app(
        tmp_path / "db.sqlite3", token=(tmp_path / "token").read_text()
    ).tokens
    assert old == TOKEN.encode()
    assert len(new) >= profiler.MIN_TOKEN


@needs_bash
def test_cron_line_writes_a_backup(tmp_path):
    fill(tmp_path / "db.sqlite3", 2)
    [crontab] = blocks(section(OPERATE, "Back up"), "crontab")
    for line in crontab.splitlines():
        command = line.split(None, 5)[5].replace("\\%", "%")
        assert "%" not in line.replace("\\%", "")
        for name, replacement in (
            ("python3 /opt/profiler", f"{sys.executable} {HERE}"),
            ("/var/lib/profiler", tmp_path),
        ):
            command = command.replace(name, str(replacement))
        subprocess.run(["bash", "-euc", command.replace("/srv/backup", str(tmp_path))], check=True)
    [backup] = tmp_path.glob("users-*-*-*.sqlite3")
    assert execute(backup, 'SELECT count(*) FROM "user"') == [(2,)]


def test_index_for_a_case_sensitive_column_is_used_to_find_an_email(tmp_path):
    [statement] = blocks(section(PAGES["docs/databases.md"], "Databases of the tutorial"), "sql")
    schema = (HERE / "schema.sql").read_text("utf-8").replace(" COLLATE NOCASE", "")
    with contextlib.closing(sqlite3.connect(tmp_path / "db.sqlite3")) as connection:
        connection.executescript(schema + statement)
        query = 'EXPLAIN QUERY PLAN SELECT id FROM "user" WHERE email = ? COLLATE NOCASE'
        assert "INDEX user_email_nocase" in str(
            connection.execute(query, ("harry@example.com",)).fetchall()
        )
    with contextlib.closing(
        profiler.create_app(tmp_path / "db.sqlite3", iterations=1)
    ) as application:
        assert call(application, "POST", fields=HARRY).status == 201


# -- programs --------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, page in PAGES.items() if blocks(page, "python")])
def test_python_on_a_page_is_valid(name):
    for number, block in enumerate(blocks(PAGES[name], "python")):
        compile(block, f"{name}, block {number}", "exec")


def test_python_in_the_readme_runs(tmp_path):
    [example] = blocks(README, "python")
    output = run_program(f"{example}\nassert application.users.count() == 0", tmp_path)
    assert (output.returncode, output.stderr) == (0, "")


def test_generated_client_calls_operations_of_the_document():
    [example] = blocks(API, "python")
    operations = set(
        re.findall(r'"operationId": "(\w+)"', (HERE / "openapi.json").read_text("utf-8"))
    )
    [names] = re.findall(r"api\.users import (.*)", example)
    assert {
        re.sub("_(.)", lambda match: match[1].upper(), name) for name in names.split(", ")
    } <= operations


def test_module_for_a_stripped_prefix_adds_it_to_urls(tmp_path, monkeypatch):
    fill(tmp_path / "db.sqlite3", 2)
    monkeypatch.setenv("PROFILER_DATABASE", str(tmp_path / "db.sqlite3"))
    namespace = {}
    exec(blocks(section(DEPLOY, "A path prefix"), "python")[0], namespace)
    answer = call(namespace["application"], QUERY_STRING="limit=1")
    assert answer.headers["Link"] == '</accounts/users/?limit=1&after=1>; rel="next"'


def test_mount_inside_another_application_works(tmp_path, monkeypatch):
    pytest.importorskip("flask")
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "site"}
    exec(blocks(section(DEPLOY, "Inside another application"), "python")[0], namespace)
    site = namespace["site"]
    site.route("/")(lambda: "the site itself")
    with contextlib.closing(namespace["accounts"]):
        environ = {"path": "/accounts/users/", "HTTP_HOST": "accounts.example.com"}
        assert call(site, **environ).status == 403
        assert call(site, **environ, REMOTE_USER="admin").json == []
        assert call(site, path="/").body == b"the site itself"


@needs_bash
def test_command_for_another_application_serves_it(tmp_path):
    pytest.importorskip("flask")
    pytest.importorskip("gunicorn")
    text, port = section(DEPLOY, "Inside another application"), free_port()
    (tmp_path / "website.py").write_text(blocks(text, "python")[0])
    environ = {
        "GUNICORN_CMD_ARGS": f"--bind 127.0.0.1:{port}",
        "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
    }
    with running(["bash", "-c", blocks(text, "sh")[0]], tmp_path, **environ):
        until(lambda: listens(port))
        assert ask(f"http://127.0.0.1:{port}/accounts/users/")[::2] == (403, b"Log in as admin\n")


# -- import ----------------------------------------------------------------------------


@pytest.fixture
def scripts(tmp_path):
    """The scripts of docs/move-in.md in a folder: helper, django, flask, csv."""
    names = ("profiler_import", "import_django", "import_flask", "import_csv")
    for name, block in zip(names, blocks(PAGES["docs/move-in.md"], "python")):
        (tmp_path / f"{name}.py").write_text(block)
    return tmp_path


def run_import(folder, script, port, status=0, **environ):
    """Return what an import script writes to stdout and to stderr."""
    environ = {
        **os.environ,
        "PROFILER_URL": f"http://127.0.0.1:{port}",
        "PROFILER_TOKEN": TOKEN,
        **environ,
    }
    output = subprocess.run(
        [sys.executable, script],
        cwd=folder,
        env={**environ, "no_proxy": "*"},
        capture_output=True,
        text=True,
    )
    assert output.returncode == status, output.stderr
    return output.stdout, output.stderr


def verify(port, email, password):
    url = f"http://127.0.0.1:{port}/users/verify/"
    return ask(url, "POST", {"email": email, "password": password}, TOKEN)[0]


def test_users_of_a_csv_file_are_imported(scripts, tmp_path):
    (tmp_path / "users.csv").write_text(
        "\ufeff" + blocks(PAGES["docs/move-in.md"], "csv")[0].strip() + ",password_hash\n"
        "7,Jo,Müller,jo@example.com,s3cret,\n8,Al,,al@example.com,s3cret,,too many\n",
        encoding="utf-8",
    )
    with serving(tmp_path, PROFILER_TOKEN=TOKEN) as (port, _):
        assert run_import(tmp_path, "import_csv.py", port) == (
            "7,1\n",
            "8,al@example.com,Required fields are missing\n",
        )
        assert verify(port, "jo@example.com", "s3cret") == 200


def test_import_stops_at_a_wrong_token(scripts, tmp_path):
    (tmp_path / "users.csv").write_text(
        "id,first_name,last_name,email,password\n7,Jo,Bo,jo@example.com,s3cret\n"
    )
    with serving(tmp_path, PROFILER_TOKEN=TOKEN) as (port, _):
        output = run_import(tmp_path, "import_csv.py", port, status=1, PROFILER_TOKEN="wrong")
    url, message = (
        f"http://127.0.0.1:{port}/users/",
        "Send a valid token in the header Authorization: Bearer TOKEN",
    )
    assert output == ("", f'{url}: 401 {{"error":"{message}"}}\n\n')


def test_users_of_a_flask_application_are_imported(scripts, tmp_path):
    security = pytest.importorskip("werkzeug.security")
    (tmp_path / "instance").mkdir()
    users = [
        (
            i,
            f"user{i}",
            f"user{i}@example.com",
            security.generate_password_hash(f"pass-{i}", method),
        )
        for i, method in enumerate(("scrypt", "pbkdf2:sha256:1000"), 11)
    ]
    with (
        contextlib.closing(sqlite3.connect(tmp_path / "instance/app.db")) as connection,
        connection,
    ):
        connection.execute(
            "CREATE TABLE user (id INTEGER PRIMARY KEY, username, email, password_hash)"
        )
        connection.executemany(
            "INSERT INTO user VALUES (?, ?, ?, ?)",
            [*users, (13, "bc", "bc@example.com", "$2b$12$x")],
        )
    with serving(tmp_path, PROFILER_TOKEN=TOKEN) as (port, _):
        output = run_import(
            tmp_path, "import_flask.py", port, PROFILER_URL=f"http://127.0.0.1:{port}/"
        )
        assert output == ("11,1\n12,2\n13,3\n", "13,bc@example.com,needs a reset\n")
        again, problems = run_import(tmp_path, "import_flask.py", port)
        assert (
            again,
            problems.count("This email is already registered"),
            "reset" in problems,
        ) == ("", 3, False)
        assert [verify(port, f"user{i}@example.com", f"pass-{i}") for i in (11, 12)] == [200, 200]
        assert [verify(port, f"user{i}@example.com", "guess") for i in (11, 12)] == [403, 403]


def test_users_of_a_django_project_are_imported(scripts, tmp_path):
    pytest.importorskip("django")
    (tmp_path / "settings.py").write_text(
        "INSTALLED_APPS = ['django.contrib.auth', 'django.contrib.contenttypes']\n"
        "DATABASES = {'default': {'ENGINE': 'django.db.backends.sqlite3', 'NAME': 'django.sqlite3'}}\n"
        "DEFAULT_AUTO_FIELD = 'django.db.models.AutoField'\n"
    )
    (tmp_path / "fill.py").write_text(
        "import django; django.setup()\n"
        "from django.core.management import call_command; call_command('migrate', verbosity=0)\n"
        "from django.contrib.auth.hashers import make_password, PBKDF2PasswordHasher, ScryptPasswordHasher\n"
        "from django.contrib.auth.models import User\n"
        "strong, scrypt = PBKDF2PasswordHasher(), ScryptPasswordHasher()\n"
        "hashes = strong.encode('pass-1', 'salt', 1000), scrypt.encode('pass-2', 'salt')\n"
        "for i, password in enumerate([*hashes, make_password(None)], 1):\n"
        "    User.objects.create(username=f'user{i}', email=f'user{i}@example.com', password=password)\n"
        "User.objects.create(username='left', email='left@example.com', is_active=False)\n"
    )
    with serving(tmp_path, PROFILER_TOKEN=TOKEN) as (port, _):
        run_import(tmp_path, "fill.py", port, DJANGO_SETTINGS_MODULE="settings")
        output = run_import(tmp_path, "import_django.py", port, DJANGO_SETTINGS_MODULE="settings")
        assert output == ("1,1\n2,2\n3,3\n", "3,user3@example.com,needs a reset\n")
        assert [verify(port, f"user{i}@example.com", f"pass-{i}") for i in (1, 2)] == [200, 200]
        assert [verify(port, f"user{i}@example.com", "guess") for i in (1, 2)] == [403, 403]
    hashes = execute(tmp_path / "db.sqlite3", 'SELECT password FROM "user"')
    assert all(password.startswith("pbkdf2:sha256:1$") for (password,) in hashes)


# -- deployment ------------------------------------------------------------------------


def test_health_check_of_the_dockerfile_ignores_http_proxy(tmp_path):
    [dockerfile] = blocks(DEPLOY, "dockerfile")
    [check] = re.findall(r"HEALTHCHECK CMD (\[.*\])", dockerfile.replace("\\\n", ""))
    environ = {
        **os.environ,
        "http_proxy": "http://127.0.0.1:9",
        "HTTP_PROXY": "http://127.0.0.1:9",
    }
    program = json.loads(check)[2]

    def status(port):
        command = [sys.executable, "-c", program.replace("5000", str(port))]
        return subprocess.run(command, env=environ, capture_output=True).returncode

    with serving(tmp_path) as (port, _):
        assert status(port) == 0
    assert status(port) != 0
    for name in re.findall("COPY (.*) /app/", dockerfile)[0].split():
        assert (HERE / name).exists()


@pytest.fixture
def certificate(tmp_path):
    """A certificate and its key in files."""
    subprocess.run(
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=localhost -days 1 "
        "-keyout accounts.key -out accounts.crt && cat accounts.key accounts.crt > accounts.pem",
        shell=True,
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    return tmp_path / "accounts.pem"


def trusting():
    import ssl

    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


@contextlib.contextmanager
def nginx(folder, servers):
    """Run nginx with this content of its http block."""
    temporary = "".join(
        f"{name}_temp_path {folder}; "
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"pid {folder}/pid; error_log {folder}/error.log; daemon off; events {{}}\n"
        f"http {{ access_log off; {temporary} {servers} }}"
    )
    with running(["nginx", "-c", str(folder / "nginx.conf")], folder, log="nginx"):
        yield


@needs("nginx", "openssl")
def test_nginx_forwards_requests_and_a_bare_proxy_pass_admits_everybody(tmp_path, certificate):
    servers = blocks(section(DEPLOY, "nginx"), "nginx")[0].replace(
        "/etc/ssl/accounts", str(tmp_path / "accounts")
    )
    front, bare = free_port(), free_port()
    with serving(tmp_path) as (port, _):
        servers = servers.replace("listen 443", f"listen 127.0.0.1:{front}").replace(
            "127.0.0.1:5000", f"127.0.0.1:{port}"
        )
        servers += f"server {{ listen 127.0.0.1:{bare}; location / {{ proxy_pass http://127.0.0.1:{port}; }} }}"
        with nginx(tmp_path, servers):
            until(lambda: listens(front) and listens(bare))
            url = f"https://127.0.0.1:{front}/users/"
            assert ask(url, host="accounts.example.com", context=trusting())[0] == 421
            assert ask(f"http://127.0.0.1:{bare}/users/", host="accounts.example.com")[0] == 200
            assert ask(url, "POST", HARRY, context=trusting())[0] == 201
            assert json.loads(ask(url, context=trusting())[2])[0]["first_name"] == "Harry"


@needs("haproxy", "openssl")
def test_haproxy_forwards_requests_to_a_service_with_a_token(tmp_path, certificate):
    front = free_port()
    with serving(tmp_path, PROFILER_TOKEN=TOKEN) as (port, _):
        [config] = blocks(section(DEPLOY, "haproxy"), "haproxy")
        config = config.replace(":443", f"127.0.0.1:{front}").replace(
            "/etc/ssl/accounts.pem", str(certificate)
        )
        (tmp_path / "haproxy.cfg").write_text(
            config.replace("127.0.0.1:5000", f"127.0.0.1:{port}")
        )
        with running(["haproxy", "-f", "haproxy.cfg"], tmp_path, log="haproxy"):
            until(lambda: listens(front))
            url = f"https://127.0.0.1:{front}/users/"
            assert ask(url, host="accounts.example.com", context=trusting())[0] == 401
            assert ask(url, "POST", HARRY, TOKEN, "accounts.example.com", trusting())[0] == 201


SERVERS = {
    "gunicorn": ("GUNICORN_CMD_ARGS", "--bind 127.0.0.1:{}"),
    "granian": ("GRANIAN_PORT", "{}"),
    "waitress": (None, None),
    "cheroot": (None, None),
    "uwsgi": (None, None),
}


@needs_bash
@pytest.mark.parametrize("server", SERVERS)
def test_wsgi_server_serves_the_application(tmp_path, server):
    lines = "".join(
        blocks(section(DEPLOY, "gunicorn") + section(DEPLOY, "Other WSGI servers"), "sh")
    )
    [line] = [line for line in lines.replace("\\\n", "").splitlines() if server in line]
    folder = os.path.dirname(sys.executable)
    if not (importlib.util.find_spec(server) or os.path.exists(f"{folder}/{server}")):
        pytest.skip(f"not installed: {server}")
    port = free_port()
    variable, value = SERVERS[server]
    environ = {variable: value.format(port)} if variable else {}
    (tmp_path / "token").write_text(TOKEN)
    line = line.replace("127.0.0.1:8000", f"127.0.0.1:{port}").replace("python3", sys.executable)
    environ.update(PATH=f"{folder}:{os.environ['PATH']}", PROFILER_TOKEN=TOKEN)
    url = f"http://127.0.0.1:{port}/users/"
    with running(["bash", "-c", line], tmp_path, **environ):
        until(lambda: listens(port))
        assert ask(url)[0] == 401
        assert ask(url, "POST", HARRY, TOKEN)[0] == 201
        assert verify(port, "harry@example.com", "1234") == 200


@needs("nginx")
def test_prefix_that_nginx_keeps_is_known_to_gunicorn(tmp_path):
    pytest.importorskip("gunicorn")
    front, port = free_port(), free_port()
    location = blocks(section(DEPLOY, "A path prefix"), "nginx")[0].replace(
        "127.0.0.1:8000", f"127.0.0.1:{port}"
    )
    command = [
        sys.executable,
        "-m",
        "gunicorn",
        "--bind",
        f"127.0.0.1:{port}",
        "--threads",
        "4",
        "profiler:application",
    ]
    server = nginx(tmp_path, f"server {{ listen 127.0.0.1:{front}; {location} }}")
    with running(command, tmp_path, SCRIPT_NAME="/accounts", PROFILER_TOKEN=TOKEN), server:
        until(lambda: listens(front) and listens(port))
        status, headers, _ = ask(f"http://127.0.0.1:{front}/accounts/users/", "POST", HARRY, TOKEN)
        assert (status, headers["Location"]) == (201, "/accounts/users/1/")


# -- statements ------------------------------------------------------------------------

HELP = profiler.make_parser()[0].format_help()
OPTIONS = set(re.findall(r"--[a-z-]+[a-z]", HELP)) - {"--help", "--version"}
VARIABLES = set(re.findall(r"PROFILER_[A-Z]+|\bPORT\b", HELP))


@pytest.mark.parametrize("name", ["README.md", "docs/operate.md"])
def test_every_option_and_variable_is_documented_and_exists(name):
    rows = re.findall(r"^\| `--.*$", PAGES[name], re.MULTILINE)
    assert set(re.findall(r"`(--[a-z-]+)", "".join(rows))) == OPTIONS
    assert set(re.findall(r"`(PROFILER_[A-Z]+|PORT)\b", "".join(rows))) == VARIABLES


@pytest.mark.parametrize("command", profiler.make_parser()[1].choices)
def test_every_command_is_documented(command):
    assert f"python3 profiler.py {command}" in OPERATE


@pytest.mark.parametrize("name", ["README.md", "docs/api.md"])
def test_every_endpoint_is_documented(name):
    documented = set(re.findall(r"^\| `([A-Z]+ /\S*)`", PAGES[name], re.MULTILINE))
    paths = (
        (pattern.pattern.replace("([0-9]{1,19})", "1"), handlers)
        for pattern, handlers in profiler.ROUTES
    )
    assert documented == {
        f"{method} {path.replace('/?', '/').replace('[.]', '.')}"
        for path, handlers in paths
        for method in handlers
    }


def test_every_status_is_documented():
    source = (HERE / "profiler.py").read_text("utf-8")
    statuses = {HTTPStatus[name].value for name in re.findall(r"HTTPStatus\.([A-Z_]+)", source)}
    assert not {status for status in statuses if str(int(status)) not in section(API, "Statuses")}


@pytest.mark.parametrize(
    ("name", "statement"),
    [
        ("README.md", f"`{profiler.HOST}`"),
        ("README.md", f"`{profiler.PORT}`"),
        ("README.md", f"`{profiler.DATABASE}`"),
        ("README.md", f"`{profiler.ITERATIONS}`"),
        ("docs/operate.md", f"at most {profiler.MAX_ITERATIONS}"),
        ("docs/operate.md", f"at least {profiler.MIN_TOKEN} characters"),
        ("docs/operate.md", f"up to {profiler.MAX_PENDING:,} entries wait"),
        ("docs/deploy.md", f"within {profiler.DRAIN_TIMEOUT:.0f} seconds"),
        ("docs/deploy.md", f"up to {profiler.MAX_CONNECTIONS:,} connections"),
        (
            "docs/deploy.md",
            f"the {profiler.IDLE_TIMEOUT} seconds after which the service closes idle",
        ),
        (
            "docs/api.md",
            f"at most {profiler.MAX_BODY // 1024} KiB and {profiler.MAX_BRACKETS} brackets",
        ),
        ("docs/api.md", f"at most {profiler.MAX_NAME} characters"),
        ("docs/api.md", f"at most {profiler.MAX_EMAIL} characters"),
        ("docs/api.md", f"at most this many users, 1 to {profiler.MAX_LIMIT}"),
        ("docs/api.md", f"up to {profiler.BATCH} users"),
        ("docs/api.md", f"After {profiler.MAX_FAILURES} consecutive wrong passwords"),
        ("docs/api.md", f"the {profiler.MAX_TRACKED:,} accounts"),
        ("docs/api.md", f"at most {profiler.MAX_ITERATIONS:,} iterations"),
        ("docs/api.md", f"n·r·p of at most {profiler.MAX_SCRYPT_COST:,}"),
        ("docs/api.md", f"with {profiler.ITERATIONS:,} iterations"),
        ("docs/api.md", f"waits up to {profiler.HASH_TIMEOUT:.0f} seconds for a free core"),
        ("docs/api.md", f"if {profiler.MAX_HASHING} requests hash or wait already"),
        ("docs/api.md", f"idle for {profiler.IDLE_TIMEOUT} seconds"),
        ("docs/api.md", f"`Keep-Alive: timeout={profiler.IDLE_TIMEOUT}`"),
        (
            "docs/api.md",
            f"within {profiler.HEAD_TIMEOUT:.0f} seconds, a body within {profiler.BODY_TIMEOUT:.0f}",
        ),
        ("docs/api.md", f"every {profiler.SEND_TIMEOUT:.0f} seconds"),
        ("docs/design.md", f"batches of {profiler.BATCH}"),
        ("docs/design.md", f"Up to {profiler.WORKERS} workers"),
    ],
)
def test_stated_limits_are_those_of_the_module(name, statement):
    assert statement in plain(PAGES[name])


def test_attempts_are_one_per_minute_as_stated():
    assert "one attempt per minute" in plain(API)
    assert profiler.ATTEMPT_INTERVAL == 60


def test_exports_are_documented():
    assert not {name for name in profiler.__all__ if not re.search(rf"\b{name}\b", README)}


def test_version_is_that_of_the_module():
    assert set(re.findall("profiler/([0-9.]+)", "".join(PAGES.values()))) == {profiler.__version__}
    assert re.search("^## (.*)$", PAGES["CHANGELOG.md"], re.MULTILINE)[1] == profiler.__version__


def test_readme_is_short():
    assert len(README.splitlines()) <= 130
    assert len(README.split()) <= 900


def test_readme_links_the_tutorial_once():
    assert (
        README.count("https://tonyj.me/blog/building-rest-apis-with-python-and-flask-part-2") == 1
    )


def test_readme_has_one_test_command():
    """.ci/run runs it."""
    assert len(blocks(section(README, "Test"), "sh")) == 1


@pytest.mark.parametrize("name", PAGES)
def test_lines_have_at_most_120_characters(name):
    assert [line for line in PAGES[name].splitlines() if len(line) > 120] == []


def anchors(page):
    """Return the anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(
        "^#+ (.*)$", re.sub("^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", PAGES[name]):
        path, _, anchor = link.partition("#")
        target = (HERE / name).parent / path if path else HERE / name
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text("utf-8")), link


def test_pages_are_linked_from_the_readme():
    links = {link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", README)}
    assert not set(PAGES) - {"README.md"} - links
