"""Shares that epoch caps allow: refused with the ways out, or the excess redistributed (`on_cap`).

limit_K is what each task can give under its cap, `total` what the run draws, both in the same unit, which `unit_name`
says. With uniform shares "redistribute" is UniMax (Chung et al., ICLR 2023, arXiv 2304.09151).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from data_mixers.common.errors import MixError
from data_mixers.mixture.mixture import Floats

OnCap = Literal["error", "redistribute"]


def capped_shares(
    share_K: Floats, limit_K: Floats, total: float, *, on_cap: OnCap, names: Sequence[str], unit_name: str
) -> Floats:
    """Shares [K] with total * share <= limit.

    error: MixError that names tasks, asked and allowed. redistribute: capped tasks give their limit, the others are
    scaled up by a common factor, again until nothing is over.
    """
    over_K = share_K * total > limit_K * (1 + 1e-12)
    if not over_K.any():
        return share_K
    if on_cap == "error":
        raise _over_cap(over_K, share_K * total, limit_K, names, unit_name, "a lower share")
    if limit_K[share_K > 0].sum() < total * (1 - 1e-12):
        available = limit_K[share_K > 0].sum()
        raise MixError(
            f"all tasks together give {available:.0f} {unit_name} under max_epochs, the run asks for {total:.0f}",
            where="mixture.max_epochs",
            do="fewer steps, or a higher max_epochs",
        )
    out_K, capped_K = share_K.copy(), np.zeros(len(share_K), dtype=bool)
    while True:
        capped_K |= out_K * total > limit_K * (1 + 1e-12)
        free_K = ~capped_K & (share_K > 0)
        out_K = np.where(capped_K, limit_K / total, 0.0)
        if not free_K.any():
            return out_K
        out_K = np.where(free_K, share_K * (1 - out_K.sum()) / share_K[free_K].sum(), out_K)
        if not np.any(out_K[free_K] * total > limit_K[free_K] * (1 + 1e-12)):
            return out_K


def capped_over_time(
    share_SK: Floats, limit_K: Floats, total: float, *, on_cap: OnCap, names: Sequence[str], unit_name: str
) -> Floats:
    """Shares [S, K] whose amounts over the run (`total`, the same in each step) stay within limit_K.

    error: MixError. redistribute: a task over its limit is scaled down by one factor at all steps, what it gives up
    goes to the others in proportion to their shares of the same step, again until nothing is over.
    """

    def over(share_SK: Floats) -> NDArray[np.bool_]:
        return share_SK.mean(axis=0) * total > limit_K * (1 + 1e-12) + 1e-9

    if not over(share_SK).any():
        return share_SK
    if on_cap == "error":
        asked_K = share_SK.mean(axis=0) * total
        raise _over_cap(over(share_SK), asked_K, limit_K, names, unit_name, "lower shares")
    out_SK, capped_K = share_SK, np.zeros(len(limit_K), dtype=bool)
    while True:
        new_K = over(out_SK) & ~capped_K
        if not new_K.any():
            return out_SK
        capped_K |= new_K
        with np.errstate(divide="ignore", invalid="ignore"):
            factor_K = np.where(capped_K, limit_K / (share_SK.mean(axis=0) * total), 1.0)
        held_SK = np.where(capped_K, share_SK * factor_K, 0.0)
        free_SK = np.where(capped_K, 0.0, share_SK)
        room_S, left_S = free_SK.sum(axis=1), 1 - held_SK.sum(axis=1)
        stuck_S = (room_S <= 0) & (left_S > 1e-9)
        if stuck_S.any():
            capped = ", ".join(names[k] for k in np.flatnonzero(capped_K).tolist())
            raise MixError(
                f"at progress {np.argmax(stuck_S) / len(share_SK):.2f} only tasks at their epoch cap have a share "
                f"({capped}), so what they can't give can't go to others",
                where="mixture.max_epochs",
                do="fewer steps, a higher max_epochs, or a share for another task there",
            )
        scale_S = np.divide(left_S, room_S, out=np.zeros_like(room_S), where=room_S > 0)
        out_SK = held_SK + free_SK * scale_S[:, None]


def _over_cap(
    over_K: NDArray[np.bool_], asked_K: Floats, limit_K: Floats, names: Sequence[str], unit_name: str, lower: str
) -> MixError:
    asked = "; ".join(
        f"{names[k]}: {asked_K[k]:.0f} {unit_name} asked, {limit_K[k]:.0f} allowed"
        for k in np.flatnonzero(over_K).tolist()
    )
    return MixError(
        f"the mixture asks for more epochs than max_epochs allows ({asked})",
        where="mixture.max_epochs",
        do=f"fewer steps, {lower}, a higher max_epochs; or on_cap: redistribute",
    )
