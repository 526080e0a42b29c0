"""What a command tells its user in one message, without a stack trace."""


class UserError(Exception):
  """Something that the user can mend; the message says what. `exit_code` is that of the command."""

  exit_code = 1


class DeadlineError(UserError, TimeoutError):
  """A wait that ended at its deadline; the message names who is missing."""
