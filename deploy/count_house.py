"""`python -m deploy.count_house`: how large the house is for who reads it; counted, not estimated.

It starts the registry, decode and prefill of the current folder with the default model, pushes a demo adapter
and asks for two streamed completions of its task. The second one is traced in prefill and in decode:

files    *.py of ours (prad, kvtransfer, the services) in which a function ran, or one of whose dataclasses or
         named tuples was made, between the client's request and the last event, in either process. Generated
         gRPC stubs are apart. What a service does beside a request (keepalive, watching the registry) counts
         if it happens then.
names    Types of ours that bear the prompt: an instance was a local variable or the result of one of our
         functions, was made for this request, and holds the prompt's text, or its token ids (a list, an array
         or a tensor, in which they may have neighbours), an attribute `request_id`, or such an instance, in a
         field or a collection. Fields count, not what properties compute. Services, queues and whatever lived
         before the request do not, nor do protobuf's messages, nor the output's tokens, which bear the id,
         too (deploy.traced.TOKEN_TYPES): those are printed apart.
fields   For each field of FIELDS, the *.py of ours that name it. The proto and its stubs are apart: a field
         must be in them once.

What goes beyond a limit ends the command with status 1 if `--check` is given.
"""

import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from local_stack.stack import Stack, StackError, answers, free_ports

FILES, NAMES, NAMED_IN = 40, 10, 4
FIELDS = (
    "min_p",
    "top_p",
    "top_k",
)  # what else a request says has more to do than with drawing: see decision 2
ROOMS = ("prad", "kvtransfer", "decode_service", "prefill_service", "adapter_registry")
TRACED = ("prefill", "decode")
ADAPTER = Path("examples/adapters/sentiment")
PROMPT = "a gripping , beautifully acted film about the quiet life of a lighthouse keeper"


@dataclass(frozen=True)
class Counts:
    """What was found, by name; `named_in` and `stubs` by sampling field."""

    files: list[str]
    stub_files: list[str]
    names: list[str]
    token_names: list[str]
    named_in: dict[str, list[str]]
    stubs: dict[str, list[str]]

    @property
    def beyond(self) -> list[str]:
        """The limits that do not hold, in words."""
        worst = max(self.named_in, key=lambda field: len(self.named_in[field]))
        found = {
            f"{len(self.files)} files, limit {FILES}": len(self.files) > FILES,
            f"{len(self.names)} names, limit {NAMES}": len(self.names) > NAMES,
            f"{worst} in {len(self.named_in[worst])} files, limit {NAMED_IN}": len(self.named_in[worst])
            > NAMED_IN,
        }
        return [words for words, is_beyond in found.items() if is_beyond]


def count(folder: Path) -> Counts:
    """Runs the stack once, with its logs and data in `folder`. RuntimeError or StackError if it fails."""
    traces = [folder / f"{name}.json" for name in TRACED]
    with _stack(folder) as (api, stack):
        traced = [service.process for service in stack.services if service.name in TRACED]
        _complete(api)
        for process in traced:
            process.send_signal(signal.SIGUSR1)
        time.sleep(1.0)
        _complete(api)
        for process in traced:
            process.send_signal(signal.SIGUSR2)
        stack.wait_until(lambda: all(trace.is_file() for trace in traces), "the traces")
    read = [json.loads(trace.read_text(encoding="utf-8")) for trace in traces]
    if faults := [fault for trace in read for fault in trace["faults"]]:
        raise RuntimeError(f"the trace is not whole: {faults[:3]}")
    every: dict[str, list[str]] = {
        key: sorted({name for trace in read for name in trace[key]}) for key in read[0]
    }
    named_in, stubs = fields_named_in()
    names = [name for name in every["bearers"] if "_pb2" not in name]
    token_names = [name for name in every["token_types"] if "_pb2" not in name]
    return Counts(every["files"], every["stubs"], names, token_names, named_in, stubs)


def fields_named_in() -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """By sampling field, below the current folder: the files of ours that name it, and those of the wire."""
    places = {field: _naming(field) for field in FIELDS}
    named_in = {f: [place for place in found if "/proto/" not in place] for f, found in places.items()}
    return named_in, {f: [place for place in found if "/proto/" in place] for f, found in places.items()}


def _naming(field: str) -> list[str]:
    word = re.compile(rf"\b{field}\b")
    paths = (path for room in ROOMS for path in sorted(Path(room).rglob("*")) if path.suffix in _SOURCES)
    return [path.as_posix() for path in paths if word.search(path.read_text(encoding="utf-8"))]


_SOURCES = (".py", ".pyi", ".proto")


@contextmanager
def _stack(folder: Path) -> Iterator[tuple[str, Stack]]:
    """The API's URL, and the services, of which prefill and decode are traced."""
    registry_port, decode_port, api_port = free_ports(3)
    registry, api = f"http://127.0.0.1:{registry_port}", f"http://127.0.0.1:{api_port}"
    tracer, ids = str(Path(__file__).with_name("traced.py")), ",".join(map(str, _prompt_ids()))
    within = {name: (tracer, str(folder / f"{name}.json"), PROMPT, ids, "prad_cli") for name in TRACED}
    with Stack(folder, within) as stack:
        stack.start("registry", ["--port", str(registry_port), "--data-dir", str(folder / "data")])
        stack.start("decode", ["--port", str(decode_port)])
        where = ["--decode", f"127.0.0.1:{decode_port}", "--registry", registry]
        where += ["--traffic-s", "0"]  # beside requests: it would be counted if its time came just then
        stack.start("prefill", [*where, "--port", str(api_port)])
        stack.wait_until(lambda: answers(f"{registry}/ready"), "the registry")
        stack.wait_until(lambda: answers(f"{api}/ready"), "prefill")
        pushed = [sys.executable, "-m", "prad_cli", "adapter", "push", str(ADAPTER), "--task", ADAPTER.name]
        subprocess.run([*pushed, "--registry", registry], check=True, stdout=subprocess.DEVNULL)
        stack.wait_until(lambda: answers(f"{api}/v1/models/{ADAPTER.name}"), "the adapter")
        yield api, stack


def _prompt_ids() -> list[int]:
    """The prompt's own ids, as they stand in the middle of the adapter's template."""
    from prad.lm import DEFAULT_MODEL, Tokenizer, resolve_model

    source = resolve_model(DEFAULT_MODEL, Path("~/.cache/prad").expanduser())
    found: list[int] = Tokenizer(source).encode_prompt(PROMPT)
    return found[1:-1]  # at its ends it may melt into the template's text


def _complete(api: str) -> None:
    body: dict[str, Any] = {"task": ADAPTER.name, "prompt": PROMPT, "stream": True, "max_tokens": 8}
    body |= {"ignore_eos": True, "temperature": 0.5, "seed": 1}
    with httpx.stream("POST", f"{api}/v1/completions", json=body, timeout=60, trust_env=False) as response:
        text = "".join(response.iter_text())
    if response.status_code != httpx.codes.OK or "[DONE]" not in text:
        raise RuntimeError(f"the API answered {response.status_code}: {text[:300]}")


def show(counts: Counts) -> None:
    print(f"{len(counts.files)} files (limit {FILES}), and {len(counts.stub_files)} generated:")
    print(*(f"  {name}" for name in counts.files), sep="\n")
    print(f"{len(counts.names)} names of a prompt (limit {NAMES}), and {len(counts.token_names)} of a token:")
    print(*(f"  {name}" for name in [*counts.names, *counts.token_names]), sep="\n")
    for field, places in counts.named_in.items():
        print(
            f"{field} in {len(places)} files (limit {NAMED_IN}), and {len(counts.stubs[field])} of the wire:"
        )
        print(*(f"  {name}" for name in places), sep="\n")


def main(
    check: Annotated[bool, typer.Option("--check", help="Status 1 if a limit does not hold.")] = False,
    keep: Annotated[
        Path | None, typer.Option(help="Folder for logs and traces; temporary if left out.")
    ] = None,
) -> None:
    """How large the house is for who reads it; see the module's docstring."""
    try:
        if keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
            counts = count(keep)
        else:
            with tempfile.TemporaryDirectory() as folder:
                counts = count(Path(folder))
    except (RuntimeError, StackError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
    show(counts)
    for words in counts.beyond:
        print(f"beyond: {words}")
    if check and counts.beyond:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
