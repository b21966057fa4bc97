"""A reader that goes away (`| head`) is no error and leaves no traceback."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["run", "--help"], ["list"], ["doctor"]])
def test_a_closed_pipe_is_no_error(arguments):
    reader, writer = os.pipe()
    os.close(reader)  # the fault: nobody reads
    with pytest.raises(BrokenPipeError):
        os.write(writer, b"x")
    done = subprocess.run(
        [sys.executable, "-m", "distunlearn", *arguments], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120
    )
    os.close(writer)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr
