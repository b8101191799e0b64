"""`prad bench NAME`: the benchmarks of a checkout. They measure; they are no part of what is installed."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

import prad_cli
from prad_cli.extras import require_extra
from prad_cli.flags import PASS_ARGUMENTS, read_flags

BENCHMARKS = {
    "table4": "The paper's Table 4: PrAd-PA, PrAd-LoRA, PA and LoRA at 8, 16, 64 tasks.",
    "serve": "The server under load, through HTTP: closed and open loop, streaming clients, tasks.",
    "flood": "A quiet task's time to the first token beside a neighbour's flood.",
    "batch": "A file of requests of many tasks through /v1/batches, beside bursts of them.",
    "registry": "Thousands of tasks: start and memory of registry and replica, lists, changes; both stores.",
    "memory": "What `prad serve` holds when it is idle, by item, and how long it takes to start.",
    "push": "A push from a trainer's memory until it answers everywhere, part by part.",
    "versions": "One decode batch under ever more versions of a task, beside LoRA at every token.",
    "decode": "One decode step by sequences, context and tasks, beside its floor.",
    "growth": "How steps and passes grow with sequences, context, prompts, tasks and the model: exponents.",
    "choices": "Choices of one prompt: what shared blocks save in memory, hand-off and step.",
    "beams": "A step of beam searches beside a step of as many plain sequences.",
    "step": "Where a decode step's time goes, with the model's weights and with rounded ones.",
    "structured": "What penalties and grammars cost: a decode step with them beside the same without.",
    "speculation": "What drafts bring: tokens a second with them and without, by task.",
    "para": "What PARA's vectors add to a decode step and a prompt pass, beside PrAd-PARA and neither.",
    "floor": "What a decode step cannot go below here: packed GEMMs, one read of the KV.",
    "libraries": "A step's products by ours, torch's, and zentorch's and libxsmm's where they are.",
    "gpu": "A GPU, where torch computes: prompt passes and decode steps beside the hardware's limit.",
    "handoff": "Handing the KV cache over, as part of the prompt pass.",
    "rounding": "What rounded keys, values and weights do to logits and to the demo adapters' scores.",
    "greedy": "How many greedy tokens in bf16 are float32's: ours, and transformers' own.",
    "prefill": "The prompt pass with adapters against the same pass without.",
    "chunking": "Short prompts beside a very long one, in chunks and whole.",
    "train": "Tokens per second of a training step, by method, beside its products and PEFT's step.",
    "quality": "Adapters on the prompt against adapters on all positions: trained, scored, compared.",
    "peers": "Beside PEFT and transformers, and vLLM, OpenVINO and llama.cpp where they are installed.",
    "stream": "The same of one request alone, without drafts.",
    "vllm_serve": "vLLM's own benchmark of servers, `vllm bench serve`, on ours and on vLLM's.",
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
        known = _import("known")
        text = "\n\n".join(map(_laid_out, known.described(name).split("\n\n")))
        examples = f"Examples:\n\nprad bench {name} --smoke\n\nprad bench {name} --out bench/results"
        arguments = read_flags(known.FLAGS[name], context, text, examples)
        require_extra("bench", "accelerate", "peft", "psutil", "rouge_score", "sacrebleu")
        _import("runner").run(name, arguments)

    return command


def _laid_out(paragraph: str) -> str:
    """Columns and commands keep their lines; prose is broken as the terminal is wide."""
    return f"\b\n{paragraph}" if "  " in paragraph else paragraph


def _import(module: str) -> Any:
    root = Path(prad_cli.__file__).parents[1]
    if not (root / "bench" / "runner.py").is_file():
        typer.secho(
            f"error: the benchmarks are part of a checkout only; {root} is none (pip install -e . in one)",
            fg="red",
            err=True,
        )
        raise typer.Exit(1)
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))  # an editable install knows the shipped packages alone
    return importlib.import_module(f"bench.{module}")


for _name, _help in BENCHMARKS.items():
    app.command(_name, help=_help, context_settings=PASS_ARGUMENTS, add_help_option=False)(_command(_name))
