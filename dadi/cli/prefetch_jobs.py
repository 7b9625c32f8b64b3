"""`dadi prefetch list|status|cancel|retry`: jobs that superpeers have already. Added to the group by `prefetch.py`.

A job is every superpeer's own: each that is named is asked, and what each did is said. Exit status 0 means

    status    everybody who was asked has answered, and somebody has the job
    cancel    it runs nowhere any more, as far as its superpeers say who shares it; one that had ended already is fine
    retry     it is under way at all that have it: begun anew, or it had not ended. Those who are not named hear of it
              from those that are
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import click
import msgspec

from dadi.cli import prefetch_show
from dadi.cli.client import as_json
from dadi.cli.prefetch_where import Where, platforms, where, where_options
from dadi.cli.prefetch_who import Who, who_options
from dadi.errors import Conflict, DadiError, NotFound
from dadi.prefetch.life import State
from dadi.prefetch.messages import Job, Request, Scope, canonical, job_id
from dadi.wire import error_fields

if TYPE_CHECKING:
    from dadi.cli.prefetch_talk import Talk
    from dadi.oci.credentials import CredentialSource

T = TypeVar("T")
_JOB = re.compile(r"[0-9a-f]{12}")
Found = dict[tuple[str, str], T]
"""By datacenter and superpeer."""


@click.command("list")
@where_options
@who_options
@click.option("--registry", default="", metavar="HOST", help=(
    "Also the jobs of this registry's images that our credentials for it open."))
@as_json
def list_(
    superpeers: tuple[str, ...], datacenters: tuple[str, ...], everywhere: bool, datacenters_file: str, registry: str,
    as_json: bool, who: Who,
) -> None:  # fmt: skip
    """List the jobs of images that anybody may have."""
    whom = where(superpeers, datacenters, everywhere, datacenters_file)
    source = who.source((), [registry] if registry else ())
    found, errors = _everywhere(whom, who, source, lambda talk, url: talk.jobs(url, registry))
    rows = [(name, url, job) for (name, url), jobs in found.items() for job in jobs]
    if as_json:
        click.echo(msgspec.json.encode([_told(name, url, job) for name, url, job in rows]))
    else:
        prefetch_show.jobs(rows)
    _fail_for(errors)


def _told(datacenter: str, url: str, job: Job) -> dict[str, Any]:
    return {"datacenter": datacenter, "superpeer": url, **msgspec.to_builtins(job)}


def _job_command(verb: Callable[..., None]) -> click.Command:
    """Make a command of a function that is about one job: by its id, or by the image that it is of."""
    for option in (
        click.option("--scope", type=click.Choice(["startup", "full"]), default="full", show_default=True, help=(
            "Of a job that is named by its image.")),
        click.option("--platform", default="", metavar="OS/ARCH", help="Of a job that is named by its image."),
        where_options,
        who_options,
        as_json,
        click.argument("job"),
    ):  # fmt: skip
        verb = option(verb)
    return click.command()(verb)


@_job_command
def status(
    job: str, platform: str, scope: Scope, superpeers: tuple[str, ...], datacenters: tuple[str, ...], everywhere: bool,
    datacenters_file: str, as_json: bool, who: Who,
) -> None:  # fmt: skip
    """Show all of a JOB, by its id or its image."""
    whom = where(superpeers, datacenters, everywhere, datacenters_file)
    _about_job("", job, platform, scope, whom, who, quiet=as_json)


@_job_command
def cancel(
    job: str, platform: str, scope: Scope, superpeers: tuple[str, ...], datacenters: tuple[str, ...], everywhere: bool,
    datacenters_file: str, as_json: bool, who: Who,
) -> None:  # fmt: skip
    """Stop a JOB, or end the pin of one that is ready; what it has brought stays until the room is needed.

    All superpeers of a datacenter have to be asked. Exit status 1 if any that shares the job was not, or did not stop.
    """
    whom = where(superpeers, datacenters, everywhere, datacenters_file)
    _about_job("cancel", job, platform, scope, whom, who, quiet=as_json)


@_job_command
def retry(
    job: str, platform: str, scope: Scope, superpeers: tuple[str, ...], datacenters: tuple[str, ...], everywhere: bool,
    datacenters_file: str, as_json: bool, who: Who,
) -> None:  # fmt: skip
    """Begin a JOB that has ended once more, with the image as it is now; one that waits to be tried again is tried now.

    Exit status 1 if any superpeer that was asked did neither, and it is not under way there.
    """
    whom = where(superpeers, datacenters, everywhere, datacenters_file)
    _about_job("retry", job, platform, scope, whom, who, quiet=as_json)


# ---- how


def _about_job(what: str, job: str, platform: str, scope: Scope, whom: Where, who: Who, *, quiet: bool) -> None:
    reference, named = "", job
    hint = "dadi prefetch list shows those of public images; of a private one name the image instead of the job"
    if not _JOB.fullmatch(job):
        request = canonical(Request(job, platforms([platform] if platform else [])[0], scope=scope))
        named = f"{request.reference}, of scope {scope}, {request.platform}"
        hint = "--scope and --platform name another; dadi prefetch list --registry HOST lists private ones"
        job, reference = job_id(request), request.reference
    as_it_was: dict[str, DadiError] = {}

    async def one(talk: Talk, url: str) -> Job:
        if not what:
            return await talk.job(url, job, reference)
        try:
            return await talk.act(url, job, what, reference)
        except Conflict as error:  # it has ended there already, or not ended yet
            as_it_was[url] = error
            return await talk.job(url, job, reference)

    found, errors = _everywhere(whom, who, who.source([reference] if reference else []), one)
    # Not every superpeer named here need have it: they may be of several datacenters.
    away = {key: error for key, error in errors.items() if not isinstance(error, NotFound)}
    if quiet:
        rows = [_told(name, url, each) for (name, url), each in found.items()]
        if what:
            rows += [{"datacenter": name, "superpeer": url, **error_fields(error)}
                     for (name, url), error in errors.items()]  # fmt: skip
        click.echo(msgspec.json.encode(rows))
    else:
        for (_, url), each in found.items():
            prefetch_show.one(url, each)
        for _, url in errors.keys() - away.keys() if what else ():
            click.echo(f"{job} at {url}: no such job")
    if not found and not away:
        raise NotFound(f"no superpeer that was asked has the job {named}", hint=hint)
    away |= {key: as_it_was[key[1]] for key, each in found.items() if key[1] in as_it_was and (
        len(as_it_was) == len(found) or not _is_done(what, each))}  # fmt: skip
    asked = {url for place in whom.places for url in place.urls}
    if what == "cancel":
        hint = "name it too, or --datacenter"
        error = NotFound("it was not asked: there the job goes on, or stays pinned", hint=hint)
        away |= {("", url): error for url in _not_asked(found.values(), asked)}
    if what and not reference:
        # By its id alone a job that we may not see is none: who shares it, and says so, has not done what it should.
        error = NotFound("it shares the job, and does not show it by its id", hint="name the image instead of the job")
        silent = _not_asked(found.values(), {url for _, url in (*found, *away)})
        away |= {("", url): error for url in silent if url in asked}
    _fail_for(away)


def _is_done(what: str, job: Job) -> bool:
    """Whether a job that could not be cancelled, or retried, is as it would be then."""
    return job.state.is_over if what == "cancel" else job.state not in (State.FAILED, State.CANCELLED)


def _not_asked(jobs: Iterable[Job], asked: Iterable[str]) -> list[str]:
    """Return the superpeers that share a job, as those say who were asked, and are none of them."""
    told = list(jobs)
    return sorted({url for job in told for url in job.superpeers} - {job.url for job in told} - set(asked))


def converse(whom: Where, who: Who, credentials: CredentialSource, work: Callable[[Talk], Any]) -> None:
    """Do work that talks to superpeers."""
    from dadi.cli.prefetch_talk import talking

    async def run() -> None:
        async with talking(whom.tls, credentials, who.token) as talk:
            await work(talk)

    asyncio.run(run())


def _everywhere(
    whom: Where, who: Who, credentials: CredentialSource, ask: Callable[[Talk, str], Any]
) -> tuple[Found[Any], Found[DadiError]]:
    """Return what each superpeer answers, and what went wrong with the others; in the order in which they are named."""
    keys = [(place.name, url) for place in whom.places for url in place.urls]
    found: Found[Any] = {}
    errors: Found[DadiError] = {}

    async def one(talk: Talk, name: str, url: str) -> None:
        try:
            found[name, url] = await ask(talk, url)
        except DadiError as error:
            errors[name, url] = error

    async def everybody(talk: Talk) -> None:
        await asyncio.gather(*(one(talk, name, url) for name, url in keys))

    converse(whom, who, credentials, everybody)
    return _in_order(keys, found), _in_order(keys, errors)


def _in_order(keys: Iterable[tuple[str, str]], found: Found[T]) -> Found[T]:
    return {key: found[key] for key in keys if key in found}


def _fail_for(errors: Found[DadiError]) -> None:
    for (_, url), error in errors.items():
        click.echo(f"dadi: {url}: {error}", err=True)
    if errors:
        sys.exit(1)


COMMANDS = (list_, status, cancel, retry)
