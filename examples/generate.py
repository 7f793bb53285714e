"""Let transformers' `generate` replay its decode step: one line added, the same tokens.

pip install transformers
python examples/generate.py
"""

import copy
import sys
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from graphcache import cuda_graphed, emulate

torch.manual_seed(0)
sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, vocab_size=1000, eos_token_id=None))
model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
eager = copy.deepcopy(model)
model = cuda_graphed(model)  # the one line


def write(model: Any, length: int, sample: bool) -> Tensor:
    torch.manual_seed(length)
    prompt = torch.randint(1, 1000, (2, length)).to(model.device)
    how = {"do_sample": sample, "max_new_tokens": 24, "pad_token_id": 0}
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), **how)


with emulate():  # emulate() concerns CPU tensors only
    for length, sample in ((7, False), (7, True), (12, False), (5, True)):
        if not torch.equal(write(model, length, sample), write(eager, length, sample)):
            sys.exit("FAILED: tokens differ from eager")
        print(f"prompt of {length} tokens, {'sampled' if sample else 'greedy'}: identical to eager")
print(info := model.forward.cache_info())
if not info.hits:
    sys.exit("FAILED: nothing was replayed")
