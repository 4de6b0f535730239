"""Style sheet and script of the page; it uses nothing from outside."""

from __future__ import annotations

__all__ = ["SCRIPT", "STYLE"]

STYLE = """
:root { color-scheme: light dark; --ground: #fff; --ink: #1e293b; --faint: #64748b; --edge: #d8dee6; --panel: #f6f8fa;
  --accent: #0369a1; --left: #0284c7; --right: #ea580c;
  --c0: #0369a1; --c1: #c2410c; --c2: #15803d; --c3: #b91c1c; --c4: #7e22ce; --c5: #854d0e; --c6: #be185d; --c7: #475569;
  --c8: #4d7c0f; --c9: #0e7490; }
@media (prefers-color-scheme: dark) { :root { --ground: #10151c; --ink: #e2e8f0; --faint: #94a3b8; --edge: #2c3644;
  --panel: #18202a; --accent: #38bdf8; --left: #38bdf8; --right: #fb923c;
  --c0: #38bdf8; --c1: #fb923c; --c2: #4ade80; --c3: #f87171; --c4: #c084fc; --c5: #facc15; --c6: #f472b6; --c7: #cbd5e1;
  --c8: #a3e635; --c9: #22d3ee; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.3rem; margin-top: 2.5rem; border-bottom: 1px solid var(--edge); }
h3 { font-size: 1.1rem; margin-top: 2rem; } h4 { font-size: 1rem; }
a { color: var(--accent); } nav a { margin-right: 1rem; display: inline-block; }
code, pre { font: .85rem/1.45 ui-monospace, monospace; } pre { overflow-x: auto; background: var(--panel); padding: .8rem; }
.path { color: var(--faint); font: .8rem ui-monospace, monospace; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; } dt { color: var(--faint); } dd { margin: 0; }
.wide { overflow-x: auto; } table { border-collapse: collapse; margin: .8rem 0; font-size: .9rem; overflow-wrap: normal; }
caption { text-align: left; color: var(--faint); padding-bottom: .3rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--edge); }
th { font-weight: 600; } td { font-variant-numeric: tabular-nums; } td.path { overflow-wrap: anywhere; min-width: 10rem; }
figure { margin: 0 0 1rem; min-width: 0; } figcaption { color: var(--faint); font-size: .85rem; }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--faint); font: 10px system-ui, sans-serif; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); gap: 1rem; }
.charts figcaption { color: var(--ink); }
.grid { stroke: var(--edge); } .ground { fill: var(--panel); } .strip { fill: transparent; }
.strip:hover { fill: var(--faint); fill-opacity: .15; }
.line { fill: none; stroke-width: 1.6; stroke-linejoin: round; } .band { fill-opacity: .2; } .cell { fill: var(--accent); }
.matrix text { font-size: 11px; } .matrix .ink { fill: var(--ink); font-size: 9px; text-anchor: middle; }
.matrix .light { fill: var(--ground); } .map { max-width: 34rem; } .timeline { height: 3.6rem; }
.legend { list-style: none; margin: .3rem 0; padding: 0; display: flex; flex-wrap: wrap; gap: .1rem 1rem; font-size: .8rem; }
.legend i { display: inline-block; width: .8em; height: .8em; margin-right: .4em; border-radius: 2px; }
.clips { display: flex; flex-wrap: wrap; gap: .6rem; margin-bottom: 1rem; }
.clip { width: 9.5rem; padding: .3rem; background: var(--panel); }
.query { outline: 2px solid var(--accent); } .wrong figcaption { color: var(--c3); }
.bone { fill: none; stroke-width: 4; stroke-linecap: round; }
.b0 { stroke: var(--faint); } .b1 { stroke: var(--left); } .b2 { stroke: var(--right); }
.joint { fill: var(--accent); stroke: var(--ground); } .body { max-width: 22rem; }
button { font: inherit; padding: .2rem .8rem; color: inherit; background: var(--panel); border: 1px solid var(--edge); }
""" + "\n".join(f".s{k} {{ stroke: var(--c{k}); }} .f{k} {{ fill: var(--c{k}); }}" for k in range(10))

# every path of a skeleton is drawn anew for each pose; who asks for less motion gets it on request only
SCRIPT = """
(() => {
  const source = document.getElementById("motion");
  if (!source) return;
  const { edges, clips } = JSON.parse(source.textContent);
  const figures = [...document.querySelectorAll("svg[data-clip]")];
  const pause = 6;
  function draw(svg, tick) {
    const clip = clips[svg.dataset.clip], last = clip.frames.length - 1;
    const pose = clip.frames[Math.min(tick % (last + pause), last)], paths = ["", "", ""];
    for (const [side, joint, parent] of edges[clip.edges]) {
      const [a, b, c, d] = [pose[2 * joint], pose[2 * joint + 1], pose[2 * parent], pose[2 * parent + 1]];
      if (a >= 0 && c >= 0) paths[side] += `M${a} ${b}L${c} ${d}`;
    }
    paths.forEach((path, side) => svg.children[side].setAttribute("d", path));
  }
  let playing = !matchMedia("(prefers-reduced-motion: reduce)").matches, tick = 0;
  const buttons = [...document.querySelectorAll("button.play")];
  function say() { buttons.forEach(button => { button.textContent = playing ? "Stop" : "Play"; button.hidden = false; }); }
  buttons.forEach(button => button.addEventListener("click", () => { playing = !playing; say(); }));
  say();
  setInterval(() => {
    if (!playing) return;
    tick += 1;
    for (const svg of figures) draw(svg, tick);
  }, 90);
})();
"""
