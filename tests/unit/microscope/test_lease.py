"""The lease as a table of who, when and which epoch."""

from __future__ import annotations

import pytest

from emflow.microscope.lease import Holder, LeaseBook

AGENT, OTHER = Holder(role="agent", name="a"), Holder(role="agent", name="b")
NAMESAKE, OPERATOR, VIEWER = (
    Holder(role="operator", name="a"),
    Holder(role="operator", name="o"),
    Holder(role="viewer", name="v"),
)


@pytest.fixture
def book() -> LeaseBook:
    book = LeaseBook(10.0, 4)
    book.give(AGENT, 5, 100.0)
    return book


@pytest.mark.parametrize(
    ("who", "now_s", "may"),
    [
        (AGENT, 101.0, True),
        (OTHER, 101.0, False),
        (OTHER, 109.999, False),
        (OTHER, 110.0, True),
        (OPERATOR, 101.0, True),
        (NAMESAKE, 101.0, True),
        (VIEWER, 101.0, False),
        (VIEWER, 1e9, False),
    ],
)
def test_who_may_take_it(book: LeaseBook, who: Holder, now_s: float, may: bool) -> None:
    assert (book.objection(who, now_s) is None) == may


@pytest.mark.parametrize(
    ("who", "epoch", "now_s", "code"),
    [
        (AGENT, 5, 109.9, None),
        (AGENT, 5, 110.0, "lease"),
        (AGENT, 4, 101.0, "epoch"),
        (AGENT, 6, 101.0, "epoch"),
        (OTHER, 5, 101.0, "lease"),
        (NAMESAKE, 5, 101.0, "lease"),
    ],
)
def test_who_may_use_it(book: LeaseBook, who: Holder, epoch: int, now_s: float, code: str | None) -> None:
    assert book.valid(who, epoch, now_s) == code


def test_renewed_and_ended(book: LeaseBook) -> None:
    book.renew(108.0)
    assert (book.left_s(110.0), book.overdue(117.9), book.overdue(118.0)) == (8.0, False, True)
    assert book.as_reply(110.0).now_s == 110.0
    book.end()
    assert (book.valid(AGENT, 5, 110.0), book.left_s(110.0), book.overdue(1e9)) == ("lease", 0.0, False)
    book.give(OTHER, 6, 120.0)
    assert book.valid(AGENT, 5, 121.0) == "epoch"
