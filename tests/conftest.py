"""Shared fixtures: class folders of tiny pictures, real datasets where they are present, the command line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")
if WORKER and hasattr(
    os, "sched_setaffinity"
):  # before torch counts them: two teams of threads on the same cores wait for each other
    CORES = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {CORES[int(WORKER.removeprefix("gw")) % len(CORES)]})

import pytest  # noqa: E402

from pictures import REAL_DATA, draw, folder_hash, folder_times  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file first, so that no worker ends with it alone."""
    items.sort(key=lambda item: item.path.name != "test_detr.py")


@pytest.fixture
def make_images(tmp_path: Path) -> Callable[..., Path]:
    """Writes class folders of learnable pictures; returns the folder."""

    def make(per_class: int = 20, classes: int = 3, name: str = "images", suffix: str = "png", start: int = 0) -> Path:
        root = tmp_path / name
        for kind in range(classes):
            folder = root / f"class{kind}"
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(start, start + per_class):
                draw(1000 * kind + number, kind % 3).save(folder / f"{number:03d}.{suffix}")
        return root

    return make


@pytest.fixture(scope="session")
def whole_real_data() -> Iterator[Path]:
    """The folder of real datasets, whose content is the same after all tests as before the first."""
    if not REAL_DATA.is_dir():
        pytest.skip("the real datasets are not beside this checkout")
    before = folder_hash(REAL_DATA)
    yield REAL_DATA
    assert folder_hash(REAL_DATA) == before, "the tests changed the real datasets"


@pytest.fixture
def real_data(whole_real_data: Path) -> Iterator[Path]:
    """The folder of real datasets, untouched by the test; the test is skipped where it is absent."""
    before = folder_times(whole_real_data)
    yield whole_real_data
    assert folder_times(whole_real_data) == before, "the test touched the real datasets"


@pytest.fixture
def run_here(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:  # fmt: skip
    """As `run_cli`, in this process: for what another test shows of a real one."""
    monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(signal.SIGTERM)

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        from goodfit.cli.main import main

        capsys.readouterr()
        return subprocess.CompletedProcess(words, main(words), *capsys.readouterr())

    yield run
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def run_cli(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `goodfit` as a user does, in a process of its own, in an empty folder."""

    def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "goodfit", *words],
            cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False, env={**os.environ, **environment},
        )  # fmt: skip

    return run
