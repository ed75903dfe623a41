"""Tags as entities: schemes, faults, and the figures against seqeval's own examples and a loop over words."""

import itertools
import random

import pytest
import torch
from sklearn.metrics import accuracy_score
from sklearn.metrics import f1_score as f1_of_classes

from smidgen.core.errors import DataError
from smidgen.tasks.text.spans import NO_TAG, Tags, f1_by_type, span_scores, split_tag, understand_tags

WAYS = {
    "iob2": ["B-ORG", "O", "B-MISC", "O", "B-PER", "I-PER", "B-PER"],
    "iob1": ["I-ORG", "O", "I-MISC", "O", "I-PER", "I-PER", "B-PER"],
    "bioes": ["S-ORG", "O", "S-MISC", "O", "B-PER", "E-PER", "S-PER"],
    "bilou": ["U-ORG", "O", "U-MISC", "O", "B-PER", "L-PER", "U-PER"],
}
ENTITIES = [(0, 1, "ORG"), (2, 3, "MISC"), (4, 6, "PER"), (6, 7, "PER")]


def tensor(tags, rows, width=None):
    """Rows of names as indices, padded."""
    found = torch.full((len(rows), width or max(map(len, rows))), NO_TAG)
    for i, row in enumerate(rows):
        found[i, : len(row)] = torch.tensor([tags.names.index(name) for name in row])
    return found


def scores(rows, said, scheme="iob2"):
    tags, _ = understand_tags([*rows, *said], scheme)
    counts = tags.counts(tensor(tags, said), tensor(tags, rows)).sum(0)
    by_type = dict(zip(tags.types, f1_by_type(counts).tolist(), strict=True))
    return {name: float(value) for name, value in span_scores(counts).items()} | by_type


@pytest.mark.parametrize("scheme", WAYS)
def test_each_scheme_is_recognised_and_says_the_same_entities(scheme):
    tags, _ = understand_tags([WAYS[scheme]])
    assert tags.scheme == scheme
    assert tags.types == ("MISC", "ORG", "PER")
    assert tags.spans(tensor(tags, [WAYS[scheme]])[0]) == ENTITIES
    assert tags.faults(WAYS[scheme]) == []


def test_all_tags_of_a_type_are_known_as_soon_as_one_is_seen():
    tags, _ = understand_tags([["B-PER", "O", "B-LOC", "I-LOC"]])
    assert tags.names == ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")


def test_parts_of_speech_speak_no_scheme_even_where_some_are_single_letters():
    tags, _ = understand_tags([["S", "V", "B", "E", "S", "RD"], ["NNP", "VBZ"]])
    assert (tags.scheme, tags.names) == ("plain", ("B", "E", "NNP", "RD", "S", "V", "VBZ"))


def test_a_slip_makes_no_other_scheme():
    rows = [["B-PER", "I-PER", "O"]] * 100
    assert understand_tags([*rows, ["PER"], ["S-PER"]])[0].names == ("O", "B-PER", "I-PER")
    assert understand_tags([*rows, ["O", "I-PER"]])[0].scheme == "iob2"


def test_tags_that_are_all_equal_teach_nothing():
    with pytest.raises(DataError, match="same tag \\(O\\)"):
        understand_tags([["O", "O"], ["O"]])
    with pytest.raises(DataError, match="no tag speaks bilou; the tags are O, X"):
        understand_tags([["X", "O"]], "bilou")


@pytest.mark.parametrize(
    ("scheme", "row", "places", "what"),
    [
        ("iob2", "O I-PER I-PER", [1], '"I-PER" after "O": in iob2 an entity starts with B-'),
        ("iob2", "I-PER", [0], '"I-PER" after the start'),
        ("iob2", "B-PER I-LOC", [1], '"I-LOC" after "B-PER"'),
        ("iob1", "O B-PER", [1], '"B-PER" after "O": iob1 has B- only right after an entity of the same type'),
        ("iob1", "I-LOC B-PER", [1], '"B-PER" after "I-LOC"'),
        ("bioes", "B-PER O", [0], '"B-PER" before "O": in bioes it has to go on'),
        ("bilou", "B-PER I-PER", [1], '"I-PER" before the end: in bilou it has to go on'),
        ("bioes", "O E-PER", [1], '"E-PER" after "O": in bioes an entity starts with B- or S-'),
        ("bilou", "U-PER L-PER", [1], '"L-PER" after "U-PER": in bilou an entity starts with B- or U-'),
    ],
)
def test_transitions_that_a_scheme_does_not_allow_are_found(scheme, row, places, what):
    faults = Tags(scheme=scheme, names=()).faults(row.split())
    assert [place for place, _ in faults][:1] == places
    assert what in faults[0][1]


def test_figures_are_those_in_seqevals_documentation():
    # README of seqeval 1.2.2: f1_score gives 0.50; the report MISC 0.00, PER 1.00, macro avg 0.50
    found = scores(
        [["O", "O", "O", "B-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]],
        [["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]],
    )
    assert found == {"f1": 0.5, "precision": 0.5, "recall": 0.5, "macro_f1": 0.5, "MISC": 0.0, "PER": 1.0}
    # there too: in the default mode these are the same entity, in the strict mode they are not
    assert scores([["B-NP", "I-NP", "O"]], [["I-NP", "I-NP", "O"]])["f1"] == 1.0


def test_each_type_that_is_there_has_precision_recall_and_f1():
    """By hand: PER 2 right of 4 predicted and 3 there, ORG 1 of 1 and 2, LOC 0 of 0 and 1; MISC is only predicted."""
    rows = ["B-PER I-PER O B-ORG B-PER", "B-PER O B-ORG O", "O B-LOC"]
    said = ["B-PER I-PER O B-PER B-PER", "O O B-ORG B-MISC", "B-PER O"]
    tags, _ = understand_tags([row.split() for row in (*rows, *said)])
    truth, answers = (tensor(tags, [row.split() for row in some]) for some in (rows, said))
    assert tags.score(answers, truth) == pytest.approx(
        {
            "f1": 1 / 2,
            "precision": 1 / 2,
            "recall": 1 / 2,
            "macro_f1": (4 / 7 + 2 / 3) / 4,
            "precision LOC": 0,
            "recall LOC": 0,
            "f1 LOC": 0,
            "precision ORG": 1,
            "recall ORG": 1 / 2,
            "f1 ORG": 2 / 3,
            "precision PER": 2 / 4,
            "recall PER": 2 / 3,
            "f1 PER": 4 / 7,
        }
    )


def test_nothing_predicted_is_zero_and_not_undefined():
    assert scores([["B-PER", "O"]], [["O", "O"]]) == {"f1": 0, "precision": 0, "recall": 0, "macro_f1": 0, "PER": 0}


def by_loop(names):
    """Entities word by word, as conlleval finds them: another way than that of the tensors."""
    found, open_at = [], None
    for i, (before, now) in enumerate(itertools.pairwise(["O", *names, "O"])):
        (letter, kind), (last, last_kind) = split_tag(now), split_tag(before)
        new = letter != "O" and (letter in "BSU" or last in "OESLU" or kind != last_kind)
        if open_at is not None and (new or letter == "O"):
            found.append((open_at, i, last_kind))
            open_at = None
        if new:
            open_at = i
    return found


@pytest.mark.parametrize("scheme", WAYS)
def test_any_tags_at_all_are_read_as_a_loop_over_words_reads_them(scheme):
    tags, _ = understand_tags([WAYS[scheme]])
    generator = random.Random(0)
    rows = [generator.choices(tags.names, k=generator.randint(1, 9)) for _ in range(200)]
    said = [[generator.choice([name, *tags.names]) for name in row] for row in rows]
    counts = tags.counts(tensor(tags, said, 12), tensor(tags, rows))
    for row, guess, found in zip(rows, said, counts, strict=True):
        there, predicted = by_loop(row), by_loop(guess)
        assert tags.spans(tensor(tags, [row])[0]) == there
        for k, kind in enumerate(tags.types):
            mine, theirs = ({span for span in spans if span[2] == kind} for spans in (there, predicted))
            assert found[k].tolist() == [len(mine & theirs), len(theirs), len(mine)]


def test_words_that_were_cut_off_are_missed_and_not_forgotten():
    tags, _ = understand_tags([["B-PER", "I-PER", "O", "B-LOC"]])
    gold = tensor(tags, [["B-PER", "I-PER", "O", "B-LOC"]])
    assert tags.counts(gold[:, :2], gold).sum((0, 1)).tolist() == [1, 1, 2]
    assert tags.counts(gold[:, :1], gold).sum((0, 1)).tolist() == [0, 1, 2]  # half an entity is a wrong one
    longer = torch.cat([gold, torch.full((1, 3), 1)], dim=1)
    assert tags.counts(longer, gold).sum((0, 1)).tolist() == [2, 2, 2]  # nothing is predicted where there is no word


def test_plain_tags_have_the_accuracy_and_f1_of_classes():
    generator = random.Random(0)
    rows = [generator.choices(["NN", "VB", "O", "B-x"], k=6) for _ in range(20)]
    said = [[generator.choice([name, "NN", "VB"]) for name in row] for row in rows]
    found = scores(rows, said, "plain")
    truth, guess = list(itertools.chain(*rows)), list(itertools.chain(*said))
    assert found["recall"] == pytest.approx(accuracy_score(truth, guess))
    assert found["macro_f1"] == pytest.approx(f1_of_classes(truth, guess, average="macro"))
