"""What Open WebUI sends when the server is added as a connection: a list of models, and chats in its shape.

Where a server listens: PRAD_API_URL; a key, if it asks for one: PRAD_API_KEY. Its container is started
with OPENAI_API_BASE_URL=http://HOST:8000/v1 and OPENAI_API_KEY.
"""

import json
import os

import httpx

URL = os.environ.get("PRAD_API_URL", "http://127.0.0.1:8000")
KEY = os.environ.get("PRAD_API_KEY", "none")
HEADERS = {
    "authorization": f"Bearer {KEY}",
    "http-referer": "https://openwebui.com/",
    "x-title": "Open WebUI",
}


def main() -> None:
    with httpx.Client(base_url=URL, headers=HEADERS, timeout=600, trust_env=False) as client:
        models = [model["id"] for model in client.get("/v1/models").raise_for_status().json()["data"]]
        print("models:", models)
        messages = [{"role": "user", "content": "Name a colour."}]
        # a chat as its page sends it, parameters as they stand when nobody has set any
        asked = {"stream": True, "model": models[0], "messages": messages, "max_tokens": 8}
        said, _ = streamed(client, asked)
        print("a chat, streamed:", repr(said))
        # how it goes on, where the model is set to tell its usage
        messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "And another?"}]
        said, usage = streamed(client, asked | {"stream_options": {"include_usage": True}})
        print("its next turn:", repr(said), usage)
        # a title for it, asked in the background, in one piece
        title = {"model": models[0], "messages": messages[:1], "stream": False, "max_completion_tokens": 8}
        told = client.post("/v1/chat/completions", json=title).raise_for_status().json()
        print("a title:", repr(told["choices"][0]["message"]["content"]))


def streamed(client: httpx.Client, asked: dict[str, object]) -> tuple[str, object]:
    texts, usage = [], None
    with client.stream("POST", "/v1/chat/completions", json=asked) as response:
        assert response.is_success, response.read()
        for line in response.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                texts += [choice["delta"].get("content") or "" for choice in event["choices"]]
                usage = event.get("usage") or usage
    return "".join(texts), usage


if __name__ == "__main__":
    main()
