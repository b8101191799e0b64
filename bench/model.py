"""The model that a benchmark measures."""

import argparse
from pathlib import Path

from prad.lm import DEFAULT_MODEL, LanguageModel, resolve_model
from prad.lm.kernels import load_kernels


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, help="folder, .gguf file, hub id, or the default model"
    )
    parser.add_argument(
        "--cache-dir", type=Path, default=Path("~/.cache/prad"), help="where converted models are"
    )
    parser.set_defaults(device="cpu")  # nothing here waits for a GPU before it looks at the clock


def model_folder(arguments: argparse.Namespace) -> Path:
    return resolve_model(arguments.model, arguments.cache_dir)


def model_flags(arguments: argparse.Namespace) -> list[str]:
    """The same choice, for a service that a benchmark starts."""
    return [
        "--model",
        arguments.model,
        "--cache-dir",
        str(arguments.cache_dir),
        "--device",
        arguments.device,
    ]


def load(arguments: argparse.Namespace) -> LanguageModel:
    """In bf16 and with the kernels, as it is served."""
    model = LanguageModel.load(model_folder(arguments), device=arguments.device)
    kernels = load_kernels("auto", arguments.cache_dir, arguments.device)
    if kernels is not None:
        model.accelerate(kernels)
    return model
