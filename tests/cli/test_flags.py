"""Flags that are the fields of a class, as a person types them."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
import typer
from pydantic import Field
from pydantic_settings import SettingsConfigDict
from typer.testing import CliRunner

from adapter_registry.settings import RegistrySettings
from decode_service.settings import DecodeSettings
from prad.settings import ServiceSettings
from prad_cli.flags import PASS_ARGUMENTS, read_flags
from prefill_service.settings import PrefillSettings


class Settings(ServiceSettings):
    model_config = SettingsConfigDict(
        env_prefix="TRIED_", extra="forbid", frozen=True, use_attribute_docstrings=True
    )

    data: Path
    """Where it [really] lies."""
    kind: Literal["auto", "none"] = "auto"
    shared: bool = True
    local: bool | None = None
    threads: Annotated[int, Field(ge=1)] | None = None
    sizes: list[int] = Field([1, 8], description="of a batch")
    pin: Annotated[int | None, Field(repr=False)] = None


def tried(*arguments: str) -> tuple[int, str, Settings | None]:
    """The exit code, what was said, and what was read."""
    app = typer.Typer()
    read: list[Settings] = []

    @app.command("try", context_settings=PASS_ARGUMENTS, add_help_option=False)
    def command(context: typer.Context) -> None:
        read.append(read_flags(Settings, context, "Tries.", "Example: try --data here"))

    ended = CliRunner().invoke(app, list(arguments), prog_name="try", env={"COLUMNS": "200"})
    return ended.exit_code, ended.output, read[0] if read else None


def test_values_are_read_as_the_fields_say() -> None:
    flags = ["--data", "here", "--kind=none", "--no-shared", "--local", "--threads", "3"]
    code, said, settings = tried(*flags, "--sizes", "2", "--sizes", "4")
    assert (code, said) == (0, "")
    assert settings == Settings(
        data=Path("here"), kind="none", shared=False, local=True, threads=3, sizes=[2, 4]
    )


def test_flags_win_over_the_environment_and_that_over_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIED_THREADS", "5")
    monkeypatch.setenv("TRIED_KIND", "none")
    _, _, settings = tried("--data", "here", "--threads", "7")
    assert settings == Settings(data=Path("here"), kind="none", threads=7)


def test_help_says_what_each_field_is() -> None:
    code, said, _ = tried("--help")
    assert code == 0
    for words in ("Tries.", "Example: try --data here", "Where it [really] lies.  [required]", "--no-shared"):
        assert words in said
    for words in ("<auto|none>", "[default: auto]", "of a batch; repeatable  [default: 1, 8]"):
        assert words in said


def test_every_wrong_value_is_a_line() -> None:
    code, said, _ = tried("--kind", "some", "--threads", "0", "--sizes", "2", "--sizes", "many")
    assert code == 2
    starts = ("error: --data is required", "error: --kind: ", "error: --threads: ", "error: --sizes: ")
    for line, start in zip(said.splitlines(), starts, strict=True):
        assert line.startswith(start)


def test_a_wrong_value_of_the_environment_is_named_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIED_THREADS", "many")
    monkeypatch.setenv("TRIED_KIND", "some")
    code, said, _ = tried("--data", "here", "--kind", "other")
    assert code == 2
    flag, variable = said.splitlines()
    assert flag.startswith("error: --kind: ")  # which wins over the environment, and is wrong itself
    assert variable.startswith("error: TRIED_THREADS in the environment: ")
    assert "(got 'many')" in variable


def test_what_may_be_a_secret_is_not_said_again() -> None:
    code, said, _ = tried("--data", "here", "--pin", "sesame")
    assert (code, said.startswith("error: --pin: "), "sesame" in said) == (2, True, False)


@pytest.mark.parametrize(
    ("kind", "service", "port"),
    [
        (PrefillSettings, "PREFILL", 8000),
        (DecodeSettings, "DECODE", 50051),
        (RegistrySettings, "REGISTRY", 8001),
    ],
)
def test_a_kubernetes_service_of_the_same_name_is_passed_over(
    kind: type[ServiceSettings],
    service: str,
    port: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What Kubernetes puts into every container of a namespace with a Service `prad-...`."""
    link = "tcp://10.96.12.7:9000"
    linked = {"": link, "_9000_TCP": link, "_9000_TCP_PROTO": "tcp", "_9000_TCP_PORT": "9000"}
    for name, value in linked.items():
        monkeypatch.setenv(f"PRAD_{service}_PORT{name}", value)
    monkeypatch.setenv(f"PRAD_{service}_SERVICE_HOST", "10.96.12.7")
    monkeypatch.setenv(f"PRAD_{service}_SERVICE_PORT", "9000")
    assert kind().model_dump()["port"] == port
    (line,) = caplog.messages
    assert line.startswith(f"PRAD_{service}_PORT={link} is passed over: Kubernetes")
    monkeypatch.setenv(f"PRAD_{service}_PORT", "9001")
    assert kind().model_dump()["port"] == 9001
