"""Conversations as tokens: what the tokenizer's chat template makes of them, and which tokens are the assistant's.

A record is {"messages": [{"role", "content", ...}, ...]}, maybe with "tools" and "documents" for the template, or
{"prompt", "completion"}: two texts. The template is the one beside the tokenizer (chat_template.jinja, or chat_template
in tokenizer_config.json) and sees what transformers 5 shows it, so the tokens are those of `apply_chat_template`. The
byte tokenizer has a plain one, "role: content" a line. Three things differ from transformers:

  - Names of special tokens inside messages are text, as in every other source. Not seen are names that a template puts
    together out of roles ('<|' + role + '|>'): what roles there are is up to the corpus.
  - The day is always `TODAY`, for templates that ask: the same corpus is the same tokens on any day.
  - None of the three noncharacters used here may be in a message.

With loss="completions" only tokens of the assistant, with the end of its turn, count as targets. Where a template has
`{% generation %}` tags they say which these are. Elsewhere a turn is what the conversation up to it has more than the
conversation before it with the prompt for an answer; both must be how the whole conversation begins. An eos_token that
the template writes only where a conversation ends counts only there.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from maxscale.config import ConfigError
from maxscale.data import documents, store
from maxscale.data.tokenizers import BREAK, Tokenizer

LOSSES = ("completions", "all")
TODAY = datetime.datetime(2024, 7, 26)  # the day that the template of Llama 3.1 takes where it is told none
GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
OPEN, CLOSE = "\ufdd1", "\ufdd2"  # around what is inside {% generation %}
REASONING = (
  "reasoning_content",
  "thinking",
  "reasoning",
)  # one thing under several names; templates read the first two


class Chat:
  """What makes documents of the records of a source.

  Attributes:
    masked: whether documents have a loss mask.
    identity: equal ones make equal documents of equal records; JSON.
  """

  def __init__(self, where: str, spec: dict, tokenizer: Tokenizer):
    """`where` names the source in messages, `spec` is its entry in `data.sources`.

    Raises:
      ConfigError: jinja2 is not installed, or the tokenizer has no chat template that can be read.
    """
    self._where, self._tokenizer = where, tokenizer
    self._column = spec.get("column", documents.COLUMNS["chat"])
    loss = spec.get("loss", LOSSES[0])
    self.masked = loss == "completions"
    self.identity = {"templates": {**tokenizer.chat_templates}, "variables": {**tokenizer.chat_variables}, "loss": loss}
    self._templates = _compile(where, tokenizer)
    self._names = _names_in_text(tokenizer.special_names)

  def encode(self, records: Iterable[tuple[str, dict]]) -> Iterator[store.Document]:
    """Documents of records, each with the place that it is from.

    Raises:
      ConfigError: a record is no conversation, the template refuses it, or what the assistant said cannot be told apart.
    """
    rendered = (self._render(place, record) for place, record in records)
    for chunk in store.chunks(rendered, lambda text_and_spans: len(text_and_spans[0])):
      for (_, spans), (ids, at) in zip(chunk, self._tokenizer.encode_chat([text for text, _ in chunk])):
        mask = np.zeros(len(ids), bool)
        for start, stop in spans:
          mask |= (at[:, 0] < stop) & (at[:, 1] > start)
        yield ids, mask if self.masked else None

  def _render(self, place: str, record: dict) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation, and the parts of it [start, stop) that count."""
    values = self._values(place, record)
    name = "tool_use" if values["tools"] and "tool_use" in self._templates else "default"

    def render(messages: list, prompt: bool) -> str:
      try:
        return self._templates[name].render(**values | {"messages": messages, "add_generation_prompt": prompt})
      except Exception as e:  # a template is code of its author's, and raises what it likes
        raise ConfigError(f"{place}: the chat template refuses this conversation: {e}") from e

    text, spans = _split(render(values["messages"], prompt=False))
    if self.masked and not GENERATION.search(self._tokenizer.chat_templates[name]):
      spans = []
      for i in (i for i, message in enumerate(values["messages"]) if message["role"] == "assistant"):
        before, after = render(values["messages"][:i], prompt=True), render(values["messages"][: i + 1], prompt=False)
        if not text.startswith(after):
          after = after.removesuffix(self._tokenizer.chat_variables.get("eos_token", ""))  # for the last turn alone
        if not after.startswith(before) or not text.startswith(after):
          raise ConfigError(
            f"{place}: the chat template writes message {i + 1} of the whole conversation otherwise than up to there, "
            "so the assistant's tokens cannot be told; end conversations after one answer, put {% generation %} tags "
            f"into the template (chat_template.jinja beside the tokenizer.json), or set {self._where}.loss='all'"
          )
        spans.append((len(before), len(after)))
    if self.masked and not spans:
      raise ConfigError(
        f"{place} has nothing of the role 'assistant', and nothing else counts; correct its roles, remove the line, or "
        f"set {self._where}.loss='all'"
      )
    return text, spans

  def _values(self, place: str, record: dict) -> dict[str, Any]:
    """What the template sees of a record, names of special tokens made text."""
    if self._column in record:
      messages = record[self._column]
    elif "prompt" in record and "completion" in record:
      messages = [{"role": r, "content": record[c]} for r, c in (("user", "prompt"), ("assistant", "completion"))]
      if not all(isinstance(message["content"], str) for message in messages):
        raise ConfigError(f"{place}: prompt and completion must be texts; give conversations as {self._column}")
    else:
      documents.no_column(place, self._column, record, self._where)
    if not isinstance(messages, list) or not messages or not all(_is_message(message) for message in messages):
      raise ConfigError(
        f"{place}: {self._column!r} is not a list of messages, each with a role; set {self._where}.column to theirs"
      )
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    values = {"messages": [_with_reasoning(message) for message in messages]}
    values |= {key: record.get(key) for key in ("tools", "documents")}
    for key, value in values.items():
      if not isinstance(value, list) and value is not None:
        raise ConfigError(f"{place}: {key!r} is {type(value).__name__}, not a list; repair the line")
    text = json.dumps(values, ensure_ascii=False)
    documents.check_surrogates(text, place, self._column)
    if used := {BREAK, OPEN, CLOSE} & set(text):
      raise ConfigError(f"{place} has the noncharacter U+{ord(used.pop()):X}, which is not text; remove it")
    return {**self._tokenizer.chat_variables, **self._as_text(values)}

  def _as_text(self, value: Any) -> Any:
    if isinstance(value, dict):
      return {self._as_text(key): self._as_text(item) for key, item in value.items()}
    if isinstance(value, list):
      return [self._as_text(item) for item in value]
    return self._names.sub(rf"\g<0>{BREAK}", value) if isinstance(value, str) else value


def _is_message(message: Any) -> bool:
  return isinstance(message, dict) and isinstance(message.get("role"), str)


def _with_reasoning(message: dict) -> dict:
  found = next((message[key] for key in REASONING if key in message), None)
  return message if found is None else {"thinking": found, **message, "reasoning_content": found}


def _names_in_text(names: Iterable[str]) -> re.Pattern:
  """Finds the first character of a special token's name, or of what could begin one at the end of a text: another text
  may follow there."""
  names = [name for name in names if len(name) > 1]
  if not names:
    return re.compile(r"(?!)")
  whole = "|".join(map(re.escape, names))
  heads = "|".join(map(re.escape, sorted({name[:n] for name in names for n in range(1, len(name))})))
  firsts = "".join(map(re.escape, sorted({name[0] for name in names})))
  return re.compile(rf"(?=[{firsts}])(?=(?:{whole})|(?:{heads})\Z).", re.DOTALL)


def _split(rendered: str) -> tuple[str, list[tuple[int, int]]]:
  """A rendered text without `OPEN` and `CLOSE`, and where in it what they enclosed is."""
  parts = re.split(f"[{OPEN}{CLOSE}]", rendered)
  ends = np.cumsum([len(part) for part in parts]).tolist()
  return "".join(parts), list(zip(ends[0::2], ends[1::2]))


def _compile(where: str, tokenizer: Tokenizer) -> dict[str, Any]:
  try:
    import jinja2
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox
  except ImportError:
    raise ConfigError(f'{where} is of kind chat, which needs jinja2: pip install "maxscale[chat]"') from None
  if "default" not in tokenizer.chat_templates:
    raise ConfigError(
      f"data.tokenizer has no chat template, and {where} needs one; use a tokenizer.json, and put the template beside it "
      "as chat_template.jinja"
    )

  class Generation(jinja2.ext.Extension):
    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
      line = next(parser.stream).lineno
      body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
      return jinja2.nodes.CallBlock(self.call_method("_enclose"), [], [], body).set_lineno(line)

    def _enclose(self, caller: Any) -> str:
      return OPEN + caller() + CLOSE

  def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)

  def tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
  ):
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return text.replace(json.dumps(BREAK)[1:-1], BREAK)  # escaped it would stay in the text

  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
  )
  environment.filters["tojson"] = tojson  # Jinja's own is for HTML
  environment.globals |= {"raise_exception": raise_exception, "strftime_now": TODAY.strftime}
  try:
    return {name: environment.from_string(template) for name, template in tokenizer.chat_templates.items()}
  except jinja2.TemplateSyntaxError as e:
    raise ConfigError(f"the chat template of data.tokenizer has an error in line {e.lineno}: {e.message}") from e
