"""The site's pages are there, in its navigation, and their links lead to pages and headings.

Without mkdocs, so that each run of the tests looks; a long one builds it, as `make docs` does.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.site import DOCS, ROOT, lay_out, place
from tests.outside import clients

CONFIG = ROOT / "mkdocs.yml"
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


class _Loader(yaml.SafeLoader):
    """Takes Python's names as text."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/name:", lambda _, suffix, __: suffix)


def named(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    inner = nav if isinstance(nav, list) else list(nav.values())
    return [name for part in inner for name in named(part)]


def anchors(text: str) -> set[str]:
    """Of a page's headings, as Python-Markdown makes them."""
    headings = re.findall(r"^#{1,6} +(.+?)\s*$", FENCE.sub("", text), re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", re.sub(r"\]\([^)]*\)", "]", each)).strip().lower() for each in headings)
    return {re.sub(r"[-\s]+", "-", each) for each in plain}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    into = tmp_path_factory.mktemp("site") / "pages"
    lay_out(into)
    return into


def test_every_page_is_in_the_navigation() -> None:
    config = yaml.load(CONFIG.read_text(encoding="utf-8"), _Loader)
    pages = named(config["nav"])
    assert len(set(pages)) == len(pages)
    assert [page for page in pages if not (DOCS / page).is_file()] == []
    own = {str(path.relative_to(DOCS)) for path in DOCS.glob("*.md")}
    assert own - set(pages) == set()
    wanted = {"quickstart.md", "concepts.md", "first-task.md", "operate.md", "api.md", "settings.md"}
    wanted |= {"performance.md", "quality.md", "reliability.md", "security.md", "faq.md", "comparison.md"}
    assert wanted <= set(pages)


def test_every_link_of_the_site_leads_somewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.md"))
    assert len(pages) > 40
    dead = []
    for page in pages:
        text = FENCE.sub("", page.read_text(encoding="utf-8"))
        for link, anchor in re.findall(r"\]\(([^)\s#]*)(?:#([^)\s]+))?[^)]*\)", text):
            if re.match(r"[a-z]+:", link):
                continue
            target = (page.parent / link).resolve() if link else page
            known = (
                anchors(target.read_text(encoding="utf-8")) if target.suffix == ".md" and anchor else {anchor}
            )
            if not target.is_relative_to(site.resolve()) or not target.is_file() or anchor not in known:
                dead.append((page.name, link, anchor))
    assert dead == []


def test_what_lies_outside_comes_along(site: Path) -> None:
    assert place(ROOT / "SECURITY.md") == Path("project/SECURITY.md")
    assert (site / "project" / "SECURITY.md").is_file()
    assert (site / "project" / "bench" / "results" / "headline.png").is_file()
    assert "](project/bench/results/headline.png)" in (site / "index.md").read_text(encoding="utf-8")
    assert "](../api.md)" not in (site / "index.md").read_text(encoding="utf-8")


def test_a_link_that_leads_nowhere_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.site.DOCS", tmp_path / "docs")
    monkeypatch.setattr("deploy.site.ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("```\n[x](gone.md)\n```\n[folder](../docs)", encoding="utf-8")
    lay_out(tmp_path / "pages")
    text = (tmp_path / "pages" / "a.md").read_text(encoding="utf-8")
    assert text == "```\n[x](gone.md)\n```\nfolder"
    (tmp_path / "docs" / "a.md").write_text("[x](gone.md)", encoding="utf-8")
    with pytest.raises(FileNotFoundError, match=r"docs/a.md links to gone.md"):
        lay_out(tmp_path / "pages")


@pytest.mark.long
def test_it_is_built_strictly(tmp_path: Path) -> None:
    """As `make docs` builds it."""
    lay_out(tmp_path / "build" / "site-pages")
    shutil.copyfile(CONFIG, tmp_path / "mkdocs.yml")
    command = [clients.python("mkdocs-material"), "-m", "mkdocs", "build", "--strict", "--quiet"]
    quietly = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    ended = subprocess.run(
        command, cwd=tmp_path, capture_output=True, encoding="utf-8", check=False, env=quietly
    )
    assert (ended.returncode, ended.stdout + ended.stderr) == (0, "")
    built = tmp_path / "build" / "site"
    assert (built / "reliability.html").is_file()
    assert "prompt-only.svg" in (built / "concepts.html").read_text(encoding="utf-8")
