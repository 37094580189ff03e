"""The one exception that stands for a mistake of the user, printed without a traceback."""


class UserError(Exception):
    """Something the user can mend; the message says what and how."""
