"""The style sheet and the one small script (light or dark) of the report."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f4f3ef; --card: #fdfdfc; --ink: #1d2129; --soft: #565e6c; --faint: #8b93a1; --line: #e2e0d9;
  --link: #2459b8;
  --code: #f1efe9;
  --holds: #17724f; --partly: #8a6100; --fails: #b3362b; --idle: #5f6775;
}
@media (prefers-color-scheme: dark) { :root:not([data-theme=light]) {
  --page: #14161a; --card: #1c1f25; --ink: #e9e8e4; --soft: #aab1bd; --faint: #7d8593; --line: #2f343d;
  --link: #8fb4ff;
  --code: #15181d;
  --holds: #5fcf9f; --partly: #e5b85a; --fails: #ff8f80; --idle: #98a0ae;
} }
:root[data-theme=dark] {
  color-scheme: dark;
  --page: #14161a; --card: #1c1f25; --ink: #e9e8e4; --soft: #aab1bd; --faint: #7d8593; --line: #2f343d;
  --link: #8fb4ff;
  --code: #15181d;
  --holds: #5fcf9f; --partly: #e5b85a; --fails: #ff8f80; --idle: #98a0ae;
}
:root[data-theme=light] { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 3rem 1.5rem 4rem; }
header { position: relative; margin-bottom: 2rem; }
.brand { margin: 0; font-size: .8rem; letter-spacing: .14em; text-transform: uppercase; color: var(--soft); }
h1 { font: 600 2.4rem/1.15 Georgia, "Iowan Old Style", "Times New Roman", serif; margin: .3rem 0 .6rem;
  letter-spacing: -.01em; }
.lead { max-width: 44rem; margin: 0; color: var(--soft); font-size: 1.05rem; }
#theme { position: absolute; right: 0; top: 0; width: 2.2rem; height: 2.2rem; border: 1px solid var(--line);
  border-radius: 50%;
  background: var(--card); color: var(--soft); font-size: 1rem; cursor: pointer; }
.tally { display: flex; flex-wrap: wrap; gap: .4rem 1.6rem; margin: 1.3rem 0 0; color: var(--soft);
  align-items: baseline; }
.count b { color: var(--ink); font-size: 1.25rem; font-weight: 600; margin-right: .15rem; }
.chip { display: inline-block; padding: .05rem .55rem; border-radius: 1rem;
  font: 600 .76rem/1.5 system-ui, sans-serif; white-space: nowrap;
  vertical-align: middle; color: var(--tone); background: color-mix(in srgb, var(--tone) 13%, transparent); }
.holds { --tone: var(--holds); } .partly { --tone: var(--partly); } .not-run { --tone: var(--idle); }
.not-reproduced, .error { --tone: var(--fails); } .one-seed { --tone: var(--link); } .ran { --tone: var(--idle); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; }
.number { text-align: right; white-space: nowrap; }
.summary { width: 100%; font-size: .87rem; line-height: 1.4; background: var(--card);
  border: 1px solid var(--line); border-radius: 10px;
  border-collapse: separate; border-spacing: 0; overflow: hidden; }
.summary th { color: var(--soft); font-size: .78rem; padding: .7rem .6rem; border-bottom: 1px solid var(--line); }
.summary td { padding: .75rem .6rem; vertical-align: top; border-bottom: 1px solid var(--line); color: var(--soft); }
.summary tr:last-child td { border-bottom: 0; }
.summary td b { color: var(--ink); font-weight: 600; }
.summary td:first-child, .summary th:first-child { padding-left: 1rem; }
.summary td:last-child, .summary th:last-child { padding-right: 1rem; }
.summary td:nth-child(3) { min-width: 11rem; }
.summary td:nth-child(4), .summary td:nth-child(5) { min-width: 9.5rem; }
.claim { min-width: 12rem; } .claim a { color: var(--ink); font-weight: 600; text-decoration: none; }
.claim a:hover { color: var(--link); }
small { display: block; color: var(--faint); font-size: .78rem; }
.none { color: var(--faint); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 1.7rem 2rem 1.2rem; margin-top: 1.6rem; scroll-margin-top: 1rem; }
.source { margin: 0; font-size: .82rem; color: var(--faint); }
.card h2 { font: 600 1.4rem/1.3 Georgia, "Iowan Old Style", "Times New Roman", serif; margin: .25rem 0 .7rem; }
h3 { font-size: .78rem; font-weight: 600; color: var(--soft); margin: 0 0 .3rem; }
.says { margin: .2rem 0; max-width: 52rem; color: var(--soft); } .says b { color: var(--ink); font-weight: 600; }
figure { margin: 1.3rem 0; }
figcaption { font-weight: 600; font-size: .88rem; margin-bottom: .4rem; }
.drawing svg, .drawing img { display: block; width: 100%; max-width: 60rem; height: auto; margin: 0 auto; }
.raster { background: #fdfdfc; border-radius: 6px; padding: .5rem; }
pre { margin: 0; padding: .9rem 1.1rem; background: var(--code); border-radius: 6px; overflow-x: auto;
  white-space: pre-wrap; overflow-wrap: anywhere;
  font: .86rem/1.55 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
.columns { display: flex; flex-wrap: wrap; gap: 1.2rem 3rem; margin: 1.3rem 0 .6rem; }
.columns > div { flex: 1 1 20rem; }
.numbers { font-size: .87rem; width: 100%; } .numbers th { font-weight: 400; color: var(--soft);
  padding: .25rem 1.2rem .25rem 0; vertical-align: top; }
.numbers td { padding: .25rem 0; text-align: right; font-weight: 600; overflow-wrap: anywhere; }
.numbers tr + tr > * { border-top: 1px solid var(--line); }
.data table { font-size: .87rem; } .data th, .data td { padding: .3rem 1.4rem .3rem 0; }
.data th { color: var(--soft); border-bottom: 1px solid var(--line); }
.data td { border-bottom: 1px solid var(--line); }
.checks { list-style: none; margin: 1rem 0 0; padding: 0; font-size: .9rem; color: var(--soft); }
.checks li { padding: .1rem 0 .1rem 1.5rem; position: relative; } .checks li::before { position: absolute;
  left: 0; font-weight: 700; }
.pass::before { content: "✓"; color: var(--holds); } .fail::before { content: "✗"; color: var(--fails); }
.interval { color: var(--soft); font-size: .9rem; } .interval b { color: var(--ink); }
.earlier { margin: 0 0 .6rem; padding-left: 1.3rem; font-size: .87rem; color: var(--soft); }
.note { color: var(--soft); } .seconds { color: var(--faint); font-size: .8rem; margin: .9rem 0 0; }
footer { margin-top: 2.5rem; max-width: 34rem; } footer h2 { font-size: .95rem; margin: 0 0 .5rem; }
@media (max-width: 640px) { main { padding: 2rem .9rem; } .card { padding: 1.2rem 1.1rem; }
h1 { font-size: 1.8rem; } }
@media print { #theme { display: none; } .card { break-inside: avoid; } }
"""

SCRIPT = """
document.getElementById("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
"""
