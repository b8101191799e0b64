"""The `anthropic` SDK: messages, whole and streamed, with a system prompt; how many tokens they have; a tool.

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
    tools(client, plain)
    try:
        client.messages.create(**asked | {"model": "no-such-task"})
    except anthropic.NotFoundError as error:
        print("an unknown task:", error.body["error"]["message"])


def tools(client: anthropic.Anthropic, plain: str) -> None:
    city = {"type": "string", "enum": ["Oslo", "Bergen"]}
    schema = {"type": "object", "properties": {"city": city}, "required": ["city"]}
    schema["additionalProperties"] = False
    messages = [{"role": "user", "content": "What is the weather in Oslo?"}]
    asked = {"model": plain, "max_tokens": 128, "messages": messages, "extra_body": {"temperature": 0}}
    asked |= {
        "tools": [{"name": "weather", "input_schema": schema}],
        "tool_choice": {"type": "tool", "name": "weather"},
    }
    try:
        whole = client.messages.create(**asked)
    except anthropic.BadRequestError as error:
        if error.body["error"]["code"] != "tools_not_supported":
            raise
        print("a tool: this model's chat template has none, so that is refused")
        return
    used = whole.content[-1]
    with client.messages.stream(**asked) as stream:
        assert stream.get_final_message().content[-1].input == used.input
    print("a tool, whole and streamed:", used.name, used.input, whole.stop_reason)


if __name__ == "__main__":
    main()
