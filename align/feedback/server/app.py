"""The annotation page as a FastAPI application: one screen at a time, every answer acknowledged after its commit.

Pages work without scripts: forms post and the server redirects. With htmx the same posts swap `#screen` in place.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import hmac
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from align.errors import DataError
from align.feedback.events import FeedbackEvent
from align.feedback.server.answers import (
    answer_events,
    answer_of,
    complete,
    correctable,
    exposure_event,
    fields_of,
    read_answer,
    screen_session,
    shown_items,
)
from align.feedback.server.assign import Assignments, Shown
from align.feedback.server.guard import Guard, Limits
from align.feedback.server.markdown import render_markdown
from align.feedback.server.product import ProductEndpoint
from align.feedback.server.tokens import derive, pseudonym, sign, unsign
from align.feedback.store import Store, Writer
from align.feedback.task_data import SIGNATURES
from align.feedback.tasks import Task, gold_right

HERE = Path(__file__).parent
STATIC = {
    "align.css": "text/css; charset=utf-8",
    "align.js": "text/javascript; charset=utf-8",
    "htmx.min.js": "text/javascript; charset=utf-8",
    "align-feedback.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
COOKIE_DAYS = 30


def create_app(
    task: Task,
    writer: Writer,
    secret: bytes,
    *,
    tokens: Mapping[str, str] | None = None,
    names: frozenset[str] = frozenset(),
    origins: frozenset[str] = frozenset(),
    limits: Limits = Limits(),
) -> FastAPI:
    """Return the application for one task.

    Args:
        task: what is asked.
        writer: where answers go; the caller closes it.
        secret: see `tokens.load_secret`.
        tokens: annotator names by token; None lets anyone enter under a name of their own, for loopback alone.
        names: host names by which this server may be called, beside loopback and addresses.
        origins: origins of product pages that may post to `/feedback` and `/exposure`.
        limits: sizes and rates.

    Raises:
        DataError: the store holds what cannot be read.
    """
    page = AnnotationPage(task, writer, secret, tokens)
    product = ProductEndpoint(writer, derive(secret, "product"))
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    routes = (
        ("/", "GET", page.welcome), ("/enter", "POST", page.enter), ("/leave", "POST", page.leave),
        ("/work", "GET", page.work), ("/answer", "POST", page.answer), ("/skip", "POST", page.skip),
        ("/again", "POST", page.again), ("/undo", "POST", page.undo), ("/media/{item_id}", "GET", page.media),
        ("/static/{name}", "GET", page.static), ("/healthz", "GET", page.health),
        ("/feedback", "POST", product.feedback), ("/exposure", "POST", product.exposure),
        ("/feedback", "OPTIONS", product.preflight), ("/exposure", "OPTIONS", product.preflight),
    )  # fmt: skip
    for path, method, endpoint in routes:
        app.add_api_route(path, endpoint, methods=[method], response_model=None)
    app.add_middleware(Guard, names=names, origins=origins, limits=limits, who=page.who_header)
    app.state.page = page
    return app


class AnnotationPage:
    """The routes of the page, and what they share."""

    def __init__(self, task: Task, writer: Writer, secret: bytes, tokens: Mapping[str, str] | None) -> None:
        self.task, self.writer, self._secret = task, writer, secret
        self._tokens = None if tokens is None else {_hash(token): name for token, name in tokens.items()}
        self._known = None if tokens is None else {pseudonym(secret, name) for name in tokens.values()}
        self._session_key, self._ticket_key = derive(secret, "session"), derive(secret, "ticket")
        self._cookie = f"align_{hashlib.sha256(task.config.name.encode()).hexdigest()[:8]}"
        self.assignments = Assignments(task)
        self._exposed: set[tuple[str, str]] = set()
        self._locks: dict[str, asyncio.Lock] = {}
        self._content = {name: (HERE / "static" / name).read_bytes() for name in STATIC}
        self._templates = Environment(
            loader=FileSystemLoader(HERE / "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
        )
        self._templates.globals.update(
            task=task,
            config=task.config,
            instructions=Markup(render_markdown(task.config.instructions)),
            versions={name: hashlib.sha256(raw).hexdigest()[:10] for name, raw in self._content.items()},
        )
        writer.submit(items=task.items.values()).result()
        self._resume(writer.store)

    def _resume(self, store: Store) -> None:
        """Take up where everyone left off, from the current events."""
        prefix = f"{self.task.config.name}:"
        screens: dict[tuple[str, str], list[FeedbackEvent]] = {}
        for event in store.current(items=list(self.task.items)):
            unit_id = event.session.removeprefix(prefix)
            if not event.session.startswith(prefix) or unit_id not in self.assignments.units:
                continue
            if event.kind == "exposure":
                self._exposed.add((event.annotator, unit_id))
            else:
                screens.setdefault((event.annotator, unit_id), []).append(event)
        for (annotator, unit_id), events in screens.items():
            answer = answer_of(self.task.config, events)
            if complete(self.task.config, answer):
                self.assignments.answered(annotator, unit_id, self._gold(unit_id, answer.values))

    def _gold(self, unit_id: str, values: Mapping[str, Any]) -> bool | None:
        unit = self.assignments.units[unit_id]
        return None if unit.gold is None else gold_right(self.task.config, unit, values)

    # --- who ----------------------------------------------------------------------------------------

    def who_header(self, cookies: bytes) -> str:
        """Return the annotator of a Cookie header, "" when there is none who may be here."""
        for part in cookies.decode("latin-1").split(";"):
            name, _, value = part.strip().partition("=")
            if name == self._cookie:
                payload = unsign(self._session_key, value)
                fresh = payload is not None and time.time() - payload["t"] < COOKIE_DAYS * 86_400
                annotator = payload["a"] if payload is not None and fresh else ""
                return annotator if self._known is None or annotator in self._known else ""
        return ""

    def _who(self, request: Request) -> str:
        return self.who_header(request.headers.get("cookie", "").encode("latin-1"))

    async def welcome(self, request: Request) -> Response:
        """The first page: who are you, or the instructions."""
        who = self._who(request)
        if not who:
            return self._html("enter.html", with_token=self._tokens is not None)
        progress = self.assignments.progress(who)
        return self._html("intro.html", progress=progress)

    async def enter(self, request: Request) -> Response:
        """Sign in: with a token, or on loopback under any name."""
        given = (await _fields(request)).get("who", [""])[0].strip()
        # Names that people type themselves are the same person in any case and spacing.
        typed = " ".join(given[:60].casefold().split())
        name = typed if self._tokens is None else self._tokens.get(_hash(given), "")
        if not name:
            notice = "Write your name." if self._tokens is None else "This token is not known."
            return self._html("enter.html", status=422, with_token=self._tokens is not None, notice=notice)
        response = RedirectResponse("/", 303)
        value = sign(self._session_key, {"a": pseudonym(self._secret, name), "t": int(time.time())})
        response.set_cookie(
            self._cookie, value, max_age=COOKIE_DAYS * 86_400, httponly=True, samesite="strict",
            secure=request.headers.get("origin", "").startswith("https:"),
        )  # fmt: skip
        return response

    async def leave(self, request: Request) -> Response:
        """Sign out."""
        response = RedirectResponse("/", 303)
        response.delete_cookie(self._cookie, httponly=True, samesite="strict")
        return response

    # --- work ---------------------------------------------------------------------------------------

    async def work(self, request: Request) -> Response:
        """The page with the screen that is before the annotator."""
        who = self._who(request)
        if not who:
            return RedirectResponse("/", 303)
        async with self._lock(who):
            return await self._screen(request, who, whole=True)

    async def answer(self, request: Request) -> Response:
        """Store what was answered, and show what comes next."""
        who, fields = self._who(request), await _fields(request)
        if not who:
            return _to_start(request)
        async with self._lock(who):
            shown = self._shown(who, fields)
            if shown is None or shown.unit.id in self.assignments.annotator(who).done:
                return await self._screen(request, who)
            try:
                answer = read_answer(self.task.config, shown, fields)
            except DataError as problem:
                open_ = self.assignments.next(who)
                same = open_ is not None and open_.unit.id == shown.unit.id
                return await self._screen(
                    request, who, notice=f"{problem.what}.", given=fields if same else {}, status=422
                )
            now = self.assignments.now_ms()
            elapsed = max(0, now - shown.shown_ms)
            claimed = fields.get("latency_ms", [""])[0]
            latency = min(elapsed, int(claimed)) if claimed.isascii() and claimed.isdecimal() else elapsed
            events = answer_events(self.task.config, who, shown, answer, latency, now)
            self.assignments.answered(who, shown.unit.id, self._gold(shown.unit.id, answer.values))
            settled = False
            try:
                response = await self._screen(request, who, events=events)
                settled = True
                return response
            except DataError as problem:
                self._give_back(who, shown)
                settled = True
                return self._refused(request, who, problem, fields)
            finally:
                # Whatever else went wrong, the answer was not acknowledged, so the screen is still to be answered.
                if not settled:
                    self._give_back(who, shown)

    def _give_back(self, who: str, shown: Shown) -> None:
        self.assignments.taken_back(who, shown.unit.id)
        self.assignments.next(who)

    async def undo(self, request: Request) -> Response:
        """Take the last answer back, and show it again as it was given."""
        who = self._who(request)
        if not who:
            return _to_start(request)
        async with self._lock(who):
            done = self.assignments.annotator(who).done
            if not done:
                return await self._screen(request, who, notice="There is nothing to undo.")
            unit_id = next(reversed(done))
            session = screen_session(self.task.config, unit_id)
            ids = [item.id for item in self.assignments.units[unit_id].items]
            said = [
                event
                for event in self.writer.store.current(annotator=who, items=ids)
                if event.session == session and event.kind != "exposure"
            ]
            cleared: dict[str, Any] = {
                "value": None,
                "tombstone": True,
                "reply": "",
                "latency_ms": None,
                "tie_origin": "",
                "id": "",
            }
            now = self.assignments.now_ms()
            try:
                await self._store([dataclasses.replace(event, **cleared, ts=now) for event in said])
            except DataError as problem:
                return self._refused(request, who, problem, {})
            self.assignments.taken_back(who, unit_id)
            given = fields_of(self.task.config, answer_of(self.task.config, said))
            return await self._screen(request, who, given=given, notice="Taken back. Change it, or press Next.")

    async def skip(self, request: Request) -> Response:
        """Set the screen aside: shown, and not answered."""
        who, fields = self._who(request), await _fields(request)
        if not who:
            return _to_start(request)
        async with self._lock(who):
            if shown := self._shown(who, fields):
                self.assignments.skip(who, shown.unit.id)
            return await self._screen(request, who)

    async def again(self, request: Request) -> Response:
        """Bring back what was set aside."""
        who = self._who(request)
        if not who:
            return _to_start(request)
        async with self._lock(who):
            self.assignments.unskip(who)
            return await self._screen(request, who)

    def _lock(self, who: str) -> asyncio.Lock:
        return self._locks.setdefault(who, asyncio.Lock())

    async def _store(self, events: list[FeedbackEvent]) -> None:
        if events:
            await asyncio.wrap_future(self.writer.submit(events=events, timeout=0))

    def _shown(self, who: str, fields: Mapping[str, list[str]]) -> Shown | None:
        """Return the screen that a form's ticket names, None when it is not one of this annotator's."""
        payload = unsign(self._ticket_key, fields.get("ticket", [""])[0])
        if payload is None or payload["a"] != who or payload["u"] not in self.assignments.units:
            return None
        return Shown(self.assignments.units[payload["u"]], tuple(payload["o"]), payload["t"], payload["n"])

    async def _screen(
        self,
        request: Request,
        who: str,
        *,
        whole: bool = False,
        events: list[FeedbackEvent] | None = None,
        notice: str = "",
        given: Mapping[str, list[str]] | None = None,
        status: int = 200,
    ) -> Response:
        """Return the annotator's next screen once `events` and its exposure are on disk."""
        if not whole and not _swaps(request) and status == 200 and not given:
            await self._store(events or [])
            return RedirectResponse("/work", 303)
        shown = self.assignments.next(who)
        pending = list(events or [])
        if shown is not None and (who, shown.unit.id) not in self._exposed:
            pending.append(exposure_event(self.task.config, who, shown))
        await self._store(pending)
        if shown is not None:
            self._exposed.add((who, shown.unit.id))
        return self._draw(request, who, shown, notice=notice, given=given or {}, status=status)

    def _refused(self, request: Request, who: str, problem: DataError, given: Mapping[str, list[str]]) -> Response:
        shown = self.assignments.annotator(who).open
        notice = f"Not saved: {problem.what[0].lower()}{problem.what[1:]}. Please try again."
        return self._draw(request, who, shown, notice=notice, given=given, status=503)

    def _draw(
        self,
        request: Request,
        who: str,
        shown: Shown | None,
        *,
        notice: str,
        given: Mapping[str, list[str]],
        status: int,
    ) -> Response:
        context: dict[str, Any] = {"progress": self.assignments.progress(who), "notice": notice, "given": given}
        if shown is not None:
            ticket = {"a": who, "u": shown.unit.id, "o": shown.order, "t": shown.shown_ms, "n": shown.place}
            context |= {
                "items": shown_items(shown),
                "ticket": sign(self._ticket_key, ticket),
                "correctable": correctable(self.task.config, shown),
            }
        name = "screen.html" if _swaps(request) else "work.html"
        return self._html(name, status=status, shown=shown, **context)

    # --- files --------------------------------------------------------------------------------------

    async def media(self, request: Request, item_id: str) -> Response:
        """An image or video of the task, by the id of its item: no path is ever taken from a request."""
        path = self.task.media.get(item_id) if self._who(request) else None
        if path is None or not path.is_file():
            return Response(status_code=404)
        kind = SIGNATURES[path.suffix.lower()][0]
        return FileResponse(path, media_type=kind, headers={"cache-control": "private, max-age=3600"})

    async def static(self, name: str) -> Response:
        """One of the few files of the page."""
        if name not in STATIC:
            return Response(status_code=404)
        headers = {"cache-control": "max-age=3600"}
        return Response(self._content[name], media_type=STATIC[name], headers=headers)

    async def health(self) -> Response:
        """Says that the server is up."""
        return Response("ok", media_type="text/plain")

    def summary(self) -> dict[str, Any]:
        """Return how far the task is, and how each annotator did on the gold units."""
        people = self.assignments.annotators
        checked = {name: [r for r in state.done.values() if r is not None] for name, state in people.items()}
        return {
            "screens": len(self.task.units),
            "complete": self.assignments.complete,
            "annotators": {
                name: {"answered": len(state.done), "gold": len(checked[name]), "gold_right": sum(checked[name])}
                for name, state in people.items()
                if state.done
            },
        }

    def _html(self, template: str, *, status: int = 200, **context: Any) -> HTMLResponse:
        return HTMLResponse(self._templates.get_template(template).render(context), status)


async def _fields(request: Request) -> dict[str, list[str]]:
    """Return the fields of a form; anything else is no field at all."""
    if not request.headers.get("content-type", "").startswith("application/x-www-form-urlencoded"):
        return {}
    body = (await request.body()).decode("utf-8", errors="replace")
    try:
        return parse_qs(body, keep_blank_values=True, max_num_fields=200)
    except ValueError:
        return {}


def _swaps(request: Request) -> bool:
    return request.headers.get("hx-request") == "true"


def _to_start(request: Request) -> Response:
    """Send who is not signed in to the first page; htmx follows a header of its own."""
    return Response(status_code=204, headers={"hx-redirect": "/"}) if _swaps(request) else RedirectResponse("/", 303)


def _hash(token: str) -> str:
    """Return the hash under which tokens are looked up, so that the time of a look-up says nothing about a token."""
    return hmac.new(b"annotator token", token.encode("utf-8", errors="surrogatepass"), hashlib.sha256).hexdigest()
