"""Turn texts into vectors, as an embedding service does, in batches of any size.

    python examples/embeddings.py

Texts are padded to one of three lengths. Each length is a signature with graphs of its own, captured by
`warmup` before the first request. Without a GPU the graphs are emulated.
"""

import copy
import random
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphcache import cuda_graphed, emulate

LENGTHS, VOCAB, DIM, HEADS = (16, 32, 64), 1000, 64, 4


def main() -> None:
    model = Encoder().to(device).eval()
    eager = copy.deepcopy(model)
    model = cuda_graphed(model, sizes=(1, 2, 4, 8, 16, 32), pad="edge")  # the one line
    # "edge": rows that fill up a batch repeat the last text, since an empty text has no mean.

    rng, worst = random.Random(0), 0.0
    with torch.inference_mode(), emulate():  # emulate() concerns CPU tensors only
        for length in LENGTHS:
            model.forward.warmup(*request(32, length))
        for _ in range(60):
            texts = request(rng.randint(1, 32), rng.choice(LENGTHS))
            worst = max(worst, float((model(*texts) - eager(*texts)).abs().max()))

    info = model.forward.cache_info()
    print(info)
    print(f"\nlargest difference from eager: {worst:.1e}, in vectors of length 1")
    if not worst < 1e-4 or not info.hits:
        sys.exit("FAILED: vectors differ from eager, or nothing was replayed")


device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Encoder(nn.Module):
    """Attention among the real tokens of each text, then the mean over them."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(VOCAB, DIM), nn.Embedding(max(LENGTHS), DIM)
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.mlp = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, 4 * DIM), nn.GELU())

    def forward(self, tokens: Tensor, real: Tensor) -> Tensor:
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None])
        x = self.mlp(x + self.out(mixed.transpose(1, 2).flatten(2)))
        total = x.masked_fill(~real[..., None], 0.0).sum(1)
        return F.normalize(total / real.sum(1, keepdim=True), dim=-1)


def request(texts: int, length: int) -> tuple[Tensor, Tensor]:
    """Returns token ids of texts that are padded to `length`, and a mask of the real tokens."""
    real = torch.arange(length) < torch.randint(3, length + 1, (texts, 1))
    return (torch.randint(1, VOCAB, (texts, length)) * real).to(device), real.to(device)


if __name__ == "__main__":
    main()
