// The prompt and the cards of the answers.

import { byId, h } from "./dom.js";
import { LETTERS, describe, ordinal } from "./ranking.js";

const LONG = 420; // characters of a prompt that is set in smaller type

/** Return the elements of a text or of a conversation's turns. */
function texts(value) {
  if (typeof value === "string") {
    return [value.trim() === "" ? h("div", { class: "text empty" }, "(an empty answer)") : h("div", { class: "text" }, value)];
  }
  return value.map((turn) => h("div", { class: "turn" }, h("div", { class: "turn-role" }, turn.role ?? "turn"),
    h("div", { class: "text" }, contentOf(turn))));
}

function contentOf(turn) {
  const content = turn.content ?? "";
  const text = Array.isArray(content) ? content.map((part) => part.text ?? JSON.stringify(part)).join("\n") : String(content);
  const calls = turn.tool_calls ? JSON.stringify(turn.tool_calls, null, 2) : "";
  return [text, calls].filter(Boolean).join("\n");
}

export function showPrompt(prompt) {
  const node = byId("prompt");
  node.replaceChildren(...texts(prompt));
  node.classList.toggle("long", typeof prompt !== "string" || prompt.length > LONG);
}

/** Build a card for each answer; `choose(i, place)` is called for its buttons. Returns the cards. */
export function buildCards(answers, choose) {
  const cards = answers.map((answer, i) => {
    const letter = LETTERS[i];
    const places = [...answers.keys()].map((n) => option(i, n + 1, String(n + 1), `${ordinal(n + 1)} place`, choose));
    places.push(option(i, 0, "Cannot judge", "Cannot judge", choose));
    return h("article", { class: "card", "data-answer": i, "aria-label": `Answer ${letter}` },
      h("div", { class: "card-head" },
        h("button", { class: "chip", type: "button", "data-drag": i, tabindex: -1, "aria-hidden": "true" }, letter),
        h("span", { class: "card-place" })),
      h("div", { class: "card-text" }, ...texts(answer)),
      h("fieldset", { class: "ranks" }, h("legend", { class: "visually-hidden" }, `Place of answer ${letter}`),
        h("span", { class: "ranks-name", "aria-hidden": "true" }, "Place"), ...places));
  });
  byId("answers").replaceChildren(...cards);
  return cards;
}

function option(i, place, text, label, choose) {
  const input = h("input", { type: "radio", name: `place-${i}`, value: place, "aria-label": label, on: { change: () => choose(i, place) } });
  return h("label", place === 0 ? { class: "none" } : {}, input, h("span", { "aria-hidden": "true" }, text));
}

/** Show the places on the cards. */
export function updateCards(cards, places) {
  cards.forEach((card, i) => {
    card.classList.toggle("placed", places[i] !== null && places[i] > 0);
    card.querySelector(".card-place").textContent = describe(places, i);
    for (const input of card.querySelectorAll("input")) input.checked = places[i] !== null && Number(input.value) === places[i];
  });
}

/** Bring a card into view and mark it for a moment. */
export function findCard(cards, i) {
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  cards[i].scrollIntoView({ block: "nearest", inline: "center", behavior: still ? "auto" : "smooth" });
  cards[i].classList.add("found");
  setTimeout(() => cards[i].classList.remove("found"), 900);
}
