"""The configuration: what is right loads as it stands, what is wrong is told with its line and what was meant."""

import os
import tomllib
from pathlib import Path

import msgspec
import pytest

from emflow import config
from emflow.errors import ConfigError, NotAllowed
from emflow.tomlfile import Document

LEAST = '[[watch]]\nroot = "incoming"\n'


def load(folder, text):
    path = folder / "emflow.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return config.load(path)


def refused(folder, text):
    with pytest.raises(ConfigError) as caught:
        load(folder, text)
    assert caught.value.exit_code == 78
    start = f"{folder / 'emflow.toml'}:"
    assert str(caught.value).startswith(start)
    line, _, rest = str(caught.value)[len(start) :].partition(": ")
    return int(line), rest


def test_the_least_is_a_folder_to_watch(tmp_path):
    made = load(tmp_path, LEAST)
    assert made.folder == tmp_path
    assert made.service == config.ServiceSettings(**{name: tmp_path / name for name in config.OWN_FOLDERS})
    assert (made.microscope.share, made.agent.mode) == ("incoming", "propose")
    [watch] = made.watch
    assert (watch.root, watch.share, watch.match, watch.recipe) == (tmp_path / "incoming", "incoming", (), "default")
    assert made.transfer.min_free == 1 << 30
    assert (made.scheduler.use, made.scheduler.ranks, made.scan.hints) == ("local", 2, "auto")


def test_the_template_shows_every_key_with_its_default_and_loads(tmp_path):
    text = config.template()
    made = load(tmp_path, text)
    assert made == load(tmp_path, LEAST)
    document = Document("t", text.encode())
    tables = {
        ("service",): config.ServiceSettings,
        ("watch", 0): config.Watch,
        ("scan",): config.ScanSettings,
        ("transfer",): config.TransferSettings,
        ("scheduler",): config.SchedulerSettings,
        ("log",): config.LogSettings,
    }
    lines = text.splitlines()
    for table, cls in tables.items():
        for name in cls.__struct_fields__:
            line = document.line((*table, name))
            assert line != document.line(table), f"{table} {name} is not shown"
            assert "  # " in lines[line - 1] or " # " in lines[line - 1], f"{name} has no reason"


def test_relative_paths_belong_to_the_file_and_home_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    made = load(tmp_path, '[service]\nruns = "../elsewhere/./runs"\nresults = "~/out"\n[[watch]]\nroot = "/data/x"\n')
    assert made.service.runs == tmp_path.parent / "elsewhere" / "runs"
    assert made.service.results == Path("/home/somebody/out")
    assert made.watch[0].root == Path("/data/x")


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (
            '# x\n[[watch]]\nrooot = "a"\n',
            3,
            "unknown key 'rooot' in [[watch]]; did you mean 'root'? known: root, share",
        ),
        ('[[watch]]\nroot = "a"\n\n[[watch]]\nshare = "b"\nrot = 1\n', 6, "unknown key 'rot' in [[watch]]"),
        (LEAST + "[scann]\nactive_s = 1\n", 3, "unknown key 'scann'; did you mean 'scan'? known: watch, service"),
        (LEAST + "[scan]\n\nactiv_s = 1\n", 5, "unknown key 'activ_s' in [scan]; did you mean 'active_s'?"),
        ('scan.activ_s = 1\n[[watch]]\nroot = "a"\n', 1, "unknown key 'activ_s' in [scan]"),
        ("scan = { active_s = 1, rec = 2 }\n" + LEAST, 1, "unknown key 'rec'"),
        ('watch = [\n  { root = "a" },\n  { rooot = "b" },\n]\n', 3, "unknown key 'rooot' in [[watch]]"),
        ("[scan]\nactive_s = 1\n", 1, "'watch' is missing"),
        ("watch = []\n", 1, "nothing is watched"),
        ('[scan]\n"active_s" = 1\n[[watch]]\nshare = "a"\n', 3, "'root' is missing in [[watch]]"),
        (LEAST + "[scheduler]\nuse = 'local'\nranks = 0\n", 5, "scheduler.ranks: expected int >= 1"),
        (LEAST + "[scheduler]\nranks = 2.0\n", 4, "scheduler.ranks: expected int, got float"),
        (LEAST + "[scheduler]\nranks = true\n", 4, "scheduler.ranks: expected int, got bool"),
        (LEAST + "[scan]\nrecent_s = inf\n", 4, "scan.recent_s: expected float <="),
        (LEAST + "[scan]\nrecent_s = nan\n", 4, "scan.recent_s: expected float"),
        (LEAST + "[scan]\nsettle_s = -1\n", 4, "scan.settle_s: expected float > 0"),
        (LEAST + "[scan]\nactive_s = 5\n", 4, "active_s in [scan] must not be longer than recent_s"),
        (LEAST + "[scan]\nhints = 'smb'\n", 4, "scan.hints: invalid enum value 'smb'; known: auto, inotify, none"),
        (LEAST + "[log]\nlevel = 'warn'\n", 4, "'warn'; did you mean 'warning'? known: debug, info, warning, error"),
        ('[[watch]]\nroot = "a"\nrecipe = "defualt"\n', 3, "no recipe is called 'defualt'; did you mean 'default'?"),
        ('[[watch]]\nroot = "a"\n\nrecipe = "./mine.toml"\n', 4, "mine.toml: no such file"),
        ('[[watch]]\nroot = "a"\n[[watch]]\nshare = "b"\nroot = "a/b"\n', 5, "lies inside the one of line 2"),
        ('[[watch]]\nroot = "a/b"\n[[watch]]\nshare = "b2"\nroot = "a"\n', 5, "lies around the one of line 2"),
        ('[[watch]]\nroot = "a"\n[[watch]]\nshare = "b"\nroot = "./a"\n', 5, "is the one of line 2"),
        (LEAST + "[transfer]\nmin_free = '1 Gigs'\n", 4, "transfer.min_free: expected a size such as '1 GiB'"),
        (LEAST + "[scheduler]\nuse = 'lokal'\n", 4, "no scheduler is called 'lokal'. did you mean 'local'?"),
        ('[[watch]]\nroot = ""\n', 2, "watch.root: expected the path of a folder"),
        ('[[watch]]\nroot = "a"\nmatch = ["*.h5",\n  # c\n  7]\n', 5, "watch.match: expected str, got int"),
        ('[[watch]]\nroot = "a"\nmatch = ["*.h5",\n  "/x"]\n', 4, "'/x': expected a pattern"),
        ('[[watch]]\nroot = "a"\nshare = "a/b"\n', 3, "'a/b' can't name a share"),
        ('[[watch]]\nroot = "/"\n', 2, "'' can't name a share"),
        ('[[watch]]\nroot = "x/a"\n[[watch]]\nroot = "y/a"\n', 3, "share 'a' is already the one of line 1"),
        ('[service]\nruns = "in/runs"\n[[watch]]\nroot = "in"\n', 2, "runs folder"),
        ('[[watch]]\nroot = "."\nshare = "x"\n', 2, "lies inside the watched folder"),
        ('[[watch]]\nroot = "results/raw"\n', 2, "lies around the watched folder"),
        (LEAST + '[microscope]\nshare = "other"\n', 4, "no share is called 'other'"),
        (LEAST + '[microscope]\naddress = "scope"\n', 4, "expected host:port"),
        (LEAST + '[agent]\naddress = "127.0.0.1:70000"\n', 4, "expected host:port"),
        ('[service]\nruns = "x"\nstate = "./x"\n' + LEAST, 1, "must be different folders"),
        ('[[watch]]\nroot = "a\n', 2, "not TOML: "),
        ("[[watch]]\nroot = 1\nroot = 2\n", 3, "not TOML: Cannot overwrite a value"),
        ("[[watch]]\n\n\nroot = ", 4, "not TOML: "),
        (b'[[watch]]\nroot = "\xff"\n', 2, "not UTF-8 text"),
        ('text = """\n[scan]\nrooot = 1\n"""\n[[watch]]\nroot = "a"\n', 1, "unknown key 'text'"),
        ('[[watch]]\r\nroot = "a"\r\nx = 1\r\n', 3, "unknown key 'x' in [[watch]]"),
        (f'[scheduler]\nuse = "null"\n[transfer]\nlive = true\n{LEAST}', 4, "inside the service"),
        (f'[transfer]\nstage = "none"\nlive = true\n{LEAST}', 3, "makes no copy"),
        (f'[caps]\ndegraded = "cheapp"\n{LEAST}', 2, "no recipe is called 'cheapp'"),
    ],
)
def test_wrong_files_are_told_with_the_line(tmp_path, text, line, message):
    found, said = refused(tmp_path, text)
    assert said.startswith(message) or message in said, said
    assert found == line, said


def test_a_link_into_a_share_is_seen_through(tmp_path):
    (tmp_path / "share" / "deep").mkdir(parents=True)
    (tmp_path / "runs").symlink_to(tmp_path / "share" / "deep")
    _, said = refused(tmp_path, '[[watch]]\nroot = "share"\n')
    assert said.startswith("runs folder")


def test_no_file_says_how_to_make_one(tmp_path):
    with pytest.raises(ConfigError, match=r"no such file\. Write one with: emflow init"):
        config.load(tmp_path / "emflow.toml")
    with pytest.raises(ConfigError, match="a folder, not a file"):
        config.load(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything; run as another user")
def test_no_permission_is_its_own_error(tmp_path):
    (tmp_path / "emflow.toml").write_text(LEAST)
    (tmp_path / "emflow.toml").chmod(0)
    with pytest.raises(NotAllowed, match="no permission"):
        config.load(tmp_path / "emflow.toml")


@pytest.mark.parametrize(
    ("text", "size"),
    [(0, 0), (7, 7), ("512", 512), ("1 GiB", 1 << 30), ("1.5kib", 1536), ("500 MB", 500_000_000), ("2 TB", 2 * 10**12)],
)
def test_sizes(text, size):
    assert config.parse_size(text) == size


@pytest.mark.parametrize("text", [-1, 1.5, True, "", "GiB", "-1 B", "1 XB", "1e3", None])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="expected a size"):
        config.parse_size(text)


def test_a_hostile_name_of_the_file_is_printable(tmp_path):
    path = tmp_path / "a\n\x1b[31m.toml"
    path.write_text("x = 1\n")
    with pytest.raises(ConfigError) as caught:
        config.load(path)
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_settings_are_frozen(tmp_path):
    made = load(tmp_path, LEAST)
    with pytest.raises(AttributeError):
        made.scan.active_s = 1.0
    assert isinstance(made, msgspec.Struct)


def test_default_patterns_are_the_suffixes_of_the_formats():
    patterns = config.default_match()
    assert {"*.h5", "*.mib", "*.npy"} <= set(patterns)
    assert all(p.startswith(("*.", "*_")) for p in patterns)


def test_shares_that_are_one_through_a_link_are_refused(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").symlink_to(tmp_path / "one")
    line, said = refused(tmp_path, '[[watch]]\nroot = "one"\n[[watch]]\nroot = "two"\n')
    assert (line, "is the one of line 2" in said) == (4, True)
    load(tmp_path, '[[watch]]\nroot = "one"\n[[watch]]\nroot = "one2"\n')


def test_the_recipe_of_a_share_is_found_beside_the_configuration(tmp_path, monkeypatch):
    (tmp_path / "mine.toml").touch()
    monkeypatch.chdir("/")
    assert load(tmp_path, '[[watch]]\nroot = "a"\nrecipe = "mine.toml"\n').watch[0].recipe == "mine.toml"


def test_every_table_arrives(tmp_path: Path) -> None:
    """A table that is read and then forgotten would leave its defaults, and nobody would be told."""
    written = {
        "scan": "active_s = 0.25",
        "transfer": "workers = 3",
        "scheduler": "ranks = 7",
        "slurm": 'account = "m1"',
        "pool": "count = 5",
        "caps": "backlog = 4",
        "kernels": 'kernel = "numpy"',
        "microscope": "patience_s = 7.0",
        "agent": "no_improvement = 9",
        "log": "json = true",
    }
    path = tmp_path / "emflow.toml"
    path.write_text('[[watch]]\nroot = "share"\n' + "".join(f"[{table}]\n{line}\n" for table, line in written.items()))
    loaded = config.load(path)
    fields = {f.name for f in msgspec.structs.fields(type(loaded))} - {"folder", "watch", "service"}
    assert fields == set(written)
    for table, line in written.items():
        key, _, value = line.partition(" = ")
        assert getattr(getattr(loaded, table), key) == tomllib.loads(f"v = {value}")["v"], table
