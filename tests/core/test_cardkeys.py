"""The key of a mesh's cards: made with the accounts, kept private, and its signatures are those of the A2A SDK."""

from __future__ import annotations

import base64
import json
import stat
from pathlib import Path
from typing import Any

import pytest
from a2a.types import a2a_pb2 as pb
from a2a.utils.signing import InvalidSignaturesError, create_agent_card_signer, create_signature_verifier
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from jwt import PyJWK, PyJWS

from weft.core import cardkeys
from weft.core.cardkeys import CardKey
from weft.core.config import ConnectionSettings
from weft.core.home import BrokerRecord, Home
from weft.testing.broker import BrokerMesh
from weft_protocols import cards
from weft_protocols.cards import CardNotTrusted
from weft_protocols.errors import Denied, InvalidConfig

CARD = cards.published(
    cards.core_card("echo", version="1.0", description="sagt es nochmal – ünïcode 😀", skills=[{"id": "say"}]),
    [cards.mesh_interface("echo")],
)


def header_of(card: pb.AgentCard) -> dict[str, Any]:
    text = card.signatures[0].protected
    found: dict[str, Any] = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    return found


def forged(header: dict[str, Any], key: Any, algorithm: str = "EdDSA") -> pb.AgentCard:
    """A card with a signature of the test's own making."""
    token = PyJWS().encode(cards.canonical(CARD), key, algorithm, header)
    protected, _, signature = token.split(".")
    made = cards.parse_card(CARD)
    made.signatures.add(protected=protected, signature=signature)
    return made


def test_a_signed_card_is_verified_and_the_original_stays_as_it_was() -> None:
    key = CardKey.new()
    signed = key.sign(CARD)
    assert cardkeys.verify(signed, key.jwks()) == key.kid
    assert not CARD.signatures
    assert header_of(signed) == {"alg": "EdDSA", "kid": key.kid, "typ": "JOSE"}


def test_signing_again_replaces_the_own_signature_and_keeps_others() -> None:
    old, new = CardKey.new(), CardKey.new()
    signed = new.sign(new.sign(old.sign(CARD)))
    assert len(signed.signatures) == 2
    assert cardkeys.verify(signed, old.jwks()) == old.kid
    assert cardkeys.verify(signed, new.jwks()) == new.kid


def test_the_sdk_verifies_what_is_signed_here() -> None:
    key = CardKey.new()
    create_signature_verifier(lambda kid, jku: PyJWK(key.jwk), ["EdDSA"])(key.sign(CARD))
    with pytest.raises(InvalidSignaturesError):
        create_signature_verifier(lambda kid, jku: PyJWK(CardKey.new().jwk), ["EdDSA"])(key.sign(CARD))


def test_what_the_sdk_signs_is_verified_here(tmp_path: Path) -> None:
    key = CardKey.new()
    key.write(tmp_path / "cards.pem")
    sign = create_agent_card_signer(
        (tmp_path / "cards.pem").read_bytes(), {"kid": key.kid, "alg": "EdDSA", "jku": None, "typ": "JOSE"}
    )
    assert cardkeys.verify(sign(cards.parse_card(CARD)), key.jwks()) == key.kid


def test_the_key_id_is_the_rfc_7638_thumbprint() -> None:
    # The key of RFC 8037, appendix A, with the thumbprint that is printed there.
    seed = base64.urlsafe_b64decode("nWGxne_9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A=")
    key = CardKey(ed25519.Ed25519PrivateKey.from_private_bytes(seed))
    assert key.kid == "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k"
    assert key.jwk["x"] == "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"


# Forgeries -----------------------------------------------------------------------------------------


def test_an_unsigned_card_is_not_trusted() -> None:
    with pytest.raises(CardNotTrusted, match="is not signed"):
        cardkeys.verify(CARD, CardKey.new().jwks())


def test_a_card_changed_after_it_was_signed_is_not_trusted() -> None:
    key = CardKey.new()
    signed = key.sign(CARD)
    signed.supported_interfaces[0].url = "nats://evil/echo"
    with pytest.raises(CardNotTrusted, match="changed after it was signed"):
        cardkeys.verify(signed, key.jwks())


def test_a_card_signed_by_another_key_is_not_trusted() -> None:
    key, stranger = CardKey.new(), CardKey.new()
    with pytest.raises(CardNotTrusted, match=stranger.kid):
        cardkeys.verify(stranger.sign(CARD), key.jwks())
    with pytest.raises(CardNotTrusted, match="none of this mesh's keys"):
        cardkeys.verify(key.sign(CARD), {"keys": []})


def test_another_key_under_the_id_of_ours_is_not_trusted() -> None:
    key, stranger = CardKey.new(), ed25519.Ed25519PrivateKey.generate()
    with pytest.raises(CardNotTrusted):
        cardkeys.verify(forged({"kid": key.kid}, stranger), key.jwks())


def test_the_algorithm_of_the_signature_does_not_decide() -> None:
    key = CardKey.new()
    with pytest.raises(CardNotTrusted):  # the public key, which everybody has, as the secret of a HMAC
        cardkeys.verify(forged({"kid": key.kid}, key.public_bytes, "HS256"), key.jwks())
    with pytest.raises(CardNotTrusted):
        cardkeys.verify(forged({"kid": key.kid}, None, "none"), key.jwks())


def test_a_key_in_the_signature_itself_counts_for_nothing() -> None:
    key, stranger = CardKey.new(), CardKey.new()
    private = stranger._private
    header = {"kid": stranger.kid, "jku": "http://127.0.0.1:9/jwks.json", "jwk": stranger.jwk}
    with pytest.raises(CardNotTrusted):
        cardkeys.verify(forged(header, private), key.jwks())


@pytest.mark.parametrize("protected", ["", "!!!", "bnVsbA", "W10", "ey"])
def test_a_broken_header_is_not_trusted(protected: str) -> None:
    broken = cards.parse_card(CARD)
    broken.signatures.add(protected=protected, signature="x")
    with pytest.raises(CardNotTrusted):
        cardkeys.verify(broken, CardKey.new().jwks())


def test_one_good_signature_among_broken_ones_is_enough() -> None:
    key = CardKey.new()
    card = cards.parse_card(CARD)
    card.signatures.add(protected="!!!", signature="x")
    assert cardkeys.verify(key.sign(card), key.jwks()) == key.kid


# Files ---------------------------------------------------------------------------------------------


def test_the_key_is_made_once_and_is_private(tmp_path: Path) -> None:
    home = Home(tmp_path / ".weft")
    home.root.mkdir()
    made = cardkeys.ensure_card_key(home)
    assert cardkeys.ensure_card_key(home).kid == made.kid
    assert stat.S_IMODE(cardkeys.key_file(home).stat().st_mode) == 0o600
    assert cardkeys.read_jwks(cardkeys.jwks_file(home)) == made.jwks()
    assert "d" not in cardkeys.jwks_file(home).read_text().split('"')


def test_a_new_key_joins_the_keys_that_count(tmp_path: Path) -> None:
    home = Home(tmp_path / ".weft")
    home.root.mkdir()
    old = cardkeys.ensure_card_key(home)
    cardkeys.key_file(home).unlink()
    new = cardkeys.ensure_card_key(home)
    counting = cardkeys.read_jwks(cardkeys.jwks_file(home))
    assert [one["kid"] for one in counting["keys"]] == [new.kid, old.kid]
    assert cardkeys.verify(old.sign(CARD), counting) == old.kid


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    CardKey.new().write(tmp_path / "cards.pem")
    (tmp_path / "cards.pem").chmod(0o644)
    with pytest.raises(Denied, match="chmod 600"):
        CardKey.load(tmp_path / "cards.pem")


@pytest.mark.parametrize(
    "content", [b"", b"not a key", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----"]
)
def test_a_file_without_a_key_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "cards.pem"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(InvalidConfig, match=str(path)):
        CardKey.load(path)


def test_a_key_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cards.pem"
    other = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    path.write_bytes(other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    path.chmod(0o600)
    with pytest.raises(InvalidConfig, match="not an Ed25519 key"):
        CardKey.load(path)


def test_a_key_that_is_not_there_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="WEFT_CARD_KEY"):
        CardKey.load(tmp_path / "cards.pem")


# Where keys come from ------------------------------------------------------------------------------


def settings(root: Path | None, url: str = "nats://127.0.0.1:4222") -> ConnectionSettings:
    return ConnectionSettings(url, "local", None, root)


def test_the_home_of_the_mesh_has_the_key_and_what_counts(tmp_path: Path) -> None:
    home = Home(tmp_path)
    made = cardkeys.ensure_card_key(home)
    BrokerRecord("nats://127.0.0.1:4222", 1, "", "laptop", 4222, 1).write(home)
    key = cardkeys.card_key(settings(tmp_path))
    assert key is not None
    assert key.kid == made.kid
    assert cardkeys.trusted_keys(settings(tmp_path)) == made.jwks()


def test_the_home_of_another_mesh_does_not_count(tmp_path: Path) -> None:
    home = Home(tmp_path)
    cardkeys.ensure_card_key(home)
    BrokerRecord("nats://127.0.0.1:4222", 1, "", "laptop", 4222, 1).write(home)
    elsewhere = settings(tmp_path, "nats://nats.example.com:4222")
    assert cardkeys.card_key(elsewhere) is None
    assert cardkeys.trusted_keys(elsewhere) is None
    assert cardkeys.trusted_keys(settings(None)) is None


def test_a_mesh_elsewhere_has_its_keys_in_files_that_the_environment_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = CardKey.new()
    key.write(tmp_path / "private" / "key.pem")
    monkeypatch.setenv("WEFT_CARD_KEY", str(tmp_path / "private" / "key.pem"))
    found = cardkeys.card_key(settings(None))
    assert found is not None
    assert found.kid == key.kid
    assert cardkeys.trusted_keys(settings(None)) == key.jwks()

    public = tmp_path / "jwks.json"
    other = CardKey.new().jwks()
    public.write_text(json.dumps(other))
    monkeypatch.setenv("WEFT_CARD_JWKS", str(public))
    assert cardkeys.trusted_keys(settings(None)) == other


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"keys": [1]}', '{"keys": 3}'])
def test_a_key_set_that_is_none_is_an_error_and_not_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    (tmp_path / "jwks.json").write_text(content)
    monkeypatch.setenv("WEFT_CARD_JWKS", str(tmp_path / "jwks.json"))
    with pytest.raises(InvalidConfig, match=r"jwks\.json"):
        cardkeys.trusted_keys(settings(None))


@pytest.mark.anyio
async def test_a_started_mesh_has_a_card_key(mesh: BrokerMesh) -> None:
    key = cardkeys.card_key(mesh.settings("coordinator"))
    assert key is not None
    assert cardkeys.trusted_keys(mesh.settings("local")) == key.jwks()
