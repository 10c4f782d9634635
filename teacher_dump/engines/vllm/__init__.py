"""The engine that runs vLLM in a process of its own."""
