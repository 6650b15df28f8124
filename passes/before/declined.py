"""Why something in front of an attention is left to the graph."""


class Declined(Exception):
    """What is not understood or what the op cannot do, in words for a report."""


def require(condition: object, reason: str) -> None:
    """Go on where a condition holds.

    Raises: Declined, with the reason.
    """
    if not condition:
        raise Declined(reason)
