"""The endpoints that generate: from a body to a response."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from glm_edge.serve.http.answers import Answer
from glm_edge.serve.http.errors import ApiError, api_error
from glm_edge.serve.http.events import Submission
from glm_edge.serve.http.formats import Gathered
from glm_edge.serve.http.limits import Reservation
from glm_edge.serve.http.metrics import Timer
from glm_edge.serve.http.prepare import Prepared
from glm_edge.serve.http.service import Service
from glm_edge.serve.http.transport import (
    ClientGoneError,
    Receive,
    Reply,
    Send,
    headers_of,
    read_body,
    until_disconnect,
)
from glm_edge.serve.requests import Token

Prepare = Callable[[Service, bytes, str], Prepared]
CLIENT_GONE = 499


class Exchange:
    """An endpoint that generates, as an ASGI application."""

    def __init__(
        self, service: Service, name: str, prepare: Prepare, content_type: str = "application/json"
    ) -> None:
        """Create an endpoint.

        Args:
          service: the service.
          name: for metrics.
          prepare: makes requests to the engine from a body and its content type.
          content_type: of bodies.
        """
        self._service, self._name, self._prepare = service, name, prepare
        self._content_type = content_type

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request."""
        service = self._service
        reply = Reply(send, service.limits.write_s)
        reservation = Reservation(service.budget)
        service.metrics.open.inc()
        status: int | None = None
        complete = False
        try:
            try:
                headers = headers_of(scope)
                service.authorize(headers)
                content_type = self._checked_type(headers)
                raw = await read_body(headers, receive, service.limits, reservation)
                complete = True
                work = self._answer(raw, content_type, reply, reservation)
                await until_disconnect(receive, work, reply)
            except ClientGoneError:
                raise
            except Exception as error:
                failure = api_error(error)
                status = failure.status
                if not complete:
                    # The rest of the body is not read.
                    failure.headers["connection"] = "close"
                await reply.fail(failure)
        except ClientGoneError:
            status = CLIENT_GONE
        finally:
            reservation.release()
            service.metrics.open.dec()
            status = status or reply.status or CLIENT_GONE
            service.metrics.requests.labels(self._name, str(status)).inc()

    def _checked_type(self, headers: Mapping[bytes, bytes]) -> str:
        """Return the content type.

        A page of another site may send forms and plain text without asking, but not JSON.
        """
        content_type = headers.get(b"content-type", b"").decode("latin-1")
        if content_type.partition(";")[0].strip().lower() != self._content_type:
            raise ApiError(f"content-type: must be {self._content_type}", status=415)
        return content_type

    async def _answer(
        self, raw: bytes, content_type: str, reply: Reply, reservation: Reservation
    ) -> None:
        service, loop = self._service, asyncio.get_running_loop()
        submission = Submission(service.engine, loop)
        timer = Timer(service.metrics)
        try:
            prepared = await loop.run_in_executor(
                service.workers, self._prepare, service, raw, content_type
            )
            del raw
            reservation.resize(prepared.num_bytes)
            # Submitting hashes images and recordings.
            await loop.run_in_executor(service.workers, submission.submit, prepared.requests)
            answers = [
                Answer(form, submission.cancel(index)) for index, form in enumerate(prepared.forms)
            ]
            if prepared.stream:
                await self._stream(prepared, submission, answers, reply, timer)
            else:
                await self._collect(prepared, submission, answers, reply, timer)
            timer.finish()
        finally:
            submission.close()

    async def _stream(
        self,
        prepared: Prepared,
        submission: Submission,
        answers: list[Answer],
        reply: Reply,
        timer: Timer,
    ) -> None:
        shape = prepared.format
        await reply.stream()
        await reply.events(*shape.begin(len(answers)))
        while True:
            try:
                async with asyncio.timeout(self._service.limits.keepalive_s):
                    item = await submission.next()
            except TimeoutError:
                await reply.comment("keepalive")
                continue
            if item is None:
                break
            index, event = item
            if isinstance(event, Token):
                timer.token(index)
                piece = answers[index].push(event)
                await reply.events(*shape.piece(index, piece, answers))
            else:
                piece = answers[index].finish(event)
                chunks = shape.piece(index, piece, answers)
                await reply.events(*chunks, *shape.finish(index, answers))
        await reply.events(*shape.end(answers))
        await reply.done()

    async def _collect(
        self,
        prepared: Prepared,
        submission: Submission,
        answers: list[Answer],
        reply: Reply,
        timer: Timer,
    ) -> None:
        gathered = [Gathered() for _ in answers]
        while (item := await submission.next()) is not None:
            index, event = item
            if isinstance(event, Token):
                timer.token(index)
                gathered[index].add(answers[index].push(event))
            else:
                gathered[index].add(answers[index].finish(event))
        response = prepared.format.complete(answers, gathered)
        if isinstance(response, str):
            await reply.content(response.encode(), "text/plain; charset=utf-8")
        else:
            await reply.json(response)
