"""`push` and `pull`: what they take and what they print."""

from dataclasses import dataclass
from typing import Annotated

from decant.storage.cache.command import refuse_missing
from decant.storage.cli import process
from decant.storage.cli.commands import Command
from decant.storage.cli.options import Named, Shown, Word


@dataclass(frozen=True, kw_only=True)
class PushArguments:
    """What to push, and where to."""

    url: Annotated[str, Word("CACHE")]
    """The cache: a local directory."""
    repo: Annotated[str, Word("REPO")]
    """A dataset repository, OWNER/NAME; it is made if need be."""
    license_id: Annotated[str, Shown("ID"), Named("license")]
    """The licence of the data set, such as apache-2.0 or other."""
    public: bool = False
    """Make a new repository public; it is private otherwise."""
    dry_run: bool = False
    """List the files and their bytes, and stop."""


@dataclass(frozen=True, kw_only=True)
class PullArguments:
    """What to pull, and where to."""

    repo: Annotated[str, Word("REPO")]
    """A dataset repository, OWNER/NAME."""
    out: Annotated[str, Word("DIR")]
    """A local directory that does not exist yet."""
    revision: Annotated[str, Shown("NAME")] = ""
    """Branch, tag or commit; empty is the newest."""
    dry_run: bool = False
    """List the files and their bytes, and stop."""


def run_push(arguments: PushArguments) -> int:
    """Push a cache; returns the exit code."""
    from decant.storage.cli.terminal import progress_bar
    from decant.storage.hub.push import plan_push, push
    from decant.storage.hub.repository import quiet_off_terminals

    quiet_off_terminals()
    refuse_missing(arguments.url)
    if arguments.dry_run:
        files, _ = plan_push(arguments.url, arguments.repo, arguments.license_id)
        _list(files)
        return process.DONE
    with progress_bar("verify", "shards") as progress, process.libraries_on_stderr():
        pushed = push(
            arguments.url,
            arguments.repo,
            license_id=arguments.license_id,
            public=arguments.public,
            progress=progress,
        )
    if pushed.problems:
        print(_lines(pushed.problems))
        return process.BAD_DATA
    print(f"{pushed.address}: {pushed.files} files, {pushed.bytes} bytes")
    return process.DONE


def run_pull(arguments: PullArguments) -> int:
    """Pull a cache; returns the exit code."""
    from decant.storage.cli.terminal import progress_bar
    from decant.storage.hub.pull import plan_pull, pull
    from decant.storage.hub.repository import quiet_off_terminals

    quiet_off_terminals()
    revision = arguments.revision or None
    if arguments.dry_run:
        files, _ = plan_pull(arguments.repo, revision=revision)
        _list(files)
        return process.DONE
    with progress_bar("verify", "shards") as progress, process.libraries_on_stderr():
        pulled = pull(arguments.repo, arguments.out, revision=revision, progress=progress)
    report = pulled.report
    if not report.ok:
        print(_lines(report.problems))
        return process.BAD_DATA
    print(
        f"{arguments.out}: {report.targets} targets in {report.sequences} sequences, "
        f"{report.shards} shards, {report.bytes} bytes, of commit {pulled.revision}"
    )
    return process.DONE


def _list(files: dict[str, int]) -> None:
    from decant.storage.cli.terminal import escaped

    width = max(len(str(size)) for size in files.values())
    for name, size in files.items():
        print(f"{size:>{width}}  {escaped(name)}")
    print(f"{sum(files.values()):>{width}}  bytes in {len(files)} files")


def _lines(problems: tuple[str, ...]) -> str:
    from decant.storage.cli.terminal import escaped

    return "\n".join(escaped(" ".join(problem.split())) for problem in problems)


PUSH = Command(
    text="""
  decant push caches/demo me/demo-cache --license apache-2.0 --dry-run
  decant push caches/demo me/demo-cache --license apache-2.0

The cache is verified, described in a dataset card (figures of inspect, how to
read it), uploaded, and compared with what arrived. Shards, plan, records,
tokenizer, kept figures and generated records travel; other files in its
directory do not. The texts that were scored are in the shards as token ids,
and as conversations where those are kept: whoever can read the repository can
read them. An interrupted push goes on where it was. A repository that holds
another cache or other files is refused. Exit code 0; 1 if the cache is damaged;
2 with one line of why not.
""",
    arguments=PushArguments,
    run=run_push,
)
PULL = Command(
    text="""
  decant pull me/demo-cache caches/demo
  decant pull me/demo-cache caches/demo --revision v2 --dry-run

Copies a cache that was pushed and verifies every byte; DIR appears when it is
whole. An interrupted pull goes on where it was. To train without a copy, give
hf://datasets/me/demo-cache wherever a cache is asked for. Exit code 0; 1 if
what was copied is damaged; 2 with one line of why not.
""",
    arguments=PullArguments,
    run=run_pull,
)
