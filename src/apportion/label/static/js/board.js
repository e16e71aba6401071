// The ranking board: a row for each place with the letters in it, the letters not placed yet, and "cannot judge".

import { byId, h } from "./dom.js";
import { LETTERS, describe, groups } from "./ranking.js";

/** Draw the board; `press(i)` is called for a letter that is clicked, `key(event, i)` for a key on it. */
export function drawBoard(places, press, key) {
  const focused = document.activeElement?.closest?.("#board .chip")?.dataset.drag;
  const rows = groups(places).map(({ place, members }) => row(`group:${place}`, "place", String(place), members));
  const unplaced = places.flatMap((one, i) => (one === null ? [i] : []));
  const none = places.flatMap((one, i) => (one === 0 ? [i] : []));
  if (unplaced.length) {
    rows.push(row("end", "place open", String(Math.max(0, ...places) + 1), []));
    rows.push(row("unplaced", "place tray", "Not placed", unplaced));
  }
  rows.push(row("none", "place tray none", "Cannot judge", none));
  byId("places").replaceChildren(...rows);
  if (focused !== undefined) byId("places").querySelector(`[data-drag="${focused}"]`)?.focus();

  function row(drop, kind, name, members) {
    const label = drop.startsWith("group:") ? `Place ${name}` : { end: "Next place", unplaced: "Not placed", none: "Cannot judge" }[drop];
    const chips = members.map((i) => h("button", {
      class: "chip", type: "button", "data-drag": i, "aria-label": `${LETTERS[i]}, ${describe(places, i)}`,
      "aria-describedby": "board-hint", on: { click: () => press(i), keydown: (event) => key(event, i) },
    }, LETTERS[i]));
    return h("div", { class: kind, "data-drop": drop, role: "group", "aria-label": label },
      name ? h("span", { class: "place-name", "aria-hidden": "true" }, name) : null, ...chips);
  }
}
