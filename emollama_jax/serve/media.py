"""The bytes of a medium from the URL of a request: a data URI, or a host that the server allows.

Fetching for others is how servers are led into their own network (OWASP's "Server Side Request
Forgery"). So no host is allowed unless it is named at start; every address that its name resolves
to must be public, and the connection goes to the address that was checked, not to the name again;
redirects are refused; size and time are bounded; proxies of the environment are not used.
"""

import asyncio
import base64
import binascii
import dataclasses
import ipaddress
import re
import socket
import urllib.parse

from emollama_jax.serve.faults import Fault, invalid

FETCH = 10.0  # seconds for a medium of another host

_DATA = re.compile(r"data:([\w.+-]+/[\w.+-]+)?((?:;[\w.+-]+=[^;,]*)*)(;base64)?,")


@dataclasses.dataclass(frozen=True)
class Fetching:
    """What may be fetched."""

    hosts: frozenset[str]  # names, in lower case
    size: int  # most bytes


async def load(url: str, fetching: Fetching, *, param: str) -> bytes:
    """The bytes of a medium.

    Args:
        url: of a request.
        fetching: what may be fetched.
        param: the field that the URL is in.

    Raises:
        Fault: neither a data URI nor an allowed address, or it cannot be read.
    """
    if url[:5].lower() == "data:":
        return await asyncio.to_thread(from_data, url, param=param)
    scheme = urllib.parse.urlsplit(url).scheme.lower() if len(url) < 4096 and _parses(url) else ""
    if scheme not in ("http", "https"):
        raise invalid(
            f"{param}: wanted data:image/jpeg;base64,… or an http(s) address of an allowed host",
            param,
            "invalid_url",
        )
    return await _fetch(url, fetching, param=param)


def from_data(url: str, *, param: str) -> bytes:
    """The content of a data URI (RFC 2397) in base64.

    Raises:
        Fault: none such, or empty.
    """
    head = _DATA.match(url[:512])
    if head is None or head[3] is None:
        raise invalid(
            f"{param}: a data URI without ;base64, (wanted data:image/jpeg;base64,…)",
            param,
            "invalid_data_uri",
        )
    text = url[head.end() :]
    if "%" in text[:4096]:
        text = urllib.parse.unquote(text)
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise invalid(f"{param}: broken base64 ({error})", param, "invalid_base64") from None
    if not data:
        raise invalid(f"{param}: an empty data URI", param, "invalid_data_uri")
    return data


def _parses(url: str) -> bool:
    try:
        urllib.parse.urlsplit(url).port  # noqa: B018 - read for the error that it raises
    except ValueError:
        return False
    return True


async def _fetch(url: str, fetching: Fetching, *, param: str) -> bytes:
    split = urllib.parse.urlsplit(url)
    host = (split.hostname or "").lower()
    if host not in fetching.hosts:
        raise invalid(
            f"{param}: the server fetches nothing from {host[:100] or 'there'}: send the file as "
            "a data URI",
            param,
            "host_not_allowed",
        )
    try:
        async with asyncio.timeout(FETCH):
            port = split.port or {"http": 80, "https": 443}[split.scheme.lower()]
            return await _get(split, await address(host, port), fetching.size, param)
    except TimeoutError:
        raise invalid(f"{param}: not here within {FETCH:g} s", param, "fetch_failed") from None


async def address(host: str, port: int) -> str:
    """An address of a host; all that it has must be public.

    Raises:
        Fault: unknown, or one of them is private, of this machine, reserved or multicast.
    """
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise invalid(f"{host}: no such host", code="fetch_failed") from None
    addresses = [str(entry[4][0]) for entry in found]
    for text in addresses:
        if not is_public(text):
            raise invalid(
                f"{host}: leads to a private address: not fetched", code="host_not_allowed"
            )
    return addresses[0]


def is_public(text: str) -> bool:
    """Whether an address is of the internet: global, and so is an IPv4 address inside it."""
    try:
        found = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo or (None, None))[1]
        if inner is not None and not inner.is_global:
            return False
        if found in _NAT64:  # the last 32 bits are an IPv4 address (RFC 6052)
            return is_public(str(ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)))
    return found.is_global and not found.is_multicast


_NAT64 = ipaddress.ip_network("64:ff9b::/96")


async def _get(split: urllib.parse.SplitResult, where: str, size: int, param: str) -> bytes:
    """The answer of a host at one of its addresses; the name still decides the certificate."""
    import httpx2

    name = split.hostname or ""
    there = f"[{where}]" if ":" in where else where
    port = f":{split.port}" if split.port else ""
    target = split._replace(netloc=there + port, fragment="").geturl()
    parts: list[bytes] = []
    got = 0
    try:
        async with (
            httpx2.AsyncClient(trust_env=False, follow_redirects=False) as client,
            client.stream(
                "GET",
                target,
                headers={"Host": name + port, "Accept-Encoding": "identity"},
                extensions={"sni_hostname": name},
            ) as answer,
        ):
            if answer.status_code != 200:
                raise invalid(
                    f"{param}: {name} answered {answer.status_code}, wanted 200", param,
                    "fetch_failed",
                )  # fmt: skip
            async for part in answer.aiter_raw():
                got += len(part)
                if got > size:
                    raise Fault(
                        413, f"{param}: over {size:,} bytes", param=param, code="media_too_large"
                    )
                parts.append(part)
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        what = type(error).__name__
        raise invalid(f"{param}: not fetched ({what})", param, "fetch_failed") from None
    return b"".join(parts)
