"""Models in 8 or 4 bits for inference on a CPU: while they are loaded, or in one call on a model that is there.

Registered with transformers, so that `from_pretrained(folder, quantization_config=FewBitsConfig(...))` and folders that
were saved in few bits work, with this library and with the code that travels with a folder.
"""

from types import SimpleNamespace
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from scrubjay.kernels.bits import check_bits
from scrubjay.modeling.bits_layers import SMALLEST, FewBits, FewBitsEmbedding, FewBitsLinear, TiedHead
from scrubjay.modeling.training.adapters import adapts

METHOD = "scrubjay_few_bits"


class FewBitsConfig(QuantizationConfigMixin):
    """Weights of 8 or 4 bits, for inference on a CPU.

    Args:
        bits: 8, a scale for each row; or 4, a factor of 8 bits for `group_size` inputs beside it.
        group_size: 32, 64, 128 or 256. Smaller groups have smaller errors; 32 takes 4.25 bits a weight, 128 4.06.
        embedding_bits: of the embedding and the head, 8 or 4; None: `bits`.
        modules_to_not_convert: names, or their ends, of layers that stay as they are; of an embedding and a head that
            are one matrix, either name keeps both.

    Raises:
        ValueError: another width or size.
    """

    def __init__(
        self,
        bits: int = 4,
        group_size: int = 32,
        embedding_bits: int | None = None,
        modules_to_not_convert: list[str] | None = None,
        **kwargs,
    ):
        for width in (bits, bits if embedding_bits is None else embedding_bits):
            check_bits(width, group_size)
        unknown = sorted(set(kwargs) - {"quant_method"})
        if unknown:
            raise ValueError(f"FewBitsConfig has no {', '.join(unknown)}: see its docstring for what there is.")
        self.quant_method: Any = METHOD
        self.bits, self.group_size, self.embedding_bits = bits, group_size, embedding_bits
        self.modules_to_not_convert = modules_to_not_convert

    def width(self, is_vocabulary: bool) -> int:
        """Bits of a matrix; `is_vocabulary`: of the embedding and of the head."""
        return self.embedding_bits if is_vocabulary and self.embedding_bits is not None else self.bits


class FewBitsQuantizer(HfQuantizer):
    """What transformers calls while it loads."""

    is_trainable = False

    def is_serializable(self, *args, **kwargs) -> bool:
        """Folders hold the codes."""
        return True

    def _process_model_before_weight_loading(self, model, **kwargs):
        if self.pre_quantized:
            _of(model).replace(model, self.quantization_config, empty=True)
        return model

    def _process_model_after_weight_loading(self, model, **kwargs):
        if not self.pre_quantized:
            _of(model).replace(model, self.quantization_config)
            self.pre_quantized = True
        _of(model).settle(model)
        return model


AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = FewBitsConfig
AUTO_QUANTIZER_MAPPING[METHOD] = FewBitsQuantizer


def quantize(
    model: PreTrainedModel,
    bits: int = 4,
    group_size: int = 32,
    embedding_bits: int | None = None,
    modules_to_not_convert: list[str] | None = None,
) -> PreTrainedModel:
    """Put the weights of a model into few bits, in place, for inference on a CPU. See `FewBitsConfig`.

    Every projection, the embedding and the language model's head; not norms, convolutions, biases, decays and gates'
    own parameters, a classifier's scores, ADORE's controller, and matrices with a side below 32 (gates of low rank).

    Returns: the model, in eval mode, its parameters frozen.

    Raises:
        ValueError: a model that is quantized already, has adapters, or has nothing to quantize; see `FewBitsConfig`.
    """
    settings = FewBitsConfig(bits, group_size, embedding_bits, modules_to_not_convert)
    if getattr(model, "hf_quantizer", None) is not None:
        method = model.hf_quantizer.quantization_config.quant_method
        raise ValueError(f"The model is quantized already, by {method}. Load it from weights that are not.")
    quantizer = FewBitsQuantizer(settings, pre_quantized=False)
    quantizer.preprocess_model(model)
    model.eval()
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)
    return model


def _replace(model, settings, empty=False):
    """Few bits in the place of each matrix that has them; `empty`: that will have been loaded."""
    if any(adapts(module) for module in model.modules()):
        raise ValueError("The model has adapters, which few bits would leave without their layers: merge them first.")
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and head.weight is embedding.weight
    tied = tied or (head is not None and empty and bool(model.config.tie_word_embeddings))
    if head is not None and not empty:
        model.config.tie_word_embeddings = tied  # by which a folder says whether one set of codes serves both
    names = {id(module): name for name, module in model.named_modules()}
    kept = tuple(settings.modules_to_not_convert or ())
    if tied and any(_ends(names[id(module)], kept) for module in (head, embedding)):
        kept += (names[id(head)], names[id(embedding)])  # they are one matrix
    own = _heads_of_others(model, head)
    count = 0
    for name, module in list(model.named_modules()):
        vocabulary = module is head or module is embedding
        if type(module) not in (nn.Linear, nn.Embedding) or module in own or not (vocabulary or _is_large(module)):
            continue
        if type(module) is nn.Embedding and module is not embedding:
            continue
        if _ends(name, kept) or (module is head and tied):
            continue
        kind = FewBitsLinear if type(module) is nn.Linear else FewBitsEmbedding
        model.set_submodule(name, kind(module, settings.width(vocabulary), settings.group_size, empty))
        count += 1
    if tied and isinstance(model.get_input_embeddings(), FewBitsEmbedding):
        model.set_submodule(names[id(head)], TiedHead(model.get_input_embeddings(), head.bias))
        _untie(model)
    if not count:
        raise ValueError(
            f"{type(model).__name__} has no matrix to quantize: each is named in modules_to_not_convert, or has a side "
            f"below {SMALLEST}."
        )


def _ends(name, ends):
    """Whether a module's name is one of `ends`, or ends in one."""
    return any(name == end or name.endswith(f".{end}") for end in ends)


def _heads_of_others(model, head):
    """Layers on top of the model that are no head of a language model."""
    if model.base_model is model:
        return set()
    tops = [child for name, child in model.named_children() if name != model.base_model_prefix and child is not head]
    return {part for top in tops for part in top.modules()}


def _is_large(layer):
    return min(layer.weight.shape) >= SMALLEST


def _untie(model):
    """Have transformers look for no weight that embedding and head share: they share codes."""
    for part in (model, model.base_model):
        part.all_tied_weights_keys = {}
        part._tied_weights_keys = {}


def _of(model):
    """The copy of this file that came with the model's code: transformers knows one quantizer of a name, the last."""
    return getattr(model, "few_bits", FEW_BITS)


def _settle(model):
    """Freeze, and make what products take."""
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, FewBits) and (not isinstance(module, FewBitsEmbedding) or _is_tied(model, module)):
            module.pack()


def _is_tied(model, embedding):
    return isinstance(model.get_output_embeddings(), TiedHead) and model.get_output_embeddings().embedding is embedding


FEW_BITS = SimpleNamespace(replace=_replace, settle=_settle)
