"""Two tasks in the plane, with a valley that stops plain descent: the toy problem of Nash-MTL and FAMO.

    python scripts/toy_balancers.py docs/figures/toy-balancers.svg       (about two minutes)

Prints where each start ends under the plain sum and under FAMO, and draws the paths. The problem is from Navon et al.
(arXiv 2202.01017) and Liu et al. (arXiv 2306.03792):

    lg(u) = log max(|u|, 5e-6) + 6;  c1 = relu(tanh(x2/2));  c2 = relu(tanh(-x2/2))
    q(a)  = ((a - x1)^2 + (x2+8)^2/10)/10 - 20
    f1 = [lg((-x1-7)/2 + tanh x2) c1 + q(7) c2] / 10
    f2 =  lg((-x1+3)/2 - tanh x2 + 2) c1 + q(-7) c2

Task 1 is ten times smaller than task 2, so the sum follows task 2 alone and gets stuck where its ridge is.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mtft.losses.balancers import BALANCERS, BalancerContext, Observation

LOWER_BOUNDS = {"first": -2.1, "second": -21.0}
STARTS = ((9.0, -1.0), (0.0, 0.0), (-7.5, -0.5), (-8.5, 7.5), (9.0, 9.0))


def toy_losses(x_S2: Tensor) -> Tensor:
    """Both losses [S, 2] at points [S, 2]."""
    x1, x2 = x_S2[:, 0], x_S2[:, 1]

    def ridge(u: Tensor) -> Tensor:
        return u.abs().clamp(min=5e-6).log() + 6

    def bowl(a: float) -> Tensor:
        return ((a - x1) ** 2 + 0.1 * (x2 + 8) ** 2) / 10 - 20

    # maximum and not relu: at x2 = 0 its gradient is one half, so that a start there is not a point of rest.
    upper, lower = (torch.maximum(torch.tanh(side * x2 / 2), torch.zeros_like(x2)) for side in (1, -1))
    first = ridge(0.5 * (-x1 - 7) + torch.tanh(x2)) * upper + bowl(7) * lower
    second = ridge(0.5 * (-x1 + 3) - torch.tanh(x2) + 2) * upper + bowl(-7) * lower
    return torch.stack([0.1 * first, second], dim=1)


def descend(starts, balancer: str, steps: int, *, every: int = 100, **options) -> Tensor:
    """Paths [points, S, 2] of Adam (1e-3) from each start under one balancer, every `every` steps and at the end.

    `uniform` is the plain sum of the losses; the others weigh them (weights adding up to 1) and clip the gradient at 1.
    """
    x_S2 = torch.tensor(starts, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([x_S2], lr=1e-3)
    sides = [BALANCERS[balancer](BalancerContext(("first", "second")), **options) for _ in starts]
    path, before = [x_S2.detach().clone()], None
    for step in range(1, steps + 1):
        loss_S2 = toy_losses(x_S2)
        seen_S2 = loss_S2.detach()
        if before is not None:  # the same function again, so this is the loss after the step
            for side, old_2, new_2 in zip(sides, before, seen_S2, strict=True):
                side.update(Observation(step - 1, old_2, after_loss_K=new_2))
        w_S2 = torch.stack([side.weights(step, old_2) for side, old_2 in zip(sides, seen_S2, strict=True)])
        adam.zero_grad()
        (loss_S2 * (w_S2 if balancer == "uniform" else w_S2 / 2)).sum().backward()
        assert x_S2.grad is not None
        if balancer != "uniform":
            x_S2.grad.div_(x_S2.grad.norm(dim=1, keepdim=True).clamp(min=1))
        adam.step()
        before = seen_S2
        if step % every == 0 or step == steps:
            path.append(x_S2.detach().clone())
    return torch.stack(path)


def famo(starts, steps: int) -> Tensor:
    return descend(starts, "famo", steps, after="exact", step_loss="exact", lower_bounds=LOWER_BOUNDS)


def figure(paths: dict[str, Tensor], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    axis = torch.linspace(-10, 10, 200, dtype=torch.float64)
    grid_S2 = torch.cartesian_prod(axis, axis)
    total = toy_losses(grid_S2).sum(dim=1).reshape(200, 200).T
    drawing, panels = plt.subplots(1, len(paths), figsize=(5 * len(paths), 4.6), sharey=True)
    for panel, (name, path) in zip(panels, paths.items(), strict=True):
        panel.contour(axis, axis, total, levels=18, linewidths=0.5, colors="0.75")
        for s in range(path.shape[1]):
            (line,) = panel.plot(path[:, s, 0], path[:, s, 1], linewidth=1.3)
            panel.plot(*path[0, s], "o", color=line.get_color(), markersize=4)
            panel.plot(*path[-1, s], "*", color=line.get_color(), markersize=11)
        panel.plot([-7, 7], [-8, -8], color="black", linewidth=3, alpha=0.4, label="Pareto front")
        panel.set(title=name, xlabel="$x_1$")
    panels[0].set_ylabel("$x_2$")
    panels[0].legend(loc="upper left", fontsize=8)
    drawing.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(file)


def main() -> None:
    torch.set_num_threads(1)
    paths = {"plain sum": descend(STARTS, "uniform", 12_000), "FAMO": famo(STARTS, 50_000)}
    for name, path in paths.items():
        for start, end, loss in zip(STARTS, path[-1].tolist(), toy_losses(path[-1]).tolist(), strict=True):
            print(f"{name:10} from {start!s:12} to ({end[0]:.3f}, {end[1]:.3f})  losses {loss[0]:.3f}, {loss[1]:.3f}")
    if len(sys.argv) > 1:
        figure(paths, Path(sys.argv[1]))


if __name__ == "__main__":
    main()
