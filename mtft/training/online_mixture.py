"""A mixture that changes while the run goes on (`mixture.online`): from the trainer's losses to the plan of its steps.

After optimizer step s, once its metrics are known:

    told      the step's task losses and the tasks' parts of the step, both over all ranks
    measured  held-out losses, where the method wants them now (forward only, the same rows in a round)
    decided   by data_mixers.online.controller on every rank, from the same numbers; what the first rank says is played
    planned   the chain's steps from s + 1 on; rows go on in their epochs

Every rank then has the same plan by construction, and so the same micro-batches. Nothing is built ahead of a change:
the trainer reads its steps one by one. A checkpoint after step s holds what was decided there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from data_mixers.online.bandit import Bandit
from data_mixers.online.controller import Decision, MixtureController, OnlineRule
from data_mixers.online.group_dro import GroupDRO
from data_mixers.online.linear_law import LinearLaw
from data_mixers.plan.replanned import ReplannedPlan
from mtft.common.errors import UserError
from mtft.data.planning import share_bounds
from mtft.distributed.collectives import from_first_rank
from mtft.evaluation.task_scores import TaskScores
from mtft.losses.validation_stream import ValidationStream
from mtft.recipe.rules.mixture_rules import PROBE_SHARE, PROBE_STEPS
from mtft.recipe.schema.mixture import OnlineSection
from mtft.recipe.schema.recipe import Recipe
from mtft.training.step.extra_losses import heldout_losses, valid_losses
from mtft.training.step.objective import StepContext


class OnlineMixture:
    """Watches the steps of a run and changes the controller's chain. stream: held-out rows, for what measures."""

    def __init__(self, controller: MixtureController, stream: ValidationStream | None = None) -> None:
        self.controller, self.stream = controller, stream
        self._reported: set[str] = set()

    def step(
        self,
        context: StepContext,
        step: int,
        loss_K: Tensor | None,
        part_K: Sequence[float],
        say: Callable[[str], None],
    ) -> dict[str, Any]:
        """After optimizer step `step`; loss_K: None where it was skipped. Returns {"mixture": ...} for the metrics
        where the shares change or something stood in their way, else {}. A collective call."""
        controller = self.controller
        if loss_K is not None:
            controller.observe(step, loss_K.tolist(), part_K)
        if not controller.due(step):
            return {}
        number = controller.measures(step)
        valid_K = None
        if number is not None and self.stream is not None:
            valid_K = valid_losses(context, self.stream, number).tolist()
        # The losses are equal on all ranks, but the plans must be equal to the bit, whatever the libraries round.
        decision: Decision | None = from_first_rank(controller.propose(step, valid_K))
        if decision is None:
            return {}
        controller.play(decision)
        for note in decision.notes:
            if note not in self._reported:
                say(f"step {step}: {note}")
                self._reported.add(note)
        line: dict[str, Any] = {"from": decision.first + 1}
        if decision.shares is not None:
            line["shares"] = dict(zip(context.tasks, decision.shares, strict=True))
            line["wanted"] = dict(zip(context.tasks, decision.wanted, strict=True))
        return {"mixture": {**line, "notes": list(decision.notes)} if decision.notes else line}


def make_controller(recipe: Recipe, chain: ReplannedPlan) -> MixtureController:
    """What recipe.mixture.online says about the run of `chain`. Infeasible where nothing is within the bounds."""
    online = recipe.mixture.online
    if online is None:
        raise ValueError("the recipe has no mixture.online")
    return MixtureController(chain, share_bounds(recipe), _method(recipe, online, chain), warmup=online.warmup)


def _method(recipe: Recipe, online: OnlineSection, chain: ReplannedPlan) -> OnlineRule:
    shares = chain.mixture.shares.tolist()
    if online.name == "bandit":
        return Bandit(len(shares), every=online.every, scale=10.0 if online.scale is None else online.scale)
    if online.name == "group_dro":
        return GroupDRO(
            shares,
            reference_losses(recipe),
            every=online.every,
            eta=1.0 if online.eta is None else online.eta,
            smoothing=1e-4 if online.smoothing is None else online.smoothing,
        )
    return LinearLaw(
        shares,
        every=online.every,
        steps=chain.steps,
        warmup=online.warmup,
        probe_steps=online.probe_steps or PROBE_STEPS,
        probe_share=online.probe_share or PROBE_SHARE,
        eta=0.5 if online.eta is None else online.eta,
        ema=online.ema,
        seed=recipe.seed,
    )


def reference_losses(recipe: Recipe) -> list[float]:
    """mixture.online.reference as numbers, averaged as loss.normalise averages; 0 where there is none."""
    given = None if recipe.mixture.online is None else recipe.mixture.online.reference
    if not isinstance(given, str):
        return [0.0 if given is None else float(given[name]) for name in recipe.task_names]
    scores = []
    for name in recipe.task_names:
        path = Path(given) / "scores" / f"{name}.jsonl"
        if not path.is_file():
            what = f"the run has no held-out losses of task {name}"
            do = "give a finished run of the same tasks, or the losses themselves, {task: loss}"
            raise UserError(what, where=f"mixture.online.reference: {given}", do=do)
        scores.append(TaskScores.load(path))
    return heldout_losses(scores, recipe.loss.normalise).tolist()


def describe_online_mixture(recipe: Recipe, controller: MixtureController) -> str:
    """When the shares will change, by what, and between which limits; a paragraph for people."""
    online = recipe.mixture.online
    assert online is not None
    steps, chain = decision_steps(recipe, controller), controller.chain
    when = f"after steps {', '.join(map(str, steps[:3]))}" + (f", ... {steps[-1]}" if len(steps) > 3 else "")
    when = f"decides {len(steps)} times, {when}" if steps else "decides nothing: the run is too short"
    looks = {
        "bandit": "training losses",
        "group_dro": "training losses above their reference" if online.reference is not None else "training losses",
        "linear_law": "held-out losses around a probe of each task, which "
        f"{len(chain.names) * (online.probe_steps or PROBE_STEPS)} steps of every {online.every} are used for",
    }[online.name]
    bounds, notes = controller.bounds(0)
    limits = zip(chain.names, bounds.lower(), bounds.upper(), strict=True)
    told = ", ".join(f"{name} {low:.2f} to {high:.2f}" for name, low, high in limits)
    return "; ".join([f"mixture.online: {online.name} by {looks}; {when}; shares may move: {told}", *notes])


def decision_steps(recipe: Recipe, controller: MixtureController) -> list[int]:
    """The steps after which something is decided (linear_law: after which a round begins)."""
    online, steps = recipe.mixture.online, controller.chain.steps
    assert online is not None
    decisions = range(online.every, steps, online.every)
    if online.name != "linear_law":
        return [step for step in decisions if step > online.warmup]
    return [step for step in decisions if controller.due(step)]
