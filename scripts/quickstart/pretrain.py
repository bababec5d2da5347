"""Train a tokenizer and a model of about a million parameters from nothing, and save an ordinary checkpoint folder.

Teacher and student share nothing: neither architecture, tokenizer, vocabulary nor chat template. The sibling, another
student, has the teacher's tokenizer and an architecture of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

BATCH = 32
MUON_RATE, ADAMW_RATE, WARM_UP_STEPS, HOLD = 0.015, 0.003, 20, 0.5
CONTEXT = 512

# A system message, if any, stands before the question. The prompt ends where no token can merge with the response.
TEACHER_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == 'system' -%}{{ message.content + '\\n' }}
{%- elif message.role == 'user' -%}{{ 'Question: ' + message.content + '\\n' }}
{%- else -%}{{ 'Answer:\\n' + message.content + eos_token }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'Answer:\\n' }}{%- endif -%}"""
STUDENT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == 'system' -%}{{ message.content }}
{%- elif message.role == 'user' -%}{{ '<q>' + message.content }}
{%- else -%}{{ '<a>' + message.content + eos_token }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<a>' }}{%- endif -%}"""


def teacher_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Words with their leading space as `▁`; whole numbers, punctuation and line ends stand alone."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="never"),
            pre_tokenizers.Split(Regex(r"▁?[^\w▁]"), "isolated"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    special = ["<unk>", "<pad>", "<end>"]
    printable = ["\n", *map(chr, range(33, 127))]
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=special, initial_alphabet=printable, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<end>",
        chat_template=TEACHER_TEMPLATE,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def student_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE; every digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r" ?\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|start|>", "<|stop|>", "<q>", "<a>"]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|start|>",
        eos_token="<|stop|>",
        additional_special_tokens=["<q>", "<a>"],
        chat_template=STUDENT_TEMPLATE,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def teacher_model(vocabulary: int, **ids: Any) -> PreTrainedModel:
    """Qwen3: RMS norm, SwiGLU, normed queries and keys, grouped heads, tied embeddings."""
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=144,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=36,
        intermediate_size=384,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        **ids,
    )
    return Qwen3ForCausalLM(config)


def student_model(vocabulary: int, **ids: Any) -> PreTrainedModel:
    """GPT-NeoX: layer norm, GELU, attention beside the MLP, half rotary, untied embeddings."""
    config = GPTNeoXConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        tie_word_embeddings=False,
        **ids,
    )
    return GPTNeoXForCausalLM(config)


def sibling_model(vocabulary: int, **ids: Any) -> PreTrainedModel:
    """Llama: RMS norm, SwiGLU, a head of its own for every query, untied embeddings."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=352,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        **ids,
    )
    return LlamaForCausalLM(config)


@dataclass(frozen=True, slots=True)
class Role:
    """What tells the models apart: tokenizer, whose lessons it is made of, model and number of steps."""

    name: str
    tokenizer: Callable[[list[str]], PreTrainedTokenizerFast]
    words_of: str
    model: Callable[..., PreTrainedModel]
    steps: int


ROLES = {
    "teacher": Role("teacher", teacher_tokenizer, "teacher", teacher_model, 600),
    "student": Role("student", student_tokenizer, "student", student_model, 2225),
    "sibling": Role("sibling", teacher_tokenizer, "teacher", sibling_model, 2225),
}


def prompt_text(tokenizer: PreTrainedTokenizerFast, question: str) -> str:
    """The rendered prompt for a question that is the whole user message."""
    messages = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)
    return text


def encode(tokenizer: PreTrainedTokenizerFast, question: str, trace: str) -> tuple[list[int], int]:
    """Ids of prompt, response and end, and the length of the prompt."""
    texts = [prompt_text(tokenizer, question), trace]
    prompt, response = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [*prompt, *response, tokenizer.eos_token_id], len(prompt)


def check_tokenizer(tokenizer: PreTrainedTokenizerFast, lessons: list[tuple[str, str]]) -> None:
    """Prompt and response apart give the joint ids, and decoding gives the text back."""
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    for question, trace in lessons:
        ids, _ = encode(tokenizer, question, trace)
        text = prompt_text(tokenizer, question) + trace
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids[:-1], text
        assert tokenizer.decode(ids[:-1]) == text, (tokenizer.decode(ids[:-1]), text)


def batches(
    tokenizer: PreTrainedTokenizerFast, lessons: Iterator[tuple[str, str]], rng: Random
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless `(ids, labels)`, both (B, T), padded right; rows of like length together to waste little padding."""
    while True:
        rows = [encode(tokenizer, *lesson) for lesson in islice(lessons, BATCH * 16)]
        rows.sort(key=lambda row: len(row[0]))
        chunks = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
        rng.shuffle(chunks)
        for chunk in chunks:
            width = max(len(ids) for ids, _ in chunk)
            ids = torch.full((BATCH, width), tokenizer.pad_token_id)
            labels = torch.full((BATCH, width), -100)
            for row, (tokens, prompt) in enumerate(chunk):
                ids[row, : len(tokens)] = torch.tensor(tokens)
                labels[row, prompt : len(tokens)] = torch.tensor(tokens[prompt:])
            yield ids, labels


def optimizers(model: PreTrainedModel) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings, head, norms and biases."""
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    chosen = {id(p) for p in hidden}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(hidden, lr=MUON_RATE, weight_decay=0.0),
        torch.optim.AdamW(others, lr=ADAMW_RATE, weight_decay=0.0),
    ]


def rate(step: int, steps: int) -> float:
    """Share of the peak learning rate: a short warm-up, a hold, then down to nothing in a straight line."""
    return min(1.0, (step + 1) / WARM_UP_STEPS, (steps - step) / (steps * (1 - HOLD)))


def train(model: PreTrainedModel, data: Iterator[tuple[Tensor, Tensor]], steps: int, name: str) -> None:
    """Minimise the mean negative log-probability (nats per token) of the responses."""
    chain = optimizers(model)
    schedules = [torch.optim.lr_scheduler.LambdaLR(one, lambda step: rate(step, steps)) for one in chain]
    model.train()
    started, tokens = time.monotonic(), 0
    for step, (ids, labels) in enumerate(islice(data, steps)):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for one, schedule in zip(chain, schedules, strict=True):
            one.step()
            schedule.step()
            one.zero_grad()
        tokens += ids.numel()
        if step % 100 == 99 or step + 1 == steps:
            seconds = time.monotonic() - started
            print(
                f"{name}: step {step + 1}/{steps}, loss {loss.item():.3f}, {seconds:.0f} s, {tokens:,} tokens",
                flush=True,
            )


def build_checkpoint(
    role: Role, words: Iterator[tuple[str, str]], lessons: Iterator[tuple[str, str]], seed: int, out: Path
) -> float:
    """Train `role` from nothing, save it under `out` in float16 and return the seconds it took.

    The tokenizer is made of `words`, lessons too; they may be the same ones, which then go on behind it.
    """
    started = time.monotonic()
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    sample = list(islice(words, 4000))
    tokenizer = role.tokenizer([tokenizer_text(question) + trace for question, trace in sample])
    check_tokenizer(tokenizer, sample)
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    model = role.model(len(tokenizer), **ids)
    print(f"{role.name}: {model.num_parameters():,} parameters, {len(tokenizer)} tokens in the vocabulary", flush=True)
    train(model, batches(tokenizer, lessons, Random(seed)), role.steps, role.name)
    model.generation_config = GenerationConfig(**ids)
    model.to(torch.float16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # readable like the files beside it
    return time.monotonic() - started


def tokenizer_text(question: str) -> str:
    """A question as tokenizers are trained on it: the words of the teacher's template are worth tokens too."""
    return f"Question: {question}\nAnswer:\n"
