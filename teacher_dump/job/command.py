"""`run`: its arguments and what it prints."""

from typing import Any

from decant.teacher_dump.job.ray_pool import RayConfig


def ray_config(values: Any) -> RayConfig | None:
    """Ray's options where they were asked for, None for a local run. Raises ValueError for both."""
    ray = values["ray"]
    if values["executor"] == "local" and ray != RayConfig():
        raise ValueError("ray.* have no effect with executor local: add --executor ray")
    if values["executor"] == "ray" and values["num_workers"] != 1:
        raise ValueError("num-workers has no effect with executor ray, which counts its actors")
    return ray if values["executor"] == "ray" else None
