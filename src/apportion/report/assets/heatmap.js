// The heat-map viewer: picks a logged rollout, switches quantity and method, and colours its tokens.
// Text reaches the page through textContent only.
"use strict";
(() => {
  const source = document.getElementById("rollout-data");
  const viewer = document.querySelector("[data-viewer]");
  if (!source || !viewer) return;
  const runs = JSON.parse(source.textContent);
  const find = (name) => viewer.querySelector(`[data-${name}]`);
  const state = { run: 0, step: 0, row: 0, view: null, shared: false, here: -1 };

  const make = (tag, className, text) => {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const number = (value, signed) => {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    const digits = size >= 1000 ? 0 : size >= 100 ? 1 : size >= 1 ? 2 : 3;
    const text = size !== 0 && (size >= 1e6 || size < 1e-3) ? value.toExponential(1) : value.toFixed(digits);
    return (signed && value > 0 ? "+" : "") + text.replaceAll("-", "−");
  };
  const numbers = (values) => values.filter((v) => v !== null);
  const largest = (values) => numbers(values).reduce((most, v) => Math.max(most, Math.abs(v)), 0);
  // For credit, full colour is at least four times an even share: an even spread singles out no token and stays pale.
  const creditLimit = (values) => {
    const sizes = numbers(values).map(Math.abs);
    return sizes.length ? Math.max(...sizes, (4 * sizes.reduce((sum, v) => sum + v, 0)) / sizes.length) : 0;
  };
  const total = (values) => numbers(values).reduce((sum, v) => sum + v, 0);

  const rollout = () => runs[state.run].steps[state.step].rollouts[state.row];
  const views = (data) => [
    ...Object.keys(data.quantities).map((name) => ({ id: `quantity:${name}`, name, group: "quantities" })),
    ...Object.keys(data.methods).map((name) => ({ id: `method:${name}`, name, group: "methods" })),
  ];

  function facts(data, values) {
    const sizes = numbers(values).map(Math.abs);
    const mass = sizes.reduce((sum, v) => sum + v, 0);
    const sum = total(values);
    const matches = data.score !== null && Math.abs(sum - data.score) <= 1e-3 * Math.max(1, mass);
    const said = matches ? [] : [`sum ${number(sum, true)}`];
    if (mass > 0) {
      const top = values.findIndex((v) => v !== null && Math.abs(v) === Math.max(...sizes));
      const word = data.tokens[top].trim() || data.tokens[top];
      const entropy = sizes.reduce((sum, v) => (v > 0 ? sum - (v / mass) * Math.log(v / mass) : sum), 0);
      const share = Math.round((100 * Math.abs(values[top])) / mass);
      said.push(sizes.every((v) => v === sizes[0]) ? "the same on every token" : `largest ${share}% on “${word}”`);
      said.push(`${Math.exp(entropy).toFixed(1)} effective tokens of ${data.tokens.length}`);
    }
    return said;
  }

  function paint(box, data, values, limit, label) {
    const special = new Set(data.special);
    box.replaceChildren(...data.tokens.map((text, i) => {
      const value = values[i];
      const token = make("span", `token ${value < 0 ? "negative" : "positive"}`, text);
      token.classList.toggle("missing", value === null);
      token.classList.toggle("special", special.has(i));
      token.style.setProperty("--level", value === null || limit === 0 ? "0" : Math.min(1, Math.abs(value) / limit).toFixed(3));
      token.title = `${label} ${number(value, true)} (token ${i + 1})`;
      token.dataset.index = String(i);
      return token;
    }));
  }

  // What was trained with comes first; without it, the first method given.
  const initial = (data, all) => (all.length ? all[0].id : null);

  function drawSwitches(data) {
    const box = find("switches");
    const all = views(data);
    if (!all.some((view) => view.id === state.view)) state.view = initial(data, all);
    const signature = JSON.stringify(all);
    // Rebuilt only when the choices change, so that keyboard focus stays where it is.
    if (box.dataset.signature !== signature) {
      box.dataset.signature = signature;
      const titles = { quantities: "In training", methods: "Same text, by method" };
      box.replaceChildren(...["quantities", "methods"].flatMap((group) => {
        const members = all.filter((view) => view.group === group);
        return members.length ? [switchGroup(titles[group], members)] : [];
      }));
    }
    for (const input of box.querySelectorAll("input")) input.checked = input.value === state.view;
  }

  function switchGroup(title, members) {
    const group = make("fieldset");
    const options = make("div", "options");
    for (const view of members) {
      const label = make("label");
      const input = make("input");
      Object.assign(input, { type: "radio", name: "view", value: view.id });
      label.append(input, make("span", "", view.name));
      options.append(label);
    }
    group.append(make("legend", "", title), options);
    return group;
  }

  const current = (data) => {
    const view = views(data).find((v) => v.id === state.view);
    return view ? { label: view.name, values: data[view.group][view.name] } : { label: "value", values: data.tokens.map(() => null) };
  };

  function drawMain(data) {
    const { label, values } = current(data);
    const limit = /^method:|:credit|:reward$/.test(state.view) ? creditLimit(values) : largest(values);
    const score = data.score === null ? [] : [`score ${number(data.score, true)}`];
    const cut = data.ended === false ? ["cut off at the length limit"] : [];
    find("facts").textContent = [label, ...score, ...facts(data, values), ...cut].join(" · ");
    find("low").textContent = number(-limit);
    find("high").textContent = number(limit, true);
    find("prompt").textContent = data.prompt;
    paint(find("tokens"), data, values, limit, label);
  }

  function drawStack(data) {
    const methods = Object.entries(data.methods);
    find("stack-block").hidden = methods.length === 0;
    const shared = Math.max(...methods.map(([, values]) => creditLimit(values)));
    find("stack").replaceChildren(...methods.map(([name, values]) => {
      const limit = state.shared ? shared : creditLimit(values);
      const row = make("div", "stack-row");
      const head = make("header");
      head.append(make("h4", "", name), ...facts(data, values).map((fact) => make("p", "facts", fact)));
      head.append(make("p", "facts", `scale ±${number(limit)}`));
      const tokens = make("div", "tokens");
      paint(tokens, data, values, limit, name);
      row.append(head, tokens);
      return row;
    }));
  }

  function drawTable(data) {
    if (!find("values").open) return find("table").replaceChildren();
    const columns = views(data);
    const table = make("table");
    const head = make("tr");
    head.append(make("th", "", "token"), ...columns.map((c) => make("th", "", c.name)));
    table.append(head, ...data.tokens.map((text, i) => {
      const row = make("tr");
      row.append(make("th", "", `${i + 1}  ${text.replaceAll("\n", "")}`));
      row.append(...columns.map((c) => make("td", "", number(data[c.group][c.name][i], true))));
      return row;
    }));
    return find("table").replaceChildren(table);
  }

  function point(index) {
    const data = rollout();
    state.here = index;
    for (const token of viewer.querySelectorAll(".token.here")) token.classList.remove("here");
    if (index < 0) {
      find("readout").textContent = "Point at or tap a token; with the keyboard, focus the text and use the arrow keys.";
      return;
    }
    for (const token of viewer.querySelectorAll(`.token[data-index="${index}"]`)) token.classList.add("here");
    const said = views(data).map((v) => `${v.name} ${number(data[v.group][v.name][index], true)}`);
    find("readout").textContent = `${index + 1}. “${data.tokens[index]}”  ${said.join(" · ")}`;
  }

  function drawPicker() {
    const steps = runs[state.run].steps;
    const rows = steps[state.step].rollouts;
    find("run-field").hidden = runs.length < 2;
    find("run").replaceChildren(...runs.map((run, i) => new Option(run.name, String(i), false, i === state.run)));
    find("step").max = String(steps.length - 1);
    find("step").value = String(state.step);
    find("step").setAttribute("aria-valuetext", `step ${steps[state.step].step}`);
    find("step-text").textContent = `${steps[state.step].step} (${state.step + 1} of ${steps.length} logged)`;
    find("row-field").hidden = rows.length < 2;
    find("row").replaceChildren(...rows.map((row, i) => {
      const name = `${i + 1} of ${rows.length}${row.score === null ? "" : `, score ${number(row.score, true)}`}`;
      return new Option(name, String(i), false, i === state.row);
    }));
    find("picker").hidden = runs.length < 2 && steps.length < 2 && rows.length < 2;
  }

  function draw() {
    const data = rollout();
    drawSwitches(data);
    drawMain(data);
    drawStack(data);
    drawTable(data);
    point(-1);
  }

  function go(change) {
    Object.assign(state, change);
    state.step = Math.min(state.step, runs[state.run].steps.length - 1);
    state.row = Math.min(state.row, runs[state.run].steps[state.step].rollouts.length - 1);
    drawPicker();
    draw();
  }

  find("run").addEventListener("change", (event) => go({ run: Number(event.target.value) }));
  find("row").addEventListener("change", (event) => go({ row: Number(event.target.value) }));
  find("step").addEventListener("input", (event) => go({ step: Number(event.target.value) }));
  find("first").addEventListener("click", () => go({ step: 0 }));
  find("last").addEventListener("click", () => go({ step: Infinity }));
  find("shared").addEventListener("change", (event) => {
    state.shared = event.target.checked;
    drawStack(rollout());
  });
  find("switches").addEventListener("change", (event) => {
    state.view = event.target.value;
    drawMain(rollout());
    point(state.here);
  });
  find("values").addEventListener("toggle", () => drawTable(rollout()));
  viewer.addEventListener("pointerover", (event) => {
    const token = event.target.closest(".token");
    if (token) point(Number(token.dataset.index));
  });
  viewer.addEventListener("pointerleave", (event) => {
    // A finger leaves as soon as it is lifted; what it chose stays.
    if (event.pointerType === "mouse") point(-1);
  });
  find("tokens").addEventListener("keydown", (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!move) return;
    event.preventDefault();
    point(Math.max(0, Math.min(rollout().tokens.length - 1, state.here + move)));
  });
  go({});
})();
