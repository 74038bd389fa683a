"""The fuse stage: what it depends on."""

from mtft.pipeline.stages import fuse as stage
from mtft.recipe.schema.recipe import Recipe


def inputs_of(monkeypatch, recipe):
    seen = []
    monkeypatch.setattr(stage, "run_cached_stage", lambda folder, inputs, work, *, fresh: seen.append(inputs))
    monkeypatch.setattr(stage, "load_or_score", lambda *_: {})
    stage.fuse_stage(recipe, recipe.fuse, {}, None, data="", fresh=False)
    return seen[0]


def test_scores_of_the_strong_model_depend_on_the_metrics_and_on_how_answers_are_made(whole_recipe, monkeypatch):
    def asking(**options):
        first, *others = whole_recipe["tasks"]
        return Recipe.model_validate({**whole_recipe, "tasks": [first | options, *others]})

    plain, *changed = (
        inputs_of(monkeypatch, asking(**options))
        for options in (
            {},
            {"metrics": ["loss", "chrf"]},
            {"metrics": ["loss", "f1"]},
            {"metrics": ["loss", "f1"], "generate": {"max_new_tokens": 9}},
        )
    )
    assert all(one != other for n, one in enumerate(changed) for other in [plain, *changed[:n]])
    assert plain == inputs_of(monkeypatch, asking(metrics=["loss", "exact_match"]))  # the forward pass gives them all
