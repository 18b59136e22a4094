"""Broker identities: Ed25519 nkeys, public in the server's configuration, the seed in a private file."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from weft.core.home import make_private_directory, write_private
from weft_protocols.errors import Denied, InvalidConfig

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_SEED_FILE: Final = 1024
"""Bytes; a seed has 58 characters."""
_NO_SEED: Final = "there is no user seed in it: one has 58 characters and begins with SU"


def new_seed() -> str:
    """A fresh user seed (`SU…`, 58 characters)."""
    import nkeys

    return str(nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER).decode())


def public_key(seed: str) -> str:
    """The public key (`U…`, 56 characters) of a user seed. Raises InvalidConfig if it is none."""
    return str(_pair(seed).public_key.decode())


def signer(seed: str) -> Callable[[bytes], bytes]:
    """A function that signs with the seed (Ed25519, 64 bytes)."""
    pair = _pair(seed)
    return lambda data: bytes(pair.sign(data))


def write_seed(path: Path, seed: str) -> None:
    """Write a seed atomically to a file of mode 0600 in a directory of mode 0700."""
    make_private_directory(path.parent)
    write_private(path, seed.encode() + b"\n")


def read_seed(path: Path) -> str:
    """The seed in a file.

    Like a private key of PostgreSQL or OpenSSH the file must be private: mode 0600 or less, or 0640 or less
    if it belongs to root, which is how secrets are mounted into containers.

    Raises:
        InvalidConfig: there is no such file, or no user seed in it.
        Denied: the file can be read by others, or this process may not read it.
    """
    try:
        with path.open("rb") as file:
            _check_private(path, os.fstat(file.fileno()))
            text = file.read(MAX_SEED_FILE).decode("ascii", "replace").strip()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise InvalidConfig(f"there is no seed file {path}; WEFT_SEED_FILE or the identity is wrong") from None
    except PermissionError:
        raise Denied(f"seed file {path} cannot be read by this user; run as its owner") from None
    try:
        public_key(text)
    except InvalidConfig as error:
        raise InvalidConfig(f"seed file {path}: {error}") from None
    return text


def ensure_seed(path: Path) -> str:
    """The public key of the seed in `path`, which is created if it does not exist."""
    if not path.exists():
        write_seed(path, new_seed())
    return public_key(read_seed(path))


def _check_private(path: Path, status: os.stat_result) -> None:
    if os.name == "nt":
        return
    mode = stat.S_IMODE(status.st_mode)
    allowed = 0o640 if status.st_uid == 0 and os.geteuid() != 0 else 0o600
    if mode & 0o077 & ~allowed:
        raise Denied(f"seed file {path} can be read by others (mode {mode:04o}); run: chmod 600 {path}")


def _pair(seed: str) -> Any:
    import nkeys

    try:
        prefix, raw = nkeys.decode_seed(seed.encode())
        pair = nkeys.from_seed(bytearray(seed.encode()))
    except (nkeys.NkeysError, ValueError, TypeError):
        raise InvalidConfig(_NO_SEED) from None
    if prefix != nkeys.PREFIX_BYTE_USER or len(raw) != 32:
        raise InvalidConfig(_NO_SEED)
    if nkeys.encode_seed(raw, prefix).decode() != seed:
        raise InvalidConfig("the seed in it is damaged: its checksum is wrong; restore the file or make a new identity")
    return pair
