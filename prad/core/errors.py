"""The root of every exception tree of ours: whatever is raised on purpose derives from it."""


class PradError(Exception):
    """Its message is for people: what was wrong, and what was expected."""
