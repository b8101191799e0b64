"""The paper's Table 4 on this machine: N requests of N different tasks at once; prefill, decode and total.

PrAd-PA and PrAd-LoRA are our server, asked through HTTP. PA and LoRA apply an adapter at every generated
token: in our own engine (in-process, no HTTP: the honest baseline), and LoRA also in PEFT's mixed-adapter
batch. Without adapters our own engine runs twice: as recorded steps, as the decode service does, and not
recorded, as its rows with adapters are. Speed-up: against PEFT's LoRA (in float32 where that is the faster),
and against the same method in our own engine.
"""

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.adapters import ready_adapters, write_peft_lora
from bench.contest import Contestant, contest, times
from bench.flags import Table4
from bench.kinds import named_dtypes
from bench.model import load, model_folder
from bench.own_engine import OwnEngine
from bench.peer import Peer
from bench.serving import served
from prad.adapters import METHODS

_METHODS = {"prad-pa": "PrAd-PA", "prad-lora": "PrAd-LoRA"}
_OWN = {"prad-pa": "PA, our engine", "prad-lora": "LoRA, our engine"}
_PLAIN = "no adapters, our engine"
_PEFT = "LoRA, PEFT"


def run(arguments: Table4) -> dict[str, Any]:
    model = load(arguments)
    most = max(arguments.tasks)
    methods = [method for method in _METHODS if method in METHODS]
    with tempfile.TemporaryDirectory() as name, ExitStack() as running:
        root = Path(name)
        folders = write_peft_lora(root / "lora", model, most, arguments.r)
        options = {"model": str(model_folder(arguments)), "adapters": folders}
        peft = {
            f"{_PEFT}{called}": running.enter_context(
                Peer("transformers", None, options | {"dtype": dtype}, root / f"{dtype}.log")
            )
            for dtype, called in named_dtypes(most).items()
        }
        server = running.enter_context(served(arguments, model, dict.fromkeys(methods, most)))
        for peer in peft.values():
            peer.wait_ready()
        tables = []
        for tasks in arguments.tasks:
            contestants = {
                _METHODS[method]: Contestant(server.generate, server.tasks[method][:tasks])
                for method in methods
            }
            for method, label in _OWN.items():
                own = OwnEngine(model, ready_adapters(model, method, tasks, arguments.r))
                contestants[label] = Contestant(own.generate, [label] * tasks)
            for label, recorded in ((_PLAIN, True), (f"{_PLAIN}, not recorded", False)):
                plain = OwnEngine(model, recorded=recorded)
                contestants[label] = Contestant(plain.generate, [None] * tasks)
            for label, peer in peft.items():
                contestants[label] = Contestant(peer.generate, list(folders)[:tasks])
            rows = contest(contestants, arguments, model, f"{tasks} tasks")
            tables.append({"tasks": tasks, "rows": _with_speed_ups(rows)})
        return {"model": arguments.model, "peers": next(iter(peft.values())).versions, "tables": tables}


def _with_speed_ups(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    named = {row["name"]: row for row in rows}
    peft = min((row for row in rows if row["name"].startswith(_PEFT)), key=lambda row: row["total_s"])
    for row in rows:
        own = named.get(f"{row['name'].removeprefix('PrAd-')}, our engine")
        row["over_peft"] = round(times(peft, row), 2)
        row["over_own_engine"] = None if own is None else round(times(own, row), 2)
    return rows


def plot(result: dict[str, Any], figure: Any) -> None:
    tables = result["tables"]
    axes = figure.subplots(1, len(tables), squeeze=False, sharey=True)[0]
    for at, table in zip(axes, tables, strict=True):
        names = [row["name"] for row in table["rows"]][::-1]
        prefill = [row["prefill_s"] for row in table["rows"]][::-1]
        decode = [row["decode_s"] for row in table["rows"]][::-1]
        at.barh(names, prefill, label="prefill")
        at.barh(names, decode, left=prefill, label="decode")
        at.set(title=f"{table['tasks']} tasks", xlabel="s")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
