"""The key with which a mesh signs agent cards (and what it sends to webhooks), and checking such signatures.

An Ed25519 key in PEM, made with the broker's accounts. Signatures are JWS over the canonical card (A2A 8.4); keys are
named by their RFC 7638 thumbprint and known beforehand: a `jku` in a signature is never followed.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from weft.core.home import BrokerRecord, Home, make_private_directory, write_private
from weft_protocols.errors import Denied, InvalidConfig

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from weft.core.config import ConnectionSettings
    from weft_protocols.cards import AgentCard

ALGORITHM: Final = "EdDSA"
KEY_ENV: Final = "WEFT_CARD_KEY"
"""File of the private key, for who signs in a mesh elsewhere."""
JWKS_ENV: Final = "WEFT_CARD_JWKS"
"""File of the public keys, for who only checks in a mesh elsewhere."""
Jwks = Mapping[str, Any]
"""A JSON Web Key Set (RFC 7517)."""


class CardKey:
    """One private key. Holds no file open and can be shared between threads."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self._jwk = _public_jwk(private)

    @property
    def kid(self) -> str:
        """RFC 7638 thumbprint of the public key: SHA-256, base64url."""
        return str(self._jwk["kid"])

    @property
    def jwk(self) -> dict[str, Any]:
        """The public key as a JSON Web Key."""
        return dict(self._jwk)

    @property
    def public_bytes(self) -> bytes:
        """The public key, 32 bytes."""
        return self._private.public_key().public_bytes_raw()

    def jwks(self) -> dict[str, Any]:
        """The public key as a set of one."""
        return {"keys": [self.jwk]}

    def sign(self, card: AgentCard) -> AgentCard:
        """A copy of a card that carries this key's signature, in place of one it had from this key.

        Raises InvalidConfig if the card has no canonical form.
        """
        from jwt import PyJWS

        from weft_protocols.cards import canonical, parse_card

        headers = {"kid": self.kid, "typ": "JOSE"}
        token = PyJWS().encode(canonical(card), self._private, ALGORITHM, headers)
        protected, _, signature = token.split(".")
        made = parse_card(card)
        others = [one for one in card.signatures if _protected(one.protected).get("kid") != self.kid]
        made.ClearField("signatures")
        made.signatures.extend(others)
        made.signatures.add(protected=protected, signature=signature)
        return made

    def sign_bytes(self, data: bytes) -> bytes:
        """The bare Ed25519 signature of `data`, 64 bytes."""
        return self._private.sign(data)

    @staticmethod
    def new() -> CardKey:
        """A fresh key, on no disk."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        return CardKey(Ed25519PrivateKey.generate())

    @staticmethod
    def load(path: Path) -> CardKey:
        """The key in a PEM file, which must be private like a seed file.

        Raises:
            InvalidConfig: there is no such file, or no Ed25519 key in it.
            Denied: others can read it, or this process may not.
        """
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        try:
            _check_private(path)
            private = load_pem_private_key(path.read_bytes(), password=None)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise InvalidConfig(f"there is no card key {path}; `mesh up` makes one, or correct {KEY_ENV}") from None
        except PermissionError:
            raise Denied(f"card key {path} cannot be read by this user; run as its owner") from None
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise InvalidConfig(f"card key {path} is no PEM file with a private key: {error}") from None
        if not isinstance(private, Ed25519PrivateKey):
            raise InvalidConfig(f"card key {path} is not an Ed25519 key; make one: openssl genpkey -algorithm ed25519")
        return CardKey(private)

    def write(self, path: Path) -> None:
        """Write the key atomically as PEM (PKCS 8), mode 0600, in a directory of mode 0700."""
        from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

        make_private_directory(path.parent)
        write_private(path, self._private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


# Where keys are ------------------------------------------------------------------------------------


def key_file(home: Home) -> Path:
    """File of the private key in a mesh's home directory."""
    return home.keys / "cards.pem"


def jwks_file(home: Home) -> Path:
    """File of the public keys that count in a mesh: its own, and older ones until they are taken out by hand."""
    return home.root / "cards.jwks.json"


def ensure_card_key(home: Home) -> CardKey:
    """The key of a mesh here, made if there is none; its public key is among those that count afterwards."""
    path = key_file(home)
    if path.exists():
        key = CardKey.load(path)
    else:
        key = CardKey.new()
        key.write(path)
    public = jwks_file(home)
    known = list(read_jwks(public).get("keys", ())) if public.exists() else []
    if all(one.get("kid") != key.kid for one in known):
        write_private(public, json.dumps({"keys": [key.jwk, *known]}, indent=2).encode() + b"\n")
    return key


def card_key(settings: ConnectionSettings) -> CardKey | None:
    """The key this process may sign with: of `WEFT_CARD_KEY`, else of the mesh's home directory; None without one.

    Raises InvalidConfig or Denied if there is one that cannot be used.
    """
    named = os.environ.get(KEY_ENV)
    if named:
        return CardKey.load(Path(named).expanduser())
    home = _home_of(settings)
    return CardKey.load(key_file(home)) if home is not None and key_file(home).exists() else None


def trusted_keys(settings: ConnectionSettings) -> Jwks | None:
    """The public keys whose signatures count here; None where none are known, and cards cannot be checked.

    They are those of `WEFT_CARD_JWKS`, else the public part of `WEFT_CARD_KEY`, else those of the home directory.

    Raises InvalidConfig if a file that is named is not there or holds no keys.
    """
    if named := os.environ.get(JWKS_ENV):
        return read_jwks(Path(named).expanduser())
    if os.environ.get(KEY_ENV) and (key := card_key(settings)) is not None:
        return key.jwks()
    home = _home_of(settings)
    return read_jwks(jwks_file(home)) if home is not None and jwks_file(home).exists() else None


def _home_of(settings: ConnectionSettings) -> Home | None:
    """The home directory of the mesh the connection leads to; None if it is elsewhere, whatever lies around here."""
    home = Home(settings.home) if settings.home is not None else None
    record = BrokerRecord.read(home) if home is not None else None
    return home if record is not None and record.url == settings.url else None


def read_jwks(path: Path) -> dict[str, Any]:
    """The key set in a file; InvalidConfig if it is none."""
    try:
        found = json.loads(path.read_bytes())
        if not all(isinstance(one, dict) for one in found["keys"]):
            raise TypeError("a key is not an object")
    except FileNotFoundError:
        raise InvalidConfig(f"there is no key set {path}; correct {JWKS_ENV}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidConfig(f"{path} is not a JSON Web Key Set: {error}") from None
    made: dict[str, Any] = found
    return made


# Checking ------------------------------------------------------------------------------------------


def verify(card: AgentCard, jwks: Jwks) -> str:
    """The key id of a valid signature of the card by one of these keys.

    Only EdDSA counts, whatever a signature says of itself; `jku`, `jwk` and `x5u` in it are ignored.

    Raises:
        CardNotTrusted: it has none: unsigned, changed since, or signed by somebody else.
    """
    from jwt import PyJWK, PyJWS
    from jwt.exceptions import PyJWTError
    from jwt.utils import base64url_encode

    from weft_protocols.cards import CardNotTrusted, canonical

    if not card.signatures:
        raise CardNotTrusted(f"the card of {card.name} is not signed")
    known = {str(one.get("kid")): one for one in jwks.get("keys", ())}
    try:
        payload = base64url_encode(canonical(card)).decode()
    except InvalidConfig as error:
        raise CardNotTrusted(str(error)) from error
    foreign: set[str] = set()
    for one in card.signatures:
        kid = str(_protected(one.protected).get("kid"))
        if kid not in known:
            foreign.add(kid)
            continue
        try:
            key = PyJWK(dict(known[kid]), ALGORITHM)
            PyJWS().decode(f"{one.protected}.{payload}.{one.signature}", key, [ALGORITHM])
        except PyJWTError:
            continue
        return kid
    if len(foreign) == len(card.signatures):
        raise CardNotTrusted(
            f"the card of {card.name} is signed by none of this mesh's keys but by {', '.join(sorted(foreign))}"
        )
    raise CardNotTrusted(f"the signature of the card of {card.name} is wrong: it was changed after it was signed")


def _protected(text: str) -> dict[str, Any]:
    """The protected header of a signature; empty if it cannot be read."""
    from jwt.utils import base64url_decode

    try:
        found = json.loads(base64url_decode(text))
    except (ValueError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def _public_jwk(private: Ed25519PrivateKey) -> dict[str, Any]:
    from hashlib import sha256

    from jwt.utils import base64url_encode

    x = base64url_encode(private.public_key().public_bytes_raw()).decode()
    # RFC 7638: the required members, in this order, without white space.
    named = json.dumps({"crv": "Ed25519", "kty": "OKP", "x": x}, separators=(",", ":")).encode()
    kid = base64url_encode(sha256(named).digest()).decode()
    return {"kty": "OKP", "crv": "Ed25519", "x": x, "kid": kid, "alg": ALGORITHM, "use": "sig"}


def _check_private(path: Path) -> None:
    if os.name == "nt":
        return
    status = path.stat()
    mode = stat.S_IMODE(status.st_mode)
    allowed = 0o640 if status.st_uid == 0 and os.geteuid() != 0 else 0o600
    if mode & 0o077 & ~allowed:
        raise Denied(f"card key {path} can be read by others (mode {mode:04o}); run: chmod 600 {path}")
