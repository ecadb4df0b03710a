"""Who answers: the champion, or a challenger by its share of the requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any
from weakref import ReferenceType, ref

from numpy.typing import NDArray

from mlops_ray.serving.models.loading import Columns, LoadedModel, ModelSet

_LEAST_SHARE = 1e-9
_SALT_BYTES, _HASH_BYTES = 16, 8
_HASHES = 2 ** (8 * _HASH_BYTES)
_MOST_KEYS = 20_000


_Key = tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class _Turn:
    """A challenger's turn at a key: it takes it where its hash is below ``limit``.

    ``hashing`` has taken its salt and waits for a key.
    """

    place: int
    hashing: Any
    limit: int


class Router:
    """Chooses the model that answers, by the shares of a ``ModelSet``.

    A sticky key is offered to one challenger after the other, by name. Each takes it where its own
    hash of the key is below its share of what is left, and the champion has the rest. So with one
    challenger, a changed share moves no key that it need not; with several, what the others give up
    they get back from the champion. The same in every replica.

    Args:
        project: Part of the hash, so that projects divide the same keys differently.
        sticky_by: The inputs whose values make a row's key; none: a request's first id is the key of
            all of it, so that one which is sent again is answered by the same model.
    """

    def __init__(self, project: str, sticky_by: Sequence[str] = ()) -> None:
        self._project = project
        self._sticky_by = tuple(sticky_by)
        self._last: tuple[ReferenceType[ModelSet], list[_Turn], dict[_Key, int]] | None = None

    @property
    def is_sticky(self) -> bool:
        """Whether each row is routed by its inputs, rather than each request by its first id."""
        return bool(self._sticky_by)

    def owner(self, models: ModelSet, identifier: str) -> LoadedModel:
        """Return the model for a request, by its first id."""
        if not models.challengers:
            return models.answer
        place = _owner(identifier.encode(errors="backslashreplace"), self._turns(models)[0])
        return models.challengers[place - 1] if place else models.answer

    def owners(self, models: ModelSet, inputs: Columns) -> tuple[list[LoadedModel], list[int]]:
        """Return the models that may answer, and which of them does for each row, by its inputs."""
        turns, known = self._turns(models)
        if len(known) > _MOST_KEYS:
            known.clear()
        columns = [_plain(inputs[name]).tolist() for name in self._sticky_by]
        if not turns:
            return [models.answer], [0] * len(columns[0])
        owners = []
        for key in zip(*columns, strict=True):
            place = known.get(key)
            if place is None:
                # Equal values are written alike, whatever array holds them.
                place = _owner(repr(key).encode("ascii", "backslashreplace"), turns)
                known[key] = place
            owners.append(place)
        return [models.answer, *models.challengers], owners

    def _turns(self, models: ModelSet) -> tuple[list[_Turn], dict[_Key, int]]:
        """Return the turns at keys, and who answers those that were asked for last."""
        last = self._last
        if last is None or last[0]() is not models:
            last = self._last = ref(models), self._made(models), {}
        return last[1:]

    def _made(self, models: ModelSet) -> list[_Turn]:
        turns, left = [], 1.0
        challengers = enumerate(models.served.challengers, start=1)
        for place, challenger in sorted(challengers, key=lambda item: item[1].spec.alias):
            name = f"{self._project}/{challenger.spec.alias}"
            salt = blake2b(name.encode(), digest_size=_SALT_BYTES).digest()
            # Rounding must not leave the last of them a share above 1, or nothing.
            part = min(1.0, challenger.share / left) if left > _LEAST_SHARE else 1.0
            hashing = blake2b(digest_size=_HASH_BYTES, key=salt)
            turns.append(_Turn(place, hashing, int(part * _HASHES)))
            left -= challenger.share
        return turns


def _plain(values: NDArray[Any]) -> NDArray[Any]:
    """Return the values of a column such that equal ones are written alike: no -0.0."""
    return values + 0.0 if values.dtype.kind == "f" else values


def _owner(key: bytes, turns: Sequence[_Turn]) -> int:
    for turn in turns:
        hashing = turn.hashing.copy()
        hashing.update(key)
        if int.from_bytes(hashing.digest(), "little") < turn.limit:
            return turn.place
    return 0
