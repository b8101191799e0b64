"""The locks hold what pyproject.toml asks for, in the same versions, with hashes."""

import re
import tomllib
from collections import defaultdict
from pathlib import Path

import pytest
from packaging.markers import Marker, default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
TORCH = Requirement((ROOT / "locks" / "torch.txt").read_text(encoding="utf-8").splitlines()[-1])
SERVING_DOES_WITHOUT = {"accelerate", "matplotlib", "peft", "psutil", "pytest", "rouge-score", "sacrebleu"}
PYTHONS = ("3.11", "3.12", "3.13")


def asked_for(extra: str | None) -> list[Requirement]:
    """What the project names, extras of extras included."""
    found = list(map(Requirement, PROJECT["dependencies"]))
    extras = [extra] if extra else []
    for name in extras:
        for requirement in map(Requirement, EXTRAS[name]):
            if requirement.name == PROJECT["name"]:
                extras.extend(requirement.extras)
            else:
                found.append(requirement)
    return found


def locked(name: str) -> dict[str, list[tuple[Version, Marker | None]]]:
    """By package: its versions, and for which Pythons and machines each is."""
    text = (ROOT / "locks" / f"{name}.txt").read_text(encoding="utf-8").replace("\\\n", " ")
    found: dict[str, list[tuple[Version, Marker | None]]] = defaultdict(list)
    for line in text.splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line.split(" --hash")[0])
            assert "--hash=sha256:" in line, requirement
            (specifier,) = requirement.specifier
            assert specifier.operator == "==", requirement
            found[canonicalize_name(requirement.name)].append(
                (Version(specifier.version), requirement.marker)
            )
    return found


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize(
    ("name", "extra"), [("serve", None), ("bench", "bench"), ("test", "dev"), ("oldest", "dev")]
)
def test_a_lock_answers_every_requirement(name: str, extra: str | None, python: str) -> None:
    lock = locked(name)
    here = {**default_environment(), "python_version": python, "python_full_version": f"{python}.0"}
    for requirement in asked_for(extra):
        if requirement.name == "torch":
            continue
        versions = [
            v
            for v, marker in lock[canonicalize_name(requirement.name)]
            if not marker or marker.evaluate(here)
        ]
        assert len(versions) == 1, requirement
        assert versions[0] in requirement.specifier, requirement


def test_torch_is_in_its_range_and_a_local_build_satisfies_the_lock() -> None:
    (asked,) = (r for r in map(Requirement, PROJECT["dependencies"]) if r.name == "torch")
    (pinned,) = TORCH.specifier
    assert Version(pinned.version) in asked.specifier
    assert Version(f"{pinned.version}+cpu") in TORCH.specifier


@pytest.mark.parametrize("name", ["serve", "bench", "build"])
def test_one_environment_can_hold_all(name: str) -> None:
    whole = {package: [v for v, _ in versions] for package, versions in locked("test").items()}
    for package, versions in locked(name).items():
        if package in whole:
            assert [v for v, _ in versions] == whole[package]
        else:
            assert package == "pip"


def test_serving_installs_no_more_than_it_needs() -> None:
    assert not SERVING_DOES_WITHOUT & set(locked("serve"))
    assert not [package for package in locked("test") if re.match("nvidia|cuda|triton|torch$", package)]


@pytest.mark.parametrize("client", ["lm-eval", "guidellm", "schemathesis", "litellm", "mkdocs-material"])
def test_what_the_long_tests_run_is_locked(client: str) -> None:
    asked = Requirement((ROOT / "locks" / f"{client}.in").read_text(encoding="utf-8").splitlines()[-1])
    lock = locked(client)
    assert [version in asked.specifier for version, _ in lock[client]] == [True]
    assert not [package for package in lock if re.match("nvidia|cuda|triton|torch$", package)]
