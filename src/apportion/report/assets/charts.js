// Draws the charts of the report with plotly, in the page's colours, and redraws them when the colour scheme changes.
"use strict";
(() => {
  const { names, colours, charts } = JSON.parse(document.getElementById("chart-data").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const coarse = window.matchMedia("(pointer: coarse)").matches;
  const hidden = new Set();

  const colour = (run) => colours[run][dark.matches ? "dark" : "light"];
  const page = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  // Beyond the palette, runs are told apart by their dashes.
  const dash = (run) => ["solid", "dash", "dot", "dashdot"][Math.floor(run / 6) % 4];
  // Plotly reads a small markup in names; model and run names are plain text.
  const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

  function base(trace) {
    const name = plain(names[trace.run]);
    return { run: trace.run, type: "scatter", name, x: trace.x, visible: !hidden.has(trace.run) };
  }

  function curve(trace) {
    const line = { color: colour(trace.run), width: 2, dash: dash(trace.run) };
    const alone = trace.x.length === 1;
    const raw = { ...base(trace), mode: alone ? "markers" : "lines", y: trace.y, line, marker: { color: line.color } };
    if (!trace.smooth) return [raw];
    const thin = { ...raw, line: { ...line, width: 1 }, opacity: 0.32, hoverinfo: "skip" };
    return [thin, { ...base(trace), mode: "lines", y: trace.smooth, line }];
  }

  function calibration(trace) {
    const most = Math.max(...trace.n);
    const size = trace.n.map((n) => 5 + 15 * Math.sqrt(n / most));
    const marker = { size, color: colour(trace.run), opacity: 0.75, line: { width: 0 } };
    const line = { color: colour(trace.run), width: 1.5, dash: dash(trace.run) };
    const hovertemplate = "confidence %{x:.2f}<br>accuracy %{y:.2f}<br>%{customdata} comparisons";
    return [{ ...base(trace), mode: "lines+markers", y: trace.y, customdata: trace.n, marker, line, hovertemplate }];
  }

  function interval(trace) {
    const above = trace.high.map((high, i) => high - trace.y[i]);
    const below = trace.low.map((low, i) => trace.y[i] - low);
    const error = { type: "data", symmetric: false, array: above, arrayminus: below, thickness: 1.5, width: 4 };
    return [{ ...base(trace), mode: "markers", y: trace.y, marker: { size: 9, color: colour(trace.run) },
      error_y: { ...error, color: colour(trace.run) } }];
  }

  const kinds = { curve, calibration, interval };

  function axis(title, more) {
    return { title: { text: title, font: { size: 11 }, standoff: 6 }, gridcolor: page("--rule"), zeroline: false,
      linecolor: page("--rule"), tickfont: { size: 11 }, ...more };
  }

  function layout(chart) {
    const curveLike = chart.kind === "curve";
    const step = axis(curveLike ? "step" : "", { showgrid: false, showline: true });
    const left = { nticks: 5, automargin: true, hoverformat: ".4~g" };
    if (curveLike) {
      Object.assign(step, { spikethickness: 1, spikedash: "solid", spikecolor: page("--faint") });
      step.unifiedhovertitle = { text: "step %{x}" };
    }
    const drawn = {
      font: { family: page("--sans"), size: 12, color: page("--muted") },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false,
      margin: { l: 40, r: 10, t: 10, b: 38 }, dragmode: coarse ? false : "zoom", hovermode: curveLike ? "x unified" : "closest",
      hoverlabel: { bgcolor: page("--surface"), bordercolor: page("--rule"), font: { color: page("--ink"), size: 12 } },
      xaxis: step, yaxis: axis("", left),
    };
    if (chart.kind === "interval") drawn.xaxis.type = "category";
    if (chart.kind === "calibration") {
      drawn.xaxis.title.text = "confidence";
      const low = Math.min(0.5, ...chart.traces.flatMap((trace) => trace.x));
      drawn.shapes = [{ type: "line", x0: low, y0: low, x1: 1, y1: 1, layer: "below",
        line: { color: page("--faint"), width: 1, dash: "dot" } }];
    }
    return drawn;
  }

  function draw(node) {
    const chart = charts[node.dataset.chart];
    const traces = chart.traces.flatMap(kinds[chart.kind]);
    Plotly.react(node, traces, layout(chart), { displayModeBar: false, responsive: true, showTips: false });
    node.dataset.drawn = String(traces.length);
  }

  const nodes = [...document.querySelectorAll("[data-chart]")];
  const drawAll = (only) => nodes.filter((node) => only(node)).forEach(draw);
  const inClosed = (node) => node.closest("details:not([open])") !== null;

  drawAll((node) => !inClosed(node));
  dark.addEventListener("change", () => drawAll((node) => node.dataset.drawn));
  for (const details of document.querySelectorAll("details")) {
    details.addEventListener("toggle", () => drawAll((node) => details.contains(node) && !node.dataset.drawn && !inClosed(node)));
  }
  for (const box of document.querySelectorAll("[data-show-run]")) {
    box.addEventListener("change", () => {
      const run = Number(box.dataset.showRun);
      if (box.checked) hidden.delete(run);
      else hidden.add(run);
      drawAll((node) => node.dataset.drawn);
    });
  }
})();
