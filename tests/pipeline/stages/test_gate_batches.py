"""The order in which gates see the tasks' batches."""

from types import SimpleNamespace

from mtft.merge.learned import train_gates as module
from mtft.pipeline.stages.merge_with_data import train_gates
from mtft.recipe.schema.merge import GateTraining


def test_the_batches_of_each_task_are_spread_over_a_pass(monkeypatch):
    counts = {"long": 6, "short": 2}
    adapted = SimpleNamespace(
        tasks=tuple(counts),
        model=None,
        inputs=lambda batch: {},
        batches=lambda task, part: [SimpleNamespace(labels_BT=None)] * counts[task],
    )
    seen = []
    monkeypatch.setattr(module, "train_gates", lambda model, adapters, batches, kind, **more: seen.extend(batches))
    train_gates(SimpleNamespace(seed=0), GateTraining(), [], adapted)
    assert [batch.task for batch in seen] == ["long", "long", "short", "long", "long", "long", "short", "long"]
