"""What runs beside the microscope runs on Windows: nothing that only Unix has is needed to import or to build it."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import builtins, os, signal, socket, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name in ("fcntl", "pwd", "grp", "resource", "termios"):
            raise ModuleNotFoundError(f"{name}: there is none on Windows", name=name)

for module in (os, signal):
    for name in ("fork", "eventfd", "O_DIRECTORY", "O_NOFOLLOW", "O_CLOEXEC", "mkfifo", "getuid", "geteuid", "fchmod",
                 "openat", "register_at_fork", "SIGHUP", "SIGKILL", "SIGUSR1", "SIGCHLD", "pthread_sigmask"):
        if hasattr(module, name):
            delattr(module, name)
for name in ("fcntl", "pwd", "grp", "resource", "termios"):
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Blocked())

import emflow.rpc
import emflow.microscope.server
import emflow.microscope.client
import emflow.microscope.recovery
import emflow.microscope.settings
import emflow.cli.microscope
import emflow.microscope.simulated.backend

from pathlib import Path
from emflow.microscope.answers import Answers, Epoch
from emflow.microscope.happenings import Happenings
from emflow.microscope import sidecar
from emflow.microscope.sidecar import Sidecar

folder = Path(sys.argv[1])
answers = Answers(folder)
answers.append(Epoch(epoch=3, role="agent", holder="a", wall_ns=1))
answers.close()
assert Answers(folder).epoch == 3
Happenings(folder).write("stopped", "microscope", "")
(folder / "scan.npy").write_bytes(b"data")
note = Sidecar(command="c", trace="t", path="scan.npy", kind="4d", scan_shape=(1, 1), det_shape=(1, 1), frames=1,
               complete=True)
assert sidecar.read(sidecar.write(folder, note).with_name("scan.npy")) == note
with emflow.rpc.Server("127.0.0.1:0", {"thing": (folder, ("as_posix",))}) as server:
    server.start()
    with emflow.rpc.Connection(server.address, "thing", role="viewer", name="one") as connection:
        assert connection.call("as_posix") == folder.as_posix()
print("works")
"""


def test_without_what_only_unix_has(tmp_path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path)], capture_output=True, text=True, timeout=50, check=False
    )
    assert (done.returncode, done.stdout) == (0, "works\n"), done.stderr
