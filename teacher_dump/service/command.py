"""`serve`: its arguments."""

SERVE = """Offer a teacher to dump jobs on other machines, on the machine with the GPUs.

  python -m teacher_dump serve --teacher.path path/or/hub-id --teacher.engine vllm --port 8000
  python -m teacher_dump serve --config serve.yaml --host 0.0.0.0 --api_key_env TEACHER_KEY

A job uses it with `teacher: {engine: http, endpoints: [http://host:8000]}`: it needs neither the
model's files nor vLLM. Truncation and temperatures come with each job, so that one service is
enough for several. GET /health answers 200 once the teacher is loaded.
"""
