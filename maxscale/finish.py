"""The end of a complete run: the held-out loss beside simple models, a sample, the report, where the time went."""

from __future__ import annotations

from typing import Any

import numpy as np

WAIT = 1800.0  # seconds that processes wait for each other at the end


def finish(run: Any, state: Any) -> None:
  """All processes take part in what computes on the devices; process 0 does the rest, while the others wait."""
  from maxscale import distributed
  from maxscale.goodput import events, ledger, report
  from maxscale.goodput.telemetry import line

  config = run.config
  if run.heldout:
    if config.run.steps % config.eval.every:
      run.evaluate(state, config.run.steps)
    losses = {} if distributed.index else _ngrams(run)
    if losses:
      names = {2: "bigram", 3: "trigram"}
      line("held-out loss of count models, same text: "
           + ", ".join(f"{names.get(n, f'{n}-gram')} {loss:.4f}" for n, loss in losses.items()))  # fmt: skip
  if config.log.sample_tokens:
    prompt, tokens = config.log.sample_prompt, config.log.sample_tokens
    line(f"sample of {tokens} tokens:\n{sample(run.program, run.tokenizer, state['params'], prompt, tokens)}\n")
  distributed.meet("computed", WAIT)  # no process writes events while process 0 reads them
  if not distributed.index:
    run.close()
    run.log.flush()  # the report and the summary are made from the log alone
    where = report.write_report(config.run_dir)
    line(ledger.summary(ledger.ledger(events.read(config.run_dir))))
    line(f"checkpoints {config.run_dir}/checkpoints\nmetrics     {config.run_dir}/metrics\nreport      {where}")
  distributed.meet("reported", WAIT)


def _ngrams(run: Any) -> dict[int, float]:
  from maxscale.data.ngram import ngram_losses

  if len(run.batches.sources) > 1:
    return {}
  train, heldout = (next(iter(b.sources.values())) for b in (run.batches, run.heldout))
  return ngram_losses(train, heldout, run.tokenizer.vocab_size)


def sample(
  program: Any, tokenizer: Any, params: Any, prompt: str, tokens: int, temperature: float = 0.8, seed: int = 0
) -> str:
  """A text that continues the prompt, on the devices of a program, whatever its mesh."""
  ids = np.concatenate([[tokenizer.bos], tokenizer.encode(prompt)]).astype(np.int32)
  return prompt + tokenizer.decode(sample_ids(program, params, ids, tokens, temperature, seed, tokenizer.eos))


def sample_ids(
  program: Any, params: Any, ids: np.ndarray, tokens: int, temperature: float, seed: int, stop: int = -1
) -> np.ndarray:
  """The tokens, int32 [up to `tokens`], that continue ids [P], on the devices of a program, whatever its mesh."""
  from maxscale.models.sample import sample

  sampler = program.for_sampling()
  return sample(sampler, sampler.adopt(params, program), ids, tokens, temperature, seed, stop)
