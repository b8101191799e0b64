"""What the settings of all services share: how the environment is read, who reaches an address."""

import logging
import re
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource

logger = logging.getLogger(__name__)

_SERVICE_LINK = re.compile(r"(tcp|udp|sctp)://", re.IGNORECASE)


class ServiceSettings(BaseSettings):
    """Values that are given win over the environment, that over defaults; there is nothing else.

    Where a Service of Kubernetes is called as a service is here, say `prad-prefill`, it puts
    PRAD_PREFILL_PORT=tcp://10.0.0.1:8000 into every container, as links of Docker do. That is an address to
    connect to and not a port to listen on: passed over, with a line in the log.
    """

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, _Environment(settings_cls)


class _Environment(EnvSettingsSource):
    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        value, key, is_complex = super().get_field_value(field, field_name)
        if field_name.endswith("port") and isinstance(value, str) and is_service_link(value):
            name = environment_name(self.settings_cls, field_name)
            logger.warning(
                "%s=%s is passed over: Kubernetes or Docker set it for a service of that name",
                name,
                value,
            )
            value = None
        return value, key, is_complex


def is_service_link(value: str) -> bool:
    """Whether it is an address that Kubernetes or Docker put into the environment, where a port is read."""
    return _SERVICE_LINK.match(value) is not None


def environment_name(kind: type[BaseSettings], field: str) -> str:
    """The variable that a field is read from."""
    return (kind.model_config.get("env_prefix", "") + field).upper()
