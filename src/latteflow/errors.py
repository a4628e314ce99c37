"""The one exception a user's mistake is reported with."""


class UserError(ValueError):
    """A mistake of the user's: the message names what was given and what would do.

    The command line prints the message as one line on stderr and exits with code 2; in Python it is a ``ValueError``.
    """
