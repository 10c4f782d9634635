"""The embedded engine: any causal language model of transformers."""
