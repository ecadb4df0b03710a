"""Sources: where raw rows come from, and how they become clean ones."""

from mlops_ray.features.sources.loading import (
    Cleaned,
    clean_source,
    clean_table,
    extract_source,
    find_source,
    open_source,
)

__all__ = [
    "Cleaned",
    "clean_source",
    "clean_table",
    "extract_source",
    "find_source",
    "open_source",
]
