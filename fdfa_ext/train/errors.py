"""The one exception that the command line turns into a sentence instead of a traceback."""


class UserError(Exception):
    """Something that the user can put right: a missing file, a flag that fits nothing. One sentence."""
