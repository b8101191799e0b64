"""Adapter versions and routing: operators push and promote, prefill services follow and fetch.

For operators' programs: `from adapter_registry import RegistryClient`.
"""

from adapter_registry.client import RegistryClient

__all__ = ["RegistryClient"]
