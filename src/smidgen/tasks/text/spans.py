"""Entities written as tags of words: the usual schemes, which of them some data speaks, and what its tags say.

    word     EU     rejects  German   call   Peter   Blackburn
    iob2     B-ORG  O        B-MISC   O      B-PER   I-PER       also called BIO
    iob1     I-ORG  O        I-MISC   O      I-PER   I-PER       B- only where a neighbour of the same type comes before
    bioes    S-ORG  O        S-MISC   O      B-PER   E-PER
    bilou    U-ORG  O        U-MISC   O      B-PER   L-PER
    plain    NNP    VBZ      JJ       NN     NNP     NNP         no scheme: each word is an entity of its own

Tags that a model makes may break the scheme.  They are read as conlleval does, and seqeval after it: an entity starts
where a tag opens one, where the one before was closed, and where the type changes.

    precision = right / predicted     recall = right / there     F1 = 2 right / (predicted + there)

right: entities of which start, end and type are the same.  0 / 0 is taken for 0, as seqeval does.
Tjong Kim Sang & De Meulder 2003, arXiv:cs/0306050; Ramshaw & Marcus 1995, arXiv:cmp-lg/9505040.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Self, cast, get_args

import torch
from torch import Tensor

from ...core.errors import DataError
from ..base import Example
from ..judging import contrasted

Scheme = Literal["iob2", "iob1", "bioes", "bilou", "plain"]
SCHEMES: tuple[str, ...] = get_args(Scheme)
NO_TAG = -100  # in a tensor of tags: no word there, or one that was cut off

_LETTERS = {"iob2": "BI", "iob1": "BI", "bioes": "BIES", "bilou": "BILU"}
_OPEN, _CLOSE = "BSU", "ESLU"  # a tag that starts an entity whatever stands before; one that ends it
_MOST = 0.9  # share of the tags other than O that speak a scheme, where it is one
_SLIP = 0.01  # share of the tags that a letter may have and yet be taken for a mistake


@dataclass(frozen=True, kw_only=True)
class Tags:
    """The tags of a task.   names: by index, all that the scheme knows of each type."""

    scheme: Scheme
    names: tuple[str, ...]

    @classmethod
    def from_description(cls, scheme: str, names: Sequence[str]) -> Self:
        """As JSON has them.  Raises ValueError."""
        if scheme not in SCHEMES:
            raise ValueError(f"there is no scheme {scheme!r}")
        return cls(scheme=cast(Scheme, scheme), names=tuple(map(str, names)))

    @cached_property
    def types(self) -> tuple[str, ...]:
        """The types of entities; all tags where there is no scheme."""
        if self.scheme == "plain":
            return self.names
        return tuple(sorted({kind for name in self.names if (kind := split_tag(name)[1])}))

    @cached_property
    def _codes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Per tag, and for no tag at all after the last: does it open, does it close, the type's index or -1."""
        split = [("U", name) if self.scheme == "plain" else split_tag(name) for name in self.names]
        letters, kinds = [letter for letter, _ in split], [kind for _, kind in split]
        opens = [letter in _OPEN for letter in letters] + [False]
        closes = [letter in _CLOSE for letter in letters] + [True]
        types = [self.types.index(kind) if kind else -1 for kind in kinds] + [-1]
        return torch.tensor(opens), torch.tensor(closes), torch.tensor(types)

    def entities(self, tags: Tensor) -> tuple[Tensor, Tensor]:
        """Where entities are in tags (N, W): types (N, W), the type's index where one starts and -1 elsewhere;
        ends (N, W), the word after its last one.
        """
        opens, closes, types = (code[tags.where(tags >= 0, len(self.names))] for code in self._codes)
        first = torch.full_like(tags[:, :1], -1)
        type_before = torch.cat([first, types[:, :-1]], dim=1)
        closed_before = torch.cat([first != 0, closes[:, :-1]], dim=1)
        inside = types >= 0
        starts = inside & (opens | closed_before | (types != type_before))
        count = tags.shape[1]
        breaks = torch.where(starts | ~inside, torch.arange(count), count)  # an entity ends at the next of these
        nearest = breaks.flip(1).cummin(1).values.flip(1)
        ends = torch.cat([nearest[:, 1:], torch.full_like(first, count)], dim=1)
        return types.where(starts, -1), ends

    def spans(self, tags: Tensor) -> list[tuple[int, int, str]]:
        """The entities of one row (W,): first word, word after the last, type."""
        types, ends = (found[0].tolist() for found in self.entities(tags[None]))
        return [(i, ends[i], self.types[kind]) for i, kind in enumerate(types) if kind >= 0]

    def numbers(self, rows: Sequence[Sequence[str]] | None, words: Sequence[Sequence[str]]) -> Tensor:
        """The tags of rows by index, (N, longest), NO_TAG beyond each row; NO_TAG everywhere where there are none."""
        index = {name: i for i, name in enumerate(self.names)}
        numbers = torch.full((len(words), max(map(len, words))), NO_TAG)
        for line, tags in zip(numbers, rows or (), strict=False):
            line[: len(tags)] = torch.tensor([index[tag] for tag in tags])
        return numbers

    def of_words(self, words: Sequence[str], tags: Tensor) -> list[str | None]:
        """The tag of each word of a row by name, None for those that were cut off."""
        said = [self.names[tag] if tag >= 0 else None for tag in tags[: len(words)].tolist()]
        return said + [None] * (len(words) - len(said))

    def in_words(self, words: Sequence[str], tags: Tensor) -> str:
        """What the tags of a row say: "EU (ORG), Peter Blackburn (PER)"; without a scheme the tags themselves."""
        if self.scheme == "plain":
            return " ".join(name or "(cut off)" for name in self.of_words(words, tags))
        spans = self.spans(tags[: len(words)])
        return ", ".join(f"{' '.join(words[start:end])} ({kind})" for start, end, kind in spans) or "none"

    def shown(self, words: Sequence[str], tags: Tensor) -> dict[str, Any]:
        """The tags of a row as JSON: entities from word "start" to the one before "end"; else each word's tag."""
        if self.scheme == "plain":
            return {"tags": self.of_words(words, tags)}
        spans = self.spans(tags[: len(words)])
        return {
            "entities": [
                {"type": kind, "words": words[start:end], "start": start, "end": end} for start, end, kind in spans
            ]
        }

    @property
    def metrics(self) -> tuple[str, ...]:
        """What such tags are judged by."""
        return ("accuracy", "macro_f1") if self.scheme == "plain" else ("f1", "precision", "recall", "macro_f1")

    def figures(self, counts: Tensor) -> dict[str, Tensor]:
        """The metrics (...) of summed counts (..., types, 3)."""
        found = span_scores(counts)
        found["accuracy"] = found["recall"]  # where each word is an entity of its own
        return {name: found[name] for name in self.metrics}

    def counts(self, answers: Tensor, targets: Tensor) -> Tensor:
        """Per row and type how many entities are right, predicted and there, (N, types, 3).

        answers: (N, any width), a word beyond it has no tag.   targets: (N, W).
        """
        said = torch.full_like(targets, NO_TAG)
        width = min(answers.shape[1], targets.shape[1])
        said[:, :width] = answers[:, :width]
        said[targets == NO_TAG] = NO_TAG
        (types, ends), (said_types, said_ends) = self.entities(targets), self.entities(said)
        right = types.where((types == said_types) & (ends == said_ends), -1)
        counts = torch.zeros(len(targets), len(self.types), 3, dtype=torch.float64)
        for k, kinds in enumerate((right, said_types, types)):
            rows, words = (kinds >= 0).nonzero(as_tuple=True)
            counts[:, :, k].index_put_((rows, kinds[rows, words]), counts.new_ones(len(rows)), accumulate=True)
        return counts

    def score(self, answers: Tensor, targets: Tensor) -> dict[str, float]:
        """All metrics, and precision, recall and F1 of each type of entities that is there: "recall PER"."""
        counts = self.counts(answers, targets).sum(0)
        scores = {name: float(value) for name, value in self.figures(counts).items()}
        if self.scheme != "plain":
            for kind, of_type in zip(self.types, counts, strict=True):
                if of_type[2]:
                    found = span_scores(of_type[None])
                    scores |= {f"{name} {kind}": float(found[name]) for name in ("precision", "recall", "f1")}
        return scores

    def all_right(self, answers: Tensor, targets: Tensor) -> Tensor:
        """(N,) bool: which rows have every entity right, and no other."""
        right, said, there = self.counts(answers, targets).sum(1).unbind(-1)
        return (right == said) & (right == there)

    def contrasts(self, rows: Sequence[Sequence[str]], targets: Tensor, base: Tensor, tuned: Tensor) -> list[Example]:
        """Rows, given by their words, of which only one of two models has all right."""

        def in_words(i: int) -> tuple[str, str, str, str]:
            words = rows[i]
            truth, by_base, by_tuned = (self.in_words(words, tags[i]) for tags in (targets, base, tuned))
            return " ".join(words), truth, by_base, by_tuned

        right = [self.all_right(answers, targets) for answers in (base, tuned)]
        return contrasted(right[0], right[1], in_words)

    def faults(self, tags: Sequence[str]) -> list[tuple[int, str]]:
        """Transitions that the scheme does not allow in a row of tags: index of the word, what is wrong."""
        if self.scheme == "plain":
            return []
        found = []
        before, open_type = "O", ""  # open_type: of the entity that could go on here
        for i, tag in enumerate((*tags, "O")):
            letter, kind = split_tag(tag)
            goes_on = bool(open_type) and kind == open_type
            after = f'"{before}"' if i else "the start"
            if self.scheme == "iob1":
                if letter == "B" and not goes_on:
                    found.append((i, f'"{tag}" after {after}: iob1 has B- only right after an entity of the same type'))
            elif letter in ("I", "E", "L"):
                if not goes_on:
                    found.append((i, f'"{tag}" after {after}: in {self.scheme} an entity starts with {self._starts}'))
            elif open_type and self.scheme != "iob2":
                at_end = "the end" if i == len(tags) else f'"{tag}"'
                found.append((max(i - 1, 0), f'"{before}" before {at_end}: in {self.scheme} it has to go on'))
            before, open_type = tag, kind if letter in ("B", "I") else ""
        return found

    @property
    def _starts(self) -> str:
        return {"bioes": "B- or S-", "bilou": "B- or U-"}.get(self.scheme, "B-")


def split_tag(tag: str) -> tuple[str, str]:
    """Letter and type: ("B", "PER") of "B-PER", ("B", "_") of "B", ("O", "") of "O", ("", tag) where there is none."""
    if tag == "O":
        return "O", ""
    letter, _, kind = tag.partition("-")
    if letter not in tuple("BIESLU") or tag == f"{letter}-":
        return "", tag
    return letter, kind or "_"


def understand_tags(rows: Sequence[Sequence[str]], scheme: Scheme | None = None) -> tuple[Tags, str]:
    """The tags of these rows, and in words why they speak this scheme.   scheme: what the user said it is.

    A few tags that do not fit are left out, for a check of the rows to find.   Raises DataError if all tags are equal.
    """
    counts = Counter(tag for row in rows for tag in row)
    if len(counts) < 2:
        raise DataError(f"all words have the same tag ({', '.join(counts) or 'none'}): there is nothing to learn")
    letters: Counter[str] = Counter()
    for tag, count in counts.items():
        letters[split_tag(tag)[0]] += count
    reason = "said"
    if scheme is None:
        scheme, reason = _recognised(rows, letters)
    if scheme == "plain":
        return Tags(scheme=scheme, names=tuple(sorted(counts))), reason
    kinds = {kind for letter, kind in map(split_tag, counts) if letter and kind and letter in _LETTERS[scheme]}
    if not kinds:
        raise DataError(f"no tag speaks {scheme}; the tags are {', '.join(sorted(counts)[:10])}")
    names = [letter if kind == "_" else f"{letter}-{kind}" for kind in sorted(kinds) for letter in _LETTERS[scheme]]
    return Tags(scheme=scheme, names=("O", *names)), reason


def _recognised(rows: Sequence[Sequence[str]], letters: Counter[str]) -> tuple[Scheme, str]:
    """letters: how many words have which; "" those whose tag has none."""
    spoken = sum(count for letter, count in letters.items() if letter not in ("", "O"))
    if spoken == 0 or spoken < _MOST * (spoken + letters[""]):
        return "plain", "the tags have no letters such as B- and I- in front"
    ends = {"bilou": letters["L"] + letters["U"], "bioes": letters["E"] + letters["S"]}
    for name, count in ends.items():
        if count > _SLIP * spoken and count == max(ends.values()):
            return ("bilou", "L- and U- end entities") if name == "bilou" else ("bioes", "E- and S- end entities")
    wrong = {name: sum(len(Tags(scheme=name, names=()).faults(row)) for row in rows) for name in ("iob2", "iob1")}
    if wrong["iob2"] <= wrong["iob1"]:
        return "iob2", "entities start with B-"
    return "iob1", "entities start with I-, and B- stands only between neighbours"


def span_scores(counts: Tensor) -> dict[str, Tensor]:
    """The figures (...) of summed counts (..., types, 3), over all entities and as a mean over the types there are."""
    right, said, there = counts.sum(-2).unbind(-1)
    by_type = f1_by_type(counts)
    present = (counts[..., 1:].sum(-1) > 0).sum(-1)
    return {
        "f1": 2 * right / (said + there).clamp_min(1),
        "precision": right / said.clamp_min(1),
        "recall": right / there.clamp_min(1),
        "macro_f1": by_type.sum(-1) / present.clamp_min(1),
    }


def f1_by_type(counts: Tensor) -> Tensor:
    """(..., types, 3) -> (..., types)."""
    return 2 * counts[..., 0] / counts[..., 1:].sum(-1).clamp_min(1)
