"""Any OpenAI-compatible server: a vendor's API, or vLLM, SGLang or llama.cpp on another machine.

Everything bought goes through the ledger (`orpo_distill.ledger`), so that no sample is paid for twice.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from orpo_distill.component import SPEED_ONLY, Options
from orpo_distill.errors import ConfigError, MissingVariable, ModelError, RunError, missing_extra
from orpo_distill.ledger import BudgetReached, Ledger, Spent, Usage, reading
from orpo_distill.ledger_file import PATIENCE, default_path
from orpo_distill.samplers import Decoding, Generate, Sampler
from orpo_distill.samplers.replies import Thinking

if TYPE_CHECKING:
    from orpo_distill.samplers.asking import Asking

MILLION = 1_000_000
MEND = "mend the sampler's options or the key"
LOCK_PATIENCE = 5.0  # seconds for another process's transaction, before that is said and waited for again
OWN_FIELDS = {
    *("model", "messages", "prompt", "n", "seed", "stream", "temperature", "top_p", "top_k", "stop"),
    *("max_tokens", "max_completion_tokens", "best_of"),
}
Share = Annotated[float, Field(ge=0, le=1)]


class Price(Options):
    """Money per million tokens, in any currency. A kind that is not given costs what its whole does."""

    prompt: NonNegativeFloat = 0.0
    completion: NonNegativeFloat = 0.0
    cached_prompt: NonNegativeFloat | None = None
    reasoning: NonNegativeFloat | None = None
    batch: Share = 0.5  # of these in a batch

    def of(self, usage: Usage) -> float:
        """What a reply costs."""
        cached = self.prompt if self.cached_prompt is None else self.cached_prompt
        reasoning = self.completion if self.reasoning is None else self.reasoning
        prompt = (usage.prompt - usage.cached_prompt) * self.prompt + usage.cached_prompt * cached
        completion = (usage.completion - usage.reasoning) * self.completion + usage.reasoning * reasoning
        return (prompt + completion) / MILLION

    def most(self, prompt: int, completion: int) -> float:
        """The most that so many tokens can cost."""
        dearest = max(self.prompt, self.cached_prompt or 0.0), max(self.completion, self.reasoning or 0.0)
        return (prompt * dearest[0] + completion * dearest[1]) / MILLION


class Budget(Options):
    """The most that an account may come to, requests in flight and unsettled ones counted at their maximum."""

    money: NonNegativeFloat | None = None
    tokens: NonNegativeInt | None = None
    calls: NonNegativeInt | None = None

    @property
    def limits(self) -> dict[str, float]:
        """Those that are set."""
        return {name: value for name, value in self if value is not None}


class OpenAI(Sampler):
    """Asks a server over HTTP and keeps what it bought in the ledger. Needs the extra `api`."""

    shards: ClassVar[bool] = False  # one process keeps the rates and the budget
    heals: ClassVar[bool] = True

    base_url: Annotated[str | tuple[str, ...], SPEED_ONLY]  # ".../v1"; several are replicas of one model
    endpoint: Annotated[str, SPEED_ONLY] = ""  # its name in the ledger; default: the (first) base_url
    api_key_env: Annotated[str, SPEED_ONLY] = ""  # the environment variable that holds the key
    api: Literal["chat", "completions"] = "chat"
    tokenizer: str = ""  # hub id or folder: its chat template for `completions`, its counts for forecasts
    thinking: Thinking = "keep"  # what of a reasoning model's thinking the student learns
    length_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    extra_body: dict[str, Any] = Field(default_factory=dict)  # more fields of the request
    extra_headers: Annotated[dict[str, str], SPEED_ONLY] = Field(default_factory=dict)  # "$NAME": from the environment
    seeds: Annotated[bool, SPEED_ONLY] = True  # send a seed with requests for one sample
    n: Annotated[bool | None, SPEED_ONLY] = None  # ask for several samples at once; default: found out
    timeout: Annotated[PositiveFloat, SPEED_ONLY] = 600.0  # seconds for a reply
    batch: Annotated[bool, SPEED_ONLY] = False  # through the server's batch endpoint: hours instead of minutes, cheaper
    batch_poll: Annotated[PositiveFloat, SPEED_ONLY] = 30.0  # seconds between looks at a batch
    concurrency: Annotated[PositiveInt, SPEED_ONLY] = 32  # requests in flight
    requests_per_minute: Annotated[PositiveFloat | None, SPEED_ONLY] = None
    tokens_per_minute: Annotated[PositiveFloat | None, SPEED_ONLY] = None
    retries: Annotated[NonNegativeInt, SPEED_ONLY] = 6  # of a request, while others succeed
    patience: Annotated[PositiveFloat, SPEED_ONLY] = 300.0  # seconds without any success before the stage stops
    price: Annotated[Price, SPEED_ONLY] = Price()
    budget: Annotated[Budget, SPEED_ONLY] = Budget()
    ledger: Annotated[Path | None, SPEED_ONLY] = None  # default: the run's, see `Config.ledger`
    account: Annotated[str, SPEED_ONLY] = ""  # whose spending the budget limits; default: the run's name

    @field_validator("base_url")
    @classmethod
    def _urls(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        for url in (value,) if isinstance(value, str) else value:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"expected http://... or https://..., found {url!r}")
        if not value:
            raise ValueError("expected at least one address, found none")
        return value

    @field_validator("extra_body")
    @classmethod
    def _own_fields(cls, value: dict[str, Any]) -> dict[str, Any]:
        if taken := OWN_FIELDS & value.keys():
            raise ValueError(f"expected fields that the sampler does not set itself, found {', '.join(sorted(taken))}")
        return value

    @model_validator(mode="after")
    def _priced(self) -> Self:
        if self.budget.money is not None and not {"prompt", "completion"} <= self.price.model_fields_set:
            raise ValueError(
                "expected price.prompt and price.completion beside budget.money, found not both; a budget in money "
                "cannot hold without them (0 for what is really free)"
            )
        return self

    @property
    def urls(self) -> tuple[str, ...]:
        """The server's addresses."""
        return (self.base_url,) if isinstance(self.base_url, str) else self.base_url

    @property
    def path(self) -> str:
        """Where requests go, as a batch names it."""
        return "/v1/chat/completions" if self.api == "chat" else "/v1/completions"

    @property
    def known_as(self) -> str:
        """The endpoint's name in the ledger."""
        if self.endpoint:
            return self.endpoint
        scheme, _, rest = self.urls[0].partition("://")
        host, slash, path = rest.partition("/")
        return f"{scheme.lower()}://{host.lower()}{slash}{path}".rstrip("/")

    @property
    def ledger_path(self) -> Path:
        """Where the ledger stands."""
        return (self.ledger or default_path()).expanduser()

    def for_run(self, name: str, ledger: Path | None) -> Self:
        """The sampler with what it leaves open as the run has it: whose spending it is, and which ledger."""
        return self.model_copy(update={"account": self.account or name, "ledger": self.ledger or ledger})

    def spent(self) -> float | None:
        """What the account has come to, calls that may have been paid unseen at their maximum."""
        if not self.price.most(1, 1) or not self.ledger_path.is_file():
            return None
        with reading(self.ledger_path) as books:
            return books.spent(self.account).money

    def check(self) -> None:
        """Raises ConfigError without the package, MissingVariable without the key's environment variable."""
        try:
            import aiohttp  # noqa: F401
            import openai  # noqa: F401
            import uvloop  # noqa: F401
        except ImportError as error:
            raise missing_extra("openai[aiohttp] and uvloop", "api") from error
        self.secrets()

    def secrets(self) -> tuple[str, dict[str, str]]:
        """The key and the headers, from the environment. Raises MissingVariable for one that is not set."""
        headers = {
            name: _variable(value[1:], f"extra_headers.{name}") if value.startswith("$") else value
            for name, value in self.extra_headers.items()
        }
        return _variable(self.api_key_env, "api_key_env") if self.api_key_env else "", headers

    @property
    def secret_values(self) -> tuple[str, ...]:
        """What must not be shown or written: the key, and the headers that come from the environment."""
        key, headers = self.secrets()
        return key, *(headers[name] for name, value in self.extra_headers.items() if value.startswith("$"))

    @property
    def terms(self) -> str:
        """The price at which a request leaves, as the ledger keeps it until it is settled."""
        price = self.price if self.batch else self.price.model_copy(update={"batch": 1.0})
        return price.model_dump_json()

    def cost(self, usage: Usage, terms: str = "") -> float:
        """What a reply costs, at the `terms` at which its request left, or at those of now."""
        price = Price.model_validate_json(terms or self.terms)
        return price.of(usage) * price.batch

    def most(self, prompt: int, completion: int) -> Spent:
        """The most that one request of so many tokens may cost."""
        money = self.price.most(prompt, completion) * (self.price.batch if self.batch else 1.0)
        return Spent(money, prompt + completion, 1)

    def over_budget(self, error: BudgetReached, missing: int) -> RunError:
        """The error for a budget that ends before the samples do."""
        limit, spent, most = error.limit, getattr(error.spent, error.limit), getattr(error.most, error.limit)
        return RunError(
            f"expected the {missing} missing samples within the budget of {amount(self.budget.limits[limit])} {limit}, "
            f"found {amount(spent)} spent or under way and up to {amount(most)} more for the next request; what was "
            f"bought is kept: raise sampler.budget.{limit}, or lower problems.limit or samples, and run the same "
            "command"
        )

    def unusable(self, found: str, do: str = "answer", otherwise: str = MEND) -> ModelError:
        """The error for a server that cannot do what is expected of it."""
        plain = [url for url in self.urls if not re.search(r"/v\d", url)]
        hint = f" (does {plain[0]} lack /v1 at its end?)" if plain and "HTTP 404" in found else ""
        return ModelError(
            f"expected {self.known_as} to {do}, found: {found}{hint}; {otherwise}, or see to the server, then run the "
            "same command: what was bought is kept"
        )

    def left_in_batch(self) -> RunError:
        """The error for samples that a batch holds which nobody waits for."""
        return RunError(
            f"expected sampler.batch: true while a batch of {self.known_as} holds samples of this run, found false; "
            "set it until that batch has come back: what it holds is paid for"
        )

    def open(self, model: str) -> AbstractContextManager[Generate]:
        """Open the ledger; `model` is what the server calls it. Raises ConfigError or RunError."""
        from orpo_distill.samplers.asking import Asking

        return self.buying(lambda decoding: Asking(self, model, decoding))

    @contextmanager
    def buying(self, asking: Callable[[Decoding], Asking]) -> Iterator[Generate]:
        """Open the ledger, to buy what is asked for so. Raises ConfigError or RunError."""
        from orpo_distill.samplers.batches import BatchPurchase
        from orpo_distill.samplers.buyer import Purchase
        from orpo_distill.samplers.unsaved import take_in

        self.check()
        with Ledger(self.ledger_path, PATIENCE if self.batch else LOCK_PATIENCE) as ledger:
            take_in(ledger)
            purchase = (BatchPurchase if self.batch else Purchase)(self, asking, ledger)
            try:
                yield purchase
            finally:
                purchase.stop()


def amount(number: float) -> str:
    """Money, tokens or calls with six digits that count, never in powers of ten."""
    return f"{number:,}" if isinstance(number, int) else f"{Decimal(f'{number:.6g}'):f}"


def _variable(name: str, where: str) -> str:
    if not (value := os.environ.get(name, "").strip()):
        raise MissingVariable(
            f"sampler.{where}: expected the environment variable {name} to be set, found that it is not; "
            f"export {name}=..."
        )
    if not (value.isascii() and value.isprintable()):
        raise ConfigError(
            f"sampler.{where}: expected plain letters in the environment variable {name}, found other characters; copy "
            "the key again"
        )
    return value
