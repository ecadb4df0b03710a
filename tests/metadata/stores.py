"""Stores that the contract of artifacts is checked on, and an S3 server for one of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlops_ray.metadata.artifacts import ArtifactStore
from mlops_ray.metadata.bucket import BucketBlobs
from mlops_ray.metadata.folder import FolderBlobs


def start_server() -> tuple[object, str]:
    """Start an S3 server with a bucket ``lake``; return it and its host and port."""
    import logging

    import boto3
    from moto.server import ThreadedMotoServer

    # It would print a line for each request.
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    boto3.client(
        "s3",
        endpoint_url=f"http://{host}:{port}",
        region_name="us-east-1",
        aws_access_key_id="k",
        aws_secret_access_key="s",
    ).create_bucket(Bucket="lake")
    return server, f"{host}:{port}"


def address(endpoint: str, prefix: str = "artifacts") -> str:
    """Return the URL of a store on the server."""
    return f"s3://k:s@lake/{prefix}?region=us-east-1&scheme=http&endpoint_override={endpoint}"


def open_store(where: str, cache: Path) -> ArtifactStore:
    """Open a store at a folder or at an address."""
    if where.startswith("s3:"):
        return ArtifactStore(BucketBlobs.at(where, cache))
    return ArtifactStore(FolderBlobs(Path(where)))


def put_all(where: str, cache: Path, tree: Path, ready: Any) -> None:
    """Store some values and a folder, together with other processes that do the same."""
    store = open_store(where, cache)
    ready.wait()
    for number in range(12):
        store.put({"number": number})
    store.put(tree)
