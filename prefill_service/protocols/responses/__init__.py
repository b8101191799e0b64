"""OpenAI's responses: `/v1/responses`, and the answers that are kept so that a conversation goes on."""
