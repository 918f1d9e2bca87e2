"""Lines of keys in TOML: found in the text, whatever strings and comments try to look like."""

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emflow.tomlfile import Document

TRICKY = '''# [fake]
top = 1  # fake = 2
"quoted.key" = "[fake]\\n fake = \\" 3"
'single' = 'a # b'
dotted . "inner key".x = 1979-05-27 07:32:00
long = """
[fake]
fake = """""
raw = \'\'\'
]] fake = 1 \'\'\'
list = [ 1, [2, """x
y"""],  # ]
  { a = "}", b = [
  3 ] } ]

[ table . sub ]
a.b = { c.d = 1, e = { } }
[[many]]
k = [
]
[[many]]
[many.inner]
k = +inf
[[many.inner2]]
k = 0x1f
[[many.inner2]]
k = \'\'\'\'\'\'
'''


def paths(value, where=()):
    """Every table, key and array element of a parsed document."""
    if where:
        yield where
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths(inner, (*where, key))


def test_tricky_text():
    document = Document("t", TRICKY.encode())
    lines = TRICKY.splitlines()

    def at(*where):
        return lines[document.line(where) - 1].strip()

    assert at("top") == "top = 1  # fake = 2"
    assert at("quoted.key").startswith('"quoted.key"')
    assert at("dotted", "inner key", "x").startswith("dotted")
    assert at("raw") == "raw = '''"
    assert at("list", 1, 1) == 'list = [ 1, [2, """x'
    assert at("list", 2, "b") == '{ a = "}", b = ['
    assert at("list", 2, "b", 0) == "3 ] } ]"
    assert at("table", "sub", "a", "b", "c", "d").startswith("a.b")
    assert [document.line(("many", n)) for n in (0, 1)] == [18, 21]
    assert at("many", 1, "inner", "k") == "k = +inf"
    assert at("many", 1, "inner2", 0, "k") == "k = 0x1f"
    assert at("many", 1, "inner2", 1, "k") == "k = ''''''"


def test_every_key_has_a_line_of_its_own():
    document = Document("t", TRICKY.encode())
    implied = {("many",), ("many", 1, "inner2"), ("table",)}  # arrays and tables without a header of their own
    for where in paths(tomllib.loads(TRICKY)):
        if where not in implied:
            assert where in document._lines, where
    assert not any("fake" in str(where) for where in document._lines)


@given(st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=8), st.text(st.characters(codec="utf-8"))))
def test_any_key_and_text(table):
    def quoted(text):
        return '"' + "".join(c if c.isalnum() and c.isascii() else f"\\U{ord(c):08x}" for c in text) + '"'

    text = "".join(f"{quoted(k)} = {quoted(v)}\n" for k, v in table.items())
    document = Document("t", text.encode())
    assert document.value == table
    assert [document.line((key,)) for key in table] == list(range(1, len(table) + 1))


@pytest.mark.parametrize("where", [(), ("no",), ("table", "sub", "no"), ("many", 0, "no")])
def test_a_key_that_is_not_written_has_the_line_of_its_table(where):
    document = Document("t", TRICKY.encode())
    assert document.line(where) == {0: 1, 1: 1, 3: 16 if where[0:1] == ("table",) else 18}[len(where)]
