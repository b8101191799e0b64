"""`prad batch`: a file of requests asked of a running server, so many at once; it goes on where it was broken
off."""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prad.http.asking import DEFAULT_API, reaching, reason
from prad_cli.batch_lines import AnswerFile, BatchFileError, Request, names_of, read_requests
from prad_cli.operating import counted, credential, fail, print_json, progress_console

if TYPE_CHECKING:
    import httpx
    from tenacity import Future, RetryCallState

_AGAIN = (408, 429, 502, 503, 504)
"""What is no answer: a busy server, or one that starts again."""
_LONGEST_WAIT_S = 30.0
_READ_S = 1200.0  # twice as long as a server lets a request take


def batch_command(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="IN",
            help="Requests, one a line, as OpenAI's batches have them.",
            exists=True,
            dir_okay=False,
        ),
    ],
    target: Annotated[
        Path, typer.Argument(metavar="OUT", help="Answers; those that are there already are not asked again.")
    ],
    url: Annotated[
        str, typer.Option(help="The server; PRAD_API_KEY is shown to it.", envvar="PRAD_API_URL")
    ] = DEFAULT_API,
    at_once: Annotated[int, typer.Option(help="Requests under way at once.", min=1, max=1024)] = 64,
    patience: Annotated[
        float,
        typer.Option(help="Seconds that a request is asked again while the server is busy or away.", min=0),
    ] = 600.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print what came out as JSON.")] = False,
) -> None:
    """Ask a file of requests, of any tasks, and write the answers to another.

    Each line of IN is {"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": {...}}.

    OUT gets the answers as they come, those of refused requests too (status 1 then). Whenever it is broken
    off, the same command goes on.

    Example:  prad batch in.jsonl out.jsonl --url http://127.0.0.1:8000
    """
    if source.resolve() == target.resolve():
        raise typer.BadParameter("IN and OUT are the same file")
    names, began = names_of(source), time.monotonic()
    with AnswerFile(target) as answers:
        if others := answers.done.keys() - names:
            raise BatchFileError(
                f"{target} has answers to other requests, as {min(others)!r}: name another file"
            )
        before = len(answers.done)
        left = (request for request in read_requests(source) if request.name not in answers.done)
        try:
            asyncio.run(_Run(url, answers, at_once, patience).ask_all(left, len(names)))
        except KeyboardInterrupt:
            told = f"{len(answers.done)} of {len(names)} answered; the same command goes on where this ended"
            typer.secho(f"stopped: {told}", err=True)
            raise typer.Exit(130) from None
        refused = sum(not answered for answered in answers.done.values())
        asked, seconds = len(names) - before, time.monotonic() - began
    if as_json:
        print_json({"requests": len(names), "asked": asked, "refused": refused, "seconds": round(seconds, 3)})
    else:
        rate = f"{asked} of them were asked in {seconds:.1f} s, {asked / seconds:.1f}/s"
        print(f"{counted(len(names), 'request has', 'requests have')} answers; {rate}")
    if refused:
        were = counted(refused, "request was", "requests were")
        fail(f"{were} refused: status_code is not 200 in {target}, and the body says why")


@dataclass(frozen=True, slots=True)
class _Run:
    url: str
    answers: AnswerFile
    at_once: int
    patience_s: float

    async def ask_all(self, requests: Iterator[Request], total: int) -> None:
        """Raises BatchFileError."""
        import httpx
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        there = reaching(self.url, BatchFileError, key=credential("PRAD_API_KEY"))
        limits = httpx.Limits(max_connections=self.at_once, max_keepalive_connections=self.at_once)
        columns = (TextColumn("asked"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=progress_console()) as progress:
            bar = progress.add_task("", total=total, completed=len(self.answers.done))
            timeout = httpx.Timeout(10.0, read=_READ_S, pool=None)
            async with httpx.AsyncClient(**there, timeout=timeout, limits=limits) as client:
                await self._require_server(client)

                async def work() -> None:
                    for request in requests:  # one after the other takes the next: nothing waits in between
                        await self._ask(client, request)
                        progress.advance(bar)

                try:
                    async with asyncio.TaskGroup() as tasks:
                        for _ in range(self.at_once):
                            tasks.create_task(work())
                except ExceptionGroup as errors:
                    raise errors.exceptions[0] from None

    async def _require_server(self, client: "httpx.AsyncClient") -> None:
        """Whatever it answers. Later it may be away for a while."""
        import httpx

        try:
            await client.get("/")
        except httpx.HTTPError as error:
            raise BatchFileError(
                f"no answer from {self.url}: {error}. Start a server with: prad serve; "
                "or name another with --url"
            ) from None

    async def _ask(self, client: "httpx.AsyncClient", request: Request) -> None:
        """Until there is an answer. Raises BatchFileError if there is none for too long."""
        import httpx
        from tenacity import (
            AsyncRetrying,
            RetryError,
            retry_if_exception_type,
            retry_if_result,
            stop_after_delay,
        )

        asking = AsyncRetrying(
            stop=stop_after_delay(self.patience_s),
            wait=_wait,
            retry=retry_if_exception_type(httpx.TransportError)
            | retry_if_result(lambda r: r.status_code in _AGAIN),
        )
        try:
            response: httpx.Response = await asking(client.post, request.url, json=request.body)
            body = response.json()
        except RetryError as error:
            raise BatchFileError(
                f"{request.name!r} got no answer for {self.patience_s:g} s: {_said(error.last_attempt)}; "
                "the same command goes on where this ended"
            ) from None
        except ValueError:
            raise BatchFileError(
                f"{self.url}{request.url} answers {response.status_code} and no JSON: is it an API?"
            ) from None
        if response.status_code == 401:
            raise BatchFileError(f"{self.url} answers 401: {reason(response)}")
        self.answers.add(request.name, response.status_code, response.headers, body)


def _said(attempt: "Future") -> str:
    """Why there was no answer."""
    if attempt.failed:
        return f"{attempt.exception()}"
    response: httpx.Response = attempt.result()
    return f"it answers {response.status_code}: {response.text[:200]}"


def _wait(state: "RetryCallState") -> float:
    """As long as the server says, else twice as long each time."""
    grows = min(0.5 * 2.0**state.attempt_number, _LONGEST_WAIT_S)
    outcome = state.outcome
    if outcome is None or outcome.failed:
        return grows
    told = outcome.result().headers.get("retry-after", "")
    return min(float(told), _LONGEST_WAIT_S) if told.isdecimal() and float(told) > grows else grows
