"""The registry's settings, read once at start: arguments, then PRAD_REGISTRY_* variables, then defaults."""

import ipaddress
from pathlib import Path
from typing import Annotated

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from prad.settings import ServiceSettings

MIB = 1 << 20


class RegistrySettings(ServiceSettings):
    """Set by flags of `prad registry`, or PRAD_REGISTRY_* in the environment; flags win."""

    model_config = SettingsConfigDict(
        env_prefix="PRAD_REGISTRY_", extra="forbid", frozen=True, use_attribute_docstrings=True
    )

    host: str = "127.0.0.1"
    """Address that the registry listens on."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8001
    """Port that the registry listens on."""
    data_dir: Path = Path("~/.local/share/prad/registry")
    """Where versions and their files are kept."""
    max_upload_mib: Annotated[int, Field(ge=1)] = 512
    """Largest adapter that can be pushed."""
    allow_local_paths: bool | None = None
    """May a push name a folder on the registry's machine? If not given: when bound to loopback."""
    max_wait_seconds: Annotated[float, Field(gt=0)] = 30.0
    """Longest wait for changes in one request."""
    max_waiters: Annotated[int, Field(ge=1)] = 256
    """Requests that may wait for changes at once."""
    shutdown_seconds: Annotated[int, Field(ge=1)] = 10
    """How long open requests may take when the registry stops."""
    log_level: str = "info"
    """debug, info, warning or error."""

    @property
    def folder(self) -> Path:
        return self.data_dir.expanduser().absolute()

    @property
    def max_upload_bytes(self) -> int:
        return self.max_upload_mib * MIB

    @property
    def local_paths_allowed(self) -> bool:
        return _is_loopback(self.host) if self.allow_local_paths is None else self.allow_local_paths


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
