"""The page of `phisight serve` in a real browser: headless Chromium, driven by its DevTools protocol over two pipes."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest

SECONDS = 60.0


class Browser:
    """Chromium, its commands and what it reports. https://chromedevtools.github.io/devtools-protocol/"""

    def __init__(self, profile: Path) -> None:
        to_read, self._to = os.pipe()
        self._from, to_write = os.pipe()

        def pipes() -> None:  # the protocol's pipes are file descriptors 3 and 4
            read, write = os.dup(to_read), os.dup(to_write)
            os.dup2(read, 3)
            os.dup2(write, 4)

        flags = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe")
        self._process = subprocess.Popen(
            ["chromium", *flags, f"--user-data-dir={profile}", "about:blank"],
            preexec_fn=pipes,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self._answers: dict[int, queue.Queue[dict[str, Any]]] = {}
        self._count = 0
        self.events: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read, args=(os.fdopen(self._from, "rb"),), daemon=True)
        self._reader.start()

    def _read(self, pipe: BinaryIO) -> None:
        held = b""
        while piece := pipe.read1(1 << 16):  # type: ignore[attr-defined]
            *whole, held = (held + piece).split(b"\0")
            for document in map(json.loads, whole):
                if "id" in document:
                    self._answers[document["id"]].put(document)
                else:
                    self.events.append(document)
        pipe.close()

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        self._count += 1
        number = self._count
        self._answers[number] = queue.Queue()
        command = {"id": number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self._to, json.dumps(command).encode() + b"\0")
        answer = self._answers[number].get(timeout=SECONDS)
        assert "error" not in answer, answer
        return dict(answer["result"])

    def open(self, url: str, width: int = 1200, height: int = 850) -> Tab:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = Tab(self, session)
        for domain in ("Page", "Runtime", "Network", "Log", "DOM"):
            tab.call(f"{domain}.enable")
        tab.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        tab.call("Page.navigate", url=url)
        return tab

    def close(self) -> None:
        self.call("Browser.close")
        self._process.wait(timeout=SECONDS)
        os.close(self._to)


class Tab:
    """One page. `js` evaluates an expression there, promises awaited."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self.session = browser, session

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.call(method, self.session, **params)

    def js(self, expression: str) -> Any:
        told = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def until(self, expression: str) -> Any:
        end = time.monotonic() + SECONDS
        while not (value := self.js(expression)):
            assert time.monotonic() < end, (expression, self.js("document.body.innerText"))
            time.sleep(0.05)
        return value

    def add(self, *files: Path) -> None:
        """Pick files as a person does, and wait until each is priced or known to be unreadable."""
        before = self.js("document.querySelectorAll('.chip').length")
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector="#files")["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])
        self.until(
            f"document.querySelectorAll('.chip').length === {before + len(files)} && "
            "![...document.querySelectorAll('.chip')].some(chip => chip.innerText.includes('reading'))"
        )

    def key(self, key: str, modifiers: int = 0) -> None:
        code = {"Tab": 9, "Enter": 13, "Escape": 27}[key]
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
            self.call(
                "Input.dispatchKeyEvent",
                **{"type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": modifiers} | text,
            )

    def type(self, text: str) -> None:
        self.js("document.getElementById('question').focus()")
        self.call("Input.insertText", text=text)

    def ask(self, text: str) -> str:
        """Type, send, and wait for the answer's text."""
        before = self.js("document.querySelectorAll('.assistant').length")
        self.type(text)
        self.key("Enter")
        self.until(
            f"document.querySelectorAll('.assistant').length > {before} && document.getElementById('stop').hidden"
        )
        return str(self.js("[...document.querySelectorAll('.assistant .answer')].at(-1).innerText"))

    @property
    def wrong(self) -> list[str]:
        """What the console and the security policy complained about, but for what tests provoke: a refused request."""
        mine = [event for event in self._browser.events if event.get("sessionId") == self.session]
        told = [json.dumps(event["params"]) for event in mine if event["method"] == "Runtime.exceptionThrown"]
        told += [
            json.dumps(event["params"]["entry"])
            for event in mine
            if event["method"] == "Log.entryAdded" and "status of 4" not in event["params"]["entry"]["text"]
        ]
        calls = [event["params"] for event in mine if event["method"] == "Runtime.consoleAPICalled"]
        return told + [json.dumps(call) for call in calls if call["type"] in ("error", "warning", "assert")]

    @property
    def requested(self) -> list[str]:
        mine = [event for event in self._browser.events if event.get("sessionId") == self.session]
        return [event["params"]["request"]["url"] for event in mine if event["method"] == "Network.requestWillBeSent"]


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def served(serve: Callable[..., Any]) -> Any:
    """Its answers are drawn greedily, so that they are the same each time."""
    served = serve()
    service = served.server.service
    service._defaults = replace(service._defaults, temperature=0.0)
    return served


@pytest.fixture
def open_tab(browser: Browser, served: Any) -> Iterator[Callable[..., Tab]]:
    """Tabs of the page that end without complaint and have asked no other host for anything."""
    tabs: list[Tab] = []

    def opened(url: str = served.url, **size: int) -> Tab:
        tab = browser.open(url, **size)
        tabs.append(tab)
        tab.until("document.getElementById('model')?.innerText === 'demo' || document.querySelector('dialog')?.open")
        return tab

    yield opened
    for tab in tabs:
        assert tab.wrong == []
        assert tab.requested
        assert all(url.startswith(("http://127.0.0.1:", "data:", "blob:")) for url in tab.requested), tab.requested
        tab.call("Page.close")
