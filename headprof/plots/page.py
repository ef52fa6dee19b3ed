"""What HTML pages share: texts that are safe in them, and the policy that lets them run their own code alone."""

from __future__ import annotations

import html
import re
from base64 import b64encode
from hashlib import sha256

from headprof.utils.printable import printable

_STYLE = re.compile(r"<style>(.*?)</style>", re.DOTALL)
_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)
_PLACE = '<meta charset="utf-8">'


def escape(text: str) -> str:
    """A text from a file or a user for HTML: no markup, no control characters."""
    return html.escape(printable(text))


def with_policy(page: str) -> str:
    """A finished page with a Content-Security-Policy: its own styles and scripts by their digests, its own pictures.

    Nothing is loaded from elsewhere, nothing is sent, and no code runs that the page did not come with.
    """
    styles, scripts = (" ".join(map(_source, code.findall(page))) or "'none'" for code in (_STYLE, _SCRIPT))
    policy = (
        f"default-src 'none'; style-src {styles}; script-src {scripts}; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )
    meta = f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    return page.replace(_PLACE, f"{_PLACE}\n{meta}", 1)


def _source(code: str) -> str:
    return f"'sha256-{b64encode(sha256(code.encode()).digest()).decode()}'"
