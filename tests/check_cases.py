"""Cases of `maxscale.check` on 8 simulated devices (tests/multidevice.py runs them): models that have between them every
option, planted faults, each in a process that is right without it, and what the command then says.
"""

import contextlib
import dataclasses
import functools
import io
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from maxscale import check, environment
from maxscale import config as config_lib
from maxscale.models import attention, module, plain
from maxscale.sharding import context, layouts, pipeline
from maxscale.step import Program
from tests.models import reference as ref

DENSE = {"model.layers": 6, "model.embed": 64, "model.heads": 8, "model.kv_heads": 4, "model.head_dim": 16,
         "model.mlp": 128, "model.compute_dtype": "float32", "loss.z_loss": 0.1, "data.length": 64}  # fmt: skip
MOE = {**DENSE, "model.experts": 64, "model.experts_per_token": 3, "loss.balance_loss": 0.3, "loss.router_z_loss": 0.2}
LATENT = {**MOE, "model.kv_heads": 0, "model.mla.kv_rank": 32, "model.moe.dense_layers": 2, "model.moe.groups": 8,
          "model.moe.groups_per_token": 4}  # fmt: skip
YARN = {"type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096}
# The options of known models, exchanged so that each is in one of them.
MODELS = {
  "Gemma": {
    **DENSE, "model.norm": "rms_plus_one", "model.post_norms": True, "model.activation": "gelu_tanh",
    "model.windows": [512, 512, 0], "model.attention_softcap": 50.0, "model.logit_softcap": 30.0,
    "model.qk_norm": True, "model.rope_local_theta": 100.0, "model.rope_scaling": {"type": "linear", "factor": 8.0},
    "model.query_scale": 0.3, "model.tied_embeddings": True,
  },
  "GPT-2": {
    **DENSE, "model.norm": "layer", "model.parallel_block": True, "model.gated": False, "model.activation": "gelu",
    "model.mlp_bias": True, "model.qkv_bias": True, "model.out_bias": True, "model.max_positions": 512,
    "model.embedding_scale": 1.0, "model.post_norms": True,
  },
  "gpt-oss": {
    **MOE, "model.moe.router_bias": True, "model.mlp_bias": True, "model.qkv_bias": True, "model.out_bias": True,
    "model.attention_sinks": True, "model.activation": "clamped_swiglu", "model.windows": [128, 0],
    "model.rope_scaling": {**YARN, "truncate": False},
  },
  "DeepSeek-V3": {
    **LATENT, "model.mla.q_rank": 64, "model.moe.score": "sigmoid", "model.moe.correction": True,
    "model.moe.group_score": "top2", "model.moe.shared": 64, "model.moe.scale": 2.5, "model.moe.dense_mlp": 256,
    "model.mtp": 2, "loss.mtp": 0.3, "model.rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
  },
  "DeepSeek-V2": {
    **LATENT, "model.moe.normalise": False, "model.moe.capacity": 1.0, "model.windows": [128],
    "model.norm": "rms_plus_one", "model.attention_sinks": True, "model.attention_softcap": 20.0,
    "model.out_bias": True,
  },
  "Llama 4": {
    **MOE, "model.windows": [8192, 0], "model.window_kind": "chunked", "model.gated": False,
    "model.activation": "relu2", "model.mlp_bias": True, "model.moe.shared": 64, "model.mtp": 1,
    "model.norm": "layer", "model.qk_norm": True, "model.rope_local_theta": 50.0, "model.rope_scaling": {
      "type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
      "original_max_position_embeddings": 8192},
  },
}  # fmt: skip


@functools.cache
def right(name, layers=1):
  """The check of the program as it is, of configs/tiny.py, tiny_moe.py, or one of MODELS with few layers of each kind:
  the compiler's time is most of it."""
  if name not in MODELS:
    return check.Check(check.shrink(config_lib.load(f"configs/{name}.py")))
  with mock.patch.object(check, "LAYERS", layers):
    return check.Check(check.shrink(ref.config(MODELS[name])))


def caught(target, name, fault, family, mesh, smallest):
  """With `fault(real)` in the place of target.name a mesh that was equal differs, and the report names its cause."""
  clean = right(family)
  layout = layouts.fitted(clean.config, layouts.parse(mesh))
  assert clean.compare(layout).equal, clean.compare(layout)
  with mock.patch.object(target, name, fault(getattr(target, name))):
    faulty = check.Check(clean.config, clean.expected)
    assert faulty.compare(layout).verdict == "DIFFERENT", faulty.compare(layout)
    result = faulty.smallest(layout)
  assert layouts.name(result.layout) == smallest, check.report(result)
  assert not result.error, result.error  # it ran: what differs are its numbers
  return result


# ---- options


def equal(model, mesh, layers=1):
  clean = right(model, layers)
  result = clean.compare(layouts.fitted(clean.config, layouts.parse(mesh)))
  assert result.equal, check.report(result)


def case_gemma():
  equal("Gemma", "context=4,tensor=2")


def case_gpt2():
  equal("GPT-2", "context=2,tensor=2,pipeline=2", layers=2)


def case_gpt_oss():
  equal("gpt-oss", "context=2,expert=2,tensor=2,sharding.context=ulysses")


def case_deepseek_v3():
  equal("DeepSeek-V3", "fsdp=2,expert=2,pipeline=2", layers=2)


def case_deepseek_v2():
  equal("DeepSeek-V2", "fsdp=2,expert=2,tensor=2")


def case_llama4():
  equal("Llama 4", "context=4,tensor=2,sharding.context=gather")


# ---- faults


def case_the_output_of_a_block_is_not_summed():
  unsplit = "sharding.compute.residual_length=context"
  caught(context, "_rest", lambda real: lambda name: (), "tiny", f"tensor=2,{unsplit}", f"tensor=2,{unsplit}")


def case_gradients_are_not_summed_over_data():
  less = lambda real: lambda names: tuple(a for a in real(names) if a != "data")  # noqa: E731
  result = caught(context, "unsummed", less, "tiny", "data=2,fsdp=2,tensor=2", "data=2")
  assert result.loss < check.LOSS and max(result.gradients.values()) > 0.1


def case_gradients_are_summed_over_devices_that_hold_parts_of_them():
  more = lambda real: lambda names: tuple({*real(names), *context.mesh_axes("mlp")})  # noqa: E731
  caught(context, "unsummed", more, "tiny", "data=2,fsdp=2,tensor=2", "tensor=2")


def case_gradients_of_norms_miss_the_tokens_of_other_parts_of_a_sequence():
  result = caught(context, "TOKENS", lambda real: ("batch",), "tiny", "tensor=2", "tensor=2")
  assert "layers/mlp_norm/scale" in result.worst(4)


def case_the_loss_is_a_mean_over_the_targets_of_a_device():
  def fault(real):
    def pieces(self, step, scale, *more):
      def head(outer, x, part):
        targets = part["targets"]
        count = jnp.maximum(jnp.sum(targets >= 0), 1) * (check.BATCH / len(targets))  # as if all had as many
        return real(self, step, 1 / count, *more).head(outer, x, part)

      return dataclasses.replace(real(self, step, scale, *more), head=head)

    return pieces

  result = caught(Program, "_pieces", fault, "tiny", "data=2,fsdp=2,tensor=2", "data=2")
  assert result.loss > check.LOSS


def case_attention_ignores_segments():
  def fault(real):
    return lambda form, q, k, offset: real(form, (q[0], q[1] > 0), (k[0], k[1] > 0), offset)

  caught(attention, "_logits", fault, "tiny", "tensor=2", "one device")


def case_a_window_has_a_key_more():
  wider = lambda form: dataclasses.replace(form, window=form.window and form.window + 1)  # noqa: E731
  fault = lambda real: lambda form, *arguments: real(wider(form), *arguments)  # noqa: E731
  caught(attention, "_xla_forward", fault, "Gemma", "context=2", "one device")


def case_a_microbatch_is_dropped():
  fault = lambda real: property(lambda self: real.fget(self) - (self.microbatches > 1))  # noqa: E731
  caught(pipeline.Schedule, "ticks", fault, "tiny", "data=2,sharding.microbatches=2", "sharding.microbatches=2")


def case_the_layers_of_a_circular_pipeline_are_in_the_wrong_rows():
  fault = lambda real: lambda self, layers: tuple(range(layers))  # noqa: E731
  circular = "pipeline=2,sharding.repeats=2,sharding.microbatches=2"
  caught(pipeline.Schedule, "rows", fault, "tiny", circular, circular)


def case_the_gradient_of_the_gates_is_not_summed():
  chosen = right("tiny_moe").config.model.experts_per_token

  def fault(real):
    @functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
    def gates(x, name):
      return real(x, name)

    gates.defvjp(lambda x, name: (real(x, name), None), lambda name, _, dy: (context.own_part(dy),))
    are_gates = lambda x: x.shape[-1] == chosen and jnp.issubdtype(x.dtype, jnp.floating)  # noqa: E731
    return lambda x, name: (gates if are_gates(x) else real)(x, name)

  result = caught(context, "gather", fault, "tiny_moe", "tensor=2", "tensor=2")
  assert result.worst(1).startswith("layers/mlp/router")


def case_the_balance_loss_counts_a_part_of_a_sequence():
  fault = lambda real: lambda x, name: x if name == "residual_length" else real(x, name)  # noqa: E731
  caught(context, "psum", fault, "tiny_moe", "tensor=2", "tensor=2")


# ---- what it compares with


def plain_and_reference(family, tied):
  """Compares plain math with the third formulation of the decoder; returns (parameters, batch) -> margins, and both."""
  config = ref.config(ref.FAMILIES[family], model__vocab_size=ref.VOCAB, model__tied_embeddings=tied)
  params, batch = check.parameters(config), ref.batch(4, 16)
  f = jax.jit(jax.value_and_grad(lambda p, b: plain.loss(config, p, b), has_aux=True))
  (loss, (nll, margins)), gradients = f(module.nest(params), batch)
  expected, expected_nll, expected_gradients = ref.reference(config, params, batch)
  assert abs(loss - expected) < 1e-5 * expected and abs(nll - expected_nll) < 1e-5 * expected_nll
  ref.assert_close(ref.host(gradients), expected_gradients, 2e-5)
  assert ((margins > 0) & (margins < 1)).all() if family == "moe" else (margins == 1).all()
  return lambda params, batch: f(module.nest(params), batch)[0][1][1], params, batch


def case_plain_math_is_the_reference():
  plain_and_reference("dense", tied=False)


def case_plain_math_is_the_reference_with_experts_and_knows_its_margins():
  margins, params, batch = plain_and_reference("moe", tied=True)
  params = {**params, "layers/mlp/router": params["layers/mlp/router"] * 0}  # no expert is better than another
  assert not margins(params, batch).any()
  padding = {**batch, "segments": batch["segments"] * (np.arange(4) != 2)[:, None]}
  assert margins(params, padding).tolist() == [0, 0, 1, 0]  # what padding chooses does not count


# ---- what the command says


def command(*arguments):
  """(exit code, output) in this process, whose devices are there already."""
  output = io.StringIO()
  expected = right("tiny").expected
  with (
    mock.patch.object(environment, "prepare"),
    mock.patch.object(check, "expect", lambda config: expected),
    contextlib.redirect_stdout(output),
  ):
    code = check.main(["--config", "configs/tiny.py", "--config.run.compile_cache=", *arguments])
  return code, output.getvalue()


def case_the_command_names_what_differs():
  real = context.unsummed
  with mock.patch.object(context, "unsummed", lambda names: tuple(a for a in real(names) if a != "data")):
    code, output = command("--mesh", "fsdp=2,tensor=2,data=2", "--mesh=tensor=2")
  assert code == 1
  title, first, smallest, whole, second, last = output.splitlines()
  assert "dense" in title and first.endswith("DIFFERENT") and "8 devices" in first
  assert smallest.startswith("  smallest part that differs: data=2: loss "), smallest
  assert whole.startswith("  the mesh itself: fsdp=2,tensor=2,data=2: loss ")
  assert second.endswith("equal") and last.endswith("1 equal, 1 DIFFERENT")


def case_a_mesh_that_raises_hides_no_other():
  with mock.patch.object(Program, "_pieces", side_effect=TypeError("planted")):
    code, output = command("--mesh=data=2,pipeline=2")
  assert code == 1 and "TypeError: planted" in output and "differs: one device: TypeError" in output


def case_a_refused_mesh_is_not_equal():
  code, output = command("--mesh", "fsdp=3", "--mesh=fsdp=2")
  assert code == 1
  refused, equal, last = output.splitlines()[1:]
  assert "embed=32 is not divisible by fsdp=3" in refused and refused.endswith("refused")
  assert equal.endswith("equal") and last.endswith("1 equal, 1 refused")
