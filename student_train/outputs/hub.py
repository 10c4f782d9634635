"""Put a finished student on the Hugging Face hub, if asked to; access is checked at the start."""

from pathlib import Path

from huggingface_hub import HfApi, get_token


def check_hub(repo: str) -> None:
    """Raise ValueError unless the hub knows us: found out before training, not after."""
    if not get_token():
        raise ValueError(
            f"push_to_hub {repo} needs a token: run `hf auth login`, set HF_TOKEN, or leave it out"
        )
    try:
        HfApi().whoami()
    except Exception as error:  # whatever the HTTP library of the day raises
        raise ValueError(f"push_to_hub {repo}: the hub does not know us: {error}") from error


def push(folder: Path, repo: str, *, private: bool) -> str:
    """Upload a student's directory, into a repository that is made if need be; return its address.

    Raises RuntimeError with the command that tries again; the directory stays.
    """
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=folder))
    except Exception as error:
        raise RuntimeError(
            f"the student is complete in {folder}, but could not be uploaded: {error}. "
            f"To try again: hf upload {repo} {folder}"
        ) from error
