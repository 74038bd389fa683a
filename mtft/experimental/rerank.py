"""Several answers, one choice: hedged samples, then minimum Bayes risk or a scorer.

    hedged sampling   1 greedy answer + N - 1 samples (When Life Gives You Samples, Khairi et al., 2506.20544, N = 5)
    MBR               argmax_y mean over y' != y of u(y, y'), u = chrF (Popovic 2015): the answer the others agree with
    scorer            argmax of a score of (instruction, answer): a one-label classifier in the manner of Cappy
                      (2311.06720), or for free how much more the expert likes the answer than its base does

Ties go to the greedy answer, then to the lower index. The paper's sampling temperatures are not known to us: 0.7 here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mtft.fuse.alpha.spec import FusionError
from mtft.fuse.decoding.prompts import left_pad
from mtft.fuse.decoding.score_text import token_logprobs
from mtft.models.loading import from_pretrained

if TYPE_CHECKING:
    from mtft.fuse.fused_model import FusedCausalLM

ORDER, BETA = 6, 2.0  # of chrF: character n-grams up to 6, recall counts twice


def hedged(
    fused: FusedCausalLM,
    prompt_ids: Sequence[int],
    *,
    answers: int = 5,
    temperature: float = 0.7,
    seed: int = 0,
    max_new_tokens: int = 64,
    **options: Any,
) -> list[list[int]]:
    """`answers` continuations of one prompt as token ids, without the prompt; the first is the greedy one."""
    if answers < 1 or temperature <= 0:
        raise FusionError(f"{answers} answers at temperature {temperature:g}", do="ask for at least 1, above 0")
    ids_BL, mask_BL = left_pad([prompt_ids], 0, fused.device)
    call = {"input_ids": ids_BL, "attention_mask": mask_BL, "max_new_tokens": max_new_tokens, **options}
    outputs = [fused.generate(**call, do_sample=False)]
    if answers > 1:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "num_return_sequences": answers - 1}
        outputs.append(fused.generate(**call, **sampling, seed=seed))
    return [_content(fused, row) for out_BL in outputs for row in out_BL[:, len(prompt_ids) :].tolist()]


def _content(fused: FusedCausalLM, tokens: list[int]) -> list[int]:
    """Up to the first end token, which is left out, and so is the padding behind it."""
    return tokens[: next((at for at, token in enumerate(tokens) if token in fused.end_ids), len(tokens))]


def chrf(answer: str, reference: str) -> float:
    """Character n-gram F score in [0, 1]; spaces don't count. Two empty texts are equal."""
    answer, reference = "".join(answer.split()), "".join(reference.split())
    if answer == reference:
        return 1.0
    scores = []
    for n in range(1, ORDER + 1):
        ours = Counter(answer[i : i + n] for i in range(len(answer) - n + 1))
        theirs = Counter(reference[i : i + n] for i in range(len(reference) - n + 1))
        if not ours and not theirs:
            continue  # both texts are shorter than n
        common = (ours & theirs).total()
        precision, recall = common / max(ours.total(), 1), common / max(theirs.total(), 1)
        scores.append((1 + BETA**2) * precision * recall / (BETA**2 * precision + recall) if common else 0.0)
    return sum(scores) / len(scores)


def minimum_bayes_risk(texts: Sequence[str]) -> tuple[int, np.ndarray]:
    """(index of the chosen text, expected utility of each [N]). A single text has utility 0."""
    if not texts:
        raise ValueError("no text to choose from")
    utility_N = np.array(
        [_mean([chrf(text, other) for j, other in enumerate(texts) if j != i]) for i, text in enumerate(texts)]
    )
    return int(utility_N.argmax()), utility_N  # argmax: the first of equals, and the greedy answer comes first


class Scorer(Protocol):
    """Scores of (instruction, answer) pairs, float [N]; higher is better."""

    def score(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray: ...


def best(scorer: Scorer, instruction: str, texts: Sequence[str]) -> tuple[int, np.ndarray]:
    """(index of the best text, scores [N]). FusionError if a score is not a number."""
    score_N = np.asarray(scorer.score([(instruction, text) for text in texts]), dtype=np.float64)
    if score_N.shape != (len(texts),) or not np.isfinite(score_N).all():
        raise FusionError(f"the scorer gave {score_N.tolist()} for {len(texts)} answers", do="check the scoring model")
    return int(score_N.argmax()), score_N


class ClassifierScorer:
    """Any one-label sequence classifier of transformers (a regressor in [0, 1], such as Cappy)."""

    def __init__(self, path: str | Path, *, device: str | torch.device = "cpu", batch_size: int = 16) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.tokenizer = from_pretrained(AutoTokenizer, path, what="scorer's tokenizer")
        self.model = from_pretrained(AutoModelForSequenceClassification, path, what="scorer").to(device).eval()
        if self.model.config.num_labels != 1:
            raise FusionError(
                f"the scorer has {self.model.config.num_labels} labels", where=str(path), do="give a model with one"
            )
        self.batch_size = batch_size

    @torch.no_grad()
    def score(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        scores: list[Tensor] = []
        for start in range(0, len(pairs), self.batch_size):
            instructions, answers = zip(*pairs[start : start + self.batch_size], strict=True)
            batch = self.tokenizer(
                list(instructions), list(answers), padding=True, truncation=True, return_tensors="pt"
            )
            scores.append(self.model(**batch.to(self.model.device)).logits[:, 0].float().cpu())
        return torch.cat(scores).numpy()


class ExpertScorer:
    """Mean over the answer's tokens of log Q_E - log Q: what the expert adds to its base. Costs one weak pass."""

    def __init__(self, fused: FusedCausalLM, expert: int = 0) -> None:
        if not 0 <= expert < fused.experts:
            raise FusionError(f"expert {expert} of {fused.experts}", do="count from 0")
        if fused.token_map is not None:
            raise FusionError("the expert has another tokenizer", do="score with minimum_bayes_risk, or a classifier")
        self.fused, self.expert = fused, expert

    @torch.no_grad()
    def score(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        return np.array([self._one(*pair) for pair in pairs])

    def _one(self, instruction: str, answer: str) -> float:
        tokenizer = self.fused.tokenizer
        prompt = tokenizer.encode(instruction)
        ids = prompt + tokenizer.encode(answer, add_special_tokens=False)
        count = len(ids) - len(prompt)
        if count == 0:
            return 0.0  # an empty answer: expert and base have nothing to differ on
        ids_1L = torch.tensor([ids], device=self.fused.device)
        models, columns, first = self.fused.cached_models(), self.fused.positions_at_once(), max(0, len(prompt) - 1)
        if first > 0:  # the prompt: its logits are never made
            models.read_weak(ids_1L[:, :first])
        gain = 0.0
        for start in range(first, len(ids) - 1, columns):
            stop = min(start + columns, len(ids) - 1)
            experts, base_1CM = models.read_weak(ids_1L[:, start:stop], keep=0)
            target_C = ids_1L[0, start + 1 : stop + 1]
            known_C = target_C < base_1CM.shape[-1]
            tuned_C, plain_C = (
                token_logprobs(x[0][known_C], target_C[known_C]) for x in (experts[self.expert], base_1CM)
            )
            gain += float((tuned_C - plain_C).sum())
        return gain / count


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
