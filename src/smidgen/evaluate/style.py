"""The style sheet of report.html: light and dark, wide and narrow, and nothing to download."""

STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --panel: #f5f6f8; --text: #1c2330; --soft: #5b6575;
  --line: #dde1e7; --c0: #1f6fc4; --c1: #d9730d; --c2: #7b8494; --c3: #6b4fbb; --wrong: #c8443a;
  --good: #14744a; --warn: #8f5c00; --bad: #b3352b; --on: #ffffff; }
@media (prefers-color-scheme: dark) { :root { --ground: #12161d; --panel: #1b212b; --text: #e6e9ee; --soft: #9aa5b5;
  --line: #323b49; --c0: #62a8f2; --c1: #f0a04b; --c2: #8b95a5; --c3: #a690ee; --wrong: #e5685d;
  --good: #52c48d; --warn: #e2b04a; --bad: #f07f75; --on: #0d1117; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 2rem 1.25rem 3rem; background: var(--ground); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.55rem; line-height: 1.25; margin: .25rem 0 .5rem; text-wrap: balance; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.25rem 0 .6rem; } h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
p { margin: .4rem 0; } .soft, .kicker { color: var(--soft); } .small { font-size: .875rem; }
.kicker { font-size: .9rem; overflow-wrap: anywhere; }
header { border-left: 5px solid var(--c2); padding-left: 1rem; } header.gained { border-color: var(--good); }
header.lost { border-color: var(--bad); } header.uncertain { border-color: var(--warn); }
.gained .outcome { color: var(--good); } .lost .outcome { color: var(--bad); }
.uncertain .outcome { color: var(--warn); } .outcome { font-weight: 650; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: middle; }
th { color: var(--soft); font-weight: 550; font-size: .82rem; } td { overflow-wrap: break-word; }
.long { overflow-wrap: anywhere; }
.num { text-align: right; } td.num { white-space: nowrap; } td:first-child { min-width: 7rem; }
tr.tuned td { background: var(--panel); font-weight: 600; }
.sub { display: block; color: var(--soft); font-weight: 400; font-size: .82rem; }
svg { display: block; width: 100%; height: auto; } svg.bar { width: 200px; min-width: 110px; }
svg.fixed { width: auto; max-width: none; } svg.swatch { display: inline-block; width: 22px; margin-right: .35rem; }
.scroll { overflow-x: auto; padding-bottom: .3rem; }
.grid { stroke: var(--line); } .tick { fill: var(--soft); font-size: 12px; } .strong.tick { fill: var(--text); }
.name { fill: var(--text); font-size: 12px; } .best { stroke: var(--text); stroke-dasharray: 4 3; opacity: .65; }
.curve { fill: none; stroke-width: 2.2; stroke-linejoin: round; stroke-linecap: round; }
.curve.c0 { stroke: var(--c0); } .curve.c1 { stroke: var(--c1); stroke-width: 1.5; }
.curve.c2 { stroke: var(--c2); stroke-dasharray: 6 4; } .curve.c3 { stroke: var(--c3); stroke-dasharray: 2 4; }
.dot { stroke: var(--ground); stroke-width: 1.5; } .dot.c0 { fill: var(--c0); } .dot.c1 { fill: var(--c1); }
.dot.c2 { fill: var(--c2); } .dot.c3 { fill: var(--c3); }
.interval { stroke: var(--c2); stroke-width: 5; stroke-linecap: round; opacity: .5; }
.interval.strong { stroke: var(--c0); }
.empty { fill: var(--panel); } .right { fill: var(--c0); } .wrong { fill: var(--wrong); }
.count { fill: var(--text); font-size: 11.5px; text-anchor: middle; } .count.full { fill: var(--on); font-weight: 600; }
.charts { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
figure { margin: 0; max-width: 34rem; } figcaption { margin-bottom: .3rem; font-size: .9rem; }
.key { margin-left: .9rem; white-space: nowrap; color: var(--soft); }
ul { margin: .4rem 0; padding-left: 1.2rem; } li { margin: .3rem 0; overflow-wrap: anywhere; }
.notes { background: var(--panel); border-radius: 8px; padding: .5rem 1rem; }
details { border: 1px solid var(--line); border-radius: 8px; padding: .6rem 1rem; margin-top: .8rem; }
summary { cursor: pointer; font-weight: 600; }
@media (max-width: 42rem) { body { padding: 1.25rem .9rem 2rem; } h1 { font-size: 1.3rem; }
  table, tbody, tr, td { display: block; } thead { display: none; }
  tr { border: 1px solid var(--line); border-radius: 8px; margin: .6rem 0; overflow: hidden; }
  td, td.num { border: 0; padding: .25rem .8rem; text-align: right; white-space: normal; display: flex;
    justify-content: space-between; align-items: baseline; gap: 1.2rem; }
  td::before { content: attr(data-label); color: var(--soft); font-weight: 400; font-size: .85rem; text-align: left;
    flex: none; } td:first-child { padding-top: .55rem; } td:last-child { padding-bottom: .55rem; }
  td.long { display: block; text-align: left; } td.long::before { display: block; }
  td[data-label=""] { justify-content: flex-end; } td[data-label=""]::before { content: none; }
  td[data-label=""]:first-child { justify-content: space-between; } td.bars:empty { display: none; } }
"""
