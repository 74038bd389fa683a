"""One recipe change for every kind of training step: what tests/devices runs on the simulated device.

Balancers, aggregators, sample weights and optimizers come out of their own tables, so a new one is run by itself.
"""

from typing import Any, get_args

from mtft.gradients.aggregators import AGGREGATORS
from mtft.losses.balancers import BALANCERS
from mtft.losses.sample_weights import RULES
from mtft.losses.task_reduction import NORMALISATIONS
from mtft.recipe.method_options import options_of
from mtft.recipe.schema.loss import FlatMinimaSection

EVERY_STEP = {"gram_every": 1, "valid_every": 1, "every": 1}
PER_TASK = {"copy": 1.0, "twice": 2.0, "shout": 0.5}
BALANCER_OPTIONS: dict[str, dict[str, Any]] = {
    "fixed": {"values": PER_TASK},
    "coba": {"warmup": 2},
    "visatb": {"given": PER_TASK, "received": PER_TASK, "alone": PER_TASK},
}


def balancer(name: str) -> dict[str, Any]:
    """A balancer with everything at every step."""
    known = options_of(BALANCERS[name])
    options = {option: value for option, value in EVERY_STEP.items() if option in known}
    return {"loss": {"balancer": {"name": name, **options, **BALANCER_OPTIONS.get(name, {})}}}


PLAIN: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora padded": {"train": {"packing": False}},
    "lora, one task a micro-batch": {"train": {"batch_style": "unmixed"}},
    "full": {"lora": None},
    "full padded": {"lora": None, "train": {"packing": False}},
    "checkpointing": {"train": {"gradient_checkpointing": True}},
    "dora": {"lora": {"r": 4, "alpha": 8, "dora": True}},
    "neftune": {"train": {"neftune": 5.0}},
    "mezo": {"train": {"mezo": 1e-3, "optimizer": "sgd", "max_grad_norm": 0}},
    "label smoothing and z-loss": {"loss": {"label_smoothing": 0.1, "z_loss": 1e-3}},
    "orthogonal": {"loss": {"orthogonal": 0.1}},
    "affinity": {"loss": {"gradients": {"every": 1}}},
    "affinity in halves": {"loss": {"gradients": {"every": 1, "split": True}}},
    **{f"normalise {name}": {"loss": {"normalise": name}} for name in NORMALISATIONS},
    **{
        f"sample weights {rule} {group}": {"loss": {"sample_weights": {"rule": rule, "group": group, "burn_in": 0}}}
        for rule in (*RULES, "focal")
        for group in ("task", "all")
    },
    **{f"optimizer {name}": {"train": {"optimizer": name}} for name in ("adafactor", "lion")},
    "optimizer muon": {"lora": None, "train": {"optimizer": "muon"}},
    "optimizer schedule_free": {"train": {"optimizer": "schedule_free", "schedule": "constant"}},
}
BALANCED = {f"balancer {name}": balancer(name) for name in BALANCERS}
AGGREGATED = {
    **{f"aggregator {name}": {"loss": {"gradients": {"aggregator": name}}} for name in AGGREGATORS},
    **{
        f"flat {name}": {"loss": {"gradients": {"flat": {"name": name}}}}
        for name in get_args(FlatMinimaSection.model_fields["name"].annotation)
    },
    "flat f_mtl adaptive, upgrad": {
        "loss": {"gradients": {"aggregator": "upgrad", "flat": {"name": "f_mtl", "adaptive": True}}}
    },
}
KINDS = {**PLAIN, **BALANCED, **AGGREGATED}
IN_THE_FAST_SUITE = ("lora", "full padded", "neftune", "mezo", "balancer gradnorm", "aggregator upgrad")
