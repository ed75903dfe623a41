"""CoNLL columns: sentences, documents and comments are told apart, and a damaged sentence is only itself."""

import pytest

from smidgen.core.errors import DataError
from smidgen.data.conll import read_columns, read_conll

SENTENCES = """-DOCSTART- -X- -X- O

EU NNP B-NP B-ORG
rejects VBZ B-VP O

-DOCSTART- -X- -X- O

Peter NNP B-NP B-PER
"""


def columns(text, name="t.conll"):
    table, problems = read_columns(text.encode(), name)
    assert problems == []
    return table


def test_a_sentence_is_a_row_of_lists_with_its_place():
    table = columns(SENTENCES)
    assert table.column("column_1") == [["EU", "rejects"], ["Peter"]]
    assert table.column("column_2") == [["NNP", "VBZ"], ["NNP"]]
    assert table.column("column_4") == [["B-ORG", "O"], ["B-PER"]]
    assert table.column("lines") == [[3, 4], [8]]
    assert table.origins == ["t.conll:3", "t.conll:8"]


def test_documents_are_numbered_where_the_file_starts_them():
    assert columns(SENTENCES).column("document") == ["t.conll#1", "t.conll#2"]
    assert "document" not in columns("EU B-ORG\n").columns


@pytest.mark.parametrize(
    "text", ["a O\nb O\n\n\n\nc O", "a O\r\nb O\r\n\r\nc O\r\n", "a  O\nb \t O\n \t\nc O\n".replace("\t", "")]
)
def test_line_ends_and_runs_of_blank_lines_make_no_difference(text):
    assert columns(text).column("column_1") == [["a", "b"], ["c"]]


def test_a_line_with_tabs_is_split_at_tabs_so_that_words_may_hold_spaces():
    table = columns("New York\tB-LOC\n\u00a0\tO\n")
    assert table.column("column_1") == [["New York", "\u00a0"]]


def test_a_no_break_space_is_a_word_like_any_other():
    assert columns("a O\n\u00a0 O\n").column("column_1") == [["a", "\u00a0"]]


def test_comments_come_before_a_sentence_and_the_word_hash_is_none():
    table = columns("# id one two\na O\n# O\n\n# O\nb O\n")
    assert table.column("column_1") == [["a", "#"], ["#", "b"]]
    assert table.column("lines") == [[2, 3], [5, 6]]


def test_universal_dependencies_have_their_own_names_and_no_multiword_lines():
    words = ["1-2 Zum _ _", "1 zu zu ADP", "2 dem der DET", "3 Haus Haus NOUN"]
    rows = ["\t".join([*word.split(), "_", "_", "0", "root", "_", "_"]) for word in words]
    text = "\n".join(["# text = Zum Haus", *rows, ""])
    table = columns(text, "de.conllu")
    assert table.column("form") == [["zu", "dem", "Haus"]]
    assert table.column("upos") == [["ADP", "DET", "NOUN"]]
    assert table.column("lines") == [[3, 4, 5]]


def test_a_sentence_with_a_bad_line_is_named_and_the_next_is_read():
    table, problems = read_columns(b"a O\nb\n\nc O\n\nd O\n\xff O\n\ne O\n", "t.conll")
    assert table.column("column_1") == [["c"], ["e"]]
    assert str(problems[0]) == "t.conll:2: 1 columns, where the other lines have 2"
    assert problems[1].where == "t.conll:7"
    assert "not UTF-8" in problems[1].what


@pytest.mark.parametrize("text", ["", "\n\n", "-DOCSTART- O\n\n"])
def test_a_file_without_sentences_is_refused(text):
    with pytest.raises(DataError, match="has no sentence"):
        read_columns(text.encode(), "t.conll")


def test_a_folder_is_read_by_part_and_other_files_are_left_to_others(tmp_path):
    (tmp_path / "train.txt").write_text("a O\n")
    (tmp_path / "dev.txt").write_text("b O\n")
    (tmp_path / "README.txt").write_text("nothing of this\n")
    tables, problems = read_conll(tmp_path)
    assert {part: table.column("column_1") for part, table in tables.items()} == {"train": [["a"]], "valid": [["b"]]}
    assert problems == []
    (tmp_path / "rows.jsonl").write_text("{}\n")
    assert read_conll(tmp_path / "rows.jsonl") == ({}, [])
    assert read_conll(tmp_path / "absent.conll") == ({}, [])
