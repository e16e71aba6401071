// The ranking board: a row for each place with the letters in it, the letters not placed yet, and "cannot judge".

import { byId, h } from "./dom.js";
import { LETTERS, describe, groups } from "./ranking.js";

const NAMES = { end: "Next place", unplaced: "Not placed", none: "Cannot judge" };

export class Board {
  /** A board for `size` answers; `press(i)` is called for a letter that is clicked, `key(event, i)` for a key on it. */
  constructor(size, press, key) {
    // the same elements for the whole item: a finger that holds one must not lose it when the rows are drawn again
    this.chips = Array.from({ length: size }, (_, i) => h("button", {
      class: "chip", type: "button", "data-drag": i, "aria-describedby": "board-hint",
      on: { click: () => press(i), keydown: (event) => key(event, i) },
    }, LETTERS[i]));
  }

  /** Show the places. */
  draw(places) {
    const focused = this.chips.find((chip) => chip === document.activeElement);
    this.chips.forEach((chip, i) => chip.setAttribute("aria-label", `${LETTERS[i]}, ${describe(places, i)}`));
    const rows = groups(places).map(({ place, members }) => this.row(`group:${place}`, "place", String(place), members));
    const unplaced = places.flatMap((one, i) => (one === null ? [i] : []));
    const none = places.flatMap((one, i) => (one === 0 ? [i] : []));
    if (unplaced.length) {
      rows.push(this.row("end", "place open", String(Math.max(0, ...places) + 1), []));
      rows.push(this.row("unplaced", "place tray", NAMES.unplaced, unplaced));
    }
    rows.push(this.row("none", "place tray none", NAMES.none, none));
    byId("places").replaceChildren(...rows);
    focused?.focus({ preventScroll: true });
  }

  row(drop, kind, name, members) {
    return h("div", { class: kind, "data-drop": drop, role: "group", "aria-label": NAMES[drop] ?? `Place ${name}` },
      h("span", { class: "place-name", "aria-hidden": "true" }, name), ...members.map((i) => this.chips[i]));
  }
}
