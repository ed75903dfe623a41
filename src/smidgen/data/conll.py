"""CoNLL columns: one word a line with its tags beside it, a blank line between sentences.

    -DOCSTART- -X- -X- O          starts a document
                                  (separated by tabs if the line has one, else by spaces)
    EU NNP B-NP B-ORG             column_1 = the word ... column_4 = the last tag
    rejects VBZ B-VP O

A sentence is a row: lists of equal length in column_1, column_2 ..., and in "lines" where each word stands.  "document"
is there where the file starts documents.  A `.conllu` file (Universal Dependencies) has its own column names.
A line that starts with # where a sentence could start, and has another number of columns, is a comment.
A sentence with a line that cannot be read is a Problem, and the next one is read.
"""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ..core.errors import DataError
from .raw_text import damage, decode
from .read import split_name
from .table import Problem, Table, concatenate

_SUFFIXES = {".conll", ".conllu", ".txt", ".tsv", ".bio", ".iob"}
_DOCUMENT = "-DOCSTART-"
_UNIVERSAL = ("id", "form", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc")
_SPACE = re.compile(r"[ \t]+")  # a no-break space may be a word

Line = tuple[int, list[str]]  # its number, its fields


def read_conll(source: str | Path) -> tuple[dict[str, Table], list[Problem]]:
    """The sentences of a file or a folder of files by part ("train", "valid", "test"), and those that cannot be read.

    Nothing at all where there is no such file.   Raises DataError for a file that is no CoNLL columns.
    """
    path = Path(source).expanduser()
    parts: dict[str, list[Path]] = {}
    if path.is_file() and path.suffix.lower() in _SUFFIXES:
        parts["train"] = [path]
    elif path.is_dir():
        for file in sorted(path.iterdir()):
            if file.suffix.lower() in _SUFFIXES and (word := split_name(file.name)):
                parts.setdefault(word, []).append(file)
    tables: dict[str, Table] = {}
    problems: list[Problem] = []
    for part, files in parts.items():
        results = [read_columns(file.read_bytes(), file.name) for file in files]
        tables[part] = concatenate([table for table, _ in results])
        problems += [problem for _, bad in results for problem in bad]
    return tables, problems


def read_columns(data: bytes, name: str) -> tuple[Table, list[Problem]]:
    """The sentences of one file called `name`.  Raises DataError if it has none."""
    universal = name.lower().endswith(".conllu")
    lines = [(number, _fields(line)) for number, line in enumerate(decode(data, name).split("\n"), start=1)]
    widths = Counter(len(fields) for _, fields in lines if fields and not fields[0].startswith("#"))
    if not widths:
        raise DataError(f"{name} has no sentence: each line is a word with its tags, and a blank line ends a sentence")
    width = widths.most_common(1)[0][0]
    names = _UNIVERSAL if universal and width == len(_UNIVERSAL) else tuple(f"column_{k + 1}" for k in range(width))
    columns: dict[str, list[list[str]]] = {column: [] for column in names}
    documents, numbers, origins, problems = list[str](), list[list[int]](), list[str](), list[Problem]()
    document = 0
    for sentence in _sentences(lines, width):
        if sentence[0][1][0] == _DOCUMENT:
            document += 1
            continue
        if universal:  # 1-2 are two words written as one, 1.1 is a word that is not there
            sentence = [line for line in sentence if line[1][0].isdigit()]
        if what := _wrong(sentence, width, name):
            problems.append(what)
            continue
        for k, column in enumerate(columns.values()):
            column.append([fields[k] for _, fields in sentence])
        numbers.append([number for number, _ in sentence])
        origins.append(f"{name}:{sentence[0][0]}")
        documents.append(f"{name}#{document}")
    if not origins:
        bad = "".join(f"\n  {problem}" for problem in problems[:5])
        raise DataError(f"{name} has no sentence that can be read ({len(problems)} bad ones).{bad}")
    return Table({**columns, "lines": numbers, **({"document": documents} if document else {})}, origins), problems


def _fields(line: str) -> list[str]:
    """The columns of a line, none of a blank one."""
    line = line.rstrip("\r")
    if not line.strip(" \t"):
        return []
    return line.split("\t") if "\t" in line else _SPACE.split(line.strip(" "))


def _sentences(lines: list[Line], width: int) -> Iterator[list[Line]]:
    """Runs of lines between blank ones, without comments; a line that starts a document is a run of its own."""
    run: list[Line] = []
    for number, fields in lines:
        is_document = bool(fields) and fields[0] == _DOCUMENT
        if run and (not fields or is_document):
            yield run
            run = []
        if is_document:
            yield [(number, fields)]
        elif fields and (run or not (fields[0].startswith("#") and len(fields) != width)):
            run.append((number, fields))
    if run:
        yield run


def _wrong(sentence: list[Line], width: int, name: str) -> Problem | None:
    """The first line of the sentence that cannot be read."""
    for number, fields in sentence:
        if what := damage("\t".join(fields)):
            return Problem(f"{name}:{number}", what)
        if len(fields) != width:
            return Problem(f"{name}:{number}", f"{len(fields)} columns, where the other lines have {width}")
    return None
