"""The one exception a user is meant to read."""


class UserError(ValueError):
    """Bad input, told in one line: what was given, what is allowed, what to do; the command exits with code 2."""
