"""Native calls that begin and end a capture."""

import pytest

from graphcache import _C


def test_ending_a_host_capture_that_is_not_there_raises() -> None:
    with pytest.raises(RuntimeError):
        _C.end_host_capture(0, 2**60)
