"""Where and with what a figure was measured, and where results go."""

import json
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from bench.flags import Flags
from bench.kinds import RESULTS, cpu_flags

ROOT = Path(__file__).parents[1]
_NOTABLE = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "bf16",
)
_PACKAGES = ("torch", "transformers", "grpcio", "fastapi")


def write_result(
    name: str, figures: dict[str, Any], arguments: Flags | None = None, folder: Path = RESULTS
) -> Path:
    """Writes <folder>/<name>.json: the figures, and what they depend on."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    told = {} if arguments is None else arguments.model_dump(exclude={"out"})
    given = {name: _plain(value) for name, value in told.items()}
    device = "cpu" if arguments is None else getattr(arguments, "device", "cpu")
    content = {"setting": setting(device)} | ({"arguments": given} if given else {}) | figures
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    return path


def _plain(value: Any) -> Any:
    """A path says where something lay on one machine: only its name is kept."""
    return value.name if isinstance(value, Path) and value.is_absolute() else value


def setting(device: str = "cpu") -> dict[str, Any]:
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "--short", "HEAD")
        + ("+" if _git("status", "--porcelain", "--", ".", ":!bench/results") else ""),
        "cpu": _cpu(),
        "gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load": round(psutil.getloadavg()[2], 2),  # of the last 15 minutes: who else was at work
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in _PACKAGES},
    }


def machine(setting: Mapping[str, Any]) -> str:
    return str(setting.get("gpu") or setting["cpu"])


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, encoding="utf-8"
    ).stdout.strip()


def _cpu() -> str:
    """As in "2 x AMD EPYC, family 25, model 1 (avx2)", since clouds call many CPUs alike; "2 of 16 x ..."
    where this process may not use all."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []

    def said(key: str) -> list[str]:
        return [value.strip() for name, _, value in (x.partition(":") for x in lines) if name.strip() == key]

    names = said("model name") or [platform.processor()]
    family = [
        f"{key} {found[0]}"
        for key, found in (("family", said("cpu family")), ("model", said("model")))
        if found
    ]
    flags = cpu_flags()
    notable = " ".join(flag for flag in _NOTABLE if flag in flags)
    usable = len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else len(names)
    number = str(len(names)) if usable == len(names) else f"{usable} of {len(names)}"
    return f"{', '.join([f'{number} x {names[0]}', *family])} ({notable})"
