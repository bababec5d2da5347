"""The hf sampler against `generate` and against the model's own probabilities."""

import json
from collections import Counter
from functools import wraps
from itertools import product
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM

from orpo_distill.errors import ModelError
from orpo_distill.models import load_model, load_tokenizer
from orpo_distill.records import FinishReason, Message
from orpo_distill.samplers import Completion, Decoding, Request
from orpo_distill.samplers.cache import manages
from orpo_distill.samplers.decode import SEATS, Job, Rules, decode
from orpo_distill.samplers.generate import decode_by_generate
from orpo_distill.samplers.hf import HF, Engine
from orpo_distill.samplers.prompts import encode_prompt
from tests.checkpoints import ARCHITECTURES, CHAT_TEMPLATE, CONTEXT, save_tiny_checkpoint

QUESTIONS = ("hello", "what is 2 + 3?", "a", "the quick brown fox jumps over it")
GREEDY = Decoding(temperature=0, max_new_tokens=30)


def request(question: str, index: int = 0) -> Request:
    return Request(question, index, (Message("user", question),), seed=1000 * len(question) + index)


def complete(folder: Path, requests: list[Request], decoding: Decoding, rows: int = 512) -> list[Completion]:
    """Completions in the order of the requests."""
    with HF(rows=rows).open(str(folder)) as generate:
        found = {completion.request: completion for completion in generate(requests, decoding)}
    assert len(found) == len(requests)
    return [found[one] for one in requests]


def by_generate(folder: Path, question: str, tokens: int) -> str:
    """What plain `generate` writes, without sampling."""
    model, tokenizer = load_model(str(folder)), load_tokenizer(str(folder))
    prompt = torch.tensor([encode_prompt(tokenizer, (Message("user", question),))])
    output = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=tokens, pad_token_id=0
    )
    return tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_equals_generate(tmp_path: Path, architecture: str) -> None:
    """Rows of different lengths leave and join: 12 requests, at most 5 rows. Gemma's window is 8 tokens."""
    folder = save_tiny_checkpoint(tmp_path, architecture, chat_template=CHAT_TEMPLATE)
    requests = [request(question, index) for question in QUESTIONS for index in range(3)]
    for completion in complete(folder, requests, GREEDY, rows=5):
        assert completion.text == by_generate(folder, completion.request.problem_id, 30)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_sample_does_not_depend_on_its_neighbours(tmp_path: Path, architecture: str) -> None:
    folder = save_tiny_checkpoint(tmp_path, architecture)
    requests = [request(question, index) for question in QUESTIONS for index in range(3)]
    decoding = Decoding(temperature=1, top_p=0.95, max_new_tokens=25)
    together = complete(folder, requests, decoding)
    assert together == complete(folder, list(reversed(requests)), decoding, rows=5)[::-1]
    assert together[::4] == [complete(folder, [one], decoding)[0] for one in requests[::4]]
    assert len({completion.text for completion in together}) == 12


@pytest.mark.parametrize("architecture", ["llama", "mamba"])
@pytest.mark.parametrize("decoding", [{"temperature": 0.7}, {"temperature": 1.3, "top_k": 3}, {"top_p": 0.6}])
def test_samples_follow_the_models_probabilities(tmp_path: Path, architecture: str, decoding: dict[str, float]) -> None:
    """Two tokens, 3,000 samples: chi-square over all pairs with an expected count of 5 or more.

    The statistic has a mean of its degrees of freedom and a standard deviation of sqrt(2 df); 4 of them are allowed.
    """
    folder = save_tiny_checkpoint(tmp_path, architecture, vocab="abc")
    settings = Decoding(max_new_tokens=2, **decoding)
    requests = [Request("q", index, (Message("user", "cab"),), seed=index) for index in range(3000)]
    with HF().open(str(folder)) as generate:
        assert isinstance(generate, Engine)
        run = decode if generate.own_loop else decode_by_generate
        prompt = tuple(encode_prompt(generate.tokenizer, requests[0].messages))
        jobs = [Job(index, prompt, one.seed, 2) for index, one in enumerate(requests)]
        found = Counter(tuple(drawn.tokens) for drawn in run(generate.model, jobs, Rules(settings, ends=()), 512))
        expected = {
            (first, second): 3000 * p * q
            for first, p in enumerate(probabilities(generate.model, prompt, settings))
            for second, q in enumerate(probabilities(generate.model, (*prompt, first), settings))
        }
    assert {pair for pair in found if expected[pair] == 0} == set()
    cells = [pair for pair, count in expected.items() if count >= 5]
    statistic = sum((found[cell] - expected[cell]) ** 2 / expected[cell] for cell in cells)
    assert len(cells) > 3
    assert statistic < len(cells) + 4 * (2 * len(cells)) ** 0.5


def probabilities(model: torch.nn.Module, ids: tuple[int, ...], decoding: Decoding) -> list[float]:
    """The next token's distribution by definition: sort, cut, renormalise."""
    with torch.no_grad():
        p = (model(torch.tensor([ids])).logits[0, -1].double() / decoding.temperature).softmax(-1)
    order = p.argsort(descending=True)
    if decoding.top_k:
        p[order[decoding.top_k :]] = 0
    p = p / p.sum()
    before = p[order].cumsum(0) - p[order]
    p[order[before >= decoding.top_p]] = 0
    return (p / p.sum()).tolist()


def test_defaults_of_the_checkpoint_do_not_leak_in(tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path)
    decoding = Decoding(temperature=1, max_new_tokens=20)
    before = complete(folder, [request("hello")], decoding)
    config = GenerationConfig.from_pretrained(folder)
    config.update(do_sample=True, top_k=1, temperature=0.1, repetition_penalty=5.0)
    config.save_pretrained(folder)
    assert complete(folder, [request("hello")], decoding) == before


def greedy_ids(folder: Path, question: str) -> list[int]:
    model, tokenizer = load_model(str(folder)), load_tokenizer(str(folder))
    prompt = torch.tensor([encode_prompt(tokenizer, (Message("user", question),))])
    return model.generate(prompt, do_sample=False, max_new_tokens=30, pad_token_id=0)[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("architecture", ["gpt_neox", "mamba"])
@pytest.mark.parametrize("place", [0, 7])
def test_an_end_token_of_the_generation_config_ends_the_text(tmp_path: Path, architecture: str, place: int) -> None:
    folder = save_tiny_checkpoint(tmp_path, architecture)
    ids = greedy_ids(folder, "hello")
    end = ids[place]
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": [2, end]}))
    (completion,) = complete(folder, [request("hello")], GREEDY)
    assert completion.finish_reason is FinishReason.STOP
    assert completion.completion_tokens == ids.index(end)
    assert completion.text == load_tokenizer(str(folder)).decode(ids[: ids.index(end)], skip_special_tokens=True)


def test_a_text_that_is_cut_says_so(tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path, vocab="abcdefgh", seed=3)
    (completion,) = complete(folder, [request("abc")], GREEDY)
    assert (completion.finish_reason, completion.completion_tokens) == (FinishReason.LENGTH, 30)


@pytest.mark.parametrize("architecture", ["llama", "mamba"])
def test_stop_texts_are_cut_off(tmp_path: Path, architecture: str) -> None:
    """Each character is a token; the stop text is two characters of the greedy text, wherever they first occur."""
    folder = save_tiny_checkpoint(tmp_path, architecture, vocab="abcdefgh", seed=3)
    (whole,) = complete(folder, [request("abc")], GREEDY)
    stop = whole.text[11:13]
    (cut,) = complete(folder, [request("abc")], GREEDY.model_copy(update={"stop": ("zz", stop)}))
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason is FinishReason.STOP
    assert cut.completion_tokens is not None and len(cut.text) + 2 <= cut.completion_tokens < 30


def test_a_prompt_that_leaves_no_room_is_a_failed_sample(tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path)
    failed, fine = complete(folder, [request("x" * CONTEXT), request("hello")], GREEDY)
    assert (failed.finish_reason, failed.text) == (FinishReason.ERROR, "")
    assert str(CONTEXT) in failed.error
    assert fine.finish_reason is not FinishReason.ERROR


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_context_ends_a_text(tmp_path: Path, architecture: str) -> None:
    """A row that is done waits for its neighbour without running past the learned positions of GPT-2."""
    folder = save_tiny_checkpoint(tmp_path, architecture, vocab="abcd", seed=1)
    decoding = Decoding(temperature=1, max_new_tokens=40)
    texts = complete(folder, [request("a" * (CONTEXT - 5)), request("bad")], decoding)
    assert texts[0].completion_tokens is not None and texts[0].completion_tokens <= 5
    assert texts[0].prompt_tokens is not None and texts[0].prompt_tokens > CONTEXT - 5


def test_no_requests_no_completions(tmp_path: Path) -> None:
    assert complete(save_tiny_checkpoint(tmp_path), [], GREEDY) == []


class Small(LlamaForCausalLM):
    """Runs out of memory with more than three rows, or a prompt of more than 30 tokens."""

    @wraps(LlamaForCausalLM.forward)
    def forward(self, input_ids: torch.Tensor, **options: object) -> object:
        if input_ids.shape[0] > 3 or input_ids.shape[1] > 30:
            raise torch.OutOfMemoryError("simulated")
        return super().forward(input_ids=input_ids, **options)


@pytest.mark.parametrize("run", [decode, decode_by_generate])
def test_out_of_memory_halves_the_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str], run: object) -> None:
    folder = save_tiny_checkpoint(tmp_path)
    small = Small.from_pretrained(folder).eval()
    rules = Rules(Decoding(temperature=1), ends=(2,))
    jobs = [Job(index, (1, 5 + index % 4, 7), seed=index, limit=10) for index in range(12)]
    plain = sorted(decode(load_model(str(folder)), jobs, rules, 12), key=lambda drawn: drawn.index)
    capsys.readouterr()
    assert sorted(run(small, jobs, rules, 12), key=lambda drawn: drawn.index) == plain
    assert "with 3 rows" in capsys.readouterr().err

    found = {drawn.index: drawn for drawn in run(small, [Job(99, (1,) * 40, 0, 10), *jobs], rules, 12)}
    assert found[99].error == "out of memory with one row"
    assert [found[job.index] for job in jobs] == plain


def test_a_model_with_its_own_cache_says_so_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    complete(save_tiny_checkpoint(tmp_path, "mamba"), [request("a"), request("bb")], GREEDY, rows=1)
    assert capsys.readouterr().err.count("sampling through `generate`") == 1


def test_prompts_of_one_token(tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path)
    model, tokenizer = load_model(str(folder)), load_tokenizer(str(folder))
    jobs = [Job(number, (token,), number, 5) for number, token in enumerate((1, 9, 20))]
    found = {drawn.index: drawn.tokens for drawn in decode(model, jobs, Rules(GREEDY, ends=()), 8)}
    for job in jobs:
        ids = torch.tensor([job.prompt])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=5)
        assert found[job.index][: expected.shape[1] - 1] == expected[0, 1:].tolist()
    assert tokenizer.eos_token_id == 2


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers for it
def test_a_lora_adapter_is_loaded_with_its_base(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    folder = save_tiny_checkpoint(tmp_path / "base")
    base = load_model(str(folder))
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    (plain,) = complete(folder, [request("hello")], GREEDY)
    (text,) = complete(tmp_path / "adapter", [request("hello")], GREEDY)
    assert text.text != plain.text
    ids = torch.tensor([encode_prompt(load_tokenizer(str(folder)), request("hello").messages)])
    output = adapted.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=30)
    assert text.text == load_tokenizer(str(folder)).decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def test_every_combination_of_rows_gives_the_same_texts(tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path, vocab="abc", seed=5)
    requests = [request(question, index) for question, index in product(("a", "bab", "cabab"), range(7))]
    decoding = Decoding(temperature=1, max_new_tokens=100)
    expected = complete(folder, requests, decoding, rows=1)
    for rows in (2, 6, 20):
        assert complete(folder, requests, decoding, rows=rows) == expected


def test_prompts_of_any_length_and_more_samples_than_seats(tmp_path: Path) -> None:
    """Long prompts leave before short ones join, and one prompt's samples need two places in the cache."""
    model = load_model(str(save_tiny_checkpoint(tmp_path, vocab="abc", seed=5)))
    prompts = [tuple(4 + (7 * n + n // 5) % 3 for n in range(length)) for length in (150, 90, 20, 2, 1)]
    asked = [*prompts, *(prompts[3] for _ in range(SEATS))]
    jobs = [Job(number, prompt, number, 70 if number % 3 else 20) for number, prompt in enumerate(asked)]
    rules = Rules(Decoding(temperature=1), ends=(2,))
    expected = sorted(decode(model, jobs, rules, 1), key=lambda drawn: drawn.index)
    for rows in (2, 7, 64):
        assert sorted(decode(model, jobs, rules, rows), key=lambda drawn: drawn.index) == expected


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("gemma2", {"sliding_window": 8, "attn_logit_softcapping": 0.5}),
        ("mistral", {"sliding_window": 8}),
        ("olmo2", {}),
    ],
)
def test_greedy_equals_generate_with_capped_and_windowed_attention(kind: str, options: dict[str, object]) -> None:
    model = random_model(kind, **options)
    assert manages(model)
    jobs = [Job(number, tuple(range(5, 15 + 4 * number)), number, 30) for number in range(3)]
    for drawn in decode(model, jobs, Rules(GREEDY, ends=()), 8):
        prompt = torch.tensor([jobs[drawn.index].prompt])
        mask = torch.ones_like(prompt)
        output = model.generate(prompt, attention_mask=mask, do_sample=False, max_new_tokens=30, pad_token_id=0)
        assert drawn.tokens[: output.shape[1] - prompt.shape[1]] == output[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 1}),  # sinks: weight that goes to no token
        ("llama4_text", {}),  # attention in chunks
        ("bloom", {}),  # positions inside attention
    ],
)
def test_other_attention_is_left_to_generate(kind: str, options: dict[str, object]) -> None:
    assert not manages(random_model(kind, **options))


def random_model(kind: str, **options: object) -> torch.nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    heads = {"num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": CONTEXT}
    ids = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(kind, **sizes, **heads, **ids, initializer_range=0.3, **options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


def test_a_missing_model_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="found nothing at"), HF().open(str(tmp_path / "nowhere" / "x")):
        pass
