"""The looks of the report: one style sheet, light and dark, from 320 pixels up."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fbfbfa; --card: #ffffff; --ink: #1c2024; --muted: #60646c; --line: #dfe1e6;
  --accent: #0b68cb; --mark: #fff4d6; --mark-ink: #7a4d00; --warn: #a3410a;
  --first: #0b68cb; --second: #d9590a; --third: #2b8a57;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #111214; --card: #191b1e; --ink: #eceef0; --muted: #a0a6ae; --line: #30343a;
    --accent: #70b8ff; --mark: #3a2d0c; --mark-ink: #ffd588; --warn: #ffab70;
    --first: #70b8ff; --second: #ff9b52; --third: #6fd1a0;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1180px; margin: 0 auto; padding: 40px 24px 64px; }
h1 {
  font-size: 30px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.02em; overflow-wrap: anywhere;
}
h2 { font-size: 19px; margin: 44px 0 14px; letter-spacing: -0.01em; }
h3 { font-size: 14px; margin: 0 0 6px; font-weight: 600; }
h3 small { font-weight: 400; margin-left: 4px; }
p { margin: 0 0 10px; }
.lead, .note, figcaption { color: var(--muted); }
.note { font-size: 13.5px; max-width: 80ch; }
.card + .note { margin-top: 10px; }
code, pre, td.value {
  font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: 13px;
}
code { overflow-wrap: anywhere; }
code.option { white-space: nowrap; }
pre, .card, .facts div {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px;
}
pre { margin: 0 0 10px; white-space: pre-wrap; overflow-wrap: anywhere; }
.facts {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 26px 0 0;
}
.facts b {
  display: block; font-size: 23px; line-height: 1.25; font-weight: 600; letter-spacing: -0.02em;
}
.facts span { font-size: 12.5px; color: var(--muted); }
.charts {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: 16px;
}
.card { margin: 0; }
.card + .charts { margin-top: 16px; }
.card p { font-size: 13px; margin: 0 0 6px; color: var(--muted); }
.card svg { display: block; width: 100%; height: auto; }
.card svg * { stroke-linejoin: round; stroke-linecap: butt; }
.grids { display: grid; grid-template-columns: repeat(6, 1fr); gap: 16px; }
.grids figure { margin: 0; }
.grids figure.last { grid-column: span 2; grid-row: span 2; }
.grids img {
  display: block; width: 100%; height: auto; image-rendering: pixelated; border-radius: 6px;
  border: 1px solid var(--line); background: #fff;
}
figcaption { font-size: 13px; margin-top: 5px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line); }
tr:last-child td { border-bottom: 0; }
th { font-size: 13px; font-weight: 600; color: var(--muted); vertical-align: bottom; }
td { vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
td.number { white-space: nowrap; }
td.number:last-child, th.number:last-child { padding-right: 0; }
tr.model td { font-weight: 600; }
tr.model small { font-weight: 400; }
.sections { columns: 2 420px; column-gap: 16px; }
.sections .card { break-inside: avoid; margin: 0 0 16px; }
.sections td { padding: 3px 12px 3px 0; border-bottom: 0; }
.sections td:first-child { width: 44%; }
td.value { overflow-wrap: anywhere; }
mark { background: var(--mark); color: var(--mark-ink); border-radius: 4px; padding: 1px 5px; }
small { color: var(--muted); font-size: 12px; }
ul.missing { margin: 0; padding-left: 20px; color: var(--warn); }
footer { margin-top: 48px; color: var(--muted); font-size: 13px; }
@media (max-width: 900px) { .grids { grid-template-columns: repeat(4, 1fr); } }
@media (max-width: 560px) {
  main { padding: 24px 14px 48px; }
  h1 { font-size: 24px; }
  .facts { grid-template-columns: repeat(2, 1fr); gap: 8px; }
  .facts b { font-size: 19px; }
  .grids { grid-template-columns: repeat(2, 1fr); gap: 10px; }
  .card { padding: 12px 10px; }
  th, td { padding-right: 8px; font-size: 13px; }
  td.number small { display: none; }
}
@media print { body { background: #fff; } .card, .facts div { break-inside: avoid; } }
"""
