"""The log: what came from outside can't forge a line, and machines can read every one."""

import io
import json
import logging

import pytest

from emflow.log import set_up

HOSTILE = "a\nERROR forged \x1b[31m\u202egnp.h5 \udcff"


@pytest.fixture
def logger():
    made = logging.getLogger("emflow")
    before = (made.handlers[:], made.level, made.propagate)
    yield made
    made.handlers[:], made.propagate = before[0], before[2]
    made.setLevel(before[1])


def test_lines_for_people(logger):
    stream = io.StringIO()
    set_up(level="info", stream=stream)
    logger.debug("not told")
    logger.warning("found %s", HOSTILE, extra={"job": "0123456789abcdef-01", "acquisition": "0123456789abcdef"})
    [line] = stream.getvalue().splitlines()
    assert "WARNING found a\\nERROR forged \\x1b[31m\\u202egnp.h5 \\udcff [0123456789abcdef-01]" in line
    assert line.isprintable()


def test_objects_for_machines(logger):
    stream = io.StringIO()
    set_up(level="DEBUG", as_json=True, stream=stream)
    logger.getChild("part").debug("found %s", HOSTILE, extra={"acquisition": "0123456789abcdef"})
    [line] = stream.getvalue().splitlines()
    said = json.loads(line)
    assert line.isascii()
    assert (said["level"], said["logger"], said["acquisition"]) == ("debug", "emflow.part", "0123456789abcdef")
    assert said["message"].isprintable()
    assert said["time"].endswith("+00:00")


@pytest.mark.parametrize("as_json", [False, True])
def test_tracebacks_are_kept_and_printable(logger, as_json):
    stream = io.StringIO()
    set_up(level="info", as_json=as_json, stream=stream)
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        logger.exception("broken")
    text = stream.getvalue()
    assert "Traceback" in text
    assert "ValueError" in text
    assert "\x1b" not in text
    assert all(line.isprintable() for line in text.splitlines())
    if as_json:
        assert "\n".join(json.loads(text)["traceback"]).count("ValueError") >= 1


def test_text_that_was_made_printable_before_stays_as_it_is(logger):
    stream = io.StringIO()
    set_up(level="info", stream=stream)
    logger.info("stalled %s", "a\\nb")
    assert "a\\nb" in stream.getvalue()
    assert "a\\\\nb" not in stream.getvalue()


def test_set_up_again_replaces_and_does_not_reach_the_root(logger):
    first, second, root = io.StringIO(), io.StringIO(), io.StringIO()
    handler = logging.StreamHandler(root)
    logging.getLogger().addHandler(handler)
    try:
        set_up(level="info", stream=first)
        set_up(level="error", stream=second)
        logger.info("no")
        logger.error("yes")
    finally:
        logging.getLogger().removeHandler(handler)
    assert first.getvalue() == ""
    assert second.getvalue().count("yes") == 1
    assert "no" not in second.getvalue()
    assert root.getvalue() == ""
