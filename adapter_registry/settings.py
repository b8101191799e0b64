"""The registry's settings, read once at start: arguments, then PRAD_REGISTRY_* variables, then defaults."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator
from pydantic_settings import SettingsConfigDict

from adapter_registry.sources.places import AllowedSources, Place, allowed_sources, names_folders, parse
from prad.core.host_names import is_loopback
from prad.settings import ServiceSettings

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Bounds:
    """retired_bytes: files of versions that answer nothing any more; free_bytes: of disk, below which nothing
    is pushed; wait_seconds: for replicas, until a new routing is in force there; task_versions, task_bytes:
    of a task, beside what is retired or failed."""

    retired_bytes: int
    free_bytes: int
    wait_seconds: float
    task_versions: int | None
    task_bytes: int | None


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
    """Where versions and their files are kept; with a Redis, the files alone; with a bucket, copies of
    them."""
    files: str = ""
    """Bucket of an S3, or of what speaks like one, that keeps adapters' files: s3://BUCKET/FOLDER (the extra
    s3). Credentials and region are the environment's (AWS_ACCESS_KEY_ID and so on). If not given:
    data_dir."""
    files_endpoint: str | None = None
    """URL of the server of that bucket, such as http://127.0.0.1:9000. If not given: AWS_ENDPOINT_URL_S3, or
    AWS itself."""
    copies_mib: Annotated[int, Field(ge=1)] = 1024
    """Disk in data_dir for copies of files in the bucket; those used longest ago are deleted beyond it."""
    redis_url: Annotated[str | None, Field(repr=False)] = None
    """Redis that keeps versions and routing, which several registries may share: redis://, rediss:// (TLS)
    or unix://, with user and password; redis+sentinel://host:26379,host:26379/service/0, or
    redis+cluster://host:6379,host:6379. If not given: a file in data_dir, which one registry uses."""
    redis_replicas: Annotated[int, Field(ge=0)] = 0
    """Replicas of Redis that must have a change before it is acknowledged; with none connected there is no
    change then. 0: a failover (of sentinels, or in a cluster) may lose what was acknowledged last."""
    max_upload_mib: Annotated[int, Field(ge=1)] = 512
    """Largest adapter that can be pushed."""
    allow_local_paths: bool | None = None
    """May a push name any folder on the registry's machine? If not given: when bound to loopback, unless
    push_from has folders."""
    push_from: str = ""
    """Where a push by URI may fetch from, separated by commas: beginnings of URIs (file:///srv/adapters, hf://ORG,
    s3://BUCKET/FOLDER, oci://HOST/TEAM), and https://HOST where these may send the registry on to."""
    fetch_seconds: Annotated[float, Field(gt=0, le=3600)] = 120.0
    """Longest fetch of what a push names by its URI."""
    max_wait_seconds: Annotated[float, Field(gt=0)] = 30.0
    """Longest wait for changes in one request."""
    max_waiters: Annotated[int, Field(ge=1)] = 256
    """Requests that may wait for changes at once; connected prefill replicas keep their place beyond it."""
    max_waiters_per_client: Annotated[int, Field(ge=1)] = 64
    """Of those, requests of one address."""
    replicas_wait_seconds: Annotated[float, Field(ge=0, le=60)] = 5.0
    """How long a change of a routing waits until that is in force at all connected replicas."""
    replica_secret_file: Path | None = None
    """File with the secret that prefill replicas must show (their registry_secret_file); written if there is
    none. On loopback nobody needs one if not given; elsewhere the registry does not start without."""
    signing_keys: Path | None = None
    """File, or folder of files, with the public keys (Ed25519) of those who may sign: a push that none of
    them signed is refused. Read at every push. If not given, unsigned pushes are taken, and whoever signs."""
    admin_token_file: Path | None = None
    """File with a token of role admin, by which the first keys are made (`prad keys create`); written if
    there is none. Beyond loopback the registry does not start without, unless such a key was made before."""
    unprotected: bool = False
    """Start beyond loopback though whoever reaches the registry may do everything, as on loopback: until the
    first token of an operator is made. For where nobody else reaches it, as in a container."""
    allowed_hosts: str = ""
    """Further names that clients may call the registry by, separated by commas: a name, *.example.com for
    those below one, * for any. Addresses, and names without a dot, are always allowed."""
    console: bool = True
    """Serve pages for people at /console."""
    api_url: Annotated[str | None, Field(repr=False)] = None
    """URL of the completions API, such as http://127.0.0.1:8000, which the console's playground asks for
    whoever uses it; if not given, there is no playground."""
    task_versions: Annotated[int, Field(ge=1)] | None = None
    """Versions that a task may have beside retired and failed ones; a push of one more is refused. If not
    given: any number."""
    task_mib: Annotated[int, Field(ge=1)] | None = None
    """Their files' size, likewise."""
    retired_mib: Annotated[int, Field(ge=0)] = 1024
    """Disk for files of retired and failed versions; those that are so longest are deleted beyond it."""
    min_free_mib: Annotated[int, Field(ge=0)] = 64
    """Free disk below which pushes are refused, and the registry is not ready."""
    shutdown_seconds: Annotated[int, Field(ge=1)] = 10
    """How long open requests may take when the registry stops."""
    access_log: bool = False
    """Write a line to the log for every request, not only for those that fail."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Lines of this weight and above are written to the log."""

    @field_validator("push_from")
    @classmethod
    def _readable(cls, text: str) -> str:
        allowed_sources(text, any_folder=False)
        return text

    @field_validator("files")
    @classmethod
    def _is_bucket(cls, uri: str) -> str:
        if uri and not uri.startswith("s3://"):
            raise ValueError(
                f"{uri[:200]!r} is no bucket; expected s3://BUCKET/FOLDER, or nothing for data_dir"
            )
        if uri:
            parse(uri)
        return uri

    @field_validator("api_url", "files_endpoint")
    @classmethod
    def _can_be_asked(cls, url: str | None) -> str | None:
        if url is not None and not _is_address(url):
            shown = "what has a user or a password" if "@" in url else repr(url[:200])
            raise ValueError(
                f"{shown} is no address of a service; expected http:// or https:// with a host, "
                "such as http://127.0.0.1:8000, without user, password, ? and #"
            )
        return url

    @property
    def folder(self) -> Path:
        return self.data_dir.expanduser().absolute()

    @property
    def bucket(self) -> Place | None:
        """Where adapters' files lie, if not in `folder`."""
        return parse(self.files) if self.files else None

    @property
    def max_upload_bytes(self) -> int:
        return self.max_upload_mib * MIB

    @property
    def hosts(self) -> tuple[str, ...]:
        """Names that clients may call the registry by."""
        return (self.host, *(name.strip() for name in self.allowed_hosts.split(",") if name.strip()))

    @property
    def bounds(self) -> Bounds:
        return Bounds(
            retired_bytes=self.retired_mib * MIB,
            free_bytes=self.min_free_mib * MIB,
            wait_seconds=self.replicas_wait_seconds,
            task_versions=self.task_versions,
            task_bytes=None if self.task_mib is None else self.task_mib * MIB,
        )

    @property
    def on_loopback(self) -> bool:
        return is_loopback(self.host)

    @property
    def local_paths_allowed(self) -> bool:
        if self.allow_local_paths is None:
            return self.on_loopback and not names_folders(self.push_from)
        return self.allow_local_paths

    @property
    def sources(self) -> AllowedSources:
        return allowed_sources(self.push_from, any_folder=self.local_paths_allowed)


def _is_address(url: str) -> bool:
    """Whether it is one of a service over HTTP: a host and no user or password; a path may follow."""
    try:
        parts = urlsplit(url)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of a port, or of what stands in brackets
        return False
    return whole and "@" not in parts.netloc and url.isprintable() and not re.search(r"[\s?#\\]", url)
