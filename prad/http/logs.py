"""What of a client's text may stand in a line of the log."""

import json

LOGGED_CHARACTERS = 300
"""Of every text in a line."""


def logged(text: str | None) -> str:
    """No text of a client's begins a line, or is long; "-" if there is none."""
    if text is None:
        return "-"
    return json.dumps(text if len(text) <= LOGGED_CHARACTERS else f"{text[:LOGGED_CHARACTERS]}…")
