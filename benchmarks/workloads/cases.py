"""The modules of `python -m benchmarks.workloads.zoo`, by the library that they come from."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate


class Case(NamedTuple):
    """One module, and how it is called.

    Attributes:
        module: as its library makes it.
        inputs: makes fresh ones of a batch, on the CPU.
        call: given the module and inputs, returns what is compared.
    """

    module: nn.Module
    inputs: Callable[[int], Sequence[Tensor]]
    call: Callable[..., Any] = lambda module, *inputs: module(*inputs)

    def fresh(self, batch: int, device: torch.device) -> list[Tensor]:
        """Makes inputs on the device."""
        return [tensor.to(device) for tensor in self.inputs(batch)]


def images(batch: int, channels: int = 3, *size: int) -> list[Tensor]:
    """Makes pictures of some contrast and colour each: of noise alone, one is much like another."""
    coarse = interpolate(torch.randn(batch, channels, 4, 4), size)
    contrast, colour = 4 * torch.rand(batch, 1, 1, 1), torch.randn(batch, channels, 1, 1)
    return [contrast * coarse + colour + torch.randn(batch, channels, *size) / 3]


def sentences(batch: int, length: int = 16) -> list[Tensor]:
    """Makes tokens of several lengths, and the mask of their padding."""
    mask = (torch.arange(length) < torch.randint(length // 4, length + 1, (batch, 1))).long()
    return [torch.randint(3, 97, (batch, length)) * mask, mask]


def recurrent(torch_: Any, name: str) -> Case:
    """Makes a recurrent cell, or two layers, whose state is fed back."""
    cell, pair = name.endswith("Cell"), name.startswith("LSTM")
    module = getattr(torch_.nn, name)(16, 32, **({} if cell else {"num_layers": 2, "batch_first": True}))

    def call(module: Any, x: Tensor) -> list[Tensor]:
        h = x.new_zeros(len(x), 32) if cell else x.new_zeros(2, len(x), 32)
        state: Any = (h, h.clone()) if pair else h
        outputs = []
        for piece in x.unbind(1):
            made = module(piece, state)
            state = made if cell else made[1]
            outputs.append((made if cell and not pair else made[0]).clone())
        return outputs

    shape = (4, 16) if cell else (4, 5, 16)  # four steps
    return Case(module, lambda batch: [torch.randn(batch, *shape)], call)


SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SMALL, "intermediate_size": 64, "max_position_embeddings": 64, "pad_token_id": 0}
MARKS = {f"{name}_token_id": 2 for name in ("bos", "cls", "eos", "sep")}
VISION = {**SMALL, "intermediate_size": 64, "image_size": 64, "patch_size": 16}
# By what comes before "Model" and "Config" in the names of their classes.
ENCODERS: dict[str, dict[str, Any]] = {
    "Bert": TEXT,
    "Roberta": TEXT,
    "XLMRoberta": TEXT,
    "DistilBert": {"vocab_size": 97, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    "Electra": {**TEXT, "embedding_size": 16},
    "Albert": {**TEXT, "embedding_size": 16},
    "MPNet": TEXT,
    "DebertaV2": {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "ModernBert": {**TEXT, **MARKS},
    "T5Encoder": {
        "vocab_size": 97,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
    },
    "CLIPText": {**TEXT, **MARKS},
    "CLIPVision": VISION,
    "ViT": VISION,
    "Dinov2": VISION,
}


def encoder(transformers: Any, name: str) -> Case:
    """Makes an encoder of transformers; those of text are given padded sentences."""
    config = getattr(transformers, f"{name.removesuffix('Encoder')}Config")(**ENCODERS[name])
    model = getattr(transformers, f"{name}Model")(config)
    if ENCODERS[name] is VISION:
        return Case(model, lambda batch: images(batch, 3, 64, 64))
    return Case(model, sentences, lambda model, ids, mask: model(input_ids=ids, attention_mask=mask))


# Each with what has it return boxes that it is unsure of: with random weights there are no others.
DETECTORS: dict[str, dict[str, Any]] = {
    "fasterrcnn_mobilenet_v3_large_320_fpn": {"box_score_thresh": 0.0},
    "retinanet_resnet50_fpn": {"score_thresh": 0.0, "min_size": 128, "max_size": 128},
    "ssdlite320_mobilenet_v3_large": {"score_thresh": 0.0},
}


def detector(torchvision: Any, name: str) -> Case:
    """Makes a detector of torchvision, which wants a list of pictures."""
    make = getattr(importlib.import_module(f"{torchvision.__name__}.models.detection"), name)
    model = make(weights=None, weights_backbone=None, **DETECTORS[name])
    return Case(model, lambda batch: images(batch, 3, 128, 160), lambda model, x: model(list(x)))


TIMM = """
resnet18 resnext50_32x4d regnety_004 efficientnet_b0 mobilenetv3_large_100 mnasnet_100 densenet121 dla34
hrnet_w18_small ghostnet_100 convnext_atto convnextv2_atto repvgg_a0 vgg11 legacy_xception inception_v3
rexnet_100 dpn68 eca_nfnet_l0 poolformer_s12 vit_tiny_patch16_224 swin_tiny_patch4_window7_224
swinv2_tiny_window8_256 beit_base_patch16_224 cait_xxs24_224 xcit_nano_12_p16_224 coat_lite_tiny
convit_tiny mixer_s32_224 resmlp_12_224 mobilevit_xxs coatnet_rmlp_nano_rw_224 levit_128s pvt_v2_b0
twins_svt_small crossvit_9_240 edgenext_xx_small fastvit_t8 hiera_tiny_224 eva02_tiny_patch14_224
"""


def image_model(timm: Any, name: str) -> Case:
    """Makes a model of timm."""
    model = timm.create_model(name, pretrained=False)
    return Case(model, lambda batch: images(batch, *model.pretrained_cfg["input_size"]))


# What makes the modules of each library, given it, and which.
GROUPS: dict[str, tuple[Callable[[Any, str], Case], Sequence[str]]] = {
    "torch": (recurrent, ("LSTMCell", "GRUCell", "LSTM", "GRU")),
    "transformers": (encoder, list(ENCODERS)),
    "torchvision": (detector, list(DETECTORS)),
    "timm": (image_model, TIMM.split()),
}
