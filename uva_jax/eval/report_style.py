"""The style sheet of the report, for light and dark screens."""

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #0f172a; --soft: #64748b; --line: #e2e8f0;
  --card: #f8fafc; --blue: #2563eb; --good: #047857; --bad: #b91c1c; }
@media (prefers-color-scheme: dark) { :root { --paper: #0f172a; --ink: #e2e8f0; --soft: #94a3b8;
  --line: #334155; --card: #1e293b; --blue: #60a5fa; --good: #34d399; --bad: #f87171; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui,
  -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", "DejaVu Sans", sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; letter-spacing: -.015em; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; margin: 0 0 .9rem; }
section { margin-top: 2.25rem; padding-top: 1.5rem; border-top: 1px solid var(--line); }
p { margin: .6rem 0; max-width: 46rem; }
.note, figcaption, small { color: var(--soft); font-size: .875rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .9rem;
  margin-top: 1.25rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .7rem;
  padding: .85rem 1rem; }
.card span, .card small { display: block; color: var(--soft); font-size: .875rem; }
.card strong { display: block; font-size: 1.75rem; line-height: 1.3; }
.card.better strong { color: var(--good); } .card.worse strong { color: var(--bad); }
strong, td { font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; min-width: 60%; }
th { text-align: left; font-weight: 600; color: var(--soft); white-space: nowrap;
  vertical-align: bottom; }
th, td { padding: .42rem 1.5rem .42rem 0; border-bottom: 1px solid var(--line); }
td:first-child { white-space: nowrap; } td.n { white-space: nowrap; }
th:last-child, td:last-child { padding-right: .25rem; }
.n { text-align: right; } .total td { font-weight: 600; border-bottom: 0; }
.track { position: relative; display: inline-block; width: 9rem; height: .5rem;
  border-radius: .25rem; background: var(--line); }
.track i { position: absolute; top: 0; bottom: 0; min-width: 3px; border-radius: .25rem;
  background: var(--blue); }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(24rem, 100%), 1fr));
  gap: 1.5rem; }
figure { margin: .5rem 0 0; min-width: 0; }
img, video { display: block; width: 100%; height: auto; border-radius: .4rem; }
.wide { overflow-x: auto; } .wide figure { min-width: 42rem; }
code { font-size: .85em; overflow-wrap: anywhere; }
"""
