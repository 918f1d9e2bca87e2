"""The pool folder as the service keeps it: names, secret, records, and what is deleted of them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from emflow.errors import NotAllowed, Unavailable
from emflow.schedulers.pool_folder import CLOSED_FILE, LAUNCHED_FILE, SENT_FOLDER, Closed, PoolFolder, Sent
from emflow.schedulers.pool_secret import SECRET_FILE, make_secret
from mpi_kernels.pool.records import read_secret

JOB = "0123456789abcdef-01"


@pytest.fixture
def folder(tmp_path: Path) -> PoolFolder:
    return PoolFolder(tmp_path / "pool")


def record(job: str = JOB, to: str = "local:1") -> Sent:
    return Sent(job=job, folder="/runs/x", ranks=1, time_limit_s=60, to=to)


def test_no_two_pools_get_one_name(folder: PoolFolder) -> None:
    with ThreadPoolExecutor(8) as threads:
        names = list(threads.map(lambda _: folder.new_name(), range(24)))
    assert len(set(names)) == 24
    assert folder.names() == sorted(names)
    assert folder.open_names() == sorted(names)


def test_what_is_no_pool_is_not_taken_for_one(folder: PoolFolder) -> None:
    (folder.root / "20240501T120000").mkdir(parents=True)
    (folder.root / ".20240501T120000-00").mkdir()
    assert folder.names() == []
    with pytest.raises(ValueError, match="no name of a pool"):
        folder.of("../elsewhere")


def test_a_closed_pool_is_closed_for_other_readers_too(folder: PoolFolder) -> None:
    first, second = folder.new_name(), folder.new_name()
    folder.write_closed(first, Closed(reason="it was told to drain", wall_ns=1))
    other = PoolFolder(folder.root)
    assert other.open_names() == [second]
    assert other.closed(first) == Closed(reason="it was told to drain", wall_ns=1)
    assert other.closed(second) is None


def test_leaving_and_held_outlive_the_process(folder: PoolFolder) -> None:
    name = folder.new_name()
    assert (folder.held, folder.leaving(name)) == (False, False)
    folder.hold(True)
    folder.write_leaving(name)
    other = PoolFolder(folder.root)
    assert (other.held, other.leaving(name)) == (True, True)
    other.hold(False)
    other.hold(False)
    assert not folder.held


def test_where_a_job_was_sent_is_read_back(folder: PoolFolder) -> None:
    assert folder.sent(JOB) is None
    folder.write_sent(record())
    folder.write_sent(record(to="local:2"))
    assert PoolFolder(folder.root).sent(JOB) == record(to="local:2")
    folder.forget(JOB)
    assert folder.sent(JOB) == record(to="local:2")
    assert folder.sent("../../etc/passwd") is None


@pytest.mark.parametrize(
    ("file", "read"),
    [
        (LAUNCHED_FILE, lambda folder, name: folder.launched(name)),
        (CLOSED_FILE, lambda folder, name: folder.closed(name)),
    ],
)
def test_a_torn_record_is_told_with_its_name(
    folder: PoolFolder, file: str, read: Callable[[PoolFolder, str], object]
) -> None:
    name = folder.new_name()
    (folder.of(name) / file).write_text('{"v":1')
    with pytest.raises(Unavailable, match=file):
        read(folder, name)


def test_only_what_ended_long_ago_is_deleted(folder: PoolFolder) -> None:
    old, new, open_ = folder.new_name(), folder.new_name(), folder.new_name()
    now = time.time_ns()
    folder.write_closed(old, Closed(reason="", wall_ns=now - int(20e9)))
    folder.write_closed(new, Closed(reason="", wall_ns=now))
    folder.write_sent(record())
    folder.write_sent(record("0123456789abcdef-02"))
    path = folder.root / SENT_FOLDER / f"{JOB}.json"
    long_ago = now - 41 * 86400 * 10**9
    os.utime(path, ns=(long_ago, long_ago))
    folder.clean(10.0)
    assert folder.names() == sorted([new, open_])
    assert not path.exists()
    assert PoolFolder(folder.root).sent("0123456789abcdef-02") is not None


def test_the_secret_is_made_once_and_for_this_user_only(folder: PoolFolder) -> None:
    folder.root.mkdir()
    mask = os.umask(0)
    try:
        with ThreadPoolExecutor(8) as threads:
            paths = set(threads.map(lambda _: make_secret(folder.root), range(16)))
    finally:
        os.umask(mask)
    assert paths == {folder.root / SECRET_FILE}
    (path,) = paths
    assert path.stat().st_mode & 0o7777 == 0o600
    assert len(read_secret(path)) == 32
    before = path.read_bytes()
    make_secret(folder.root)
    assert path.read_bytes() == before
    assert [p.name for p in folder.root.iterdir()] == [SECRET_FILE]


@pytest.mark.parametrize("spoil", ["mode", "empty", "link"])
def test_a_secret_that_can_t_be_trusted_is_refused_with_the_cure(folder: PoolFolder, spoil: str) -> None:
    path = make_secret(folder.root)
    if spoil == "mode":
        path.chmod(0o640)
    elif spoil == "empty":
        path.write_bytes(b"")
    else:
        path.rename(folder.root / "other")
        path.symlink_to(folder.root / "other")
    with pytest.raises(NotAllowed) as refused:
        make_secret(folder.root)
    assert str(path) in str(refused.value)
    assert "remove it" in str(refused.value).lower()


def test_a_folder_that_others_may_write_to_is_not_acted_on(folder: PoolFolder) -> None:
    mask = os.umask(0)
    try:
        name = folder.new_name()
        folder.write_sent(record())
    finally:
        os.umask(mask)
    assert {path.stat().st_mode & 0o777 for path in (folder.root, folder.of(name), folder.root / SENT_FOLDER)} == {
        0o700
    }
    folder.own("gateway:/state")
    folder.root.chmod(0o770)
    with pytest.raises(NotAllowed, match="others may write") as refused:
        folder.own("gateway:/state")
    assert f"chmod go-w {folder.root}" in refused.value.next_step


def test_two_services_do_not_share_a_folder(folder: PoolFolder) -> None:
    folder.own("gateway:/one/state")
    PoolFolder(folder.root).own("gateway:/one/state")
    with pytest.raises(NotAllowed, match="gateway:/one/state") as refused:
        PoolFolder(folder.root).own("gateway:/other/state")
    assert "[pool]" in refused.value.next_step
