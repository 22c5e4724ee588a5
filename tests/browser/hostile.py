"""500 texts that try to become script, and 1,000 that try to name a file: made, not collected."""

from __future__ import annotations

import itertools
import urllib.parse

RUN = "window.hacked=1"
_TAGS = (
    "<script>{}</script>", "<ScRiPt>{}</sCrIpT>", "<script/x>{}</script>", "<script\n>{}</script\n>", "<img src=x onerror={}>",
    "<img src=x onerror='{}'>", '<img src=x onerror="{}">', "<svg onload={}>", "<svg/onload={}>", "<svg><script>{}</script></svg>",
    "<body onload={}>", "<iframe srcdoc='<script>parent.{}</script>'></iframe>", "<iframe src=javascript:parent.{}></iframe>",
    "<a href=javascript:{}>x</a>", "<details open ontoggle={}>x</details>", "<input autofocus onfocus={}>",
    "<video><source onerror={}></video>", "<audio src=x onerror={}>", "<math><mtext><img src=x onerror={}></math>",
    "<object data=javascript:{}></object>", "<embed src=javascript:{}>", "<link rel=stylesheet href=x onerror={}>",
    "<style onload={}></style>", "<marquee onstart={}>x</marquee>", "<form action=javascript:{}><button>x</button></form>",
    "<textarea autofocus onfocus={}></textarea>", "<select autofocus onfocus={}></select>", "<meta http-equiv=refresh content='0;url=javascript:{}'>",
    "<base href=javascript:{}//>", "<template><script>{}</script></template>", "<noscript><img src=x onerror={}></noscript>",
    "<div hx-on:load='{}'>x</div>", "<div hx-get='/work' hx-trigger='load' hx-on::after-request='{}'>x</div>",
    "<div data-hx-on-click='{}'>x</div>", "<img src=x hx-on:error='{}'>", "[x](javascript:{})", "![x](x' onerror='{})", "`<img src=x onerror={}>`",
)  # fmt: skip
_BREAKS = (
    "{}", "</textarea>{}", "\">{}", "'>{}", "</div></section></main>{}", "--><!-- -->{}", "</title>{}", "]]>{}", "{{{{7*7}}}}{}",
    "</script>{}", "\\u003c{}", "\0{}", "**{}**",
)  # fmt: skip


def _payloads() -> list[str]:
    found = [wrap.format(tag.format(RUN)) for wrap, tag in itertools.product(_BREAKS, _TAGS)]
    found += [
        "{{ config }}", "{{ ''.__class__.__mro__ }}", "{% include 'base.html' %}", "${" + RUN + "}", "&lt;script&gt;", "&#60;script>",
        "%3Cscript%3E" + RUN, "\u2028<script>" + RUN + "</script>", "\u202e<script>" + RUN + "</script>", "<<script>" + RUN + "//<</script>",
        "javascript:" + RUN, "data:text/html,<script>" + RUN + "</script>", "+ADw-script+AD4-" + RUN + "+ADw-/script+AD4-",
    ]  # fmt: skip
    return list(dict.fromkeys(found))[:500]


def _traversals() -> list[str]:
    targets = (
        "etc/passwd",
        "task.yaml",
        "feedback.db",
        "feedback.db.key",
        "data.jsonl",
        "tokens.txt",
        "app.py",
        "proc/self/environ",
    )
    ups = (
        "../",
        "..\\",
        "..//",
        "....//",
        "..;/",
        "./../",
        "%2e%2e/",
        "%2e%2e%2f",
        "..%2f",
        "..%5c",
        "%252e%252e%252f",
        "..%c0%af",
        "..%00/",
    )
    found = [up * depth + target for up, depth, target in itertools.product(ups, (1, 2, 3, 5, 8, 12), targets)]
    found += (
        [f"/{target}" for target in targets]
        + [f"//{target}" for target in targets]
        + [f"file:///{target}" for target in targets]
    )
    found += [f"align.css/{up * depth}{target}" for up, depth, target in itertools.product(ups[:6], (1, 2, 4), targets)]
    found += [f"align.css%00{up}{target}" for up, target in itertools.product(ups, targets)]
    found += [urllib.parse.quote(text, safe="") for text in found[:300]]
    return list(dict.fromkeys(found))[:1000]


XSS = _payloads()
TRAVERSALS = _traversals()
