"""Shared fixtures: offline environment before anything of Hugging Face is imported, and the optional real data.

Where ``D3_HF_STRICT`` is set, as in CI, a test that is skipped for another reason than `EXPECTED_SKIPS` fails, and so does a
run that leaves warnings.
"""

import gc
import os
import re
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the test processes share the cores

import pytest  # noqa: E402

NO_DATA = "real data not found"
STRICT, WARNINGS = "D3_HF_STRICT" in os.environ, []
EXPECTED_SKIPS = re.compile(rf"needs a GPU|{NO_DATA}")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with real data and third-party checkpoints; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("D3_HF_SHARED") or Path(__file__).parents[2] / "shared")
    if not folder.is_dir():
        pytest.skip(f"{NO_DATA} at {folder.name}/; set D3_HF_SHARED to its folder")
    return folder


def pytest_collection_finish():
    # accelerate collects all garbage after each training, which takes longer than tiny trainings among all that is imported.
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session):
    gc.unfreeze()
    if STRICT and WARNINGS and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    if STRICT and WARNINGS:
        terminalreporter.write_line(f"{len(WARNINGS)} warnings, and none may be left here", red=True)


def pytest_warning_recorded(warning_message):
    WARNINGS.append(warning_message)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.skipped and STRICT:
        _, _, reason = report.longrepr
        if not EXPECTED_SKIPS.search(reason):
            report.outcome, report.longrepr = "failed", f"{item.nodeid} must not be skipped here ({reason})"
    return report
