"""Compare the speed of two versions of profiler.py.

    git show v1.2.0:profiler.py >old.py
    python bench/compare.py old.py profiler.py [--rounds 15] [--seconds 1]

In a round, both versions do the same work, one after the other. The next round begins
with the other version. A ratio is the speed of the second version divided by that of the
first, so more than 1.00 means that the second version is faster. Ratios of CPU time
depend less on what else runs on the machine. Loads over HTTP need wrk.
"""

import argparse
import contextlib
import importlib.util
import pathlib
import statistics
import tempfile
import time

import psutil
from run import (
    call,
    copy_module,
    fill,
    gets,
    pages,
    puts,
    python,
    request,
    requests_per_second,
    say,
    serving,
    table,
)

USERS = 100_000
WORKS = {
    "one user": gets(USERS, 2000),
    "a page of 100": pages(USERS, 200),
    f"a list of {USERS:,}": lambda _: [request("GET", "/users/")],
    "an update": puts(USERS, 100),
}


def load_app(path, name, database):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.create_app(database)


def take_turns(rounds, measure):
    """Measure both versions in each round.

    `measure` takes the index of a version and the number of the round. It returns speeds.
    Return, for each speed, the speeds of the first version, and those of the second.
    """
    speeds = [], []
    for number in range(rounds):
        for version in (0, 1) if number % 2 else (1, 0):
            speeds[version].append(measure(version, number))
    return zip(*(zip(*each) for each in speeds))


def make_row(name, format_speed, speeds):
    first, second = speeds
    ratios = [new / old for old, new in zip(first, second)]
    return [
        name,
        format_speed(statistics.median(first)),
        format_speed(statistics.median(second)),
        f"{statistics.median(ratios):.2f}",
        f"{min(ratios):.2f} to {max(ratios):.2f}",
    ]


def compare_in_process(modules, folder, rounds):
    """Yield a row for the elapsed time, and one for the CPU time, of each kind of request."""
    apps = [
        load_app(module, f"version_{number}", fill(folder, f"process{number}", USERS))
        for number, module in enumerate(modules)
    ]
    for name, templates in WORKS.items():
        say(f"in process: {name}")

        def measure(version, number, templates=templates):
            chosen = templates(number)
            started, started_cpu = time.perf_counter(), time.process_time()
            for template in chosen:
                call(apps[version], template)
            elapsed = time.perf_counter() - started
            return len(chosen) / elapsed, len(chosen) / (time.process_time() - started_cpu)

        for version in range(2):
            measure(version, 0)
        elapsed, cpu = take_turns(rounds, measure)
        yield make_row(name, lambda speed: f"{1e6 / speed:,.1f} µs", elapsed)
        yield make_row(f"{name}, CPU time", lambda speed: f"{1e6 / speed:,.1f} µs", cpu)
    for app in apps:
        app.close()


def compare_http(modules, folder, rounds, seconds):
    """Yield a row for the rate, and one for the CPU time of the server, of each load."""
    database = fill(folder, "http", USERS)
    loads = [(connections, log) for log in (["--no-access-log"], []) for connections in (16, 256)]
    for connections, log in loads:
        name = f"one user, {connections} connections, {'no' if log else 'with'} access log"
        say(f"over HTTP: {name}")

        with contextlib.ExitStack() as stack:
            servers = [
                stack.enter_context(serving(python(module, "--port", "PORT", *log), database))
                for module in modules
            ]

            def measure(version, _, servers=servers, connections=connections):
                process, port = servers[version]
                started = sum(psutil.Process(process.pid).cpu_times()[:2])
                rate = requests_per_second(port, "/users/4711/", seconds, connections)
                cpu = sum(psutil.Process(process.pid).cpu_times()[:2]) - started
                return rate, rate * seconds / cpu

            for version in range(2):
                measure(version, 0)
            rate, cpu = take_turns(rounds, measure)
        yield make_row(name, lambda speed: f"{speed:,.0f} a second", rate)
        yield make_row(f"{name}, CPU time", lambda speed: f"{1e6 / speed:,.1f} µs", cpu)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs=2, type=pathlib.Path, metavar="MODULE")
    parser.add_argument(
        "--rounds", type=int, default=15, help="over HTTP; five times as many in process"
    )
    parser.add_argument("--seconds", type=int, default=1, help="of a load over HTTP")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        modules = [
            copy_module(module.resolve(), folder / str(number))
            for number, module in enumerate(arguments.modules)
        ]
        rows = [
            *compare_in_process(modules, folder, 5 * arguments.rounds),
            *compare_http(modules, folder, arguments.rounds, arguments.seconds),
        ]
    print(table(["", "first", "second", "ratio", "lowest and highest"], rows))


if __name__ == "__main__":
    main()
