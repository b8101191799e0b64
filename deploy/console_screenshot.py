"""`python -m deploy.console_screenshot [--all FOLDER]`: docs/console.png, of a stack with live traffic.

It starts the registry, decode and prefill with the default model, pushes the demo adapters, sends requests
for a few minutes, those for one task divided between two versions, one of them a shadow as well, and takes
pictures with the Chromium that is installed. With `--all` they go to a folder: every page, at a desk and on a
phone, light and dark.
"""

import itertools
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import httpx
import typer
from playwright.sync_api import Browser, sync_playwright

from adapter_registry.client import RegistryClient
from adapter_registry.probing import wait_probed
from local_stack.pushing import push_all
from local_stack.stack import Stack, answers, free_ports

ROOT = Path(__file__).parents[1]
ADAPTERS = ROOT / "examples" / "adapters"
PICTURE = ROOT / "docs" / "console.png"
TASK = "sentiment"
PROMPTS = {
    "e2e": "name[The Eagle], eatType[coffee shop], food[Japanese], priceRange[less than £20], near[{}]",
    "sentiment": "a gripping , beautifully acted film about {}",
    "tweet-sentiment": "so happy about {} today",
}
WORDS = ("Burger King", "a lighthouse keeper", "the sea", "nothing much", "my brother's dog", "rain")
PAGES = {
    "tasks": "/",
    "task": f"/tasks/{TASK}",
    "replicas": "/replicas",
    "log": "/log",
    "push": "/push?task=sentiment",
    "playground": f"/playground?a={TASK}@1&b={TASK}@2",
    "keys": "/keys",
}
SIZES = {"desk": (1280, 800), "phone": (390, 844)}
SHOWN = (1280, 860)
"""Of docs/console.png: down to the end of the first charts."""


def main(
    everything: Annotated[
        Path | None, typer.Option("--all", help="Pictures of all pages, into this folder.", file_okay=False)
    ] = None,
    seconds: Annotated[int, typer.Option(help="Of traffic before the pictures.", min=30)] = 600,
) -> None:
    """Take pictures of the console."""
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    if executable is None:
        sys.exit("there is no Chromium here (Debian: apt-get install chromium)")
    with tempfile.TemporaryDirectory() as folder, _stack(Path(folder)) as (registry, api):
        _prepare(registry, Path(folder))
        with _traffic(api):
            time.sleep(seconds)
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
                if everything is None:
                    _picture(browser, f"{registry}/console/tasks/{TASK}", PICTURE, SHOWN, "light")
                else:
                    _all(browser, registry, everything)
                browser.close()


@contextmanager
def _stack(folder: Path) -> Iterator[tuple[str, str]]:
    """URLs of the registry and of the API."""
    registry_port, decode_port, api_port = free_ports(3)
    registry, api = f"http://127.0.0.1:{registry_port}", f"http://127.0.0.1:{api_port}"
    with Stack(folder / "logs") as stack:
        kept = ["--data-dir", str(folder / "data"), "--api-url", api]
        stack.start("registry", ["--port", str(registry_port), *kept])
        stack.start("decode", ["--port", str(decode_port), "--threads", "1"])
        where = ["--decode", f"127.0.0.1:{decode_port}", "--registry", registry, "--port", str(api_port)]
        stack.start("prefill", [*where, "--threads", "1"])
        stack.wait_until(lambda: answers(f"{api}/ready"), "the stack")
        yield registry, api


def _prepare(registry: str, folder: Path) -> None:
    """Two versions of one task: the demo adapter, and the same with another description."""
    push_all(ADAPTERS, registry)
    again = folder / TASK
    shutil.copytree(ADAPTERS / TASK, again)
    record = (again / "prad.json").read_text(encoding="utf-8")
    changed = record.replace('"seed": 0', '"seed": 1')
    (again / "prad.json").write_text(changed, encoding="utf-8")
    with RegistryClient(registry, operator="ada@desk") as client:
        opened = [(path.name, path.open("rb")) for path in sorted(again.iterdir())]
        client.push(TASK, opened)
        for _, file in opened:
            file.close()
        wait_probed(client, TASK, 2, connect_seconds=60, probe_seconds=60)
        client.split(TASK, {1: 70, 2: 30})
        client.alias(TASK, "canary", 2)
        client.shadow(TASK, {2: 20.0})


@contextmanager
def _traffic(api: str) -> Iterator[None]:
    """Requests for all tasks, a few a second."""
    ended = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=api, timeout=60, trust_env=False) as client:
            for number in itertools.count():
                if ended.wait(0.35):
                    return
                task = tuple(PROMPTS)[(0, 1, 1, 2, 1)[number % 5]]
                prompt = PROMPTS[task].format(f"{WORDS[number % len(WORDS)]} {number % 17}")
                body = {"model": task, "prompt": prompt, "user": f"u{number % 50}", "max_tokens": 24}
                client.post("/v1/completions", json=body)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        yield
    finally:
        ended.set()
        asking.join()


def _all(browser: Browser, registry: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for (name, path), size, scheme in itertools.product(PAGES.items(), SIZES, ("light", "dark")):
        target = folder / f"{name}-{size}-{scheme}.png"
        _picture(browser, f"{registry}/console{path}", target, SIZES[size], scheme, whole=True)
    for size, scheme in itertools.product(SIZES, ("light", "dark")):
        target = folder / f"promote-{size}-{scheme}.png"
        _picture(browser, f"{registry}/console/tasks/{TASK}", target, SIZES[size], scheme, click="Promote …")


def _picture(
    browser: Browser,
    url: str,
    target: Path,
    size: tuple[int, int],
    scheme: str,
    *,
    whole: bool = False,
    click: str = "",
) -> None:
    width, height = size
    page = browser.new_page(
        viewport={"width": width, "height": height},
        color_scheme="dark" if scheme == "dark" else "light",
    )
    page.goto(url)
    page.wait_for_load_state("networkidle")
    if click:
        page.get_by_role("button", name=click).first.click()
        page.get_by_role("dialog").wait_for()
    if page.locator("#ask").count():
        page.get_by_label("Prompt").fill(PROMPTS[TASK].format("the sea"))
        page.get_by_role("button", name="Ask both").click()
        for side in ("a", "b"):
            page.locator(f"[data-answer={side}] [data-figures]", has_text="tokens").wait_for()
    page.wait_for_timeout(300)
    page.screenshot(path=str(target), full_page=whole)
    page.close()


if __name__ == "__main__":
    typer.run(main)
