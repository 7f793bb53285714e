"""Train a small character model, then decode a batch of texts that shrinks as they end.

    python examples/char_decode.py

The training text ships inside Python. Each step writes the state of every text in place, as with a KV
cache. Without a GPU the graphs are emulated.
"""

import sys
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphcache import cuda_graphed, disabled, emulate

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONTEXT, DIM, TEXTS, LONGEST, STEPS = 12, 24, 16, 160, 600


@cuda_graphed(sizes=(1, 2, 4, 8, 16), pad={"slots": TEXTS})  # the one line; padded rows: a spare slot
class CharModel(nn.Module):
    def __init__(self, vocab: int) -> None:
        super().__init__()
        layers = nn.Embedding(vocab, DIM), nn.Flatten(), nn.Linear(CONTEXT * DIM, 256), nn.GELU()
        self.logits = nn.Sequential(*layers, nn.Linear(256, vocab))
        self.contexts = nn.Buffer(torch.zeros(TEXTS + 1, CONTEXT, dtype=torch.int64))

    def forward(self, chars: Tensor, slots: Tensor) -> Tensor:
        """Returns logits of the character after each one; the context of its text lies at its slot."""
        self.contexts[slots] = torch.cat([self.contexts[slots, 1:], chars[:, None]], 1)
        return self.logits(self.contexts[slots])


def train(model: CharModel, data: Tensor) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(STEPS):
        starts = torch.randint(len(data) - CONTEXT, (256, 1), device=device)
        window = data[starts + torch.arange(CONTEXT + 1, device=device)]
        loss = F.cross_entropy(model.logits(window[:, :-1]), window[:, -1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"loss after {STEPS} steps of training: {loss.item():.2f}")


def decode(model: CharModel, prompts: Tensor, noise: Tensor) -> list[list[int]]:
    model.contexts[:TEXTS] = prompts[:, :-1]
    texts, live, step = prompts.tolist(), list(range(TEXTS)), 0
    while live:
        chars, slots = torch.tensor([[texts[n][-1] for n in live], live], device=device)
        picks = (model(chars, slots) + noise[slots, step]).argmax(-1)
        for n, pick in zip(live, picks.tolist(), strict=True):
            texts[n].append(pick)
        live, step = [n for n in live if len(texts[n]) < LONGEST - 8 * n], step + 1
    return texts


text = " ".join(" ".join(topics.values()).split())
vocab = sorted({*text})
data = torch.tensor([vocab.index(c) for c in text], device=device)
torch.manual_seed(0)
model = CharModel(len(vocab)).to(device)
train(model, data)
model.double()  # no near-ties between characters
prompts = data[: 5000 * TEXTS].view(TEXTS, -1)[:, : CONTEXT + 1]
noise = -0.4 * torch.empty(TEXTS, LONGEST, len(vocab), device=device).exponential_().log()  # samples
with torch.inference_mode(), emulate():  # emulate() concerns CPU tensors only
    got, info = decode(model, prompts, noise), model.forward.cache_info()
    with disabled():
        want = decode(model, prompts, noise)
print("", *("".join(vocab[n] for n in row) for row in got[:4]), info, "", sep="\n\n")
print(f"characters of {TEXTS} texts, identical to eager: {got == want}")
if got != want or not info.hits:
    sys.exit("FAILED: characters differ from eager, or nothing was replayed")
