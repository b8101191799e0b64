"""`litellm` as a library: chat and completions as OpenAI's, messages as Anthropic's, streams.

Where a server listens: PRAD_API_URL; one of its tasks: PRAD_TASK; a key, if it asks for one: PRAD_API_KEY.
"""

import os

import httpx
import litellm

URL = os.environ.get("PRAD_API_URL", "http://127.0.0.1:8000")
KEY = os.environ.get("PRAD_API_KEY", "none")
TASK = os.environ.get("PRAD_TASK", "sentiment")
MESSAGES = [{"role": "user", "content": "Name a colour."}]


def main() -> None:
    listed = httpx.get(f"{URL}/v1/models", headers={"authorization": f"Bearer {KEY}"}, trust_env=False)
    plain = listed.json()["data"][0]["id"]
    where = {"api_base": f"{URL}/v1", "api_key": KEY, "max_tokens": 8, "temperature": 0}
    whole = litellm.completion(model=f"openai/{plain}", messages=MESSAGES, **where)
    stream = litellm.completion(model=f"openai/{plain}", messages=MESSAGES, stream=True, **where)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert streamed == whole.choices[0].message.content
    print("chat, whole and streamed:", repr(streamed))
    task = litellm.text_completion(model=f"text-completion-openai/{TASK}", prompt="a fine film", **where)
    print("completion of a task:", repr(task.choices[0].text))
    where["api_base"] = URL
    message = litellm.completion(model=f"anthropic/{plain}", messages=MESSAGES, **where)
    assert message.choices[0].message.content == whole.choices[0].message.content
    print("the same by Anthropic's messages:", repr(message.choices[0].message.content))
    try:
        litellm.embedding(model=f"openai/{plain}", input=["x"], api_base=f"{URL}/v1", api_key=KEY)
    except litellm.BadRequestError as error:
        print("an embedding:", error.message)


if __name__ == "__main__":
    main()
