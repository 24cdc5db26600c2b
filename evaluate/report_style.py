"""How the report looks: its style sheet, for light and dark screens, narrow ones, and paper."""

NUM_LINE_COLOURS = 8

_LIGHT = """
  --background: #ffffff; --text: #1b2230; --muted: #5a6476; --edge: #dfe4ec; --soft: #f4f6f9; --accent: #2b63c1;
  --track: #e8ecf2; --warning: #8a4b00; --warning-background: #fff4e2; --heat-brightness: 1;
  --line-0: #2b63c1; --line-1: #c8475a; --line-2: #1a8766; --line-3: #b8720a;
  --line-4: #7a4fc0; --line-5: #0b86a8; --line-6: #8a5a3b; --line-7: #6b7280;
"""

_DARK = """
  --background: #12161d; --text: #e3e8f0; --muted: #9aa5b7; --edge: #2d3543; --soft: #1a202a; --accent: #6aa2f8;
  --track: #28303d; --warning: #ffcf8a; --warning-background: #35270f; --heat-brightness: 1.6;
  --line-0: #6aa2f8; --line-1: #ff8595; --line-2: #4fd0a6; --line-3: #f3b34f;
  --line-4: #b597f5; --line-5: #53cbea; --line-6: #d3a27f; --line-7: #aab4c3;
"""

_PAGE = """
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0; background: var(--background); color: var(--text); line-height: 1.5;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2.5rem 1.5rem 3rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 0.75rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 0 0 0.75rem; overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin: 1.75rem 0 0.6rem; }
section { margin-top: 2.75rem; }
p { margin: 0.5rem 0; max-width: 46rem; }
code { font: 0.875em ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace;
  overflow-wrap: anywhere; }
.muted, .note, figcaption { color: var(--muted); font-size: 0.9rem; }
.name { unicode-bidi: isolate; overflow-wrap: anywhere; }
.warning { color: var(--warning); background: var(--warning-background); border-radius: 6px; padding: 0.6rem 0.9rem; }
header { border-bottom: 1px solid var(--edge); padding-bottom: 1.25rem; }
header p { max-width: none; }
header ul { list-style: none; margin: 0.5rem 0 0; padding: 0; }
.scroll { overflow-x: auto; }
"""

_TABLES = """
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.4rem 0.9rem; text-align: right; border-bottom: 1px solid var(--edge); white-space: nowrap; }
thead th, thead td { color: var(--muted); font-size: 0.85rem; font-weight: 600; border-bottom-width: 2px; }
th:first-child, td:first-child { padding-left: 0; }
tbody th { text-align: left; font-weight: 500; }
table.figures { min-width: 26rem; }
table.figures thead th { white-space: normal; vertical-align: bottom; }
table.figures tbody th { white-space: normal; min-width: 9rem; }
table.figures .name { overflow-wrap: break-word; }
table.figures tbody tr:hover, table.classes tbody tr:hover { background: var(--soft); }
table.classes { width: 100%; font-size: 0.9rem; }
table.classes th, table.classes td { padding: 0.22rem 0.6rem; }
table.classes tbody th { white-space: normal; overflow-wrap: anywhere; min-width: 10rem; }
table.classes th:first-child, table.classes td:first-child { padding-left: 0; }
table.classes .left { text-align: left; }
table.classes td.taken { white-space: normal; text-align: left; overflow-wrap: anywhere; color: var(--muted); }
td.bar { width: 32%; min-width: 5rem; }
.track { display: block; height: 0.65rem; border-radius: 3px; background: var(--track); overflow: hidden; }
.track i { display: block; height: 100%; background: var(--accent); }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 0 3rem; }
.pair h3 { margin-top: 1rem; }
details { margin-top: 1rem; }
summary { cursor: pointer; color: var(--accent); font-weight: 500; padding: 0.25rem 0; }
ol.confusions { padding: 0; margin: 0; list-style: none; max-width: 54rem; font-size: 0.95rem; }
ol.confusions li { display: flex; flex-wrap: wrap; gap: 0 1rem; padding: 0.25rem 0;
  border-bottom: 1px solid var(--edge); }
ol.confusions li > span:last-child { margin-left: auto; color: var(--muted); white-space: nowrap;
  font-variant-numeric: tabular-nums; }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: 0.2rem 1.5rem; margin: 0.5rem 0 1.25rem;
  font-size: 0.95rem; }
dt { color: var(--muted); }
dd { margin: 0; min-width: 0; overflow-wrap: anywhere; }
ul.settings, ul.settings ul { list-style: none; margin: 0; padding: 0; font-size: 0.95rem; }
ul.settings ul { padding-left: 1rem; border-left: 2px solid var(--edge); margin: 0.1rem 0 0.3rem 0.2rem; }
ul.settings li { overflow-wrap: anywhere; padding: 0.05rem 0; }
ul.settings b { font-weight: 400; color: var(--muted); }
"""

_PICTURES = """
figure { margin: 0.75rem 0 1.25rem; }
figure img { max-width: 100%; height: auto; border-radius: 6px; background: #ffffff; }
figcaption { margin-top: 0.4rem; max-width: 46rem; }
svg { display: block; font: 11px system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans",
  sans-serif; }
svg text { fill: var(--text); }
svg .title { font-size: 12px; fill: var(--muted); }
svg .edge { fill: none; stroke: var(--edge); }
svg .gap { stroke: var(--background); stroke-width: 1; }
svg .tick { stroke: var(--muted); }
svg .cell { fill: transparent; }
svg .cell:hover { stroke: var(--text); }
svg .value { font-size: 10px; text-anchor: middle; pointer-events: none; }
svg .on-dark { fill: #ffffff; }
svg .heat { filter: brightness(var(--heat-brightness)); image-rendering: pixelated; }
svg.curves { width: 100%; min-width: 30rem; max-width: 52rem; height: auto; }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 0.15rem 1.5rem; margin: 0 0 0.5rem; padding: 0;
  font-size: 0.9rem; }
.legend li { display: flex; align-items: center; gap: 0.5rem; min-width: 0; }
.legend svg { flex: none; }
"""

_NARROW = """
@media (max-width: 44rem) {
  main { padding: 1.5rem 1rem 2rem; }
  h1 { font-size: 1.55rem; }
  .pair { grid-template-columns: 1fr; }
  table.figures { min-width: 0; }
  table.figures tbody th { min-width: 6rem; }
  table.classes .taken { display: none; }
  table.classes th, table.classes td { padding: 0.22rem 0.4rem; }
  table.classes tbody th { min-width: 6.5rem; }
  td.bar { width: 22%; min-width: 3.5rem; }
  th, td { padding: 0.35rem 0.6rem; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: 0.5rem; }
}
"""

_PAPER = """
@media print {
  @page { margin: 15mm; }
  body { font-size: 11pt; }
  main { max-width: none; padding: 0; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  .scroll { overflow: visible; }
  svg { max-width: 100%; height: auto; }
  svg.curves { min-width: 0; }
  td.bar { width: 18%; }
  h2, h3 { break-after: avoid; }
  tr, figure, ol.confusions li, ul.settings li { break-inside: avoid; }
  details::details-content { content-visibility: visible; height: auto; }
}
"""


def style_sheet() -> str:
    """The report's whole style sheet; paper is light whatever the screen is."""
    lines = "".join(
        f"svg .line-{number} {{ stroke: var(--line-{number}); }}\n"
        f"svg .point-{number} {{ fill: var(--line-{number}); }}\n"
        for number in range(NUM_LINE_COLOURS)
    )
    schemes = (
        f":root {{ color-scheme: light dark;{_LIGHT}}}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ :root {{{_DARK}}} }}\n"
    )
    return schemes + _PAGE + _TABLES + _PICTURES + lines + _NARROW + _PAPER
