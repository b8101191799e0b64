"""The console's playground in a real Chromium: versions answer side by side, and over a file."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from playwright.sync_api import expect

from adapter_registry.settings import RegistrySettings


class _Api(BaseHTTPRequestHandler):
    """Answers as the API does, a token at a time; the key `secret` is asked for by the task `closed`."""

    def do_POST(self):
        wanted = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append((wanted, self.headers.get("authorization"), self.headers.get("cookie")))
        if wanted["model"] == "closed" and self.headers.get("authorization") != "Bearer secret":
            body = json.dumps({"error": {"message": "an API key is needed <b>here</b>"}}).encode()
            self.send_response(401)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            return
        task, _, version = wanted["model"].partition("@")
        self.send_response(200)
        self.send_header("x-prad-task", task)
        self.send_header("x-prad-version", version or "1")
        self.end_headers()
        said = ("bad",) if version == "2" and "dull" in wanted["prompt"] else ("<b>very", " good", "</b> é")
        for word in said:
            self._event({"choices": [{"text": word}]})
        self._event({"choices": [], "usage": {"completion_tokens": 3}})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, data):
        self.wfile.write(b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n")
        self.wfile.flush()

    def log_message(self, *_):
        pass


@contextmanager
def some_api():
    with ThreadingHTTPServer(("127.0.0.1", 0), _Api) as server:
        server.asked = []
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", server.asked
        finally:
            server.shutdown()
            thread.join()


def ask(console):
    """Again where an interface came up on this machine meanwhile: Chromium ends requests then."""
    while True:
        console.page.get_by_role("button", name="Ask both").click()
        expect(console.page.get_by_role("button", name="Stop")).to_be_disabled()
        if not [fault for fault in console.faults if "NETWORK_CHANGED" in fault]:
            return
        console.faults.clear()


@pytest.fixture
def playground(serving, data_dir, adapter, open_console):
    """With two versions of one task, and what the API was asked."""
    with (
        some_api() as (url, questions),
        serving(RegistrySettings(port=0, data_dir=data_dir, api_url=url, log_level="warning")) as registry,
    ):
        for seed in (1, 2):
            registry.verified(adapter(seed))
        console = open_console(registry.url)
        console.go("/playground?a=support&b=support@2")
        yield console, questions


def test_two_versions_answer_side_by_side(playground):
    console, questions = playground
    page = console.page
    page.get_by_label("Prompt").fill("how was it?")
    page.get_by_label("Tokens at most").fill("7")
    ask(console)
    for side, name in (("a", "support@1"), ("b", "support@2")):
        answer = page.locator(f"[data-answer={side}]")
        expect(answer.locator("[data-text]")).to_have_text("<b>very good</b> é")
        expect(answer.locator("[data-name]")).to_have_text(name)
        expect(answer.locator("[data-figures]")).to_contain_text("3 tokens")
    sent, key, cookie = questions[0]
    assert (sent["prompt"], sent["max_tokens"], sent["stream"]) == ("how was it?", 7, True)
    assert ("temperature" in sent, key, cookie) == (False, None, None)
    page.get_by_role("combobox", name="Left").fill("closed")
    page.get_by_role("combobox", name="Right").fill("")
    ask(console)
    left = page.locator("[data-answer=a]")
    expect(left.locator("[data-text]")).to_have_text("an API key is needed <b>here</b>")
    expect(page.locator("[data-answer=b]")).to_be_hidden()
    page.get_by_label("Tokens at most").evaluate("each => each.removeAttribute('max')")
    page.get_by_label("Tokens at most").fill("5000")
    ask(console)
    expect(left.locator("[data-text]")).to_contain_text("max_tokens: Input should be less than")
    page.get_by_label("Tokens at most").fill("")
    page.get_by_label("API key").fill("secret")
    ask(console)
    expect(left.locator("[data-text]")).to_have_text("<b>very good</b> é")
    assert questions[-1][1] == "Bearer secret"


def test_two_versions_are_compared_over_a_file(playground, tmp_path):
    good = {"completion": "<b>very good</b> é"}
    lines = [{"prompt": f"film {number}", **good} for number in range(7)]
    lines.append({"prompt": "a dull <i>film</i>", "completion": "bad"})
    file, broken = tmp_path / "prompts.jsonl", tmp_path / "broken.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n", encoding="utf-8")
    broken.write_text('{"prompt": "one"}\n{"text": "two"}\n', encoding="utf-8")
    console, questions = playground
    page = console.page
    page.locator("#prompts").set_input_files(broken)
    ask(console)
    expect(page.locator("#notice")).to_contain_text('Line 2: expected {"prompt": text}')
    assert questions == []
    page.locator("#prompts").set_input_files(file)
    ask(console)
    found = page.get_by_label("Comparison over a file")
    expect(found.locator("[data-summary]")).to_have_text(
        "8 of 8 prompts, 87.5 % answered alike; right: support 87.5 %, support@2 100 %"
    )
    assert [each.inner_text() for each in found.locator("tbody tr > *").all()] == [
        "a dull <i>film</i>",
        "<b>very good</b> é",
        "bad",
        "bad",
    ]
    assert len(questions) == 16
    assert {wanted["temperature"] for wanted, *_ in questions} == {0}
    page.get_by_role("combobox", name="Right").fill("closed")
    ask(console)
    expect(page.locator("#notice")).to_contain_text("closed: an API key is needed <b>here</b>")


def test_without_an_api_the_playground_says_what_to_set(support, console):
    console.go("/playground")
    expect(console.page.get_by_text("PRAD_REGISTRY_API_URL")).to_be_visible()
