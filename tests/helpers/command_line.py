"""`d3-hf` in this process."""

import sys

import pytest

from d3_hf import cli


def command(*argv):
    """Run `d3-hf` in this process; returns its exit code."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", ["d3-hf", *map(str, argv)])
        cli.main()
        pytest.fail("main returned")
    return stop.value.code
