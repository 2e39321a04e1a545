"""The look of a report: one style sheet, inline, without fonts or pictures from elsewhere."""

STYLE = """
:root { color-scheme: light dark; --page: #fbfbf9; --card: #ffffff; --ink: #1d2126; --soft: #646b75; --line: #e3e4e0; --tint: #f3f3ef;
  --c0: #2f6fb7; --c1: #c2571a; --c2: #2b8a5f; --c3: #8a4fb0; --c4: #b03a5b; --c5: #7a6a1f; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171b; --card: #1b1f25; --ink: #e4e7eb; --soft: #98a1ad; --line: #2d333b; --tint: #20252c;
    --c0: #6aa9ee; --c1: #ee9558; --c2: #5cc596; --c3: #c090e6; --c4: #ec7d9b; --c5: #cdb857; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 56px 28px 72px; }
header { margin-bottom: 32px; }
h1 { font-size: 34px; line-height: 1.2; letter-spacing: -0.015em; margin: 0 0 10px; overflow-wrap: anywhere; }
h2 { font-size: 21px; letter-spacing: -0.005em; margin: 56px 0 16px; padding-top: 20px; border-top: 1px solid var(--line); overflow-wrap: anywhere; }
h3 { font-size: 15px; margin: 32px 0 10px; }
p { margin: 0 0 12px; max-width: 72ch; }
.lead { font-size: 18px; color: var(--soft); margin: 0; }
.note { color: var(--soft); font-size: 14px; }
.figures { display: grid; grid-template-columns: repeat(4, 1fr); gap: 1px; background: var(--line);
  border: 1px solid var(--line); border-radius: 12px; overflow: hidden; margin: 0; }
.figures > div { background: var(--card); padding: 18px 20px 16px; display: flex; flex-direction: column; }
.figures dt { font-size: 13.5px; line-height: 1.4; overflow-wrap: anywhere; }
.figures dd { margin: 0; }
.figures dt { font-weight: 600; }
.figures dd.value { order: -1; margin-bottom: 4px; }
.figures dd.value { font-size: 30px; line-height: 1.25; font-weight: 600; letter-spacing: -0.02em; font-variant-numeric: tabular-nums; }
.figures dd.value small { font-size: 17px; font-weight: 500; letter-spacing: 0; color: var(--soft); }
.figures dd.remark { font-size: 13px; color: var(--soft); line-height: 1.4; overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 20px; }
figure { margin: 0; }
.chart { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 16px 16px 10px; }
.chart figcaption { font-size: 14px; font-weight: 600; margin: 0 0 6px; display: flex; flex-wrap: wrap; gap: 2px 16px; align-items: baseline; }
.key { font-weight: 400; font-size: 13px; color: var(--soft); white-space: nowrap; }
.key i { display: inline-block; width: 14px; height: 3px; border-radius: 2px; vertical-align: middle; margin-right: 6px; background: currentColor; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; fill: var(--soft); font-variant-numeric: tabular-nums; }
svg text.end { font-weight: 600; fill: var(--ink); }
.grid { stroke: var(--line); stroke-width: 1; }
.stage { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 3 4; }
.curve { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.faint { opacity: 0.35; stroke-width: 1.25; }
.s0 { stroke: var(--c0); color: var(--c0); } .s1 { stroke: var(--c1); color: var(--c1); } .s2 { stroke: var(--c2); color: var(--c2); }
.s3 { stroke: var(--c3); color: var(--c3); } .s4 { stroke: var(--c4); color: var(--c4); } .s5 { stroke: var(--c5); color: var(--c5); }
.dot { fill: currentColor; stroke: var(--card); stroke-width: 1.5; }
.pictures { display: flex; flex-wrap: wrap; gap: 24px; margin-top: 24px; align-items: flex-start; }
.pictures figure { max-width: 100%; }
.pictures img { display: block; max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 10px; }
.pictures .scroll { margin: 0; }
.pictures figcaption { color: var(--soft); font-size: 14px; margin-top: 8px; max-width: 64ch; }
.scroll { overflow-x: auto; margin: 0 0 8px; }
table { border-collapse: collapse; font-size: 14.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 22px 7px 0; text-align: start; border-bottom: 1px solid var(--line); vertical-align: top; white-space: nowrap; }
thead th { font-weight: 500; color: var(--soft); font-size: 13px; vertical-align: bottom; }
tbody th { font-weight: 500; }
td.number, th.number { text-align: right; padding: 7px 0 7px 22px; }
th.group { text-align: center; padding-left: 22px; border-bottom: 1px solid var(--line); }
td.bar { width: 130px; padding: 7px 0 7px 22px; vertical-align: middle; }
td.bar span { display: block; height: 8px; border-radius: 4px; background: var(--tint); overflow: hidden; }
td.bar b { display: block; height: 100%; background: var(--c0); border-radius: 4px; }
td.text { white-space: normal; min-width: 150px; max-width: 340px; overflow-wrap: anywhere; }
td.right { color: var(--c2); } td.wrong { color: var(--c1); }
tr.total > * { font-weight: 600; border-top: 1px solid var(--soft); }
.side { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 20px; align-items: start; }
details { border: 1px solid var(--line); border-radius: 12px; background: var(--card); margin: 0 0 12px; }
summary { cursor: pointer; padding: 13px 18px; font-weight: 600; font-size: 15px; }
summary span { font-weight: 400; color: var(--soft); margin-left: 8px; }
details > div { padding: 4px 18px 18px; overflow-x: auto; }
details td.text { max-width: 560px; }
details .charts { padding-top: 4px; } details .chart { border: 0; padding: 0; }
pre { margin: 0; font: 12.5px/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; overflow-x: auto; }
.pictures + details, .charts + details, .scroll + details, .side + details { margin-top: 24px; }
footer { color: var(--soft); font-size: 13px; margin-top: 56px; padding-top: 16px; border-top: 1px solid var(--line); }
@media (max-width: 860px) { .figures { grid-template-columns: repeat(2, 1fr); } }
@media (max-width: 700px) {
  main { padding: 28px 16px 48px; } h1 { font-size: 27px; } h2 { margin-top: 40px; } .lead { font-size: 16.5px; }
  .charts { grid-template-columns: minmax(0, 1fr); gap: 14px; } .chart { padding: 12px 12px 8px; }
  svg text { font-size: 15px; }
  .figures > div { padding: 14px 14px 12px; } .figures dd.value { order: -1; margin-bottom: 4px; }
.figures dd.value { font-size: 25px; }
  .side { grid-template-columns: minmax(0, 1fr); } .pictures .wide img { max-width: 640px; }
  td.bar { display: none; } th, td { padding-right: 16px; } td.number, th.number { padding-left: 16px; }
}
@media print { details > div { display: block; } .chart, figure, .figures { break-inside: avoid; } }
"""
