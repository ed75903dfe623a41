"""What a model wrote is compared with what the data answer: ROUGE-L by Lin's examples, edits by the usual table."""

import random

import pytest

from smidgen.tasks.language.writing import edits, rouge_l, sums_of


@pytest.mark.parametrize(
    ("said", "reference", "expected"),
    [  # the first three: Lin 2004, section 3.1
        ("police kill the gunman", "police killed the gunman", 3 / 4),
        ("the gunman kill police", "police killed the gunman", 2 / 4),
        ("the gunman police killed", "police killed the gunman", 2 / 4),
        ("The cat, the CAT!", "the cat", 2 * 2 / (4 + 2)),
        ("größer als Öl", "Größer öl", 2 * 2 / (3 + 2)),
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("...", "...", 0.0),
    ],
)
def test_rouge_l_is_lins_definition(said, reference, expected):
    assert rouge_l(said, reference) == pytest.approx(expected)
    assert rouge_l(reference, said) == pytest.approx(expected)


def edits_by_the_table(one, other):
    above = list(range(len(other) + 1))
    for i, symbol in enumerate(one):
        row = [i + 1]
        for j, candidate in enumerate(other):
            row.append(min(above[j] + (symbol != candidate), above[j + 1] + 1, row[j] + 1))
        above = row
    return above[-1]


def test_edits_are_those_of_the_usual_table():
    draw = random.Random(0)
    for _ in range(300):
        one, other = ("".join(draw.choices("abc", k=draw.randrange(12))) for _ in range(2))
        assert edits(one, other) == edits_by_the_table(one, other)
    long = [["".join(draw.choices("ab", k=2)) for _ in range(200)] for _ in range(2)]  # more than a machine word
    assert edits(*long) == edits_by_the_table(*long)
    assert (edits("kitten", "sitting"), edits("", "abc"), edits("abc", ""), edits("", "")) == (3, 3, 3, 0)


def test_the_sums_of_a_row_count_characters_and_words():
    assert sums_of("K AE T", "K AA T S") == [1, 0, 3, 8, 2, 4, pytest.approx(2 * 2 / (3 + 4))]
    assert sums_of("K AE T", "K AE T") == [1, 1, 0, 6, 0, 3, 1]
