"""`litellm`'s proxy in front of a server: an OpenAI client asks for a task by a name of the proxy's.

Starts `litellm` from beside this interpreter. Where a server listens: PRAD_API_URL; one of its tasks:
PRAD_TASK.
"""

import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import openai

URL = os.environ.get("PRAD_API_URL", "http://127.0.0.1:8000")
KEY = os.environ.get("PRAD_API_KEY", "none")
TASK = os.environ.get("PRAD_TASK", "sentiment")


def main() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    behind = {"model": f"openai/{TASK}", "api_base": f"{URL}/v1", "api_key": KEY}
    master = f"sk-{secrets.token_hex(32)}"  # the proxy does not start without one
    models = [{"model_name": "films", "litellm_params": behind}]
    config = {"model_list": models, "general_settings": {"master_key": master}}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
        command = [str(Path(sys.executable).with_name("litellm")), "--config", str(path), "--port", str(port)]
        with subprocess.Popen([*command, "--host", "127.0.0.1"]) as proxy:
            try:
                _ask(f"http://127.0.0.1:{port}", master, proxy)
            finally:
                proxy.terminate()


def _ask(url: str, key: str, proxy: "subprocess.Popen[bytes]") -> None:
    for _ in range(600):
        if proxy.poll() is not None:
            sys.exit("the proxy ended")
        try:
            if httpx.get(f"{url}/health/liveliness", trust_env=False).is_success:
                break
        except httpx.TransportError:
            time.sleep(0.2)
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key)
    asked = {"model": "films", "max_tokens": 8, "temperature": 0}
    messages = [{"role": "user", "content": "a fine film"}]
    whole = client.chat.completions.create(messages=messages, **asked)
    stream = client.chat.completions.create(messages=messages, stream=True, **asked)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert streamed == whole.choices[0].message.content
    print("a task through the proxy, whole and streamed:", repr(streamed))


if __name__ == "__main__":
    main()
