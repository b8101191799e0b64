"""Protocols of others over the one chat: Anthropic's messages, OpenAI's responses.

Each has a package of the same parts: requests (what a client may send, and the chat that it means), answers
(the chat's answer in the protocol's words, in one piece or as events), routes. So keys, limits, tasks, their
versions, metrics and refusals are the same everywhere.
"""

import prefill_service.api  # noqa: F401  the app takes what lies here into itself, so it goes first
