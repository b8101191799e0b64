"""What setuptools does beyond its own for our wheel: kernels go into it, for the common kinds of CPU.

An editable install compiles nothing: a source checkout builds its own, once, for the CPU at hand.
"""

import sys
import sysconfig
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

_CPUS = Path("prad/lm/kernels/cpus.py")


class BuildWithKernels(build_py):
    """Without a compiler the wheel is one of Python alone, and says so."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        cpus = _loaded(_CPUS)
        try:
            cpus.compile_carried(Path(self.build_lib) / _CPUS.parent / cpus.CARRIED.name)
        except cpus.CompileError as error:
            print(f"a wheel without kernels: {error}", file=sys.stderr)


class WheelOfPlatform(bdist_wheel):
    """For any Python 3 of this machine's type: the libraries in it are of that, and know no Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", sysconfig.get_platform().replace("-", "_").replace(".", "_")


def _loaded(path: Path) -> ModuleType:
    """A module by itself: its package wants torch, which is not there when a wheel is built."""
    spec = spec_from_file_location(path.stem, path.resolve())
    assert spec
    assert spec.loader
    module = module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look there for it
    spec.loader.exec_module(module)
    return module
