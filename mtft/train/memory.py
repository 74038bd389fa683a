"""How much memory a GPU needs for a recipe, before any weight is loaded.

The model is made on torch's meta device, where tensors have shapes and no data:

    weights      bytes of every parameter as it is held (4-bit and 8-bit bases: their linears)
    training     trainable parameters x (gradient 4 + optimizer states) in fp32
    activations  what autograd keeps for the backward pass of one short row, counted, times micro_batch_tokens
    logits       supervised positions of a micro-batch x vocabulary x 4 bytes x 2 (values and gradient)

It is an estimate for one process that holds everything (DDP): kernels' work space, fragmentation and the CUDA context
(about 1 GiB) come on top; ZeRO holds less; attention is taken to keep nothing that grows with length squared.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtft.errors import UserError
from mtft.recipe.schema import ModelSection, Recipe

if TYPE_CHECKING:
    from torch import nn

STATE_BYTES = {"sgd": 0, "adafactor": 0, "lion_32bit": 4, "lion_8bit": 1, "paged_lion_8bit": 1}  # per trained parameter
ADAM_BYTES, ADAM_8BIT_BYTES = 8, 2
QUANTISED_BYTES = {"nf4": 0.516, "int8": 1.0}  # a linear's weight; nf4 with its doubly quantised scales is 4.127 bits
PROBE_TOKENS = 32


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on each GPU, and the parameters behind them. `activations` is None for a model that can't be counted."""

    parameters: int
    trainable: int
    weights: int
    training: int
    activations: int | None
    logits: int

    @property
    def total(self) -> int:
        """All that is known."""
        return self.weights + self.training + (self.activations or 0) + self.logits

    def as_dict(self) -> dict[str, int | None]:
        return {**asdict(self), "total": self.total}

    def text(self) -> str:
        share = f"{self.trainable:,} of {self.parameters:,} parameters are trained"
        sizes = {
            "weights": self.weights,
            "training": self.training,
            "activations": self.activations,
            "logits": self.logits,
        }
        parts = ", ".join(f"{name} {_size(size)}" for name, size in sizes.items())
        return f"memory on each GPU: about {_size(self.total)} ({parts}); {share}"


def _size(count: int | None) -> str:
    if count is None:
        return "unknown, not in the sum"
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 // 10 else f"{count / 2**20:.1f} MiB"


def estimate_memory(recipe: Recipe, *, learnt_share: float = 1.0) -> MemoryEstimate:
    """Estimate for `mtft train` of a recipe. `learnt_share`: supervised tokens / tokens, as the plan plays them.

    Raises UserError when the model's config can't be read, or `lora.targets` fits no module.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from mtft.train.model import add_lora, compute_dtype

    section, train = recipe.model, recipe.train
    dtype = compute_dtype(section)
    held = torch.float32 if recipe.lora is None else dtype
    with torch.device("meta"):
        trusted = section.trust_remote_code
        model: Any = AutoModelForCausalLM.from_config(read_config(section), trust_remote_code=trusted)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        weights = sum(_held_bytes(model, section.quantise, held.itemsize).values())
        if recipe.lora is not None:
            lora = recipe.lora.model_copy(update={"init": "default"})  # the others need data; the sizes are equal
            model = add_lora(model, lora, seed=recipe.seed)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if recipe.lora is not None:
        weights += 4 * trainable  # the adapter is held in fp32
        parameters += trainable
    per_token = kept_per_token(model.to(dtype), checkpointing=train.gradient_checkpointing)
    rows = train.micro_batch_tokens * learnt_share
    return MemoryEstimate(
        parameters=parameters,
        trainable=trainable,
        weights=round(weights),
        training=trainable * (4 + _state_bytes(train.optimizer)),
        activations=None if per_token is None else round(per_token * train.micro_batch_tokens),
        logits=round(rows * model.config.vocab_size * 4 * 2),
    )


def read_config(section: ModelSection) -> Any:
    """The config of a recipe's model. UserError when it can't be read or transformers does not know the model."""
    from transformers import AutoConfig

    from mtft.train.model import model_location

    location = model_location(section)
    options: dict[str, Any] = {"trust_remote_code": section.trust_remote_code}
    if not Path(location).is_dir():
        options["revision"] = section.revision
    try:
        return AutoConfig.from_pretrained(location, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"the model's config can't be used: {reason}",
            where=f"model.path: {section.path}",
            do="check the name, and that this version of transformers knows the model",
        ) from error


def _state_bytes(optimizer: str) -> int:
    return STATE_BYTES.get(optimizer, ADAM_8BIT_BYTES if "8bit" in optimizer else ADAM_BYTES)


def _held_bytes(model: nn.Module, quantise: str, width: int) -> dict[str, float]:
    """Bytes of each parameter: quantisation takes the weights of all linears but the head."""
    from torch import nn

    head = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    small = {id(part.weight) for part in model.modules() if isinstance(part, nn.Linear) and part is not head}
    return {
        name: parameter.numel() * (QUANTISED_BYTES.get(quantise, width) if id(parameter) in small else width)
        for name, parameter in model.named_parameters()
    }


def kept_per_token(model: nn.Module, *, checkpointing: bool = False) -> float | None:
    """Bytes a token that autograd keeps between the forward and the backward pass, without the head.

    Counted over distinct storages that are no parameters. With checkpointing: each layer's input, and one layer whole.
    None for models whose code looks at values on the way (some rotary positions, some routers): shapes have none.
    """
    import torch
    from peft import PeftModel

    body: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    device = next(model.parameters()).device
    # Distinct storages by identity: meta tensors have no address. They are kept alive, so no identity comes twice.
    held = [parameter.untyped_storage() for parameter in model.parameters()]
    parameters = {id(storage) for storage in held}
    kept: dict[int, Any] = {}

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if id(storage) not in parameters:
            kept[id(storage)] = storage
        return tensor

    ids = torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device=device)
    # A ready-made mask: transformers looks at the values of positions and of a flat mask, and meta tensors have none.
    mask = torch.ones(1, 1, PROBE_TOKENS, PROBE_TOKENS, dtype=torch.bool, device=device)
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            inputs = body.get_input_embeddings()(ids).requires_grad_()
            output = body.base_model(inputs_embeds=inputs, attention_mask=mask, use_cache=False)
    except (RuntimeError, NotImplementedError):
        if device.type != "meta":
            raise
        return None
    del output
    per_token = sum(storage.nbytes() for storage in kept.values()) / PROBE_TOKENS
    if checkpointing:
        layers = body.config.num_hidden_layers
        width = body.config.hidden_size * next(model.parameters()).dtype.itemsize
        per_token = layers * width + per_token / layers
    return per_token
