"""What counts as the public Internet, as a table."""

from __future__ import annotations

import ipaddress

import pytest

from kvshare_mm.modalities import addresses
from kvshare_mm.modalities.addresses import is_cloud, is_cloud_name, is_public, is_public_name

# Every row of IANA's two registries of special-purpose addresses, and of its lists of multicast,
# deprecated and unassigned space: the first and the last address of each are judged.
SPECIAL = [
    # iana-ipv4-special-registry
    "0.0.0.0/8", "0.0.0.0/32", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16",
    "172.16.0.0/12", "192.0.0.0/24", "192.0.0.0/29", "192.0.0.8/32", "192.0.0.9/32",
    "192.0.0.10/32", "192.0.0.170/32", "192.0.0.171/32", "192.0.2.0/24", "192.31.196.0/24",
    "192.52.193.0/24", "192.88.99.0/24", "192.88.99.2/32", "192.168.0.0/16", "192.175.48.0/24",
    "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "240.0.0.0/4", "255.255.255.255/32",
    "224.0.0.0/4",
    # iana-ipv6-special-registry
    "::1/128", "::/128", "64:ff9b:1::/48", "100::/64", "100:0:0:1::/64", "2001::/23",
    "2001::/32", "2001:1::1/128", "2001:1::2/128", "2001:1::3/128", "2001:2::/48", "2001:3::/32",
    "2001:4:112::/48", "2001:10::/28", "2001:20::/28", "2001:30::/28", "2001:db8::/32",
    "2002::/16", "2620:4f:8000::/48", "3fff::/20", "5f00::/16", "fc00::/7", "fe80::/10",
    # ipv6-address-space and multicast
    "::/96", "::/8", "100::/8", "200::/7", "400::/6", "800::/5", "1000::/4", "4000::/3",
    "6000::/3", "8000::/3", "a000::/3", "c000::/3", "e000::/4", "f000::/5", "f800::/6",
    "fe00::/9", "fec0::/10", "ff00::/8",
]  # fmt: skip

CLOUDS = {
    "169.254.169.254": "AWS, Google, Azure, Oracle, OpenStack, DigitalOcean, IBM and others",
    "169.254.169.253": "AWS: DNS",
    "169.254.169.123": "AWS: time",
    "169.254.170.2": "AWS: credentials of ECS",
    "169.254.170.23": "AWS: credentials of EKS",
    "169.254.0.23": "Tencent",
    "169.254.42.42": "Scaleway",
    "168.63.129.16": "Azure: WireServer",
    "192.0.0.192": "Oracle",
    "100.100.100.200": "Alibaba",
    "161.26.0.10": "IBM: DNS",
    "166.9.0.1": "IBM: service endpoints",
    "fd00:ec2::254": "AWS",
    "fd00:ec2::253": "AWS: DNS",
    "fd00:ec2::23": "AWS: credentials of EKS",
    "fd20:ce::254": "Google",
    "fd00:c1::a9fe:a9fe": "Oracle",
    "fd00:42::42": "Scaleway",
    "fe80::a9fe:a9fe": "OpenStack",
}

PUBLIC = [
    "1.1.1.1", "8.8.8.8", "9.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0",
    "126.255.255.255", "128.0.0.0", "168.63.129.15", "168.63.129.17", "169.253.255.255",
    "169.255.0.0", "172.15.255.255", "172.32.0.0", "192.0.1.0", "192.0.3.0", "192.167.255.255",
    "192.169.0.0", "198.17.255.255", "198.20.0.0", "203.0.112.255", "203.0.114.0",
    "223.255.255.255", "2001:200::1", "2001:4860:4860::8888", "2003::1", "2606:4700:4700::1111",
    "2a00:1450::1", "3ffe:ffff::1", "3fff:1000::1", "::ffff:8.8.8.8", "64:ff9b::808:808",
]  # fmt: skip


@pytest.mark.parametrize("network", SPECIAL)
def test_special_purposes_are_not_public(network: str) -> None:
    block = ipaddress.ip_network(network)
    assert not is_public(str(block[0]))
    assert not is_public(str(block[-1]))
    if block.version == 4:
        for packed in ("::ffff:", "64:ff9b::", "::"):
            assert not is_public(packed + str(block[0]))
            assert not is_public(packed + str(block[-1]))


@pytest.mark.parametrize("address", CLOUDS)
def test_services_of_clouds_are_not_public(address: str) -> None:
    assert is_cloud(address)
    assert not is_public(address)
    if "." in address:
        for packed in ("::ffff:", "64:ff9b::"):
            assert is_cloud(packed + address)
            assert not is_public(packed + address)


@pytest.mark.parametrize("address", PUBLIC)
def test_their_neighbours_are_public(address: str) -> None:
    assert is_public(address)
    assert not is_cloud(address)


def test_the_table_does_not_lean_on_the_version_of_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `ipaddress` calls global is different in 3.11.3 and 3.11.9."""
    for kind in (ipaddress.IPv4Address, ipaddress.IPv6Address):
        for name in ("is_global", "is_private", "is_reserved", "is_multicast", "ipv4_mapped"):
            if hasattr(kind, name):
                monkeypatch.setattr(kind, name, property(lambda _: 1 / 0))
    assert is_public("8.8.8.8") and not is_public("3fff::1") and not is_public("::ffff:10.0.0.1")


@pytest.mark.parametrize("address", ["fe80::1%eth0", "169.254.169.254%1"])
def test_zones_change_nothing(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("a.example", True),
        ("metadata.example", True),
        ("internal.example", True),
        ("cdn.shop.example", True),
        ("localhost", False),
        ("intranet", False),
        ("x.localhost", False),
        ("printer.local", False),
        ("db.internal", False),
        ("router.home.arpa", False),
        *((name, False) for name in sorted(addresses._CLOUD_NAMES)),
    ],
)
def test_names(name: str, public: bool) -> None:
    assert is_public_name(name) == public
    assert is_cloud_name(name) == (name in addresses._CLOUD_NAMES)
