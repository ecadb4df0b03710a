"""The style sheet of the report."""

STYLE = """
:root {
  --page: #f6f7f9; --card: #ffffff; --text: #1b1f24; --quiet: #667080; --rule: #e3e6ea;
  --loop: #1f6fd0; --static: #8a93a0; --good: #16794a; --bad: #c22f3d; --heat: #d9541e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171b; --card: #1d2126; --text: #e6e9ed; --quiet: #98a2b0; --rule: #30363d;
    --loop: #5aa2f5; --static: #8d97a5; --good: #4cc38a; --bad: #f1737f; --heat: #f07b46;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
main { max-width: 900px; margin: 0 auto; padding: 28px 16px 48px; }
h1 { font-size: 28px; margin: 0 0 4px; }
h2 { font-size: 18px; margin: 0 0 2px; }
header p, .note, .quiet, footer { color: var(--quiet); }
header p { margin: 0 0 20px; max-width: 64ch; }
.note { margin: 0 0 12px; font-size: 14px; max-width: 72ch; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(132px, 1fr)); gap: 10px; }
.tile, section {
  background: var(--card); border: 1px solid var(--rule); border-radius: 10px;
}
.tile { padding: 12px 14px; display: flex; flex-direction: column; }
.tile span, .tile i { font-size: 13px; font-style: normal; color: var(--quiet); }
.tile b { font-size: 22px; font-weight: 650; line-height: 1.3; white-space: nowrap; }
.tile.loop b { color: var(--loop); }
.tile.bad b { color: var(--bad); }
section { padding: 18px 18px 16px; margin-top: 14px; }
.wide, .scroll { overflow-x: auto; }
.wide svg { width: 100%; min-width: 600px; display: block; }
.square svg { width: 100%; max-width: 400px; display: block; }
svg text { font: 12px system-ui, sans-serif; fill: var(--text); }
svg .tick { fill: var(--quiet); font-size: 11px; }
svg .name { font-weight: 600; }
svg .name.loop { fill: var(--loop); }
svg .name.static { fill: var(--static); }
svg .rule { stroke: var(--rule); }
svg .line { fill: none; stroke-width: 2.2; stroke-linejoin: round; stroke-linecap: round; }
svg .line.loop { stroke: var(--loop); }
svg .line.static { stroke: var(--static); }
svg .dot.loop { fill: var(--loop); fill-opacity: .75; }
svg .hit { fill: transparent; }
svg .hit:hover { fill: var(--loop); fill-opacity: .25; }
svg .ideal { stroke: var(--quiet); stroke-dasharray: 4 4; }
svg .mark line { stroke: var(--text); stroke-opacity: .45; }
svg .mark.rejected line { stroke-dasharray: 3 4; }
svg .mark text { font-size: 11px; font-weight: 600; }
svg .heat { fill: var(--static); }
svg .heat.over { fill: var(--heat); }
.legend { display: flex; gap: 6px 16px; flex-wrap: wrap; margin: 0 0 10px; font-size: 13px; }
.legend i { display: inline-block; width: 26px; height: 11px; margin-right: 6px; }
.legend .under i { background: linear-gradient(90deg, transparent, var(--static)); }
.legend .over i {
  background: linear-gradient(90deg, color-mix(in srgb, var(--heat) 40%, transparent), var(--heat));
}
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { padding: 6px 10px 6px 0; text-align: left; vertical-align: top; }
th { color: var(--quiet); font-weight: 500; white-space: nowrap; }
tbody tr { border-top: 1px solid var(--rule); }
td:first-child { white-space: nowrap; }
.why { min-width: 240px; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.good { color: var(--good); }
.bad { color: var(--bad); }
.chip {
  border: 1px solid var(--rule); border-radius: 9px; padding: 0 7px; margin-left: 4px;
  font-size: 12px; color: var(--quiet);
}
details { font-size: 13px; color: var(--quiet); }
summary { cursor: pointer; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 1px 12px; margin: 4px 0; }
dt { color: var(--quiet); }
dd { margin: 0; color: var(--text); overflow-wrap: anywhere; }
code { font-size: 12px; }
footer { margin-top: 18px; font-size: 13px; }
"""
