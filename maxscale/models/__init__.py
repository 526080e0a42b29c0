"""Decoders made of small parts, written as single-device code.

One legend of dimension letters, used in names (x_btd, w_dnh) and in docstrings:
  B batch (sequences)   T positions   S key positions   D embed   F mlp hidden   V vocabulary (padded)
  N query heads         K key/value heads               H head_dim               L layers
  E experts             A experts a token uses          M rows of tokens sorted by expert
"""
