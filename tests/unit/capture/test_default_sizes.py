"""The default sizes, and the size that a batch is padded to."""

from graphcache.capture.default_sizes import default_sizes, padded_size
from graphcache.config import check_sizes


def test_sizes() -> None:
    assert check_sizes([4, 1, 4]) == (1, 4)
    assert default_sizes(1) == (1,)
    assert default_sizes(20) == (1, 2, 4, 8, 16, 20)
    assert default_sizes(300)[-4:] == (256, 272, 288, 300)
    assert [padded_size((2, 4), n) for n in (1, 2, 3, 4, 5)] == [2, 2, 4, 4, None]
    for batch in range(1, 600):
        sizes = default_sizes(batch)
        assert sizes[-1] == batch
        assert list(sizes) == sorted(set(sizes))
