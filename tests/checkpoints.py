"""Tiny random checkpoints of several architectures, saved as ordinary model folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

PAD, BOS, EOS, TURN = "<pad>", "<bos>", "<eos>", "<turn>"
SPECIAL = (PAD, BOS, EOS, TURN)
CONTEXT = 256

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}{{ '<turn>' + message.role + ': ' + message.content + '\\n' }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<turn>assistant: ' }}{%- endif -%}"""
NO_SYSTEM_TEMPLATE = (
    "{%- if messages[0].role == 'system' -%}{{ raise_exception('System role not supported') }}{%- endif -%}"
    + CHAT_TEMPLATE
)

_SIZES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "num_key_value_heads": 2},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 1, "head_dim": 8},
    "gpt_neox": {"model_type": "gpt_neox"},
    "gpt2": {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": CONTEXT},
    "gemma3": {
        "model_type": "gemma3_text",
        "num_key_value_heads": 1,
        "head_dim": 8,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "mamba": {"model_type": "mamba", "state_size": 4},
}
ARCHITECTURES = tuple(_SIZES)
_WINDOW = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_SIZES |= {
    "llama_tied": {"model_type": "llama", "num_key_value_heads": 2, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "num_key_value_heads": 1, "sliding_window": 8},
    "gemma3_tied": _SIZES["gemma3"] | {"tie_word_embeddings": True, "final_logit_softcapping": 3.0},
    "gemma2": {"model_type": "gemma2", "num_key_value_heads": 1, "head_dim": 8, "query_pre_attn_scalar": 8, **_WINDOW}
    | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "cohere2": {"model_type": "cohere2", "num_key_value_heads": 1, "logit_scale": 0.25, **_WINDOW},
    "bloom": {"model_type": "bloom", "n_layer": 2, "n_head": 2},
    "llama4": {"model_type": "llama4_text", "attention_chunk_size": 8, "num_local_experts": 2, "head_dim": 8}
    | {"intermediate_size_mlp": 32, "no_rope_layers": [1, 0], "num_key_value_heads": 1},
    "falcon_h1": {"model_type": "falcon_h1", "num_key_value_heads": 2, "mamba_d_ssm": 16, "mamba_n_heads": 2}
    | {"mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1},
}
UNUSUAL = tuple(name for name in _SIZES if name not in ARCHITECTURES)
_SIZES["mixtral"] = {"model_type": "mixtral", "num_key_value_heads": 2, "num_local_experts": 2}


def tiny_tokenizer(
    vocab: str = "", chat_template: str | None = None, merges: tuple[tuple[str, str], ...] = ()
) -> PreTrainedTokenizerFast:
    """One token a byte, or one a character of `vocab`; after four special tokens. Puts BOS first, like Llama's.

    `merges` of two tokens each add one.
    """
    letters = sorted(set(vocab)) or sorted(pre_tokenizers.ByteLevel.alphabet())
    merged = [one + other for one, other in merges]
    ids = {token: number for number, token in enumerate((*SPECIAL, *letters, *merged))}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=list(merges)))
    if vocab:
        tokenizer.decoder = decoders.Fuse()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, ids[BOS])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        chat_template=chat_template,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def save_tiny_checkpoint(
    folder: Path,
    architecture: str = "llama",
    vocab: str = "",
    seed: int = 0,
    chat_template: str | None = None,
    merges: tuple[tuple[str, str], ...] = (),
    **options: Any,
) -> Path:
    """Save a random model of one of `ARCHITECTURES` (2 layers of 16) with its tokenizer in `folder`; returns it.

    `vocab` holds the characters the model knows; none means every byte. `merges` are the tokenizer's, `options` those
    of the config. Weights are large enough that the distributions are far from uniform.
    """
    tokenizer = tiny_tokenizer(vocab, chat_template, merges)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
    }
    config = AutoConfig.for_model(**{**sizes, **_SIZES[architecture], **options}, vocab_size=len(tokenizer), **special)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    model.generation_config = GenerationConfig(**special)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
