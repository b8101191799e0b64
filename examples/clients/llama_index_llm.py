"""LlamaIndex: `OpenAILike` as a chat model, held to a pydantic model, and as a completion model of a task.

Where a server listens: PRAD_API_URL; one of its tasks: PRAD_TASK; a key, if it asks for one: PRAD_API_KEY.
"""

import os
from typing import Literal

import httpx
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

URL = os.environ.get("PRAD_API_URL", "http://127.0.0.1:8000")
KEY = os.environ.get("PRAD_API_KEY", "none")
TASK = os.environ.get("PRAD_TASK", "sentiment")


class Review(BaseModel):
    good: bool
    stars: Literal[1, 2, 3, 4, 5]


def main() -> None:
    listed = httpx.get(f"{URL}/v1/models", headers={"authorization": f"Bearer {KEY}"}, trust_env=False)
    plain = listed.json()["data"][0]["id"]
    where = {"api_base": f"{URL}/v1", "api_key": KEY, "max_tokens": 8, "temperature": 0}
    chat = OpenAILike(model=plain, is_chat_model=True, **where)
    messages = [ChatMessage(role="user", content="Name a colour.")]
    whole = chat.chat(messages)
    streamed = "".join(chunk.delta or "" for chunk in chat.stream_chat(messages))
    assert streamed == whole.message.content
    print("chat, whole and streamed:", repr(streamed))
    judge = PromptTemplate("Judge: {text}")
    longer = OpenAILike(
        model=plain, is_chat_model=True, should_use_structured_outputs=True, **where | {"max_tokens": 64}
    )
    print("a pydantic model:", longer.structured_predict(Review, judge, text="a gripping film"))
    task = OpenAILike(model=TASK, is_chat_model=False, **where)
    print("completion of a task:", repr(task.complete("a fine film").text))


if __name__ == "__main__":
    main()
