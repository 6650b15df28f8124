"""The error that a user can put right, wherever it is found."""


class UserError(Exception):
    """A mistake in what the user asked for. The message says what, where, and what to do."""
