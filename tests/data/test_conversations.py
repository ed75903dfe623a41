"""Shapes of rows for language models: which columns are what, and what is wrong with a row."""

import pytest

from smidgen.core.errors import DataError
from smidgen.data.conversations import Turn, before_answer, recognise
from smidgen.data.table import Table


def table(**columns) -> Table:
    count = len(next(iter(columns.values())))
    return Table(columns, [f"rows.jsonl:{i + 1}" for i in range(count)])


def chat(*messages, column="messages") -> Table:
    return table(**{column: [list(messages)]})


def said(role, content):
    return {"role": role, "content": content}


HI = (said("user", "Hi"), said("assistant", "Hello"))


@pytest.mark.parametrize(
    ("columns", "kind", "chosen"),
    [
        ({"text": ["a"], "id": ["1"]}, "text", {"text": "text"}),
        ({"words": ["a b"], "number": [1]}, "text", {"text": "words"}),
        (
            {"prompt": ["a"], "completion": ["b"], "text": ["c"]},
            "completion",
            {"prompt": "prompt", "completion": "completion"},
        ),
        (
            {"instruction": ["a"], "input": [""], "output": ["b"]},
            "completion",
            {"prompt": "instruction", "completion": "output", "input": "input"},
        ),
        (
            {"instruction": ["a"], "context": ["c"], "response": ["b"], "category": ["d"]},
            "completion",
            {"prompt": "instruction", "completion": "response", "input": "context"},
        ),
        ({"messages": [list(HI)], "id": ["1"]}, "chat", {"messages": "messages"}),
        ({"talk": [[{"from": "human", "value": "Hi"}]], "prompt": ["a"]}, "chat", {"messages": "talk"}),
        ({"messages": [list(HI)], "other": [list(HI)]}, "chat", {"messages": "messages"}),
    ],
)
def test_shapes_are_recognised_by_names_and_contents(columns, kind, chosen):
    shape = recognise(table(**columns), {})
    assert (shape.kind, shape.columns) == (kind, chosen)


def test_what_is_said_about_columns_stands():
    rows = table(a=["x"], b=["y"], text=["z"])
    assert recognise(rows, {"prompt": "a", "completion": "b"}).kind == "completion"
    assert recognise(rows, {"text": "b"}).text(rows, 0) == "y"
    with pytest.raises(DataError, match='There is no column "c"'):
        recognise(rows, {"text": "c"})
    with pytest.raises(DataError, match="columns are said for prompt, which is none of the shapes"):
        recognise(rows, {"prompt": "a"})


def test_rows_of_no_clear_shape_are_shown_with_the_flags_that_settle_it():
    with pytest.raises(DataError, match=r'no column has a usual name.*--column text=NAME.*"a" \(\'x\'\); "b"'):
        recognise(table(a=["x"], b=["y"]), {})
    with pytest.raises(DataError, match="one and two all hold messages"):
        recognise(table(one=[list(HI)], two=[list(HI)]), {})


def test_all_shapes_of_a_conversation_are_the_same_turns():
    turns = [Turn("user", "Hi"), Turn("assistant", "Hello")]
    share = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    parts = [said("user", [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]), said("assistant", "Hello")]
    for rows in (
        chat(*HI),
        chat(*share, column="conversations"),
        chat(*parts),
        table(prompt=["Hi"], completion=["Hello"]),
    ):
        assert recognise(rows, {}).turns(rows, 0) == turns


def test_alpacas_input_stands_below_its_instruction():
    rows = table(instruction=["Add", "Add"], input=["1 2", ""], output=["3", "?"])
    shape = recognise(rows, {})
    assert [shape.turns(rows, i)[0].content for i in (0, 1)] == ["Add\n\n1 2", "Add"]


def test_two_turns_of_the_user_in_a_row_are_kept_apart():
    rows = chat(said("system", "Be kind"), said("user", "Hi"), said("user", "Ho"), said("assistant", "Hello"))
    turns = recognise(rows, {}).turns(rows, 0)
    assert [turn.role for turn in turns] == ["system", "user", "user", "assistant"]
    assert before_answer(turns) == turns[:3]


@pytest.mark.parametrize(
    ("messages", "what"),
    [
        ([], "the list of messages is empty"),
        (None, "not a list of messages but None"),
        (["Hi"], "message 1 is not an object with a role and a content but 'Hi'"),
        ([said("user", "Hi")], "no message of the assistant"),
        (
            [said("user", "Hi"), said("assistent", "Hello")],
            "'assistent', which is not known. Did you mean \"assistant\"",
        ),
        ([said("user", "Hi"), said(None, "Hello")], "message 2 has the role None"),
        ([said("user", " "), said("assistant", "Hello")], "message 1: the text is empty"),
        ([said("user", "Hi"), {"role": "assistant"}], "message 2: the text is missing"),
        ([said("user", "Hi"), {**said("assistant", None), "tool_calls": [{}]}], "message 2 calls tools"),
        ([said("user", [{"type": "image_url"}]), said("assistant", "A cat")], "message 1 holds more than text"),
    ],
)
def test_what_is_wrong_with_a_conversation_is_said(messages, what):
    rows = table(messages=[list(HI), messages])
    shape = recognise(rows, {})
    with pytest.raises(DataError) as raised:
        shape.turns(rows, 1)
    assert str(raised.value).startswith('column "messages": ')
    assert what in str(raised.value)


def test_an_empty_completion_is_a_bad_row():
    rows = table(prompt=["a"], completion=[""])
    with pytest.raises(DataError, match='column "completion": the text is empty'):
        recognise(rows, {}).turns(rows, 0)
