"""Strict JSON for the records that cross hosts, and files that are whole or not there."""

import threading
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpi_kernels import jsonfile
from mpi_kernels.contract import Event, JobSpec, Recipe, ReductionSpec, ResultManifest, SourceSpec
from mpi_kernels.errors import FormatError


@dataclass(frozen=True, kw_only=True)
class Inner:
    n: int
    word: Literal["a", "b"] = "a"


@dataclass(frozen=True, kw_only=True)
class Record:
    inner: Inner
    numbers: tuple[float, ...] = ()
    pair: tuple[int, str] | None = None
    table: dict[str, Inner] = field(default_factory=dict)
    free: Any = None
    flag: bool = False
    v: int = 1


inners = st.builds(Inner, n=st.integers(), word=st.sampled_from(["a", "b"]))
texts = st.text(st.characters(), max_size=20)
floats = st.floats(allow_nan=False, allow_infinity=False)
plain = st.recursive(st.none() | st.booleans() | st.integers() | floats | texts, lambda x: st.lists(x, max_size=3))
records = st.builds(
    Record,
    inner=inners,
    numbers=st.lists(floats, max_size=3).map(tuple),
    pair=st.none() | st.tuples(st.integers(), texts),
    table=st.dictionaries(texts, inners, max_size=3),
    free=plain,
    flag=st.booleans(),
)


@given(records)
def test_every_record_comes_back(record):
    data = jsonfile.encode(record)
    assert data.isascii()
    assert b"\n" not in data
    assert jsonfile.decode(Record, data) == record


def test_records_of_the_contract_come_back():
    spec = JobSpec(
        job="0123456789abcdef-01",
        acquisition="0123456789abcdef",
        trace="t",
        recipe=Recipe(name="r", reductions=(ReductionSpec(use="m:A", name="a", parameters={"x": [1, 2.5, "s"]}),)),
        source=SourceSpec(path="/a/\udcff.h5", format="m:F"),
        scheduler="local",
        planned_ns=7,
    )
    assert jsonfile.decode(JobSpec, jsonfile.encode(spec)) == spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[]", "Record: expected a table"),
        ("{}", "field 'inner' is missing"),
        ('{"inner": {"n": 1, "m": 2}}', "Record.inner: unknown field 'm'; known are n, word"),
        ('{"inner": {"n": "1"}}', "Record.inner.n: expected int, got '1'"),
        ('{"inner": {"n": true}}', "Record.inner.n: expected int, got True"),
        ('{"inner": {"n": 1.0}}', "Record.inner.n: expected int, got 1.0"),
        ('{"inner": {"n": 1, "word": "c"}}', "Record.inner.word: expected one of"),
        ('{"inner": {"n": 1}, "numbers": [1, "x"]}', r"Record.numbers\[1\]: expected float"),
        ('{"inner": {"n": 1}, "numbers": 3}', "Record.numbers: expected a list"),
        ('{"inner": {"n": 1}, "pair": [1]}', "Record.pair: expected tuple|Record.pair"),
        ('{"inner": {"n": 1}, "table": {"k": 1}}', "Record.table.k: expected a table"),
        ('{"inner": {"n": 1}, "flag": 1}', "Record.flag: expected bool"),
        ('{"inner": {"n": 1}, "v": 2}', "version 2 is not 1"),
    ],
)
def test_wrong_json_names_the_field(text, message):
    with pytest.raises(FormatError, match=message) as caught:
        jsonfile.decode(Record, text, path="/x/job.json")
    assert caught.value.path == "/x/job.json"


def test_what_json_has_no_word_for_is_not_written():
    with pytest.raises(ValueError, match="JSON"):
        jsonfile.encode(Inner(n=float("nan")))


def test_reading_names_the_file(tmp_path):
    (tmp_path / "r.json").write_text("{}")
    with pytest.raises(FormatError, match=r"r\.json"):
        jsonfile.read(Event, tmp_path / "r.json")
    with pytest.raises(FileNotFoundError):
        jsonfile.read(ResultManifest, tmp_path / "none.json")


def test_a_reader_sees_the_old_or_the_new_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    contents = [bytes([n]) * 200_000 for n in range(30)]
    jsonfile.publish(path, contents[0])
    seen, done = set(), threading.Event()

    def look():
        while not done.is_set():
            seen.add(path.read_bytes())

    reader = threading.Thread(target=look)
    reader.start()
    for data in contents:
        jsonfile.publish(path, data)
    done.set()
    reader.join()
    assert seen <= set(contents)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "x").write_text("in the way")
    with pytest.raises(OSError, match="target"):
        jsonfile.publish(tmp_path / "target", b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["target"]
    with pytest.raises(FileNotFoundError):
        jsonfile.publish(tmp_path / "none" / "file", b"new")
