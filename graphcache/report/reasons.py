"""The reasons for which a call runs eagerly."""


class Bypass(Exception):
    """No graph can serve this call; the text says why and becomes a line of `cache_info().eager`."""
