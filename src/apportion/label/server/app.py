"""The application: the page's files, its requests, and the results page."""

# no postponed annotations: fastapi resolves those of the inner functions, which name their closures

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException

from apportion.errors import ApportionError, Shown
from apportion.label.results.page import results_page
from apportion.label.server.access import SESSION_SECONDS, Access
from apportion.label.server.guard import Guard
from apportion.label.server.payloads import AnswerBody, SignIn, WorkRequest
from apportion.label.server.static import StaticFile, static_files
from apportion.label.store import Store, history, progress, release, sign_in, submit, take
from apportion.label.store.database import explained
from apportion.label.store.people import name_of

HISTORY = 30  # answers that undo reaches back to
RETRY_SECONDS = 2


@dataclass(frozen=True)
class Study:
    """The parts of the page that the settings give: heading, guidelines as text ("" for none), length of a lease."""

    title: str
    guidelines: str = ""
    lease_seconds: float = 1800.0


class NotSignedIn(Exception):
    """A request without a valid session."""


def create_app(store: Store, access: Access, study: Study) -> FastAPI:
    """Return the application on an open database.

    Every error is JSON, {"error": {field, got, expected, fix}}, without a stack trace.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, access=access)
    files = static_files()

    def signed_in(request: Request) -> int:
        annotator = access.annotator(request.cookies.get(access.cookie))
        if annotator is None or name_of(store, annotator) is None:  # of a database that was made again
            raise NotSignedIn
        return annotator

    _add_pages(app, store, access, study, files)
    _add_sessions(app, store, access, study, signed_in)
    _add_work(app, store, study, signed_in)
    _add_errors(app, store)
    return app


def _add_pages(app: FastAPI, store: Store, access: Access, study: Study, files: dict[str, StaticFile]) -> None:
    @app.api_route("/", methods=["GET", "HEAD"])
    def index(request: Request) -> Response:
        return _serve(files["index.html"], request)

    @app.get("/static/{name:path}")
    def static(name: str, request: Request) -> Response:
        if name not in files:
            raise HTTPException(404)
        return _serve(files[name], request)

    @app.get("/results")
    def results(key: str = "") -> Response:
        if not access.may_see_results(key):
            raise HTTPException(403)
        html, policy = results_page(store, study.title)
        return HTMLResponse(html, headers={"content-security-policy": policy})

    @app.get("/api/health")
    def health() -> dict[str, bool]:
        progress(store, 0)  # reaches the database
        return {"ok": True}


def _add_sessions(
    app: FastAPI, store: Store, access: Access, study: Study, signed_in: Callable[[Request], int]
) -> None:
    @app.get("/api/study")
    def about(request: Request) -> dict[str, Any]:
        annotator = access.annotator(request.cookies.get(access.cookie))
        name = None if annotator is None else name_of(store, annotator)
        found = {"study": store.study, "title": study.title, "needs_token": bool(access.token), "annotator": name}
        return found | {"guidelines": study.guidelines if name or not access.token else ""}

    @app.post("/api/session")
    def start(body: SignIn, response: Response) -> dict[str, str]:
        if not access.is_token(body.token):
            raise HTTPException(403, "token")
        annotator = sign_in(store, body.name, access.annotators)
        response.set_cookie(
            access.cookie, access.session(annotator), max_age=SESSION_SECONDS, httponly=True, samesite="strict",
            secure=access.secure, path="/",
        )  # fmt: skip
        return {"annotator": name_of(store, annotator) or ""}

    @app.delete("/api/session")
    def end(response: Response, annotator: Annotated[int, Depends(signed_in)]) -> dict[str, bool]:
        release(store, annotator)
        response.delete_cookie(access.cookie, path="/", httponly=True, samesite="strict", secure=access.secure)
        return {"ok": True}


def _add_work(app: FastAPI, store: Store, study: Study, signed_in: Callable[[Request], int]) -> None:
    @app.post("/api/work")
    def work(body: WorkRequest, annotator: Annotated[int, Depends(signed_in)]) -> dict[str, Any]:
        found = take(store, annotator, body.count, study.lease_seconds)
        listed = [
            {"item": one.item} | ({} if one.item in body.have else {"prompt": one.prompt, "answers": one.answers})
            for one in found
        ]
        return {"items": listed, "progress": progress(store, annotator)._asdict()}

    @app.post("/api/answers")
    def answers(body: AnswerBody, annotator: Annotated[int, Depends(signed_in)]) -> Response:
        outcome = submit(store, annotator, body.answer())
        if outcome == "refused":
            fix = "Undo in the window that ranked it, or keep that ranking; this one is recorded as refused."
            error = {"field": "item", "got": body.item, "expected": "one ranking of an item by a person", "fix": fix}
            return JSONResponse({"error": error}, 409)
        return JSONResponse({"outcome": outcome, "progress": progress(store, annotator)._asdict()})

    @app.get("/api/history")
    def last(annotator: Annotated[int, Depends(signed_in)]) -> dict[str, Any]:
        return {"answers": history(store, annotator, HISTORY)}


def _add_errors(app: FastAPI, store: Store) -> None:
    @app.exception_handler(ApportionError)
    def apportion_error(_: Request, error: ApportionError) -> Response:
        return _error(422, error)

    @app.exception_handler(SQLAlchemyError)
    def database_error(_: Request, error: SQLAlchemyError) -> Response:
        response = _error(503, explained(error, "the database"))
        response.headers["retry-after"] = str(RETRY_SECONDS)
        return response

    @app.exception_handler(NotSignedIn)
    def not_signed_in(_: Request, error: NotSignedIn) -> Response:
        return _error(401, ApportionError("session", Shown("none"), "an annotator who signed in", "Sign in."))

    @app.exception_handler(RequestValidationError)
    def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"][1:]) or "body"
        got = repr(first.get("input"))[:80]
        return _error(
            422, ApportionError(field, Shown(got), first["msg"], "Reload the page to get its newest version.")
        )

    @app.exception_handler(HTTPException)
    def refused(_: Request, error: HTTPException) -> Response:
        if error.detail == "token":
            fix = "Check the token, or request the link again."
            return _error(403, ApportionError("token", Shown("another"), "the token of this server", fix))
        got = Shown(f"status {error.status_code}")
        return _error(error.status_code, ApportionError("address", got, "a page of this server", "Check the address."))

    @app.exception_handler(Exception)
    def unexpected(_: Request, error: Exception) -> Response:
        fix = "Try again; the server's output has the reason."
        return _error(500, ApportionError("server", Shown(type(error).__name__), "no error", fix))


def _error(status: int, error: ApportionError) -> JSONResponse:
    got = (str(error.got) if isinstance(error.got, str) else repr(error.got)) or "nothing"
    body = {"field": error.field, "got": got[:200], "expected": error.expected, "fix": error.fix}
    return JSONResponse({"error": body}, status)


def _serve(file: StaticFile, request: Request) -> Response:
    headers = {"etag": file.etag, "cache-control": "no-cache"}  # a new version of the page is seen at once
    if request.headers.get("if-none-match") == file.etag:
        return Response(status_code=304, headers=headers)
    return Response(file.body, headers=headers, media_type=file.kind)
