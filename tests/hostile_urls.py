"""URLs that lead inside, nowhere, or to something else than they seem to.

None of them may be fetched, and none may make this machine open a connection.
"""

from __future__ import annotations

import socket
from typing import Any

import httpcore2
import pytest

# Names of the test's own name service (see `resolve` in the tests that use it), beside literals.
NAMES: dict[str, list[str]] = {
    "localhost": ["127.0.0.1", "::1"],
    "inside.example": ["10.0.0.7"],
    "loop.example": ["127.0.0.1"],
    "mixed.example": ["93.184.215.14", "192.168.0.1"],
    "mapped.example": ["::ffff:10.0.0.1"],
    "azure.example": ["168.63.129.16"],
    "oracle.example": ["192.0.0.192"],
    "site.example": ["fec0::1"],
    "doc.example": ["3fff::1"],
    "zone.example": ["fe80::1%lo"],
}
PUBLIC = "93.184.215.14"  # what every other name resolves to

# Addresses that are not the public Internet's, as one writes them in a URL.
INSIDE = [
    "127.0.0.1", "127.0.0.1:22", "127.255.255.254", "0.0.0.0", "0.0.0.0:8000", "0.1.2.3",
    "10.0.0.1", "10.1.2.3", "10.255.255.255", "172.16.0.1", "172.20.0.1", "172.31.255.255",
    "192.168.0.1", "192.168.1.1", "100.64.0.1",
    "100.127.255.255", "169.254.1.1", "192.0.0.1", "192.0.0.9", "192.0.0.170", "192.0.2.1",
    "192.31.196.1", "192.52.193.1", "192.88.99.1", "192.175.48.1", "198.18.0.1",
    "198.19.255.255", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.250", "240.0.0.1",
    "255.255.255.255",
    # metadata and other services of clouds
    "169.254.169.254", "169.254.170.2", "169.254.169.253", "169.254.42.42", "169.254.0.23",
    "168.63.129.16", "192.0.0.192", "100.100.100.200", "161.26.0.10", "166.9.0.1",
    "[fd00:ec2::254]", "[fd20:ce::254]", "[fd00:42::42]", "[fd00:c1::a9fe:a9fe]",
    # IPv6
    "[::1]", "[::1]:6379", "[::]", "[0:0:0:0:0:0:0:1]", "[::127.0.0.1]", "[::7f00:1]",
    "[::ffff:0:1]", "[::ffff:127.0.0.1]", "[::ffff:10.0.0.1]", "[::ffff:a9fe:a9fe]",
    "[::ffff:a83f:8110]", "[::ffff:0:127.0.0.1]", "[64:ff9b::127.0.0.1]", "[64:ff9b::a83f:8110]",
    "[64:ff9b::a00:1]",
    "[64:ff9b:1::1]", "[64:ff9b:1::808:808]", "[100::1]", "[100:0:0:1::1]", "[2001::1]",
    "[2001:0:7f00:1::]", "[2001:1::1]", "[2001:2::1]", "[2001:3::1]", "[2001:4:112::1]",
    "[2001:10::1]", "[2001:20::1]", "[2001:30::1]", "[2001:db8::1]", "[2002:7f00:1::]",
    "[2002:a9fe:a9fe::1]", "[2002:808:808::1]", "[2620:4f:8000::1]", "[3fff::1]",
    "[3fff:fff:ffff::1]", "[4000::1]", "[5f00::1]", "[8000::1]", "[fc00::1]", "[fd00::1]",
    "[fe80::1]", "[fec0::1]", "[feff::1]", "[ff02::1]", "[ff0e::1]", "[1::1]", "[200::1]",
]  # fmt: skip

# Hosts that are no host, or an address in disguise.
ODD = [
    "", ".", "..", "...", ".a.example", "a..b", "a..example", "a.example..", "..a.example",
    "a\u3002\u3002b", "\u3002", "a\uff0e\uff0eexample", "\uff61a", "a.example\u3002\u3002", "-",
    "-a.example", "a-.example", "a.-b.example", "a" * 64 + ".example", "a." * 127 + "example",
    "ä" * 60 + ".example", "xn--.example", "xn--a", "\u00ad", "\u200b", "a\u200b..b",
    "\ud800.example", "a\u2024\u2024b", "\u2113ocalhost", "\u24dbocalhost", "LOCALHOST",
    "LOCALHOST.", "localhost:8000",
    "localhost.", "localhost..", "foo.localhost", "127.0.0.1.", "127.0.0.1..", "127.1",
    "127.0.1", "1", "0", "2130706433", "017700000001", "0x7f000001", "0x7f.1", "0X7F.1",
    "0x7f.0x0.0x0.0x1", "0177.0.0.1", "0177.0.0.01", "0300.0250.0.1", "3232235521", "0xa9fea9fe",
    "2852039166", "134744072", "8.8.2056", "0x8.8.8.8", "08.8.8.8", "256.1.1.1", "1.2.3.4.5",
    "4294967296", "a.0x1", "a.1", "99999999999999999999", "\uff11\uff12\uff17.0.0.1",
    "\u2460\u2461\u2466.0.0.1", "127\u30020\u30020\u30021", "169\u3002254\u3002169\u3002254",
    "127%2e0%2e0%2e1", "%31%32%37.0.0.1", "%6cocalhost", "a%00.example", "a%2eexample",
    "a b.example", " a.example", "a.example ", "a\t.example", "a\n.example",
    "a\r\nHost: b.example", "a.example\r\n\r\nGET /x", "a\x00.example", "a\x7f.example",
    "a\\b.example", "a.example\\@127.0.0.1", "127.0.0.1\\@a.example", "127.0.0.1#@a.example",
    "a\\@127.0.0.1", "a b",
    "a,b.example", "a!b.example", "a$b.example", "a;b.example", "a*b.example", "*.example",
    "a'b.example", "(a).example", "a|b.example", "a^b.example", "`a`.example", "{a}.example",
    "a<b.example", "~a.example", "a\"b.example", "[", "]", "[]", "[::1", "::1]", "::1", "[::1]]",
    "[[::1]]", "[::1]a", "a[::1]", "a[2606:4700::1]", "[2606:4700::1]a", "[8.8.8.8]",
    "[127.0.0.1]", "[localhost]", "[a.example]", "[::g]", "[1:2:3]", "[::1%lo]", "[::1%25lo]",
    "[fe80::1%25eth0]", "[2606:4700::1%25lo]", "[2606:4700::1%lo]", "[v1.127.0.0.1]", "[v6.::1]",
    "[::ffff:127.1]",
    # ports
    "127.0.0.1:99999",
    "a.example:0", "a.example:65536", "a.example:99999999999", "a.example:-1", "a.example:+80",
    "a.example:8_0", "a.example:0x50", "a.example:80:80", "a.example:a", "a.example: 80",
    "a.example:\uff18\uff10", "a.example:" + "1" * 5000, "[::1]:0", "[::1]:a", ":80", "@", ":@",
    ":",
    # users
    "user:secret@127.0.0.1",
    "user@a.example", "user:secret@a.example", ":@a.example", "@a.example", "a@b@c.example",
    "a.example@127.0.0.1", "127.0.0.1@a.example", "a.example%40127.0.0.1",
    "a.example:80@127.0.0.1",
    # names of clouds, of this machine, and of networks that are nobody else's
    "metadata.google.internal", "METADATA.google.internal.", "metadata", "metadata.goog",
    "instance-data", "instance-data.ec2.internal", "metadata.azure.internal",
    "metadata.tencentyun.com", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local",
    "api.svc.cluster.local", "host.docker.internal", "printer.local", "router.home.arpa",
    "router.lan", "x.localdomain", "1.0.0.127.in-addr.arpa", "x.onion", "x.test", "x.invalid",
    "intranet", "db.corp", "db.home",
    *NAMES,
]  # fmt: skip

# What is no http URL at all, or only nearly.
OTHER = [
    "", " ", "\0", "x", "/", "//", "///", ":", "://", "http", "http:", "http:/", "http://",
    "https://", "http:a.example", "http:/a.example/", "http:///a.example/", "http:////a.example",
    "http:\\\\a.example", "http:/\\127.0.0.1/", "\\\\a.example\\x", "//a.example/x",
    "/etc/passwd", "etc/passwd", "~/x", " http://a.example/", "\thttp://a.example/",
    "\nhttp://a.example/", "\0http://a.example/", "http ://a.example/", "h\nttp://a.example/",
    "ht\ttp://a.example/", "http\0://a.example/", "http\u200b://a.example/",
    "\uff48ttp://a.example/", "http\uff1a//a.example/", "http://a.example/\r\nX: y",
    "http://a.example/\n", "http://a.example/ ", "http://a.example/\0",
    "http://a.example/\\..\\x", "http://a.example/?\r\nx", "http://a.example\t/",
    "http://a.example/\x7f", "http://?x", "http://#x", "hTTp://127.0.0.1/", "HTTPS://[::1]/",
    "Http://LocalHost/", "http://127.0.0.1/#@a.example/", "http://127.0.0.1/?@a.example/",
    "http:127.0.0.1", "http:@127.0.0.1", "ftp://a.example/x", "ftps://a.example/",
    "sftp://a.example/", "gopher://127.0.0.1:6379/_FLUSHALL", "dict://127.0.0.1:11211/stat",
    "ldap://127.0.0.1/", "ws://127.0.0.1/", "wss://a.example/", "jar:http://a.example!/x",
    "view-source:http://a.example/", "blob:http://a.example/x", "javascript:alert(1)",
    "about:blank", "mailto:a@b.example", "tel:1", "urn:x", "netdoc:///etc/passwd",
    "unix:///var/run/docker.sock", "http+unix://%2fvar%2frun%2fdocker.sock/x", "s3://a/b",
    "gs://a/b", "phar://x", "php://filter/resource=/etc/passwd", "expect://id",
    "ssh://a.example", "git://a.example/x", "file:", "file:/", "file://", "file:///",
    "file:///etc/passwd", "FILE:///etc/passwd", "file:/etc/passwd", "file:etc/passwd",
    "file://localhost/etc/passwd", "file://127.0.0.1/etc/passwd", "file://a.example/x",
    "ftp://127.0.0.1/x",
    "file:///proc/self/environ", "file:///proc/self/fd/0", "file:///dev/zero",
    "file:///dev/stdin", "file:////etc/passwd", "file:///%2fetc/passwd", "file:///etc/%00passwd",
    "file:///etc/passwd\0.png", "file:///tmp/../etc/passwd", "file:///\ud800", "file://[::1",
    "file:///" + "a" * 5000, "data:", "data:x", "data:;base64,%%%", "data:;base64,A",
    "data:;base64,===", "data:image/png;base64", "data:;base64,\0", "data:;base64,é",
    "data:;base64,\ud800", "data:;base64," + "!" * 9000, "\ud800", "http://\ud800/",
    "http://a.example/\ud800", "http://a.example/?\ud800", "http://a.example/#\ud800",
    "http://a.example/" + "a" * (1 << 17), "http://" + "a" * (1 << 17),
    "http://" + "@" * 5000 + "a.example/", "http://" + "[" * 5000,
    "http://a.example:" + "0" * 5000 + "80x/", "x" * (1 << 17), ":" * 5000,
]  # fmt: skip

URLS = list(dict.fromkeys([*(f"http://{host}/a.png" for host in (*INSIDE, *ODD)), *OTHER]))


class Network:
    """Stands for the network: a name service, and connections that are noted, not made.

    Attributes:
        names: host to addresses; other names than these and literal addresses are public.
        answers: path to the bytes that a public site answers with; without one nobody listens.
        resolved: hosts whose addresses were asked for.
        connections: address and port of each connection that was asked for.
    """

    public = PUBLIC

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.names = dict(NAMES)
        self.resolved: list[str] = []
        self.answers: dict[bytes, bytes] = {}
        self.connections: list[tuple[str, int]] = []
        self._real = socket.getaddrinfo
        patch.setattr(socket, "getaddrinfo", self._resolve)
        network = self

        async def connect_tcp(
            _: Any, host: str, port: int, *rest: Any, **options: Any
        ) -> httpcore2.AsyncNetworkStream:
            network.connections.append((host, port))
            if not network.answers:
                raise httpcore2.ConnectError("nobody listens")
            return _Stream(network.answers)

        patch.setattr(httpcore2.AnyIOBackend, "connect_tcp", connect_tcp)

    def _resolve(self, host: Any, port: Any, *rest: Any, **options: Any) -> list[Any]:
        self.resolved.append(host)
        if isinstance(host, str):
            host.encode("idna")  # as the real one does, and fails
        try:
            flags = socket.AI_NUMERICHOST
            return self._real(host, port, type=socket.SOCK_STREAM, flags=flags)
        except socket.gaierror:
            found = self.names.get(host, [PUBLIC])
        if not found:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [
            (socket.AF_INET6 if ":" in a else socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port))
            for a in found
        ]


class _Stream(httpcore2.AsyncNetworkStream):
    """A site that answers a path with fixed bytes, and ends."""

    def __init__(self, answers: dict[bytes, bytes]) -> None:
        self._answers = answers
        self._asked = b""
        self._sent = False

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        if self._sent:
            return b""
        self._sent = True
        return self._answers.get(self._asked.split(b" ")[1], b"HTTP/1.1 404 Not found\r\n\r\n")

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._asked += buffer

    async def aclose(self) -> None:
        pass
