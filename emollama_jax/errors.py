"""Errors that the user can mend: one line, exit status 2."""


class UserError(Exception):
    """Bad input. The message names the thing, the value found, the value wanted and the next step."""
