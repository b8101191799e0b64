"""Structs that Python fills and C++ reads: declared once, as classes, of which ctypes' structs and a C++
header are made.

The header is in the sources of the kernels, so that they compile without Python; a library says by `digest`
of which declarations it was compiled.
"""

from ctypes import Array, Structure, addressof, c_float, c_int32, c_int64, c_void_p, sizeof
from enum import IntEnum
from hashlib import sha256
from inspect import cleandoc, get_annotations
from types import ModuleType
from typing import Any, ClassVar, TypeVar, dataclass_transform, get_args

from torch import Tensor

Memory = Tensor | Array[Any] | Structure | int | None
"""What a pointer may be given: what it is to point to, or an address."""

_NUMBERS: dict[str, Any] = {"int32_t": c_int32, "int64_t": c_int64, "float": c_float}
_WIDTH = 116


class Struct(Structure):
    """One that `struct` declares. Made of all of its fields, by name; what they point to lives as long."""

    _names: ClassVar[dict[str, None]]

    def __init__(self, **given: Any) -> None:
        if given.keys() != self._names.keys():
            wanted, found = (", ".join(names) for names in (self._names, given))
            raise TypeError(f"a {type(self).__name__} is made of {wanted}, not of {found}")
        values = [given[name] for name in self._names]
        self._used = values
        super().__init__(*map(_address, values))


S = TypeVar("S", bound=Struct)


@dataclass_transform(kw_only_default=True)
def struct(declared: type[S]) -> type[S]:
    """Makes the annotations of a class its fields, in their order.

    An annotation is an enumeration, or `Annotated` with the field's type in C++: a pointer, int32_t,
    int64_t or float.
    """
    fields = get_annotations(declared)
    declared._fields_ = [(name, _type(kind)[1]) for name, kind in fields.items()]
    declared._names = dict.fromkeys(fields)
    return declared


def digest(module: ModuleType) -> str:
    """Changes with whatever the header says that a compiler reads."""
    said = [line for line in _declarations(module) if not line.startswith("//")]
    return sha256("\n".join(said).encode()).hexdigest()[:16]


def header(module: ModuleType) -> str:
    """The C++ header of all that a module declares."""
    return "\n".join(
        (
            f"// Made of {module.__name__.rpartition('.')[2]}.py by `python -m deploy.kernel_header`.",
            "#pragma once",
            "#include <cstdint>",
            "",
            *_declarations(module),
            f'inline constexpr char kDeclared[] = "{digest(module)}";',
            "",
        )
    )


def _declarations(module: ModuleType) -> list[str]:
    lines, calls = list[str](), list[str]()
    for kind in vars(module).values():
        if not isinstance(kind, type) or kind.__module__ != module.__name__:
            continue
        if issubclass(kind, IntEnum):
            lines += [*_comment(kind), _enumeration(kind), ""]
        elif "_names" in vars(kind):
            lines += [*_comment(kind), *_structure(kind), ""]
            if isinstance(operation := vars(kind).get("kind"), IntEnum):
                calls.append(f"    case {type(operation).__name__}::{operation.name.lower()}:")
                calls.append(f"      return body(*static_cast<const {kind.__name__}*>(arguments));")
    return [
        *lines,
        "// Calls body with an operation's arguments, as what they are.",
        "template <class Body>",
        "void with_arguments(Kind kind, const void* arguments, const Body& body) {",
        "  switch (kind) {",
        *calls,
        "  }",
        "}",
        "",
    ]


def _enumeration(kind: type[IntEnum]) -> str:
    members = ", ".join(f"{each.name.lower()} = {each.value}" for each in kind)
    return f"enum class {kind.__name__} : int32_t {{ {members} }};"


def _structure(kind: Any) -> list[str]:
    fields = [f"  {_type(of)[0]} {name};" for name, of in get_annotations(kind).items()]
    size = f"static_assert(sizeof({kind.__name__}) == {sizeof(kind)});"
    return [f"struct {kind.__name__} {{", *fields, "};", size]


def _comment(kind: type) -> list[str]:
    said = " ".join(cleandoc(kind.__doc__ or "").split())
    lines = [""]
    for word in said.split():
        if len(lines[-1]) + len(word) >= _WIDTH:
            lines.append("")
        lines[-1] += f" {word}"
    return [f"//{line}" for line in lines if line]


def _type(kind: Any) -> tuple[str, Any]:
    """A field's type in C++, and ctypes'."""
    if isinstance(kind, type) and issubclass(kind, IntEnum):
        return kind.__name__, c_int32
    _, written = get_args(kind)
    return written, c_void_p if written.endswith("*") else _NUMBERS[written]


def _address(value: Any) -> Any:
    """As a field takes it: what lies in memory by its address, everything else as it is."""
    if isinstance(value, Tensor):
        return value.data_ptr()
    return addressof(value) if isinstance(value, Structure | Array) else value
