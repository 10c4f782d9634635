"""`serve`: what it takes."""

from decant.storage.cli import process
from decant.storage.cli.commands import Command
from decant.teacher_dump.config import ServeConfig

TEXT = """
  decant serve --teacher.path path/or/hub-id --teacher.engine vllm --port 8000
  decant serve --config serve.yaml --host 0.0.0.0 --api_key_env TEACHER_KEY

Runs on the machine with the GPUs. A dump elsewhere uses it with
`teacher: {engine: http, endpoints: [http://host:8000]}`: it needs neither the
model's files nor vLLM. Truncation and temperatures come with each dump, so that
one service is enough for several. GET /health answers 200 once the teacher is
loaded.

Beyond this machine it wants an API key (api_key_env), or allow_without_key.
What a client may ask for at a time is bounded by --limits.*; what is refused is
one line in the log. For TLS put a proxy before it.
"""


def run_serve(config: ServeConfig) -> int:
    """Serve until told to end; returns the exit code."""
    from decant.teacher_dump.engines.quiet import quiet_transformers
    from decant.teacher_dump.service.serve import serve

    quiet_transformers()
    serve(config)
    return process.DONE


SERVE = Command(
    text=TEXT,
    config=ServeConfig,
    common=("teacher.path", "teacher.engine", "host", "port", "api_key_env"),
    run=run_serve,
)
