"""What docs/operate.md, docs/deploy.md and docs/move-in.md tell operators to do. Commands and
configuration files are read from the pages."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import operator
import os
import re
import shutil
import subprocess
import sys
import threading
import time

import pytest
from conftest import HARRY, HERE, TOKEN, call, execute, fill, locked, until
from test_docs import (
    API,
    DEPLOY,
    OPERATE,
    PAGES,
    ask,
    blocks,
    free_port,
    listens,
    needs,
    needs_bash,
    plain,
    running,
    section,
    serving,
)

import profiler

DATABASES, MOVE_IN = PAGES["docs/databases.md"], PAGES["docs/move-in.md"]
SKIPPED_IDS = 1_000_000
# The rating of the unit by systemd 252, times ten.
MAX_EXPOSURE = 11
LITESTREAM = shutil.which("litestream") or shutil.which(
    "litestream", path=os.path.dirname(sys.executable)
)


def replace(text, replacements):
    """Replace each key of a dict. Each must occur."""
    for old, new in replacements.items():
        assert old in text, old
        text = text.replace(old, str(new))
    return text


def run_script(script, folder, **environ):
    """Run a shell script in a folder, with this Python as python3. Return what it prints."""
    script = f'python3() {{ "$PYTHON" "$@"; }}\n{script}'
    output = subprocess.run(
        ["bash", "-euc", script],
        cwd=folder,
        env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(HERE), **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    assert output.returncode == 0, output.stdout
    return output.stdout


def create(port, name):
    """Create a user. Return the status and the id, if there is one."""
    fields = {**HARRY, "email": f"{name}@example.com"}
    status, _, body = ask(f"http://127.0.0.1:{port}/users/", "POST", fields)
    return status, json.loads(body).get("id")


def emails(port):
    users = json.loads(ask(f"http://127.0.0.1:{port}/users/")[2])
    return {user["email"] for user in users}


# -- backup and restore ----------------------------------------------------------------


@needs_bash
def test_check_of_a_backup_notices_a_damaged_copy(tmp_path):
    [_, console] = blocks(section(OPERATE, "Back up"), "console")
    commands = "\n".join(re.findall(r"^\$ (.*)$", console, re.MULTILINE))
    fill(tmp_path / "db.sqlite3", 500)
    profiler.main(
        ["--database", str(tmp_path / "db.sqlite3"), "backup", str(tmp_path / "copy.sqlite3")]
    )
    assert run_script(commands, tmp_path) == "(500,)\n('ok',)\n"
    with open(tmp_path / "copy.sqlite3", "r+b") as file:
        file.seek(4 * 4096 + 8)  # in the fifth page
        file.write(bytes(100))
    assert "ok" not in run_script(f"({commands}) || true", tmp_path)


def restore_script(folder, backups):
    """Return the commands of the section Restore, without those for systemd."""
    [script] = blocks(section(OPERATE, "Restore"), "sh")
    script = replace(script, {"/var/lib/profiler": folder, "/srv/backup": backups})
    lines = script.splitlines()
    assert [line for line in lines if line.startswith("systemctl ")] == [lines[0], lines[-1]]
    return "\n".join(lines[1:-1])


@needs_bash
@pytest.mark.parametrize("count", [0, 3])
def test_ids_are_not_given_again_after_a_restore(tmp_path, count):
    folder, backups = tmp_path / "lib", tmp_path / "backup"
    folder.mkdir()
    backups.mkdir()
    fill(backups / "users-2026-11-27.sqlite3", count)
    fill(folder / "db.sqlite3", 9)
    run_script(restore_script(folder, backups), tmp_path)
    with contextlib.closing(profiler.create_app(folder / "db.sqlite3", iterations=1)) as restored:
        assert call(restored, "POST", fields=HARRY).json == {"id": SKIPPED_IDS + count + 1}


def test_ids_are_skipped_in_the_same_way_while_the_service_runs():
    [stopped] = blocks(section(OPERATE, "Restore"), "sh")
    [running] = blocks(section(OPERATE, "Restore while the service runs"), "sh")
    [statements] = re.findall(r"^with .*?\"$", stopped, re.MULTILINE | re.DOTALL)
    assert statements.replace("db.sqlite3", "new.sqlite3") in running


@needs_bash
def test_users_are_restored_while_the_service_runs(tmp_path):
    """Clients meanwhile get no other error than 503."""
    folder, backups = tmp_path / "lib", tmp_path / "backup"
    folder.mkdir()
    backups.mkdir()
    fill(backups / "users-2026-11-27.sqlite3", 2000)
    fill(folder / "db.sqlite3", 9)
    [script] = blocks(section(OPERATE, "Restore while the service runs"), "sh")
    paths = {"/var/lib/profiler": folder, "/srv/backup": backups, "/opt/profiler": HERE}
    done, statuses = threading.Event(), set()

    def use(port, number):
        for count in range(10_000):
            if done.is_set():
                break
            statuses.add(ask(f"http://127.0.0.1:{port}/users/{number}/")[0])
            statuses.add(create(port, f"new-{number}-{count}")[0])

    with serving(folder) as (port, _):
        clients = [threading.Thread(target=use, args=(port, number)) for number in (1, 2)]
        for client in clients:
            client.start()
        until(lambda: 201 in statuses)
        run_script(replace(script, paths), tmp_path)
        done.set()
        for client in clients:
            client.join()
        restored = json.loads(ask(f"http://127.0.0.1:{port}/users/")[2])
        old = [user for user in restored if user["id"] <= 2000]
        assert [user["id"] for user in old] == list(range(1, 2001))
        assert all(re.fullmatch("user[0-9]+@.*", user["email"]) for user in old)
        status, user_id = create(port, "last")
        assert (status, user_id > SKIPPED_IDS) == (201, True)
    assert {200, 201} <= statuses <= {200, 201, 503}
    [replaced] = folder.glob("replaced-*.sqlite3")
    assert execute(replaced, 'SELECT count(*) >= 10 FROM "user"') == [(1,)]
    assert not (folder / "new.sqlite3").exists()


@needs_bash
@pytest.mark.skipif(not LITESTREAM, reason="not installed: litestream")
def test_litestream_loses_only_the_last_seconds_before_a_crash(tmp_path):
    """The documentation says two seconds; a slow machine may need two more."""
    allowed_loss, seconds = 4, 6
    folder, backups = tmp_path / "lib", tmp_path / "backup"
    folder.mkdir()
    backups.mkdir()
    paths = {"/var/lib/profiler": folder, "/srv/backup": backups}
    text = section(OPERATE, "Continuous backup with Litestream")
    (tmp_path / "litestream.yml").write_text(replace(blocks(text, "yaml")[0], paths))
    [command] = re.findall("^ExecStart=(.*)$", blocks(text, "ini")[0], re.MULTILINE)
    replicate = [LITESTREAM, *command.split()[1:], "-config", str(tmp_path / "litestream.yml")]
    acknowledged, statuses = [], set()

    def write(port, number):
        with contextlib.suppress(OSError):  # when the service is killed
            for count in range(10_000):
                status, _ = create(port, f"{number}-{count}")
                statuses.add(status)
                acknowledged.append((time.monotonic(), f"{number}-{count}@example.com"))

    serve = [sys.executable, str(HERE / "profiler.py"), "--port", "0", "--no-access-log"]
    with (
        running(serve, folder) as service,
        running(replicate, tmp_path, log="litestream") as litestream,
    ):
        log = folder / "log"
        until(lambda: "Ctrl-C" in log.read_text() and list(backups.rglob("*.ltx")))
        port = int(re.search("^http://.*:([0-9]+)/", log.read_text())[1])
        clients = [threading.Thread(target=write, args=(port, number)) for number in (1, 2)]
        for client in clients:
            client.start()
        time.sleep(seconds)
        crash = time.monotonic()
        litestream.kill()
        service.kill()
        for client in clients:
            client.join()
    assert statuses == {201}
    [lines] = blocks(section(OPERATE, "Restore from Litestream"), "sh")
    lines = lines.replace("/srv/backup", str(backups)).replace(
        "litestream restore", f"{LITESTREAM} restore"
    )
    script = restore_script(folder, backups)
    script = re.sub("^mv .*\ncp .*$", lambda match: lines.rstrip(), script, flags=re.MULTILINE)
    run_script(script, tmp_path)
    assert (folder / "db.sqlite3").stat().st_mode & 0o777 == 0o600
    highest = execute(folder / "db.sqlite3", 'SELECT max(id) FROM "user"')[0][0]
    with serving(folder) as (port, _):
        restored = emails(port)
        assert create(port, "new") == (201, SKIPPED_IDS + highest + 1)
    early = {email for moment, email in acknowledged if moment < crash - allowed_loss}
    assert len(early) > 100
    assert early <= restored


def restore_on_server(server, dump, restore, statement, placeholder, count=2):
    """Run the documented commands: back up a database with some users, restore it into another
    one, and skip ids. Return the id of the next user."""
    profiler_sqlalchemy = pytest.importorskip("profiler_sqlalchemy")
    urls = [server.make_database(), server.make_database()]
    with contextlib.closing(profiler_sqlalchemy.create_app(urls[0], iterations=1)) as application:
        assert call(application).json == []  # which creates the table
        for number in range(count):
            fields = {**HARRY, "email": f"{number}@example.com"}
            assert call(application, "POST", fields=fields).status == 201
    for command, url in ((dump, urls[0]), (restore, urls[1])):
        environ = {
            "PATH": os.pathsep.join([os.environ["PATH"], *servers().FOLDERS]),
            "PROFILER_DATABASE": url,
        }
        run_script(placeholder(command, servers().database_of(url)), server.folder, **environ)
    server.execute(statement, servers().database_of(urls[1]))
    with contextlib.closing(profiler_sqlalchemy.create_app(urls[1], iterations=1)) as application:
        assert len(call(application).json) == count
        return call(application, "POST", fields=HARRY).json["id"]


def servers():
    return pytest.importorskip("servers", reason="psycopg or PyMySQL is not installed")


def lines_with(word, *texts):
    """Return the line of each text that contains a word."""
    return [re.search(rf"^.*{word}.*$", text, re.MULTILINE)[0] for text in texts]


@needs_bash
def test_ids_are_not_given_again_after_a_restore_on_postgresql():
    if reason := servers().missing("postgresql"):
        pytest.skip(reason)
    [backup] = blocks(section(DATABASES, "Back up"), "sh")
    [restore] = blocks(section(DATABASES, "Restore"), "sh")
    statement, _ = blocks(section(DATABASES, "Restore"), "sql")
    with servers().postgresql() as server:
        commands = lines_with("PROFILER_DATABASE", backup, restore)
        for count in (0, 2):
            next_id = restore_on_server(
                server, *commands, statement, lambda command, _: command, count
            )
            assert next_id == SKIPPED_IDS + count + 1


@needs_bash
def test_ids_are_not_given_again_after_a_restore_on_mariadb():
    if reason := servers().missing("mariadb"):
        pytest.skip(reason)
    [backup] = blocks(section(DATABASES, "Back up"), "sh")
    [restore] = blocks(section(DATABASES, "Restore"), "sh")
    _, statement = blocks(section(DATABASES, "Restore"), "sql")
    with servers().mariadb() as server:
        connection = f"-h 127.0.0.1 -P {server.port} -u app -p{servers().SECRET} --skip-ssl"

        def connect(command, database):
            return replace(command, {"-h db.example -u app -p app": f"{connection} {database}"})

        commands = lines_with("mariadb", backup, restore)
        next_id = restore_on_server(server, *commands, statement, connect)
    assert next_id == int(re.search("= ([0-9]+)", statement)[1]) > SKIPPED_IDS


# -- monitoring ------------------------------------------------------------------------


def test_update_without_a_field_shows_that_writes_fail(application, path, short_timeouts):
    """/health/ does not."""
    assert "`PATCH /users/1/` with `{}`" in section(OPERATE, "What to monitor")
    assert call(application, "POST", fields=HARRY).status == 201
    before = call(application, path="/users/1/").headers["ETag"]
    assert call(application, "PATCH", "/users/1/", fields={}).status == 200
    assert call(application, path="/users/1/").headers["ETag"] == before
    with locked(path):
        assert call(application, path="/health/").status == 200
        answer = call(application, "PATCH", "/users/1/", fields={})
    assert answer.status == 503
    assert "database is locked" in answer.errors
    assert "`database is locked`" in section(OPERATE, "Database errors")


@needs("fuser")
def test_process_that_locks_the_database_is_found(tmp_path):
    fill(tmp_path / "db.sqlite3", 1)
    [command] = blocks(section(OPERATE, "Database errors"), "sh")
    program = (
        "import sqlite3; connection = sqlite3.connect('db.sqlite3', isolation_level=None)\n"
        "connection.execute('BEGIN IMMEDIATE'); print('locked', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout.readline() == "locked\n"
        output = run_script(replace(command, {"/var/lib/profiler": tmp_path}), tmp_path)
        assert str(holder.pid) in output.split()
        holder.kill()
    assert execute(tmp_path / "db.sqlite3", 'SELECT count(*) FROM "user"') == [(1,)]


def test_names_and_searches_are_not_normalised_as_stated(application):
    assert "Names, emails and searches are not normalised (NFC)" in plain(API)
    composed, decomposed = "%C3%A9", "e%CC%81"
    assert call(application, "POST", fields={**HARRY, "first_name": "\u00e9"}).status == 201
    found = [
        len(call(application, QUERY_STRING=f"q={text}").json) for text in (composed, decomposed)
    ]
    assert found == [1, 0]


# -- deployment ------------------------------------------------------------------------


@pytest.fixture
def unit(tmp_path):
    """The systemd unit in a file, with a program that exists."""
    [text] = blocks(section(DEPLOY, "systemd"), "ini")
    file = tmp_path / "profiler.service"
    file.write_text(replace(text, {"/usr/bin/python3": sys.executable}))
    return file


@needs("systemd-analyze")
def test_systemd_unit_is_hardened(unit):
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager"]
    output = subprocess.run(
        [*command, f"--threshold={MAX_EXPOSURE}", unit], capture_output=True, text=True
    )
    if "unrecognized option" in output.stderr:
        pytest.skip("systemd is older than 250")
    assert output.returncode == 0, output.stdout
    assert f"shows {MAX_EXPOSURE / 10}" in section(DEPLOY, "systemd")


@needs("systemd-analyze")
def test_systemd_unit_has_no_unknown_setting(unit):
    command = ["systemd-analyze", "verify", "--man=no", unit]
    output = subprocess.run(command, capture_output=True, text=True)
    assert [line for line in output.stderr.splitlines() if str(unit) in line] == []


def healthcheck():
    """Return the Python program of the HEALTHCHECK in the Dockerfile."""
    [dockerfile] = blocks(section(DEPLOY, "Docker"), "dockerfile")
    [check] = re.findall(r"^HEALTHCHECK CMD (.*)$", dockerfile.replace("\\\n", ""), re.MULTILINE)
    return json.loads(check)[2]


@pytest.mark.parametrize("variable", ["PROFILER_PORT", "PORT"])
def test_health_check_of_the_dockerfile_asks_the_port_of_the_service(tmp_path, variable):
    with serving(tmp_path) as (port, _):
        for number, status in ((port, 0), (free_port(), 1)):
            environ = {**os.environ, variable: str(number)}
            output = subprocess.run(
                [sys.executable, "-c", healthcheck()], env=environ, capture_output=True
            )
            assert output.returncode == status


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may change the owner"
)
def test_data_folder_of_the_image_can_be_used_by_any_user_of_group_0(tmp_path):
    [dockerfile] = blocks(section(DEPLOY, "Docker"), "dockerfile")
    [command] = re.findall("^RUN (install .* /data)$", dockerfile, re.MULTILINE)
    run_script(replace(command, {"/data": tmp_path / "data"}), tmp_path)
    status = (tmp_path / "data").stat()
    assert (status.st_gid, status.st_mode & 0o777) == (0, 0o770)


@needs("caddy")
def test_caddy_forwards_requests_and_the_host(tmp_path):
    [text] = blocks(section(DEPLOY, "Caddy"), "caddyfile")
    front = free_port()
    with serving(tmp_path) as (port, _):
        addresses = {
            "accounts.example.com {": f"http://:{front} {{\nbind 127.0.0.1",
            "127.0.0.1:5000": f"127.0.0.1:{port}",
        }
        (tmp_path / "Caddyfile").write_text("{\nadmin off\n}\n" + replace(text, addresses))
        command = ["caddy", "run", "--config", "Caddyfile", "--adapter", "caddyfile"]
        with running(command, tmp_path, log="caddy", HOME=str(tmp_path)):
            until(lambda: listens(front))
            url = f"http://127.0.0.1:{front}/users/"
            assert ask(url, "POST", HARRY)[0] == 201
            assert ask(url, host="accounts.example.com")[0] == 421


@needs("haproxy")
def test_haproxy_opens_a_connection_for_each_request(tmp_path):
    clients, front = [], free_port()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            if self.path == "/users/":  # not a health check
                clients.append(self.client_address)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    [config] = blocks(section(DEPLOY, "haproxy"), "haproxy")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        addresses = {
            ":443 ssl crt /etc/ssl/accounts.pem": f"127.0.0.1:{front}",
            "127.0.0.1:5000": f"127.0.0.1:{server.server_port}",
        }
        (tmp_path / "haproxy.cfg").write_text(replace(config, addresses))
        with running(["haproxy", "-f", "haproxy.cfg"], tmp_path, log="haproxy"):
            until(lambda: listens(front))
            connection = http.client.HTTPConnection("127.0.0.1", front, timeout=10)
            with contextlib.closing(connection):
                for _ in range(2):
                    connection.request("GET", "/users/")
                    assert connection.getresponse().read() == b""
        server.shutdown()
    assert len(set(clients)) == 2


def test_every_command_for_gunicorn_starts_several_threads():
    commands = re.findall(
        r"^.*\bgunicorn .*:application.*$", "".join(PAGES.values()), re.MULTILINE
    )
    commands = [line for line in commands if line.startswith("PROFILER_")]
    assert len(commands) >= 3
    assert all(int(re.search("--threads ([0-9]+)", line)[1]) > 1 for line in commands)


# -- upgrade ---------------------------------------------------------------------------


def test_names_in_the_upgrade_from_1_2_0_exist(application):
    text = section(OPERATE, "Upgrade from 1.2.0")
    rows = re.findall(r"^\| (.*`.*) \| .*`app[.]([a-z_.]+).*` \|$", text, re.MULTILINE)
    assert len(rows) >= 4
    for old, path in rows:
        new = operator.attrgetter(path)(application)
        assert callable(new) or all(hasattr(new, name) for name in re.findall("`([a-z_]+)`", old))


@pytest.mark.parametrize(
    ("title", "statement"),
    [
        ("Upgrade from 1.2.0", f"at most {profiler.MAX_PASSWORD:,} characters"),
        ("Database errors", f"for {profiler.BUSY_TIMEOUT:.0f} seconds"),
    ],
)
def test_limits_are_those_of_the_module(title, statement):
    assert statement in plain(section(OPERATE, title))


# -- import ----------------------------------------------------------------------------


@pytest.fixture
def importer(tmp_path):
    """The helper of the import scripts in a file."""
    file = tmp_path / "profiler_import.py"
    file.write_text(blocks(MOVE_IN, "python")[0])
    return file


def test_import_ignores_http_proxy_white_space_and_the_case_of_digits(importer, tmp_path):
    (tmp_path / "import_csv.py").write_text(blocks(section(MOVE_IN, "CSV"), "python")[0])
    method, salt, digest = profiler.hash_password("s3cret", 1).split("$")
    (tmp_path / "users.csv").write_text(
        "id,first_name,last_name,email,password,password_hash\n"
        f"7, Jo,Bo\t,jo@example.com ,,{method}${salt}${digest.upper()} \n"
        "8,Al,Bo,al@example.com, with spaces ,\n"
    )
    with serving(tmp_path, PROFILER_TOKEN=TOKEN) as (port, _):
        environ = {
            **os.environ,
            "http_proxy": "http://127.0.0.1:9",
            "PROFILER_URL": f"http://127.0.0.1:{port}",
            "PROFILER_TOKEN": TOKEN,
        }
        for name in ("no_proxy", "NO_PROXY"):
            environ.pop(name, None)
        output = subprocess.run(
            [sys.executable, "import_csv.py"],
            cwd=tmp_path,
            env=environ,
            capture_output=True,
            text=True,
        )
        assert (output.stdout, output.stderr) == ("7,1\n8,2\n", "")
        url = f"http://127.0.0.1:{port}/users/"
        jo = json.loads(ask(f"{url}1/", token=TOKEN)[2])
        assert (jo["first_name"], jo["last_name"], jo["email"]) == ("Jo", "Bo", "jo@example.com")
        for email, password in (("jo", "s3cret"), ("al", " with spaces ")):
            fields = {"email": f"{email}@example.com", "password": password}
            assert ask(f"{url}verify/", "POST", fields, TOKEN)[0] == 200


def test_import_reports_a_user_without_a_value(importer, capsys):
    namespace = {}
    exec(importer.read_text(), namespace)
    namespace["post"] = lambda fields: (400, {"error": f"email must be a string: {fields}"})
    namespace["import_user"](7, first_name="Jo", email=None, password=" x ")
    error = "email must be a string: {'first_name': 'Jo', 'email': None, 'password': ' x '}"
    assert capsys.readouterr() == ("", f"7,None,{error}\n")


# -- continuous integration ------------------------------------------------------------


WORKFLOW = HERE / ".github/workflows/ci.yml"


@pytest.mark.skipif(not WORKFLOW.exists(), reason="not in an sdist")
def test_workflow_runs_files_that_exist_on_all_versions_of_python():
    workflow = WORKFLOW.read_text("utf-8")
    files = re.findall(r"\b(?:tests/)?test_\w+[.]py", workflow)
    assert len(files) >= 6
    assert all((HERE / name).exists() for name in [*files, ".ci/run"])
    [versions] = re.findall("^ *python: (.*)$", workflow, re.MULTILINE)
    minors = [int(minor) for minor in re.findall('"3[.]([0-9]+)"', versions)]
    project = (HERE / "pyproject.toml").read_text("utf-8")
    oldest = int(re.search('^requires-python = ">=3[.]([0-9]+)"$', project, re.MULTILINE)[1])
    assert minors == list(range(oldest, 15))
