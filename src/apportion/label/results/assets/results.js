// Draws the charts of the results page with plotly, in the page's colours.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("result-data").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const axis = (text, more) => ({ title: { text, font: { size: 11 }, standoff: 6 }, gridcolor: colour("--rule"),
    zeroline: false, linecolor: colour("--rule"), tickfont: { size: 11 }, automargin: true, ...more });
  const bars = (values, more) => ({ type: "histogram", x: values, marker: { color: colour("--accent") }, ...more });

  const charts = {
    taus: () => [[bars(data.taus, { xbins: { start: -1.05, end: 1.05, size: 0.1 } })],
      { xaxis: axis("τ", { range: [-1.1, 1.1] }), yaxis: axis("pairs of people") }],
    seconds: () => [[bars(data.seconds, { nbinsx: 30 })], { xaxis: axis("seconds"), yaxis: axis("rankings") }],
    progress: () => [[{ type: "scatter", mode: "lines", x: data.progress.map((ms) => new Date(ms)),
      y: data.progress.map((_, i) => i + 1), line: { color: colour("--accent"), width: 2, shape: "hv" } }],
    { xaxis: axis("", { type: "date" }), yaxis: axis("rankings", { rangemode: "tozero" }) }],
    positions: () => {
      const { position, share, low, high, chance } = data.positions;
      const error_y = { type: "data", symmetric: false, array: high.map((h, i) => h - share[i]),
        arrayminus: low.map((l, i) => share[i] - l), color: colour("--accent"), thickness: 1.5, width: 4 };
      return [[{ type: "scatter", mode: "markers", x: position, y: share, error_y, name: "best",
        marker: { size: 10, color: colour("--accent") } },
      { type: "scatter", mode: "lines", x: position, y: chance, name: "chance",
        line: { color: colour("--faint"), width: 1.5, dash: "dot" } }],
      { xaxis: axis("position, 1 is the first", { dtick: 1 }), yaxis: axis("share", { rangemode: "tozero", tickformat: ".0%" }) }];
    },
  };

  function draw(node) {
    const [traces, axes] = charts[node.dataset.chart]();
    const layout = { font: { family: colour("--sans"), size: 12, color: colour("--muted") },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, bargap: 0.08,
      margin: { l: 44, r: 12, t: 10, b: 40 }, ...axes };
    Plotly.react(node, traces, layout, { displayModeBar: false, responsive: true, showTips: false });
    node.dataset.drawn = String(traces.length);
  }
  const drawAll = () => document.querySelectorAll("[data-chart]").forEach(draw);
  drawAll();
  dark.addEventListener("change", drawAll);
})();
