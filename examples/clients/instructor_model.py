"""`instructor`: an answer as a pydantic model, by the schema that the server holds the model to; and by a
tool, which is its own first choice, where the chat template of the model writes tools.

Where a server listens: PRAD_API_URL; a key, if it asks for one: PRAD_API_KEY.
"""

import os
from typing import Literal

import instructor
import openai
from pydantic import BaseModel, ConfigDict

URL = os.environ.get("PRAD_API_URL", "http://127.0.0.1:8000")
KEY = os.environ.get("PRAD_API_KEY", "none")


class Review(BaseModel):
    model_config = ConfigDict(extra="forbid")  # nothing beside, also in the schema of the tool

    good: bool
    stars: Literal[1, 2, 3, 4, 5]


def review(plain: str, mode: instructor.Mode) -> Review:
    client = instructor.from_openai(openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY), mode=mode)
    return client.chat.completions.create(
        model=plain,
        messages=[{"role": "user", "content": "Judge: a fine film."}],
        response_model=Review,
        max_tokens=90,
        max_retries=0,
    )


def main() -> None:
    plain = openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY).models.list().data[0].id
    print("by response_format:", review(plain, instructor.Mode.JSON_SCHEMA))
    try:
        print("by a tool:", review(plain, instructor.Mode.TOOLS))
    except Exception as error:
        if "tools_not_supported" not in str(error):
            raise
        print("by a tool: this model's chat template has none, so that is refused")


if __name__ == "__main__":
    main()
