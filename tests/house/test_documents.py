"""Documents name what there is: classes in their rooms, files behind links, each page in its index."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")],
)
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def _class_map() -> list[tuple[tuple[str, ...], str]]:
    """The rooms of each section, and each class that its table names."""
    found = []
    for section in re.split(r"^### ", ARCHITECTURE, flags=re.MULTILINE)[1:]:
        title, _, rest = section.partition("\n")
        rooms = tuple(re.findall(r"`([a-z_/]+)`", title))
        for row in re.findall(r"^\| `.*$", rest.partition("\n## ")[0], re.MULTILINE):
            found += [(rooms, name) for name in re.findall(r"`([A-Z]\w+)`", row)]
    return found


def _classes(room: str) -> set[str]:
    """Names of the classes, and of the types given a name, in a room's files."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / room).rglob("*.py")]
    return {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


def test_the_class_map_has_all_rooms() -> None:
    rooms = {room for rooms, _ in _class_map() for room in rooms}
    assert rooms >= {"prad/core", "prad/lm", "prefill_service", "kvtransfer", "decode_service"}
    assert len(_class_map()) > 50


@pytest.mark.parametrize("rooms", sorted({rooms for rooms, _ in _class_map()}))
def test_every_class_of_the_map_is_in_its_room(rooms: tuple[str, ...]) -> None:
    there = {name for room in rooms for name in _classes(room)}
    assert {name for of, name in _class_map() if of == rooms} - there == set()


def test_every_class_of_the_walk_exists() -> None:
    walk = ARCHITECTURE.partition("## The life of a request")[2].partition("\n## ")[0]
    named = set(re.findall(r"`([A-Z][a-z]\w*[A-Z]\w*)`", walk))
    rooms = ("prad", "prefill_service", "kvtransfer", "decode_service", "adapter_registry")
    assert named - {name for room in rooms for name in _classes(room)} == set()
    assert len(named) > 10


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)\s#]+)[^)\s]*\)", document.read_text(encoding="utf-8"))
    local = [link for link in links if not re.match(r"[a-z]+:", link)]
    assert [link for link in local if not (document.parent / link).exists()] == []


def test_every_decision_is_in_the_index() -> None:
    folder = ROOT / "docs" / "decisions"
    index = (folder / "README.md").read_text(encoding="utf-8")
    pages = sorted(path.name for path in folder.glob("[0-9]*.md"))
    assert re.findall(r"\]\((\d\d-[a-z0-9-]+\.md)\)", index) == pages
    for number, name in enumerate(pages, 1):
        assert (folder / name).read_text(encoding="utf-8").startswith(f"# {number}. "), name


def test_every_test_that_a_page_names_is_there() -> None:
    tests = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    there = {name for text in tests for name in re.findall(r"def (test_\w+)\(", text)}
    named = {
        name for page in DOCUMENTS for name in re.findall(r"`(test_\w+)`", page.read_text(encoding="utf-8"))
    }
    assert named - there == set()
    assert len(named) > 40
