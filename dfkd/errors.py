"""The exceptions that end a command with a line to read."""


class UserError(ValueError):
    """Bad input, told in one line: what was given, what is allowed, what to do; the command exits with code 2."""


class Paused(Exception):
    """A run stopped in time, with a whole checkpoint (runtime.minutes): in one line how far it is."""
