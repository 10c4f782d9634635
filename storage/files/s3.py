"""How object stores are opened, and how often they are tried."""

import os
from typing import Any

import fsspec

S3_ROUNDS, S3_ATTEMPTS = 2, 3
"""Tries of s3fs, and botocore's in each: with 15 seconds to wait for an answer, 90 seconds."""


RETRY_VARIABLES = {"AWS_MAX_ATTEMPTS", "AWS_RETRY_MODE"}


def open_filesystem(url: str) -> tuple[Any, str]:
    """The file system of a URL and the path in it; one of S3 gives up a mute endpoint in time.

    s3fs tries everything `retries` times on top of botocore's attempts, each of which may wait for
    a read timeout. What fsspec's configuration or AWS_* variables say comes first.
    """
    options: dict[str, Any] = {"use_listings_cache": False}
    protocol = fsspec.utils.get_protocol(url)
    if protocol in ("s3", "s3a"):
        given = fsspec.config.conf.get(protocol, {}).get("config_kwargs", {})
        if not given.keys() & {"retries"} and not RETRY_VARIABLES & os.environ.keys():
            given = {**given, "retries": {"mode": "standard", "total_max_attempts": S3_ATTEMPTS}}
        options["config_kwargs"] = given
    if "://" not in url:  # a name in this machine's folders, in which :: means nothing
        files = fsspec.filesystem("file", use_listings_cache=False)
        return files, files._strip_protocol(url)
    files, root = fsspec.core.url_to_fs(url, **options)
    if protocol in ("s3", "s3a"):
        files.retries = S3_ROUNDS
    return files, root
