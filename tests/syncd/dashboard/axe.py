"""axe-core, which finds what keeps people with disabilities from using a page, in a page of the dashboard."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from tests.syncd.dashboard.browser import Browser

_RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]


@cache
def _script() -> str:
    return (files("axe_core_python") / "axe.min.js").read_text()


def findings(chromium: Browser) -> list[str]:
    """What axe finds on the current page: the rule, and the element. Its script is no part of the page."""
    # The driver evaluates it outside of the page's own policy, which allows no scripts.
    chromium.evaluate(_script())
    found = chromium.driver.execute_async_script(
        "const done = arguments[arguments.length - 1];"
        f"axe.run(document, {{runOnly: {_RULES!r}}}).then(found => done(found.violations.flatMap("
        "rule => rule.nodes.map(node => `${rule.id}: ${node.html.slice(0, 200)} ${node.failureSummary}`))))"
        ".catch(error => done([String(error)]))"
    )
    return [str(one) for one in found]
