// Draws the charts of a comparison with plotly, and pages through the answers.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("comparison-data").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const page = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const colour = (run) => data.colours[run][dark.matches ? "dark" : "light"];
  // Plotly reads a small markup in names; policies' names are plain text.
  const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const short = (text) => plain(text.length > 22 ? `${text.slice(0, 21)}…` : text);
  const error = (values, run) => ({ type: "data", symmetric: false, array: [values[2] - values[1]],
    arrayminus: [values[1] - values[0]], thickness: 1.5, width: 4, color: colour(run) });
  const axis = (text, more) => ({ title: { text: plain(text), font: { size: 11 }, standoff: 6 }, gridcolor: page("--rule"),
    zeroline: false, linecolor: page("--rule"), tickfont: { size: 11 }, automargin: true, ...more });

  function wins(rows) {
    const traces = [];
    rows.forEach((row, i) => {
      const place = rows.length - 1 - i;
      const both = [[row.raw, 0.13, colour(row.run), "win rate"], [row.controlled, -0.13, page("--surface"), "length-controlled"]];
      for (const [values, shift, fill, kind] of both) {
        if (!values) continue;
        traces.push({ type: "scatter", mode: "markers", x: [values[1]], y: [place + shift], name: `${plain(data.names[row.run])}, ${kind}`,
          marker: { size: 10, color: fill, line: { color: colour(row.run), width: 2 } }, error_x: error(values, row.run),
          hovertemplate: "%{x:.1%}<extra>%{fullData.name}</extra>" });
      }
    });
    const names = rows.map((row) => short(data.names[row.run])).reverse();
    const half = { type: "line", x0: 0.5, x1: 0.5, y0: -0.6, y1: rows.length - 0.4, layer: "below",
      line: { color: page("--muted"), width: 1, dash: "dot" } };
    return [traces, { shapes: [half], xaxis: axis("", { range: [-0.02, 1.02], tickformat: ".0%", dtick: 0.25 }),
      yaxis: axis("", { tickvals: names.map((_, i) => i), ticktext: names, range: [-0.6, rows.length - 0.4], showgrid: false }) }];
  }

  function scatter(key, title) {
    const traces = data.points.filter((point) => point.y && point[key]).map((point) => ({ type: "scatter",
      mode: "markers", x: [point[key][1]], y: [point.y[1]], name: plain(data.names[point.run]), error_x: error(point[key], point.run),
      error_y: error(point.y, point.run), marker: { size: 10, color: point.run ? colour(point.run) : page("--surface"),
        line: { color: colour(point.run), width: 2 } } }));
    return [traces, { xaxis: axis(title), yaxis: axis(data.measure) }];
  }

  function draw(node) {
    const name = node.dataset.chart;
    const [traces, axes] = data.wins[name] ? wins(data.wins[name])
      : scatter(name, name === "kl" ? "KL, nats an answer" : "length, tokens");
    const layout = { font: { family: page("--sans"), size: 12, color: page("--muted") }, showlegend: false,
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 44, r: 16, t: 10, b: 40 },
      hoverlabel: { bgcolor: page("--surface"), bordercolor: page("--rule"), font: { color: page("--ink"), size: 12 } },
      dragmode: false, hovermode: "closest", ...axes };
    Plotly.react(node, traces, layout, { displayModeBar: false, responsive: true, showTips: false });
    node.dataset.drawn = String(traces.length);
  }
  const drawAll = () => document.querySelectorAll("[data-chart]").forEach(draw);
  drawAll();
  dark.addEventListener("change", drawAll);

  const pager = document.querySelector("[data-pager]");
  if (!pager) return;
  const box = document.querySelector("[data-samples]");
  const inFile = [...box.children];
  const size = Number(pager.dataset.size);
  const [previous, next, where, order] = ["previous", "next", "where", "order"].map((name) => pager.querySelector(`[data-${name}]`));
  let blocks = inFile;
  let first = 0;

  function show(start) {
    first = Math.max(0, Math.min(start, Math.floor((blocks.length - 1) / size) * size));
    blocks.forEach((block, i) => { block.hidden = i < first || i >= first + size; });
    where.textContent = `${first + 1}–${Math.min(first + size, blocks.length)} of ${blocks.length}`;
    previous.disabled = first === 0;
    next.disabled = first + size >= blocks.length;
  }

  function sort() {
    const [run, sign] = order.value.split(" ").map(Number);
    const gain = (block) => Number(block.dataset.gains.split(" ")[run]);
    const known = (block) => !Number.isNaN(gain(block));
    blocks = order.value
      ? [...inFile.filter(known).sort((a, b) => sign * (gain(a) - gain(b))), ...inFile.filter((block) => !known(block))]
      : inFile;
    box.replaceChildren(...blocks);
    show(0);
  }

  function follow() {
    const target = blocks.findIndex((block) => `#${block.id}` === window.location.hash);
    if (target < 0) return;
    show(Math.floor(target / size) * size);
    blocks[target].scrollIntoView();
  }

  previous.addEventListener("click", () => show(first - size));
  next.addEventListener("click", () => show(first + size));
  order.addEventListener("change", sort);
  window.addEventListener("hashchange", follow);
  pager.hidden = false;
  show(0);
  follow();
})();
