"""Errors that a user can mend. Everything else is a bug and keeps its traceback."""


class UserError(Exception):
    """Bad input: the message says what, where and what to do, in a line or two. Commands exit with 2."""


class StorageError(UserError):
    """Storage that could not be read for a reason that may pass. A run starts its workers again after it."""


class DamagedCheckpoint(UserError):
    """A checkpoint that is cut, changed, or without one of its files. A run goes on from an earlier one."""


class RunFailed(Exception):
    """A run that started and could not finish, with the reason in a line or two. Commands exit with 1."""
