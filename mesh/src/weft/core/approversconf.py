"""Who may decide about approvals: section `approvers` of `mesh.yaml`, each person with their roles."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, Protocol

from weft.core.yamlfields import is_null
from weft_protocols.errors import InvalidName
from weft_protocols.subjects import check_token

if TYPE_CHECKING:
    import yaml

ROLE: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_EXAMPLE: Final = "[finance, ops]"


class Reader(Protocol):
    """What reading this section needs of the reader of `mesh.yaml`."""

    def text(self, node: yaml.Node, where: str) -> str | None:
        """A scalar as it is written."""
        ...

    def mapping(self, node: yaml.Node, where: str, known: tuple[str, ...] | None) -> dict[str, yaml.Node]:
        """Entries of a mapping."""
        ...

    def sequence(self, node: yaml.Node | None, where: str, example: str) -> list[yaml.Node]:
        """Entries of a list."""
        ...

    def mistake(self, node: yaml.Node, where: str, what: str) -> None:
        """Remember what is wrong."""
        ...


def read_approvers(reader: Reader, node: yaml.Node | None) -> dict[str, tuple[str, ...]]:
    """Roles by person; mistakes are the reader's. A person without roles decides what needs none."""
    made: dict[str, tuple[str, ...]] = {}
    for name, entry in reader.mapping(node, "approvers", None).items() if node is not None else ():
        where = f"approvers.{name}"
        if (twin := _twin(name, made)) is not None:
            reader.mistake(entry, where, f"is the same person as {twin!r}: names differ in more than case")
        _check(reader, entry, where, name)
        roles: list[str] = []
        for one in [] if is_null(entry) else reader.sequence(entry, where, _EXAMPLE):
            role = reader.text(one, where)
            if role is None:
                continue
            if not ROLE.fullmatch(role):
                reader.mistake(one, where, f"{role!r} is no role: use 1 to 64 of A-Z a-z 0-9 _ . -")
            roles.append(role)
        made[name] = tuple(dict.fromkeys(roles))
    return made


def _twin(name: str, known: Mapping[str, object]) -> str | None:
    return next((one for one in known if one.casefold() == name.casefold()), None)


def _check(reader: Reader, node: yaml.Node, where: str, name: str) -> None:
    try:
        check_token(name, "name")
    except InvalidName as error:
        reader.mistake(node, where, str(error))
