"""A page of HTML that shows a preview: per file, which patches apply and why not, and the text before and after.

One file without scripts, fonts or links, so that it can be sent around and opened anywhere.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from html import escape
from itertools import zip_longest

from trlpatch.preview import FilePreview, Preview

_CONTEXT = 3

_STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 110em; padding: 0 1em; color: #1f2328 }
h1 { font-size: 1.4em } h2 { font-size: 1.15em; margin: 2em 0 .3em } code, td.code { font: 12.5px/1.45 monospace }
table { border-collapse: collapse } table.patches td { padding: .15em 1.2em .15em 0; vertical-align: top }
table.diff { width: 100%; table-layout: fixed; border: 1px solid #d1d9e0 }
td.code { white-space: pre-wrap; overflow-wrap: anywhere; padding: 0 .6em; vertical-align: top }
td.line { width: 3.5em; text-align: right; padding: 0 .5em; color: #818b98; vertical-align: top }
td.line { font: 12px/1.5 monospace }
td.old { background: #ffebe9 } td.new { background: #dafbe1 } tr.gap td { background: #f6f8fa; color: #818b98 }
.applied { color: #1a7f37 } .skipped, .off { color: #818b98 } .failed { color: #d1242f }
summary { cursor: pointer; margin: .4em 0 }
@media (prefers-color-scheme: dark) { body { background: #0d1117; color: #e6edf3 }
  td.old { background: #4c1d1f } td.new { background: #12361f } tr.gap td { background: #161b22 } }
"""


def render(found: Preview) -> str:
    """Return the page; files that no patch changes are named, without a diff."""
    title = f"What trlpatch changes in TRL {found.install.version}"
    state = "failed" if found.failures else "applied"
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title><style>{_STYLE}</style>",
        f"<h1>{escape(title)}</h1><p class={state}>{escape(found.fit.verdict)}</p>",
    ]
    if found.failures:
        parts.append(f"<pre>{escape(found.drift())}</pre>")
    for file in found.files:
        parts += _file(file)
    parts += [f"<h2>{escape(name)}</h2><p class=skipped>{escape(why)}</p>" for name, why in found.absent.items()]
    return "\n".join([*parts, "</html>\n"])


def _file(file: FilePreview) -> Iterator[str]:
    yield f"<h2>{escape(file.source.target.name)} <code>{escape(file.name)}</code></h2>"
    summaries = {step.patch.name: step.patch.summary for step in file.plan.steps}
    rows: list[tuple[str, str, str]] = [
        (outcome.status, outcome.patch, outcome.reason or summaries.get(outcome.patch, ""))
        for outcome in file.rewritten.outcomes
    ]
    rows += [("off", patch.name, f"on with PatchFastRL({patch.option})") for patch in file.plan.off]
    cells = "".join(
        f"<tr><td class={status}>{status}</td><td><code>{escape(name)}</code></td><td>{escape(text)}</td></tr>"
        for status, name, text in rows
    )
    yield f"<table class=patches>{cells}</table>"
    before, after = file.source.text.splitlines(), file.rewritten.text.splitlines()
    if before != after:
        hunks = list(difflib.SequenceMatcher(None, before, after, autojunk=False).get_grouped_opcodes(_CONTEXT))
        count = f"{len(hunks)} {'place' if len(hunks) == 1 else 'places'}"
        yield f"<details><summary>before and after, {count}</summary><table class=diff>"
        for number, hunk in enumerate(hunks):
            left, right = ("⋮", "⋮") if number else ("TRL's text", "what runs")
            yield f"<tr class=gap><td class=line></td><td>{left}</td><td class=line></td><td>{right}</td></tr>"
            for tag, *span in hunk:
                yield from _rows(tag, before, after, *span)
        yield "</table></details>"


def _rows(tag: str, before: list[str], after: list[str], i: int, to_i: int, j: int, to_j: int) -> Iterator[str]:
    changed = tag != "equal"
    for left, right in zip_longest(range(i, to_i), range(j, to_j)):
        old = _cell(before, left, "old" if changed else "")
        yield f"<tr>{old}{_cell(after, right, 'new' if changed else '')}</tr>"


def _cell(lines: list[str], number: int | None, kind: str) -> str:
    if number is None:
        return "<td class=line></td><td class=code></td>"
    return f'<td class=line>{number + 1}</td><td class="code {kind}">{escape(lines[number])}</td>'
