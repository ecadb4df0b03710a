"""Online stores: the newest feature row of every entity, in LMDB or Redis."""

from mlops_ray.features.online.opening import open_online
from mlops_ray.features.online.protocol import (
    EXPIRED,
    NOT_FOUND,
    NULL,
    PRESENT,
    Cursor,
    Keys,
    OnlineStore,
)
from mlops_ray.features.online.reader import Reader

__all__ = [
    "EXPIRED",
    "NOT_FOUND",
    "NULL",
    "PRESENT",
    "Cursor",
    "Keys",
    "OnlineStore",
    "Reader",
    "open_online",
]
