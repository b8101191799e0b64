"""`prad bench NAME`: the benchmarks of a checkout. They measure; they are no part of what is installed."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import typer

import prad
from prad.cli.extras import require_extra
from prad.cli.services import PASS_ARGUMENTS

BENCHMARKS = {
    "table4": "The paper's Table 4: PrAd-PA, PrAd-LoRA, PA and LoRA at 8, 16, 64 tasks.",
    "serve": "The server under load, through HTTP: closed and open loop, streaming clients, tasks.",
    "decode": "One decode step by sequences, context and tasks, beside its floor.",
    "step": "Where a decode step's time goes, with the model's weights and with 8-bit ones.",
    "para": "What PARA's vectors add to a decode step and a prompt pass, beside PrAd-PARA and neither.",
    "floor": "What a decode step cannot go below here: packed GEMMs, one read of the KV.",
    "handoff": "Handing the KV cache over, as part of the prompt pass.",
    "rounding": "What 8-bit keys, values and weights do to the logits.",
    "prefill": "The prompt pass with adapters against the same pass without.",
    "chunking": "Short prompts beside a very long one, in chunks and whole.",
    "train": "Tokens per second of a training step, by method, beside its products and PEFT's step.",
    "quality": "Adapters on the prompt against adapters on all positions: trained, scored, compared.",
    "peers": "Beside PEFT and transformers, and vLLM and OpenVINO where they are installed.",
}

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Measure on this machine, from a checkout: JSON and a plot in bench/results.",
    epilog="Examples:\n\n[bold]prad bench decode --help[/bold]\n\n[bold]prad bench table4 --smoke[/bold]\n\n"
    "[bold]prad bench peers --vllm-python ENV/bin/python[/bold]",
)


def _command(name: str) -> Callable[[typer.Context], None]:
    def command(context: typer.Context) -> None:
        _run(name, context.args)

    return command


def _run(name: str, arguments: list[str]) -> None:
    root = Path(prad.__file__).parents[1]
    if not (root / "bench" / "runner.py").is_file():
        typer.secho(
            f"error: the benchmarks are part of a checkout only; {root} is none (pip install -e . in one)",
            fg="red",
            err=True,
        )
        raise typer.Exit(1)
    require_extra("bench", "accelerate", "peft", "psutil", "rouge_score", "sacrebleu")
    sys.path.insert(0, str(root))  # an editable install knows the shipped packages alone
    runner = importlib.import_module("bench.runner")
    runner.run(name, arguments)


for _name, _help in BENCHMARKS.items():
    app.command(_name, help=_help, context_settings=PASS_ARGUMENTS, add_help_option=False)(_command(_name))
