import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from emflow import registry
from emflow.errors import Unavailable
from emflow.prober import ProbeLimits, Prober
from emflow.synthetic import write_merlin, write_npy
from mpi_kernels.contract import Header, Member
from mpi_kernels.errors import FormatError, Incomplete, KernelError, MissingData, NotThisFormat
from mpi_kernels.exact import ExactScan

READER = """
import os, time
from mpi_kernels.contract import Header, Member
from mpi_kernels.errors import FormatError, Incomplete, MissingData


class Reader:
    suffixes = (".any",)

    def probe(self, path):
        with open(path) as file:
            order = file.read()
        if order == "crash":
            os.kill(os.getpid(), 11)
        elif order == "exit":
            os._exit(3)
        elif order == "hang":
            time.sleep(3600)
        elif order == "burn":
            while True:
                pass
        elif order == "swallow":
            return bytearray(1 << 34)
        elif order == "bug":
            raise ZeroDivisionError("a bug")
        elif order == "print":
            print("noise")
            os.write(1, b"more noise")
        elif order == "write":
            with open(path + ".out", "w") as file:
                file.write("x")
        elif order == "incomplete":
            raise Incomplete("wait", path=path, frame=7, next_step="wait more")
        elif order == "missing":
            raise MissingData("no frame", path=path, frame=3)
        elif order == "strange":
            return Header(format="any", kind="image", scan_shape=(), det_shape=(1, 1), dtype="uint8", members=(),
                          rule="exact", metadata={"x": object()})
        return Header(format="any", kind="stack", scan_shape=(5,), det_shape=(2, 3), dtype="uint16", rule="exact",
                      members=(Member(path=path, suffix=".any", size=1),), metadata={"kV": 300.0, "pid": os.getpid()})

    def open(self, path):
        raise NotImplementedError
"""


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"reader_{os.getpid()}_{time.monotonic_ns()}"
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / f"{name}.py").write_text(READER)
    monkeypatch.syspath_prepend(str(tmp_path / "plugins"))
    return f"{name}:Reader"


@pytest.fixture
def prober(reader: str) -> Iterator[Prober]:
    with Prober({"any": reader}, ProbeLimits(wall_s=10, cpu_s=1)) as made:
        yield made


def order(folder: Path, text: str) -> str:
    path = folder / f"{text}.any"
    path.write_text(text)
    return str(path)


def test_a_header_comes_back_as_it_was(tmp_path: Path, prober: Prober) -> None:
    assert prober.pid is None  # started by the first probe
    path = order(tmp_path, "fine")
    name, header = prober.probe(path)
    assert name == "any"
    assert header == Header(
        format="any",
        kind="stack",
        scan_shape=(5,),
        det_shape=(2, 3),
        dtype="uint16",
        rule="exact",
        members=(Member(path=path, suffix=".any", size=1),),
        metadata={"kV": 300.0, "pid": prober.pid},
    )


def test_one_child_serves_many_probes(tmp_path: Path, prober: Prober) -> None:
    path = order(tmp_path, "fine")
    assert len({prober.probe(path)[1].metadata["pid"] for _ in range(20)}) == 1
    assert prober.pid != os.getpid()


@pytest.mark.parametrize(
    ("text", "kind", "frame"), [("incomplete", Incomplete, 7), ("missing", MissingData, 3), ("bug", FormatError, None)]
)
def test_errors_come_back_as_what_they_are(
    tmp_path: Path, prober: Prober, text: str, kind: type[KernelError], frame: int | None
) -> None:
    path = order(tmp_path, text)
    with pytest.raises(KernelError) as caught:
        prober.probe(path)
    assert type(caught.value) is kind
    assert (caught.value.path, caught.value.frame) == (path, frame)
    first = prober.pid
    prober.probe(order(tmp_path, "fine"))
    assert prober.pid == first


def test_a_missing_file_a_folder_and_nobodys_file(tmp_path: Path, prober: Prober, reader: str) -> None:
    for path in (tmp_path / "gone.any", tmp_path):
        with pytest.raises(FormatError, match=str(path)):
            prober.probe(str(path))
    with Prober({"npy": "mpi_kernels.formats.npy:Npy"}) as other, pytest.raises(NotThisFormat):
        other.probe(order(tmp_path, "fine"))


@pytest.mark.parametrize("text", ["crash", "exit"])
def test_a_file_that_kills_its_reader_is_named_and_the_next_one_is_read(
    tmp_path: Path, prober: Prober, text: str
) -> None:
    path = order(tmp_path, text)
    ending = {"crash": "signal 11", "exit": "exit code 3"}[text]
    with pytest.raises(FormatError, match="crashed the reader") as caught:
        prober.probe(path)
    assert caught.value.path == path
    assert ending in str(caught.value)
    assert prober.probe(order(tmp_path, "fine"))[0] == "any"


def test_a_file_that_burns_time_ends_at_the_limit(tmp_path: Path, prober: Prober) -> None:
    start = time.monotonic()
    with pytest.raises(FormatError, match="hung the reader"):
        prober.probe(order(tmp_path, "burn"))
    assert time.monotonic() - start < 8  # before the deadline: the limit of processor time ended it


def test_a_file_that_hangs_its_reader_costs_the_deadline_only(tmp_path: Path, reader: str) -> None:
    with Prober({"any": reader}, ProbeLimits(wall_s=0.3)) as prober:
        prober.probe(order(tmp_path, "fine"))
        first = prober.pid
        start = time.monotonic()
        with pytest.raises(FormatError, match="no header within 0"):
            prober.probe(order(tmp_path, "hang"))
        assert time.monotonic() - start < 5
        assert prober.probe(order(tmp_path, "fine"))[0] == "any"
        assert prober.pid != first


def test_a_header_that_wants_too_much_memory_is_refused(tmp_path: Path, prober: Prober) -> None:
    with pytest.raises(FormatError, match="more memory than a probe may use"):
        prober.probe(order(tmp_path, "swallow"))


def test_a_reader_can_neither_disturb_the_answers_nor_write(tmp_path: Path, prober: Prober) -> None:
    assert prober.probe(order(tmp_path, "print"))[0] == "any"
    with pytest.raises(KernelError):
        prober.probe(order(tmp_path, "write"))
    out = tmp_path / "write.any.out"
    assert not out.exists() or out.stat().st_size == 0
    with pytest.raises(FormatError, match="TypeError"):
        prober.probe(order(tmp_path, "strange"))


def test_names_that_are_not_text_survive(tmp_path: Path, prober: Prober) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\n\"$(x)'.any")
    Path(path).write_text("fine")
    header = prober.probe(path)[1]
    assert header.members[0].path == path
    Path(path).write_text("missing")
    with pytest.raises(MissingData) as caught:
        prober.probe(path)
    assert caught.value.path == path
    assert "\n" not in str(caught.value)


def test_a_child_killed_by_somebody_else_does_not_blame_the_file(tmp_path: Path, prober: Prober) -> None:
    path = order(tmp_path, "fine")
    prober.probe(path)
    assert prober.pid is not None
    os.kill(prober.pid, signal.SIGKILL)
    assert prober.probe(path)[0] == "any"


def test_several_threads_may_ask(tmp_path: Path, prober: Prober) -> None:
    path = order(tmp_path, "fine")
    names: list[str] = []
    threads = [threading.Thread(target=lambda: names.append(prober.probe(path)[0])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert names == ["any"] * 8


def test_a_plugin_that_is_not_there_is_named() -> None:
    with Prober({"x": "no_such_module:Reader"}) as prober, pytest.raises(Unavailable, match="no_such_module"):
        prober.probe("x")


def test_the_child_ends_with_its_parent(tmp_path: Path, reader: str) -> None:
    code = (
        "import sys, os; from emflow.prober import Prober; p = Prober({'any': sys.argv[1]}); p.probe(sys.argv[2]); "
        "print(p.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    path = order(tmp_path, "fine")
    found = subprocess.run(
        [sys.executable, "-c", code, reader, path],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "plugins")},
    )
    assert found.returncode == -9, found.stderr
    child = Path(f"/proc/{int(found.stdout)}")
    deadline = time.monotonic() + 10
    while child.exists() and "(zombie)" not in (child / "status").read_text() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not child.exists() or "(zombie)" in (child / "status").read_text()


def test_close_ends_the_child_and_a_later_probe_starts_another(tmp_path: Path, prober: Prober) -> None:
    path = order(tmp_path, "fine")
    prober.probe(path)
    first = prober.pid
    assert first is not None
    prober.close()
    prober.close()
    assert not Path(f"/proc/{first}").exists()
    assert prober.probe(path)[0] == "any"


def test_a_file_that_grows_is_told_with_the_place_of_its_frames(tmp_path: Path) -> None:
    scan = ExactScan((3, 5), (6, 8), "uint16", seed=1)
    whole = {name: write(scan, tmp_path / f"a.{end}").read_bytes()
             for name, end, write in (("npy", "npy", write_npy), ("merlin", "mib", write_merlin))}  # fmt: skip
    names = {name: registry.target("formats", name) for name in ("npy", "merlin", "hdf5")}
    with Prober(names) as prober:
        for name, end in (("npy", "npy"), ("merlin", "mib")):
            path = tmp_path / f"a.{end}"
            path.write_bytes(whole[name][: len(whole[name]) // 2])
            found = prober.probe_growing(str(path))
            assert (found.format, found.header.frames) == (name, 15)
            assert found.first + 15 * found.record == len(whole[name])
        (tmp_path / "a.hdr").unlink()
        with pytest.raises(Incomplete, match="how many frames"):
            prober.probe_growing(str(tmp_path / "a.mib"))
        (tmp_path / "a.h5").write_bytes(b"x")
        with pytest.raises(FormatError, match="while it grows"):
            prober.probe_growing(str(tmp_path / "a.h5"))


def test_a_growing_file_that_kills_its_reader_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "growing_reader.py").write_text(READER + "\n    probe_growing = open_growing = probe\n")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "a.any").write_text("crash")
    with Prober({"any": "growing_reader:Reader"}) as prober, pytest.raises(FormatError, match="crashed the reader"):
        prober.probe_growing(str(tmp_path / "a.any"))
