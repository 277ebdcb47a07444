"""Version ranges admit a container's torch and the pins. Also the parts of `make test-versions`."""

import subprocess
import sys
import tomllib
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.versions import FILES, PYPROJECT, ROOT, count_results, lower_bounds

TORCHES = [
    "2.10.0a0+b4e4ee81d3.nv25.12",
    "2.11.0a0+eb65b36914.nv26.02",
    "2.11.0",
    "2.13.0+cu130",
    "2.15.0",
    "2.17.0a0+nv",
]


def requirements() -> list[Requirement]:
    return [Requirement(text) for text in tomllib.loads(PYPROJECT.read_text())["project"]["dependencies"]]


@pytest.mark.parametrize("torch", TORCHES)
def test_no_requirement_makes_pip_replace_the_torch_that_is_there(torch: str) -> None:
    """An installed package stays if every specifier contains its version. Pip admits pre-releases here."""
    direct = requirements()
    through = [Requirement(text) for r in direct for text in requires(r.name) or []]
    on_torch = [
        r for r in [*direct, *through] if r.name == "torch" and (r.marker is None or r.marker.evaluate({"extra": ""}))
    ]
    assert len(on_torch) > 1
    assert [str(r) for r in on_torch if not r.specifier.contains(torch, prereleases=True)] == []


def test_the_pins_lie_within_the_ranges() -> None:
    lines = (ROOT / "constraints.txt").read_text().split()
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    assert [str(r) for r in requirements() if not r.specifier.contains(pins[canonicalize_name(r.name)])] == []


def test_the_oldest_set_is_every_lower_bound(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(
        '[project]\ndependencies = ["b>=2.10.0a0", "a[x]>=1.2,<2; python_version > \\"3\\""]'
    )
    assert lower_bounds(tmp_path / "pyproject.toml") == ["a==1.2", "b==2.10.0"]
    assert len(lower_bounds()) == len(requirements())


TESTS = """
import pytest
@pytest.fixture
def broken(): raise OSError
def test_good(): pass
def test_bad(): assert False
def test_error(broken): pass
@pytest.mark.skip
def test_skipped(): pass
"""


def test_results_are_counted_from_the_file_of_a_real_run(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(TESTS)
    subprocess.run(
        [sys.executable, "-m", "pytest", "--junitxml=results.xml"], cwd=tmp_path, capture_output=True, check=False
    )
    assert count_results(tmp_path / "results.xml") == {
        "tests passed": "1",
        "tests failed": "**2**: test_bad, test_error",
        "tests skipped": "1",
    }


def test_the_chosen_files_exist() -> None:
    assert [file for file in FILES if not (ROOT / file).is_file()] == []
