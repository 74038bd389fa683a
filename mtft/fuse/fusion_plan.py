"""What can be known of a fusion before any weight is read: its tokenizers, its configs, and whether they go together.

Weights take minutes; a pair of models that can't be fused, an adapter of another base or a broken request is refused
here, in seconds.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import DynamicCache

from mtft.adapters.base_identity import BaseIdentity, fingerprint, recorded_base
from mtft.common.own_files import read_own
from mtft.fuse.alpha.spec import TOKENS, FusionError, FusionSpec, choose
from mtft.fuse.tokenizers.token_map import TokenMap
from mtft.fuse.tokenizers.vocabulary_match import VocabularyMatch, compare_vocabularies, needs_map
from mtft.models.loading import expand_quickstart, load_tokenizer, model_location, read_config
from mtft.recipe.schema.model import ModelSection

NO_ROUTER, MERGE_FIRST = "weights is 'router', and there is no router", "give the router.safetensors of an `mtft merge`"
ROLLED_BACK = "tokens: map rolls back what the small models have read"


@dataclass(frozen=True)
class FusionPlan:
    """Models that go together, as far as tokenizers and configs tell.

    vocab_size: ids of the strong tokenizer; shared: how many of the first ids the small models know, or with a token
    map how many they have; context: positions that all models can read.
    """

    tokenizer: Any
    small_tokenizer: Any
    vocab_size: int
    shared: int
    token_map: TokenMap | None
    match: VocabularyMatch
    spec: FusionSpec
    experts: int
    context: int

    def coverage(self) -> str | None:
        """What a token map covers, for people; None without one."""
        if self.token_map is None:
            return None
        ends = [
            "nothing" if index is None else repr(tokenizer.convert_ids_to_tokens(index))
            for tokenizer, index in zip(
                (self.tokenizer, self.small_tokenizer), self.token_map.ends_of_turn, strict=True
            )
        ]
        return (
            f"tokens: map steers {self.match.mapped} of {self.match.strong} ids, which cover {self.match.covered:.1%} "
            f"of a probe text ({self.match.boundaries:.1%} of its token boundaries agree); the end of a turn is "
            f"{ends[0]} for the strong model and {ends[1]} for the small one"
        )


def plan_fusion(
    strong: str | Path,
    base: str | Path,
    adapters: Sequence[str | Path] | None,
    spec: FusionSpec,
    *,
    tokens: str | None = None,
    routed: bool = False,
    allow_base_mismatch: bool = False,
    revision: str = "main",
    base_revision: str = "main",
    template: str | None = None,
    base_template: str | None = None,
) -> FusionPlan:
    """Tokenizers and configs of a fusion, checked. Raises FusionError (or UserError) for what can't work.

    adapters: None if they are not trained yet: then the models alone are looked at. template, base_template: files with
    chat templates in place of the tokenizers' own; the one that the adapters were trained with goes before the latter.
    """
    if adapters is not None:
        check_experts(adapters)
        spec.check_experts(len(adapters))
    adapters = adapters or ()
    if not routed and spec.weights == "router":
        raise FusionError(NO_ROUTER, do=MERGE_FIRST)
    for adapter in map(Path, adapters):
        if (adapter / "adapter_config.json").is_file():
            check_adapter(adapter, base, allow_base_mismatch)
    tokenizer = load_tokenizer(ModelSection(path=str(strong), revision=revision, chat_template=template))
    small = load_tokenizer(ModelSection(path=str(base), revision=base_revision, chat_template=base_template))
    if (own_template := _adapters_template(adapters)) is not None:
        small.chat_template = own_template
    level, bridge = choose(tokens or spec.tokens, TOKENS, "tokens"), TokenMap(tokenizer, small)
    match = compare_vocabularies(tokenizer, small, bridge)
    token_map = bridge if needs_map(match, level) else None
    shared = match.common if token_map is None else match.small
    if routed and token_map is not None:
        raise FusionError("a router reads the small model's own tokens", do="use weights: active with tokens: map")
    whole = [expert for expert in adapters if not (Path(expert) / "adapter_config.json").is_file()]
    strong_config = _config(strong, revision)
    smalls = {str(base): _config(base, base_revision)} | {str(expert): _config(expert, "main") for expert in whole}
    for path, config, needed in ((strong, strong_config, match.strong), *((*x, shared) for x in smalls.items())):
        check_width(str(path), config.get_text_config().vocab_size, needed)
    if token_map is not None:
        for path, config in smalls.items():
            check_rolled_back(path, config)
    contexts = [config.get_text_config().max_position_embeddings for config in (strong_config, *smalls.values())]
    if token_map is None and small.chat_template == tokenizer.chat_template:
        small = tokenizer  # the same text in the same tokens: rendered once
    return FusionPlan(
        tokenizer, small, match.strong, shared, token_map, match, spec, len(adapters), context=min(contexts)
    )


def check_experts(experts: Sequence[str | Path]) -> None:
    """Are the folders there?"""
    if not experts:
        raise FusionError("no expert", do="give at least one adapter")
    for expert in map(Path, experts):
        if not any((expert / name).is_file() for name in ("adapter_config.json", "config.json")):
            raise FusionError(
                f"no adapter at {str(expert)!r}", do="give a PEFT folder (adapter_config.json) or a model"
            )


def check_adapter(expert: Path, base: str | Path, allow_base_mismatch: bool) -> None:
    """Is it a LoRA of this base? Folders may have moved, so the weights decide; where the adapter does not remember
    them, the last part of the base's name.
    """
    config = read_own(expert / "adapter_config.json", do="save the adapter again, or copy it whole")
    if config.get("peft_type") != "LORA":
        raise FusionError(
            f"peft_type is {config.get('peft_type')!r}: only LoRA adapters are experts",
            where=str(expert),
            do="merge it into a copy of the base, and give that model's folder",
        )
    if config.get("alora_invocation_tokens"):
        raise FusionError("an activated LoRA (aLoRA) is not always on", where=str(expert), do="train an ordinary LoRA")
    check_safetensors(expert)
    trained_on = config.get("base_model_name_or_path")
    if allow_base_mismatch or not trained_on:
        return
    recorded, folder = recorded_base(expert), Path(model_location(base))
    here = BaseIdentity(str(base), None, fingerprint(folder) if folder.is_dir() else None)
    if recorded is not None and (other := recorded.differs(here)) is not None:
        if not other:
            return
        raise FusionError(
            f"the adapter was trained on {recorded.model!r}, and {str(base)!r} holds other weights",
            where=str(expert),
            do="give the base that it was trained on (or allow_base_mismatch=True)",
        )
    if Path(expand_quickstart(trained_on)).name != Path(expand_quickstart(base)).name:
        raise FusionError(
            f"the adapter was trained on {trained_on!r}, the base is {str(base)!r}",
            where=str(expert),
            do="give the base that it was trained on (or allow_base_mismatch=True if it was only renamed)",
        )


def check_safetensors(expert: Path) -> None:
    if not any(expert.glob("adapter_model*.safetensors")):
        raise FusionError("no adapter_model.safetensors", where=str(expert), do="save it with safe_serialization=True")


def check_width(name: str, width: int, needed: int) -> None:
    """Has the model a logit for every id that it must know?"""
    if width < needed:
        raise FusionError(f"{name} has {width} logits for {needed} ids", do="check the tokenizers")


def check_rolled_back(name: str, config: Any) -> None:
    """With a token map the small models read a text's end again and again; the strong one is never rolled back."""
    cache = DynamicCache(config=config)
    if not cache.is_croppable or any(cache.is_sliding) or any(cache.is_linear):
        raise FusionError(
            f"{ROLLED_BACK}, which the cache of {name} ({config.get_text_config().model_type}) can't: it keeps a "
            "sliding window or a running state only",
            do="take a small model with full attention; the strong one may be of any kind",
        )


def _config(path: str | Path, revision: str) -> Any:
    return read_config(ModelSection(path=str(path), revision=revision))


def _adapters_template(adapters: Sequence[str | Path]) -> str | None:
    """The chat template that was saved beside the experts, if all have the same one: what they were trained with."""
    files = [Path(adapter) / "chat_template.jinja" for adapter in adapters]
    found = {file.read_text("utf-8") for file in files if file.is_file()}
    if len(found) > 1:
        warnings.warn(
            "the experts were trained with different chat templates; all read the base's, because they read one prompt",
            stacklevel=3,
        )
    return found.pop() if len(found) == 1 else None
