"""LangChain: chat and completion models of `langchain-openai`, asked, streamed, in a chain, held to a
pydantic model, with a tool.

Where a server listens: PRAD_API_URL; one of its tasks: PRAD_TASK; a key, if it asks for one: PRAD_API_KEY.
"""

import os
from typing import Literal

import httpx
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from openai import BadRequestError
from pydantic import BaseModel

URL = os.environ.get("PRAD_API_URL", "http://127.0.0.1:8000")
KEY = os.environ.get("PRAD_API_KEY", "none")
TASK = os.environ.get("PRAD_TASK", "sentiment")


class Review(BaseModel):
    good: bool
    stars: Literal[1, 2, 3, 4, 5]


@tool
def weather(city: Literal["Oslo", "Bergen"]) -> str:
    """The weather in a city."""
    return f"rain in {city}"


def main() -> None:
    listed = httpx.get(f"{URL}/v1/models", headers={"authorization": f"Bearer {KEY}"}, trust_env=False)
    plain = listed.json()["data"][0]["id"]
    where = {"base_url": f"{URL}/v1", "api_key": KEY, "max_tokens": 8, "temperature": 0}
    chat = ChatOpenAI(model=plain, **where)
    whole = chat.invoke("Name a colour.")
    streamed = "".join(str(chunk.content) for chunk in chat.stream("Name a colour."))
    assert streamed == whole.content
    print("chat, whole and streamed:", repr(streamed), whole.usage_metadata)
    prompt = ChatPromptTemplate.from_messages([("system", "Be brief."), ("user", "{ask}")])
    chain = prompt | chat | StrOutputParser()
    print("a chain, twice at once:", chain.batch([{"ask": "Name a colour."}, {"ask": "Name a town."}]))
    longer = ChatOpenAI(model=plain, **where | {"max_tokens": 128})
    print("a pydantic model:", longer.with_structured_output(Review).invoke("Judge: a gripping film."))
    tools(longer)
    newer = ChatOpenAI(model=plain, use_responses_api=True, **where)
    print("by the responses API:", repr(newer.invoke("Name a colour.").text))
    task = OpenAI(model=TASK, **where)
    print("completion of a task:", repr(task.invoke("a fine film")))
    told = (prompt | ChatOpenAI(model=TASK, **where)).invoke({"ask": "a fine film"})
    print("a task with a system message:", repr(told.content))


def tools(chat: ChatOpenAI) -> None:
    try:
        answer = chat.bind_tools([weather], tool_choice="weather", strict=True).invoke(
            "What is the weather in Oslo?"
        )
    except BadRequestError as error:
        if error.code != "tools_not_supported":
            raise
        print("a tool: this model's chat template has none, so that is refused")
        return
    (call, *_) = answer.tool_calls
    print("a tool:", call["args"], weather.invoke(call).content)


if __name__ == "__main__":
    main()
