"""Names that two processes share. Imports no vLLM."""

from typing import Any

PLUGIN = "decant"
"""Our name in the groups vllm.general_plugins and vllm.endpoint_plugins, and in VLLM_PLUGINS."""


HEAD_VARIABLE = "DECANT_SCORING_HEAD"
"""Architecture that is to carry the scoring head."""


SERVER_VARIABLE = "DECANT_SERVER_PID"
"""The process that serves; those it starts are to end with it."""


class WorkerExtension:
    """What we add to every worker of vLLM, to be called by `collective_rpc`."""

    model_runner: Any

    def cut_logits(self, vocab_size: int) -> None:
        """Make ids from `vocab_size` on impossible, which no log prob is normalised over then."""
        model = self.model_runner.model
        compute = model.compute_logits

        def cut(*args: Any, **kwargs: Any) -> Any:
            logits = compute(*args, **kwargs)
            if logits is not None:  # of ranks that see none
                logits[..., vocab_size:] = float("-inf")
            return logits

        model.compute_logits = cut

    def clear_kv_cache(self) -> None:
        """Zero the keys and values of all sequences, none of which may be running.

        vLLM reads whole blocks and multiplies what lies beyond a sequence by zero, so a NaN that
        one sequence leaves behind spoils the next one in its block.
        """
        for tensor in self.model_runner.kv_caches:
            tensor.zero_()
