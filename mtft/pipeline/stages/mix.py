"""The mix stage: design -> sweep -> fit -> propose. Reads the recipe's `sweep` section, writes <output.dir>/mix/.

design.csv       the mixtures to try, one row each
ledger.jsonl     one line per finished trial (append-only: a killed sweep goes on)
fit.json         what the surrogates make of them
proposal.json    the proposed mixture, its predicted gain with an interval, the verdict
mixture.yaml     what `train` should play: the proposal if it is better, else the current mixture
blame.json       what each dataset is worth (blame.py)
"""

from __future__ import annotations

import csv
import io
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_mixers.design.cocktail import cocktail_grid, synergy
from data_mixers.design.designs import damo, regmix_dirichlet, space_filling
from data_mixers.fitting.enough_trials import too_few_trials, trials_with
from data_mixers.mixture.bounds import Bounds
from data_mixers.mixture.mixture import Mixture, natural
from data_mixers.sweep.early_termination import EarlyTermination
from data_mixers.sweep.ledger import TrialLedger
from data_mixers.sweep.runner import SweepResult, make_trials, run_sweep
from data_mixers.sweep.trial import Trial
from mtft.common.atomic_io import write_text
from mtft.common.errors import UserError
from mtft.common.fingerprint import content_hash
from mtft.common.folder_lock import sole_writer
from mtft.common.output_paths import check_output_folder
from mtft.common.own_files import read_own_text, write_own
from mtft.data.planning import epoch_caps, groups, make_plan, requested_mixture, task_sizes
from mtft.pipeline.stages import derived_recipes
from mtft.pipeline.stages.mix_files import DESIGN, FIT, LEDGER, MIXTURE, PROPOSAL, mix_dir, refuse_foreign_files
from mtft.pipeline.stages.sweep_targets import asked_in_trials, fitted_targets, sweep_goals, sweep_objective
from mtft.recipe.load import fingerprint
from mtft.recipe.schema.recipe import Recipe
from mtft.recipe.schema.sweep import SweepSection
from mtft.recipe.targets import objective_targets, split_target

DAMO_BATCH = 16  # arXiv 2510.19336

if TYPE_CHECKING:
    from data_mixers.fitting.surrogate_fits import SurrogateFits
    from data_mixers.propose.proposal import Proposal


@dataclass(frozen=True)
class MixtureSpace:
    """What a mixture of this recipe may be.

    current: what the recipe asks for; prior: the natural shares, where nothing speaks for anything else;
    bounds: floors, caps and epoch caps of the run that the proposal is for.
    """

    current: Mixture
    prior: Mixture
    bounds: Bounds


def space(recipe: Recipe, stores: list[Any]) -> MixtureSpace:
    """The space of mixtures of a recipe over its training stores."""
    sizes = task_sizes(recipe, stores)
    current = requested_mixture(recipe, sizes)
    # The run's length does not depend on the mixture with unit tokens, and hardly with unit examples.
    unbounded = derived_recipes.override_section(
        recipe, mixture=derived_recipes.override_section(recipe.mixture, on_cap="redistribute")
    )
    plan = make_plan(unbounded, stores, current)
    bounds = Bounds(
        floors=recipe.mixture.floors,
        caps=recipe.mixture.caps,
        groups=groups(recipe),
        max_epochs=epoch_caps(recipe),
        sizes=sizes,
        total=float(plan.steps * plan.batch),
        names=recipe.task_names,
    )
    bounds.check_feasible()
    return MixtureSpace(current, natural(sizes), bounds)


def current_mixture(recipe: Recipe) -> Mixture:
    """What the recipe asks for, over its training rows."""
    return requested_mixture(recipe, task_sizes(recipe, _stores(recipe)))


def trial_config(recipe: Recipe, stores: list[Any]) -> str:
    """What the trials of one fit must agree on: everything but the mixture, and the data."""
    sweep = sweep_section(recipe)
    # What the tasks measure besides is another matter; what the objective asks for comes below.
    proxy = derived_recipes.unmeasured(derived_recipes.proxy_recipe(recipe, sweep))
    rules = fingerprint(proxy, without=("name", "output", "mixture"))
    held_out = [store.fingerprint for store in _held_out(recipe)]
    parts = [
        rules,
        f"{sweep.eval_limit}",
        *filter(None, [asked_in_trials(recipe)]),
        *(store.fingerprint for store in stores),
        *held_out,
    ]
    return content_hash(" ".join(parts))


def design(recipe: Recipe, stores: list[Any]) -> list[Trial]:
    """The trials: the current mixture (1 + repeats times), then mixtures of the chosen design inside the bounds; or the
    cocktail grid, each of its mixtures 1 + repeats times."""
    sweep, where = sweep_section(recipe), space(recipe, stores)
    repeats = 1 + sweep.repeats
    if sweep.design != "cocktail" and sweep.trials <= repeats:
        raise UserError(
            f"{sweep.trials} trials leave none but the current mixture and its {sweep.repeats} repeats",
            where="sweep.trials",
            do="raise sweep.trials",
        )
    if sweep.design == "cocktail":
        rows = np.repeat(cocktail_grid(len(recipe.task_names)), repeats, axis=0)
    elif sweep.design == "space_filling":
        rows = space_filling(
            where.bounds, sweep.trials, prior=where.prior, current=where.current, repeats=repeats, seed=recipe.seed
        )
    elif sweep.design == "damo":
        batch = _trial_batch(recipe, stores, where.current)
        drawn = damo(where.bounds, batch, sweep.trials - repeats, seed=recipe.seed)
        rows = [where.bounds.project(where.current)] * repeats + list(drawn)
    else:
        drawn = regmix_dirichlet(where.prior, sweep.trials - repeats, seed=recipe.seed)
        current = where.bounds.project(where.current)
        rows = [current] * repeats + [where.bounds.project(row / row.sum(), metric="l2") for row in drawn]
    return make_trials(
        recipe.task_names, rows, seed=recipe.seed, config=trial_config(recipe, stores), goal=sweep_goals(recipe)
    )


def _trial_batch(recipe: Recipe, stores: list[Any], current: Mixture) -> int:
    """Examples in a step of a trial: what design damo composes. With unit tokens, whose steps have no fixed number of
    examples, the paper's batch."""
    if recipe.mixture.unit == "tokens":
        return DAMO_BATCH
    proxy = derived_recipes.proxy_recipe(recipe, sweep_section(recipe))
    lenient = derived_recipes.override_section(proxy.mixture, on_cap="redistribute")
    return make_plan(derived_recipes.override_section(proxy, mixture=lenient), stores, current).batch


def mix_design(recipe: Recipe) -> str:
    """The design's text, written to <output.dir>/mix/design.csv, where the trials of another design stay described."""
    check_output_folder(mix_dir(recipe), key="output.dir")
    refuse_foreign_files(recipe, DESIGN, LEDGER)
    text = _table(recipe, design(recipe, _stores(recipe)))
    if not _other_trials(recipe, text):
        _write_design(recipe, text)
    return text


def _table(recipe: Recipe, trials: list[Trial]) -> str:
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(["trial", *recipe.task_names])
    table.writerows([trial.id, *(f"{share:.6f}" for share in trial.mixture.shares)] for trial in trials)
    return out.getvalue()


def _other_trials(recipe: Recipe, text: str) -> bool:
    """Whether design.csv describes trials that were run, and others than `text` does."""
    file = mix_dir(recipe) / DESIGN
    if not os.path.lexists(file) or read_own_text(file, do="delete it: it is written anew") == text:
        return False
    return bool(TrialLedger(mix_dir(recipe) / LEDGER).records)


def _write_design(recipe: Recipe, text: str) -> None:
    with sole_writer(mix_dir(recipe)):
        write_text(mix_dir(recipe) / DESIGN, text)


def mix_sweep(recipe: Recipe, *, on_done: Any = None) -> SweepResult:
    """Runs the trials that the ledger does not hold yet."""
    sweep = sweep_section(recipe)
    judged = {split_target(target)[0] for target in sweep_goals(recipe)}
    missing = [task.name for task in recipe.tasks if task.eval_data is None and task.name in judged]
    if missing:
        raise UserError(
            f"trials are scored on held-out rows, and {', '.join(missing)} has none",
            where=f"tasks.{missing[0]}.eval_data",
            do="give every task an eval_data file",
        )
    check_output_folder(mix_dir(recipe), key="output.dir")
    refuse_foreign_files(recipe, DESIGN, LEDGER)
    with sole_writer(mix_dir(recipe)):
        return _sweep_trials(recipe, sweep, on_done)


def _sweep_trials(recipe: Recipe, sweep: SweepSection, on_done: Any) -> SweepResult:
    from mtft.training.sweep_trial import run_trial

    trials = design(recipe, _stores(recipe))
    _write_design(recipe, _table(recipe, trials))
    # Workers share the cores: two of them with all cores' threads each wait for each other most of the time.
    threads = max(1, (os.cpu_count() or 1) // sweep.workers) if sweep.workers > 1 else None
    return run_sweep(
        trials,
        partial(
            run_trial,
            recipe=derived_recipes.proxy_recipe(recipe, sweep),
            eval_limit=sweep.eval_limit,
            threads=threads,
            checks=sweep.checks,
            targets=objective_targets(recipe),
        ),
        TrialLedger(mix_dir(recipe) / LEDGER),
        stopping=EarlyTermination(sweep.full_trials) if sweep.checks else None,
        workers=sweep.workers,
        backend=sweep.backend,
        **({} if sweep.resources is None else sweep.resources.model_dump()),
        seed=recipe.seed,
        on_done=on_done,
    )


def mix_propose(recipe: Recipe) -> Proposal:
    """Fits the ledger and writes fit.json, proposal.json and mixture.yaml."""
    from data_mixers.propose.proposal import Proposal, propose_mixture

    sweep, folder = sweep_section(recipe), mix_dir(recipe)
    if not (folder / LEDGER).is_file():
        raise UserError("no trials have been run", where=str(folder / LEDGER), do="mtft mix sweep RECIPE")
    refuse_foreign_files(recipe, LEDGER, FIT, PROPOSAL, MIXTURE)
    where = space(recipe, _stores(recipe))
    targets, ledger = list(fitted_targets(recipe)), own_trials(recipe)
    unscored = [target for target in sweep_goals(recipe) if not trials_with(ledger.records, target)]
    if unscored and any(record.scores for record in ledger.records):
        what = f"no trial was scored by {unscored[0]}: they were run for another objective"
        raise UserError(what, where=str(folder / LEDGER), do="mtft mix sweep RECIPE runs trials that are")
    if (why := too_few(recipe)) is not None:  # nothing is fitted: a surrogate of three trials is none
        proposal = Proposal.undecided(why, current=where.current, prior=where.prior, bounds=where.bounds)
        counts = {name: {"target": name, "n": trials_with(ledger.records, name), "unsaid": why} for name in targets}
        empty = {"signal": False, "candidates": [], "trials": []}
        fit = {"names": recipe.task_names, "targets": {name: {**about, **empty} for name, about in counts.items()}}
        return _written(folder, fit, proposal)
    fits = fit_trials(recipe, ledger)
    proposal = propose_mixture(
        fits, sweep_objective(recipe), where.bounds, prior=where.prior, current=where.current, kl=sweep.kl
    )
    return _written(folder, fits.report(), proposal)


def own_trials(recipe: Recipe) -> TrialLedger:
    """The trials of the recipe as it is, where the ledger holds those of an earlier state too; else all of them."""
    ledger = TrialLedger(mix_dir(recipe) / LEDGER)
    config = trial_config(recipe, _stores(recipe))
    own = [record for record in ledger.records if record.config == config]
    return TrialLedger(None, own) if 0 < len(own) < len(ledger.records) else ledger


def fit_trials(recipe: Recipe, ledger: TrialLedger) -> SurrogateFits:
    """Surrogates of everything that is predicted; for the run's scale where the trials are of another model."""
    from data_mixers.fitting.scale_transfer import for_other_scale
    from data_mixers.fitting.surrogate_fits import fit_surrogates

    sweep = sweep_section(recipe)
    targets = fitted_targets(recipe)
    bounds = {target: aggregate.bounds for target, aggregate in targets.items()}
    fits = fit_surrogates(ledger, list(targets), surrogate=sweep.surrogate, bounds=bounds, seed=recipe.seed)
    return for_other_scale(fits) if sweep.model is not None and sweep.model != recipe.model else fits


def _written(folder: Path, fit: dict[str, Any], proposal: Proposal) -> Proposal:
    with sole_writer(folder):
        write_own(folder / FIT, fit)
        write_own(folder / PROPOSAL, proposal.as_dict())
        proposal.to_yaml(folder / MIXTURE)
    return proposal


def too_few(recipe: Recipe) -> str | None:
    """Why nothing can be said from the trials that the ledger holds by now; None: there are enough."""
    records = own_trials(recipe).records
    return too_few_trials(min(trials_with(records, target) for target in fitted_targets(recipe)), len(recipe.tasks))


def mix_synergy(recipe: Recipe) -> str:
    """What the trials of a cocktail grid say of each task beside each other, as a table."""
    return synergy(TrialLedger(mix_dir(recipe) / LEDGER), recipe.task_names, seed=recipe.seed).text()


def _stores(recipe: Recipe) -> list[Any]:
    from mtft.data.store.token_store import open_stores
    from mtft.models.loading import load_tokenizer

    return open_stores(recipe, load_tokenizer(recipe.model), "train")


def _held_out(recipe: Recipe) -> list[Any]:
    from mtft.data.store.token_store import open_stores
    from mtft.models.loading import load_tokenizer

    return [store for store in open_stores(recipe, load_tokenizer(recipe.model), "eval") if store is not None]


def sweep_section(recipe: Recipe) -> SweepSection:
    """UserError for a recipe without one."""
    if recipe.sweep is None:
        raise UserError(
            "the recipe has no section `sweep`", where="sweep", do="add one: sweep: {trials: 32, steps: 50}"
        )
    return recipe.sweep
