"""The image: it compiles what is served, and has the locks that its installing reads."""

import re
from pathlib import Path

from deploy import image
from prad.lm.families import FAMILIES

ROOT = Path(__file__).parents[2]


def test_every_family_is_compiled() -> None:
    assert {name.removesuffix("_text") for name in FAMILIES} == set(image.FAMILIES)


def test_it_has_the_locks_that_its_installing_reads_and_no_others() -> None:
    read = (ROOT / "locks" / "install").read_text(encoding="utf-8")
    names = {"install", *re.findall(r"\$locks/([a-z]+\.txt)", read), "serve.txt"}
    file = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8")
    (copied,) = re.findall(r"^COPY (.*) /tmp/locks/$", file, re.MULTILINE)
    assert {name.removeprefix("locks/") for name in copied.split()} == names
