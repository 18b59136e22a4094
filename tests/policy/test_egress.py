"""Requests reach public addresses, and others only where they are allowed."""

from typing import Any

import pytest

from weft.policy.egress import Egress, Refused, is_public
from weft_protocols.errors import InvalidConfig

PUBLIC = ["93.184.216.34", "2606:2800:220:1::1", "64:ff9b::5db8:d822"]
PRIVATE = [
    "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
    "255.255.255.255", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "ff02::1", "::ffff:10.0.0.1",
    "64:ff9b::a00:1", "2002:a00:1::", "2001:0:4136:e378:8000:63bf:3fff:fdd2", "no address",
]  # fmt: skip


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_called(address: str) -> None:
    assert is_public(address)
    Egress().check_addresses("example.org", [address])


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses_are_not(address: str) -> None:
    assert not is_public(address)
    with pytest.raises(Refused) as raised:
        Egress().check_addresses("example.org", ["93.184.216.34", address])
    assert not raised.value.final


@pytest.mark.parametrize(
    "url",
    [
        "ftp://example.org", "file:///etc/passwd", "https://", "http://127.0.0.1:80/x", "http://[::1]/", "http://10.0.0.1",
        "http://2130706433/", "http://0x7f.1/", "http://127.1/", "http://[::ffff:127.0.0.1]/", "http://example.org:x/",
        "http://127.0.0.1./",
    ],
)  # fmt: skip
def test_some_urls_are_refused_for_what_they_are(url: str) -> None:
    with pytest.raises(Refused) as raised:
        Egress().check_url(url)
    assert raised.value.final


def test_the_host_of_a_url_is_what_is_resolved() -> None:
    assert Egress().check_url("https://user@Example.ORG.:8443/x?y=http://10.0.0.1/") == "example.org"
    with pytest.raises(Refused, match="only https"):
        Egress.of({"https_only": True}).check_url("http://example.org/")


def test_what_is_allowed_by_name_or_network_is_called() -> None:
    rule = Egress.of({"allow": ["db.internal", "*.corp.example", "10.1.0.0/16", "::1"]})
    rule.check_addresses("DB.internal.", ["192.168.0.1"])
    rule.check_addresses("a.b.corp.example", ["192.168.0.1"])
    rule.check_addresses("other", ["10.1.9.9", "::1", "::ffff:10.1.0.1"])
    assert rule.check_url("http://[::1]:8080/") == "::1"
    for host, address in (("corp.example", "192.168.0.1"), ("xdb.internal", "192.168.0.1"), ("other", "10.2.0.1")):
        with pytest.raises(Refused, match=r"egress\.allow"):
            rule.check_addresses(host, [address])


def test_where_clouds_hand_out_credentials_is_called_only_by_its_address() -> None:
    Egress.of({"allow_private": True}).check_addresses("x", ["10.0.0.1"])
    for rule in ({"allow_private": True}, {"allow": ["metadata.internal"]}):
        with pytest.raises(Refused):
            Egress.of(rule).check_addresses("metadata.internal", ["169.254.169.254"])
    Egress.of({"allow": ["169.254.169.254"]}).check_addresses("x", ["169.254.169.254"])


@pytest.mark.parametrize(
    "raw",
    [[], {"alow": []}, {"allow": "x"}, {"allow": [1]}, {"allow": ["10.0.0.1/8"]}, {"allow": ["a b"]},
     {"allow": ["a.*"]}, {"allow": ["http://x"]}, {"allow_private": "yes"}],
)  # fmt: skip
def test_settings_that_are_wrong_are_refused(raw: Any) -> None:
    with pytest.raises(InvalidConfig, match="egress"):
        Egress.of(raw)
