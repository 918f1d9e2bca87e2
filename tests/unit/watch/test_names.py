import pytest

from emflow.watch.names import Names, is_part, is_temporary, main_of


@pytest.mark.parametrize(
    "name", [".scan.h5", "~$scan.h5", "scan.h5.part", "SCAN.PART", "0123_emflow.h5", "c.emflow.json"]
)
def test_temporaries_and_own_files_are_told_apart(name: str) -> None:
    assert is_temporary(name)


@pytest.mark.parametrize("name", ["scan.h5", "emflow.h5", "part", "scan.part.h5", "a~$b.h5", "new\nline.mib"])
def test_data_is_not_called_temporary(name: str) -> None:
    assert not is_temporary(name)


def test_patterns_disregard_case_and_hold_the_last_component() -> None:
    names = Names(["*.mib", "scans/*.h5"], ["old*", "calib/*"])
    assert names.wants_file(b"a/b/X.MIB")
    assert names.wants_file(b"scans/day/x.h5")
    assert not names.wants_file(b"other/x.h5")
    assert not names.wants_file(b"a/old.mib")
    assert not names.wants_file(b"calib/x.mib")
    assert not names.wants_file(b"a/.x.mib")


def test_no_pattern_means_every_file() -> None:
    assert Names([], []).wants_file(b"\xff\n$(reboot)")


def test_ignored_and_system_folders_are_not_entered() -> None:
    names = Names(["*"], ["old", "a/b"])
    assert [
        f for f in (b"new", b"old", b"a/b", b"b", b".git", b"x/@eaDir", b"$RECYCLE.BIN") if names.wants_folder(f)
    ] == [
        b"new",
        b"b",
    ]


def test_only_a_pattern_with_a_suffix_speaks_of_files() -> None:
    assert Names(["*.mib"], []).expects_file(b"day/run.MIB")
    assert not Names(["*"], []).expects_file(b"day/run.mib")
    assert not Names(["*.mib", "*"], []).expects_file(b"day/run")


@pytest.mark.parametrize(
    ("name", "part"),
    [("a_data_000001.h5", True), ("A_DATA_000012.H5", True), ("a_data_1.h5", False), ("a_data_000001.mib", False)],
)
def test_data_files_of_a_master_are_no_acquisitions(name: str, part: bool) -> None:
    assert is_part(name) is part
    assert Names(["*.h5", "*.mib"], []).wants_file(name.lower().encode()) is not part


def test_what_may_be_the_sidecar_of_a_master() -> None:
    assert main_of(b"day/scan.h5") == b"day/scan_master.h5"
    assert main_of(b"day/scan.mib") is None
