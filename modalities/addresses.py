"""Which addresses and names are the public Internet's.

The tables are ours: what `ipaddress` calls global differs between patch versions of Python, and
says nothing of clouds, whose own services answer at public addresses too.
"""

from __future__ import annotations

import ipaddress

# Networks that clouds answer their own machines at. Those within ranges of `_NOT_PUBLIC` stand here
# as well, because these are refused even where private addresses are not.
_CLOUDS = (
    # AWS, Google, Azure, Oracle, OpenStack, DigitalOcean, IBM, Tencent, Scaleway and others, at
    # link-local addresses: metadata (169.254.169.254), credentials (169.254.170.2), DNS, time.
    "169.254.0.0/16",
    # Azure's WireServer.
    # learn.microsoft.com/azure/virtual-network/what-is-ip-address-168-63-129-16
    "168.63.129.16/32",
    "192.0.0.192/32",  # Oracle Cloud Classic: docs.oracle.com, "Retrieving Instance Metadata"
    "100.100.100.200/32",  # Alibaba: alibabacloud.com/help/ecs, "Instance metadata"
    # IBM's services (github.com/ibm-cloud-docs/vpc, vpc-endpoints.md: DNS, mirrors, NTP) and its
    # service endpoints (github.com/IBM-Cloud/terraform-provider-ibm: `client_ip_pool` of a VPN
    # server names both as reserved).
    "161.26.0.0/16",
    "166.8.0.0/14",
    "fd00:ec2::/32",  # AWS: docs.aws.amazon.com/AWSEC2, "Access instance metadata": fd00:ec2::254
    "fd20:ce::/32",  # Google: cloud.google.com/compute/docs/metadata, IPv6-only: fd20:ce::254
    "fd00:c1::/32",  # Oracle: docs.oracle.com/iaas, "Instance Metadata": fd00:c1::a9fe:a9fe
    "fd00:42::/32",  # Scaleway: scaleway.com/docs/instances, "user data": fd00:42::42
    "fe80::a9fe:a9fe/128",  # OpenStack: docs.openstack.org/nova, "Metadata service"
)

# https://www.iana.org/assignments/iana-ipv4-special-registry, and what is no unicast address. Also
# what is globally reachable there: it serves a purpose of its own, and media are not among them.
_NOT_PUBLIC_V4 = (
    "0.0.0.0/8",  # RFC 791: this network
    "10.0.0.0/8",  # RFC 1918: private
    "100.64.0.0/10",  # RFC 6598: carriers' NAT
    "127.0.0.0/8",  # RFC 1122: loopback
    "169.254.0.0/16",  # RFC 3927: link-local
    "172.16.0.0/12",  # RFC 1918
    "192.0.0.0/24",  # RFC 6890: protocol assignments
    "192.0.2.0/24",  # RFC 5737: documentation
    "192.31.196.0/24",  # RFC 7535: AS112
    "192.52.193.0/24",  # RFC 7450: AMT
    "192.88.99.0/24",  # RFC 7526: once 6to4 relays
    "192.168.0.0/16",  # RFC 1918
    "192.175.48.0/24",  # RFC 7534: AS112
    "198.18.0.0/15",  # RFC 2544: benchmarks
    "198.51.100.0/24",  # RFC 5737
    "203.0.113.0/24",  # RFC 5737
    "224.0.0.0/4",  # RFC 5771: multicast
    "240.0.0.0/4",  # RFC 1112: reserved; and the limited broadcast
)

# https://www.iana.org/assignments/ipv6-address-space: the only global unicast there is.
_UNICAST = ipaddress.IPv6Network("2000::/3")

# https://www.iana.org/assignments/iana-ipv6-special-registry, as far as it is within `_UNICAST`.
# Outside are ::1, ::, 100::/64, 100:0:0:1::/64, 64:ff9b:1::/48, 5f00::/16, fc00::/7, fe80::/10, and
# fec0::/10 (RFC 3879) and ff00::/8 of other registries.
_NOT_PUBLIC_V6 = (
    "2001::/23",  # RFC 2928: protocol assignments; Teredo, ORCHID, benchmarks and DRIP among them
    "2001:db8::/32",  # RFC 3849: documentation
    "2002::/16",  # RFC 3056: 6to4, any IPv4 address packed into it
    "2620:4f:8000::/48",  # RFC 7534: AS112
    "3fff::/20",  # RFC 9637: documentation
)

# IPv4 addresses as IPv6: mapped (RFC 4291) and of NAT64 (RFC 6052). The IPv4 address counts.
_PACKED = (ipaddress.IPv6Network("::ffff:0:0/96"), ipaddress.IPv6Network("64:ff9b::/96"))

# Names that clouds answer at.
_CLOUD_NAMES = frozenset(
    {
        "metadata.google.internal",  # cloud.google.com/compute/docs/metadata
        "metadata.goog",
        "metadata",
        "instance-data",  # AWS, EC2-Classic
        "instance-data.ec2.internal",
        "metadata.azure.internal",
        "metadata.tencentyun.com",  # Tencent: tencentcloud.com/document/product/213, "metadata"
    }
)

# Top-level names that are nobody's or a network's own:
# https://www.iana.org/assignments/special-use-domain-names (documentation's aside, which resolve to
# nothing), .internal (ICANN, 2024), and those that ICANN will not delegate.
_PRIVATE_TOPS = frozenset(
    {"alt", "arpa", "corp", "home", "internal", "invalid", "lan", "local", "localdomain"}
    | {"localhost", "mail", "onion", "svc", "test"}
)

_CLOUD_NETWORKS = tuple(ipaddress.ip_network(network) for network in _CLOUDS)
_NETWORKS = _CLOUD_NETWORKS + tuple(
    ipaddress.ip_network(network) for network in (*_NOT_PUBLIC_V4, *_NOT_PUBLIC_V6)
)


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public Internet, and none of a cloud's own.

    >>> [is_public(a) for a in ("8.8.8.8", "10.0.0.1", "::ffff:10.0.0.1", "168.63.129.16")]
    [True, False, False, False]
    """
    ip = _unpacked(address)
    if isinstance(ip, ipaddress.IPv6Address) and ip not in _UNICAST:
        return False
    return not any(ip in network for network in _NETWORKS)


def is_cloud(address: str) -> bool:
    """Whether a cloud answers its own machines at this IP address.

    >>> [is_cloud(a) for a in ("169.254.169.254", "10.0.0.1")]
    [True, False]
    """
    ip = _unpacked(address)
    return any(ip in network for network in _CLOUD_NETWORKS)


def is_public_name(name: str) -> bool:
    """Whether a host's name, in lower case, can be one of the public Internet.

    >>> [is_public_name(n) for n in ("a.example", "intranet", "printer.local")]
    [True, False, False]
    """
    _, dot, top = name.rpartition(".")
    return bool(dot) and top not in _PRIVATE_TOPS and not is_cloud_name(name)


def is_cloud_name(name: str) -> bool:
    """Whether a cloud answers its own machines at this name, in lower case."""
    return name in _CLOUD_NAMES


def _unpacked(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address) and any(ip in network for network in _PACKED):
        return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip
