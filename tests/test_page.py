"""The page of models/page in headless Chromium: the same text as on the command line, bit for bit,
and usable by all (axe-core).

    python3 -m pytest tests/test_page.py
        PAGE=required makes a missing browser or compiler a failure

Drives chromedriver by its HTTP interface. Without Chromium, chromedriver, and clang for WebAssembly
it is skipped; so is the check of accessibility without npm.
"""
import base64
import functools
import http.server
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import based
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

    def until(self, condition, *args, seconds=60):
        end = time.monotonic() + seconds
        while not self.script(condition, *args):
            assert time.monotonic() < end, (f"not within {seconds} s: {condition}\n"
                                            f"{self.script('return document.body.innerText')}")
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
def built(once):
    """The page."""
    need("clang for WebAssembly",
         shutil.which(os.environ.get("WASM_CC", "clang-14")) and shutil.which("wasm-ld"))

    def make(build):
        done = subprocess.run(["make", "-C", str(ROOT), "page", "run", f"MODEL={MODEL}",
                               f"BUILD={build}", "SOURCE_URL=https://example.org/?a=1&b=2"],
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return once("page", make)


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


@pytest.fixture(scope="module")
def chromium(driver, tmp_path_factory):
    place = tmp_path_factory.mktemp("chromium")
    b = Browser(driver, place / "profile", place)
    yield b
    b.close()


@pytest.fixture
def browser(chromium, tmp_path):
    """A new tab that knows nothing of those before it, and downloads into tmp_path."""
    new = chromium.ask("/window/new", {"type": "tab"})["handle"]
    chromium.ask("/window", method="DELETE")
    chromium.ask("/window", {"handle": new})
    chromium.ask("/window/rect", {"width": 1000, "height": 900})
    for command, parameters in (
            ("Storage.clearDataForOrigin", {"origin": "file://", "storageTypes": "all"}),
            ("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})):
        chromium.ask("/goog/cdp/execute", {"cmd": command, "params": parameters})
    chromium.complaints()                                           # those are others'
    return chromium


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


def native(prompt, *settings, model=MODEL):
    """Text and fingerprint of ./run, greedy if nothing else is said, to the end of the story."""
    done = subprocess.run([str(ROOT / "run"), str(model), "-n", "-1", "-v", "-i", prompt,
                           *(settings or ("-t", "0"))], capture_output=True)
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
        assert sorted(serve.asked) == ["/", "/based.wasm", "/model.bin", "/relaxed.wasm"]


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
    taken = "return c.memory.buffer.byteLength"
    browser.click("#tell")
    browser.until("return told > 9")
    memory = browser.script(taken)
    browser.until("return +document.getElementById('count').textContent.replace(',', '') > 3000")
    browser.click("#go")
    finish(browser)
    assert browser.text("#state") == before != ""
    assert browser.script(taken) == memory
    assert int(browser.text("#speed").replace(",", "")) > 0


DRAWN = "#temperature=0.9&penalty=1.2&seed=7"
AS_DRAWN = "-t", "0.9", "--repeat-penalty", "1.2"


def tell_some(browser):
    """Tells the beginning of a story; returns it and the number of tokens read."""
    browser.click("#tell")
    browser.until("return document.getElementById('story').textContent.length > 60")
    browser.click("#go")
    finish(browser)
    return browser.text("#story"), int(browser.text("#count"))


def tell_the_rest(browser):
    before = browser.text("#story")
    browser.type("#pace", "as")
    browser.click("#go")
    browser.until("return document.getElementById('story').textContent !== arguments[0]", before)
    finish(browser)
    return browser.text("#story")[len(before):].rstrip("\n")


def test_a_saved_memory_goes_on_here_and_on_the_command_line(built, browser, tmp_path):
    """Stop, save, reload the page, load, continue: with what was told before, the whole story."""
    page, state = (built / "based.html").as_uri(), tmp_path / "story.state"
    text, _ = native("Once upon a time", *AS_DRAWN, "-s", "7")
    browser.open(page + DRAWN)
    told, count = tell_some(browser)
    browser.click("#save")
    for _ in range(100):
        if state.exists():
            break
        time.sleep(0.05)
    browser.open(page)
    browser.script(f"location.hash = '{DRAWN}'")
    browser.type("#file", str(state))
    browser.until("return document.getElementById('count').textContent !== '0'")
    # The last token shown was not read before.
    assert int(browser.text("#count")) == count + 1
    rest = tell_the_rest(browser)
    assert told + rest == text
    done = subprocess.run([str(ROOT / "run"), str(MODEL), "--load", str(state), *AS_DRAWN,
                           "-n", "-1", "-q"], capture_output=True)
    assert done.stdout.decode().rstrip("\n") == rest, done.stderr
    data = bytearray(state.read_bytes())
    data[200] ^= 1
    state.write_bytes(data)
    browser.type("#file", str(state))
    browser.until("return !document.getElementById('failed').hidden")
    assert "story.state" in browser.text("#failed")


def test_what_is_kept_survives_the_page(built, browser):
    page = (built / "based.html").as_uri()
    browser.open(page + DRAWN)
    browser.click("#keep")
    told, count = tell_some(browser)
    browser.ask("/refresh", {})
    browser.until("return document.getElementById('count')?.textContent > 0")
    assert browser.text("#story") == told and int(browser.text("#count")) == count + 1
    assert told + tell_the_rest(browser) == native("Once upon a time", *AS_DRAWN, "-s", "7")[0]
    browser.click("#keep")
    browser.until("return document.getElementById('status').textContent === 'Forgotten'")
    browser.open(page)
    assert browser.text("#story") == "" and browser.text("#count") == "0"


def test_a_link_has_the_settings(built, browser):
    page = (built / "based.html").as_uri()
    browser.open(page + "#prompt=The+moon%26+%C3%AB&temperature=0.9&penalty=1.1&pace=0"
                 "&length=never")
    browser.click("#tell")
    finish(browser)
    seed = re.search(r"seed (\d+)", browser.text("#used")).group(1)
    told = browser.text("#story").rstrip("\n"), browser.text("#hash")
    browser.click("#share")
    browser.until("return document.getElementById('share').textContent !== 'Copy link'")
    link = browser.script("return location.href")
    assert f"seed={seed}" in link and "length=end" in link
    browser.ask("/url", {"url": "about:blank"})
    browser.open(link)
    browser.click("#tell")
    finish(browser)
    assert (browser.text("#story").rstrip("\n"), browser.text("#hash")) == told
    assert told == native("The moon& \u00eb", "-t", "0.9", "--repeat-penalty", "1.1", "-s", seed)


def recommend(path, temperature, penalty):
    """Gives a checkpoint recommended settings."""
    data = bytearray(path.read_bytes())
    flags, = struct.unpack_from("<I", data, 32)
    struct.pack_into("<I", data, 32, flags | 16)
    struct.pack_into("<ffIffI", data, 148, temperature, 1, 0, 0, penalty, 64)
    total = based.library().based_checksum(bytes(data[32:]), len(data) - 32)
    struct.pack_into("<Q", data, 24, total)
    path.write_bytes(data)


@pytest.mark.parametrize("relaxed", ["right", "wrong", "unknown"])
@pytest.mark.parametrize("dtype", ["q8", "q4"])
def test_another_model_is_opened_from_disk(built, browser, serve, tmp_path, dtype, relaxed):
    """Quantized weights have kernels of their own here, with relaxed dot products if the browser
    knows them and computes them rightly; settings are the recommended ones."""
    pages = shutil.copytree(built / "page", tmp_path / "page")
    if relaxed == "wrong":          # v128.bitselect instead of the dot product
        code = (pages / "relaxed.wasm").read_bytes()
        assert b"\xfd\x93\x02" in code
        (pages / "relaxed.wasm").write_bytes(code.replace(b"\xfd\x93\x02", b"\xfd\xd2\x00"))
    elif relaxed == "unknown":
        browser.ask("/goog/cdp/execute", {
            "cmd": "Page.addScriptToEvaluateOnNewDocument",
            "params": {"source": "WebAssembly.validate = () => false;"}})
    damaged, model = tmp_path / "damaged.bin", tmp_path / "model.bin"
    done = subprocess.run([sys.executable, str(ROOT / "export.py"), str(MODEL), str(model),
                           "--dtype", dtype], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    recommend(model, 0.65, 1.15)
    damaged.write_bytes(model.read_bytes()[:-1])
    browser.open(serve(pages))
    browser.type("#file", str(damaged))
    browser.until("return !document.getElementById('failed').hidden")
    assert "damaged.bin" in browser.text("#failed")
    tell_some(browser)                                              # the first is still there
    before = browser.text("#about")
    browser.type("#file", str(model))
    browser.until("return document.getElementById('about').textContent !== arguments[0]", before)
    browser.until("return document.getElementById('count').textContent === '0'")
    assert not browser.visible("#failed")
    assert browser.script("return faster") == (relaxed == "right")
    assert browser.text("#degrees").startswith("0.65") and browser.text("#against") == "1.15"
    browser.type("#seed", "5")
    browser.type("#pace", "as")
    browser.click("#tell")
    finish(browser)
    assert (browser.text("#story").rstrip("\n"), browser.text("#hash")) == native(
        "Once upon a time", "-s", "5", model=model)


def test_a_dropped_file_is_opened(built, browser):
    browser.open((built / "based.html").as_uri())
    browser.script("""
        const data = new DataTransfer();
        data.items.add(new File(["no model, no memory"], "junk.txt"));
        const event = { dataTransfer: data, bubbles: true };
        for (const type of ["dragover", "drop"])
            document.body.dispatchEvent(new DragEvent(type, event));""")
    browser.until("return !document.getElementById('failed').hidden")
    assert "junk.txt" in browser.text("#failed")


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


@pytest.fixture(scope="module")
def axe():
    place = ROOT / "build" / "npm"
    script = place / "node_modules" / "axe-core" / "axe.min.js"
    if not script.exists():
        need("npm", shutil.which("npm"))
        subprocess.run(["npm", "install", "--no-audit", "--no-fund", "--prefix", str(place),
                        "axe-core@4.14.1"], capture_output=True)
        need("axe-core", script.exists())
    return script.read_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(built, browser, axe, scheme):
    browser.ask("/goog/cdp/execute", {"cmd": "Emulation.setEmulatedMedia", "params": {
        "features": [{"name": "prefers-color-scheme", "value": scheme}]}})
    browser.open((built / "based.html").as_uri())
    browser.click("summary")
    for step in ("fresh", "told"):
        browser.script(axe)
        found = browser.ask("/execute/async", {"args": [], "script":
                            "axe.run().then(arguments[0], e => arguments[0](String(e)))"})
        assert found["passes"] and not [(v["id"], v["impact"], v["nodes"][0]["html"])
                                        for v in found["violations"]], step
        if step == "fresh":
            browser.click("summary")
            tell_some(browser)
    assert browser.script("return document.querySelector('details a').href"
                          ) == "https://example.org/?a=1&b=2"
    assert (ROOT / "LICENSE").read_text().strip() in browser.text("details pre")


def test_make_page_says_what_is_missing(tmp_path):
    done = subprocess.run(["make", "-C", str(ROOT), "page", "WASM_CC=no-such-compiler",
                           f"BUILD={tmp_path}"], capture_output=True, text=True)
    assert done.returncode and "apt-get install clang-14 lld wasi-libc" in done.stderr
