"""Who is at the page: a login form for those who have a key, and a cookie that stands for it afterwards."""

import secrets
import time
from collections import OrderedDict

from starlette.requests import HTTPConnection, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import Scope

from mergekit_bio.serve.settings import PAGE

#: The page's form, and the way out.
LOGIN, LOGOUT = f"{PAGE}/login", f"{PAGE}/logout"
#: What people type who know the server's address alone.
HOME = "/"
#: Where recordings are sent, below it.
UPLOAD = "/gradio_api/upload"

#: Where :class:`Visitors` stands in the application's state.
VISITORS = "mergekit_bio_visitors"
#: Where the keys stand in a request's scope, and the name of the one that let a client in; None where none was needed.
KEYS, KEY_NAME = "mergekit_bio.keys", "mergekit_bio.key_name"

_COOKIE = "mergekit_bio_page"
#: How long a cookie is good for, in seconds, and how many of them are.
_LIFE_SECONDS, _MOST_VISITORS = 12 * 3600, 10_000


class Visitors:
    """Those who have opened the page, each by a random token that their cookie holds.

    A key itself stays here. Where it is no longer among the keys, its visitors must log in again.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[str, tuple[bytes, float]] = OrderedDict()

    def admit(self, key: bytes) -> str:
        """A new visitor's token.

        Args:
            key: What they came with; empty where no key is asked for.
        """
        token = secrets.token_urlsafe(24)
        self._known[token] = key, time.monotonic() + _LIFE_SECONDS
        if len(self._known) > _MOST_VISITORS:
            self._known.popitem(last=False)
        return token

    def key_of(self, token: str) -> bytes | None:
        """The key that a visitor came with; None for nobody."""
        key, until = self._known.get(token, (None, 0.0))
        return key if time.monotonic() < until else None

    def dismiss(self, token: str) -> None:
        """Forget a visitor."""
        self._known.pop(token, None)


def is_of_page(path: str) -> bool:
    """Whether a path is the page's or below it, or the server's first address, which leads to the page."""
    return path in (HOME, PAGE) or path.startswith(f"{PAGE}/")


def key_of_visitor(scope: Scope) -> bytes | None:
    """The key that stands behind a request's cookie; None where it has none, or an old one."""
    request = HTTPConnection(scope)
    return _visitors(request).key_of(token_of(request))


def token_of(request: HTTPConnection) -> str:
    """The token in a request's cookie; empty where there is none."""
    return request.cookies.get(_COOKIE, "")


def set_cookie(response: Response, request: Request, token: str) -> None:
    """Give a visitor their cookie. Scripts cannot read it, and other sites' requests do not bring it."""
    response.set_cookie(
        _COOKIE,
        token,
        max_age=_LIFE_SECONDS,
        path=_place(request),
        secure="https" in (request.url.scheme, request.headers.get("x-forwarded-proto", "").partition(",")[0].strip()),
        httponly=True,
        samesite="lax",
    )


async def page(request: Request) -> Response:
    """The page's address ends with a slash: what it loads lies beside that."""
    return RedirectResponse(f"{_place(request)}/", status_code=307)


async def form(request: Request) -> Response:
    """Ask for a key."""
    if not request.scope[KEYS].asked_for:
        return RedirectResponse(f"{_place(request)}/", status_code=303)
    return _form(request, status=200)


async def log_in(request: Request) -> Response:
    """Exchange a key for a cookie."""
    key = str((await request.form()).get("key", "")).strip().encode()
    if request.scope[KEYS].name_of(key) is None:
        return _form(request, status=401, problem="This is none of the server's keys.")
    response = RedirectResponse(f"{_place(request)}/", status_code=303)
    set_cookie(response, request, _visitors(request).admit(key))
    return response


async def log_out(request: Request) -> Response:
    """Forget who this was."""
    _visitors(request).dismiss(token_of(request))
    response = RedirectResponse(f"{_place(request)}/", status_code=303)
    response.delete_cookie(_COOKIE, path=_place(request))
    return response


def _visitors(request: HTTPConnection) -> Visitors:
    visitors: Visitors = getattr(request.app.state, VISITORS)
    return visitors


def _place(request: Request) -> str:
    """The page's path as the browser knows it: behind what a proxy puts in front."""
    scope = request.scope  # within Gradio's mount the root path is the page's, and the application's has another name
    return f"{scope.get('app_root_path', scope.get('root_path', '')).rstrip('/')}{PAGE}"


def _form(request: Request, *, status: int, problem: str = "") -> HTMLResponse:
    problem = f"<p role=alert>{problem}</p>" if problem else ""
    page = _FORM.replace("PROBLEM", problem).replace("ACTION", f"{_place(request)}/login")
    return HTMLResponse(page, status, headers={"cache-control": "no-store"})


#: What the application gets for them.
ROUTES = [
    Route(HOME, page), Route(PAGE, page),
    Route(LOGIN, form), Route(LOGIN, log_in, methods=["POST"]), Route(LOGOUT, log_out),
]  # fmt: skip

_FORM = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>mergekit-bio</title>
<link rel="icon" href="data:,">
<style>
  :root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
  body { display: grid; place-items: center; min-height: 90vh; margin: 0 1rem; }
  form { display: grid; gap: .75rem; width: min(22rem, 100%); }
  h1 { font-size: 1.25rem; margin: 0; }
  input, button { font: inherit; padding: .6rem .75rem; border-radius: .5rem; border: 1px solid #8888; }
  button { background: #0f766e; border-color: #0f766e; color: #fff; cursor: pointer; }
  p { margin: 0; color: #c2410c; }
</style>
<form method="post" action="ACTION">
  <h1>mergekit-bio</h1>
  <label for="key">The server's key</label>
  <input id="key" name="key" type="password" autocomplete="current-password" required autofocus>
  PROBLEM
  <button>Log in</button>
</form>
</html>
"""
