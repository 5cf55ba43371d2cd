"""Errors that the user can mend: one line, exit status 2."""


class UserError(Exception):
    """Bad input; its one line names the thing, the values found and wanted, and the next step."""
