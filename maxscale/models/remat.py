"""What the backward pass keeps of a layer: a table activation name -> keep | recompute | offload, with presets."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from maxscale.config import ConfigError, Remat

# Every name that a layer gives to an activation (`jax.ad_checkpoint.checkpoint_name`), in order of computation.
NAMES = ("query", "key", "value", "attention", "attention_out", "router", "gate", "up", "mlp_out")
PRESETS: dict[str, tuple[str, ...]] = {
  "full": (),
  "attention": ("attention",),
  "projections": ("query", "key", "value", "attention", "gate", "up"),
  "custom": (),
}


def table(remat: Remat) -> dict[str, str] | None:
  """The whole table of a config, or None where nothing is recomputed.

  Raises:
    ConfigError: an unknown name, or a table beside the policy `none`.
  """
  if remat.policy == "none":
    if remat.table:
      raise ConfigError("remat.table has no effect with remat.policy='none'; set remat.policy=custom")
    return None
  out = {name: "keep" if name in PRESETS[remat.policy] else "recompute" for name in NAMES}
  for name, action in remat.table.items():
    if name not in NAMES:
      near = difflib.get_close_matches(name, NAMES, 1)
      hint = f"; did you mean {near[0]!r}?" if near else ""
      raise ConfigError(f"remat.table names {name!r}, which no layer has{hint}; names: {', '.join(NAMES)}")
    out[name] = action
  return out


def wrap(f: Callable, actions: dict[str, str] | None, drop_weights: bool) -> Callable:
  """f with the policy of the table. None keeps everything, or with `drop_weights` every activation that has a name."""
  import jax

  if actions is None and not drop_weights:
    return f  # every kept value passes a barrier: not where nothing is to be left out
  if actions is None:  # a policy that leaves out weights alone keeps what they are made of
    actions = dict.fromkeys(NAMES, "keep")
  keep = [n for n, a in actions.items() if a == "keep"]
  offload = [n for n, a in actions.items() if a == "offload"]
  policy: Any = jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=keep, names_which_can_be_offloaded=offload, offload_src="device", offload_dst="pinned_host"
  )
  # Inside a scan XLA cannot merge the recomputation with the forward pass, so no barrier is needed against it.
  return jax.checkpoint(f, policy=policy, prevent_cse=False)
