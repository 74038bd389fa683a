"""Do the strong and the small model speak the same tokens? Verified id by id, never assumed from names.

| level  | accepts when |
|---|---|
| strict | every id has the same token string, bos/eos/pad are equal, and a built-in probe text is encoded alike |
| prefix | equal on a common prefix of ids, which holds all of the probe's ids; extras (added tokens) only at the end |
| map    | enough of the strong tokens of the probe have a small token with the same text (token_map.py)         |

Ids without a counterpart are not shifted: log Q_t - log Q = 0 there.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from mtft.fuse.alpha.spec import TOKENS, FusionError, choose
from mtft.fuse.tokenizers.probe_text import probe_lines
from mtft.fuse.tokenizers.token_map import TokenMap, token_strings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPECIAL = ("bos", "eos", "pad")
ENOUGH = 0.5  # share of the probe's strong tokens that must have a counterpart for `map`; a guess, no study gives one


@dataclass(frozen=True)
class VocabularyMatch:
    """How far two tokenizers agree.

    strong, small   number of ids (real tokens, not the padded width of the logits)
    common          length of the common prefix: ids 0 ... common-1 have the same token string
    mapped          ids of the strong tokenizer whose text the small one has under any id
    lines, same     lines of the probe, and how many of them are encoded to the same ids
    covered         share of the strong tokenizer's probe tokens whose text the small one has
    boundaries      share of the strong tokenizer's token boundaries on the probe that the small one has too
    unmapped        up to 20 token strings that the small one lacks
    special         differences of bos, eos, pad: "eos: '</s>' (2) | '<end>' (7)"
    """

    strong: int
    small: int
    common: int
    mapped: int
    lines: int
    same: int
    covered: float
    boundaries: float
    unmapped: tuple[str, ...]
    special: tuple[str, ...]

    @property
    def accepted_by(self) -> str | None:
        """The strictest level that accepts, or None."""
        if self.same == self.lines and not self.special and self.common:
            return "strict" if self.common == self.strong == self.small else "prefix"
        return "map" if self.covered >= ENOUGH else None

    def __str__(self) -> str:
        lines = [
            f"ids: {self.mapped} of {self.strong} have their text in the small tokenizer ({self.small} ids); "
            f"the first {self.common} ids are equal",
            f"probe: {self.same} of {self.lines} lines are encoded alike; {self.covered:.1%} of the tokens "
            f"are covered, {self.boundaries:.1%} of the boundaries agree",
        ]
        if self.special:
            lines.append("special tokens (strong | small): " + "; ".join(self.special))
        if self.unmapped:
            lines.append("missing in the small one: " + " ".join(repr(token) for token in self.unmapped))
        lines.append(f"level that accepts: {self.accepted_by or 'none'}")
        return "\n         ".join(lines)


def compare_vocabularies(
    strong: PreTrainedTokenizerBase, small: PreTrainedTokenizerBase, token_map: TokenMap | None = None
) -> VocabularyMatch:
    """Compare two tokenizers on all ids and on the probe. token_map: theirs, if there is one already."""
    token_map = TokenMap(strong, small) if token_map is None else token_map
    strong_tokens, small_tokens = token_strings(strong), token_strings(small)
    common = 0
    for left, right in zip(strong_tokens, small_tokens, strict=False):
        if left is None or left != right:
            break
        common += 1
    known = (token_map.small_id_V >= 0).tolist()
    missing = [
        token for token, is_known in zip(strong_tokens, known, strict=True) if token is not None and not is_known
    ]
    same = count = covered = boundaries = shared = 0
    lines = probe_lines()
    strong_sizes, small_sizes = (
        [len(text or b"") for text in side] for side in (token_map.strong_bytes, token_map.small_bytes)
    )
    for line in lines:
        left = strong.encode(line, add_special_tokens=False)
        right = small.encode(line, add_special_tokens=False)
        same += left == right and strong.encode(line) == small.encode(line)
        count += len(left)
        covered += sum(known[i] for i in left)
        strong_ends = {*accumulate(strong_sizes[i] for i in left)}
        boundaries += len(strong_ends)
        shared += len(strong_ends & {*accumulate(small_sizes[i] for i in right)})
    return VocabularyMatch(
        strong=len(strong_tokens),
        small=len(small_tokens),
        common=common,
        mapped=sum(known),
        lines=len(lines),
        same=same,
        covered=covered / max(count, 1),
        boundaries=shared / max(boundaries, 1),
        unmapped=tuple(missing[:20]),
        special=_special(strong, small),
    )


def match_vocabularies(
    strong: PreTrainedTokenizerBase, small: PreTrainedTokenizerBase, level: str = "strict"
) -> tuple[int, int, TokenMap | None]:
    """(V, M, token map): ids of the strong model; how many of the first ids the small models share, or, with a map
    between different tokenizers, how many they have. FusionError if refused.
    """
    choose(level, TOKENS, "tokens")
    match = compare_vocabularies(strong, small)
    if needs_map(match, level):
        return match.strong, match.small, TokenMap(strong, small)
    return match.strong, match.common, None


def needs_map(match: VocabularyMatch, level: str) -> bool:
    """Whether the tokenizers go together through a token map, or directly. FusionError where `level` refuses."""
    accepted = match.accepted_by
    if accepted == "strict" or (accepted == "prefix" and level != "strict"):
        return False
    if accepted == "map" and level == "map":
        return True
    raise FusionError(
        f"the strong and the small tokenizer differ (tokens: {level})\n         {match}",
        do=f"set tokens: {accepted}" if accepted else "take a small model of the strong model's family",
    )


def _special(strong: PreTrainedTokenizerBase, small: PreTrainedTokenizerBase) -> tuple[str, ...]:
    sides = [
        [(getattr(tokenizer, f"{name}_token"), getattr(tokenizer, f"{name}_token_id")) for name in SPECIAL]
        for tokenizer in (strong, small)
    ]
    pairs = zip(SPECIAL, *sides, strict=True)
    return tuple(f"{name}: {a!r} ({i}) | {b!r} ({j})" for name, (a, i), (b, j) in pairs if (a, i) != (b, j))
