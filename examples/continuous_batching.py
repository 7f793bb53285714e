"""Decode requests that come and go, in a batch that changes at every step.

    python examples/continuous_batching.py

Each step decodes one token of every request that has a slot of the KV cache. The batch is padded to the
next of four sizes, and padded rows write to a spare slot. Without a GPU the graphs are emulated.
"""

import random
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphcache import cuda_graphed, disabled, emulate

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SLOTS, SPARE, LONGEST, VOCAB, DIM = 8, 8, 48, 256, 64


@cuda_graphed(sizes=(1, 2, 4, 8), pad={"slots": SPARE})  # the one line
class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(VOCAB, DIM), nn.Embedding(LONGEST, DIM)
        self.qkv, self.head = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, VOCAB)
        self.keys, self.values = (nn.Buffer(torch.zeros(SLOTS + 1, LONGEST, DIM)) for _ in "kv")

    def forward(self, tokens: Tensor, positions: Tensor, slots: Tensor) -> Tensor:
        """Returns the token that follows each of n tokens; all arguments are (n,)."""
        q, k, v = self.qkv(self.token(tokens) + self.position(positions)).chunk(3, -1)
        self.keys[slots, positions], self.values[slots, positions] = k, v
        mask = torch.arange(LONGEST, device=q.device) <= positions[:, None, None]
        keys, values = self.keys[slots], self.values[slots]
        mixed = F.scaled_dot_product_attention(q[:, None], keys, values, attn_mask=mask)
        return torch.argmax(self.head(mixed[:, 0]), -1)


def serve(model: Decoder, prompts: list[list[int]]) -> list[list[int]]:
    """Returns the continued prompts; a new request takes a free slot at each step."""
    texts = [[*prompt] for prompt in prompts]
    waiting, active, step = [*texts], dict[int, tuple[int, list[int]]](), 0
    while waiting or active:
        if waiting and (free := {*range(SLOTS)} - active.keys()):
            active[min(free)] = step, waiting.pop(0)  # by slot: the first step of a request, its text
        rows = [(text[step - start], step - start, slot) for slot, (start, text) in active.items()]
        picks = model(*torch.tensor(rows).T.contiguous().to(device)).tolist()
        step += 1
        for (slot, (start, text)), pick in zip([*active.items()], picks, strict=True):
            if step - start == len(text):  # else the prompt goes on
                text.append(pick)
                if pick < 16 or len(text) == LONGEST:  # tokens below 16 end a text
                    del active[slot]
    return texts


rng = random.Random(0)
prompts = [[rng.randrange(VOCAB) for _ in range(rng.randint(2, 9))] for _ in range(24)]
torch.manual_seed(0)
model = Decoder().to(device, torch.float64).eval()  # float64: no near-ties between tokens
with torch.inference_mode(), emulate():  # emulate() concerns CPU tensors only
    got, info = serve(model, prompts), model.forward.cache_info()
    with disabled():
        want = serve(model, prompts)
print(info)
print(f"\n{sum(map(len, got))} tokens of {len(got)} requests, identical to eager: {got == want}")
if got != want or not info.hits:
    sys.exit("FAILED: tokens differ from eager, or nothing was replayed")
