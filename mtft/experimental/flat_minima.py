"""Steps towards flat minima: gradients are also taken a little way off, where each task's loss is high.

    f_mtl   eps_k = rho g_k / |g_k|   (adaptive, as ASAM: rho theta^2 g_k / | |theta| g_k |)
            h_k = grad L_k(theta + eps_k) - g_k;   direction = A(g) + A(h)        A: any aggregator, or the mean
            Phan et al., "Improving Multi-task Learning via Seeking Task-based Flat Regions" (ICCV 2025, 2211.13723)

    samo    g0 = sum_k p_k g_k;  z ~ N(0, 1);  c_k = [L_k(theta + e z) - L_k(theta - e z)] / 2e
            per tensor: m_k = (1 - beta) g0 + beta |g0| zo_k / |zo_k|,  zo_k = c_k z;   eps_k = rho m_k / |m_k|
            direction = A(grad L_k(theta + eps_k))
            "SAMO: A Lightweight Sharpness-Aware Approach for Multi-Task Optimization" (ICCV 2025)

Both take one more forward and backward pass per task; samo two more forward passes besides. Gradients come in and go
out by name, [K, *shape], of the tasks' mean losses over the whole step (all ranks). Only trained parameters are moved,
and they are put back from a copy, bit for bit: what is added and subtracted again is not what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from mtft.gradients.gramian import combine, gram

RHO = {"f_mtl": 0.05, "samo": 0.001}  # of the papers' code (f_mtl: 2 with ASAM) and paper (samo)

Named = dict[str, Tensor]
Mix = Callable[[Tensor], Tensor]  # Gram matrix [K, K], NaN = absent -> alpha [K]


@contextmanager
def perturbed_weights(parameters: Mapping[str, Tensor], change: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside: every parameter + its change. Afterwards, also after an error: the very same bits as before."""
    saved = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.add_(change[name].to(parameter.dtype))
        yield
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(saved[name])


def f_mtl(
    parameters: Mapping[str, Tensor],
    jacobian: Mapping[str, Tensor],
    gradient: Callable[[int], Named],
    mix: Mix,
    present_K: Tensor,
    *,
    rho: float = RHO["f_mtl"],
    adaptive: bool = False,
) -> tuple[Named, Tensor]:
    """(direction by name, Gram matrix of the unperturbed gradients [K, K], NaN = absent).

    jacobian   g_k: [K, *shape] by name, rows of absent tasks ignored;  present_K: bool
    gradient   k -> gradient of L_k by name at the parameters as they are when it is called
    """
    change_of = {}
    for k in present_K.nonzero().flatten().tolist():
        g = {name: block[k] for name, block in jacobian.items()}
        with perturbed_weights(parameters, _ascent(parameters, g, rho, adaptive)):
            perturbed_gradient = gradient(k)
        change_of[k] = {name: perturbed_gradient[name] - g[name] for name in g}
    zero = {name: torch.zeros_like(block[0]) for name, block in jacobian.items()}
    sharp = {name: torch.stack([change_of.get(k, zero)[name] for k in range(len(present_K))]) for name in jacobian}
    gram_KK = masked_gram(jacobian, present_K)
    mean_part, sharpness_part = combine(jacobian, mix(gram_KK)), combine(sharp, mix(masked_gram(sharp, present_K)))
    return {name: mean_part[name] + sharpness_part[name] for name in mean_part}, gram_KK


def samo(
    parameters: Mapping[str, Tensor],
    jacobian: Mapping[str, Tensor],
    gradient: Callable[[int], Named],
    losses: Callable[[], Tensor],
    mix: Mix,
    present_K: Tensor,
    *,
    p_K: Tensor,
    noise: Callable[[], Iterator[Tensor]],
    rho: float = RHO["samo"],
    beta: float = 0.5,
    probe: float = 0.01,
) -> tuple[Named, Tensor]:
    """As `f_mtl`.

    losses  task losses [K] at the parameters as they are, NaN = absent; must draw the same dropout each time
    p_K     the user's preference over the present tasks, any scale
    noise   z, one tensor per parameter in their order; the same numbers at each call (a seed is kept, not z)
    """
    probe_losses = []
    for sign in (probe, -probe):
        with perturbed_weights(parameters, {name: sign * z for name, z in zip(parameters, noise(), strict=True)}):
            probe_losses.append(losses())
    slope_K = torch.nan_to_num((probe_losses[0] - probe_losses[1]) / (2 * probe), nan=0.0)
    share_K = torch.where(present_K, p_K, 0.0)
    mean = combine(jacobian, share_K / share_K.sum())
    perturbed_gradients = {name: torch.zeros_like(block) for name, block in jacobian.items()}
    for k in present_K.nonzero().flatten().tolist():
        towards = {}
        for (name, g0), z in zip(mean.items(), noise(), strict=True):
            estimate = torch.sign(slope_K[k]) * z.to(g0) / z.norm().clamp(min=1e-30).to(g0)
            towards[name] = (1 - beta) * g0 + beta * g0.norm() * estimate
        with perturbed_weights(parameters, _ascent(parameters, towards, rho, adaptive=False)):
            for name, value in gradient(k).items():
                perturbed_gradients[name][k] = value
    return combine(perturbed_gradients, mix(masked_gram(perturbed_gradients, present_K))), masked_gram(
        jacobian, present_K
    )


def masked_gram(jacobian: Mapping[str, Tensor], present_K: Tensor) -> Tensor:
    """[K, K] fp64, NaN in the rows and columns of absent tasks."""
    both = present_K[:, None] & present_K[None, :]
    return torch.where(both.cpu(), gram(jacobian).cpu(), torch.nan)


def _ascent(parameters: Mapping[str, Tensor], g: Mapping[str, Tensor], rho: float, adaptive: bool) -> Named:
    """The change of length rho along g (adaptive: measured in units of each weight); 0 where g is 0."""

    def in_weights(value: Tensor, name: str) -> Tensor:
        return parameters[name].detach().abs() * value if adaptive else value

    scaled = {name: in_weights(value, name) for name, value in g.items()}
    length = torch.stack([value.double().norm() for value in scaled.values()]).norm()
    if not length > 0:
        return {name: torch.zeros_like(value) for name, value in g.items()}
    return {name: (rho / length).to(value.dtype) * in_weights(value, name) for name, value in scaled.items()}
