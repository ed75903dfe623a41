"""YAML is read as plain data with lines, numbers as people write them; what could be more than data is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smidgen.recipes.yaml_text import read_scalar, read_yaml, write_yaml

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(PLAIN)
def test_what_is_written_is_read_back_equal(values):
    document = read_yaml(write_yaml(values))
    assert document.mistakes == []
    assert document.values == values


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4),
        ("1E5", 1e5),
        (".5", 0.5),
        ("010", 10),
        ("-3", -3),
        ("true", True),
        ("~", None),
        ("", None),
        ("yes", "yes"),
        ("on", "on"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("1_000", "1_000"),
        ("0x10", "0x10"),
        (".inf", ".inf"),
        ("'8'", "8"),
        ("[1, a]", [1, "a"]),
        ("*.query", "*.query"),
        ("a: b: c", "a: b: c"),
    ],
)
def test_a_word_means_what_it_looks_like(text, value):
    found = read_scalar(text)
    assert found == value
    assert type(found) is type(value)


def test_every_key_and_item_has_its_line():
    document = read_yaml("a: 1\nb:\n  c: 2\n  d:\n  - x\n  - y\n")
    assert document.lines == {("a",): 1, ("b",): 2, ("b", "c"): 3, ("b", "d"): 4, ("b", "d", 0): 5, ("b", "d", 1): 6}


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ("a: 1\n\tb: 2", (2, "not YAML: a tab; YAML is indented with spaces")),
        ("a:\n\tb: 2", (2, "not YAML: a tab; YAML is indented with spaces")),
        ("a: 1\nb 2\nc: 3", (2, "not YAML: a key without \":\" behind it")),
        ("a: b: c", (1, 'not YAML: a ":" where none can be: is the line indented like its neighbours? '
                        'A text with ": " in it goes in quotes')),
        ("a: 1\nb: 2\na: 3", (3, '"a" stands here again; it stands on line 1 already')),
        ("a: !!python/object/apply:os.system [ls]", (1, "not YAML: tags (!), anchors (&) and aliases (*) are not read; "
                                                        "a text that begins so goes in quotes")),
        ("a: &x [1]", (1, "not YAML: tags (!), anchors (&) and aliases (*) are not read; "
                          "a text that begins so goes in quotes")),
        ("a: 1\n[x]: 2", (2, "a key is a word, not a list or a mapping")),
        ("a: 1\nb: \x07", (2, "not YAML: the character U+0007 is not allowed")),
        ("[" * 1000, (1, "nested too deeply")),
    ],
)  # fmt: skip
def test_a_mistake_has_its_line(text, mistake):
    assert read_yaml(text).mistakes == [mistake]


def test_a_second_document_is_a_mistake():
    assert read_yaml("a: 1\n---\nb: 2").mistakes == [(2, "not YAML: but found another document")]
