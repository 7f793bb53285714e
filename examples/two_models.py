"""Let two models take turns over one pool of graph memory: a draft guesses tokens, a target checks them.

    python examples/two_models.py

Greedy speculative decoding with random weights. The tokens must be those that the target writes alone.
At the end, an output is held while the other model runs. Without a GPU the graphs are emulated.
"""

import copy
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphcache import cuda_graphed, default_pool, disabled, emulate

VOCAB, DIM, PROMPT, GUESSES, END = 256, 64, 8, 4, 40


@cuda_graphed(sizes=(2,))  # the one line: all instances use the pool of their device
class Decoder(nn.Module):
    """Returns the token that follows each one, from all tokens up to there."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.head = nn.Embedding(VOCAB, DIM), nn.Linear(DIM, VOCAB)
        self.layers = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(6))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens)
        for layer in self.layers:
            x = x + F.scaled_dot_product_attention(layer(x), x, x, is_causal=True) / 16
        return torch.argmax(self.head(x), -1)


def speculate(draft: Decoder, target: Decoder, texts: Tensor) -> tuple[Tensor, int]:
    """Returns the texts that the target would write, and how often it was called."""
    length, calls = PROMPT, 0
    while length < END:
        for n in range(length, length + GUESSES):
            texts[:, n] = draft(texts)[:, n - 1]  # is used before the next call
        chosen = target(texts)[:, length - 1 : length + GUESSES]
        right = texts[:, length : length + GUESSES] == chosen[:, :-1]
        count = int(right.all(0).cumprod(0).sum()) + 1  # guesses that are right in all rows, and one
        texts[:, length : length + count] = chosen[:, :count]
        length, calls = length + count, calls + 1
    return texts[:, :END], calls


torch.manual_seed(0)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
target = Decoder().to(device, torch.float64).eval()  # float64: no near-ties between tokens
draft = copy.deepcopy(target)
draft.layers = draft.layers[:1]
prompts = torch.randint(VOCAB, (2, END + GUESSES), device=device)  # read up to PROMPT
with torch.inference_mode(), emulate():  # emulate() concerns CPU tensors only
    got, calls = speculate(draft, target, prompts.clone())
    want = prompts[:, :END].clone()
    with disabled():
        for n in range(PROMPT, END):
            want[:, n] = target(want)[:, n - 1]
    held = draft(prompts)
    target(prompts)  # its graph writes to the same memory
    with disabled():
        kept = torch.equal(held, draft(prompts))  # it was copied first
    print(f"an output that was held while the other model ran is whole: {kept}\n")

info, same = target.forward.cache_info(), torch.equal(got, want)
print(f"target:\n{info}\n\ndraft:\n{draft.forward.cache_info()}\n\npool of both: {default_pool(device)}")
print(f"{calls} calls of the target instead of {END - PROMPT}, tokens identical to eager: {same}")
if not same or not info.hits:
    sys.exit("FAILED: tokens differ from eager, or nothing was replayed")
