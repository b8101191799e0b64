"""The registry's console: pages for people, rendered here, on the same calls as the API.

app         the pages' app: who may come in, what a refusal looks like, which headers all answers have
pages       what is looked at
actions     what is changed, each by the same call of `Registry` as in the API
playground  answers of a replica's API, passed on
evidence    what is known of a version before it is promoted
charts      live traffic as lines over time
rendering   templates, and how numbers and times are written
"""

from adapter_registry.console.app import create_console

__all__ = ["create_console"]
