"""Files that appear whole or not at all."""

import os
import subprocess
import sys

import pytest

from d3_hf.files import atomic_file

WRITER = """
import os, sys
from pathlib import Path
from d3_hf.files import atomic_file
os.getpid = lambda: 1
for number in range(50):
    with atomic_file(Path(sys.argv[1])) as beside:
        beside.write_text(sys.argv[2] * 100_000)
"""


def test_a_file_is_replaced_whole(tmp_path):
    file = tmp_path / "new" / "folder" / "table.md"
    for text in ("old", "new"):
        with atomic_file(file) as beside:
            beside.write_text(text)
            assert beside.name == file.name and (not file.exists() if text == "old" else file.read_text() == "old")
        assert file.read_text() == text and os.listdir(file.parent) == ["table.md"]


def test_a_writer_that_raises_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    (tmp_path / "table.md").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_file(tmp_path / "table.md") as beside:
        beside.write_text("half")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["table.md"] and (tmp_path / "table.md").read_text() == "old"


def test_a_writer_that_wrote_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "table.md"):
        pass
    assert os.listdir(tmp_path) == []


def test_others_may_read_what_was_written(tmp_path):
    (tmp_path / "plain").write_text("")
    with atomic_file(tmp_path / "atomic") as beside:
        beside.write_text("")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_writers_of_one_process_number_do_not_meet(tmp_path):
    """As in two containers, each of whose processes is number 1."""
    file = tmp_path / "results"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(file), letter]) for letter in "ab"]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert file.read_text() in ("a" * 100_000, "b" * 100_000) and os.listdir(tmp_path) == ["results"]
