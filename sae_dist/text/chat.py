"""Conversations: read from a record, rendered by a chat template, with a mask of what the assistant wrote."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from sae_dist.config import UserError, digest, frozen
from sae_dist.text.document import Document

Messages = Sequence[Mapping[str, Any]]

FORMAT = 2  # format 1 counted a token with which a template opens conversations, and left out separators that end turns
# With which a template says itself what the assistant wrote. Rendered as two characters that no text has.
_MARK = re.compile(r"\{%(-?)\s*(end)?generation\s*(-?)%\}")
_FIRST, _END = "\U0010fffe", "\U0010ffff"
_CURE = (
    "give a template that says what the assistant wrote, {% generation %}...{% endgeneration %}: text.template=FILE; "
    "or set text.turns=all"
)


@frozen
class Conversations:
    """Keys of sources whose documents may be conversations."""

    messages: str = ""  # the field or column that holds a conversation, [{role, content}, ...], in place of a text
    # of a conversation, whose tokens become rows of the store; the model reads all of them
    turns: Literal["assistant", "all"] = "assistant"
    template: str = ""  # a file with a chat template (Jinja) in place of the tokenizer's own

    @property
    def chat_fingerprint(self) -> list[str]:
        """Of the keys that were set; empty where documents are texts."""
        return [self.messages, self.turns, digest(self.template_text)] if self.messages else []

    @property
    def template_text(self) -> str | None:
        if not self.template:
            return None
        try:
            return Path(self.template).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"text.template={self.template} cannot be read ({error}); give a text file") from None


class ChatTokenizer(Protocol):
    """What is used here of Hugging Face's fast tokenizers."""

    chat_template: Any

    @property
    def all_special_tokens(self) -> list[str]: ...
    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...
    def __call__(self, text: Any, **options: Any) -> Any: ...


class Encoded(NamedTuple):
    """A document's tokens, and which of them may become rows."""

    ids: list[int]
    counted: list[bool]


def document(record: object, source: str, category: str | None) -> Document:
    """The document of a record's conversation."""
    messages = parsed(record, source)
    return Document(as_text(messages), source, category, messages=messages)


def parsed(record: object, source: str) -> Messages:
    """A record's conversation, checked; UserError for anything but a list of messages in text."""
    if not isinstance(record, list) or not record:
        raise UserError(f"{source} holds no conversation but {record!r:.80}; set text.messages= to a list of messages")
    return [_message(each, source) for each in record]


def _message(message: object, source: str) -> Mapping[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise UserError(f"{source} has a message without a role, {message!r:.80}; make it {{role, content}}")
    content = message.get("content")
    if isinstance(content, list):
        other = sorted({str(part.get("type")) for part in content if isinstance(part, dict)} - {"text"})
        if other or not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise UserError(f"{source} has a message with {', '.join(other) or 'parts'} in it; only text can be read")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str | None):
        raise UserError(f"{source} has a message whose content is a {type(content).__name__}; make it a text")
    # Parquet gives every message every field, null where it has none
    return {key: value for key, value in message.items() if value is not None} | {"content": content or ""}


def as_text(messages: Messages) -> str:
    """What tells conversations apart and decides their side of the split."""
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


class ChatTemplate:
    """Turns conversations into tokens and a mask of those that count.

    The mask is what the template itself marks as the assistant's, if it marks anything. Else it is what each answer
    adds to the conversation before it, which a template shows by its prompt for an answer. A template whose marks are
    wrong, or that renders the conversation before an answer otherwise than in the whole, is refused.
    """

    def __init__(self, tokenizer: ChatTokenizer, config: Conversations) -> None:
        self._tokenizer, self.turns = tokenizer, config.turns
        own = getattr(tokenizer, "chat_template", None)
        found = config.template_text or own
        if not isinstance(found, str):
            raise UserError(
                f"text.messages={config.messages}, but the model's tokenizer has no chat template; use a model made "
                "for conversations, or give one: text.template=FILE"
            )
        self.template = found
        self._marked = _MARK.sub(_visible, found) if _MARK.search(found) else None
        self._checked: set[tuple[str, ...]] = set()  # roles of conversations for which the marks were looked at

    @property
    def identity(self) -> dict[str, str]:
        """What decides, beside text and tokenizer, which tokens there are and which of them count."""
        return {"turns": self.turns, "chat_template": digest(self.template), "chat_format": str(FORMAT)}

    def encode(self, messages: Messages, source: str) -> Encoded | None:
        """Tokens and mask; None for a conversation that writes a special token out, which would end a turn."""
        reserved = [*self._tokenizer.all_special_tokens, _FIRST, _END]
        if any(word in message["content"] for message in messages for word in reserved):
            return None
        text = self._render(messages, source)
        spans = [(0, len(text))] if self.turns == "all" else self._written(messages, text, source)
        found = self._tokenizer(
            text, add_special_tokens=False, split_special_tokens=False, return_offsets_mapping=True
        )  # fmt: skip
        offsets = found["offset_mapping"]
        counted = [any(first <= begin and end <= last for first, last in spans) for begin, end in offsets]
        return Encoded(list(found["input_ids"]), counted)

    def _written(self, messages: Messages, text: str, source: str) -> list[tuple[int, int]]:
        """(first, end) in the rendered conversation of what the assistant wrote."""
        if self._marked is None:
            return self._answers(messages, text, source)
        self._check_marks(tuple(message["role"] for message in messages), source)
        plain, spans = _unmarked(self._render(messages, source, template=self._marked))
        if plain != text:
            raise UserError(f"{source}: the chat template's marks of what was generated change the text; {_CURE}")
        return spans

    def _answers(self, messages: Messages, text: str, source: str) -> list[tuple[int, int]]:
        """(first, end) of each answer in the rendered conversation, with the token that ends its turn."""
        found = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:number], source)
            asked = self._render(messages[:number], source, ask=True)
            answered = self._render(messages[: number + 1], source)
            whole = text.startswith(answered) and answered.startswith(asked) and asked != before
            if not whole or message["content"].strip() not in answered[len(asked) :]:
                raise UserError(
                    f"{source}: the chat template does not show which tokens of message {number + 1} the assistant "
                    f"wrote; {_CURE}"
                )
            found.append((len(asked), len(answered.rstrip())))
        return found

    def _check_marks(self, roles: tuple[str, ...], source: str) -> None:
        """Renders a conversation of these roles whose contents are known words, and looks where these have gone."""
        if roles in self._checked:
            return
        self._checked.add(roles)
        words = [f"word{number}x" for number in range(len(roles))]
        conversation = [{"role": role, "content": word} for role, word in zip(roles, words, strict=True)]
        plain, spans = _unmarked(self._render(conversation, source, template=self._marked))
        inside = [word for word in words if any(word in plain[first:last] for first, last in spans)]
        if inside != [word for role, word in zip(roles, words, strict=True) if role == "assistant"]:
            raise UserError(
                f"{source}: the chat template marks other text as generated than the assistant's messages; {_CURE}"
            )

    def _render(self, messages: Messages, source: str, *, template: str | None = None, ask: bool = False) -> str:
        from jinja2 import TemplateError  # here: the command line does without it

        try:
            return self._tokenizer.apply_chat_template(
                list(messages), chat_template=template or self.template, tokenize=False, add_generation_prompt=ask
            )
        except (TemplateError, TypeError, KeyError, IndexError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"{source}: the chat template refuses the conversation ({reason}); take it out of the text, or give "
                "another template: text.template=FILE"
            ) from None


def _visible(mark: re.Match[str]) -> str:
    """A mark as a character between blocks, so that white space around it is dropped as around the mark."""
    before, end, after = mark.groups()
    return f"{{%{before} if true %}}{_END if end else _FIRST}{{% endif {after}%}}"


def _unmarked(text: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without its marks, and (first, end) of what was between them."""
    plain, spans = "", []
    for number, part in enumerate(re.split(f"[{_FIRST}{_END}]", text)):
        if number % 2:
            spans.append((len(plain), len(plain) + len(part)))
        plain += part
    return plain, spans
