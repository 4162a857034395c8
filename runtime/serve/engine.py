"""The one thread that runs the model: it takes jobs from the queue and tells each one's chunks to its event loop.

A job is cancelled between two images, two chunks of its prompt or two tokens; whatever happens to it, the thread goes
on with the next.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Iterator
from time import monotonic
from typing import TypeAlias

from phisight.answer import Chunk
from phisight.errors import PhisightError
from phisight.serve.errors import ApiError
from phisight.serve.queue import FairQueue

__all__ = ["Engine", "Job"]

Event: TypeAlias = Chunk | Exception
log = logging.getLogger("phisight.serve")


class Job:
    """One answer, from its request to its last chunk. Made in the event loop that reads `chunks`.

    `work` gives the chunks, in the engine's thread; it is to ask `should_stop` whenever it can end.
    """

    def __init__(self, client: bytes, seconds: float) -> None:
        """`seconds` may pass until the answer's end."""
        self.client = client
        self.work: Iterator[Chunk] | None = None
        self.submitted = monotonic()
        self.started: float | None = None
        self._deadline = self.submitted + seconds
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._cancelled: str | None = None

    @property
    def queued_seconds(self) -> float:
        """From the request's arrival to the beginning of its work, or until now."""
        return (self.started or monotonic()) - self.submitted

    @property
    def seconds_left(self) -> float:
        """Until the deadline."""
        return max(self._deadline - monotonic(), 0)

    def cancel(self, reason: str) -> None:
        """Stop as soon as possible, and free what waits. From any thread."""
        self._cancelled = self._cancelled or reason

    def should_stop(self) -> bool:
        """Whether nobody wants the answer any more."""
        return self._cancelled is not None or monotonic() > self._deadline

    async def chunks(self) -> AsyncIterator[Chunk]:
        """The answer as it comes; the last chunk has a finish reason.

        Raises ApiError at the deadline (504), or when the server stops (503); and what the engine raised.
        """
        while True:
            try:
                async with asyncio.timeout(self.seconds_left):
                    event = await self._events.get()
            except TimeoutError:
                self.cancel("the deadline passed")
                raise self._too_late() from None
            if isinstance(event, Exception):
                raise event
            if event.finish_reason == "cancelled":
                raise self._too_late() if self._cancelled is None else ApiError(503, self._cancelled, code="cancelled")
            yield event
            if event.finish_reason is not None:
                return

    def run(self) -> None:
        """In the engine's thread."""
        self.started = monotonic()
        work, self.work = self.work, None
        if work is None or self.should_stop():
            self._tell(Chunk("", finish_reason="cancelled"))
            return
        try:
            for chunk in work:
                self._tell(chunk)
        except Exception as error:
            if not isinstance(error, PhisightError):
                log.exception("an answer failed")
            self._tell(error)

    def _tell(self, event: Event) -> None:
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the loop has ended, and with it all who listened
            self.cancel("the server has stopped")

    def _too_late(self) -> ApiError:
        seconds = self._deadline - self.submitted
        return ApiError(504, f"the answer did not end within {seconds:g} seconds", code="deadline")


class Engine:
    """Runs jobs one after the other in a thread of its own. `with` starts and stops it."""

    def __init__(self) -> None:
        self._queue: FairQueue[Job] = FairQueue()
        self._thread = threading.Thread(target=self._run, name="phisight-engine", daemon=True)
        self._running: Job | None = None
        self._jobs: set[Job] = set()  # handed in and not ended; touched by the event loop's thread alone

    def __enter__(self) -> Engine:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel_all("the server has stopped")
        self._queue.close()
        self._thread.join()

    @property
    def waiting(self) -> int:
        """Jobs in the queue."""
        return len(self._queue)

    @property
    def running(self) -> bool:
        """Whether a job is being worked on."""
        return self._running is not None

    @property
    def alive(self) -> bool:
        """Whether a job would be taken."""
        return self._thread.is_alive()

    def submit(self, job: Job) -> None:
        """Queue a job. Its `chunks` are to be read, and `release` called at last."""
        self._jobs.add(job)
        self._queue.put(job.client, job)

    def release(self, job: Job) -> None:
        """Nobody reads the job any more: it leaves the queue, or stops."""
        job.cancel("nobody waits for the answer")
        self._queue.drop(job.client, job)
        self._jobs.discard(job)

    def cancel_all(self, reason: str) -> None:
        """End all jobs with status 503."""
        for job in tuple(self._jobs):
            job.cancel(reason)

    def _run(self) -> None:
        while (job := self._queue.take()) is not None:
            self._running = job
            try:
                job.run()
            finally:
                self._running = None
            del job  # and its pictures, while the next one is waited for
