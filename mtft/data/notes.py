"""What is done to rows on their way to examples: said once by `mtft check`, with the share of rows it happened to."""

from __future__ import annotations

from mtft.common.listing import clipped

NOTES = {
    "default_template": "the model has no chat template: the default one is used (User: ... Assistant: ...)",
    "special_in_text": "conversations hold special tokens in their own text (rendered by a template before?)",
    "split": "conversations became several examples: the template renders earlier assistant turns differently",
    "system_folded": "system messages moved into the first user turn: the chat template has no place for them",
    "developer_as_system": "developer messages became system messages: the chat template has no developer role",
    "thinking_passed": "thinking inside <think> of a content is given to the chat template as its reasoning",
    "thinking_written": "thinking is written into <think> in front of the answer: the template knows no other place",
    "tools_ignored": "conversations have tools that the chat template does not show",
    "empty_thought": "empty thoughts (<think></think>) in front of answers are left to the chat template",
    "eos_appended": "each turn became an example with an end token: the chat template ends turns without one",
    "opened": "answers lack what the template's generation prompt opens: at inference it will stand there",
    "thought_closed": "answers begin by closing the thought that the template's generation prompt opens",
}
SHOTS_LEFT_OUT, SHOTS_FEW, SHOTS_NO_PLACE = "shots_left_out", "shots_few", "shots_no_place"
NOTES |= {
    SHOTS_LEFT_OUT: "rows have fewer demonstrations than tasks.*.shots.n: all would not fit into train.max_length",
    SHOTS_FEW: "rows have fewer demonstrations than tasks.*.shots.n: too few rows have another prompt",
    SHOTS_NO_PLACE: "rows have no demonstrations: they do not begin with the user",
}
MOST_NAMED = 20  # columns of a row that nobody reads and that are named
MORE_COLUMNS = "more_columns"
NOTES[MORE_COLUMNS] = f"rows have more than {MOST_NAMED} columns that are not read; only these are named"
WEIGHT_ZERO = "weight_zero"
NOTES[WEIGHT_ZERO] = "rows have weight 0 and are not learnt (tasks.*.row_weight)"
COLUMN, KEY = "column:", "key:"  # prefixes of notes that name what nobody reads


def describe_note(note: str, count: int, rows: int) -> str:
    """One sentence for people. rows: of the task, `count` of which are meant."""
    share = f"({count:,} of {rows:,} rows)"
    if note.startswith(COLUMN):
        return f"column {clipped(note.removeprefix(COLUMN), 80)} {share} is not read"
    if note.startswith(KEY):
        return f"the key {clipped(note.removeprefix(KEY), 80)!r} of messages {share} is not read by the chat template"
    return f"{NOTES[note]} {share}"
