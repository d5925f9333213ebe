"""The one exception of the application that its user can mend."""


class UsageError(ValueError):
    """Something the user asked for cannot be done, and the message says in one sentence what is wrong and what to do.

    The command line prints the message without a traceback and exits with code 2; everything else that goes wrong is a
    bug and keeps its traceback.

    >>> raise UsageError("The data path texts/ does not exist: give a text file or a folder of text.")
    Traceback (most recent call last):
        ...
    onelayer.errors.UsageError: The data path texts/ does not exist: give a text file or a folder of text.
    """
