"""The `anthropic` SDK: messages, whole and streamed, with a system prompt, and how many tokens they have.

Where a server listens: PRAD_API_URL; a key, if it asks for one: PRAD_API_KEY.
"""

import os

import anthropic
import httpx

URL = os.environ.get("PRAD_API_URL", "http://127.0.0.1:8000")
KEY = os.environ.get("PRAD_API_KEY", "none")


def main() -> None:
    listed = httpx.get(f"{URL}/v1/models", headers={"authorization": f"Bearer {KEY}"}, trust_env=False)
    plain = listed.json()["data"][0]["id"]
    client = anthropic.Anthropic(base_url=URL, api_key=KEY)
    messages = [{"role": "user", "content": "Name a colour."}]
    asked = {"model": plain, "max_tokens": 8, "system": "Be brief.", "messages": messages}
    asked["extra_body"] = {"temperature": 0}  # newer releases have no argument for it
    whole = client.messages.create(**asked)
    with client.messages.stream(**asked) as stream:
        text = "".join(stream.text_stream)
    assert text == whole.content[0].text
    print("a message, whole and streamed:", repr(text), whole.stop_reason)
    counted = client.messages.count_tokens(model=plain, system="Be brief.", messages=messages)
    assert counted.input_tokens == whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)
    print("tokens of the prompt:", counted.input_tokens)
    try:
        client.messages.create(**asked | {"model": "no-such-task"})
    except anthropic.NotFoundError as error:
        print("an unknown task:", error.body["error"]["message"])


if __name__ == "__main__":
    main()
