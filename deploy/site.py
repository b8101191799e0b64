"""`python -m deploy.site`: lays out what `mkdocs build` reads, in build/site-pages.

docs/ as it is, and below `project/` every other file of the project that a page links to, with links made to
fit: a page of a site cannot reach above its folder. A link to a folder becomes its text. Only the standard
library: this runs where the site is built, without the project's own packages.
"""

import os
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = ROOT / "build" / "site-pages"
_OTHERS = "project"
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)([^)]*)\)")
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def place(path: Path) -> Path:
    """Where a file of the project is on the site, below the pages' folder."""
    return path.relative_to(DOCS) if path.is_relative_to(DOCS) else Path(_OTHERS) / path.relative_to(ROOT)


def lay_out(into: Path) -> list[Path]:
    """Writes all pages, and what they link to; returns where each is. FileNotFoundError for a dead link."""
    shutil.rmtree(into, ignore_errors=True)
    waiting = sorted(path for path in DOCS.rglob("*") if path.is_file())
    known = set(waiting)
    for path in waiting:  # grows
        target = into / place(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix != ".md":
            shutil.copyfile(path, target)
            continue
        text, linked = fitted(path)
        target.write_text(text, encoding="utf-8")
        waiting += sorted(set(linked) - known)
        known |= set(linked)
    return [place(path) for path in waiting]


def fitted(page: Path) -> tuple[str, list[Path]]:
    """A page's text with its links as they are on the site, and the files that these lead to."""
    linked: list[Path] = []

    def fit(found: re.Match[str]) -> str:
        mark, text, link, rest = found.groups()
        if re.match(r"[a-z]+:", link):
            return found[0]
        target = Path(os.path.normpath(page.parent / link))
        if target.is_dir():
            return text
        if not target.is_file():
            raise FileNotFoundError(f"{page.relative_to(ROOT)} links to {link}, which is not there")
        linked.append(target)
        there = os.path.relpath(place(target), place(page).parent)
        return f"{mark}[{text}]({there}{rest})"

    text, parts, end = page.read_text(encoding="utf-8"), [], 0
    for fence in _FENCE.finditer(text):  # code is no link
        parts += [_LINK.sub(fit, text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join((*parts, _LINK.sub(fit, text[end:]))), linked


def main() -> None:
    """Lays the site out."""
    pages = lay_out(PAGES)
    print(f"{len(pages)} files are in {PAGES.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
