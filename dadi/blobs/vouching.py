"""What a store says of its blobs, made true: claims hashed, the whole verified and synced, wrong bytes taken back.

    claims (of an unclean stop)   hashed before they are believed; what is wrong is marked as missing on the disk
    finish                        all hashed and synced, then marked as complete: in that order
    withdraw                      of a complete blob: the marks of its chunks first, then "complete" goes; a blob with
                                  neither would be thrown away by the next process (`files.withdraw`)

What happens to chunks and blobs in all of that is the tables of `stored.py`. Callers hold the blob.
"""

from __future__ import annotations

from collections.abc import Collection

import structlog

from dadi.blobs import files
from dadi.blobs.files import full_or_broken
from dadi.blobs.space import Space
from dadi.blobs.stored import Stored
from dadi.errors import DadiError, DigestMismatch, NotFound

log = structlog.get_logger()


class Vouching:
    """See the head of this file."""

    def __init__(self, space: Space) -> None:
        self._space = space

    def __repr__(self) -> str:
        return f"Vouching({self._space!r})"

    async def look_at_claims(self, stored: Stored, chunks: range) -> None:
        """Hash those of the chunks that are claimed: they are present then, or missing."""
        claims = sorted(stored.claimed.intersection(chunks))
        good, written = await self._space.run(files.hash_again, stored.directory, stored.blob, claims)
        stored.in_doubt |= not written
        wrong = stored.hashed(claims, good)
        if wrong:
            log.warning("chunks on disk are not what they should be; they will be fetched", blob=stored.blob.digest,
                        chunks=len(wrong), first=wrong[0], file=str(stored.directory.data))  # fmt: skip
        self._space.bytes -= stored.drop(wrong)

    async def finish(self, stored: Stored) -> None:
        """Hash the whole, sync it, mark it complete. See `BlobStore.finish` for what it raises."""
        async with stored.vouching:
            if stored.complete:
                return
            blob = stored.blob
            if stored.missing(range(blob.table.count)):
                raise NotFound(f"{blob} is not all in {self._space.root} any more")
            try:
                good = await self._space.run(files.complete, stored.directory, blob)
            except OSError as error:
                self._space.bytes -= stored.lost()
                raise full_or_broken(stored.directory.path, error) from None
            if not good:
                # No await from here to the raise: nobody may keep a chunk by the same table in between.
                self._space.bytes -= stored.lied()
                raise DigestMismatch(
                    f"all chunks of {blob.digest} match its chunk table, but the whole does not match its digest",
                    hint="its chunk table is wrong: unmount the images that have it, and mount them again",
                )
            # Where this fails nothing is lost, the data is durable. On a full disk what nobody uses goes first.
            await self._space.writing(stored.directory, stored.directory.mark_complete)
            stored.finished()

    async def withdraw(self, stored: Stored, chunks: Collection[int]) -> None:
        """Believe these chunks no more; the blob is not complete then. See `DiskBlobs.withdraw` for what it raises."""
        async with stored.vouching:
            gone = stored.believed(chunks)
            self._space.bytes -= stored.drop(gone)
            stored.unmarked |= stored.complete
            marks = bytes(stored.present) if stored.unmarked else None
            try:
                # Until this has ended a complete blob keeps nothing: there is no file of marks yet.
                await self._write_marks(stored, gone, marks)
            except DadiError:
                stored.in_doubt = True
                raise
            finally:
                stored.withdrawn()

    async def mark(self, stored: Stored) -> None:
        """Write the marks that could not be written when chunks of a complete blob were withdrawn."""
        async with stored.vouching:
            if stored.unmarked:
                await self._write_marks(stored, [], bytes(stored.present))

    async def _write_marks(self, stored: Stored, gone: list[int], marks: bytes | None) -> None:
        await self._space.writing(stored.directory, files.withdraw, stored.directory, stored.blob, gone, marks)
        stored.unmarked = False
