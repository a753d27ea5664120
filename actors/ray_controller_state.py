"""The controller's state in the key-value store of Ray's head. Implements `StateStore`.

Lost with the head where that keeps its own state in memory only, and so are the actors then.
"""

from typing import Any

from ray.exceptions import RayError
from ray.experimental import internal_kv

from everstep.actors.controller_state import StateUnavailable

_kv: Any = internal_kv  # untyped
_NAMESPACE = "everstep"
_PREFIX = "controller/"


class RayKvState:
    """This process must be connected to a Ray."""

    def __init__(self, prefix: str = _PREFIX) -> None:
        self.place = f"Ray's key-value store ({_NAMESPACE}/{prefix})"
        self._prefix = prefix

    def newest(self) -> tuple[int, bytes] | None:
        try:
            while numbers := self._numbers():
                data = _kv._internal_kv_get(self._key(numbers[-1]), namespace=_NAMESPACE)
                if data is not None:  # else a newer one was written meanwhile, and this one removed
                    return numbers[-1], bytes(data)
        except (RayError, RuntimeError) as error:
            raise StateUnavailable(f"{self.place}: {error}") from error
        return None

    def put_new(self, number: int, data: bytes) -> bool:
        try:
            was_there: bool = _kv._internal_kv_put(self._key(number), data, overwrite=False, namespace=_NAMESPACE)
        except (RayError, RuntimeError) as error:
            raise StateUnavailable(f"{self.place}: {error}") from error
        return not was_there

    def remove(self, below: int) -> None:
        try:
            for number in self._numbers():
                if number < below:
                    _kv._internal_kv_del(self._key(number), namespace=_NAMESPACE)
        except (RayError, RuntimeError) as error:
            raise StateUnavailable(f"{self.place}: {error}") from error

    def _key(self, number: int) -> str:
        return f"{self._prefix}{number}"

    def _numbers(self) -> list[int]:
        keys = _kv._internal_kv_list(self._prefix, namespace=_NAMESPACE)
        return sorted(int(key.decode().removeprefix(self._prefix)) for key in keys)
