"""What runs the tests: the process that commands are forked from, the certificates, what begins first."""

import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest

from tests import forked
from tests.conftest import LONGEST

ROOT = Path(__file__).parents[2]
BEGIN = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests import forked; forked.wanted = True; "
SAY = "ended = forked.prad('--version'); print(ended.returncode, ended.stdout, ended.stderr)"


def _python(code: str, folder: Path, **environment: str) -> str:
    """What it prints in a process that starts in `folder`, and does not find the project by PYTHONPATH."""
    others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path != str(ROOT)]
    paths = os.pathsep.join([str(folder), *others])
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths, **environment},
        check=True,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        timeout=120,
    ).stdout


@pytest.mark.long
def test_commands_are_forked_from_what_has_imported_all_also_in_another_folder(tmp_path: Path) -> None:
    assert _python(f"{BEGIN} forked.begin(); {SAY}", tmp_path).startswith("0 ")


@pytest.mark.long
def test_a_failed_import_is_named_by_what_is_forked(tmp_path: Path) -> None:
    (tmp_path / "without.py").write_text(
        "import sys; sys.modules['prad.training.evaluate'] = None", encoding="utf-8"
    )
    without = "forked._context.set_forkserver_preload(['without', 'tests.imported'])"
    said = _python(f"{BEGIN} {without}; forked.begin(); {SAY}", tmp_path)
    assert said.startswith("1 "), said
    assert "prad.training.evaluate: ModuleNotFoundError" in said


def test_what_runs_within_another_program_is_not_forked(tmp_path: Path) -> None:
    with (
        forked.ForkedStack(tmp_path, {"decode": ("-m", "trace")}) as stack,
        pytest.raises(ValueError, match="cannot be forked within"),
    ):
        stack.start("decode", [])


def test_installing_others_programs_has_the_certificates_and_proxies_of_the_user(tmp_path: Path) -> None:
    names = ("SSL_CERT_FILE", "SSL_CERT_DIR", "NO_PROXY", "PRAD_CACHE_DIR")
    mine = {name: str(tmp_path / name) for name in names}
    code = f"{BEGIN} import os, tests.outside.clients; print([os.environ.get(name) for name in {names}])"
    assert _python(code, tmp_path, **mine).strip() == str(list(mine.values()))


def test_what_begins_first_is_there() -> None:
    assert [name for name in LONGEST if not (ROOT / name).is_file()] == []


def test_thorough_draws_anew_every_time() -> None:
    """Also where Hypothesis sees CI, and would draw the same."""
    assert not hypothesis.settings.get_profile("thorough").derandomize
