"""The engine that asks stock servers: vLLM's, SGLang's, and completions APIs with echo."""
