// Elements from plain values. Texts become text nodes: nothing a model wrote is ever parsed as markup.

export const byId = (id) => document.getElementById(id);

/** Return an element; `props` are attributes, `on` listeners by event; strings among `children` are text. */
export function h(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name === "on") Object.entries(value).forEach(([event, listen]) => node.addEventListener(event, listen));
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, String(value));
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

/** Show one of the page's states and hide the others. */
export function showOnly(id) {
  for (const name of ["sign-in", "waiting", "work"]) byId(name).hidden = name !== id;
}

let last = "";

/** Have a screen reader announce `text`; the same text twice is announced twice. */
export function announce(text) {
  last = text === last ? `${text}\u00a0` : text;
  byId("announcer").textContent = last;
}

/** Show a message that stays until it is dismissed. */
export function notice(text, onDismiss = () => {}) {
  const dismiss = () => { box.remove(); onDismiss(); };
  const box = h("div", { class: "notice" }, h("span", {}, text), h("button", { type: "button", on: { click: dismiss } }, "Dismiss"));
  byId("notices").append(box);
}
