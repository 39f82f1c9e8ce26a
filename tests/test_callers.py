"""Who a request is from, how urgent it is and how long it may take: from its headers and options to the engine."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from fakes import FakeLoader, FakeModel, make_store

from api.app import create_app
from api.models import Models
from api.options import merge_options
from api.settings import Settings
from tars_jax.engine.request import Request
from tars_jax.errors import InvalidRequest
from tars_jax.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_store(tmp_path)


def ask(
    store: Store,
    headers: dict[str, str] | None = None,
    *,
    address: str = "198.51.100.7",
    settings: Settings | None = None,
    loader: FakeLoader | None = None,
    **body: Any,
) -> tuple[httpx.Response, list[Request]]:
    """The answer to a request from an address, and what the engines were asked."""
    loader = loader or FakeLoader()

    async def send() -> httpx.Response:
        models = Models(store, settings or Settings(), load=loader.load, make_engine=loader.make_engine)
        transport = httpx.ASGITransport(create_app(models.settings, models), client=(address, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            answer = await client.post("/api/generate", json={"model": "fake", "prompt": "hi", "stream": False, **body}, headers=headers)
        loader.gate.set()
        await models.close()
        return answer

    answer = asyncio.run(send())
    return answer, [request for engine in loader.engines for request in engine.requests]


def client_of(store: Store, headers: dict[str, str] | None = None, **options: Any) -> str:
    _, (request,) = ask(store, headers, **options)
    return request.client


def test_a_key_names_the_client_and_is_not_kept(store: Store) -> None:
    bearer, other = (client_of(store, {"Authorization": f"Bearer {key}"}) for key in ("secret-1", "secret-2"))
    assert bearer != other
    assert bearer.startswith("key:")
    assert "secret" not in bearer
    assert client_of(store, {"authorization": "bearer  secret-1 "}, address="203.0.113.9") == bearer
    assert client_of(store, {"X-API-Key": "secret-1"}) == bearer


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer "}, {"Authorization": "Basic YTpi"}, {"X-API-Key": " "}])
def test_without_a_key_the_address_names_the_client(store: Store, headers: dict[str, str]) -> None:
    assert client_of(store, headers) == "address:198.51.100.7"


@pytest.mark.parametrize(
    ("address", "client"),
    [("2001:db8:1:2:3::4", "2001:db8:1:2::/64"), ("::ffff:198.51.100.7", "198.51.100.7"), ("fe80::1%eth0", "fe80::/64"), ("unix", "unix")],
)
def test_an_ipv6_network_is_one_client(store: Store, address: str, client: str) -> None:
    assert client_of(store, address=address) == f"address:{client}"


@pytest.mark.parametrize(
    ("proxies", "address", "client"),
    [
        ((), "127.0.0.1", "127.0.0.1"),
        (("10.0.0.0/8",), "127.0.0.1", "127.0.0.1"),
        (("10.0.0.0/8",), "10.1.2.3", "203.0.113.5"),  # the last address that is not a proxy's: those before are hearsay
    ],
)
def test_forwarded_addresses_are_believed_from_trusted_proxies_only(
    store: Store, proxies: tuple[str, ...], address: str, client: str
) -> None:
    headers = {"X-Forwarded-For": "192.0.2.1, 203.0.113.5, 10.9.9.9"}
    assert client_of(store, headers, address=address, settings=Settings(trusted_proxies=proxies)) == f"address:{client}"


def test_priority_and_time_come_from_options_and_headers_win(store: Store) -> None:
    _, (plain,) = ask(store)
    _, (optional,) = ask(store, options={"priority": 2, "timeout": 50})
    _, (both,) = ask(store, {"X-Request-Priority": "-3", "X-Request-Timeout": "20.5"}, options={"priority": 2, "timeout": 50})
    assert (plain.priority, plain.deadline) == (0, None)
    assert (optional.priority, both.priority) == (2, -3)
    assert optional.deadline is not None
    assert both.deadline is not None
    assert 0 < optional.deadline - optional.created <= 50
    assert 0 < both.deadline - both.created <= 20.5


@pytest.mark.parametrize(
    ("headers", "text"),
    [
        ({"X-Request-Priority": "high"}, "X-Request-Priority must be a whole number, got 'high'"),
        ({"X-Request-Priority": "9" * 5000}, "X-Request-Priority must be a whole number"),
        ({"X-Request-Timeout": "soon"}, "X-Request-Timeout must be a number of seconds above 0, got 'soon'"),
        ({"X-Request-Timeout": "0"}, "above 0"),
        ({"X-Request-Timeout": "nan"}, "above 0"),
        ({"X-Request-Timeout": "inf"}, "above 0"),
    ],
)
def test_headers_that_say_nothing_are_refused(store: Store, headers: dict[str, str], text: str) -> None:
    answer, requests = ask(store, headers)
    assert answer.status_code == 400
    assert text in answer.json()["error"]
    assert not requests


def test_time_must_be_above_zero() -> None:
    with pytest.raises(InvalidRequest, match=r"timeout must be a number of seconds above 0, got -1"):
        merge_options({"timeout": -1}, {})


def test_a_load_that_takes_too_long_is_a_504(store: Store) -> None:
    loader = FakeLoader()
    loader.gate.clear()
    answer, requests = ask(store, loader=loader, options={"timeout": 0.05})
    assert answer.status_code == 504
    assert "while its model was loading" in answer.json()["error"]
    assert not requests


def test_an_answer_that_begins_in_time_is_cut_and_says_so(store: Store) -> None:
    answer, _ = ask(store, loader=FakeLoader(FakeModel(timeout_after=2)))
    assert (answer.status_code, answer.json()["done_reason"], answer.json()["response"]) == (200, "timeout", "one two ")


def test_time_that_ends_before_the_answer_begins_is_a_504(store: Store) -> None:
    answer, _ = ask(store, loader=FakeLoader(FakeModel(timeout_after=0)))
    assert answer.status_code == 504
    assert "before its answer began" in answer.json()["error"]
