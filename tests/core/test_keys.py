"""Seeds: made, kept private, refused when they are not."""

import base64
import os
import stat
from pathlib import Path

import pytest

from weft.core.keys import ensure_seed, new_seed, public_key, read_seed, signer, write_seed
from weft_protocols.errors import Denied, InvalidConfig


def test_a_seed_and_its_public_key_have_the_forms_the_broker_knows() -> None:
    seed = new_seed()
    assert (len(seed), seed[:2]) == (58, "SU")
    key = public_key(seed)
    assert (len(key), key[:1]) == (56, "U")
    assert new_seed() != seed


def test_what_a_seed_signs_its_public_key_verifies() -> None:
    from nacl.signing import VerifyKey

    seed = new_seed()
    signature = signer(seed)(b"nonce")
    raw = base64.b32decode(public_key(seed))[1:33]
    assert VerifyKey(raw).verify(b"nonce", signature) == b"nonce"


def test_a_written_seed_is_private_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "analyst.nk"
    seed = new_seed()
    write_seed(path, seed)
    assert read_seed(path) == seed
    assert _mode(path) == 0o600
    assert _mode(path.parent) == 0o700


def test_a_directory_of_keys_that_others_can_enter_is_closed(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    folder.mkdir(mode=0o755)
    write_seed(folder / "analyst.nk", new_seed())
    assert _mode(folder) == 0o700


def test_writing_replaces_the_file_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "analyst.nk"
    write_seed(path, new_seed())
    before = path.stat().st_ino
    write_seed(path, second := new_seed())
    assert read_seed(path) == second
    assert path.stat().st_ino != before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o660, 0o604, 0o602])
def test_a_seed_others_could_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "analyst.nk"
    write_seed(path, new_seed())
    path.chmod(mode)
    with pytest.raises(Denied, match=rf"can be read by others \(mode {mode:04o}\); run: chmod 600 "):
        read_seed(path)


def test_a_seed_only_its_owner_can_read_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "analyst.nk"
    write_seed(path, new_seed())
    path.chmod(0o400)
    assert read_seed(path).startswith("SU")


def test_a_secret_that_root_mounts_may_be_readable_by_its_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "analyst.nk"
    write_seed(path, new_seed())
    path.chmod(0o640)
    if path.stat().st_uid != 0:
        pytest.skip("only root can make a file of root")
    monkeypatch.setattr(os, "geteuid", lambda: 10001)
    assert read_seed(path).startswith("SU")
    path.chmod(0o644)
    with pytest.raises(Denied):
        read_seed(path)


def test_a_missing_seed_is_named(tmp_path: Path) -> None:
    path = tmp_path / "nobody.nk"
    with pytest.raises(InvalidConfig, match=f"there is no seed file {path}"):
        read_seed(path)


def _damaged(seed: str) -> str:
    return seed[:-1] + ("A" if seed[-1] != "A" else "B")


def _swapped(seed: str) -> str:
    return seed[:20] + ("A" if seed[20] != "A" else "B") + seed[21:]


@pytest.mark.parametrize(
    "content",
    ["", "hello", "SU" + "A" * 400, "SU!!!", public_key(new_seed()), _damaged(new_seed()), _swapped(new_seed())],
    ids=["empty", "text", "long", "alphabet", "public-key", "last-letter", "middle-letter"],
)
def test_a_file_without_a_user_seed_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "analyst.nk"
    write_seed(path, content)
    with pytest.raises(InvalidConfig, match=f"seed file {path}: ") as refused:
        read_seed(path)
    assert not content or content not in str(refused.value), "an error must not print what may be a secret"


def test_a_seed_of_another_kind_of_key_is_refused(tmp_path: Path) -> None:
    import nkeys

    account = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_ACCOUNT).decode()
    with pytest.raises(InvalidConfig, match="no user seed"):
        public_key(account)


def test_a_seed_is_made_once(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "analyst.nk"
    key = ensure_seed(path)
    assert ensure_seed(path) == key == public_key(read_seed(path))


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)
