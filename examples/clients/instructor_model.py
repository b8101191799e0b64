"""`instructor`: an answer as a pydantic model, by the schema that the server holds the model to.

Where a server listens: PRAD_API_URL; a key, if it asks for one: PRAD_API_KEY.
"""

import os

import instructor
import openai
from pydantic import BaseModel

URL = os.environ.get("PRAD_API_URL", "http://127.0.0.1:8000")
KEY = os.environ.get("PRAD_API_KEY", "none")


class Town(BaseModel):
    name: str
    large: bool


def main() -> None:
    plain = openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY).models.list().data[0].id
    client = instructor.from_openai(
        openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY), mode=instructor.Mode.JSON_SCHEMA
    )
    try:
        town = client.chat.completions.create(
            model=plain,
            messages=[{"role": "user", "content": "Describe a town."}],
            response_model=Town,
            max_tokens=64,
            max_retries=0,
        )
    except Exception as error:
        if "response_format" not in str(error):
            raise
        print("this server has no structured output:", error)
        return
    print("a town:", town)


if __name__ == "__main__":
    main()
