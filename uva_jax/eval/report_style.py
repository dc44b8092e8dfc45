"""The style sheet of the report, for light and dark screens, phones and paper."""

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #0f172a; --soft: #5b6b82; --line: #e2e8f0;
  --card: #f8fafc; --blue: #2563eb; --good: #047857; --bad: #b91c1c; --open: #a16207; }
@media (prefers-color-scheme: dark) { :root { --paper: #0f172a; --ink: #e2e8f0; --soft: #94a3b8;
  --line: #334155; --card: #1e293b; --blue: #60a5fa; --good: #34d399; --bad: #f87171;
  --open: #fbbf24; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui,
  -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", "DejaVu Sans", sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; letter-spacing: -.015em; margin: 0 0 .5rem;
  overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 0 0 .9rem; }
section { margin-top: 2.25rem; padding-top: 1.5rem; border-top: 1px solid var(--line); }
p { margin: .6rem 0; max-width: 46rem; } p, li, figcaption { overflow-wrap: anywhere; }
.verdict { font-size: 1.2rem; line-height: 1.45; margin: 1rem 0; padding: .8rem 1.1rem;
  max-width: none; background: var(--card); border-left: .35rem solid var(--open);
  border-radius: .3rem; }
.verdict.better, .verdict.not-worse { border-color: var(--good); }
.verdict.worse { border-color: var(--bad); }
.note, figcaption, small { color: var(--soft); font-size: .875rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .9rem;
  margin-top: 1.25rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .7rem;
  padding: .85rem 1rem; }
.card span, .card small { display: block; color: var(--soft); font-size: .875rem; }
.card { overflow-wrap: anywhere; }
.card strong { display: block; font-size: 1.75rem; line-height: 1.3; }
strong, td { font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; margin: 0 0 .9rem; }
table { border-collapse: collapse; font-size: .92rem; min-width: 60%; }
th { text-align: left; font-weight: 600; color: var(--soft); vertical-align: bottom; }
th, td { padding: .42rem 1.5rem .42rem 0; border-bottom: 1px solid var(--line); }
th:last-child, td:last-child { padding-right: .25rem; }
td { overflow-wrap: break-word; } td:not(:first-child):not(.n) { overflow-wrap: anywhere; }
td.n { white-space: nowrap; } .n { text-align: right; }
.total td { font-weight: 600; border-bottom: 0; }
.track { position: relative; display: inline-block; width: 9rem; height: .5rem;
  border-radius: .25rem; background: var(--line); }
.track i { position: absolute; top: 0; bottom: 0; min-width: 3px; border-radius: .25rem;
  background: var(--blue); }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(24rem, 100%), 1fr));
  gap: 1.5rem; margin-bottom: .9rem; }
figure { margin: .5rem 0 0; min-width: 0; }
img, video { display: block; width: 100%; height: auto; border-radius: .4rem; }
.paper { display: none; }
code { font-size: .85em; overflow-wrap: anywhere; }
@media (max-width: 40rem) {
  main { padding: 1.25rem .9rem 2.5rem; }
  h1 { font-size: 1.45rem; } .verdict { font-size: 1.05rem; padding: .7rem .9rem; }
  .cards { grid-template-columns: 1fr 1fr; gap: .6rem; } .card { padding: .6rem .75rem; }
  .card strong { font-size: 1.4rem; }
  table { font-size: .78rem; line-height: 1.35; width: 100%; }
  th, td { padding: .4rem .55rem .4rem 0; } td.n { white-space: normal; }
  td:first-child { min-width: 6.5rem; overflow-wrap: anywhere; }
  .wide { display: none; }
  .stack thead { display: none; }
  .stack tr { display: grid; grid-template-columns: repeat(3, 1fr); padding: .35rem 0;
    border-bottom: 1px solid var(--line); }
  .stack td, .stack td.n { border: 0; padding: .15rem .5rem .15rem 0; text-align: left; }
  .stack td:first-child { grid-column: 1 / -1; font-weight: 600; font-size: .85rem; }
  .stack td:not(:first-child)::before { content: attr(data-label); display: block;
    color: var(--soft); font-size: .72rem; }
  .stack td.wide { display: none; }
}
@media print {
  :root { color-scheme: light; --paper: #fff; --ink: #000; --soft: #444; --line: #ccc;
    --card: #fff; }
  body { font-size: 10.5pt; } main { max-width: none; padding: 0; }
  section { margin-top: 1.2rem; padding-top: .8rem; }
  h2 { break-after: avoid; } figure, tr, .card, .verdict { break-inside: avoid; }
  .paper { display: block; } video:has(+ .paper) { display: none; }
  figure:has(.paper) { grid-column: 1 / -1; } .grid { grid-template-columns: 1fr 1fr; }
  .scroll { overflow: visible; }
  .track, .track i, .verdict { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
