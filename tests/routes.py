"""Which routes an app has, hidden ones included, however FastAPI puts routers together."""

import pytest
from fastapi import APIRouter


def routes_added(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Fills with "GET /path" and the like of every route added from now on, without the prefix /v1."""
    found: set[str] = set()
    add = APIRouter.add_api_route

    def add_and_note(router: APIRouter, path: str, *arguments: object, **more: object) -> None:
        methods = more.get("methods") or ["GET"]
        assert isinstance(methods, list | set)
        found.update(f"{method} {path.removeprefix('/v1')}" for method in methods)
        add(router, path, *arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(APIRouter, "add_api_route", add_and_note)
    return found
