"""`litellm` as a library: chats and completions as of OpenAI, messages as of Anthropic, streams, a pydantic
model, a tool.

Where a server listens: PRAD_API_URL; one of its tasks: PRAD_TASK; a key, if it asks for one: PRAD_API_KEY.
"""

import json
import os
from typing import Literal

import httpx
import litellm
from pydantic import BaseModel

URL = os.environ.get("PRAD_API_URL", "http://127.0.0.1:8000")
KEY = os.environ.get("PRAD_API_KEY", "none")
TASK = os.environ.get("PRAD_TASK", "sentiment")
MESSAGES = [{"role": "user", "content": "Name a colour."}]
SYSTEM = [{"role": "system", "content": "Be brief."}]
CITY = {"type": "string", "enum": ["Oslo", "Bergen"]}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": CITY},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


class Review(BaseModel):
    good: bool
    stars: Literal[1, 2, 3, 4, 5]


def main() -> None:
    listed = httpx.get(f"{URL}/v1/models", headers={"authorization": f"Bearer {KEY}"}, trust_env=False)
    plain = f"openai/{listed.json()['data'][0]['id']}"
    where = {"api_base": f"{URL}/v1", "api_key": KEY, "max_tokens": 8, "temperature": 0}
    whole = litellm.completion(model=plain, messages=MESSAGES, **where)
    stream = litellm.completion(model=plain, messages=MESSAGES, stream=True, **where)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert streamed == whole.choices[0].message.content
    print("chat, whole and streamed:", repr(streamed))
    longer = where | {"max_tokens": 128}
    reviewed = litellm.completion(model=plain, messages=MESSAGES, response_format=Review, **longer)
    print("a pydantic model:", Review.model_validate_json(reviewed.choices[0].message.content))
    tools(plain, longer)
    task = litellm.text_completion(model=f"text-completion-openai/{TASK}", prompt="a fine film", **where)
    print("completion of a task:", repr(task.choices[0].text))
    told = litellm.completion(model=f"openai/{TASK}", messages=[*SYSTEM, *MESSAGES], **where)
    print("a task with a system message:", repr(told.choices[0].message.content))
    anthropic = f"anthropic/{plain.removeprefix('openai/')}"
    message = litellm.completion(model=anthropic, messages=MESSAGES, **where | {"api_base": URL})
    assert message.choices[0].message.content == whole.choices[0].message.content
    print("the chat by Anthropic's messages:", repr(message.choices[0].message.content))
    try:
        litellm.embedding(model=plain, input=["x"], api_base=f"{URL}/v1", api_key=KEY)
    except litellm.BadRequestError as error:
        print("an embedding:", error.message)


def tools(plain: str, where: dict[str, object]) -> None:
    wanted = {"type": "function", "function": {"name": "weather"}}
    asked = {"model": plain, "messages": MESSAGES, "tools": [WEATHER], "tool_choice": wanted, **where}
    try:
        answer = litellm.completion(**asked).choices[0]
    except litellm.BadRequestError as error:
        if "tools" not in error.message:
            raise
        print("a tool: this model's chat template has none, so that is refused")
        return
    (called, *_) = answer.message.tool_calls
    assert json.loads(called.function.arguments)["city"] in CITY["enum"]
    print("a tool:", called.function.name, called.function.arguments, answer.finish_reason)


if __name__ == "__main__":
    main()
