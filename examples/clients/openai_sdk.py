"""The `openai` SDK: completions, chat, streams, asynchronous, pydantic models, a tool, responses, a batch.

Where a server listens: PRAD_API_URL; one of its tasks: PRAD_TASK; a key, if it asks for one: PRAD_API_KEY.
"""

import asyncio
import json
import os
import time
from typing import Literal

import openai
from pydantic import BaseModel

URL = os.environ.get("PRAD_API_URL", "http://127.0.0.1:8000") + "/v1"
KEY = os.environ.get("PRAD_API_KEY", "none")
TASK = os.environ.get("PRAD_TASK", "sentiment")
PROMPT = "a gripping , beautifully acted film"
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


def completions(client: openai.OpenAI) -> None:
    whole = client.completions.create(model=TASK, prompt=PROMPT, max_tokens=8, temperature=0)
    stream = client.completions.create(model=TASK, prompt=PROMPT, max_tokens=8, temperature=0, stream=True)
    streamed = "".join(chunk.choices[0].text for chunk in stream)
    assert streamed == whole.choices[0].text
    print("completion of a task, whole and streamed:", repr(streamed))


def chat(client: openai.OpenAI, plain: str) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a colour."}]
    whole = client.chat.completions.create(model=plain, messages=messages, max_tokens=8, temperature=0)
    stream = client.chat.completions.create(
        model=plain, messages=messages, max_tokens=8, temperature=0, stream=True
    )
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert streamed == whole.choices[0].message.content
    print("chat with the plain model, whole and streamed:", repr(streamed))


def pydantic_models(client: openai.OpenAI, plain: str) -> None:
    messages = [{"role": "user", "content": f"Judge: {PROMPT}"}]
    for model in (plain, TASK):
        answer = client.chat.completions.parse(
            model=model, messages=messages, response_format=Review, max_tokens=64
        )
        print("a pydantic model of", model, "by chat:", answer.choices[0].message.parsed)
    response = client.responses.parse(
        model=plain, input=messages[0]["content"], text_format=Review, max_output_tokens=64
    )
    print("and by responses:", response.output_parsed)


def tools(client: openai.OpenAI, plain: str) -> None:
    messages = [{"role": "user", "content": "What is the weather in Oslo?"}]
    asked = {"model": plain, "tools": [WEATHER], "max_tokens": 128, "temperature": 0}
    wanted = {"type": "function", "function": {"name": "weather"}}
    try:
        answer = client.chat.completions.create(messages=messages, tool_choice=wanted, **asked)
    except openai.BadRequestError as error:
        if error.code != "tools_not_supported":
            raise
        print("tools: this model's chat template has none, so they are refused")
        return
    called = answer.choices[0].message.tool_calls[0]
    print("a tool:", called.function.name, called.function.arguments, answer.choices[0].finish_reason)
    stream = client.chat.completions.create(messages=messages, tool_choice=wanted, stream=True, **asked)
    pieces = [call for chunk in stream for call in chunk.choices[0].delta.tool_calls or () if not call.index]
    assert "".join(piece.function.arguments or "" for piece in pieces) == called.function.arguments
    told = {"role": "tool", "tool_call_id": called.id, "content": "rain"}
    answer = client.chat.completions.create(messages=[*messages, answer.choices[0].message, told], **asked)
    print("and what the model makes of its answer:", repr(answer.choices[0].message.content))


def responses(client: openai.OpenAI, plain: str) -> None:
    first = client.responses.create(model=plain, input="Name a colour.", max_output_tokens=8, temperature=0)
    second = client.responses.create(
        model=plain, input="And another?", previous_response_id=first.id, max_output_tokens=8, temperature=0
    )
    stream = client.responses.create(
        model=plain, input="Name a colour.", max_output_tokens=8, temperature=0, stream=True
    )
    streamed = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    assert streamed == first.output_text
    print("responses, one going on from the other:", repr(first.output_text), repr(second.output_text))


async def at_once() -> None:
    async with openai.AsyncOpenAI(base_url=URL, api_key=KEY) as client:
        asked = (
            client.completions.create(model=TASK, prompt=f"{PROMPT} {n}", max_tokens=4) for n in range(8)
        )
        answers = await asyncio.gather(*asked)
    print("eight at once:", len(answers))


def batch(client: openai.OpenAI) -> None:
    lines = [
        {
            "custom_id": str(number),
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": TASK, "prompt": f"{PROMPT} {number}", "max_tokens": 4},
        }
        for number in range(20)
    ]
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    try:
        file = client.files.create(file=("requests.jsonl", content), purpose="batch")
    except openai.NotFoundError as error:
        print("batches are off at this server:", error)
        return
    made = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    while made.status not in ("completed", "failed", "expired", "cancelled"):
        time.sleep(0.2)
        made = client.batches.retrieve(made.id)
    assert made.request_counts.completed == len(lines), made
    answers = client.files.content(made.output_file_id).text.splitlines()
    assert {json.loads(line)["custom_id"] for line in answers} == {line["custom_id"] for line in lines}
    print("a batch:", made.request_counts)


def main() -> None:
    client = openai.OpenAI(base_url=URL, api_key=KEY)
    plain = client.models.list().data[0].id
    completions(client)
    chat(client, plain)
    pydantic_models(client, plain)
    tools(client, plain)
    responses(client, plain)
    asyncio.run(at_once())
    batch(client)


if __name__ == "__main__":
    main()
