"""The vllm sampler: its own mistakes here, its contract against vLLM's engine in `make test-vllm`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, LlamaForCausalLM

from benchmarks.environments import checkpoint, python_of
from orpo_distill.errors import ConfigError, ModelError
from orpo_distill.ledger import Ledger
from orpo_distill.models import load_model, load_tokenizer
from orpo_distill.records import FinishReason, Message, Pair, Score, read_jsonl
from orpo_distill.samplers import Completion, Decoding, Generate, Request
from orpo_distill.samplers.hf import HF
from orpo_distill.samplers.openai import OpenAI
from orpo_distill.samplers.prompts import encode_prompt
from orpo_distill.samplers.vllm import VLLM, root_cause
from orpo_distill.stages.score import ScoreOptions, score
from orpo_distill.stages.scorer import ScorerOptions, ScoreServer, scorer
from tests.checkpoints import CHAT_TEMPLATE, CONTEXT, save_tiny_checkpoint
from tests.servers.vllm_serve import vllm_server
from tests.training import write_pairs

GREEDY = Decoding(temperature=0, max_new_tokens=30)
QUESTIONS = ("abc", "bad", "hedge a cab", "deaf head fed a bad cab " * 3)
engine_needed = pytest.mark.vllm


def request(question: str, index: int = 0) -> Request:
    return Request(question, index, (Message("user", question),), seed=1000 * len(question) + index)


def test_an_environment_without_vllm_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected vLLM in the environment of .* install vLLM in an environment"):
        VLLM(python=sys.executable).check()
    with pytest.raises(ConfigError, match=r"expected a Python interpreter at .*/nothing, found: No such file"):
        VLLM(python=tmp_path / "nothing").check()


def test_the_root_cause_is_the_first_error_that_is_not_about_another_process() -> None:
    log = [
        "INFO loading",
        "(EngineCore pid=7) ERROR 11-24 [core.py:1] ValueError: head size 8 is not supported",
        "RuntimeError: Engine core initialization failed. See root cause above.",
    ]
    assert root_cause(log) == "ValueError: head size 8 is not supported"
    assert root_cause(log[::2]) == ""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with heads of 32, the least that vLLM takes on a CPU."""
    folder = tmp_path_factory.mktemp("vllm") / "model"
    save_tiny_checkpoint(folder, vocab="abcdefgh ", chat_template=CHAT_TEMPLATE)
    config = AutoConfig.from_pretrained(folder)
    config.head_dim = 32
    with torch.random.fork_rng():
        torch.manual_seed(5)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def options() -> dict[str, object]:
    python = str(python_of("vllm"))
    return {"python": python, "dtype": "float32", "gpu_memory_utilization": 0.1, "extra": {"enforce_eager": True}}


def sampler(**more: object) -> VLLM:
    return VLLM.model_validate(options() | more)


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Generate]:
    with sampler().open(str(model)) as generate:
        yield generate


def complete(generate: Generate, requests: list[Request], decoding: Decoding) -> list[Completion]:
    """Completions in the order of the requests, each of which is answered once."""
    answers = list(generate(requests, decoding))
    found = {completion.request: completion for completion in answers}
    assert len(answers) == len(found) == len(requests)
    return [found[one] for one in requests]


def by_hf(folder: Path, requests: list[Request], decoding: Decoding) -> list[Completion]:
    with HF().open(str(folder)) as generate:
        return complete(generate, requests, decoding)


@engine_needed
def test_greedy_completions_are_those_of_the_hf_sampler(model: Path, engine: Generate) -> None:
    """Texts, counts and reasons to end; a prompt that leaves no room; stop texts."""
    requests = [request(question, index) for question in QUESTIONS for index in range(3)] + [request("a" * CONTEXT)]
    expected = by_hf(model, requests, GREEDY)
    assert complete(engine, requests, GREEDY) == expected
    assert expected[-1].finish_reason is FinishReason.ERROR
    stop = max((one.text for one in expected), key=len)[4:6]
    stopping = GREEDY.model_copy(update={"stop": ("zz", stop)})
    for found, reference in zip(complete(engine, requests, stopping), by_hf(model, requests, stopping), strict=True):
        assert (found.text, found.finish_reason) == (reference.text, reference.finish_reason)


@engine_needed
def test_a_sample_does_not_depend_on_its_neighbours(engine: Generate) -> None:
    decoding = Decoding(temperature=1, top_p=0.95, max_new_tokens=25)
    requests = [request(question, index) for question in QUESTIONS for index in range(8)]
    together = complete(engine, requests, decoding)
    assert together == complete(engine, requests[::-1], decoding)[::-1]
    assert together[::9] == [complete(engine, [one], decoding)[0] for one in requests[::9]]
    assert len({completion.text for completion in together}) > 20


@engine_needed
@pytest.mark.parametrize("settings", [{"temperature": 0.7}, {"temperature": 1.3, "top_k": 3}])
def test_samples_follow_the_models_probabilities(model: Path, engine: Generate, settings: dict[str, float]) -> None:
    """One token, 2,000 samples: chi-square with 4 standard deviations allowed. Special tokens have one text: none."""
    decoding = Decoding(max_new_tokens=1, **settings)
    requests = [request("cab", index) for index in range(2000)]
    found = Counter(completion.text for completion in complete(engine, requests, decoding))
    tokenizer = load_tokenizer(str(model))
    ids = torch.tensor([encode_prompt(tokenizer, requests[0].messages)])
    with torch.no_grad():
        logits = load_model(str(model))(ids).logits[0, -1].double() / decoding.temperature
    if decoding.top_k:
        logits[logits < logits.topk(decoding.top_k).values[-1]] = float("-inf")
    expected: Counter[str] = Counter()
    for token, probability in enumerate(logits.softmax(-1).tolist()):
        expected[tokenizer.decode([token], skip_special_tokens=True)] += 2000 * probability
    assert all(expected[text] > 0 for text in found)
    cells = [text for text, count in expected.items() if count >= 5]
    statistic = sum((found[cell] - expected[cell]) ** 2 / expected[cell] for cell in cells)
    assert statistic < len(cells) + 4 * (2 * len(cells)) ** 0.5


@engine_needed
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_is_applied(model: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(load_model(str(model)), config)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.normal_(std=0.2)
    adapted.save_pretrained(tmp_path)
    requests = [request(question) for question in QUESTIONS]
    expected = by_hf(tmp_path, requests, GREEDY)
    assert [one.text for one in expected] != [one.text for one in by_hf(model, requests, GREEDY)]
    with sampler().open(str(tmp_path)) as generate:
        assert complete(generate, requests, GREEDY) == expected


@engine_needed
def test_an_engine_that_does_not_start_is_one_message(model: Path) -> None:
    reason = r"expected vLLM to sample from .*, found: .*max_model_len"
    with pytest.raises(ModelError, match=reason) as caught, sampler(max_model_len=2 * CONTEXT).open(str(model)):
        raise AssertionError("it opened")
    assert "Traceback" not in str(caught.value)


@engine_needed
def test_the_engine_dies_with_the_process_that_opened_it(model: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from orpo_distill.samplers.vllm import VLLM\n"
        f"with VLLM.model_validate({options()!r}).open({str(model)!r}) as engine:\n"
        "    print(engine.process.pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        os.killpg(worker, 0)
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.killpg(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.2)
    pytest.fail("the engine's processes are still there")


@engine_needed
def test_the_openai_sampler_against_vllm_serve(model: Path, tmp_path: Path) -> None:
    """Greedy answers are those of `hf`; n choices a call; a second run asks nothing; a wrong model is named."""
    four = [request(question, index) for question in QUESTIONS for index in range(4)]
    with vllm_server(model, tmp_path / "log") as url:
        paid = OpenAI(base_url=url, ledger=tmp_path / "ledger.sqlite")
        with paid.open("tiny") as generate:
            greedy = [one.text for one in complete(generate, [request(question) for question in QUESTIONS], GREEDY)]
        with paid.open("tiny") as generate:
            first = complete(generate, four, Decoding(max_new_tokens=20))
        with Ledger(paid.ledger_path) as ledger:
            calls = ledger.connection.execute("SELECT state, count(*) FROM attempts GROUP BY state").fetchall()
        missing = pytest.raises(ModelError, match=r"HTTP 404: The model `other` does not exist")
        with missing, paid.open("other") as generate:
            list(generate(four, GREEDY))
    with paid.open("tiny") as generate:  # the server is gone
        assert complete(generate, four, Decoding(max_new_tokens=20)) == first
    with HF(dtype="float32").open(str(model)) as generate:
        assert greedy == [one.text for one in complete(generate, [request(question) for question in QUESTIONS], GREEDY)]
    assert calls == [("settled", 2 * len(QUESTIONS))]
    assert len({one.text for one in first}) > len(QUESTIONS)


def arithmetic() -> list[Pair]:
    """Pairs as a run has them: a chosen text, a wrong one, and a wrong one that was cut; not all of it ASCII."""
    pairs = []
    for number in range(6):
        prompt = (Message("user", f"Ada has {number + 3} apples and eats one. How many are left?"),)
        right = f"She had {number + 3}, and {number + 3} - 1 = {number + 2}. The answer is {number + 2}."
        wrong = f"\u00c9mile says: \u201cone more\u201d \U0001f34e: {number + 4}.\n\nThe answer is {number + 4}"
        cut = number % 2 == 1
        ids = (f"c{number}", f"r{number}")
        pairs.append(Pair(f"p{number}", prompt, right, wrong + "." * (not cut), *ids, "teacher", "student-0", cut))
    return pairs


@engine_needed
def test_vllms_server_scores_texts_as_the_score_stage_does(tmp_path: Path) -> None:
    """SmolLM2 in float32, in both ways: sums of 36 to 87 nats that differ by rounding alone, of the same tokens."""
    model = checkpoint()

    def scored(out: Path, server: ScoreServer | None = None) -> dict[str, Score]:
        out.mkdir()
        what = ScoreOptions(
            model=str(model), server=server, policy="teacher", prefix="Explain every step.", student=str(model)
        )
        metrics = score(what, {"pairs": write_pairs(out / "pairs", arithmetic())}, out)
        assert metrics["same_tokens"] is True
        return {one.trace_id: one for one in read_jsonl(out / "scores.jsonl", Score)}

    local = scored(tmp_path / "local")
    with vllm_server(model, tmp_path / "log") as url:
        api = OpenAI(base_url=url, ledger=tmp_path / "ledger.sqlite", price={"prompt": 1, "completion": 1})
        for way in ("prompt_logprobs", "echo"):
            server = ScoreServer(sampler=api, model="tiny", way=way)
            assert scorer(ScorerOptions(server=server, tokenizer=str(model)), {}, tmp_path) == {"scoring": way}
            found = scored(tmp_path / way, server)
            assert found.keys() == local.keys()
            for name, one in found.items():
                assert (one.tokens, one.entropy) == (local[name].tokens, None)
                assert one.logp_sum == pytest.approx(local[name].logp_sum, abs=1e-3), name
    with Ledger(api.ledger_path) as ledger:
        attempts = ledger.connection.execute("SELECT state, count(*) FROM attempts GROUP BY state").fetchall()
        bought = ledger.connection.execute("SELECT sum(completion) = count(*), sum(prompt + completion) FROM attempts")
        assert bought.fetchone() == (1, ledger.spent(api.account).tokens)
    assert attempts == [("settled", 2 * (1 + len(local)))]
    assert min(one.logp_sum for one in local.values()) < -20
