import pytest

from emflow.records import Fingerprint
from emflow.watch.settle import Settling


def prints(*sizes: int) -> tuple[Fingerprint, ...]:
    return tuple(Fingerprint(size=s, mtime_ns=7, ctime_ns=7) for s in sizes)


@pytest.fixture
def settling() -> Settling:
    return Settling(settle_s=1, stable_s=5)


def test_exact_and_closed_is_ready_at_once(settling: Settling) -> None:
    assert settling.observe("a", prints(4), "exact", closed=True, now=10) == "ready"


def test_exact_needs_two_equal_samples_far_enough_apart(settling: Settling) -> None:
    said = [settling.observe("a", prints(4, 2), "exact", closed=False, now=t) for t in (10, 10.5, 10.99, 11)]
    assert said == ["wait", "wait", "wait", "ready"]


def test_one_late_sample_is_not_two(settling: Settling) -> None:
    assert settling.observe("a", prints(4), "exact", closed=False, now=1e6) == "wait"


def test_any_member_that_changes_starts_anew(settling: Settling) -> None:
    settling.observe("a", prints(4, 2), "exact", closed=False, now=10)
    assert settling.observe("a", prints(4, 3), "exact", closed=False, now=11) == "wait"
    assert settling.observe("a", prints(4, 3, 1), "exact", closed=False, now=12) == "wait"
    assert settling.observe("a", prints(4, 3, 1), "exact", closed=False, now=13) == "ready"


def test_times_alone_are_a_change(settling: Settling) -> None:
    settling.observe("a", (Fingerprint(size=1, mtime_ns=1, ctime_ns=1),), "exact", closed=False, now=10)
    assert (
        settling.observe("a", (Fingerprint(size=1, mtime_ns=1, ctime_ns=2),), "exact", closed=False, now=12) == "wait"
    )


def test_stability_takes_its_time_even_if_closed(settling: Settling) -> None:
    said = [settling.observe("a", prints(4), "stability", closed=True, now=t) for t in (10, 11, 14.9, 15)]
    assert said == ["wait", "wait", "wait", "ready"]


def test_a_clock_that_steps_back_counts_as_no_time(settling: Settling) -> None:
    said = [settling.observe("a", prints(4), "exact", closed=False, now=t) for t in (10, 5, 10.5, 5, 11)]
    assert said == ["wait", "wait", "wait", "wait", "ready"]
    settling.observe("a", prints(5), "exact", closed=False, now=3)
    assert settling.observe("a", prints(5), "exact", closed=False, now=11.5) == "wait"
    assert settling.stalled_for("a", now=3) == 0


def test_no_member_is_never_ready(settling: Settling) -> None:
    settling.observe("a", (), "exact", closed=True, now=10)
    assert settling.observe("a", (), "exact", closed=True, now=99) == "wait"


def test_stalled_for_counts_from_the_last_change(settling: Settling) -> None:
    assert settling.stalled_for("a", now=5) == 0
    settling.observe("a", prints(1), "exact", closed=False, now=10)
    settling.observe("a", prints(2), "exact", closed=False, now=20)
    settling.observe("a", prints(2), "exact", closed=False, now=30)
    assert settling.stalled_for("a", now=50) == 30
    settling.forget("a")
    assert settling.stalled_for("a", now=50) == 0


def test_acquisitions_do_not_share_samples(settling: Settling) -> None:
    settling.observe("a", prints(4), "exact", closed=False, now=10)
    assert settling.observe("b", prints(4), "exact", closed=False, now=12) == "wait"
