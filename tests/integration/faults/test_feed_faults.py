"""The compiled readers when the world does not hold still: files that are cut off under a map, signals, little memory.

Each in a process of its own, since what goes wrong would end it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from mpi_kernels.contract import Reading

pytest.importorskip("mpi_kernels._native", reason="the extension is not built: pip install -e . (needs cc)")

READINGS: tuple[Reading, ...] = ("mmap", "read", "direct")

CUT = """
import os, sys, threading, time
import numpy as np
from mpi_kernels.contract import Header
from mpi_kernels.errors import MissingData
from mpi_kernels.feed import Feed
from mpi_kernels.layout import Layout

path, keep = sys.argv[1], int(sys.argv[2])
n = 2048
with open(path, "wb") as file:
    file.truncate(n * 65536)
head = Header(format="t", kind="stack", scan_shape=(n,), det_shape=(128, 256), dtype="uint16", members=(), rule="exact")
feed = Feed(head, Layout(files=(path,), dtype="<u2", payload=65536), reading="mmap", threads=2)
out = np.zeros((n, 128, 256), np.uint16)
feed.frames(0, n, out)
ended = False
def cut():
    for i in range(20):
        time.sleep(0.003)
        os.truncate(path, keep)
        time.sleep(0.003)
        os.truncate(path, n * 65536)
    os.truncate(path, keep)
    global ended
    ended = True
threading.Thread(target=cut, daemon=True).start()
while True:
    last = ended
    try:
        feed.frames(0, n, out)
    except MissingData as error:
        print(error.frame, error.message)
        if last:
            break
"""


@pytest.mark.parametrize("keep", [0, 100 * 65536 + 4096, 1000 * 65536 + 77])
def test_a_file_that_is_cut_off_while_it_is_mapped(tmp_path: Path, keep: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CUT, os.fspath(tmp_path / "data"), str(keep)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    errors = [line.partition(" ") for line in done.stdout.splitlines()]
    # what was read before a cut was there; a file that has grown again has lost its bytes all the same
    for frame, _, message in errors:
        assert keep // 65536 <= int(frame) < 2048
        assert message.endswith("bytes early") or message == "can't be read: Input/output error"
    assert int(errors[-1][0]) == keep // 65536


WITHIN_A_PAGE = """
import os, sys, threading, time
import numpy as np
from mpi_kernels.contract import Header
from mpi_kernels.errors import MissingData
from mpi_kernels.feed import Feed
from mpi_kernels.layout import Layout

path, size = sys.argv[1], 1 << 25
ones = b"\\x01" * size
with open(path, "wb") as file:
    file.write(ones)
# one large frame: most cuts come while it is read
head = Header(format="t", kind="stack", scan_shape=(1,), det_shape=(4096, 8192), dtype="uint8", members=(),
              rule="exact")
feed = Feed(head, Layout(files=(path,), dtype="|u1", payload=size), reading="mmap", threads=1)
out = np.zeros((1, 4096, 8192), np.uint8)
seen = threading.Event()
done = False
def cut():
    global done
    for i in range(30):
        time.sleep(0.002)
        os.truncate(path, size - 2077)
        seen.wait(10)
        with open(path, "r+b") as file:
            file.seek(size - 2077)
            file.write(ones[:2077])
        seen.clear()
    done = True
threading.Thread(target=cut, daemon=True).start()
while not done:
    try:
        feed.frames(0, 1, out)
    except MissingData as error:
        assert error.frame == 0, error
        seen.set()
    else:
        assert out[0, -1].all()
"""


def test_a_file_that_is_cut_off_within_a_page_gives_no_zeros(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHIN_A_PAGE, os.fspath(tmp_path / "data")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


FAULT = """
import mmap, os, sys, faulthandler
import numpy as np
from mpi_kernels.contract import Header
from mpi_kernels.feed import Feed
from mpi_kernels.layout import Layout
path = sys.argv[1]
if sys.argv[2] == "faulthandler":
    faulthandler.enable()
with open(path, "wb") as file:
    file.truncate(1 << 20)
head = Header(format="t", kind="stack", scan_shape=(256,), det_shape=(64, 64), dtype="uint8", members=(), rule="exact")
feed = Feed(head, Layout(files=(path,), dtype="|u1", payload=4096), reading="mmap", threads=2)
feed.frames(0, 256, np.zeros((256, 64, 64), np.uint8))
with open(path, "rb") as file:
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
os.truncate(path, 0)
mapped[5000]
"""


@pytest.mark.parametrize("before", ["default", "faulthandler"])
def test_another_ones_fault_ends_as_it_did_before(tmp_path: Path, before: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FAULT, os.fspath(tmp_path / "data"), before], capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGBUS
    assert ("Fatal Python error: Bus error" in done.stderr) == (before == "faulthandler")


FOREIGN = FAULT.replace("feed.frames(0, 256, ", "pass; (0, 256, ").replace(
    "mapped[5000]",
    """
import threading, time
with open(path, "wb") as file:
    file.truncate(1 << 26)
head = Header(format="t", kind="stack", scan_shape=(64,), det_shape=(1024, 1024), dtype="uint8", members=(),
              rule="exact")
feed = Feed(head, Layout(files=(path,), dtype="|u1", payload=1 << 20), reading="mmap", threads=2)
other = path + "-other"
with open(other, "wb") as file:
    file.truncate(1 << 20)
with open(other, "rb") as file:
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
os.truncate(other, 0)
out = np.zeros((64, 1024, 1024), np.uint8)
def work():
    while True:
        feed.frames(0, 64, out)
threading.Thread(target=work, daemon=True).start()
time.sleep(0.1)
mapped[5000]
""",
)


def test_another_ones_fault_while_threads_read(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FOREIGN, os.fspath(tmp_path / "data"), "faulthandler"], capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGBUS
    assert "Fatal Python error: Bus error" in done.stderr


@pytest.mark.parametrize("reading", READINGS)
def test_ctrl_c_ends_it_at_once(tmp_path: Path, reading: Reading) -> None:
    code = f"""
        import os, sys, time, signal, threading
        import numpy as np
        from mpi_kernels.contract import Header
        from mpi_kernels.feed import Feed
        from mpi_kernels.layout import Layout
        n, path = 1 << 21, sys.argv[1]
        with open(path, "wb") as file:
            file.truncate(1 << 20)
        head = Header(format="t", kind="stack", scan_shape=(n,), det_shape=(128, 128), dtype="uint16", members=(),
                      rule="exact")
        # one frame over and over: seconds of work without a file of that size
        layout = Layout(files=(path,), dtype=">u2", payload=32768, offsets=np.zeros(n, np.int64))
        feed = Feed(head, layout, reading={reading!r}, threads=2)
        buffer = np.zeros((1 << 15, 128, 128), np.uint16)
        def kill():
            time.sleep(0.3)
            global at
            at = time.monotonic()
            os.kill(os.getpid(), signal.SIGINT)
        threading.Thread(target=kill).start()
        try:
            while True:
                feed.frames(0, 1 << 15, buffer)
        except KeyboardInterrupt:
            print(time.monotonic() - at)
        feed.close()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), os.fspath(tmp_path / "data")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1.0  # 0.2 s and the patience that a busy machine needs


MEMORY = """
import resource, sys
import numpy as np
from mpi_kernels import _native
from mpi_kernels.contract import Header
from mpi_kernels.feed import Feed
from mpi_kernels.layout import Layout
path, n = sys.argv[1], 1 << 13
with open(path, "wb") as file:
    file.truncate(n << 15)
head = Header(format="t", kind="stack", scan_shape=(n,), det_shape=(128, 128), dtype="uint16", members=(), rule="exact")
sum = np.zeros((128, 128), "u8")
its = _native.Pass("uint16", (128, 128), n, sum=sum)
used = 1024 * next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (used + (40 << 20),) * 2)
feed = Feed(head, Layout(files=(path,), dtype=">u2", payload=1 << 15), reading=sys.argv[2], threads=3)
feed.add(its, 0, n, 0)
"""


@pytest.mark.parametrize("reading", READINGS)
def test_memory_is_bounded_whatever_the_file(tmp_path: Path, reading: Reading) -> None:
    # 256 MiB through 40 MiB of private memory, stacks included (RLIMIT_DATA: setrlimit(2))
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, os.fspath(tmp_path / "data"), reading], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
