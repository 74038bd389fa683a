"""What a model answered, for people to read: <run>/answers/TASK.jsonl, `mtft eval --answers`."""

from __future__ import annotations

import json
from pathlib import Path

from mtft.common.atomic_io import write_text
from mtft.evaluation.task_scores import TaskScores


def save_answers(scores: TaskScores, path: Path) -> None:
    """One JSON line a row: id, prompt, reference, answer, and its numbers by metric. Whole or not at all.

    A metric with one number a row shows it, one that needs several for the whole task's score (BLEU) shows none.
    """
    shown = {key: rows.stats_NS[:, 0] for key, rows in scores.answered.items() if rows.stats_NS.shape[1] == 1}
    lines = []
    for row, answer in enumerate(scores.answers):
        record = {"id": answer.id, "where": answer.where, "prompt": answer.prompt, "reference": answer.reference}
        record |= {"answer": answer.text} if len(answer.texts) == 1 else {"answers": list(answer.texts)}
        record |= {key: float(values_N[row]) for key, values_N in shown.items()}
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    write_text(path, "".join(lines))
