"""The page that asks for a key."""

from __future__ import annotations

from html import escape

from starlette.responses import HTMLResponse

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>KVShare desk</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root {{ color-scheme: light dark; font-family: system-ui, sans-serif }}
form {{ max-width: 22rem; margin: 15vh auto; padding: 0 1rem; display: grid; gap: .75rem }}
label {{ display: grid; gap: .25rem }}
input, button {{ font: inherit; padding: .5rem }}
</style></head><body>
<form method="post" action="login">
<h1>KVShare desk</h1>
<p role="{role}">{said}</p>
<label>Tenant <input name="username" autocomplete="username" autofocus></label>
<label>Key <input name="password" type="password" autocomplete="current-password" required></label>
<button>Log in</button>
</form></body></html>
"""


def login_page(status: int = 200, problem: str | None = None) -> HTMLResponse:
    """The page, with what was wrong with the last attempt."""
    html = _PAGE.format(
        role="note" if problem is None else "alert",
        said=escape(problem or "A key of this server; its tenant's name may be left out."),
    )
    headers = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
               "form-action 'self'; frame-ancestors 'none'"}  # fmt: skip
    return HTMLResponse(html, status, headers)
