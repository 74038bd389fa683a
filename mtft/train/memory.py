"""How much memory a GPU needs for a recipe, before any weight is loaded.

The model is made on torch's meta device, where tensors have shapes and no data:

    weights      bytes of every parameter as it is held (4-bit and 8-bit bases: their linears)
    training     trainable parameters x (gradient 4 + optimizer states) in fp32
    activations  what autograd keeps for the backward pass of one short row, counted, times micro_batch_tokens
    logits       supervised positions of a micro-batch x vocabulary x 4 bytes x 2 (values and gradient)

It is an estimate for one process that holds everything (DDP): kernels' work space, fragmentation and the CUDA context
(about 1 GiB) come on top, ZeRO and FSDP hold less, and attention is taken to keep nothing that grows with length squared.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mtft.recipe.schema import Recipe

if TYPE_CHECKING:
    from torch import nn

STATE_BYTES = {"sgd": 0, "adafactor": 0, "lion_32bit": 4, "lion_8bit": 1, "paged_lion_8bit": 1}  # per trained parameter
ADAM_BYTES, ADAM_8BIT_BYTES = 8, 2
QUANTISED_BYTES = {"nf4": 0.516, "int8": 1.0}  # a linear's weight; nf4 with its doubly quantised scales is 4.127 bits
PROBE_TOKENS = 32


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on each GPU, and the parameters behind them."""

    parameters: int
    trainable: int
    weights: int
    training: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return self.weights + self.training + self.activations + self.logits

    def as_dict(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}

    def text(self) -> str:
        share = f"{self.trainable:,} of {self.parameters:,} parameters are trained"
        parts = ", ".join(f"{name} {_size(getattr(self, name))}" for name in ("weights", "training", "activations", "logits"))
        return f"memory on each GPU: about {_size(self.total)} ({parts}); {share}"


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 // 10 else f"{count / 2**20:.1f} MiB"


def estimate_memory(recipe: Recipe, *, learnt_share: float = 1.0) -> MemoryEstimate:
    """Estimate for `mtft train` of a recipe. `learnt_share`: supervised tokens / tokens, as the plan plays them.

    Raises UserError when the model's config can't be read, or `lora.targets` fits no module.
    """
    import torch

    from mtft.train.model import add_lora, compute_dtype, load_config

    section, train = recipe.model, recipe.train
    dtype = compute_dtype(section)
    held = torch.float32 if recipe.lora is None else dtype
    with torch.device("meta"):
        model: Any = load_config(section)
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
        activations=round(per_token * train.micro_batch_tokens),
        logits=round(rows * model.config.vocab_size * 4 * 2),
    )


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


def kept_per_token(model: nn.Module, *, checkpointing: bool = False) -> float:
    """Bytes a token that autograd keeps between the forward and the backward pass, without the head.

    Counted over distinct storages that are no parameters. With checkpointing: each layer's input, and one layer whole.
    """
    import torch

    body = model.get_base_model() if hasattr(model, "peft_config") else model
    device = next(model.parameters()).device
    parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = storage
        return tensor

    ids = torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device=device)
    positions = torch.arange(PROBE_TOKENS, device=device)[None]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        inputs = body.get_input_embeddings()(ids).requires_grad_()
        output = body.base_model(inputs_embeds=inputs, position_ids=positions, use_cache=False)
    del output
    per_token = sum(storage.nbytes() for storage in kept.values()) / PROBE_TOKENS
    if checkpointing:
        layers = model.config.num_hidden_layers
        width = model.config.hidden_size * next(model.parameters()).dtype.itemsize
        per_token = layers * width + per_token / layers
    return per_token
