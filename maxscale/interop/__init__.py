"""Checkpoints of other frameworks: Hugging Face's, in and out."""

from maxscale.errors import UserError


class InteropError(UserError):
  """A checkpoint that cannot be converted. The message names the file and the tensor and says what to change."""
