"""The page of models/page in headless Chromium: the same text as on the command line, bit for bit.

    python3 -m pytest tests/test_page.py
        PAGE=required makes a missing browser or compiler a failure

Drives chromedriver by its HTTP interface. Without Chromium, chromedriver, and clang for WebAssembly
it is skipped.
"""
import base64
import functools
import http.server
import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "stories260K.bin"
# What the WebDriver standard calls a reference to an element.
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
HOME, END = "\ue011", "\ue010"
ARGUMENTS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync",
             "--disable-dev-shm-usage"]


def need(what, there):
    if not there:
        fail = os.environ.get("PAGE") == "required"
        (pytest.fail if fail else pytest.skip)(f"{what} is not here")


class Browser:
    """One window of Chromium."""

    def __init__(self, port, profile, downloads, size=(1000, 900)):
        self.base = f"http://127.0.0.1:{port}"
        options = {"args": [*ARGUMENTS, f"--user-data-dir={profile}",
                            f"--window-size={size[0]},{size[1]}"],
                   "binary": shutil.which("chromium") or shutil.which("google-chrome"),
                   "prefs": {"download.default_directory": str(downloads)}}
        capabilities = {"alwaysMatch": {"goog:chromeOptions": options,
                                        "goog:loggingPrefs": {"browser": "ALL"}}}
        self.base += "/session/" + self.ask("/session", {"capabilities": capabilities})["sessionId"]

    def ask(self, path, body=None, method=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data,
                                         {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as e:
            raise AssertionError(e.read().decode()) from None

    def open(self, url):
        self.ask("/url", {"url": url})
        self.until("return !document.getElementById('form').hidden || "
                   "!document.getElementById('failed').hidden")

    def script(self, text, *args):
        return self.ask("/execute/sync", {"script": text, "args": args})

    def until(self, condition, seconds=60):
        end = time.monotonic() + seconds
        while not self.script(condition):
            assert time.monotonic() < end, (f"not within {seconds} s: {condition}\n"
                                            f"{self.text('body')}")
            time.sleep(0.05)

    def find(self, css):
        return "/element/" + self.ask("/element", {"using": "css selector", "value": css})[ELEMENT]

    def click(self, css):
        self.ask(self.find(css) + "/click", {})

    def type(self, css, text):
        self.ask(self.find(css) + "/value", {"text": text})

    def text(self, css):
        return self.script("return document.querySelector(arguments[0]).textContent", css)

    def visible(self, css):
        return self.script("return document.querySelector(arguments[0]).checkVisibility()", css)

    def screenshot(self, path):
        Path(path).write_bytes(base64.b64decode(self.ask("/screenshot")))

    def complaints(self):
        return [entry["message"] for entry in self.ask("/se/log", {"type": "browser"})
                if entry["level"] in ("SEVERE", "WARNING")]

    def close(self):
        self.ask("", method="DELETE")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The page, in a folder of its own: other processes may run tests of this file, too."""
    need("clang for WebAssembly",
         shutil.which(os.environ.get("WASM_CC", "clang-14")) and shutil.which("wasm-ld"))
    build = tmp_path_factory.mktemp("build")
    done = subprocess.run(["make", "-C", str(ROOT), "page", "run", f"MODEL={MODEL}",
                           f"BUILD={build}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return build


@pytest.fixture(scope="module")
def driver():
    need("Chromium", shutil.which("chromium") or shutil.which("google-chrome"))
    need("chromedriver", shutil.which("chromedriver"))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL) as process:
        for _ in range(200):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/status", timeout=5).close()
                break
            except OSError:
                time.sleep(0.05)
        yield port
        process.terminate()


@pytest.fixture
def browser(driver, tmp_path):
    b = Browser(driver, tmp_path / "profile", tmp_path)
    yield b
    b.close()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        self.server.asked.append(self.path)


@pytest.fixture
def serve():
    """serve(directory) -> address; serve.asked lists the paths that were asked for."""
    servers = []

    def start(directory):
        handler = functools.partial(Quiet, directory=str(directory))
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.asked = start.asked
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/"
    start.asked = []
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def native(prompt, *more):
    """Text and fingerprint of ./run, greedy, to the end of the story."""
    done = subprocess.run([str(ROOT / "run"), str(MODEL), "-t", "0", "-n", "-1", "-v",
                           "-i", prompt, *more], capture_output=True)
    assert done.returncode == 0, done.stderr
    logits = re.search(rb"logits #\w+", done.stderr).group().decode()
    return done.stdout.decode().rstrip("\n"), logits


def coldest_and_fastest(b):
    b.type("#temperature", HOME)
    b.type("#pace", "as")
    assert b.script("return document.getElementById('temperature').value") == "0"
    assert b.script("return document.getElementById('pace').value") == "0"


def ask_for(b, prompt):
    b.ask(b.find("#prompt") + "/clear", {})
    b.type("#prompt", prompt)


def finish(b):
    b.until("return document.getElementById('go').textContent === 'Continue' && "
            "document.getElementById('status').textContent.startsWith('Stopped')")


@pytest.mark.parametrize("where", ["server", "file"])
@pytest.mark.parametrize("prompt", ["Once upon a time", "Zo\u00eb saw a \u2603!"])
def test_greedy_text_is_the_native_one(built, browser, serve, where, prompt):
    browser.open(serve(built / "page") if where == "server" else (built / "based.html").as_uri())
    coldest_and_fastest(browser)
    ask_for(browser, prompt)
    browser.click("#tell")
    finish(browser)
    text, logits = native(prompt)
    assert browser.text("#story").rstrip("\n") == text
    assert browser.text("#hash") == logits
    assert browser.complaints() == []
    if where == "server":
        assert sorted(serve.asked) == ["/", "/based.wasm", "/model.bin"]


def test_stop_and_continue_change_nothing(built, browser):
    browser.open((built / "based.html").as_uri())
    browser.type("#temperature", HOME)
    browser.click("#tell")
    browser.until("return document.getElementById('story').textContent.length > 60")
    browser.click("#go")
    finish(browser)
    count = browser.text("#count")
    time.sleep(0.3)
    assert browser.text("#count") == count
    assert len(browser.text("#story")) < 600
    coldest_and_fastest(browser)
    browser.click("#go")
    browser.until(f"return document.getElementById('count').textContent !== '{count}'")
    finish(browser)
    told = browser.text("#story").rstrip("\n"), browser.text("#hash")
    assert told == native("Once upon a time")


def test_telling_again_begins_anew(built, browser):
    browser.open((built / "based.html").as_uri())
    coldest_and_fastest(browser)
    for prompt in ("The big dog", "Once upon a time"):
        ask_for(browser, prompt + "\n")                             # Enter is as good as the button
        browser.until("return document.getElementById('count').textContent !== '0'")
        finish(browser)
        assert (browser.text("#story").rstrip("\n"), browser.text("#hash")) == native(prompt)


def test_endless_story_keeps_its_memory(built, browser):
    browser.open((built / "based.html").as_uri())
    coldest_and_fastest(browser)
    browser.type("#length", "endless")
    before = browser.text("#state")
    browser.click("#tell")
    browser.until("return +document.getElementById('count').textContent.replace(',', '') > 3000")
    browser.click("#go")
    finish(browser)
    assert browser.text("#state") == before != ""
    assert int(browser.text("#speed").replace(",", "")) > 0


def test_a_saved_memory_goes_on_here_and_on_the_command_line(built, browser, tmp_path):
    """Stop, save, reload the page, load, continue: with what was told before, the whole story."""
    page, state = (built / "based.html").as_uri(), tmp_path / "story.state"
    text, _ = native("Once upon a time")
    browser.open(page)
    browser.type("#temperature", HOME)
    browser.click("#tell")
    browser.until("return document.getElementById('story').textContent.length > 60")
    browser.click("#go")
    finish(browser)
    told, count = browser.text("#story"), browser.text("#count")
    browser.click("#save")
    for _ in range(100):
        if state.exists():
            break
        time.sleep(0.05)
    browser.open(page)
    coldest_and_fastest(browser)
    browser.type("#file", str(state))
    browser.until("return document.getElementById('count').textContent !== '0'")
    # The last token shown was not read before.
    assert int(browser.text("#count")) == int(count) + 1
    note = browser.text("#story")
    browser.click("#go")
    finish(browser)
    rest = browser.text("#story")[len(note):]
    assert (told + rest).rstrip("\n") == text
    done = subprocess.run([str(ROOT / "run"), str(MODEL), "--load", str(state), "-t", "0",
                           "-n", "-1", "-q"], capture_output=True)
    assert done.stdout.decode().rstrip("\n") == rest.rstrip("\n"), done.stderr
    data = bytearray(state.read_bytes())
    data[200] ^= 1
    state.write_bytes(data)
    browser.type("#file", str(state))
    browser.until("return !document.getElementById('failed').hidden")
    assert "story.state" in browser.text("#failed")


def test_a_damaged_model_is_refused(built, browser, serve, tmp_path):
    site = tmp_path / "site"
    shutil.copytree(built / "page", site)
    data = bytearray((site / "model.bin").read_bytes())
    data[len(data) // 2] ^= 1
    (site / "model.bin").write_bytes(data)
    browser.open(serve(site))
    assert browser.visible("#failed") and "damaged" in browser.text("#failed")
    assert not browser.visible("#form")
    (site / "model.bin").unlink()
    browser.open(serve(site))
    assert "404" in browser.text("#failed")


def test_it_fits_a_phone_and_every_control_has_a_name(built, browser):
    browser.ask("/window/rect", {"width": 500, "height": 800})
    browser.open((built / "based.html").as_uri())
    browser.click("#tell")
    browser.until("return document.getElementById('story').textContent.length > 40")
    # a frame of 360 pixels: headless windows are wider than phones
    overflow = browser.ask("/execute/async", {"args": [], "script": """
        const done = arguments[0], frame = document.createElement('iframe');
        frame.style.cssText = 'width: 360px; height: 700px; position: fixed; left: 0; top: 0';
        frame.srcdoc = document.documentElement.outerHTML.replace(/<script>[^]*?<\\/script>/g, '');
        frame.onload = () => { const d = frame.contentDocument.documentElement; """
        "done(d.scrollWidth - 360); };" """
        document.body.append(frame);"""})
    assert overflow <= 0
    controls = browser.ask("/elements", {
        "using": "css selector", "value": "main button, main select, main input, main textarea"})
    for control in controls:
        label = browser.ask(f"/element/{control[ELEMENT]}/computedlabel")
        assert label or not browser.ask(f"/element/{control[ELEMENT]}/displayed"), control
