"""`models.evolve` for the vision encoders of Hugging Face's transformers, in place and without training.

    model = evolve(Dinov2Model.from_pretrained('facebook/dinov2-small'))

Three kinds of modules become subclasses of their classes, with the same names, parameters and arguments: the module
that loops over the layers, the layers, and their attentions. Embeddings, norms, poolers and heads stay as they are.
Inside a stage, a layer is called as a module on the prefix tokens and the informative patches. With 'nearest', its
attention mask is the log of the cluster sizes. The loop over the groups of layers is in evolving.py.

Shapes: B batch, P prefix tokens, N patches, n of them in a sequence, C channels, H heads, D channels of a head.
"""

import sys
from functools import cache, partial

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import _active_collector, capture_outputs

from . import evolution
from .evolving import Evolving, default_stages, find_replaced_forward, warn_if_rising
from .vit import rope_at

# The implementations of attention that support an additive mask (B, 1, 1, P + n).
TAKE_MASKS = 'sdpa', 'eager'
# Why encoders cannot be evolved exactly, by the beginning of their class names.
REASONS = {
    'Qwen2_5_Vision': 'attends in windows',
    'Qwen': 'packs images of any size into one sequence',
    'Pixtral': 'packs images of any size into one sequence',
    'Siglip2': 'masks the padding of images of several sizes (NaFlex)',
    'Swin': 'attends in windows',
    'Beit': 'adds relative position biases to its attention',
    'Data2VecVision': 'adds relative position biases to its attention',
}


# --- classes


class Evolved:
    """What the evolved subclasses share. Each keeps the name of its class, which transformers looks things up by."""

    def __reduce__(self):  # copying and pickling would look the class up by that name, and find the original
        return empty_instance, self.made_of, self.__getstate__()


@cache
def evolved_class(mixin: type, cls: type) -> type:
    """The subclass of `cls`, a class of transformers, with the methods of `mixin`, a subclass of `Evolved`."""
    names = dict(__module__=cls.__module__, __qualname__=cls.__qualname__)
    return type(cls.__name__, (mixin, cls), names | dict(made_of=(mixin, cls), source=sys.modules[cls.__module__]))


def empty_instance(mixin: type, cls: type) -> nn.Module:
    """An instance of an evolved class without its state."""
    evolved = evolved_class(mixin, cls)
    return evolved.__new__(evolved)


class EvolvedAttention(Evolved):
    """An attention that can also compute the class token's attention."""

    def forward(self, hidden_states, attention_mask=None, attended: list | None = None, **kwargs):
        """As in transformers. If `attended` is a list, the class token's attention to the patches, (B, n), is appended
        to it, summed over heads; without a class token, that of the mean query.
        """
        if attended is None:
            return super().forward(hidden_states, attention_mask=attention_mask, **kwargs)
        layers = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (layer(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for layer in layers)
        if 'position_embeddings' in kwargs:
            q, k = self.source.apply_rotary_pos_emb(q, k, *kwargs.pop('position_embeddings'))
        scale = self.scaling if hasattr(self, 'scaling') else self.scale
        # Fused kernels do not return the attention map, so the row that a selection reads is computed separately.
        prefix = self.num_prefix_tokens
        query = q[:, :, :1] if prefix else q.mean(2, keepdim=True)
        attended.append(evolution.class_attention(query, k, scale, attention_mask, prefix).sum(1))

        eager = self.source.eager_attention_forward
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager)
        dropout = self.attention_dropout if hasattr(self, 'attention_dropout') else self.dropout
        dropout = dropout if self.training else 0.0
        out, weights = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=scale, **kwargs)
        project = self.o_proj if hasattr(self, 'o_proj') else self.out_proj
        return project(out.flatten(2)), weights


class EvolvedLayer(Evolved):
    """A layer on all tokens, or on the patches at `places`: a block of evolution.py."""

    def forward(
        self, hidden_states, attention_mask=None, *, places=None, attn_mask=None, need_attention=False, **kwargs
    ):
        """As in transformers, and with the arguments of a block of evolution.py."""
        if places is not None and 'position_embeddings' in kwargs:
            n = hidden_states.shape[1] - attention_of(self).num_prefix_tokens
            cos, sin = kwargs['position_embeddings']
            sin, cos = rope_at(torch.cat([sin, cos], -1), places, n).chunk(2, -1)
            kwargs['position_embeddings'] = cos, sin
        if attn_mask is not None:
            attention_mask = attn_mask
        if not need_attention:
            return super().forward(hidden_states, attention_mask=attention_mask, **kwargs)
        attended = []
        tokens = super().forward(hidden_states, attention_mask=attention_mask, attended=attended, **kwargs)
        return tokens, attended[0]


class EvolvedLoop(Evolved):
    """A module that loops over layers. Its `evolution` has the schedule."""

    def run_layers(self, tokens: Tensor, **kwargs) -> BaseModelOutput:
        """Run all layers on tokens (B, P + N, C), with `kwargs`. The output has an attribute `selections`."""
        layers, cuts = layers_of(self), []
        collected = _active_collector.get() or {}  # outputs that transformers collects with hooks on layers, by name
        if any(group.keep_ratio < 1 for group in self.evolution.groups()):
            check_implementation(self.config, self.evolution)
            if kwargs.get('attention_mask') is not None:
                raise ValueError('attention_mask: expected none, as it masks tokens that no layer inside a stage sees')
            if 'attentions' in collected:
                raise ValueError(
                    'output_attentions: expected False, as a layer inside a stage has no map of the whole grid; call '
                    'models.evolve(model, keep_ratio=1) for the maps of the dense model'
                )
            if 'hidden_states' in collected:
                chosen = collected.get('_hidden_states_layers')  # None: the input of the first layer, and all outputs
                cuts = [i for i in range(len(layers)) if chosen is None or i + 1 in chosen]
        blocks = [partial(layer, **kwargs) for layer in layers]

        def take_out(tokens: Tensor) -> Tensor:
            """Views, on which the next layers depend, so that there are gradients by hidden states."""
            return tokens.view_as(tokens) if tokens.requires_grad else tokens

        tokens, selections, outputs = self.evolution.forward_blocks((tokens, blocks), cuts, take_out=take_out)
        for i, output in zip(cuts, outputs, strict=True):
            collected['hidden_states'][i + 1] = output  # the whole grid; inside a stage the hook saw fewer tokens
        output = BaseModelOutput(last_hidden_state=tokens)
        output.selections = selections
        return output


class EvolvedEncoder(EvolvedLoop):
    """CLIP's and SigLIP's encoder."""

    def forward(self, inputs_embeds, attention_mask=None, **kwargs):
        return self.run_layers(inputs_embeds, attention_mask=attention_mask, **kwargs)


class EvolvedDino(EvolvedLoop):
    """The encoders of DINOv2 and DINOv3; the latter has rotary positions."""

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, hidden_states, position_embeddings=None, **kwargs):
        if position_embeddings is not None:
            kwargs['position_embeddings'] = position_embeddings
        return self.run_layers(hidden_states, **kwargs)


class EvolvedViT(EvolvedLoop):
    """The models of ViT, DeiT and I-JEPA, which loop over the layers themselves."""

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, pixel_values=None, bool_masked_pos=None, interpolate_pos_encoding=None, attention_mask=None, **kwargs
    ):
        tokens = self.embeddings(
            pixel_values.to(self.embeddings.patch_embeddings.projection.weight.dtype),
            bool_masked_pos=bool_masked_pos,
            interpolate_pos_encoding=interpolate_pos_encoding,
        )
        if attention_mask is not None:
            attention_mask = create_bidirectional_mask(self.config, tokens, attention_mask)
        encoded = self.run_layers(tokens, attention_mask=attention_mask, **kwargs)
        tokens = self.layernorm(encoded.last_hidden_state)
        pooled = None if self.pooler is None else self.pooler(tokens)
        output = BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=pooled)
        output.selections = encoded.selections
        return output


# The classes that loop over layers, their mixins, and how many prefix tokens they have besides registers.
LOOPS = {
    'ViTModel': (EvolvedViT, 1),
    'DeiTModel': (EvolvedViT, 2),
    'IJepaModel': (EvolvedViT, 0),
    'Dinov2Encoder': (EvolvedDino, 1),
    'Dinov2WithRegistersEncoder': (EvolvedDino, 1),
    'DINOv3ViTEncoder': (EvolvedDino, 1),
    'CLIPEncoder': (EvolvedEncoder, 1),
    'SiglipEncoder': (EvolvedEncoder, 0),
}


class Schedule(Evolving):
    """The schedule of one encoder, and the loop over its groups of layers."""

    grad_checkpointing = False  # the layers of transformers do it themselves

    def __init__(self, depth: int, patches: int, num_prefix_tokens: int):
        self.depth, self.patches, self.num_prefix_tokens = depth, patches, num_prefix_tokens

    def block_names(self) -> list[str]:
        return [f'blocks.{i}' for i in range(self.depth)]

    def num_patches(self, block: int) -> int:
        return self.patches

    def prepare(self, embedded: tuple[Tensor, list[evolution.Block]]) -> tuple[Tensor, list[evolution.Block]]:
        return embedded  # transformers has embedded the images


def layers_of(loop: nn.Module) -> nn.ModuleList:
    return loop.layers if hasattr(loop, 'layers') else loop.layer


def attention_of(layer: nn.Module) -> nn.Module:
    return layer.self_attn if hasattr(layer, 'self_attn') else layer.attention


# --- evolving a model of transformers


def evolve_encoder(model: nn.Module, keep_ratio, stages, representative, stage_wise) -> nn.Module:
    """Add slow-fast evolution to the one vision encoder in a model of transformers; arguments as of `models.evolve`.

    The schedule becomes the attribute `evolution` of the module that loops over the layers. If that module is deep
    inside the model, its name is printed.
    """
    name, loop = find_encoder(model)
    config, layers = loop.config, layers_of(loop)
    attentions = [attention_of(layer) for layer in layers]
    for i, attention in enumerate(attentions):
        if type(attention).__module__ != type(loop).__module__:
            found = type(attention).__name__
            raise ValueError(f'cannot be evolved: expected the attention of transformers, found {found} in layer {i}')
    mixin, prefix = LOOPS[type(loop).__name__]
    prefix += getattr(config, 'num_register_tokens', 0)
    (rows, columns), (height, width) = to_2tuple(config.image_size), to_2tuple(config.patch_size)
    schedule = Schedule(len(layers), (rows // height) * (columns // width), prefix)
    stages = default_stages(len(layers)) if stages is None else stages
    schedule.init_evolution(keep_ratio, stages, representative, stage_wise)
    warn_if_rising(schedule.keep_ratio)
    if any(group.keep_ratio < 1 for group in schedule.groups()):
        check_implementation(config, schedule)
    modules = (loop, *layers, *attentions)
    if reason := find_replaced_forward(module for module in modules if not isinstance(module, Evolved)):
        raise ValueError(reason)
    become(loop, mixin)
    for layer, attention in zip(layers, attentions, strict=True):
        become(layer, EvolvedLayer)
        become(attention, EvolvedAttention)
        attention.num_prefix_tokens = prefix
    loop.evolution = schedule
    if '.' in name:
        ratios, blocks = schedule.keep_ratio, schedule.first_blocks
        print(f'{type(model).__name__}: {name} evolves, keep_ratio {ratios} from layers {blocks}')
    return model


def become(module: nn.Module, mixin: type):
    """Turn a module of transformers into an evolved one, in place."""
    if not isinstance(module, Evolved):
        module.__class__ = evolved_class(mixin, type(module))


def forward_with_selection(model: nn.Module, *args, **kwargs) -> tuple[BaseModelOutput, dict[str, Tensor]]:
    """The output of an evolved model, and its selections as {'blocks.4': kept (B, K)}, ascending raster indices, int64.

    ValueError for a model that was not evolved.
    """
    selections, (_, loop) = {}, find_encoder(model)
    if not isinstance(loop, Evolved):
        raise ValueError(f'expected an evolved model, found {type(model).__name__}; call models.evolve(model)')
    hook = loop.register_forward_hook(lambda module, args, output: selections.update(output.selections))
    try:
        output = model(*args, **kwargs)
    finally:
        hook.remove()
    return output, {name: selection.kept.sort(1).values for name, selection in selections.items()}


def find_encoder(model: nn.Module) -> tuple[str, nn.Module]:
    """The one module that loops over the layers of a vision encoder, with its name; ValueError if there is not one."""
    found, reasons = {}, {}
    for name, module in model.named_modules():
        cls = type(module)
        if cls.__module__.startswith('transformers.models.'):
            # CLIP and SigLIP use the same class for text, without an image size.
            if cls.__name__ in LOOPS and hasattr(module.config, 'image_size'):
                found[name] = module
            if beginning := next((x for x in REASONS if cls.__name__.startswith(x)), None):
                reasons.setdefault(beginning, f'{cls.__name__} {REASONS[beginning]}')
    if len(found) == 1:
        return next(iter(found.items()))
    if found:
        raise ValueError(f'expected a model with one vision encoder, found {", ".join(found)}; evolve one of these')
    reason = next(iter(reasons.values()), f'found none in {type(model).__name__}')
    raise ValueError(f'cannot be evolved: expected a vision encoder with {", ".join(LOOPS)}; {reason}')


def check_implementation(config, schedule: Schedule):
    """ValueError for an implementation of attention that does not support the masks of a schedule."""
    found = config._attn_implementation
    if found == 'flex_attention' or (schedule.representative == 'nearest' and found not in TAKE_MASKS):
        raise ValueError(
            f"attention: expected sdpa or eager, or FlashAttention with representative='one' or 'none', found {found}; "
            "call model.set_attn_implementation('sdpa')"
        )
