"""Decoders that carry ADORE (adaptive token release, arXiv:2407.02328): Llama, Qwen2, Qwen3 or Mistral, whose own
checkpoints load as they are, with a controller inside and an `AdoreCache` that generate() and forward make.

No code and few details of the method are published. Departures and choices: scores follow the current token (under the
published formula they are fixed, and rebuilding gains nothing); the controller is small; see `AdoreConfig` for each.
The language-model loss does not train the controller, so its parameters ask for no gradient; see
examples/train_adore_controller.py.
"""

from transformers.generation import GenerationMixin

from scrubjay.configuration.configuration_adore import AdoreConfig
from scrubjay.modeling.caches.cache_adore import AdoreCache
from scrubjay.modeling.decoder.controller import Controller, ControllerEmbedding, ControllerGRU, ControllerLinear, start
from scrubjay.modeling.heads import ZooForSequenceClassification, ZooForTokenClassification
from scrubjay.modeling.training.adapters import in_use
from scrubjay.modeling.wrapped import ZooWrapperForCausalLM, ZooWrapperModel, ZooWrapperPreTrainedModel


class AdorePreTrainedModel(ZooWrapperPreTrainedModel):
    """What all models below share: a controller that no loss of theirs trains."""

    config_class = AdoreConfig
    cache_class = AdoreCache
    _keep_in_fp32_modules_strict = ["controller"]  # a GRU sums over the whole text

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in transformers, whose loading makes every parameter ask for a gradient."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info
        model.base_model.controller.requires_grad_(False)
        return loaded

    def _init_weights(self, module):
        if isinstance(module, (ControllerLinear, ControllerGRU, ControllerEmbedding)):
            start(module)
        else:
            super()._init_weights(module)


class AdoreModel(AdorePreTrainedModel, ZooWrapperModel):
    """The decoder without a head, and the controller."""

    def __init__(self, config):
        super().__init__(config)
        self.controller = Controller(
            config.hidden_size,
            config.controller_hidden,
            config.score_mode,
            config.controller_pos,
            config.controller_mlp_layers,
            config.base_config.name_or_path,
            config.num_labelled,
        ).requires_grad_(False)
        self.post_init()

    def set_controller(self, controller: Controller) -> None:
        """Take the weights of a controller that was trained apart.

        Raises:
            ValueError: a controller of other sizes or another score mode than the configuration's.
        """
        made = ("embedding_size", "hidden", "score_mode", "pos", "mlp_layers")
        held = in_use(self.controller)
        got, needed = ({name: c.sizes[name] for name in made} for c in (controller, held))
        if got != needed:
            raise ValueError(f"The configuration asks for a controller of {needed}; got one of {got}.")
        held.load_state_dict(controller.state_dict())
        held.sizes = dict(controller.sizes)


class WithController:
    """What all heads share: the controller of the model without head, by a short name."""

    model_class = AdoreModel
    model: AdoreModel

    @property
    def controller(self) -> Controller:
        """That of the model without head; with an adapter that has a copy of it (modules_to_save), the copy."""
        return in_use(self.model.controller)

    def set_controller(self, controller: Controller) -> None:
        """See `AdoreModel.set_controller`."""
        self.model.set_controller(controller)


class AdoreForCausalLM(AdorePreTrainedModel, WithController, ZooWrapperForCausalLM, GenerationMixin):
    """The decoder, its head, and the controller."""


class AdoreForSequenceClassification(AdorePreTrainedModel, WithController, ZooForSequenceClassification):
    """The decoder with scores of a text, and the controller."""


class AdoreForTokenClassification(AdorePreTrainedModel, WithController, ZooForTokenClassification):
    """The decoder with scores of each token, and the controller."""


__all__ = [
    "AdoreForCausalLM",
    "AdoreForSequenceClassification",
    "AdoreForTokenClassification",
    "AdoreModel",
    "AdorePreTrainedModel",
]
