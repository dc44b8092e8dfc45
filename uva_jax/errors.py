"""The one exception that means "the input is wrong, and here is the way out"."""


class UserError(ValueError):
    """Bad input that a user can mend.

    Command lines print the message as one sentence, without a traceback, and exit with status 2.
    """
