"""Prompts through chat templates, and without one."""

import pytest
from tokenizers.processors import TemplateProcessing

from orpo_distill.errors import ModelError
from orpo_distill.records import Message
from orpo_distill.samplers.prompts import encode_prompt, end_of_turn, render
from tests.checkpoints import CHAT_TEMPLATE, NO_SYSTEM_TEMPLATE, tiny_tokenizer

SYSTEM, ASK, SAY = Message("system", "Be brief."), Message("user", "Two?"), Message("assistant", "Four.")
SILENT_ON_SYSTEM = "{%- for m in messages if m.role != 'system' -%}{{ m.role + '=' + m.content + ';' }}{%- endfor -%}"


def test_the_models_own_template_is_used() -> None:
    tokenizer = tiny_tokenizer(chat_template=CHAT_TEMPLATE)
    assert render(tokenizer, (SYSTEM, ASK)) == "<bos><turn>system: Be brief.\n<turn>user: Two?\n<turn>assistant: "


@pytest.mark.parametrize("template", [NO_SYSTEM_TEMPLATE, SILENT_ON_SYSTEM])
def test_a_template_without_a_system_role_gets_it_in_the_first_question(template: str) -> None:
    text = render(tiny_tokenizer(chat_template=template), (SYSTEM, ASK, SAY, ASK))
    assert text.count("Be brief.\n\nTwo?") == 1
    assert text.index("Be brief.") < text.index("Four.")


def test_a_template_that_fails_is_a_model_error() -> None:
    tokenizer = tiny_tokenizer(chat_template="{{ raise_exception('Conversation roles must alternate') }}")
    with pytest.raises(ModelError, match="roles user, found: Conversation roles must alternate"):
        render(tokenizer, (ASK,))


def test_without_a_template_contents_stand_between_blank_lines() -> None:
    tokenizer = tiny_tokenizer()
    assert render(tokenizer, (SYSTEM, ASK, SAY, ASK)) == "Be brief.\n\nTwo?\n\nFour.\n\nTwo?\n"


def test_one_bos_with_and_without_a_template() -> None:
    for template in (CHAT_TEMPLATE, None):
        tokenizer = tiny_tokenizer(chat_template=template)
        ids = encode_prompt(tokenizer, (ASK,))
        assert ids[0] == tokenizer.bos_token_id and tokenizer.bos_token_id not in ids[1:]
        assert tokenizer.decode(ids[1:]) == render(tokenizer, (ASK,)).removeprefix("<bos>")


def test_a_plain_prompt_gets_no_eos_and_no_bos_that_the_tokenizer_would_not_add() -> None:
    tokenizer = tiny_tokenizer()
    both = TemplateProcessing(single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)])
    tokenizer.backend_tokenizer.post_processor = both
    assert tokenizer("x")["input_ids"][-1] == tokenizer.eos_token_id
    ids = encode_prompt(tokenizer, (ASK,))
    assert ids[0] == tokenizer.bos_token_id and tokenizer.eos_token_id not in ids

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 2)])
    assert encode_prompt(tokenizer, (ASK,)) == ids[1:]


def test_the_end_of_a_turn_is_the_special_token_after_the_assistants_text() -> None:
    template = "{%- for m in messages -%}{{ m.role + ':' + m.content + '<turn>\\n' }}{%- endfor -%}"
    tokenizer = tiny_tokenizer(chat_template=template)
    assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids("<turn>")
    assert end_of_turn(tiny_tokenizer()) is None
    assert end_of_turn(tiny_tokenizer(chat_template=CHAT_TEMPLATE)) is None
