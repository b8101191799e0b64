"""LangChain: a chat model and a completion model of `langchain-openai`, asked, streamed and in a chain.

Where a server listens: PRAD_API_URL; one of its tasks: PRAD_TASK; a key, if it asks for one: PRAD_API_KEY.
"""

import os

import httpx
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI, OpenAI

URL = os.environ.get("PRAD_API_URL", "http://127.0.0.1:8000")
KEY = os.environ.get("PRAD_API_KEY", "none")
TASK = os.environ.get("PRAD_TASK", "sentiment")


def main() -> None:
    listed = httpx.get(f"{URL}/v1/models", headers={"authorization": f"Bearer {KEY}"}, trust_env=False)
    plain = listed.json()["data"][0]["id"]
    where = {"base_url": f"{URL}/v1", "api_key": KEY, "max_tokens": 8, "temperature": 0}
    chat = ChatOpenAI(model=plain, **where)
    whole = chat.invoke("Name a colour.")
    streamed = "".join(str(chunk.content) for chunk in chat.stream("Name a colour."))
    assert streamed == whole.content
    print("chat, whole and streamed:", repr(streamed), whole.usage_metadata)
    chain = (
        ChatPromptTemplate.from_messages([("system", "Be brief."), ("user", "{ask}")])
        | chat
        | StrOutputParser()
    )
    print("a chain, twice at once:", chain.batch([{"ask": "Name a colour."}, {"ask": "Name a town."}]))
    newer = ChatOpenAI(model=plain, use_responses_api=True, **where)
    print("by the responses API:", repr(newer.invoke("Name a colour.").text))
    task = OpenAI(model=TASK, **where)
    print("completion of a task:", repr(task.invoke("a fine film")))


if __name__ == "__main__":
    main()
