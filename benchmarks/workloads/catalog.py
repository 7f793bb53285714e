"""The modules that arms are compared on, with their inputs and batches."""

from __future__ import annotations

import random
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks.harness.workload import Inputs, Scenario, Workload, three
from benchmarks.workloads.char_decode import CharModel
from benchmarks.workloads.models import GptStep, LlamaStep, ManyParameters, TinyMlp


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _integers(high: int, *shape: int, device: torch.device) -> Tensor:
    return torch.randint(high, shape, device=device)


# The tiny MLP


def _tiny(device: torch.device, small: bool) -> nn.Module:
    return TinyMlp(32 if small else 256).to(device)


def _tiny_inputs(model: nn.Module, batch: int, device: torch.device) -> Inputs:
    width = cast(Any, model).layers[0].in_features
    return torch.randn(batch, width, device=device), torch.randn(batch, width, device=device)


# GPT-2 small

GPT_ROWS, GPT_POSITIONS = 8, 1024


def gpt(device: torch.device, small: bool, rows: int, positions: int) -> nn.Module:
    """Makes the decode step with a cache of so many rows and positions."""
    with device:
        if small:
            model = GptStep(rows, positions, layers=2, width=32, heads=2, vocab=97)
        else:
            model = GptStep(rows, positions).to(_dtype(device))
    for name, buffer in model.named_buffers():
        if name.endswith(("keys", "values")):  # an empty cache would hide what is read from it
            buffer.normal_()
    return model


def gpt_inputs(model: nn.Module, batch: int, device: torch.device) -> Inputs:
    """Returns tokens, and positions that leave the spare one alone."""
    step = cast(GptStep, model)
    vocab, positions = step.tokens.num_embeddings, step.places.num_embeddings
    return _integers(vocab, batch, device=device), _integers(positions - 1, batch, device=device)


# Llama-3.2-1B

LLAMA_PROMPT = 64
LLAMA: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
}


def _llama(device: torch.device, small: bool) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LLAMA
    if small:
        shape = shape | {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 128}
        shape |= {"num_hidden_layers": 2}
        shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    config = LlamaConfig(
        **shape, max_position_embeddings=131072, rms_norm_eps=1e-5, tie_word_embeddings=True
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(_dtype(device))
    try:
        with device:
            model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    model.requires_grad_(False)
    step = LlamaStep(model, positions=1024)
    for tensor in step.state():  # begins after a prompt
        if tensor.is_floating_point():
            tensor.normal_()
        else:
            tensor.fill_(LLAMA_PROMPT)
    return step


def _llama_inputs(model: nn.Module, batch: int, device: torch.device) -> Inputs:
    vocab = cast(Any, model).model.config.vocab_size
    return (_integers(vocab, batch, 1, device=device),)


def _llama_again(module: nn.Module) -> nn.Module:
    step = cast(LlamaStep, module)
    return LlamaStep(step.model, step.positions).eval()


# The character model

CHAR_SLOTS, CHAR_VOCAB = 32, 96


def _char(device: torch.device, small: bool) -> nn.Module:
    with device:
        model = CharModel(CHAR_VOCAB, CHAR_SLOTS)
    for parameter in model.parameters():  # training starts its blocks at zero, where nothing is to see
        if parameter.detach().eq(0).all():
            nn.init.normal_(parameter, std=0.05)
    for name, buffer in model.named_buffers():
        if "cache_" in name:
            buffer.normal_()
    return model


def _char_inputs(model: nn.Module, batch: int, device: torch.device) -> Inputs:
    slots = random.sample(range(CHAR_SLOTS), batch)
    positions = cast(Any, model).span.shape[0]
    return (
        _integers(CHAR_VOCAB, batch, device=device),
        _integers(positions, batch, device=device),
        torch.tensor(slots, device=device),
    )


# 300 parameters, 12 inputs


def _many(device: torch.device, small: bool) -> nn.Module:
    return ManyParameters(16 if small else 64).to(device)


def _many_inputs(model: nn.Module, batch: int, device: torch.device) -> Inputs:
    width = cast(Any, model).after[0].in_features
    return tuple(torch.randn(batch, width, device=device) for _ in range(ManyParameters.INPUTS))


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            "tiny",
            "A tiny MLP: 4 layers of 256, 2 inputs, float32.",
            _tiny,
            _tiny_inputs,
            sizes=(1, 2, 4, 8),
            scenarios=three(8, 5, (8, 4, 2)),
            compiled_in=("exact", "padded", "changing"),
            rounds=60,
        ),
        Workload(
            "gpt2",
            "A decode step in the shape of GPT-2 small: 12 layers of 768, KV cache of 1,024 positions "
            "in buffers, 2 inputs, bfloat16.",
            lambda device, small: gpt(device, small, GPT_ROWS, GPT_POSITIONS),
            gpt_inputs,
            sizes=(1, 2, 4, 8),
            scenarios=three(8, 5, (8, 4, 2)),
            tolerance=3e-2,
            # The spare position, by its own number: -1 would mask all keys of a padded row.
            pad={"positions": GPT_POSITIONS - 1},
            fills={1: GPT_POSITIONS - 1},
            rounds=20,
            pipelined=(6, 64),
        ),
        Workload(
            "llama",
            "A decode step in the shape of Llama-3.2-1B from transformers: static cache of 1,024 "
            "positions, batch 1, bfloat16.",
            _llama,
            _llama_inputs,
            sizes=(1,),
            scenarios=(Scenario("exact", (1,)),),
            tolerance=5e-2,
            state=lambda module: cast(LlamaStep, module).state(),
            duplicate=_llama_again,
            branches=True,
            pad={"tokens": 0},  # at batch 1 nothing is padded; without it, a warning says so
            rounds=8,
            pipelined=(3, 32),
        ),
        Workload(
            "char",
            "The decode step of `benchmarks/workloads/char_decode.py`: 2 layers of 128, KV cache in "
            "buffers, 3 inputs, float32.",
            _char,
            _char_inputs,
            sizes=(1, 2, 4, 8, 16, 32),
            scenarios=three(32, 20, (32, 16, 8, 4)),
            pad={"slots": -1},
            fills={2: -1},
            rounds=30,
            pipelined=(8, 128),
        ),
        Workload(
            "params",
            "A module with 300 parameters and 12 inputs: 150 layers of 64, float32.",
            _many,
            _many_inputs,
            sizes=(8,),
            scenarios=three(8, 5, ())[:2],
            recompiled=False,
            rounds=20,
            pipelined=(6, 64),
        ),
    )
}
