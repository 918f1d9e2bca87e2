from pathlib import Path

import pytest

from emflow.errors import ConfigError
from emflow.watch.hints import NoHints, choose, file_system, is_network, mounted_as
from emflow.watch.inotify import InotifyHints

MOUNTS = r"""21 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 21 0:25 / /mnt/nas rw shared:2 - cifs //nas/raw rw,vers=3.1.1
31 21 0:26 / /mnt/with\040space rw - nfs4 nas:/raw rw
32 21 0:27 / /mnt/over rw - cifs //nas/old rw
33 21 0:28 / /mnt/over rw - xfs /dev/vdb rw
34 21 0:29 / /mnt/ssh rw - fuse.sshfs host: rw
broken line
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home/x", "ext4"),
        ("/mnt/nas", "cifs"),
        ("/mnt/nas/day/1", "cifs"),
        ("/mnt/nasty", "ext4"),
        ("/mnt/with space/a", "nfs4"),
        ("/mnt/over/a", "xfs"),
        ("/mnt/ssh/a", "fuse.sshfs"),
    ],
)
def test_the_longest_and_last_mount_counts(path: str, kind: str) -> None:
    assert mounted_as(path, MOUNTS) == kind


@pytest.mark.parametrize("kind", ["cifs", "nfs4", "fuse.sshfs", "smb3", "9p", "lustre"])
def test_network_file_systems_are_known(kind: str) -> None:
    assert is_network(kind)


def test_proc_is_found_and_is_neither_local_nor_network() -> None:
    assert file_system("/proc") == "proc"
    hints = choose("/proc", "auto")
    assert isinstance(hints, NoHints)
    assert "not known to be a local disk" in hints.degraded
    hints.close()


def test_a_local_folder_gets_inotify(tmp_path: Path) -> None:
    hints = choose(tmp_path, "inotify")
    assert isinstance(hints, InotifyHints)
    hints.close()


def test_none_means_none_and_is_no_degradation(tmp_path: Path) -> None:
    hints = choose(tmp_path, "none")
    assert isinstance(hints, NoHints)
    assert hints.degraded == ""
    hints.close()


def test_forced_inotify_is_refused_where_it_stays_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emflow.watch.hints._mounts", lambda: MOUNTS)
    with pytest.raises(ConfigError, match="is on cifs, where inotify never tells"):
        choose("/mnt/nas/day", "inotify")
    hints = choose("/mnt/nas/day", "auto")
    assert isinstance(hints, NoHints)
    assert "scans only" in hints.degraded
    hints.close()
