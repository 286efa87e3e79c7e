"""Who may ask."""

import hashlib
import re
from ipaddress import ip_address


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def is_loopback(host: str) -> bool:
    """Whether a host leads to this machine alone: a name or an address, or what a Host header says."""
    parts = re.fullmatch(r"\[(.*)\](?::\d+)?|([^:]*)(?::\d+)?", host)
    name = (parts[1] or parts[2]) if parts else host
    try:
        return name == "localhost" or ip_address(name).is_loopback
    except ValueError:
        return False
