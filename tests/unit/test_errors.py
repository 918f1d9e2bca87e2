"""Errors of the service: exit codes as promised, and text that no name from outside can break."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emflow import errors
from emflow.errors import EmflowError, printable
from mpi_kernels.errors import KernelError


@pytest.mark.parametrize(
    ("name", "code", "retryable"),
    [
        ("EmflowError", 1, False),
        ("UsageError", 2, False),
        ("Unavailable", 69, True),
        ("NoSpace", 69, True),
        ("JournalFull", 69, True),
        ("Busy", 75, True),
        ("NotAllowed", 77, False),
        ("ConfigError", 78, False),
        ("SourceChanged", 1, True),
        ("SubmitError", 1, False),
        ("JournalError", 1, False),
        ("StaleState", 1, True),
    ],
)
def test_exit_codes(name, code, retryable):
    error = getattr(errors, name)("it failed", next_step="Do this")
    assert isinstance(error, EmflowError)
    assert (error.exit_code, error.retryable) == (code, retryable)
    assert str(error) == "it failed. Do this"
    assert str(getattr(errors, name)("it failed")) == "it failed"


def test_every_error_class_is_in_the_table_above():
    classes = {
        n for n in dir(errors) if isinstance(getattr(errors, n), type) and issubclass(getattr(errors, n), Exception)
    }
    marks = test_exit_codes.pytestmark[0].args[1]
    assert classes == {name for name, *_ in marks}


@given(st.text(st.characters(), max_size=50))
def test_printable_text_is_printable_and_says_the_same(text):
    shown = printable(text)
    assert shown.isprintable()
    shown.encode("utf-8")  # raises where a lone surrogate is left
    back = shown.encode("latin-1", "backslashreplace").decode("unicode_escape")
    assert back == text or back.encode("utf-16", "surrogatepass") == text.encode("utf-16", "surrogatepass")


def test_kernel_errors_carry_the_file_the_frame_and_the_step():
    error = KernelError("is short", path="/d/a\n.mib", frame=7, next_step="Copy it again")
    assert str(error) == "/d/a\\n.mib: is short (frame 7). Copy it again"


def test_next_steps_are_sentences() -> None:
    """They follow a full stop, so each begins with a capital letter."""
    package = Path(__file__).parents[2] / "emflow"
    small = [
        f"{path.name}:{number}"
        for path in package.rglob("*.py")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(r"""next_step=f?["'][a-z]""", line)
    ]
    assert not small
