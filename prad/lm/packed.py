"""A packed model as two files that any number of processes map: what the kernels read, and a page about it.

The first process that loads a model writes them, every later one starts without transformers: it needs
neither the model's code nor its own weights, until somebody asks for `module`.
"""

import fcntl
import hashlib
import json
import mmap
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, fields
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from prad.core.kv import KVLayout, LayerKV
from prad.lm.errors import ModelNotFoundError
from prad.lm.families import Site
from prad.lm.fingerprint import Fingerprint
from prad.lm.fused import FusedModel, Layer, Norm, Rotary, Shape
from prad.lm.kernels import Activation, Kernels, PackedLinear, Precision, Weights
from prad.lm.kernels.build import require_own
from prad.lm.kv import dtype_name, torch_dtype
from prad.lm.model import LanguageModel

_LINE = 64
_AT_ONCE = 32 << 20  # bytes of one write: large ones end up in large pages
_POPULATE_READ = 22  # Linux's MADV_POPULATE_READ, which has no name in Python
_PAGE, WEIGHTS = "model.json", "weights.bin"
PARTIAL = ".partial"  # behind the name of a folder that is being written

Page = dict[str, Any]
"""What is known of a packed model beside its tensors; a tensor stands in it as [dtype, shape, offset]."""


def key_of(folder: Path, dtype: torch.dtype, precision: Precision) -> str:
    """Changes with whatever a packed model depends on: the files of `folder`, how they are loaded, the code
    that packs them. Raises OSError."""
    loaded = f"{dtype} {precision} {version('transformers')} {torch.__version__}"
    said = hashlib.sha256(f"{files_of(folder)} {loaded}".encode())
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        said.update(path.read_bytes())
    return said.hexdigest()


def files_of(folder: Path) -> str:
    """Changes with a model's files, as the file system tells changed ones. Raises OSError."""
    said = hashlib.sha256()
    for path in (
        *sorted(folder.glob("*.safetensors")),
        *sorted(folder.glob("blocks/*")),
        folder / "config.json",
    ):
        found = path.stat()
        said.update(f"{path} {found.st_ino} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}".encode())
    return said.hexdigest()


def write_packed(model: LanguageModel, source: Path, key: str, folder: Path) -> None:
    """Writes a model, loaded from `source` when that had this key, to `folder`, whole or not at all.

    Only a page if it cannot be kept: it is not fused, or its files hold its weights in another form than it
    does, or are others by now, so that they cannot stand for its `module`.
    """
    partial = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(mode=0o700)
    try:
        for name in (WEIGHTS, _PAGE):
            (partial / name).touch(mode=0o600)  # whatever the umask: see `require_own`
        page = {"key": key} | _written(model, source, key, partial / WEIGHTS)
        (partial / _PAGE).write_text(json.dumps(page, default=str), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _written(model: LanguageModel, source: Path, key: str, weights: Path) -> Page:
    """What the page says of a model that can be kept, whose tensors are now in the file; else nothing."""
    fused = model.fused
    if fused is None or (stored := _stored_names(model.module, source)) is None:
        return {}
    files = files_of(source)
    if key_of(source, model.dtype, fused.precision) != key:
        return {}
    with weights.open("wb", buffering=_AT_ONCE) as file:
        return {
            "files": files,
            "config": _settings(model.config),
            "fingerprint": asdict(model.fingerprint),
            "max_context": model.max_context,
            "state": {str(site): width for site, width in model.state_widths.items()},
            "modules": {name: _kind(each) for name, each in model.module.named_modules() if name},
            "parameters": stored,
            "embedding": _name_of(model.module, model.module.get_input_embeddings()),  # type: ignore[operator]
            "fused": _Writer(file, key).written(fused),
            "size": file.tell(),
        }


def read_packed(folder: Path, source: Path, key: str, kernels: Kernels) -> "PackedModel | None":
    """The model that `write_packed` wrote under this key; None if there is none, or not whole. Raises OSError
    if it cannot be told, or somebody else may have written it."""
    page = _page(folder, key)
    try:
        if page is None or page["size"] != (folder / WEIGHTS).stat().st_size:
            return None
        weights = _mapped(folder / WEIGHTS)
        if bytes(weights[:_LINE].numpy()) != key.encode():  # another page's, written between both
            return None
        return PackedModel(page, weights, source, kernels)
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        return None


def is_unkept(folder: Path, key: str) -> bool:
    """Whether `write_packed` found, under this key, that the model cannot be kept. Raises OSError as
    `read_packed` does."""
    page = _page(folder, key)
    return page is not None and "fused" not in page


def _page(folder: Path, key: str) -> Page | None:
    try:
        for path in (folder.parent, folder, folder / _PAGE, folder / WEIGHTS):
            require_own(path)
        page = json.loads((folder / _PAGE).read_bytes())
        return page if page["key"] == key else None
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        return None


class PackedModel(LanguageModel):
    """A `LanguageModel` whose forward is the packed one; of `module` there are only names and weights until
    something wants more."""

    def __init__(self, page: Page, weights: Tensor, source: Path, kernels: Kernels) -> None:
        """weights uint8: the file's bytes; `source`: where the model itself is."""
        self._page = page
        self._source = source
        layout = page["fingerprint"].pop("layout")
        layers = tuple(LayerKV(**layer) for layer in layout["layers"])
        fingerprint = Fingerprint(**page["fingerprint"], layout=KVLayout(layers, layout["dtype"]))
        self._set_up(SimpleNamespace(**page["config"]), torch.device("cpu"), torch_dtype(fingerprint.layout))
        self.fingerprint = fingerprint
        self.max_context = page["max_context"]
        self.kernels = kernels
        self._fused = _Reader(weights, kernels).model(page["fused"])

    @property
    def module(self) -> nn.Module:
        """transformers' model, loaded when this is first asked for."""
        return self._whole.module

    @cached_property
    def frozen(self) -> nn.Module:
        weights = _tensors(self._source)
        try:  # behind that: what is mapped now stays the same, whatever becomes of the folder
            changed = files_of(self._source) != self._page["files"]
        except OSError:
            changed = True
        if changed:
            raise _changed(self._source)
        return _Frame(self._page, self.config, weights)

    @property
    def state_widths(self) -> dict[Site, int]:
        return {Site(name): width for name, width in self._page["state"].items()}

    def accelerate(self, kernels: Kernels, precision: Precision = "full") -> None:
        self._blocks = self._whole._blocks
        super().accelerate(kernels, precision)

    @cached_property
    def _whole(self) -> LanguageModel:
        whole = LanguageModel.load(self._source, dtype=self.dtype)
        if whole.fingerprint != self.fingerprint:
            raise _changed(self._source)
        return whole


def _changed(source: Path) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"{source} has changed since this process has started, and is another model now: start it again"
    )


class _Frame(nn.Module):
    """transformers' modules by their names, with their weights, which are mapped, and nothing to compute."""

    def __init__(self, page: Page, config: Any, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.config = config
        self._embedding = page["embedding"]
        own: dict[str, dict[str, Tensor]] = {}
        for name, stored in page["parameters"].items():
            module, _, last = name.rpartition(".")
            own.setdefault(module, {})[last] = weights[stored]
        for name, kind in page["modules"].items():
            parent, _, last = name.rpartition(".")
            self.get_submodule(parent).add_module(last, _empty(kind, own.get(name, {})))

    def get_input_embeddings(self) -> nn.Module:
        return self.get_submodule(self._embedding)


def _empty(kind: str, parameters: Mapping[str, Tensor]) -> nn.Module:
    weight, module = parameters.get("weight"), nn.Module()
    if weight is not None and kind == "Linear":
        module = nn.Linear(weight.shape[1], weight.shape[0], "bias" in parameters, device="meta")
    elif weight is not None and kind == "Embedding":
        module = nn.Embedding(weight.shape[0], weight.shape[1], device="meta")
    for name, tensor in parameters.items():
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    return module


def _settings(config: Any) -> dict[str, Any]:
    """A configuration's attributes: its own, and the names under which transformers' others have them."""
    own: dict[str, Any] = config.to_dict()
    return own | {name: getattr(config, name) for name in config.attribute_map}


def _kind(module: Any) -> str:
    if isinstance(module, nn.Linear):
        return "Linear"
    return "Embedding" if isinstance(module, nn.Embedding) else ""


def _name_of(module: nn.Module, wanted: nn.Module) -> str:
    return next(str(name) for name, each in module.named_modules() if each is wanted)


def _stored_names(module: nn.Module, source: Path) -> dict[str, str] | None:
    """Under which name the files hold each parameter, or the one that it is tied to; None if one of them is
    not there as it is."""
    held = _tensors(source)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    names = {id(parameters[name]): name for name in held if name in parameters}
    found = {name: names.get(id(parameter)) for name, parameter in parameters.items()}
    for name, stored in found.items():
        its = None if stored is None else held[stored]
        if its is None or (its.dtype, its.shape) != (parameters[name].dtype, parameters[name].shape):
            return None
    return {name: stored for name, stored in found.items() if stored is not None}


def _tensors(source: Path) -> dict[str, Tensor]:
    """Of a model's folder, mapped. Raises ModelNotFoundError."""
    found: dict[str, Tensor] = {}
    for path in sorted(source.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                found.update((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118 (it is no dict)
        except (OSError, SafetensorError) as error:
            raise ModelNotFoundError(f"{path} can no longer be read: {error}") from error
    return found


def _mapped(path: Path) -> Tensor:
    """uint8: the file's bytes, in memory that all who map it share; in huge pages where the system has them
    for files. Locked for sweeps as long as it is mapped."""
    with path.open("rb") as file:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        mapping = mmap.mmap(
            file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
        )  # torch warns of memory that cannot be written to; nothing here is
    with suppress(AttributeError, OSError):
        mapping.madvise(mmap.MADV_HUGEPAGE)
        mapping.madvise(_POPULATE_READ)  # what is not in memory is read now, not by the first request
    return torch.frombuffer(mapping, dtype=torch.uint8)


class _Writer:
    def __init__(self, file: Any, key: str) -> None:
        """key: the file's first line of memory, so that it is known to be its page's."""
        self._file = file
        self._end = file.write(key.encode())

    def written(self, value: Any) -> Any:
        """Tensors go to the file; what stands in their place, and everything else, as JSON has it."""
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, PackedLinear):
            sizes = {
                name: getattr(value.struct, name)
                for name in ("in_features", "out_features", "weights", "paired")
            }
            return sizes | {name: self.written(x) for name, x in value.tensors.items()}
        if isinstance(value, tuple):
            return [self.written(each) for each in value]
        if isinstance(value, FusedModel | Layer | Norm | Rotary | Shape):
            return {
                field.name: self.written(getattr(value, field.name))
                for field in fields(value)
                if field.name != "kernels"
            }
        return value

    def _tensor(self, tensor: Tensor) -> list[Any]:
        at = -(-self._end // _LINE) * _LINE
        data = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
        self._file.write(bytes(at - self._end))
        self._file.write(data)
        self._end = at + len(data)
        return [dtype_name(tensor.dtype), list(tensor.shape), at]


class _Reader:
    def __init__(self, weights: Tensor, kernels: Kernels) -> None:
        self._weights = weights
        self._kernels = kernels

    def model(self, page: Page) -> FusedModel:
        rotary, own = page["rotary"], page["shape"]
        return FusedModel(
            Shape(**own | {"activation": Activation(own["activation"])}),
            self._known(page["embedding"]),
            self._tensor(page["position_embedding"]),
            rotary and Rotary(self._known(rotary["frequencies"]), rotary["scale"]),
            tuple(map(self._layer, page["layers"])),
            self._norm(page["last_norm"]),
            self._linear(page["head"]),
            self._kernels,
            page["precision"],
            page["max_context"],
        )

    def _layer(self, page: Page) -> Layer:
        normed = page["qk_norm"]
        return Layer(
            self._norm(page["attention_norm"]),
            self._linear(page["qkv"]),
            self._linear(page["o"]),
            self._norm(page["ffn_norm"]),
            self._linear(page["up"]),
            self._linear(page["down"]),
            normed and (self._norm(normed[0]), self._norm(normed[1])),
            page["scale"],
            page["window"],
        )

    def _norm(self, page: Page) -> Norm:
        return Norm(self._known(page["weight"]), self._tensor(page["bias"]), page["eps"])

    def _linear(self, page: Page) -> PackedLinear:
        scales, offsets, bias, places = (
            self._tensor(page[name]) for name in ("scales", "offsets", "bias", "places")
        )
        return PackedLinear.placed(
            self._known(page["panels"]),
            scales,
            offsets,
            bias,
            places,
            page["in_features"],
            page["out_features"],
            Weights(page["weights"]),
            page["paired"],
        )

    def _known(self, at: list[Any]) -> Tensor:
        dtype, shape, offset = at
        kind: torch.dtype = getattr(torch, dtype)
        size = torch.Size(shape).numel() * kind.itemsize
        if offset % _LINE or not 0 <= offset <= offset + size <= len(self._weights):
            raise ValueError(f"there is no tensor {at} in {len(self._weights)} bytes")
        return self._weights[offset : offset + size].view(kind).view(shape)

    def _tensor(self, at: list[Any] | None) -> Tensor | None:
        return None if at is None else self._known(at)
