"""Silences what the libraries print of themselves."""


def quiet_transformers() -> None:
    """No warnings and no progress bars: what transformers warns of is refused or not our case."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
