"""Make page.png: the page as a browser shows it, light, of a service that this program starts and fills.

Needs Selenium, Chromium and its driver: `python bench/screenshot.py`.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Iterator

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import profiler  # noqa: E402  # the one beside this folder

WIDTH, HEIGHT = 1120, 700  # pixels
NAMES = """Harry Potter, Hermione Granger, Ron Weasley, Neville Longbottom, Ginny Weasley, Luna Lovegood, Draco Malfoy,
Cedric Diggory, Minerva McGonagall"""


@contextlib.contextmanager
def serve(folder: str) -> Iterator[str]:
    """Serve an empty database on any port; yield the address."""
    application = profiler.create_app(f"{folder}/db.sqlite3", iterations=1)
    with contextlib.closing(application), profiler.Server("127.0.0.1", 0, application, access_log=False) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def fill(address: str) -> None:
    """Create the users, over HTTP as anybody would."""
    for name in NAMES.split(","):
        first_name, last_name = name.split()
        email = f"{first_name}.{last_name}@example.com".lower()
        user = {"first_name": first_name, "last_name": last_name, "email": email, "password": "alohomora"}
        headers = {"Content-Type": "application/json"}
        urllib.request.urlopen(urllib.request.Request(f"{address}users/", json.dumps(user).encode(), headers)).close()


def main() -> None:
    """Start all that is needed, wait for the table, and take the picture."""
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(flag)
    service = webdriver.ChromeService("/usr/bin/chromedriver")
    with tempfile.TemporaryDirectory() as folder, serve(folder) as address:
        fill(address)
        with webdriver.Chrome(options=options, service=service) as browser:
            metrics = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1.25, "mobile": False}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            light = [{"name": "prefers-color-scheme", "value": "light"}]
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": light})
            browser.get(address)
            WebDriverWait(browser, 10).until(lambda _: browser.find_elements(By.CSS_SELECTOR, "tbody tr"))
            browser.save_screenshot(str(HERE / "page.png"))


if __name__ == "__main__":
    main()
