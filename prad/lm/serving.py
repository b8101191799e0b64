"""A model as it is served: found, loaded, and with own kernels where they can be had; packed for these once,
then mapped by every process that serves it."""

import fcntl
import gc
import hashlib
import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock

from prad.core.models import Choice, Precision
from prad.lm.blocks import share_in_blocks
from prad.lm.device import require_device
from prad.lm.errors import UnsupportedModelError
from prad.lm.kernels import Kernels, load_kernels
from prad.lm.kernels.build import DEFAULT_KEPT_BYTES, require_own
from prad.lm.kernels.memory import give_back_freed
from prad.lm.kv import dtype_name
from prad.lm.model import LanguageModel
from prad.lm.packed import PARTIAL, WEIGHTS, is_unkept, key_of, read_packed, write_packed
from prad.lm.source import resolve_model

logger = logging.getLogger(__name__)

DEFAULT_PACKED_BYTES = 8 << 30
_MOSTLY = 0.8


class ServedModel(NamedTuple):
    """`folder`: where it was loaded from, with its tokenizer."""

    model: LanguageModel
    folder: Path


def load_served(
    name: str,
    cache_dir: Path,
    *,
    dtype: str,
    device: str = "cpu",
    kernels: Choice = "auto",
    weights: Precision = "full",
    kept_bytes: int = DEFAULT_KEPT_BYTES,
    packed_bytes: int = DEFAULT_PACKED_BYTES,
) -> ServedModel:
    """The model of a name as in `resolve_model`, in bfloat16 or float32; `kernels` and `kept_bytes` as in
    `load_kernels`, `packed_bytes` of other packed models stay in `cache_dir`.

    Raises ModelError if there is none, or not with these weights, or not on this machine.
    """
    require_device(device)  # before a model is fetched or converted
    folder, loaded_as = resolve_model(name, cache_dir), getattr(torch, dtype)
    found = load_kernels(kernels, cache_dir, device, kept_bytes)
    if found is not None:
        model = accelerated(folder, cache_dir, loaded_as, found, weights, packed_bytes)
        what = "all of the model" if model.is_fused else "its attention"
        logger.info("the kernels compute %s, weights %s", what, weights)
        if weights == "int4" and (own := share_in_blocks(folder)) < _MOSTLY:
            logger.warning(
                "%s has %.0f %% of its weights in blocks of its own: the others are rounded to 4 bits, which "
                "changed far more of what a small model said than int8 did; compare your tasks' scores first "
                "(prad eval --url)",
                name,
                100 * own,
            )
    elif weights != "full":
        raise UnsupportedModelError(
            f"{weights} weights need the kernels, and these are not in use: install a C++ compiler (g++) and "
            "use neither --kernels torch nor --device cuda, or use --weights full (for prefill, prad serve's "
            "--prefill-weights full)"
        )
    else:
        model = LanguageModel.load(folder, dtype=loaded_as, device=device)
    gc.collect()
    gc.freeze()  # what is loaded stays: a collection that goes through it takes as long as several steps
    give_back_freed()
    return ServedModel(model, folder)


def accelerated(
    folder: Path,
    cache_dir: Path,
    dtype: torch.dtype,
    kernels: Kernels,
    precision: Precision,
    packed_bytes: int = DEFAULT_PACKED_BYTES,
) -> LanguageModel:
    """Mapped, if it is kept in packed form; else loaded, packed, and kept where it can be. Processes that
    start together wait for one packing, but not where it is known that nothing can be kept."""
    try:
        key = key_of(folder, dtype, precision)
    except OSError:  # no config.json, a link to nothing: loading says which
        return _loaded(folder, dtype, kernels, precision)
    path = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]
    name = f"{folder.name}-{dtype_name(dtype)}-{precision}-{path}"
    kept = cache_dir.expanduser() / "packed" / name
    model: LanguageModel | None = None
    lock = FileLock(f"{kept}.lock")
    try:
        model = read_packed(kept, folder, key, kernels)  # needs no lock, which a read-only cache has none of
        if model is None and not is_unkept(kept, key):
            kept.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            require_own(kept.parent)
            lock.acquire()
            model = read_packed(kept, folder, key, kernels)  # what the one before has written
            if is_unkept(kept, key):
                lock.release()
    except OSError as error:
        lock.release()
        logger.warning("no packed model is kept (%s): this process packs one for itself", error)
    try:
        if model is None:
            model = _loaded(folder, dtype, kernels, precision)
            if lock.is_locked:
                model = _kept(model, folder, key, kept, kernels)
    finally:
        lock.release()
    _sweep(kept, packed_bytes)
    return model


def _kept(model: LanguageModel, folder: Path, key: str, kept: Path, kernels: Kernels) -> LanguageModel:
    """The same mapped, or as it is."""
    try:
        write_packed(model, folder, key, kept)
        return read_packed(kept, folder, key, kernels) or model
    except OSError as error:
        logger.warning("the packed model cannot be kept (%s): this process keeps one for itself", error)
    return model


def _sweep(used: Path, kept_bytes: int) -> None:
    """Removes what was not used for longest of the models beside `used`, until `kept_bytes` of them are left;
    and never one that a process has mapped, or packs now."""
    with suppress(OSError):  # a cache that can only be read, or another sweep at the same time
        require_own(used.parent)
        os.utime(used)
        found = {path.with_suffix("") if path.suffix == PARTIAL else path for path in used.parent.iterdir()}
        others = {path: _use(path) for path in found if path != used and path.suffix != ".lock"}
        left = sum(size for _, size in others.values())
        for folder, (_, size) in sorted(others.items(), key=lambda other: other[1]):
            with suppress(OSError), FileLock(f"{folder}.lock", timeout=0):
                killed = folder.with_name(folder.name + PARTIAL)  # whoever writes has the lock
                shutil.rmtree(killed, ignore_errors=True)
                if left > kept_bytes and not _is_mapped(folder / WEIGHTS):
                    shutil.rmtree(folder)
                    left -= size


def _use(folder: Path) -> tuple[float, int]:
    """When it was used last, and its size."""
    try:
        return folder.stat().st_mtime, (folder / WEIGHTS).stat().st_size
    except FileNotFoundError:
        return 0.0, 0


def _is_mapped(path: Path) -> bool:
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _loaded(folder: Path, dtype: torch.dtype, kernels: Kernels, precision: Precision) -> LanguageModel:
    model = LanguageModel.load(folder, dtype=dtype)
    model.accelerate(kernels, precision)
    return model
