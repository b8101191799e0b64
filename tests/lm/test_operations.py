"""One declaration of what the kernels are given: the header that C++ compiles is made of it, and nothing
that is given can be in another place than what is read."""

from ctypes import c_int64, sizeof
from types import ModuleType
from typing import Any

import pytest
import torch
from near import some

from deploy.kernel_header import check
from prad.lm.kernels import Kernels, Kind, operations
from prad.lm.kernels.build import built
from prad.lm.kernels.declared import Struct, digest, struct
from tests.cache import CACHE


def test_the_header_is_that_of_the_declarations() -> None:
    assert check() == [], "write it again: python -m deploy.kernel_header"


def test_every_kind_has_its_arguments() -> None:
    kinds = [each for each in vars(operations).values() if isinstance(each, type)]
    declared = [
        each.kind
        for each in kinds
        if issubclass(each, operations.Operation) and each is not operations.Operation
    ]
    assert declared == list(Kind)


def test_a_library_of_other_declarations_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prad.lm.kernels.calls.digest", lambda _: "of others")
    with pytest.raises(AssertionError, match="other operations are compiled"):
        Kernels(built(CACHE), 1)


@pytest.mark.parametrize("change", ["swapped", "another type", "another name", "one more"])
def test_every_change_of_a_struct_is_another_digest(change: str) -> None:
    fields: dict[str, Any] = {"a": operations.Size, "b": operations.Size, "c": operations.Floats}
    before = digest(of(fields))
    if change == "swapped":
        fields = {name: fields[name] for name in ("b", "a", "c")}
    elif change == "another type":
        fields["c"] = operations.Given
    elif change == "another name":
        fields["d"] = fields.pop("c")
    else:
        fields["d"] = operations.Size
    assert digest(of(fields)) != before


def test_a_struct_is_made_of_all_of_its_fields_by_name() -> None:
    with pytest.raises(
        TypeError, match=r"made of start, rows, slots, stored, answered, not of start, rows, slot, stored"
    ):
        operations.PromptSpan(start=0, rows=1, slot=None, stored=0)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="not of start, rows"):
        operations.PromptSpan(start=0, rows=1)  # type: ignore[call-arg]


def test_what_a_struct_points_to_lives_as_long() -> None:
    span = operations.PromptSpan(start=0, rows=1, slots=torch.tensor([3, 4]), stored=2, answered=0)
    some(100)
    assert list((c_int64 * 2).from_address(int(span.slots))) == [3, 4]  # type: ignore[arg-type, call-overload]
    assert sizeof(span) == 40


def of(fields: dict[str, Any]) -> ModuleType:
    """A module that declares one struct."""
    module = ModuleType("declared_in_a_test")
    made = type("Made", (Struct,), {"__annotations__": fields, "__module__": module.__name__})
    module.__dict__["Made"] = struct(made)
    return module
