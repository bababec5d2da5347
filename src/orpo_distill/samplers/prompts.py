"""Prompts as a model reads them: its own chat template, or plain text where it has none.

Sampling and training both encode prompts here, so that a student is trained on exactly the prompts it is asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from orpo_distill.errors import ModelError
from orpo_distill.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def plain_prompt(messages: Sequence[Message]) -> str:
    """A prompt as a model without a chat template reads it: the contents, blank lines between, a line end last."""
    return "\n\n".join(message.content for message in messages) + "\n"


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """The prompt's text: through the chat template, or else plain.

    A template that rejects or swallows a system message gets its text at the head of the first user message. Raises
    ModelError where the template fails all the same.
    """
    if not tokenizer.chat_template:
        return plain_prompt(messages)
    if messages and messages[0].role == "system":
        text = _try_template(tokenizer, messages)
        if isinstance(text, str) and messages[0].content.strip() in text:
            return text
        messages = _without_system(messages)
    text = _try_template(tokenizer, messages)
    if isinstance(text, str):
        return text
    roles = ", ".join(message.role for message in messages)
    raise ModelError(
        f"expected a chat template that takes the roles {roles}, found: {text}; "
        "remove `chat_template` from the tokenizer's folder to use plain prompts"
    ) from text


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """The prompt's token ids. A chat template writes its own BOS; a plain prompt gets the tokenizer's, never an EOS."""
    return encode_prompts(tokenizer, [messages])[0]


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[Message]]) -> list[list[int]]:
    """The token ids of each prompt, as `encode_prompt` gives them, in one call of the tokenizer."""
    texts = [render(tokenizer, messages) for messages in prompts]
    encoded: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    if not tokenizer.chat_template and tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]:
        return [[tokenizer.bos_token_id, *ids] for ids in encoded]
    return encoded


def encode_each(
    tokenizer: PreTrainedTokenizerBase, prompts: Iterable[tuple[Message, ...]]
) -> dict[tuple[Message, ...], tuple[int, ...]]:
    """The token ids of each different prompt, as `encode_prompt` gives them."""
    distinct = list(dict.fromkeys(prompts))
    return dict(zip(distinct, map(tuple, encode_prompts(tokenizer, distinct)), strict=True))


def end_of_response(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that ends a response in training: the end of the chat template's turn, else the end of sequence."""
    end = end_of_turn(tokenizer)
    return tokenizer.eos_token_id if end is None else end


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template writes right after an assistant's text, if it writes one."""
    if not tokenizer.chat_template:
        return None
    said = "The end."
    text = _try_template(tokenizer, [Message("user", "?"), Message("assistant", said)], add_generation_prompt=False)
    if not isinstance(text, str) or said not in text:
        return None
    after = tokenizer(text[text.rindex(said) + len(said) :], add_special_tokens=False)["input_ids"]
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return after[0] if after and after[0] in special else None


def _try_template(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], add_generation_prompt: bool = True
) -> str | Exception:
    from jinja2 import TemplateError

    conversation = [{"role": message.role, "content": message.content} for message in messages]
    try:
        text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=add_generation_prompt)
    except (TemplateError, TypeError, ValueError) as error:
        return error
    return str(text)


def _without_system(messages: Sequence[Message]) -> list[Message]:
    """The messages with the system text at the head of the first user message."""
    system, *rest = messages
    for place, message in enumerate(rest):
        if message.role == "user":
            rest[place] = Message("user", f"{system.content}\n\n{message.content}")
            return rest
    return [Message("user", system.content), *rest]
