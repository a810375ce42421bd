"""One GET request to a server that is not trusted: where it may lead, how long it may take, how much it may send.

A name is resolved here, and the connection goes to the addresses that were checked: a name that resolves to another address a
moment later (DNS rebinding) leads nowhere else. Redirects are followed here as well, each checked like the first address. An
`httpcore.NetworkBackend` does both, and gives every read what is left of the time, so that a server that sends a byte now and
then is cut off in time.

Through a proxy of the environment the proxy resolves names: an address in the URL, and a name that this machine can resolve, are
checked before; what the proxy connects to is up to the proxy.
"""

from __future__ import annotations

import base64
import functools
import importlib
import importlib.util
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from urllib.request import getproxies, proxy_bypass

from .pixels import Unfit

# The HTTP library of huggingface_hub, under the name that the installed release has.
_new = importlib.util.find_spec("httpx2") is not None
HTTP: Any = importlib.import_module("httpx2" if _new else "httpx")
CORE: Any = importlib.import_module("httpcore2" if _new else "httpcore")

MOST_REDIRECTS = 10
REDIRECTS = (301, 302, 303, 307, 308)
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
DOCUMENTATION = ipaddress.IPv6Network("3fff::/20")  # RFC 9637, which older releases of Python do not know
PRIVATE = "Download the images first, or pass --allow_private_image_urls if you trust every row"

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Limits(NamedTuple):
    """Of one download, redirects and further attempts included."""

    deadline: float  # of `time.monotonic`
    size: int  # bytes
    private: bool  # whether addresses that are not public may be asked

    @property
    def left(self) -> float:
        """Seconds; more than 0."""
        seconds = self.deadline - time.monotonic()
        if seconds <= 0:
            raise CORE.ReadTimeout("no time is left")
        return seconds


class Answer(NamedTuple):
    status: int
    content: bytes


def asked(url: str, limits: Limits) -> Answer:
    """The answer to a GET request, redirects followed. Content comes with status 200 alone.

    Raises:
        Unfit: for an address that may not be asked, and an answer that is too large.
        Exception: of the HTTP library.
    """
    at = HTTP.URL(url)
    login = at.username and (at.username, at.password)
    for _ in range(MOST_REDIRECTS + 1):
        with _response(at, login, limits) as response:
            if response.status not in REDIRECTS:
                return Answer(response.status, _content(response, limits) if response.status == 200 else b"")
            location = next((value for name, value in response.headers if name.lower() == b"location"), b"")
        to = at.join(location.decode("latin-1"))
        if to.scheme not in ("http", "https") or not to.host:
            raise Unfit("is a redirect to no web address", "Mend the address, or leave the row out")
        login = login if (to.scheme, to.host, to.port) == (at.scheme, at.host, at.port) else None
        at = to
    raise Unfit(f"is redirected more than {MOST_REDIRECTS} times", "Mend the address, or leave the row out")


@contextmanager
def _response(url: Any, login: Any, limits: Limits) -> Iterator[Any]:
    headers = {"Host": url.netloc, "User-Agent": "dpo_trainer", "Accept": "*/*", "Accept-Encoding": "identity"}
    if login:
        headers["Authorization"] = "Basic " + base64.b64encode(":".join(login).encode()).decode()
    target = CORE.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
    with _pool(url, limits) as pool, pool.stream("GET", target, headers=headers) as response:
        yield response


def _content(response: Any, limits: Limits) -> bytes:
    packed = {value.lower() for name, value in response.headers if name.lower() == b"content-encoding"}
    if packed - {b"identity"}:
        raise Unfit("comes compressed, which was not asked for", "Download the images first")
    content = bytearray()
    for chunk in response.iter_stream():
        content += chunk
        if len(content) > limits.size:
            raise Unfit(f"has more than {limits.size // 1_000_000} MB", "Download the images first, and shrink them")
    return bytes(content)


def _pool(url: Any, limits: Limits) -> Any:
    """Of connections to one server, or to the proxy that the environment names for it."""
    proxies = getproxies()
    proxy = None if proxy_bypass(url.host) else proxies.get(url.scheme) or proxies.get("all")
    if not proxy:
        backend = _Backend(limits, checked=not limits.private)
        return CORE.ConnectionPool(ssl_context=_certificates(), network_backend=backend)
    if not limits.private:
        _check_as_far_as_known(url.host, limits)
    place = HTTP.URL(proxy if "://" in proxy else f"http://{proxy}")
    kind = CORE.SOCKSProxy if place.scheme.startswith("socks") else CORE.HTTPProxy
    return kind(
        proxy_url=str(place.copy_with(username=None, password=None)),
        proxy_auth=(place.username, place.password) if place.username else None,
        ssl_context=_certificates(),
        network_backend=_Backend(limits, checked=False),  # a proxy may well stand on a private address
    )


@functools.cache
def _certificates() -> ssl.SSLContext:
    return HTTP.create_ssl_context()


# --- where a name leads ---


def _addresses(host: str, port: int, limits: Limits) -> list[str]:
    """Where a name leads, found in the time that is left. `getaddrinfo` has no time-out, and the server of names may be the
    one that is not trusted; so it works in a thread, which is left alone when the time is over.

    Raises:
        ConnectTimeout, ConnectError: of the HTTP library.
    """
    found: list[str] = []
    failed: list[Exception] = []

    def resolve() -> None:
        try:
            places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            found.extend(dict.fromkeys(str(place[4][0]) for place in places))
        except (OSError, UnicodeError) as error:
            failed.append(error)

    thread = threading.Thread(target=resolve, name="resolve an image's server", daemon=True)
    thread.start()
    thread.join(limits.left)
    if thread.is_alive():
        raise CORE.ConnectTimeout("the name was not resolved in time")
    if failed:
        raise CORE.ConnectError(str(failed[0])) from failed[0]
    return found


def _check_as_far_as_known(host: str, limits: Limits) -> None:
    try:
        found = _addresses(host, 0, limits)
    except CORE.ConnectError:  # the proxy knows more names
        return
    _check(found)


def _check(addresses: list[str]) -> None:
    if not all(is_public(ipaddress.ip_address(address)) for address in addresses):
        raise Unfit("leads to an address that is not public (loopback, link-local, private or reserved)", PRIVATE)


def is_public(address: Address) -> bool:
    """Whether an address is one of the internet, and of no part of it that is set aside; an IPv4 address inside decides."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo or (None, None))[1]
        if address in NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
        if address.is_site_local or address in DOCUMENTATION:
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


# --- connections ---


class _Backend(CORE.NetworkBackend):
    """Connects to checked addresses, within the time."""

    def __init__(self, limits: Limits, *, checked: bool):
        self.limits, self.checked, self.inner = limits, checked, CORE.SyncBackend()

    def connect_tcp(self, host: str, port: int, timeout: float | None = None, *args: Any, **kwargs: Any) -> Any:
        addresses = _addresses(host, port, self.limits)
        if self.checked:
            _check(addresses)
        for number, address in enumerate(addresses, start=1):
            try:
                return _Stream(self.inner.connect_tcp(address, port, self.limits.left, *args, **kwargs), self.limits)
            except (CORE.ConnectError, CORE.ConnectTimeout):
                if number == len(addresses):
                    raise
        raise CORE.ConnectError("the name has no address")

    def sleep(self, seconds: float) -> None:
        self.inner.sleep(min(seconds, self.limits.left))


class _Stream(CORE.NetworkStream):
    """Every operation may take what is left of the time, and no other time-out is set."""

    def __init__(self, inner: Any, limits: Limits):
        self.inner, self.limits = inner, limits

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self.inner.read(max_bytes, self.limits.left)

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self.inner.write(buffer, self.limits.left)

    def close(self) -> None:
        self.inner.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> Any:
        return _Stream(self.inner.start_tls(ssl_context, server_hostname, self.limits.left), self.limits)

    def get_extra_info(self, info: str) -> Any:
        return self.inner.get_extra_info(info)
