"""Claims about a teacher's options: what makes no sense together is refused by name."""

from typing import Any

import pytest

from decant.teacher_dump.engines import TeacherConfig
from decant.teacher_dump.engines.config import EFFECT, ENGINES

NEEDED: dict[str, dict[str, Any]] = {
    "transformers": {"path": "x"},
    "vllm": {"path": "x"},
    "http": {"endpoints": ("http://h",)},
    "openai": {"endpoints": ("http://h",), "tokenizer": "t"},
}
OTHER: dict[str, Any] = {
    "path": "x",
    "revision": "main",
    "adapter": "a",
    "trust_remote_code": True,
    "device": "cpu",
    "attention": "eager",
    "quantization": "bnb-4bit",
    "max_memory": {"cpu": "1GB"},
    "offload_folder": "folder",
    "tensor_parallel": 2,
    "endpoints": ("http://h",),
    "api_key_env": "KEY",
    "requests": 2,
    "wait_seconds": 1.0,
    "dtype": "float32",
    "max_batch_tokens": 7,
    "model": "m",
    "api": "vllm",
}
"""A value of each option that is not its default."""


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("option", EFFECT)
def test_an_option_without_effect_is_refused(engine: str, option: str) -> None:
    """With the engines that would ignore it, and with no other."""
    options = {"engine": engine, **NEEDED[engine], option: OTHER[option]}
    if engine in EFFECT[option]:
        assert getattr(TeacherConfig(**options), option) == OTHER[option]
        return
    with pytest.raises(ValueError, match=f"{option} has no effect with engine {engine}"):
        TeacherConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "http"}, "needs teacher.endpoints"),
        ({"engine": "http", "endpoints": ("h:1",)}, "'h:1' is not http://host:port"),
        ({"engine": "http", "endpoints": ("http://h:99999",)}, "'http://h:99999': Port out of"),
        ({"engine": "http", "endpoints": ("http://h:8x",)}, "'http://h:8x': Port could not"),
        ({"path": "x", "device": "meta"}, "device meta holds no weights"),
        ({"engine": "http", "endpoints": ("http://a:b@h",)}, "holds a password"),
        ({"engine": "http", "endpoints": ("http://h", "http://h/")}, "an endpoint twice"),
        (
            {"engine": "http", "endpoints": ("http://h",), "path": "x"},
            "path has no effect with engine http: the services",
        ),
        ({"engine": "http", "endpoints": ("http://h",), "requests": 0}, "requests is 0"),
        ({"engine": "http", "endpoints": ("http://h",), "wait_seconds": -1.0}, "wait_seconds is"),
        ({"path": "x", "endpoints": ("http://h",)}, "no effect with engine transformers"),
        ({"path": "x", "wait_seconds": 1.0}, "no effect with engine transformers"),
        ({"path": "x", "tensor_parallel": 2}, "tensor_parallel has no effect"),
        ({"path": "x", "engine": "vllm", "tensor_parallel": 0}, "tensor_parallel is 0"),
        (
            {"path": "x", "engine": "vllm", "device": "cpu", "attention": "e"},
            "device, attention have",
        ),
        ({"path": "x", "engine": "vllm", "max_memory": {"cpu": "1GB"}}, "max_memory has no effect"),
        ({"engine": "http", "endpoints": ("http://h",), "adapter": "a"}, "adapter has no effect"),
        ({"engine": "openai"}, "engine openai needs teacher.endpoints"),
        ({"engine": "openai", "endpoints": ("http://h",)}, "openai needs teacher.tokenizer"),
        (
            {"engine": "openai", "endpoints": ("http://h",), "tokenizer": "none"},
            "openai needs teacher.tokenizer",
        ),
        (
            {"engine": "openai", "endpoints": ("http://h",), "tokenizer": "t", "path": "x"},
            "path has no effect with engine openai: .*teacher.model names one",
        ),
        ({"path": "x", "api": "rest"}, "teacher.api 'rest' is not one of"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    """Each by name, with the way out."""
    with pytest.raises(ValueError, match=message):
        TeacherConfig(**options)
