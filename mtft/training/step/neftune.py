"""NEFTune: noise on the embeddings while training (Jain et al. 2023, arXiv 2310.05914).

    e_t + u_t * scale / sqrt(L * D),   u uniform in [-1, 1],   L = tokens of the example, D = width

L is the example's own length, and the noise of an example is a function of (seed, step, its tokens). So it does not
depend on what else is in the row, how the step is split, or how many ranks there are, and a resumed run draws the same
without a state. transformers' own (`neftune_noise_alpha`) takes L from the row: packed rows get less noise the fuller
they are. Evaluation draws none. Two equal examples in one step get equal noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mtft.common.fingerprint import blake2b
from mtft.data.batching.batch import Batch


class Neftune:
    """Hooked into the input embeddings of `model`; adds noise inside `on(batch)`, while the module is in training.

    `step` is set before each optimizer step.
    """

    def __init__(self, model: nn.Module, scale: float, seed: int) -> None:
        self.scale, self.seed, self.step = scale, seed, 0
        self._batch: Batch | None = None
        embeddings: Any = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
        embeddings.register_forward_hook(self._add)

    @contextmanager
    def on(self, batch: Batch) -> Iterator[None]:
        """Forward passes inside the block are of this batch."""
        self._batch = batch
        try:
            yield
        finally:
            self._batch = None

    def _add(self, module: nn.Module, _: Any, output_BTD: Tensor) -> Tensor | None:
        if self._batch is None or not module.training:
            return None
        return output_BTD + self.draw(self._batch, output_BTD.shape[-1]).to(output_BTD.dtype)

    def draw(self, batch: Batch, width: int) -> Tensor:
        """fp32 [B, T, D] on the batch's device; 0 on padding."""
        device = batch.input_ids_BT.device
        ids_BT, segment_BT = batch.host.input_ids_BT, batch.host.segment_ids_BT
        noise_BTD = torch.zeros(*ids_BT.shape, width, device=device)
        generator = torch.Generator(device=device)
        for row, segment_T in enumerate(segment_BT):
            for segment in range(int(segment_T.max()) + 1):
                place = torch.nonzero(segment_T == segment).flatten()
                first, length = int(place[0]), len(place)  # a segment is contiguous
                generator.manual_seed(self._key(ids_BT[row, first : first + length]))
                uniform_LD = torch.rand(length, width, generator=generator, device=device) * 2 - 1
                noise_BTD[row, first : first + length] = uniform_LD * (self.scale / math.sqrt(length * width))
        return noise_BTD

    def _key(self, ids_L: Tensor) -> int:
        text = f"{self.seed} {self.step} ".encode() + ids_L.numpy().tobytes()
        return int.from_bytes(blake2b(8, text).digest(), "little") >> 1
